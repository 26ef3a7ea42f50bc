"""Toy problems that fit into a figure."""

import numpy as np
from jaxtyping import Float, Int

from coursekit import _check


def two_moons(
    n: int, *, rng: np.random.Generator, noise: float = 0.1
) -> tuple[Float[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Draw two interleaved half circles of radius 1, which no straight line tells apart.

    Class 0 is ``(cos t, sin t)``, class 1 is ``(1 - cos t, 1/2 - sin t)``, ``t`` evenly spaced over
    ``[0, π]``; then every coordinate gets normal noise and the rows are shuffled.

    Parameters
    ----------
    n
        Points in all; class 0 gets ``n // 2``.
    rng
        Draws the noise, then the order.
    noise
        Standard deviation of the noise.

    Returns
    -------
    x, y
        Points ``(n, 2)`` and classes ``(n,)``.
    """
    y = np.repeat([0, 1], [n // 2, n - n // 2])
    t = np.concatenate([np.linspace(0, np.pi, n // 2), np.linspace(0, np.pi, n - n // 2)])
    upper = np.stack([np.cos(t), np.sin(t)], axis=1)
    x = np.where(y[:, None] == 0, upper, [1, 0.5] - upper) + noise * rng.standard_normal((n, 2))
    order = rng.permutation(n)
    return x[order], y[order]


def gaussian_blobs(
    n: int, centers: Float[np.ndarray, "classes d"], *, rng: np.random.Generator, std: float = 1.0
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Draw points ``N(center, std² I)`` around centers chosen with equal probability.

    The best possible classifier is known: the nearest center.

    Parameters
    ----------
    n, centers, std
        Number of points; ``(classes, d)``; the same spread in all directions.
    rng
        Draws the classes, then the points.

    Returns
    -------
    x, y
        Points ``(n, d)`` and the row ``(n,)`` of each one's center.
    """
    _check.shape("gaussian_blobs", "centers", centers, ("classes", "d"))
    y = rng.integers(len(centers), size=n)
    return centers[y] + std * rng.standard_normal((n, centers.shape[1])), y


def noisy_sine(
    n: int = 30, *, rng: np.random.Generator, noise: float = 0.2
) -> tuple[Float[np.ndarray, "n 1"], Float[np.ndarray, " n"]]:
    """Draw ``y = sin(x) + noise · N(0, 1)``, few enough points to see what a model does to each.

    Parameters
    ----------
    n, noise
        Number of points, and the standard deviation of the noise.
    rng
        Draws the ``x``, then the noise.

    Returns
    -------
    x, y
        ``(n, 1)``, uniform over one period and sorted, and ``(n,)``.
    """
    x = np.sort(rng.uniform(0, 2 * np.pi, n))
    return x[:, None], np.sin(x) + noise * rng.standard_normal(n)
