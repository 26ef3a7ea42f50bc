"""Sums over ranks: made of sends and receives, and what they cost by the model.

A *group* is anything with torch's methods ``rank``, ``size``, ``send``, ``recv``, ``allreduce``:
`torch.distributed.group.WORLD` in a real run, or what `run_ranks` hands to each of its threads.
"""

import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coursekit import _check


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *,
    groups: Mapping[str, Sequence[Sequence[int]]] | None = None,
    deadline: float = 30.0,
) -> list[Any]:
    """Run a function as several ranks at once, each a thread of this process.

    The collectives are real: gloo on loopback, with no process to start and nothing to pickle.

    Parameters
    ----------
    function
        Called as ``function(group)`` in every rank, with one keyword more for each name in
        ``groups``.
    world_size
        How many ranks.
    groups
        For each name a partition of the ranks, as `layout` makes it; a rank gets its own part.
    deadline
        Seconds after which a rank that waits gives up, and so does the caller.

    Returns
    -------
    list
        What each rank returned.

    Raises
    ------
    TimeoutError
        If a rank is not done in time. An error in a rank is raised as it is, at once: its
        connections are closed, which ends the waits of all others.

    Curriculum: P5.

    Examples
    --------
    >>> run_ranks(lambda group: ring_all_reduce(torch.tensor([group.rank(), 1.0]), group), 3)
    [tensor([3., 3.]), tensor([3., 3.]), tensor([3., 3.])]
    """
    _check.integer("run_ranks", "world_size", world_size, at_least=1)
    _check.positive("run_ranks", "deadline", deadline)
    parts = {"world": [range(world_size)], **(groups or {})}
    store = dist.HashStore()
    done: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
    alive: list[dict[str, Any]] = [{} for _ in range(world_size)]  # kept until all are done

    def work(rank: int) -> None:
        try:
            for name, partition in parts.items():
                mine = next(part for part in partition if rank in part)
                alive[rank][name] = _connect(store, f"{name}/{mine[0]}", mine, rank, deadline)
            own = dict(alive[rank])
            done.put((rank, function(own.pop("world"), **own), None))
        except BaseException as error:
            done.put((rank, None, error))
            own = {}
            traceback.clear_frames(error.__traceback__)  # they hold the group, and it must close
            alive[rank].clear()

    for rank in range(world_size):
        threading.Thread(target=work, args=(rank,), daemon=True).start()
    results, end = [None] * world_size, time.monotonic() + deadline
    for finished in range(world_size):
        try:
            rank, results[rank], error = done.get(timeout=max(end - time.monotonic(), 1e-3))
        except queue.Empty:
            raise TimeoutError(
                f"run_ranks: expected {world_size} ranks within {deadline:g} s, got {finished}"
            ) from None
        if error is not None:
            raise error
    return results


def _connect(store: Any, name: str, ranks: Sequence[int], rank: int, deadline: float) -> Any:
    """Make a group of gloo on loopback whose ranks count from zero in the order given."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=deadline)
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(dist.PrefixStore(name, store), list(ranks).index(rank), len(ranks), options)


class CountedGroup:
    """A group that counts what its rank sends, in ``messages`` and ``bytes``, to each peer.

    Curriculum: P5.
    """

    def __init__(self, group: Any):
        self.group, self.messages, self.bytes = group, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        """Count, and send."""
        self.messages += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return self.group.send(tensors, to, tag)


def ring_all_reduce(x: Tensor, group: Any = None) -> Tensor:
    """Return the sum of the tensors of all ranks, passed round a ring in chunks.

    M − 1 steps add, after which each chunk is complete in one rank; M − 1 steps hand it on. In each
    step a rank sends one chunk of x.numel()/M numbers to the next rank and gets one from the rank
    before, so it sends 2(M−1)/M of the tensor in all, however many ranks there are.

    Parameters
    ----------
    x
        Of any shape, the same in all ranks; left as it is.
    group
        The ranks; all of them, `torch.distributed.group.WORLD`, unless given.

    Returns
    -------
    Tensor of the shape of x
        Bitwise the same in all ranks, since each chunk is summed in one place. The order of the
        sum differs from chunk to chunk, and so may the rounding from a sum in one process.

    Source: P. Patarasuk and X. Yuan, Bandwidth optimal all-reduce algorithms for clusters of
    workstations, JPDC 69 (2009), section 3.
    Curriculum: P5.
    """
    group = dist.group.WORLD if group is None else group
    rank, size = group.rank(), group.size()
    total = x.detach().reshape(-1).clone()
    chunks = total.tensor_split(size)
    for step in range(2 * (size - 1)):
        mine, theirs = chunks[(rank - step) % size], chunks[(rank - step - 1) % size]
        adding = step < size - 1  # reduce-scatter, then all-gather
        received = torch.empty_like(theirs) if adding else theirs
        sending = group.send([mine], (rank + 1) % size, 0)
        group.recv([received], (rank - 1) % size, 0).wait()
        sending.wait()
        if adding:
            theirs += received
    return total.view(x.shape)


def server_all_reduce(x: Tensor, group: Any = None) -> Tensor:
    """Return the sum of the tensors of all ranks, made by rank 0 and sent back to the others.

    What a parameter server does in a synchronous step: 2(M−1) whole tensors go over one link.

    Parameters
    ----------
    x, group
        As in `ring_all_reduce`.

    Curriculum: P5.
    """
    group = dist.group.WORLD if group is None else group
    total = x.detach().clone(memory_format=torch.contiguous_format)  # as packets must be
    one = torch.empty_like(total)
    if group.rank():
        group.send([total], 0, 0).wait()
        group.recv([total], 0, 0).wait()
        return total
    for other in range(1, group.size()):
        group.recv([one], other, 0).wait()
        total += one
    for other in range(1, group.size()):
        group.send([total], other, 0).wait()
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return ring_all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def copy_to_ranks(x: Tensor, group: Any) -> Tensor:
    """Return x, which all ranks hold; where a gradient comes back, those of all ranks are summed.

    It stands before a layer whose outputs are split over the ranks: f of the source.

    Source: M. Shoeybi et al., Megatron-LM, arXiv:1909.08053v4, section 3.
    Curriculum: P3.
    """
    y = x.clone()
    if y.requires_grad:
        y.register_hook(lambda gradient: ring_all_reduce(gradient, group))
    return y


def sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """Return the sum of x over the ranks; a gradient that comes back goes to each as it is.

    It stands after a layer whose inputs are split over the ranks: g of the source. The gradient of
    the sum is the same in all ranks, so they need not exchange it.

    Source: M. Shoeybi et al., Megatron-LM, arXiv:1909.08053v4, section 3.
    Curriculum: P3.
    """
    return _Sum.apply(x, group)


# Messages one after another, and tensors that pass the busiest link, for M ranks.
_COSTS: dict[str, Callable[[int], tuple[float, float]]] = {
    "ring": lambda m: (2 * (m - 1), 2 * (m - 1) / m),
    "server": lambda m: (2 * (m - 1), 2 * (m - 1)),
    "tree": lambda m: (2 * math.ceil(math.log2(m)),) * 2,
    "halving": lambda m: (2 * math.ceil(math.log2(m)), 2 * (m - 1) / m),
}


def all_reduce_cost(
    size: float, workers: int, *, latency: float, per_byte: float, method: str = "ring"
) -> float:
    """Return the time of an all-reduce by the α–β model.

    T = messages · α + factor · size · β, with (messages, factor) for M workers

    ring (2(M−1), 2(M−1)/M), server (2(M−1), 2(M−1)), tree (2⌈log₂M⌉, 2⌈log₂M⌉),
    halving (2⌈log₂M⌉, 2(M−1)/M)

    Parameters
    ----------
    size
        Of the tensor, in bytes.
    workers
        M, at least 1.
    latency, per_byte
        α, seconds a message takes whatever its size, and β, seconds a byte takes more.
    method
        "ring"; "server", where one of the workers adds and sends back; "tree", which sums and
        broadcasts along a binary tree; "halving", recursive halving and doubling, whose figures
        hold for powers of two.

    Returns
    -------
    float
        Seconds. Adding up costs nothing in this model, and links do not disturb each other.

    Raises
    ------
    ValueError
        For numbers that are negative, or an unknown method.

    Source: R. Thakur, R. Rabenseifner and W. Gropp, Optimization of collective communication
    operations in MPICH, IJHPCA 19 (2005).
    Curriculum: P5.

    Examples
    --------
    >>> ring = all_reduce_cost(100e6, 8, latency=50e-6, per_byte=1e-9)
    >>> server = all_reduce_cost(100e6, 8, latency=50e-6, per_byte=1e-9, method="server")
    >>> f"{ring:.4f} {server:.4f}"
    '0.1757 1.4007'
    """
    _check.integer("all_reduce_cost", "workers", workers, at_least=1)
    _check.one_of("all_reduce_cost", "method", method, _COSTS)
    for name, value in (("size", size), ("latency", latency), ("per_byte", per_byte)):
        _check.in_range("all_reduce_cost", name, value, 0, math.inf)
    messages, factor = _COSTS[method](workers)
    return messages * latency + factor * size * per_byte


def amdahl_speedup(serial: float, workers: int) -> float:
    """Return how many times faster M workers are when a share s of the work cannot be divided.

    1 / (s + (1 − s)/M), which is below 1/s for any M

    `ValueError` for a share outside [0, 1] or fewer than one worker.

    Source: G. M. Amdahl, Validity of the single processor approach, AFIPS (1967).
    Curriculum: P5.

    Examples
    --------
    >>> f"{amdahl_speedup(0.1, 8):.2f} {amdahl_speedup(0.1, 10**6):.2f}"
    '4.71 10.00'
    """
    _check.in_range("amdahl_speedup", "serial", serial)
    _check.integer("amdahl_speedup", "workers", workers, at_least=1)
    return 1 / (serial + (1 - serial) / workers)
