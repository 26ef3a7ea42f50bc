"""The engine: nodes, duals, and how a function's derivative rule is found. It knows no formula."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

new_level = itertools.count(1).__next__  # a trace that starts later is nested inside
numpy_to_primitive: dict[Callable, Callable] = {}  # np.exp -> exp; filled by primitives.py


class Tracer:
    """What stands in for an array while a function is differentiated: `Node` or `Dual`.

    Comparisons and `bool` use the value: Python's ``if`` and ``while`` work, and leave no trace.
    """

    __slots__ = ("level", "value")
    __hash__ = object.__hash__  # `==` compares values, but dictionaries must go by identity
    value: Any
    level: int
    record: Callable  # (fun, value, args, values, kwargs, argnums, level) -> Tracer

    shape = property(lambda self: np.shape(value_of(self)))
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: value_of(self).size)
    dtype = property(lambda self: value_of(self).dtype)
    __lt__ = lambda self, other: value_of(self) < value_of(other)
    __le__ = lambda self, other: value_of(self) <= value_of(other)
    __gt__ = lambda self, other: value_of(self) > value_of(other)
    __ge__ = lambda self, other: value_of(self) >= value_of(other)
    __eq__ = lambda self, other: value_of(self) == value_of(other)
    __ne__ = lambda self, other: value_of(self) != value_of(other)
    __bool__ = lambda self: bool(value_of(self))
    __iter__ = lambda self: (self[i] for i in range(len(self)))
    __len__ = lambda self: len(value_of(self))

    def __float__(self):
        raise TypeError(
            "float(): expected an array, got a traced value, which float() would cut out of the "
            "graph; to look at the number, use autodiff.value_of(x)"
        )

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "numpy.array(): expected numbers, got a traced value, which NumPy would cut out of the "
            "graph; use the functions of coursekit.autodiff, or autodiff.value_of(x) to look"
        )

    def __array_ufunc__(self, ufunc, method, *args, **kwargs):
        if method != "__call__":
            raise NotImplementedError(f"numpy.{ufunc.__name__}.{method}: no derivative rule")
        if kwargs:
            raise TypeError(
                f"numpy.{ufunc.__name__}: expected no options for a traced value, got "
                f"{', '.join(kwargs)}; an array written in place (out=, +=) has no graph"
            )
        return self.__array_function__(ufunc, (), args, kwargs)

    def __array_function__(self, fun, types, args, kwargs):
        if fun not in numpy_to_primitive:
            raise NotImplementedError(
                f"numpy.{fun.__name__}: no derivative rule; wrap it with autodiff.primitive and "
                f"declare the rule with autodiff.defvjp"
            )
        return numpy_to_primitive[fun](*args, **kwargs)


class Node(Tracer):
    """A value in a computation graph, the function that made it, and the nodes it was made from.

    Parameters
    ----------
    value : array_like
        What the function returned. Inside a nested derivative, a tracer of the outer one.
    fun : primitive, optional
        The primitive that made the value; ``None`` for a root (a parameter or an input).
    parents : tuple of Node
        The traced arguments of that call, in order, with repetition: ``x * x`` has ``(x, x)``.
    call : tuple, optional
        ``(args, kwargs, argnums)``: the values of the call and which of them the parents are.
    level : int, optional
        Which derivative the node belongs to; an inner derivative has the larger number.

    Convention
    ----------
    Roots are inputs and the leaf is the output: edges run in the direction of the computation.

    Examples
    --------
    >>> from coursekit.autodiff import exp
    >>> z = Node(1.5)
    >>> y = 1 / (1 + exp(-z))
    >>> [node.fun.__name__ for node in toposort(y) if node.fun]
    ['divide', 'add', 'exp', 'negative']

    Curriculum: A3.
    """

    __slots__ = ("call", "fun", "parents")

    def __init__(self, value, fun=None, parents=(), call=((), {}, ()), level=0):
        if not isinstance(value, np.ndarray | np.generic | Tracer):
            value = np.asarray(value)[()]
        self.value, self.fun, self.parents, self.call, self.level = value, fun, parents, call, level

    def __repr__(self):
        return f"Node({value_of(self)}, {self.fun.__name__ if self.fun else 'root'})"

    @staticmethod
    def record(fun, value, args, values, kwargs, argnums, level):
        """Return the node of one call: reverse mode only remembers."""
        parents = tuple([args[i] for i in argnums])
        return Node(value, fun, parents, (values, kwargs, argnums), level)


class Dual(Tracer):
    """A dual number: a value and its derivative along one direction, of the same shape.

    Curriculum: A7.
    """

    __slots__ = ("tangent",)

    def __init__(self, value, tangent, level=0):
        self.value, self.tangent, self.level = value, tangent, level

    def __repr__(self):
        return f"Dual({self.value}, {self.tangent})"

    @staticmethod
    def record(fun, value, args, values, kwargs, argnums, level):
        """Return the dual of one call: forward mode computes the tangent at once."""
        if fun.jvp is None:
            raise NotImplementedError(f"jvp: {fun.__name__} has no forward rule; use defjvp")
        tangent = fun.jvp([args[i].tangent for i in argnums], value, values, kwargs, argnums)
        return Dual(value, tangent, level)


def value_of(x: Any) -> Any:
    """Return the plain number or array inside a traced value, whatever the depth of nesting."""
    while isinstance(x, Tracer):
        x = x.value
    return x


def shape(x: Any) -> tuple[int, ...]:
    """Return the shape of a number, an array or a traced value."""
    return x.shape if hasattr(x, "shape") else np.shape(x)


def primitive(fun: Callable) -> Callable:
    """Make a function of arrays traceable: on a `Node` or `Dual` it leaves its mark, else it runs.

    Parameters
    ----------
    fun : callable
        Takes arrays as positional arguments and options by keyword; returns one array.

    Returns
    -------
    callable
        With the attributes ``vjp`` and ``jvp`` that `defvjp` and `defjvp` fill.

    Raises
    ------
    TypeError
        When a traced value is passed by keyword: options are not differentiated.

    Examples
    --------
    >>> from coursekit.autodiff import grad
    >>> cube = primitive(lambda x: x**3)
    >>> defvjp(cube, lambda g, ans, x: g * 3 * x**2)
    >>> float(grad(cube)(2.0))
    12.0

    Source: the wrapper of HIPS autograd (Maclaurin 2016), with levels as in JAX's autodidax.
    Curriculum: A3.
    """

    @functools.wraps(fun)
    def traced(*args, **kwargs):
        traces = [a for a in args if isinstance(a, Tracer)]
        if kwargs and any(isinstance(a, Tracer) for a in kwargs.values()):
            raise TypeError(
                f"{traced.__name__}: expected options by keyword to be plain values, got a traced "
                "value; pass what is differentiated by position"
            )
        if not traces:
            return fun(*args, **kwargs)
        top = traces[0] if len(traces) == 1 else max(traces, key=lambda a: a.level)
        level, values, argnums = top.level, list(args), []
        for i, a in enumerate(args):
            if isinstance(a, Tracer) and a.level == level:
                values[i] = a.value
                argnums.append(i)
        # The values may be tracers of an outer derivative: the call descends one level at a time.
        value = traced(*values, **kwargs)
        return type(top).record(traced, value, args, values, kwargs, argnums, level)

    traced.__name__ = fun.__name__.lstrip("_")
    traced.vjp = traced.jvp = None  # type: ignore[attr-defined]
    return traced


def defvjp(fun: Callable, *rules: Callable | None) -> None:
    """Declare the reverse rules of a primitive, one for each positional argument.

    A rule ``(g, ans, *args, **kwargs) -> gradient`` maps the upstream gradient ``g``, of the shape
    of ``ans``, to the gradient for its argument. Broadcasting is undone here, once, for all rules.

    Raises
    ------
    NotImplementedError
        In the backward pass, when the argument's rule is ``None`` or was not given.
    ValueError
        In the backward pass, when a rule returns what cannot have the argument's shape.
    """

    def vjp(g, node):
        args, kwargs, argnums = node.call
        gradients = []
        for i in argnums:
            if i >= len(rules) or rules[i] is None:
                raise NotImplementedError(f"grad: {fun.__name__} has no rule for argument {i}")
            gradient, to = rules[i](g, node.value, *args, **kwargs), shape(args[i])
            if shape(gradient) != to:
                gradient = unbroadcast(gradient, to, fun.__name__)
            gradients.append(gradient)
        return gradients

    fun.vjp = vjp  # type: ignore[attr-defined]


def defjvp(fun: Callable, *rules: Callable | None) -> None:
    """Declare the forward rules ``(t, ans, *args, **kwargs) -> tangent`` of a primitive.

    The tangents of several arguments are added and broadcast to the shape of ``ans``.

    Raises
    ------
    NotImplementedError
        In the forward pass, when the argument's rule is ``None`` or was not given.
    """

    def jvp(tangents, ans, args, kwargs, argnums):
        total = None
        for t, i in zip(tangents, argnums, strict=True):
            if i >= len(rules) or rules[i] is None:
                raise NotImplementedError(f"jvp: {fun.__name__} has no rule for argument {i}")
            term = rules[i](t, ans, *args, **kwargs)
            total = term if total is None else total + term
        same = shape(total) == shape(ans)
        return total if same else numpy_to_primitive[np.broadcast_to](total, shape(ans))

    fun.jvp = jvp  # type: ignore[attr-defined]


def unbroadcast(g: Any, to: tuple[int, ...], name: str = "unbroadcast") -> Any:
    """Sum a gradient over the axes along which its argument had been repeated.

    Parameters
    ----------
    g : array
        The gradient, of the shape of the result.
    to : tuple of int
        The shape of the argument.
    name : str
        Who is to blame in the message.

    Returns
    -------
    array of shape ``to``

    Raises
    ------
    ValueError
        When ``to`` cannot be broadcast to the shape of ``g``.
    """
    got = shape(g)
    extra = len(got) - len(to)
    if extra > 0 and got[extra:] == to:  # the usual case, a bias
        return g.sum(axis=0 if extra == 1 else tuple(range(extra)))
    if extra < 0 or any(n not in (1, m) for n, m in zip(to, got[extra:], strict=True)):
        raise ValueError(
            f"{name}: expected a gradient that reduces to the argument's shape {to}, got {got}"
        )
    g = g.sum(axis=tuple(range(extra)))
    kept = tuple(i for i, n in enumerate(to) if n != shape(g)[i])
    return g.sum(axis=kept, keepdims=True) if kept else g


def toposort(end: Node) -> Iterator[Node]:
    """Yield the nodes that ``end`` was computed from, each after every node that used it.

    Two loops and no recursion, so the depth of the graph is bounded by memory alone. The first
    counts how often each node was used; the second releases a node when its last user is done.

    Source: Kahn (1962). Curriculum: A3, A4.
    """
    uses: dict[Node, int] = {}
    stack = [end]
    while stack:
        node = stack.pop()
        uses[node] = uses.get(node, 0) + 1
        if uses[node] == 1:
            stack.extend(node.parents)
    ready = [end]
    while ready:
        node = ready.pop()
        yield node
        for parent in node.parents:
            uses[parent] -= 1
            if uses[parent] == 0:
                ready.append(parent)


def backward(end: Node, upstream: Any) -> dict[Node, Any]:
    """Pass messages from the output to the roots; return the gradient of each root.

    Parameters
    ----------
    end : Node
        The output.
    upstream : array_like, the shape of ``end``
        The gradient of the final scalar with respect to ``end``; 1 when ``end`` is that scalar.

    Returns
    -------
    dict
        From each root to its gradient, of the root's shape.

    Raises
    ------
    NotImplementedError
        When a primitive on the way has no reverse rule.

    Source: Griewank and Walther (2008), algorithm 3.2. Curriculum: A4, A6.
    """
    gradients, roots = {end: upstream}, {}
    for node in toposort(end):
        g = gradients.pop(node)  # every node that used it has sent its message
        if node.fun is None:
            roots[node] = g
            continue
        if node.fun.vjp is None:
            raise NotImplementedError(f"grad: {node.fun.__name__} has no reverse rule; use defvjp")
        for parent, message in zip(node.parents, node.fun.vjp(g, node), strict=True):
            gradients[parent] = gradients[parent] + message if parent in gradients else message
    return roots


def map_tree(fun: Callable, tree: Any, *others: Any) -> Any:
    """Apply ``fun`` to every array in nested lists, tuples and dictionaries of one structure."""
    if isinstance(tree, dict):
        return {k: map_tree(fun, v, *(o[k] for o in others)) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        mapped = [map_tree(fun, *leaves) for leaves in zip(tree, *others, strict=True)]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    return fun(tree, *others)


def leaves(tree: Any) -> Sequence[Any]:
    """Return the arrays of a tree in a list."""
    found: list[Any] = []
    map_tree(found.append, tree)
    return found
