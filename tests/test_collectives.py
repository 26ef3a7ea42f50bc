"""Collectives made of sends and receives agree with torch's, and cost what the model says."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit.parallelism.collectives import (
    CountedGroup,
    all_reduce_cost,
    amdahl_speedup,
    copy_to_ranks,
    ring_all_reduce,
    run_ranks,
    server_all_reduce,
    sum_over_ranks,
)
from coursekit.parallelism.pipeline import layout

ALPHA, BETA = 50e-6, 1e-9  # s a message, s a byte


def own(rank, shape, dtype=torch.float64):
    """The tensor of a rank."""
    return torch.randn(shape, generator=train.generator(rank, "tensor"), dtype=dtype)


def by_torch(x, group):
    """Torch's own sum over ranks."""
    total = x.clone()
    group.allreduce([total]).wait()
    return total


# ---- sums over ranks ----


@pytest.mark.covers("P5")
@pytest.mark.parametrize("ours", [ring_all_reduce, server_all_reduce])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_reduce_of_sends_and_receives_is_torchs_all_reduce(ours, world, dtype):
    def both(group):
        x = own(group.rank(), (3, 7), dtype)
        return ours(x, group), by_torch(x, group)

    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-14}
    for found, right in run_ranks(both, world):
        torch.testing.assert_close(found, right, **close)


@pytest.mark.parametrize("ours", [ring_all_reduce, server_all_reduce])
def test_a_transposed_tensor_is_summed_as_well(ours):
    total = run_ranks(lambda group: ours(own(group.rank(), (3, 7)).T, group), 2)
    for found in total:
        torch.testing.assert_close(found, (own(0, (3, 7)) + own(1, (3, 7))).T)


@given(world=st.integers(1, 4), size=st.integers(0, 9))
@settings(max_examples=15)
def test_ring_all_reduce_sums_tensors_of_any_length_even_shorter_than_the_ring(world, size):
    found = run_ranks(lambda group: ring_all_reduce(own(group.rank(), size), group), world)
    right = sum(own(rank, size) for rank in range(world))
    for total in found:
        torch.testing.assert_close(total, right, rtol=0, atol=1e-14)


def test_all_ranks_hold_the_same_bits_after_a_ring_all_reduce():
    found = run_ranks(lambda g: ring_all_reduce(own(g.rank(), 1001, torch.float32), g), 4)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_ring_all_reduce_leaves_its_argument_as_it_was():
    def inside(group):
        x = own(group.rank(), 8)
        ring_all_reduce(x, group)
        return torch.equal(x, own(group.rank(), 8))

    assert all(run_ranks(inside, 3))


@pytest.mark.covers("P5")
def test_a_rank_of_the_ring_sends_two_m_minus_one_chunks_and_the_server_that_many_tensors():
    def counted(group, method):
        group = CountedGroup(group)
        method(torch.zeros(12, dtype=torch.float64), group)
        return group.messages, group.bytes

    world, size = 4, 12 * 8
    for messages, sent in run_ranks(lambda g: counted(g, ring_all_reduce), world):
        assert (messages, sent) == (2 * (world - 1), 2 * (world - 1) * size // world)
    server, *others = run_ranks(lambda g: counted(g, server_all_reduce), world)
    assert server == (world - 1, (world - 1) * size)
    assert others == [(1, size)] * (world - 1)


def test_a_ring_that_forgets_to_hand_the_sums_on_is_found():
    def reduce_scatter_only(x, group):
        rank, size = group.rank(), group.size()
        chunks = list(x.tensor_split(size))
        for step in range(size - 1):
            received = torch.empty_like(chunks[(rank - step - 1) % size])
            sending = group.send([chunks[(rank - step) % size]], (rank + 1) % size, 0)
            group.recv([received], (rank - 1) % size, 0).wait()
            sending.wait()
            chunks[(rank - step - 1) % size] = chunks[(rank - step - 1) % size] + received
        return torch.cat(chunks)

    found = run_ranks(lambda g: reduce_scatter_only(own(g.rank(), 6), g), 3)
    right = sum(own(rank, 6) for rank in range(3))
    for rank, total in enumerate(found):  # one chunk is right, the others are not
        good = [torch.allclose(a, b) for a, b in zip(total.split(2), right.split(2), strict=True)]
        assert good == [chunk == (rank + 1) % 3 for chunk in range(3)]


# ---- ranks as threads ----


def test_an_error_in_one_rank_ends_the_waits_of_all_at_once():
    def fails(group):
        if group.rank() == 1:
            raise KeyError("of rank 1")
        return ring_all_reduce(torch.ones(4), group)

    begin = time.monotonic()
    with pytest.raises(KeyError, match="of rank 1"):
        run_ranks(fails, 3, deadline=60.0)
    assert time.monotonic() - begin < 20


def test_a_rank_that_never_comes_is_a_timeout_and_no_hang():
    def silent(group):
        return None if group.rank() else group.recv([torch.zeros(1)], 1, 0).wait()

    with pytest.raises((TimeoutError, RuntimeError), match=r"(?i)within|timed out"):
        run_ranks(silent, 2, deadline=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"world_size": 0}, ValueError, "world_size of at least 1, got 0"),
        ({"world_size": 2.0}, TypeError, "world_size as an integer, got 2.0"),
        ({"world_size": 1, "deadline": 0}, ValueError, "deadline positive and finite, got 0"),
    ],
)
def test_run_ranks_refuses(arguments, error, message):
    with pytest.raises(error, match=rf"run_ranks: expected {message}"):
        run_ranks(lambda group: None, **arguments)


# ---- one model on several ranks ----


def reference(x, y, net):
    """Loss gradients of one process."""
    return torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))


def split_net(x, net, tensor):
    """The two layers of a net with their hidden units split over a group."""
    first, _, last = net
    mine = torch.arange(first.out_features).tensor_split(tensor.size())[tensor.rank()]
    part = [first.weight[mine], first.bias[mine], last.weight[:, mine]]
    hidden = torch.relu(copy_to_ranks(x, tensor) @ part[0].T + part[1])
    return mine, sum_over_ranks(hidden @ part[2].T, tensor) + last.bias


@pytest.mark.covers("P3")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_layer_split_by_columns_and_rows_gives_the_outputs_and_gradients_of_one_process(world):
    net = models.mlp([5, 8, 3], generator=train.generator(0, "init")).double()
    x, y = own(0, (6, 5)).requires_grad_(), torch.arange(6) % 3
    right = [*reference(x, y, net), torch.autograd.grad(cross_entropy(net(x), y), x)[0]]

    def inside(group):
        mine, output = split_net(x, net, group)
        wrt = [*net.parameters(), x]
        gradients = torch.autograd.grad(cross_entropy(output, y), wrt)
        return mine, output.detach(), gradients

    for mine, output, (w1, b1, w2, b2, gx) in run_ranks(inside, world):
        torch.testing.assert_close(output, net(x).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(w1[mine], right[0][mine], rtol=0, atol=1e-12)
        torch.testing.assert_close(b1[mine], right[1][mine], rtol=0, atol=1e-12)
        torch.testing.assert_close(w2[:, mine], right[2][:, mine], rtol=0, atol=1e-12)
        torch.testing.assert_close(b2, right[3], rtol=0, atol=1e-12)
        torch.testing.assert_close(gx, right[4], rtol=0, atol=1e-12)


def test_without_the_sum_of_input_gradients_the_layer_before_would_be_wrong():
    net = models.mlp([5, 8, 3], generator=train.generator(0, "init")).double()
    x, y = own(0, (6, 5)).requires_grad_(), torch.arange(6) % 3
    (right,) = torch.autograd.grad(cross_entropy(net(x), y), x)

    def inside(group):
        first, _, last = net
        mine = torch.arange(8).tensor_split(2)[group.rank()]
        hidden = torch.relu(x @ first.weight[mine].T + first.bias[mine])  # x not copied
        output = sum_over_ranks(hidden @ last.weight[:, mine].T, group) + last.bias
        return torch.autograd.grad(cross_entropy(output, y), x)[0]

    found = run_ranks(inside, 2)
    assert not any(torch.allclose(part, right) for part in found)
    torch.testing.assert_close(sum(found), right)


@pytest.mark.covers("P5")
def test_data_times_tensor_parallel_ranks_give_the_gradient_of_one_process():
    net = models.mlp([64, 12, 10], generator=train.generator(0, "init")).double()
    x, y, _, _ = data.load("digits").tensors(dtype=torch.float64)
    x, y = x[:32], y[:32]
    right = reference(x, y, net)[0]

    def inside(group, data, tensor):
        rows = torch.arange(32).tensor_split(data.size())[data.rank()]
        mine, output = split_net(x[rows], net, tensor)
        gradient = torch.autograd.grad(cross_entropy(output, y[rows]), net[0].weight)[0]
        return mine, ring_all_reduce(gradient[mine], data) / data.size()

    for mine, gradient in run_ranks(inside, 4, groups=layout(data=2, tensor=2)):
        torch.testing.assert_close(gradient, right[mine], rtol=0, atol=1e-12)


# ---- the model of costs ----


@pytest.mark.covers("P5")
@pytest.mark.parametrize(
    ("method", "messages", "tensors"),
    [("ring", 6, 1.5), ("server", 6, 6), ("tree", 4, 4), ("halving", 4, 1.5)],
)
def test_the_cost_of_four_workers_by_hand(method, messages, tensors):
    for size in (0, 4096, 10**8):
        cost = all_reduce_cost(size, 4, latency=ALPHA, per_byte=BETA, method=method)
        assert cost == pytest.approx(messages * ALPHA + tensors * size * BETA)


@given(workers=st.integers(2, 500))
def test_a_ring_moves_less_than_two_tensors_whatever_the_number_of_workers(workers):
    ring = all_reduce_cost(1e6, workers, latency=0, per_byte=1e-6)
    assert 1 <= ring < 2
    server = all_reduce_cost(1e6, workers, latency=0, per_byte=1e-6, method="server")
    assert server == pytest.approx(workers * ring)


def test_a_tree_beats_a_ring_for_small_tensors_and_loses_for_large_ones():
    def cost(size, method):
        return all_reduce_cost(size, 64, latency=ALPHA, per_byte=BETA, method=method)

    assert cost(1e3, "tree") < 0.2 * cost(1e3, "ring")
    assert cost(1e9, "ring") < 0.2 * cost(1e9, "tree")
    for size in (1e3, 1e6, 1e9):
        assert cost(size, "halving") <= min(cost(size, "ring"), cost(size, "tree"))


@pytest.mark.parametrize("method", ["ring", "server", "tree", "halving"])
def test_one_worker_has_nothing_to_send(method):
    assert all_reduce_cost(1e9, 1, latency=1.0, per_byte=1.0, method=method) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "workers of at least 1, got 0"),
        ({"size": -1}, r"size in \[0, inf\], got -1"),
        ({"latency": -1}, r"latency in \[0, inf\], got -1"),
        ({"per_byte": math.nan}, r"per_byte in \[0, inf\], got nan"),
        ({"method": "star"}, "method to be one of 'ring', 'server', 'tree', 'halving', got 'star'"),
    ],
)
def test_all_reduce_cost_refuses(change, message):
    good = {"size": 1, "workers": 2, "latency": 1, "per_byte": 1}
    with pytest.raises(ValueError, match=f"all_reduce_cost: expected {message}"):
        all_reduce_cost(**good | change)


@pytest.mark.covers("P5")
def test_amdahl_by_hand_and_at_its_ends():
    assert amdahl_speedup(0.5, 2) == pytest.approx(4 / 3)
    assert amdahl_speedup(0.0, 7) == pytest.approx(7)
    assert amdahl_speedup(1.0, 7) == 1
    assert amdahl_speedup(0.05, 10**9) == pytest.approx(20, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.1, 2), r"serial in \[0, 1\], got 1.1"), ((0.1, 0), "workers of at least 1, got 0")],
)
def test_amdahl_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"amdahl_speedup: expected {message}"):
        amdahl_speedup(*arguments)


# ---- processes ----


def ddp_rank(rank, world, folder):
    """Train one rank of DDP for a few steps, and sum one tensor by our ring and by torch's."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    net = small_net()
    parallel = nn.parallel.DistributedDataParallel(net)
    x, y = small_data()
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    for rows in torch.arange(40).split(8):
        mine = rows.tensor_split(world)[rank]
        optimizer.zero_grad()
        cross_entropy(parallel(x[mine]), y[mine]).backward()
        optimizer.step()
    total = own(rank, 10, torch.float32)
    ours = ring_all_reduce(total)
    dist.all_reduce(total)
    torch.save({"net": net.state_dict(), "ours": ours, "torch": total}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def small_net():
    """A net all processes can build."""
    return models.mlp([6, 9, 4], generator=train.generator(1, "init"))


def small_data():
    """Forty rows all processes can draw."""
    return own(7, (40, 6), torch.float32), torch.arange(40) % 4


@pytest.mark.covers("P1")
def test_ddp_equals_a_single_process_and_its_all_reduce_our_ring(tmp_path):  # spec 5.20
    context = torch.multiprocessing.spawn(ddp_rank, (2, str(tmp_path)), nprocs=2, join=False)
    end = time.monotonic() + 100
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "DDP has not ended in 100 s"
    finally:
        for process in context.processes:
            process.kill()
    net, (x, y) = small_net(), small_data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for rows in torch.arange(40).split(8):
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["net"], dict(net.state_dict()), rtol=0, atol=1e-6)
        torch.testing.assert_close(found["ours"], found["torch"], rtol=0, atol=1e-6)
