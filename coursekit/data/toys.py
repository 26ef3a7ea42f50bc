"""Toy problems that fit into a figure."""

import math

import numpy as np
from jaxtyping import Float, Int

from coursekit import _check


def two_moons(
    n: int, *, rng: np.random.Generator, noise: float = 0.1
) -> tuple[Float[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Draw two interleaved half circles, a problem that no straight line solves.

    Class 0 is ``(cos t, sin t)``, class 1 is ``(1 - cos t, 1/2 - sin t)``, ``t`` evenly spaced over
    ``[0, π]``; then every coordinate gets normal noise and the rows are shuffled.

    Parameters
    ----------
    n
        Points in all, at least 2; class 0 gets ``n // 2``.
    rng
        Draws the noise, then the order.
    noise
        Standard deviation of the noise; the circles' radius is 1.

    Examples
    --------
    >>> x, y = two_moons(5, rng=np.random.default_rng(0), noise=0)
    >>> x.shape, np.bincount(y).tolist()
    ((5, 2), [2, 3])
    """
    _check.integer("two_moons", "n", n, at_least=2)
    _check.in_range("two_moons", "noise", noise, 0, math.inf)
    y = np.repeat([0, 1], [n // 2, n - n // 2])
    t = np.concatenate([np.linspace(0, np.pi, n // 2), np.linspace(0, np.pi, n - n // 2)])
    upper = np.stack([np.cos(t), np.sin(t)], axis=1)
    x = np.where(y[:, None] == 0, upper, [1, 0.5] - upper)
    x = x + noise * rng.standard_normal((n, 2))
    order = rng.permutation(n)
    return x[order], y[order]


def gaussian_blobs(
    n: int,
    centers: Float[np.ndarray, "classes features"],
    *,
    rng: np.random.Generator,
    std: float = 1.0,
) -> tuple[Float[np.ndarray, "n features"], Int[np.ndarray, " n"]]:
    """Draw ``n`` points, each around a center chosen with equal probability: ``N(center, std² I)``.

    The label is the center's row. The best possible classifier is known: the nearest center.

    Examples
    --------
    >>> x, y = gaussian_blobs(4, 10 * np.eye(3), rng=np.random.default_rng(0), std=0.1)
    >>> bool(((x > 5).argmax(axis=1) == y).all())
    True
    """
    _check.integer("gaussian_blobs", "n", n, at_least=1)
    _check.shape("gaussian_blobs", "centers", centers, ("classes", "features"))
    _check.in_range("gaussian_blobs", "std", std, 0, math.inf)
    y = rng.integers(len(centers), size=n)
    return centers[y] + std * rng.standard_normal((n, centers.shape[1])), y


def noisy_sine(
    n: int = 30, *, rng: np.random.Generator, noise: float = 0.2
) -> tuple[Float[np.ndarray, "n 1"], Float[np.ndarray, " n"]]:
    """Draw ``y = sin(x) + noise · N(0, 1)`` at ``n`` sorted points, uniform over one period.

    Thirty points are few enough to see what a model does to each of them.

    Examples
    --------
    >>> x, y = noisy_sine(rng=np.random.default_rng(0), noise=0)
    >>> x.shape, bool(np.allclose(y, np.sin(x[:, 0])))
    ((30, 1), True)
    """
    _check.integer("noisy_sine", "n", n, at_least=1)
    _check.in_range("noisy_sine", "noise", noise, 0, math.inf)
    x = np.sort(rng.uniform(0, 2 * np.pi, n))
    return x[:, None], np.sin(x) + noise * rng.standard_normal(n)
