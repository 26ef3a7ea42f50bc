"""Functions in, derivative functions out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from coursekit.autodiff.core import (
    Dual,
    Node,
    Tracer,
    backward,
    leaves,
    map_tree,
    new_level,
    primitive,
    shape,
    value_of,
)
from coursekit.autodiff.primitives import stack


def _input(name: str, x: Any) -> Any:
    """Return ``x`` as an array of floating-point numbers, or as the tracer that it is."""
    x = x if isinstance(x, Tracer) else np.asanyarray(x)[()]
    if x.dtype.kind != "f":
        raise TypeError(f"{name}: expected floating-point input, got {x.dtype}")
    return x


def _output(name: str, y: Any) -> Any:
    if isinstance(y, list | tuple | dict) or y is None:
        raise TypeError(f"{name}: expected f to return one array, got {type(y).__name__}")
    return y if isinstance(y, Tracer) else np.asanyarray(y)[()]


def _owned(x: Any, held: set[int]) -> Any:
    """Return ``x``, or a copy if it is a view or an array that somebody else holds."""
    if isinstance(x, np.ndarray):
        if id(x) in held or not x.flags.owndata:
            x = x.copy()
        held.add(id(x))
    return x


def _filled(x: Any, number: float) -> Any:
    return np.full_like(value_of(x), number)[()]


def vjp(f: Callable, x: Any) -> tuple[Any, Callable]:
    r"""Run ``f`` once and return its value and its pullback, g ↦ gᵀ ∂f/∂x.

    Parameters
    ----------
    f : callable
        From one array, or lists, tuples and dictionaries of arrays, to one array.
    x : array_like, or a tree of them
        Floating-point numbers.

    Returns
    -------
    y : array
        ``f(x)``.
    pullback : callable
        Takes ``g`` of the shape of ``y``; returns a gradient with the structure of ``x``.
        It may be called again: the graph is kept as long as the pullback is.

    Raises
    ------
    TypeError
        When ``x`` is not floating-point or ``f`` does not return one array.
    ValueError
        From the pullback, when ``g`` does not have the shape of ``y``.

    Source: Griewank and Walther (2008), section 3.2. Curriculum: A4, A6, A7.
    """
    level = new_level()
    roots = map_tree(lambda a: Node(_input("vjp", a), level=level), x)
    end = _output("vjp", f(roots))
    traced = isinstance(end, Node) and end.level == level
    y = end.value if traced else end

    def pullback(g):
        g = g if isinstance(g, Tracer) else np.asanyarray(g, dtype=value_of(y).dtype)[()]
        if shape(g) != shape(y):
            raise ValueError(f"pullback: expected g of shape {shape(y)}, got {shape(g)}")
        gradients = backward(end, g) if traced else {}
        held = {id(g)}  # a rule may have passed on what it got

        def of_root(root):
            gradient = gradients[root] if root in gradients else _filled(root, 0.0)
            if gradient.dtype != root.dtype and not isinstance(
                gradient, Tracer
            ):  # complex numbers are refused, precision is kept
                gradient = gradient.astype(root.dtype, casting="same_kind")
            return _owned(gradient, held)

        return map_tree(of_root, roots)

    return y, pullback


def _in_one_argument(name: str, f: Callable, argnum: int, args: tuple, kwargs: dict) -> tuple:
    """Return ``f`` as a function of one of its arguments, and the value of that argument."""
    if not -len(args) <= argnum < len(args):
        raise ValueError(f"{name}: expected argument {argnum}, got {len(args)} arguments")
    at = argnum % len(args)
    return lambda x: f(*args[:at], x, *args[at + 1 :], **kwargs), args[at]


def value_and_grad(f: Callable, argnum: int = 0) -> Callable:
    """Return the function that computes a scalar function and its gradient in one sweep each way.

    Parameters
    ----------
    f : callable
        Returns a scalar.
    argnum : int
        Which positional argument to differentiate; an array or a tree of arrays.

    Raises
    ------
    ValueError
        When ``f`` does not return a scalar, or is called with too few arguments.
    TypeError
        When the argument is not floating-point.

    Curriculum: A4, A5, A6.
    """

    @functools.wraps(f)
    def both(*args, **kwargs):
        y, pullback = vjp(*_in_one_argument("grad", f, argnum, args, kwargs))
        if shape(y) != ():
            raise ValueError(
                f"grad: expected f to return a scalar, got shape {shape(y)}; "
                "take its sum or mean, or use jacobian"
            )
        return y, pullback(value_of(y).dtype.type(1))

    return both


def grad(f: Callable, argnum: int = 0) -> Callable:
    """Return the gradient function of a scalar function, by reverse mode.

    Parameters and errors are those of `value_and_grad`. The result can be differentiated again.

    Examples
    --------
    >>> from coursekit.autodiff import log, sin
    >>> f = lambda x: log(x[0] * x[1]) * sin(x[1])
    >>> grad(f)(np.array([0.5, 0.75])).round(4)
    array([1.3633, 0.1912])
    >>> float(grad(grad(lambda x: x**3))(2.0))
    12.0

    Curriculum: A1, A5, A6.
    """
    both = value_and_grad(f, argnum)

    @functools.wraps(f)
    def gradient(*args, **kwargs):
        return both(*args, **kwargs)[1]

    return gradient


def jvp(f: Callable, x: Any, v: Any) -> tuple[Any, Any]:
    """Return ``f(x)`` and its derivative along ``v``, ∂f/∂x · v, in one forward pass.

    Parameters
    ----------
    f : callable
        From an array or a tree of arrays to one array, or to a tree of arrays.
    x, v : array_like, or trees of one structure
        The point and the direction; shapes must agree.

    Raises
    ------
    ValueError
        When ``v`` does not have the shape of ``x``.
    TypeError
        When ``x`` is not floating-point.

    Examples
    --------
    >>> y, slope = jvp(lambda x: x * x, 3.0, 1.0)
    >>> float(y), float(slope)
    (9.0, 6.0)

    Source: Griewank and Walther (2008), section 3.1. Curriculum: A7.
    """
    level, held = new_level(), {id(t) for t in leaves(v)}

    def dual(a, t):
        a = _input("jvp", a)
        t = t if isinstance(t, Tracer) else np.asanyarray(t, dtype=value_of(a).dtype)[()]
        if shape(a) != shape(t):
            raise ValueError(f"jvp: expected v of shape {shape(a)}, got {shape(t)}")
        return Dual(a, t, level)

    out = f(map_tree(dual, x, v))

    def part(name):
        def pick(y):
            if isinstance(y, Dual) and y.level == level:
                return _owned(getattr(y, name), held)
            return y if name == "value" else _filled(y, 0.0)

        return map_tree(pick, out)

    return part("value"), part("tangent")


def hvp(f: Callable, x: Any, v: Any) -> Any:
    """Return the Hessian of a scalar function times a vector, without forming the Hessian.

    Forward over reverse: the gradient is differentiated along ``v``, for the price of a few.

    Parameters
    ----------
    f : callable
        Returns a scalar.
    x, v : array_like, or trees of one structure

    Raises
    ------
    ValueError
        When ``f`` does not return a scalar or ``v`` does not have the shape of ``x``.

    Source: Pearlmutter (1994). Curriculum: A7.
    """
    return jvp(grad(f), x, v)[1]


def jacobian(f: Callable, argnum: int = 0, mode: str = "reverse") -> Callable:
    """Return the function that computes the matrix of all partial derivatives.

    Parameters
    ----------
    f : callable
        From arrays to an array.
    argnum : int
        Which positional argument to differentiate; one array.
    mode : {"reverse", "forward"}
        One pass for each output, or one for each input: the same numbers at a different price.

    Returns
    -------
    callable
        Returns an array of shape ``(*output shape, *input shape)``.

    Raises
    ------
    ValueError
        When ``mode`` is neither.

    Curriculum: A7.
    """
    if mode not in ("reverse", "forward"):
        raise ValueError(f"jacobian: expected mode 'reverse' or 'forward', got {mode!r}")

    @functools.wraps(f)
    def matrix(*args, **kwargs):
        of_one, x = _in_one_argument("jacobian", f, argnum, args, kwargs)
        x = _input("jacobian", x)
        if mode == "reverse":
            y, pullback = vjp(of_one, x)
            rows = [pullback(e) for e in _basis(y)]
            return stack(*rows).reshape(shape(y) + shape(x))
        columns = [jvp(of_one, x, e)[1] for e in _basis(x)]
        flat = stack(*columns).reshape((len(columns), -1))
        return flat.T.reshape(shape(columns[0]) + shape(x))

    return matrix


def _basis(x: Any) -> list[np.ndarray]:
    """Return the unit arrays of the shape of ``x``, in C order."""
    x = np.asarray(value_of(x))
    return [row.reshape(x.shape) for row in np.eye(x.size, dtype=x.dtype)]


def checkpoint(f: Callable) -> Callable:
    """Return ``f`` with its intermediate values forgotten: the backward pass computes them again.

    Parameters
    ----------
    f : callable
        From arrays to one array; all that is differentiated must be a positional argument.

    Raises
    ------
    TypeError
        When an argument is a list, tuple or dictionary.
    RuntimeError
        When ``f`` depends on a traced value that it was not given as an argument.

    Source: Griewank (1992); Chen et al. (2016). Curriculum: A8.
    """

    def plain(*args, **kwargs):
        for a in args:
            if isinstance(a, list | tuple | dict):
                raise TypeError(
                    f"checkpoint: expected arrays as arguments, got a {type(a).__name__}; "
                    "pass its arrays one by one"
                )
        y = f(*args, **kwargs)
        if isinstance(y, Tracer):  # yet no argument is traced here
            raise RuntimeError(
                "checkpoint: f depends on a traced value that is not among its arguments; "
                "pass it as an argument"
            )
        return y

    def of_traced(args, kwargs, argnums):
        def of_some(some):
            given = dict(zip(argnums, some, strict=True))
            return f(*[given.get(i, a) for i, a in enumerate(args)], **kwargs)

        return of_some, [args[i] for i in argnums]

    run: Any = functools.wraps(f)(primitive(plain))
    run.vjp = lambda g, node: vjp(*of_traced(*node.call))[1](g)
    run.jvp = lambda tangents, ans, *call: jvp(of_traced(*call)[0], of_traced(*call)[1], tangents)[
        1
    ]
    return run
