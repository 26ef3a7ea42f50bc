"""What every parameter server does, whatever its rule: receive, pull, join, leave and one step.

Nothing is written in place: each function returns a new `Server`, so an old one stays what it was
and a backup w_bak(m) costs no copy. The simulator and every engine use these functions and take
the rule, ``(server, push, lr) -> (server, workers to be served now)``, as an argument.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, "n"]
Memory = Mapping[str, Tensor]
# (gradient, displacement w − w_bak, memory) -> what is added to the gradient, memory, share capped
Correction = Callable[[Vector, Vector, Memory], tuple[Vector, Memory, float]]


@dataclass(frozen=True, eq=False)
class Push:
    """What a worker sends: a gradient and where it comes from.

    ``gradient`` is the mean over ``samples`` examples at the weights of ``version``; after local
    steps it is (pulled − local) / lr. ``epoch`` is the life of the server in which the weights were
    pulled. ``loss`` is that of the batch; ``rows`` are its examples, where the sender tells them.
    """

    worker: int
    version: int
    gradient: Vector
    samples: int
    epoch: int = 0
    loss: float = math.nan
    rows: Tensor | None = None


class Row(NamedTuple):
    """What an update was made of, and the server after it; `Log` adds the clock time in ns.

    ``batch`` counts the examples of this update, ``samples`` those of all. ``staleness`` counts the
    updates since the gradient's weights were pulled (the oldest one's of a group), ``distance`` is
    ‖w − w_bak‖, ``capped`` the share of coordinates whose gain was bounded.
    """

    version: int
    samples: int
    worker: int
    batch: int
    staleness: int
    distance: float
    gradient_norm: float
    correction_norm: float
    capped: float
    loss: float
    clock: int = 0


@dataclass(frozen=True, eq=False)
class Server:
    """Everything a server knows; all of it goes into a checkpoint.

    Parameters
    ----------
    weights
        Of shape (n,).
    version, samples
        Updates made, and examples whose gradients were applied; learning rates follow the latter.
    workers
        Who is alive.
    backups, pulled, awaited
        w_bak(m), the weights sent to worker m; their version; who owes a gradient for them.
    personal
        Weights worker m gets instead of the server's, for rules that keep one model a worker.
    held, waiting
        Gradients that wait for others, and workers that wait for slower ones.
    clocks
        Gradients accepted of each worker.
    memory
        The rule's own tensors; ``"name/3"`` belongs to worker 3 and goes with it.
    counts
        Of pushes: ``accepted``, of which the rule ``dropped`` some, ``refused_nonfinite`` and so
        on, and ``lost``, accepted no longer, while they were held.
    epoch
        The server's life, raised by `restart`.
    applied
        About the last update.
    """

    weights: Vector
    version: int = 0
    samples: int = 0
    workers: frozenset[int] = frozenset()
    backups: Mapping[int, Tensor] = field(default_factory=dict)
    pulled: Mapping[int, int] = field(default_factory=dict)
    awaited: frozenset[int] = frozenset()
    personal: Mapping[int, Tensor] = field(default_factory=dict)
    held: tuple[Push, ...] = ()
    waiting: tuple[int, ...] = ()
    clocks: Mapping[int, int] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    epoch: int = 0
    applied: Row | None = None

    def but(self, **changes: Any) -> "Server":
        """Return a server that differs in these fields; ten times as fast as `replace`."""
        other = object.__new__(Server)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def to_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and containers, ready for `torch.save`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["workers"], plain["awaited"] = sorted(self.workers), sorted(self.awaited)
        plain["held"] = [dict(vars(push)) for push in self.held]
        plain["applied"] = self.applied and tuple(self.applied)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Server":
        """Return the server that `to_dict` described."""
        return cls(**dict(plain) | {
            "workers": frozenset(plain["workers"]),
            "awaited": frozenset(plain["awaited"]),
            "held": tuple(Push(**push) for push in plain["held"]),
            "waiting": tuple(plain["waiting"]),
            "applied": plain["applied"] and Row(*plain["applied"]),
        })  # fmt: skip


Served = tuple[int, ...]
Rule = Callable[..., tuple[Server, Served]]  # of (server, push, lr); options by functools.partial


# ---- what every server does ----


TOLD_TO_PULL = ("epoch", "length", "version", "nonfinite")  # faults after which a worker can go on


def receive(server: Server, push: Push, lr: float, rule: Rule) -> tuple[Server, Served]:
    """Check a push, then hand it to the rule; what is refused changes nothing but a count.

    Parameters
    ----------
    server, push
        The push is refused if its worker is unknown, its epoch, length or version is wrong, it came
        already, or the sum of its squares is not finite: a number is NaN, infinite, or so large
        that norms and mean squares made of it would be (1.8e19 in float32).
    lr
        The rate of an update made now.
    rule
        Decides about what is accepted.

    Returns
    -------
    (server, workers to be served now)
        Whoever sent what cannot be used is told to pull again; a late or second copy of a push is
        ignored, and so is whatever comes from a worker whose gradient is held or that waits.
    """
    fault = _fault(server, push)
    if fault:
        waits = push.worker in {*server.waiting, *(other.worker for other in server.held)}
        told = fault in TOLD_TO_PULL and not waits
        return count(server, f"refused_{fault}"), (push.worker,) * told
    server = server.but(
        awaited=server.awaited - {push.worker},
        clocks={**server.clocks, push.worker: server.clocks[push.worker] + 1},
        counts={**server.counts, "accepted": server.counts.get("accepted", 0) + 1},
    )
    return rule(server, push, lr)


def _fault(server: Server, push: Push) -> str:
    """Name what is wrong with a push; empty if nothing is."""
    if push.worker not in server.workers:
        return "unknown"
    if push.epoch != server.epoch:
        return "epoch"
    if push.gradient.shape != server.weights.shape:
        return "length"
    last = server.pulled.get(push.worker, -1)
    if not 0 <= push.version <= last:
        return "version"
    if push.version < last or push.worker not in server.awaited:
        return "duplicate"
    return "" if math.isfinite(push.gradient.dot(push.gradient)) else "nonfinite"


def pull(server: Server, worker: int) -> tuple[Server, Vector]:
    """Return the server that remembers what it sends as w_bak(worker), and the weights it sends.

    `ValueError` for a worker that is not alive.
    """
    if worker not in server.workers:
        raise ValueError(f"pull: expected one of {sorted(server.workers)}, got worker {worker}")
    weights = server.personal.get(worker, server.weights)
    server = server.but(
        backups={**server.backups, worker: weights},
        pulled={**server.pulled, worker: server.version},
        awaited=server.awaited | {worker},
    )
    return server, weights


def join(server: Server, worker: int) -> Server:
    """Let a worker in; it starts at the clock of the slowest, with nothing of an earlier life.

    `ValueError` for one that is alive.
    """
    if worker in server.workers:
        raise ValueError(f"join: expected a new worker, got {worker}, which is alive")
    slowest = min((server.clocks[m] for m in server.workers), default=0)
    clocks = {**server.clocks, worker: slowest}
    return server.but(workers=server.workers | {worker}, clocks=clocks)


def leave(server: Server, worker: int, lr: float, rule: Rule) -> tuple[Server, Served]:
    """Take a worker out, free what belonged to it, and let go on who waited for it.

    Parameters
    ----------
    server, worker
        Its gradient that waits for others goes with it, counted as lost.
    lr, rule
        A rule that holds gradients or workers is asked again, with None in place of a push.

    Returns
    -------
    (server, workers to be served now)

    Raises
    ------
    ValueError
        If the worker is not alive.
    """
    if worker not in server.workers:
        raise ValueError(f"leave: expected one of {sorted(server.workers)}, got worker {worker}")
    server = _lose(server, tuple(push for push in server.held if push.worker == worker)).but(
        workers=server.workers - {worker},
        awaited=server.awaited - {worker},
        backups=_without(server.backups, worker),
        pulled=_without(server.pulled, worker),
        personal=_without(server.personal, worker),
        clocks=_without(server.clocks, worker),
        waiting=tuple(m for m in server.waiting if m != worker),
        memory={k: v for k, v in server.memory.items() if not k.endswith(f"/{worker}")},
    )
    return rule(server, None, lr) if server.held or server.waiting else (server, ())


def restart(server: Server) -> Server:
    """Begin a new life after a checkpoint was read: all workers must pull, old pushes are void.

    Gradients that waited for others are counted as lost.
    """
    forgotten = server.but(backups={}, pulled={}, awaited=frozenset(), personal={})
    return _lose(forgotten, server.held).but(waiting=(), epoch=server.epoch + 1)


def step(
    server: Server,
    push: Push,
    lr: float,
    correct: Correction | None = None,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    backup: Vector | None = None,
) -> Server:
    """Make one update: the only place where weights change.

    d = g + correction(g, w − w_bak) + weight_decay · w
    b ← momentum · b + d, if there is momentum; then d = b
    w ← w − lr · d

    Parameters
    ----------
    server, push, lr
        What is applied, and at which rate.
    correct
        Maps gradient, displacement and the rule's memory to what is added to the gradient, the new
        memory and the share of capped coordinates.
    momentum, weight_decay
        Heavy ball on what is applied; decay of the server's own weights, outside the correction.
    backup
        w_bak, of shape (n,): the weights sent to the worker unless given.

    Returns
    -------
    Server
        With a new `Row` in ``applied``.
    """
    displacement = server.weights - (server.backups[push.worker] if backup is None else backup)
    direction, memory, capped = push.gradient, server.memory, 0.0
    correction = push.gradient.new_zeros(1)
    if correct is not None:
        correction, memory, capped = correct(push.gradient, displacement, memory)
        direction = direction + correction
    if weight_decay:
        direction = direction + weight_decay * server.weights
    if momentum:
        old = memory.get("momentum_buffer")
        direction = direction if old is None else momentum * old + direction
        memory = {**memory, "momentum_buffer": direction}
    weights, version = server.weights - lr * direction, server.version + 1
    norms = [torch.linalg.vector_norm(v) for v in (displacement, push.gradient, correction)]
    distance, gradient_norm, correction_norm = torch.stack(norms).tolist()
    row = Row(
        version=version,
        samples=server.samples + push.samples,
        worker=push.worker,
        batch=push.samples,
        staleness=server.version - push.version,
        distance=distance,
        gradient_norm=gradient_norm,
        correction_norm=correction_norm,
        capped=capped,
        loss=push.loss,
    )
    changed = {"weights": weights, "version": version, "samples": row.samples}
    return server.but(**changed, memory=memory, applied=row)


def _without(mapping: Mapping[int, Any], worker: int) -> dict[int, Any]:
    return {m: value for m, value in mapping.items() if m != worker}


def _lose(server: Server, pushes: tuple[Push, ...]) -> Server:
    """Give held gradients up: they were accepted, and will never be applied."""
    for _ in pushes:
        server = count(count(server, "accepted", -1), "lost")
    return server.but(held=tuple(push for push in server.held if push not in pushes))


def count(server: Server, what: str, number: int = 1) -> Server:
    """Add to a count."""
    return server.but(counts={**server.counts, what: server.counts.get(what, 0) + number})
