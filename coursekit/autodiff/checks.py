"""Derivatives held against differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from coursekit.autodiff.core import leaves, map_tree, value_of
from coursekit.autodiff.primitives import sum as total
from coursekit.autodiff.transforms import jvp, vjp


def _dot(a: Any, b: Any) -> Any:
    products = [total(x * y) for x, y in zip(leaves(a), leaves(b), strict=True)]
    return sum(products[1:], start=products[0])


def _one_order_up(f: Callable, u: Any, w: Any) -> Callable:
    return lambda x: _dot(vjp(f, x)[1](u), w) + 2 * _dot(jvp(f, x, w)[1], u)


def check_grads(
    f: Callable,
    x: Any,
    order: int = 2,
    *,
    rng: np.random.Generator | None = None,
    step: float = 1e-5,
    tolerance: float = 1e-6,
) -> None:
    """Compare both modes with a central difference, up to a given order of derivative.

    Along one random direction ``v`` and against one random covector ``u``, reverse mode's
    ⟨uᵀJ, v⟩, forward mode's ⟨u, Jv⟩ and ⟨u, f(x + hv) − f(x − hv)⟩/2h must agree. Then the function
    ⟨uᵀJ(x), w⟩ + 2⟨u, J(x)w⟩ with a random ``w``, in which each mode computes one term, is checked
    in the same way, which checks the Hessian.

    Parameters
    ----------
    f : callable
        From an array or a tree of arrays to one array.
    x : array_like of float64, or a tree of them
        A point at which ``f`` is smooth.
    order : int
        At least 1.
    rng : numpy.random.Generator, optional
        Where the directions come from; default: a fixed stream of its own.
    step : float
        h, in units of ``x``.
    tolerance : float
        Largest difference allowed, relative to 1 plus the size of the numbers compared.

    Raises
    ------
    AssertionError
        When two of the three disagree; the message has the numbers and the order.
    TypeError
        When ``x`` is not float64: differences in float32 are too coarse to judge by.
    ValueError
        When ``order`` is below 1.

    Source: the recursion is that of HIPS autograd. Curriculum: A1.
    """
    if order < 1:
        raise ValueError(f"check_grads: expected order of at least 1, got {order}")
    dtypes = {np.asarray(value_of(a)).dtype for a in leaves(x)}
    if dtypes != {np.dtype(np.float64)}:
        raise TypeError(f"check_grads: expected float64, got {', '.join(map(str, dtypes))}")
    rng = rng or np.random.default_rng(0)

    def draw(a):
        return rng.standard_normal(np.shape(a))

    for depth in range(1, order + 1):
        v = map_tree(draw, x)
        y, pullback = vjp(f, x)
        u = draw(y)
        ahead = f(map_tree(lambda a, d: a + step * d, x, v))
        behind = f(map_tree(lambda a, d: a - step * d, x, v))
        numeric = _dot(u, (ahead - behind) / (2 * step))
        found = {"reverse": _dot(pullback(u), v), "forward": _dot(u, jvp(f, x, v)[1])}
        for mode, value in found.items():
            if not abs(value - numeric) <= tolerance * (1 + abs(numeric)):
                raise AssertionError(
                    f"check_grads: order {depth}, {mode} mode gives {value:.9g}, "
                    f"the central difference {numeric:.9g}"
                )
        f = _one_order_up(f, u, map_tree(draw, x))
