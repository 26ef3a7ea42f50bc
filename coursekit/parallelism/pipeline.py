"""One model on several devices: a pipeline of stages, its bubble, and layouts of many ranks."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from coursekit import _check


class Task(NamedTuple):
    """One micro-batch in one stage: ``kind`` is forward or backward, times in the given unit."""

    stage: int
    microbatch: int
    kind: str
    start: float
    end: float


def pipeline_bubble(stages: int, microbatches: int) -> float:
    """Return the share of time in which a stage of a pipeline has nothing to do.

    (S − 1) / (S − 1 + m), for GPipe as for 1F1B

    Parameters
    ----------
    stages, microbatches
        S and m, at least 1 each. All stages take the same time.

    Returns
    -------
    float
        In [0, 1).

    Source: Y. Huang et al., GPipe, arXiv:1811.06965v5, section 2.3.
    Curriculum: P3.

    Examples
    --------
    >>> pipeline_bubble(4, 1), pipeline_bubble(4, 12)
    (0.75, 0.2)
    """
    _check.integer("pipeline_bubble", "stages", stages, at_least=1)
    _check.integer("pipeline_bubble", "microbatches", microbatches, at_least=1)
    return (stages - 1) / (stages - 1 + microbatches)


def pipeline_schedule(
    stages: int,
    microbatches: int,
    kind: str = "1f1b",
    *,
    forward: float = 1.0,
    backward: float = 2.0,
    transfer: float = 0.0,
) -> list[Task]:
    """Return who computes what and when, in a pipeline that is emptied before each update.

    A stage works through its own list, in order, each task as soon as what it needs is there.

    Parameters
    ----------
    stages, microbatches
        At least 1 each.
    kind
        "gpipe": all forward passes, then all backward passes. "1f1b": stage s of S begins with
        S − 1 − s forward passes and then alternates, so that it stores few activations.
    forward, backward
        Time of a pass of one micro-batch through one stage.
    transfer
        Time from one stage to the next; the sender goes on meanwhile.

    Returns
    -------
    list of Task
        Ordered by start, then by stage.

    Raises
    ------
    ValueError
        For an unknown kind, or times that are not positive.

    Source: Y. Huang et al., GPipe, arXiv:1811.06965v5, figure 2; D. Narayanan et al., PipeDream,
    SOSP (2019), figure 4, with a flush as in Megatron-LM, arXiv:2104.04473v5, figure 3.
    Curriculum: P3.

    Examples
    --------
    >>> for task in pipeline_schedule(2, 1):
    ...     print(*task)
    0 0 forward 0.0 1.0
    1 0 forward 1.0 2.0
    1 0 backward 2.0 4.0
    0 0 backward 4.0 6.0
    """
    _check.integer("pipeline_schedule", "stages", stages, at_least=1)
    _check.integer("pipeline_schedule", "microbatches", microbatches, at_least=1)
    _check.one_of("pipeline_schedule", "kind", kind, ("gpipe", "1f1b"))
    _check.positive("pipeline_schedule", "forward", forward)
    _check.positive("pipeline_schedule", "backward", backward)
    _check.in_range("pipeline_schedule", "transfer", transfer, 0, math.inf)
    queues = [_order(kind, s, stages, microbatches) for s in range(stages)]
    ended: dict[tuple[str, int, int], float] = {}
    free, tasks = [0.0] * stages, []
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                what, microbatch = queue[0]
                before = stage - 1 if what == "forward" else stage + 1
                if 0 <= before < stages and (what, before, microbatch) not in ended:
                    break
                ready = ended.get((what, before, microbatch), -transfer) + transfer
                start = max(free[stage], ready)
                free[stage] = ended[what, stage, microbatch] = start + (
                    forward if what == "forward" else backward
                )
                tasks.append(Task(stage, microbatch, what, start, free[stage]))
                queue.pop(0)
    return sorted(tasks, key=lambda task: (task.start, task.stage))


def _order(kind: str, stage: int, stages: int, microbatches: int) -> list[tuple[str, int]]:
    """List what a stage does: forward passes first, then pairs, then what is left to go back."""
    ahead = microbatches if kind == "gpipe" else min(stages - 1 - stage, microbatches)
    first = [("forward", i) for i in range(ahead)]
    for i in range(microbatches - ahead):
        first += [("forward", ahead + i), ("backward", i)]
    return first + [("backward", i) for i in range(microbatches - ahead, microbatches)]


def idle_share(schedule: Iterable[Task]) -> float:
    """Return the share of all stages' time, from the first start to the last end, without work.

    Curriculum: P3.
    """
    tasks = list(schedule)
    stages = len({task.stage for task in tasks})
    span = max(task.end for task in tasks) - min(task.start for task in tasks)
    return 1 - sum(task.end - task.start for task in tasks) / (stages * span)


def peak_activations(schedule: Iterable[Task]) -> list[int]:
    """Return for each stage how many micro-batches it has to keep activations of at most.

    From the start of a forward pass until the end of the backward pass of the same micro-batch: m
    in GPipe, min(S − s, m) in 1F1B.

    Curriculum: P3.
    """
    held, peak = Counter[int](), Counter[int]()
    for task in sorted(schedule, key=lambda task: task.start):
        held[task.stage] += 1 if task.kind == "forward" else -1
        peak[task.stage] = max(peak[task.stage], held[task.stage])
    return [peak[stage] for stage in sorted(peak)]


def layout(**sizes: int) -> dict[str, list[tuple[int, ...]]]:
    """Return, for each axis of a grid of ranks, the groups of ranks that differ in it alone.

    Ranks are numbered row by row, so those of the last axis are neighbours: the axis that talks
    most goes last.

    Parameters
    ----------
    **sizes
        Name and length of each axis, such as ``data=2, stage=2, tensor=2``; `ValueError` for a
        length below 1.

    Returns
    -------
    dict
        What `run_ranks` takes as ``groups``.

    Curriculum: P5.

    Examples
    --------
    >>> layout(data=2, tensor=3)
    {'data': [(0, 3), (1, 4), (2, 5)], 'tensor': [(0, 1, 2), (3, 4, 5)]}
    """
    for name, size in sizes.items():
        _check.integer("layout", name, size, at_least=1)
    groups, world = {}, math.prod(sizes.values())
    stride = world
    for name, size in sizes.items():
        block, stride = stride, stride // size
        starts = [i for i in range(world) if i % block < stride]
        groups[name] = [tuple(range(i, i + block, stride)) for i in starts]
    return groups
