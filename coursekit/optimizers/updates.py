"""The direction of one step, for one tensor: pure functions that return direction and state.

State is a dictionary with PyTorch's keys, empty at the start. Nothing that is passed in changes,
unless ``inplace`` says that the tensors of the state may be overwritten: the classes say so, since
new memory at every step costs more than the arithmetic.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

State = dict[str, Any]
Values = Float[Tensor, "*shape"]


def sgd_update(
    param: Values,
    grad: Values,
    state: State,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    inplace: bool = False,
) -> tuple[Values, State]:
    """Return the direction of gradient descent, heavy ball or Nesterov's method.

    g ← g + weight_decay · w
    b ← momentum · b + (1 − dampening) · g, at the first step b ← g
    d = g without momentum, b for heavy ball, g + momentum · b for Nesterov

    Parameters
    ----------
    param, grad
        Weights and gradient, of one shape.
    state
        Empty at the start; then ``momentum_buffer``, of the same shape.
    momentum, dampening, weight_decay, nesterov
        As in `torch.optim.SGD`.

    inplace
        Write the new state over the old one.

    Returns
    -------
    (direction, state)
        The step is −lr · direction.

    Convention: as in PyTorch the buffer sums gradients. The lecture's velocity
    v ← α v − η g is −lr · b as long as lr stays; when lr drops, b follows at once, v does not.

    Source: B. Polyak, Some methods of speeding up the convergence of iteration methods (1964);
    I. Sutskever et al., On the importance of initialization and momentum in deep learning (2013),
    equations 1 to 4. Curriculum: O1, O3.

    Examples
    --------
    >>> g = torch.tensor([1.0, -2.0])
    >>> d, state = sgd_update(torch.zeros(2), g, {}, momentum=0.9)
    >>> sgd_update(torch.zeros(2), g, state, momentum=0.9)[0]
    tensor([ 1.9000, -3.8000])
    """
    if weight_decay:
        grad = torch.add(grad, param, alpha=weight_decay)
    if momentum == 0:
        return grad, state
    old = state.get("momentum_buffer")
    if old is None:
        buffer = grad.clone()
    elif dampening:
        buffer = (old if inplace else old.clone()).mul_(momentum).add_(grad, alpha=1 - dampening)
    else:
        buffer = torch.add(grad, old, alpha=momentum, out=old if inplace else None)
    state = state if inplace else dict(state)
    state["momentum_buffer"] = buffer
    return (torch.add(grad, buffer, alpha=momentum) if nesterov else buffer), state


def adagrad_update(
    param: Values,
    grad: Values,
    state: State,
    *,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    inplace: bool = False,
) -> tuple[Values, State]:
    """Return AdaGrad's direction: the gradient over the root of all squared gradients so far.

    r ← r + g²
    d = g / (√r + eps) / (1 + (step − 1) · lr_decay)

    Parameters
    ----------
    param, grad
        Weights and gradient, of one shape.
    state
        Empty at the start; then ``step`` and ``sum``.
    lr_decay, weight_decay, initial_accumulator_value, eps
        As in `torch.optim.Adagrad`.

    inplace
        Write the new state over the old one.

    Returns
    -------
    (direction, state)
        The step is −lr · direction.

    Source: J. Duchi, E. Hazan and Y. Singer, Adaptive subgradient methods, JMLR 12 (2011), the
    diagonal version of figure 1. Curriculum: O5.
    """
    grad = _decayed(param, grad, weight_decay)
    state = _own(state, inplace)
    if "sum" not in state:
        state["sum"] = torch.full_like(param, initial_accumulator_value)
    direction = grad / state["sum"].addcmul_(grad, grad).sqrt().add_(eps)
    if lr_decay:
        direction.div_(1 + (state["step"] - 1) * lr_decay)
    return direction, state


def rmsprop_update(
    param: Values,
    grad: Values,
    state: State,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    inplace: bool = False,
) -> tuple[Values, State]:
    """Return RMSProp's direction: the gradient over the root of a moving average of its square.

    s ← alpha · s + (1 − alpha) · g²
    a ← alpha · a + (1 − alpha) · g if centered, else 0
    d = g / (√(s − a²) + eps), or with momentum b ← momentum · b + that

    Parameters
    ----------
    param, grad
        Weights and gradient, of one shape.
    state
        Empty at the start; then ``step``, ``square_avg``, and ``grad_avg`` and
        ``momentum_buffer`` where they are used.
    alpha, eps, weight_decay, momentum, centered
        As in `torch.optim.RMSprop`.

    inplace
        Write the new state over the old one.

    Returns
    -------
    (direction, state)
        The step is −lr · direction.

    Source: T. Tieleman and G. Hinton, lecture 6.5 of Neural Networks for Machine Learning (2012).
    Curriculum: O5.
    """
    grad = _decayed(param, grad, weight_decay)
    state = _own(state, inplace)
    square = _average_square(state, "square_avg", grad, alpha)
    if centered:
        mean = _average(state, "grad_avg", grad, alpha)
        square = torch.addcmul(square, mean, mean, value=-1)
    direction = grad / square.sqrt().add_(eps)
    if momentum:
        if "momentum_buffer" in state:
            direction.add_(state["momentum_buffer"], alpha=momentum)
        state["momentum_buffer"] = direction
    return direction, state


def adam_update(
    param: Values,
    grad: Values,
    state: State,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    inplace: bool = False,
) -> tuple[Values, State]:
    """Return Adam's direction: the mean gradient over the root of the mean squared gradient.

    m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²  (algorithm 1)
    u ← max(u, v) for AMSGrad, else v
    d = m / (1 − β₁^step) / (√(u / (1 − β₂^step)) + eps)

    Parameters
    ----------
    param, grad
        Weights and gradient, of one shape.
    state
        Empty at the start; then ``step``, ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` for
        AMSGrad.
    betas, eps, weight_decay, amsgrad
        As in `torch.optim.Adam`; the decay is part of the gradient.

    inplace
        Write the new state over the old one.

    Returns
    -------
    (direction, state)
        The step is −lr · direction.

    Convention: eps stands outside the root and after the correction, the paper's "ε hat" version
    does not correct it. AMSGrad's maximum is taken before the correction; its paper has none.

    Source: D. Kingma and J. Ba, Adam, arXiv:1412.6980, algorithm 1; S. Reddi, S. Kale and S. Kumar,
    On the convergence of Adam and beyond, arXiv:1904.09237, algorithm 2. Curriculum: O5, O6.

    Examples
    --------
    The first direction is the sign of the gradient, whatever its size.

    >>> adam_update(torch.zeros(2), torch.tensor([1e-3, -50.0]), {})[0]
    tensor([ 1.0000, -1.0000])
    """
    grad = _decayed(param, grad, weight_decay)
    return _moments(grad, grad, _own(state, inplace), betas, eps, amsgrad=amsgrad)


def adamw_update(
    param: Values,
    grad: Values,
    state: State,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    inplace: bool = False,
) -> tuple[Values, State]:
    """Return Adam's direction with the decay beside it instead of in the gradient.

    d = Adam's d for the bare gradient + weight_decay · w

    Parameters
    ----------
    param, grad, state, betas, eps, amsgrad
        As in `adam_update`.
    weight_decay
        Each step multiplies the weights by 1 − lr · weight_decay, whatever the gradients are.

    inplace
        Write the new state over the old one.

    Returns
    -------
    (direction, state)
        The step is −lr · direction.

    Source: I. Loshchilov and F. Hutter, Decoupled weight decay regularization, arXiv:1711.05101,
    algorithm 2. Curriculum: O5.
    """
    state = _own(state, inplace)
    direction, state = _moments(grad, grad, state, betas, eps, amsgrad=amsgrad)
    return direction.add_(param, alpha=weight_decay), state


def adahessian_update(
    param: Values,
    grad: Values,
    state: State,
    diagonal: Values,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    hessian_power: float = 1.0,
    inplace: bool = False,
) -> tuple[Values, State]:
    """Return AdaHessian's direction: Adam's with an estimate of the Hessian's diagonal in v.

    m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) D²
    d = m / (1 − β₁^step) / ((√(v / (1 − β₂^step)))^hessian_power + eps) + weight_decay · w

    Parameters
    ----------
    param, grad
        Weights and gradient, of one shape.
    state
        Empty at the start; then ``step``, ``exp_avg``, ``exp_hessian_diag_sq``.
    diagonal
        Estimate D of the diagonal of the Hessian, of the same shape.
    betas, eps, weight_decay
        As in `adamw_update`.
    hessian_power
        In (0, 1]: how much of the curvature is divided out.

    inplace
        Write the new state over the old one.

    Returns
    -------
    (direction, state)
        The step is −lr · direction.

    Source: Z. Yao et al., ADAHESSIAN, arXiv:2006.00719, equations 10 to 12; defaults of the code
    released with it. Curriculum: O9.
    """
    state = _own(state, inplace)
    direction, state = _moments(
        grad, diagonal, state, betas, eps, key="exp_hessian_diag_sq", power=hessian_power
    )
    return direction.add_(param, alpha=weight_decay), state


def _moments(grad, scale, state, betas, eps, *, key="exp_avg_sq", amsgrad=False, power=1.0):
    """Average ``grad`` and the square of ``scale``; return the corrected quotient and the state."""
    first = _average(state, "exp_avg", grad, betas[0])
    second = _average_square(state, key, scale, betas[1])
    if amsgrad:
        largest = state.setdefault("max_exp_avg_sq", second.clone())
        second = torch.maximum(largest, second, out=largest)
    # m̂ / (v̂^(power / 2) + eps), with both corrections moved into two numbers
    of_first, of_root = (1 - beta ** state["step"] for beta in betas)
    root = second.sqrt() if power == 1 else second.pow(power / 2)
    root.mul_(of_first / of_root ** (power / 2)).add_(eps * of_first)
    return first / root, state


def _own(state, inplace):
    """Return the state with the number of this step, with tensors of its own unless ``inplace``."""
    if not inplace:
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    state["step"] = int(state.get("step", 0)) + 1
    return state


def _decayed(param, grad, weight_decay):
    return grad.add(param, alpha=weight_decay) if weight_decay else grad


def _average(state, key, new, beta):
    """Replace state[key] by beta · state[key] + (1 − beta) · new; an average starts at zero."""
    if key not in state:
        state[key] = torch.zeros_like(new)
    return state[key].lerp_(new, 1 - beta)


def _average_square(state, key, new, beta):
    """Replace state[key] by beta · state[key] + (1 − beta) · new²; an average starts at zero."""
    if key not in state:
        state[key] = torch.zeros_like(new)
    return state[key].mul_(beta).addcmul_(new, new, value=1 - beta)
