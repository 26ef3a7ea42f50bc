"""Server rules that change the weights at once: what is done with a gradient that arrives.

A rule is ``(server, push, lr) -> (server, workers to be served now)``; its options are bound by
`functools.partial`. Every update goes through `step`, so that two rules that should agree do so to
the last bit. The rules of `coursekit.parallelism.gates` decide when these are called.
"""

from dataclasses import replace

import torch

from coursekit.parallelism.server import Push, Served, Server, step


def asgd(
    server: Server, push: Push, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0
) -> tuple[Server, Served]:
    """Apply every gradient as it arrives, however old: asynchronous SGD.

    w ← w − lr · g(w_bak(m))

    Parameters
    ----------
    server, push, lr
        With one worker w_bak is w, and this is SGD.
    momentum, weight_decay
        Heavy ball and decay on the server, as in `torch.optim.SGD`.

    Returns
    -------
    (server, workers to be served now)

    Source: J. Dean et al., Large scale distributed deep networks (2012). Curriculum: P2.
    """
    return step(server, push, lr, momentum=momentum, weight_decay=weight_decay), (push.worker,)


sgd = asgd


def spring(
    server: Server,
    push: Push,
    lr: float,
    *,
    strength: float = 1.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[Server, Served]:
    """Pull back toward the weights at which the gradient was taken, with no curvature at all.

    w ← w − lr · (g + strength · (w − w_bak))

    Parameters
    ----------
    server, push, lr
        As in `asgd`, which is the spring of strength 0.
    strength
        In units of curvature; lr · strength above 1 overshoots w_bak.
    momentum, weight_decay
        As in `asgd`.

    Returns
    -------
    (server, workers to be served now)

    Curriculum: C2.
    """

    def correct(gradient, displacement, memory):
        return strength * displacement, memory, 0.0

    server = step(server, push, lr, correct, momentum=momentum, weight_decay=weight_decay)
    return server, (push.worker,)


def ormo(server: Server, push: Push, lr: float, *, momentum: float) -> tuple[Server, Served]:
    """Give every gradient the place in the momentum that its iteration has: ordered momentum.

    Blocks of M iterations, one a worker. At the start of a block: w ← w − lr · β u, u ← β u.
    A gradient that is d blocks late: u ← u + β^d g, w ← w − lr · (1 + β + … + β^d) g,
    which is what it would have done by now had it been on time.

    Parameters
    ----------
    server, push, lr
        The iteration of a gradient is the version of its weights.
    momentum
        β in [0, 1). With one worker this is the heavy ball.

    Returns
    -------
    (server, workers to be served now)

    Source: after C.-W. Shi, Y. Yang and W.-J. Li, Ordered momentum for asynchronous SGD (2024).
    Curriculum: P2.
    """
    size = len(server.workers)
    late = server.version // size - push.version // size
    starts = server.version % size == 0

    def correct(gradient, displacement, memory):
        buffer = memory.get("ordered_momentum", torch.zeros_like(gradient))
        buffer = momentum * buffer if starts else buffer
        correction = sum(momentum**d for d in range(1, late + 1)) * gradient
        correction = correction + buffer if starts else correction
        memory = {**memory, "ordered_momentum": buffer + momentum**late * gradient}
        return correction, memory, 0.0

    return step(server, push, lr, correct), (push.worker,)


def easgd(server: Server, push: Push, lr: float, *, force: float) -> tuple[Server, Served]:
    """Keep one model a worker, and tie each to the centre by an elastic force.

    x_m ← x_m − lr · g_m, then x_m ← x_m − lr · force · (x_m − w) and w ← w + lr · force · (x_m − w)

    Parameters
    ----------
    server, push, lr
        The server's weights w are the centre; x_m is worker m's own model, which it is sent and
        which is rebuilt here, with the rate at the arrival of its gradient. What the centre is
        moved by is logged as the gradient.
    force
        ρ of the paper; lr · force is its α, which should stay below 1.

    Returns
    -------
    (server, workers to be served now)

    Source: S. Zhang, A. Choromanska and Y. LeCun, Deep learning with elastic averaging SGD (2015),
    equations 5 and 6. Convention: the force is taken after the gradient step. Curriculum: P2.
    """
    own = server.backups[push.worker] - lr * push.gradient
    elastic = force * (server.weights - own)  # gradient of the penalty at the centre
    personal = {**server.personal, push.worker: own + lr * elastic}
    server = step(server, replace(push, gradient=elastic), lr)
    return server.but(personal=personal), (push.worker,)
