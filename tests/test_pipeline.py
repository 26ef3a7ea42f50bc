"""A pipeline's schedule is possible, its bubble is the formula's, and its gradients are exact."""

import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy

from coursekit import models, train
from coursekit.parallelism.collectives import run_ranks
from coursekit.parallelism.pipeline import (
    idle_share,
    layout,
    peak_activations,
    pipeline_bubble,
    pipeline_schedule,
)

KINDS = ["gpipe", "1f1b"]
SMALL = st.integers(1, 7)


# ---- the schedule ----


@pytest.mark.covers("P3")
def test_the_bubble_by_hand():
    assert pipeline_bubble(1, 5) == 0
    assert pipeline_bubble(4, 1) == 0.75
    assert pipeline_bubble(8, 32) == pytest.approx(7 / 39)


@pytest.mark.covers("P3")
@pytest.mark.parametrize("kind", KINDS)
@given(stages=SMALL, microbatches=SMALL, backward=st.floats(0.1, 5))
def test_the_idle_share_of_a_schedule_is_the_bubble(kind, stages, microbatches, backward):
    tasks = pipeline_schedule(stages, microbatches, kind, backward=backward)
    assert idle_share(tasks) == pytest.approx(pipeline_bubble(stages, microbatches))


@pytest.mark.parametrize("kind", KINDS)
@given(stages=SMALL, microbatches=SMALL, transfer=st.floats(0, 2))
def test_a_schedule_does_every_task_once_and_nothing_before_what_it_needs(
    kind, stages, microbatches, transfer
):
    tasks = pipeline_schedule(stages, microbatches, kind, transfer=transfer)
    end = {(t.kind, t.stage, t.microbatch): t.end for t in tasks}
    assert len(end) == len(tasks) == 2 * stages * microbatches
    for t in tasks:
        assert t.end - t.start == pytest.approx(1 if t.kind == "forward" else 2)
        before = t.stage - 1 if t.kind == "forward" else t.stage + 1
        if 0 <= before < stages:
            assert t.start >= end[t.kind, before, t.microbatch] + transfer
        if t.kind == "backward":
            assert t.start >= end["forward", t.stage, t.microbatch]
    for stage in range(stages):
        mine = [t for t in tasks if t.stage == stage]
        assert all(a.end <= b.start for a, b in zip(mine, mine[1:], strict=False))


@pytest.mark.covers("P3")
@pytest.mark.parametrize(("stages", "microbatches"), [(4, 8), (4, 2), (1, 3), (3, 3)])
def test_1f1b_keeps_as_many_micro_batches_as_stages_are_left_and_gpipe_all(stages, microbatches):
    gpipe = pipeline_schedule(stages, microbatches, "gpipe")
    assert peak_activations(gpipe) == [microbatches] * stages
    one = pipeline_schedule(stages, microbatches, "1f1b")
    assert peak_activations(one) == [min(stages - s, microbatches) for s in range(stages)]


def test_two_stages_and_two_micro_batches_by_hand():
    tasks = pipeline_schedule(2, 2, "1f1b", forward=1, backward=1)
    said = [(t.stage, t.microbatch, t.kind[0], t.start) for t in tasks]
    assert said == [
        (0, 0, "f", 0), (0, 1, "f", 1), (1, 0, "f", 1), (1, 0, "b", 2),
        (0, 0, "b", 3), (1, 1, "f", 3), (1, 1, "b", 4), (0, 1, "b", 5),
    ]  # fmt: skip


def test_transfers_lengthen_the_bubble():
    idle = [idle_share(pipeline_schedule(3, 6, transfer=t)) for t in (0, 0.5, 1)]
    assert idle == sorted(idle)
    assert idle[0] < idle[2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stages": 0}, ValueError, "stages of at least 1, got 0"),
        ({"microbatches": 1.5}, TypeError, "microbatches as an integer, got 1.5"),
        ({"kind": "zero"}, ValueError, "kind to be one of 'gpipe', '1f1b', got 'zero'"),
        ({"forward": 0}, ValueError, "forward positive and finite, got 0"),
        ({"backward": -1}, ValueError, "backward positive and finite, got -1"),
        ({"transfer": -1}, ValueError, r"transfer in \[0, inf\], got -1"),
    ],
)
def test_pipeline_schedule_refuses(change, error, message):
    with pytest.raises(error, match=f"pipeline_schedule: expected {message}"):
        pipeline_schedule(**{"stages": 2, "microbatches": 2} | change)


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_pipeline_bubble_refuses(arguments):
    with pytest.raises(ValueError, match="pipeline_bubble: expected .* of at least 1, got 0"):
        pipeline_bubble(*arguments)


# ---- layouts ----


@pytest.mark.covers("P5")
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_the_groups_of_a_layout_are_the_lines_of_a_grid(sizes):
    grid = np.arange(np.prod(sizes)).reshape(sizes)
    groups = layout(**{f"axis{i}": size for i, size in enumerate(sizes)})
    for i, size in enumerate(sizes):
        lines = {tuple(line) for line in np.moveaxis(grid, i, -1).reshape(-1, size).tolist()}
        assert set(groups[f"axis{i}"]) == lines
        assert len(groups[f"axis{i}"]) == len(lines)


def test_ranks_of_a_layout_meet_in_the_groups_it_names():
    groups = layout(data=2, stage=2, tensor=2)
    assert groups["tensor"][0] == (0, 1)
    assert groups["data"][0] == (0, 4)

    def members(group, **axes):
        found = {}
        for name, axis in axes.items():
            ranks = torch.zeros(8)
            ranks[group.rank()] = 1
            axis.allreduce([ranks]).wait()
            found[name] = tuple(ranks.nonzero().flatten().tolist())
        return found

    for rank, found in enumerate(run_ranks(members, 8, groups=groups)):
        for name, mine in found.items():
            assert rank in mine
            assert mine in groups[name]


def test_layout_refuses_an_empty_axis():
    with pytest.raises(ValueError, match="layout: expected data of at least 1, got 0"):
        layout(data=0)


# ---- processes ----

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def net_and_data():
    """A net of two stages, and eight rows, that all processes can make."""
    net = models.mlp([6, 9, 9, 4], generator=train.generator(2, "init"))
    x = torch.randn(8, 6, generator=train.generator(2, "data"))
    return net, x, torch.arange(8) % 4


def stage_rank(rank, world, folder):
    """Run one stage of torch's pipelines, and store the gradients of its parameters."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    found = {}
    for kind, schedule in SCHEDULES.items():
        net, x, y = net_and_data()
        part = [net[:2], net[2:]][rank]
        stage = PipelineStage(part, rank, world, torch.device("cpu"))
        run = schedule(stage, 4, loss_fn=cross_entropy)
        if rank == 0:
            run.step(x)
        else:
            run.step(target=y)
        found[kind] = [p.grad for p in part.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.covers("P3")
def test_gradients_of_torchs_pipelines_equal_those_of_a_single_process(tmp_path):  # spec 5.20
    context = torch.multiprocessing.spawn(stage_rank, (2, str(tmp_path)), nprocs=2, join=False)
    end = time.monotonic() + 100
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the pipeline has not ended in 100 s"
    finally:
        for process in context.processes:
            process.kill()
    net, x, y = net_and_data()
    right = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in SCHEDULES:
        found = parts[0][kind] + parts[1][kind]
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
