"""How long things take: models of computing and network times, in nanoseconds of virtual time.

A model is a function ``(rng, worker, steps) -> array of times`` and draws the times of many steps
at once. `stream` makes it a function of (seed, worker, step) alone: no draw depends on what
happened before, so a changed rule, a fault or a restart leaves all other times as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coursekit import _check, train

Times = Callable[[np.random.Generator, int, np.ndarray], np.ndarray]
BLOCK = 256  # steps drawn at once: opening a random stream costs as much as a hundred draws


def constant(mean: float) -> Times:
    """Return the model in which every step takes ``mean`` ns."""
    return lambda rng, worker, steps: np.full(len(steps), float(mean))


def gamma(mean: float, cv: float) -> Times:
    """Return gamma times of that mean in ns and coefficient of variation sd / mean.

    Machines that differ little have a cv of about 0.1, a mixed lot 0.6.
    """
    _check.positive("gamma", "cv", cv)
    return lambda rng, worker, steps: rng.gamma(cv**-2, mean * cv**2, len(steps))


def lognormal(mean: float, cv: float) -> Times:
    """Return lognormal times of that mean in ns and coefficient of variation sd / mean."""
    _check.positive("lognormal", "cv", cv)
    variance = math.log1p(cv**2)
    location = math.log(mean) - variance / 2
    return lambda rng, worker, steps: rng.lognormal(location, math.sqrt(variance), len(steps))


def shifted_exponential(mean: float, shift: float = 0.0) -> Times:
    """Return times of at least ``shift`` ns and that mean in ns: shift + Exp(mean − shift)."""
    _check.in_range("shifted_exponential", "shift", shift, 0, mean)
    return lambda rng, worker, steps: shift + rng.exponential(mean - shift, len(steps))


def straggler(base: Times, *, slow: int = 0, factor: float = 4.0) -> Times:
    """Make one worker slower for ever.

    Parameters
    ----------
    base
        The times of the others.
    slow, factor
        Which worker, and how many times slower.

    Returns
    -------
    Times
    """
    return lambda rng, worker, steps: base(rng, worker, steps) * (factor if worker == slow else 1)


def pauses(base: Times, *, probability: float, length: float) -> Times:
    """Let a step be interrupted now and then.

    Parameters
    ----------
    base
        The times without interruption.
    probability, length
        Of an interruption of a step, and how many ns it lasts.

    Returns
    -------
    Times
    """
    _check.in_range("pauses", "probability", probability)

    def model(rng, worker, steps):
        return base(rng, worker, steps) + length * (rng.random(len(steps)) < probability)

    return model


def replay(recorded: Mapping[int, Sequence[float]], local_steps: int = 1) -> Times:
    """Return the times that were recorded, worker by worker; a record that ends begins anew.

    `Log.durations` has them, of a real run too; each is that of ``local_steps`` steps.
    """
    arrays = {m: np.asarray(times, dtype=float) / local_steps for m, times in recorded.items()}
    return lambda rng, worker, steps: arrays[worker][steps // local_steps % len(arrays[worker])]


def stream(model: Times, seed: int, name: str) -> Callable[[int, int], int]:
    """Return the function of (worker, step) that a model is under one seed, in whole ns.

    Parameters
    ----------
    model
        Draws blocks of steps.
    seed, name
        Of the random stream, see `train.rng`.

    Returns
    -------
    Callable
        Maps worker and step to a time; `ValueError` for one that is negative or not finite.

    Examples
    --------
    >>> time = stream(gamma(1e6, 0.3), 0, "compute")
    >>> time(3, 500) == time(3, 500), time(3, 500) == time(3, 501)
    (True, False)
    """
    blocks: dict[int, tuple[int, list[int]]] = {}  # the last one of each worker

    def time(worker: int, step: int) -> int:
        number, offset = divmod(step, BLOCK)
        if worker not in blocks or blocks[worker][0] != number:
            rng = train.rng(seed, f"{name}/{worker}/{number}")
            drawn = model(rng, worker, np.arange(number * BLOCK, (number + 1) * BLOCK))
            if not (np.isfinite(drawn) & (drawn >= 0)).all():
                raise ValueError(f"stream: expected finite {name} times of at least 0, got {drawn}")
            blocks[worker] = number, np.rint(drawn).astype(np.int64).tolist()
        return blocks[worker][1][offset]

    return time
