"""Automatic differentiation on NumPy arrays: reverse mode, forward mode, and any nesting of them.

``core``        the engine: `Node`, `Dual`, `primitive`, and the backward sweep
``primitives``  NumPy's functions with their derivative rules
``transforms``  `grad`, `vjp`, `jvp`, `hvp`, `jacobian`, `checkpoint`
``checks``      `check_grads`
``drawing``     `draw`

Curriculum: A1, A3.
"""

from coursekit.autodiff.checks import check_grads
from coursekit.autodiff.core import (
    Dual,
    Node,
    backward,
    defjvp,
    defvjp,
    primitive,
    toposort,
    unbroadcast,
    value_of,
)
from coursekit.autodiff.drawing import draw
from coursekit.autodiff.primitives import (
    absolute,
    add,
    affine,
    broadcast_to,
    cos,
    cross_entropy,
    divide,
    exp,
    getitem,
    log,
    log1p,
    log_softmax,
    logsumexp,
    matmul,
    max,
    maximum,
    mean,
    minimum,
    multiply,
    negative,
    power,
    relu,
    reshape,
    sigmoid,
    sin,
    softmax,
    sqrt,
    square,
    stack,
    subtract,
    sum,
    tanh,
    transpose,
    where,
)
from coursekit.autodiff.transforms import (
    checkpoint,
    grad,
    hvp,
    jacobian,
    jvp,
    value_and_grad,
    vjp,
)
