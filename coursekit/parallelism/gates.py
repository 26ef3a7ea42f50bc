"""Server rules that decide when, with which gradient and at which rate another rule is called.

That other rule is their ``update``: ``partial(ssgd, update=partial(asgd, momentum=0.9))``, or
``partial(clipped, max_norm=1.0, update=spring)``. Where a gate holds gradients or lets workers
wait, it is called with None in place of a push when a worker has left.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from coursekit import _check
from coursekit.parallelism.rules import asgd
from coursekit.parallelism.server import Push, Rule, Served, Server, count

# ---- gates that wait ----


def merge(pushes: Iterable[Push]) -> Push:
    """Return one push for several: the mean over all their examples, as old as the oldest.

    The order of arrival leaves no trace: terms are added in the order of the workers.
    """
    pushes = sorted(pushes, key=lambda push: push.worker)
    oldest = min(pushes, key=lambda push: push.version)
    samples = sum(push.samples for push in pushes)
    gradient = torch.stack([push.gradient * (push.samples / samples) for push in pushes]).sum(0)
    loss = sum(push.loss * (push.samples / samples) for push in pushes)
    rows = [push.rows for push in pushes if push.rows is not None]
    return replace(
        oldest,
        gradient=gradient,
        samples=samples,
        loss=loss,
        rows=torch.cat(rows) if len(rows) == len(pushes) else None,
    )


def _hold(server: Server, push: Push | None) -> Server:
    return server if push is None else server.but(held=(*server.held, push))


def _release(
    server: Server, pushes: tuple[Push, ...], lr: float, update: Rule
) -> tuple[Server, Served]:
    """Apply held gradients as one and serve all their workers."""
    workers = {push.worker for push in pushes}
    held = tuple(push for push in server.held if push.worker not in workers)
    server, _ = update(server.but(held=held), merge(pushes), lr)
    return server, tuple(sorted(workers))


def ssgd(
    server: Server, push: Push | None, lr: float, *, update: Rule = asgd
) -> tuple[Server, Served]:
    """Wait for a gradient of every worker, then make one step with their mean: synchronous SGD.

    w ← w − lr · Σ_m s_m g_m(w) / Σ_m s_m, which is SGD on the concatenated batch

    Parameters
    ----------
    server, push, lr
        Of worker m the gradient is a mean over s_m examples.
    update
        What is done with the mean.

    Returns
    -------
    (server, workers to be served now)

    Curriculum: P1.
    """
    server = _hold(server, push)
    everyone = len(server.held) == len(server.workers)
    return _release(server, server.held, lr, update) if everyone else (server, ())


def backup_workers(
    server: Server,
    push: Push | None,
    lr: float,
    *,
    spare: int,
    cancel: bool = True,
    update: Rule = asgd,
) -> tuple[Server, Served]:
    """Wait for all but ``spare`` gradients: synchronous SGD that does not wait for stragglers.

    Parameters
    ----------
    server, push, lr
        Of N + spare workers, the first N to answer make the step.
    spare
        How many gradients of a round are left out, at least 0.
    cancel
        Whether the late are served with the others and abandon their work. If not, they finish, and
        what they send is dropped by its version. Real workers always finish: the trace of a run by
        `launch` is one of ``cancel=False``.
    update
        What is done with the mean.

    Returns
    -------
    (server, workers to be served now)

    Source: J. Chen et al., Revisiting distributed synchronous SGD (2016), algorithm 4.
    Curriculum: P4.
    """
    _check.integer("backup_workers", "spare", spare, at_least=0)
    if push is not None and push.version < server.version:
        return drop(server, push)
    server = _hold(server, push)
    if len(server.held) < max(1, len(server.workers) - spare):
        return server, ()
    server, served = _release(server, server.held, lr, update)
    return server, tuple(sorted(server.workers)) if cancel else served


def group_asynchronous(
    server: Server, push: Push | None, lr: float, *, groups: int, update: Rule = asgd
) -> tuple[Server, Served]:
    """Be synchronous inside a group of workers, asynchronous between the groups.

    Parameters
    ----------
    server, push, lr
        Worker m is in group m mod ``groups``.
    groups
        One group is SSGD; as many as workers, ASGD.
    update
        What is done with the mean of a group.

    Returns
    -------
    (server, workers to be served now)

    Curriculum: P4.
    """
    _check.integer("group_asynchronous", "groups", groups, at_least=1)
    server, served = _hold(server, push), tuple[int, ...]()
    for group in range(groups):
        members = {m for m in server.workers if m % groups == group}
        ready = tuple(p for p in server.held if p.worker in members)
        if ready and len(ready) == len(members):
            server, now = _release(server, ready, lr, update)
            served += now
    return server, served


def stale_synchronous(
    server: Server, push: Push | None, lr: float, *, bound: int, update: Rule = asgd
) -> tuple[Server, Served]:
    """Apply every gradient as it arrives, but let no worker run ahead of the slowest.

    Parameters
    ----------
    server, push, lr
        A worker's clock counts its accepted gradients.
    bound
        A worker whose clock is more than this ahead of the slowest one's waits. It bounds clocks;
        staleness counts the updates of all, and may reach (M − 1)(2 · bound + 1) with M workers.
    update
        What is done with the gradient.

    Returns
    -------
    (server, workers to be served now)

    Source: Q. Ho et al., More effective distributed ML via a stale synchronous parallel parameter
    server (2013). Curriculum: P4.
    """
    _check.integer("stale_synchronous", "bound", bound, at_least=0)
    if push is not None or server.held:
        server, served = update(server, push, lr)
        server = server.but(waiting=(*server.waiting, *served))
    slowest = min(server.clocks[m] for m in server.workers)
    ahead = tuple(m for m in server.waiting if server.clocks[m] - slowest > bound)
    go_on = tuple(m for m in server.waiting if m not in ahead)
    return server.but(waiting=ahead), go_on


# ---- gates that change or drop a gradient ----


def drop(server: Server, push: Push) -> tuple[Server, Served]:
    """Leave a gradient out, count it as dropped, and serve its worker."""
    return count(server, "dropped"), (push.worker,)


def ringmaster(
    server: Server, push: Push | None, lr: float, *, threshold: int, update: Rule = asgd
) -> tuple[Server, Served]:
    """Drop gradients that more than ``threshold`` updates have overtaken.

    Parameters
    ----------
    server, push, lr
        The worker of a dropped gradient is served at once.
    threshold
        The largest staleness that is applied.
    update
        What is done with a gradient that is young enough.

    Returns
    -------
    (server, workers to be served now)

    Source: A. Maranjyan, A. Tyurin and P. Richtárik, Ringmaster ASGD (2025), algorithm 4.
    Convention: the paper drops from a delay R on; threshold is R − 1. Curriculum: P2.
    """
    _check.integer("ringmaster", "threshold", threshold, at_least=0)
    if push is not None and server.version - push.version > threshold:
        return drop(server, push)
    return update(server, push, lr)


def staleness_aware(
    server: Server, push: Push | None, lr: float, *, update: Rule = asgd
) -> tuple[Server, Served]:
    """Divide the learning rate by the staleness τ of the gradient, where τ is above 1.

    Parameters
    ----------
    server, push, lr
        τ counts the updates since the worker's pull.
    update
        Is called with the rate lr / τ.

    Returns
    -------
    (server, workers to be served now)

    Source: W. Zhang et al., Staleness-aware async-SGD (2015). Curriculum: P2.
    """
    staleness = 0 if push is None else server.version - push.version
    return update(server, push, lr / max(1, staleness))


def gap_aware(
    server: Server, push: Push | None, lr: float, *, update: Rule = asgd
) -> tuple[Server, Served]:
    """Divide the gradient by one plus the distance gone since the pull, in typical steps.

    g ← g / (1 + ‖w − w_bak‖ / (lr · mean ‖g‖))

    Parameters
    ----------
    server, push, lr
        The mean is over all gradients so far, this one included.
    update
        What is done with the shorter gradient.

    Returns
    -------
    (server, workers to be served now)

    Source: after S. Barkai, I. Hakimi and A. Schuster, Gap aware mitigation of gradient staleness
    (2020), with one gap for all coordinates. Curriculum: P2.
    """
    if push is None:
        return update(server, push, lr)
    norm = torch.linalg.vector_norm(push.gradient)
    seen = server.memory.get("norms_and_count", torch.zeros_like(norm).repeat(2))
    seen = seen + torch.stack((norm, torch.ones_like(norm)))
    distance = torch.linalg.vector_norm(server.weights - server.backups[push.worker])
    gap = distance / (lr * seen[0] / seen[1]) if distance > 0 else torch.zeros_like(norm)
    server = server.but(memory={**server.memory, "norms_and_count": seen})
    return update(server, replace(push, gradient=push.gradient / (1 + gap)), lr)


def clipped(
    server: Server, push: Push | None, lr: float, *, max_norm: float, update: Rule = asgd
) -> tuple[Server, Served]:
    """Shorten a gradient to the norm ``max_norm`` where it is longer.

    Parameters
    ----------
    server, push, lr
        Shorter gradients pass as they are.
    max_norm
        Positive.
    update
        What is done with the gradient.

    Returns
    -------
    (server, workers to be served now)

    Curriculum: P2.
    """
    _check.positive("clipped", "max_norm", max_norm)
    if push is not None:
        norm = torch.linalg.vector_norm(push.gradient).item()
        if norm > max_norm:
            push = replace(push, gradient=push.gradient * (max_norm / norm))
    return update(server, push, lr)


def local_sgd(
    server: Server, push: Push | None, lr: float, *, outer_lr: float = 1.0, momentum: float = 0.0
) -> tuple[Server, Served]:
    """Average the models that workers reached by local steps, or move part of the way to the mean.

    w ← w − outer_lr · (w − mean of the local models)

    Parameters
    ----------
    server, push, lr
        A push holds (w − local) / lr, so SSGD on these pseudo-gradients is averaging.
    outer_lr, momentum
        Step and heavy ball of the server; 1 and 0 are local SGD.

    Returns
    -------
    (server, workers to be served now)

    Source: S. Stich, Local SGD converges fast and communicates little (2019). Curriculum: P1.
    """
    return ssgd(server, push, outer_lr * lr, update=partial(asgd, momentum=momentum))
