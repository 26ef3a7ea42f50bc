"""NumPy registered into the engine: each function with its derivative within four lines.

``g`` is the upstream gradient, ``t`` a tangent, ``ans`` the function's own result. A rule is
written with operators, primitives and NumPy functions registered here, which accept traced values,
so it can be differentiated again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coursekit.autodiff.core import (
    Tracer,
    defjvp,
    defvjp,
    numpy_to_primitive,
    primitive,
    shape,
    value_of,
)


def register(fun) -> Any:
    """Make a NumPy function traceable, also when it is called by its NumPy name on a node."""
    numpy_to_primitive[fun] = traced = primitive(fun)
    return traced


def elementwise(fun, *rules) -> Any:
    """Register a function whose Jacobian is diagonal: one formula serves both modes."""
    traced = register(fun)
    defvjp(traced, *rules)
    defjvp(traced, *rules)
    return traced


# --- arithmetic ---
negative = elementwise(np.negative, lambda g, ans, x: -g)
add = elementwise(np.add, lambda g, ans, x, y: g, lambda g, ans, x, y: g)
subtract = elementwise(np.subtract, lambda g, ans, x, y: g, lambda g, ans, x, y: -g)
multiply = elementwise(np.multiply, lambda g, ans, x, y: g * y, lambda g, ans, x, y: g * x)
divide = elementwise(np.divide, lambda g, ans, x, y: g / y, lambda g, ans, x, y: -g * ans / y)


def _one_less(n):
    if isinstance(n, int | float):
        return n - 1 if n else 1
    return where(value_of(n) == 0, 1.0, n - 1)  # x**0 has slope 0 at 0 too


def _log_or_0(x):
    if isinstance(x, int | float):  # stays a Python number, so that float32 stays float32
        return float(np.log(x)) if x else 0.0
    return log(where(value_of(x) == 0, 1.0, x))


power = elementwise(
    np.power,
    lambda g, ans, x, n: g * n * x ** _one_less(n),
    lambda g, ans, x, n: g * ans * _log_or_0(x),
)
square = elementwise(np.square, lambda g, ans, x: g * (2 * x))
sqrt = elementwise(np.sqrt, lambda g, ans, x: g / (2 * ans))
absolute = elementwise(np.absolute, lambda g, ans, x: g * np.sign(value_of(x)))

# --- the exponential family ---
exp = elementwise(np.exp, lambda g, ans, x: g * ans)
log: Any = elementwise(np.log, lambda g, ans, x: g / x)
log1p = elementwise(np.log1p, lambda g, ans, x: g / (1 + x))
sin = elementwise(np.sin, lambda g, ans, x: g * cos(x))
cos: Any = elementwise(np.cos, lambda g, ans, x: -g * sin(x))
tanh = elementwise(np.tanh, lambda g, ans, x: g * (1 - ans * ans))


def _sigmoid(x):
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1.0, e) / (1 + e)


sigmoid = elementwise(_sigmoid, lambda g, ans, x: g * (ans * (1 - ans)))


# --- kinks: the derivative at the kink is a choice, and these are PyTorch's. A mask multiplies,
# which is faster than selecting; the price is that an infinite message to a masked entry is nan.
def _relu(x):
    return np.maximum(x, 0)


relu = elementwise(_relu, lambda g, ans, x: g * (value_of(x) > 0))  # 0 at 0


def _share(x, y):
    x, y = value_of(x), value_of(y)
    dtype = np.result_type(x, y)
    return np.where(x == y, 0.5, x > y).astype(dtype)  # a tie is shared


maximum = elementwise(
    np.maximum, lambda g, ans, x, y: g * _share(x, y), lambda g, ans, x, y: g * _share(y, x)
)
minimum = elementwise(
    np.minimum, lambda g, ans, x, y: g * _share(y, x), lambda g, ans, x, y: g * _share(x, y)
)
where: Any = elementwise(
    np.where,
    None,
    lambda g, ans, condition, x, y: where(condition, g, 0.0),
    lambda g, ans, condition, x, y: where(condition, 0.0, g),
)


# --- shapes: linear maps, whose tangent is the map itself ---
def linear(fun, rule) -> Any:
    """Register a function linear in its first argument."""
    traced = register(fun)
    defvjp(traced, rule)
    defjvp(traced, lambda t, ans, *args, **kwargs: traced(t, *args[1:], **kwargs))
    return traced


reshape: Any = linear(np.reshape, lambda g, ans, x, to: reshape(g, shape(x)))
transpose: Any = linear(
    np.transpose,
    lambda g, ans, x, axes=None: transpose(
        g, None if axes is None else np.argsort(np.mod(axes, len(axes)))
    ),
)
broadcast_to = linear(np.broadcast_to, lambda g, ans, x, to: g)  # the engine sums it back


def _getitem(x, index):
    return x[index]


def _putitem(g, index, to):
    out = np.zeros(to, dtype=g.dtype)
    np.add.at(out, index, g)  # adds where an index is repeated
    return out


getitem = linear(_getitem, lambda g, ans, x, index: putitem(g, index, shape(x)))
putitem: Any = linear(_putitem, lambda g, ans, x, index, to: getitem(g, index))


# --- reductions ---
def _kept(x, axis):
    """Return the shape of ``x`` with the reduced axes kept at length 1."""
    to = shape(x)
    axes = range(len(to)) if axis is None else np.atleast_1d(axis) % len(to)
    return tuple(1 if i in axes else n for i, n in enumerate(to))


def _repeat(g, x, axis):
    return broadcast_to(reshape(g, _kept(x, axis)), shape(x))


sum = linear(np.sum, lambda g, ans, x, axis=None, *, keepdims=False: _repeat(g, x, axis))
mean = linear(
    np.mean,
    lambda g, ans, x, axis=None, *, keepdims=False: (
        _repeat(g, x, axis) / (value_of(x).size // (value_of(ans).size or 1))
    ),
)


def _logsumexp(x, axis=None, keepdims=False):
    x = np.asanyarray(x)
    highest = x.max(axis=axis, keepdims=True)  # so that exp cannot overflow
    highest = np.where(np.isfinite(highest), highest, x.dtype.type(0))
    out = np.log(np.exp(x - highest).sum(axis=axis, keepdims=True)) + highest
    return out if keepdims else np.squeeze(out, axis=axis)


def _softmax(ans, x, axis):
    return exp(x - reshape(ans, _kept(x, axis)))


def _argmax(ans, x, axis):
    x, kept = value_of(x), np.reshape(value_of(ans), _kept(x, axis))
    top = (x == kept).astype(x.dtype)
    return top / np.sum(top, axis=axis, keepdims=True)  # a tie is shared, as in torch.amax


def weighted(fun, weights) -> Any:
    """Register a reduction whose gradient is a field of weights."""
    traced = register(fun)

    def vjp(g, ans, x, axis=None, *, keepdims=False):
        return reshape(g, _kept(x, axis)) * weights(ans, x, axis)

    def jvp(t, ans, x, axis=None, *, keepdims=False):
        return sum(t * weights(ans, x, axis), axis, keepdims=keepdims)

    defvjp(traced, vjp)
    defjvp(traced, jvp)
    return traced


logsumexp = weighted(_logsumexp, _softmax)
max = weighted(np.max, _argmax)


# --- matrix products ---
def _swap(x):
    axes = tuple(range(len(shape(x))))
    return transpose(x, (*axes[:-2], axes[-1], axes[-2]))


def _as_matrices(g, x, y):
    """Undo matmul's rule for vectors: a row on the left, a column on the right."""
    to = shape(g)
    if len(shape(y)) == 1:
        to, y = (*to, 1), reshape(y, (-1, 1))
    if len(shape(x)) == 1:
        to, x = (*to[:-1], 1, to[-1]), reshape(x, (1, -1))
    return reshape(g, to), x, y


def _matmul_left(g, ans, x, y):
    if len(shape(x)) == len(shape(y)) == 2:
        return g @ y.T
    g, x, y = _as_matrices(g, x, y)
    return g @ _swap(y)


def _matmul_right(g, ans, x, y):
    if len(shape(x)) == len(shape(y)) == 2:
        return x.T @ g
    vector = len(shape(y)) == 1
    g, x, y = _as_matrices(g, x, y)
    gradient = _swap(x) @ g
    return reshape(gradient, shape(gradient)[:-1]) if vector else gradient


matmul = register(np.matmul)
defvjp(matmul, _matmul_left, _matmul_right)
defjvp(matmul, lambda t, ans, x, y: matmul(t, y), lambda t, ans, x, y: matmul(x, t))


def _affine(x, w, b):
    """Return x @ w + b with one new array instead of two."""
    out = np.matmul(x, w)
    if np.shape(b) != np.shape(out)[-1:]:
        raise ValueError(f"affine: expected b of shape {np.shape(out)[-1:]}, got {np.shape(b)}")
    fits = isinstance(out, np.ndarray) and np.result_type(out, b) == out.dtype
    return np.add(out, b, out=out) if fits else out + b


affine = register(_affine)
defvjp(
    affine,
    lambda g, ans, x, w, b: _matmul_left(g, ans, x, w),
    lambda g, ans, x, w, b: _matmul_right(g, ans, x, w),
    lambda g, ans, x, w, b: g,
)
defjvp(
    affine,
    lambda t, ans, x, w, b: matmul(t, w),
    lambda t, ans, x, w, b: matmul(x, t),
    lambda t, ans, x, w, b: t,
)


def _stack(*arrays):
    return np.stack(arrays)


stack: Any = primitive(_stack)  # any number of arguments, so its rules are written out
stack.vjp = lambda g, node: [g[i] for i in node.call[2]]
stack.jvp = lambda tangents, ans, args, kwargs, argnums: stack(
    *[
        tangents[argnums.index(i)] if i in argnums else np.zeros_like(value_of(ans[i]))
        for i in range(len(args))
    ]
)


# --- composites: no rule needed, they are made of primitives ---
def log_softmax(x, axis=-1):
    """Return x − log Σ exp x along an axis, without overflow."""
    return x - logsumexp(x, axis=axis, keepdims=True)


def softmax(x, axis=-1):
    """Return exp x / Σ exp x along an axis, without overflow."""
    e = np.exp(x - value_of(x).max(axis=axis, keepdims=True))  # a shift that cancels: a constant
    return e / e.sum(axis=axis, keepdims=True)


def _cross_entropy(logits, labels):
    """Return the mean negative log-probability of the right classes.

    Parameters
    ----------
    logits : array of shape (batch, classes)
    labels : int array of shape (batch,)

    Raises
    ------
    ValueError
        When the shapes do not fit or a label is not in 0 … classes − 1.

    Curriculum: A11.
    """
    logits, labels = np.asanyarray(logits), np.asarray(labels)
    got = logits.shape
    if len(got) != 2 or labels.shape != got[:1]:
        raise ValueError(
            "cross_entropy: expected logits of shape (batch, classes) and labels of shape "
            f"(batch,), got {got} and {labels.shape}"
        )
    if labels.dtype.kind not in "iu":
        raise TypeError(f"cross_entropy: expected integer labels, got {labels.dtype}")
    if labels.size == 0 or labels.min() < 0 or labels.max() >= got[1]:
        raise ValueError(f"cross_entropy: expected labels in 0 … {got[1] - 1}, got {labels}")
    right = logits[np.arange(len(labels)), labels]
    return (_logsumexp(logits, axis=1) - right).mean()


def _residual(logits, labels):
    onehot = np.zeros(shape(logits), dtype=logits.dtype)
    onehot[np.arange(len(labels)), labels] = 1
    return (softmax(logits) - onehot) / len(labels)


cross_entropy = register(_cross_entropy)
defvjp(cross_entropy, lambda g, ans, logits, labels: g * _residual(logits, labels))
defjvp(cross_entropy, lambda t, ans, logits, labels: sum(t * _residual(logits, labels)))


# --- operators ---
def _swapped(fun):
    return lambda self, other: fun(other, self)


tracer: Any = Tracer
for _name, _fun in {
    "add": add,
    "sub": subtract,
    "mul": multiply,
    "truediv": divide,
    "pow": power,
    "matmul": matmul,
}.items():
    setattr(tracer, f"__{_name}__", lambda self, other, fun=_fun: fun(self, other))
    setattr(tracer, f"__r{_name}__", _swapped(_fun))
tracer.__neg__ = lambda self: negative(self)
tracer.__abs__ = lambda self: absolute(self)
tracer.__getitem__ = lambda self, index: getitem(self, index)
tracer.T = property(transpose)
tracer.sum = lambda self, axis=None, keepdims=False: sum(self, axis=axis, keepdims=keepdims)
tracer.mean = lambda self, axis=None, keepdims=False: mean(self, axis=axis, keepdims=keepdims)
tracer.reshape = lambda self, *to: reshape(self, to[0] if len(to) == 1 else to)
