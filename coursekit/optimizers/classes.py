"""The methods as `torch.optim.Optimizer`: state, parameter groups, checks; no arithmetic.

Argument names, defaults and keys of the state are PyTorch's, so a ``state_dict`` can be moved
between a class here and the one of that name in `torch.optim`.
"""

import math
from functools import partial
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors

from coursekit import _check
from coursekit.optimizers import updates


class SGD(torch.optim.Optimizer):
    """Step along `sgd_update`: gradient descent, heavy ball, Nesterov.

    Parameters
    ----------
    params
        Tensors, or dictionaries that give groups of them options of their own.
    lr
        Learning rate, not negative.
    momentum, dampening, weight_decay, nesterov, maximize
        As in `torch.optim.SGD`.

    Raises
    ------
    ValueError
        For an option outside its range; in ``step`` for a gradient that is not finite, before
        anything has changed.

    Curriculum: O1, O3.

    Examples
    --------
    >>> w = torch.tensor([3.0], requires_grad=True)
    >>> optimizer = SGD([w], lr=0.1)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w
    tensor([2.4000], requires_grad=True)
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ):
        _not_negative("SGD", lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "SGD: expected momentum above 0 and no dampening for nesterov, "
                f"got {momentum} and {dampening}"
            )
        options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        options |= {"weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {"lr": lr, **options})

    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        names = ("momentum", "dampening", "weight_decay", "nesterov")
        return _step(self, closure, updates.sgd_update, names)


class Adagrad(torch.optim.Optimizer):
    """Step along `adagrad_update`.

    Parameters
    ----------
    params, lr
        As in `SGD`.
    lr_decay, weight_decay, initial_accumulator_value, eps, maximize
        As in `torch.optim.Adagrad`.

    Raises
    ------
    ValueError
        As in `SGD`.

    Curriculum: O5.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ):
        start = {"initial_accumulator_value": initial_accumulator_value}
        options = {"lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps, **start}
        _not_negative("Adagrad", lr=lr, **options)
        super().__init__(params, {"lr": lr, "maximize": maximize, **options})

    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        names = ("lr_decay", "weight_decay", "initial_accumulator_value", "eps")
        return _step(self, closure, updates.adagrad_update, names)


class RMSprop(torch.optim.Optimizer):
    """Step along `rmsprop_update`.

    Parameters
    ----------
    params, lr
        As in `SGD`.
    alpha, eps, weight_decay, momentum, centered, maximize
        As in `torch.optim.RMSprop`.

    Raises
    ------
    ValueError
        As in `SGD`.

    Curriculum: O5.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ):
        options = {"alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        _not_negative("RMSprop", lr=lr, **options)
        options |= {"centered": centered, "maximize": maximize}
        super().__init__(params, {"lr": lr, **options})

    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        names = ("alpha", "eps", "weight_decay", "momentum", "centered")
        return _step(self, closure, updates.rmsprop_update, names)


class Adam(torch.optim.Optimizer):
    """Step along `adam_update`; with ``amsgrad`` it is AMSGrad.

    Parameters
    ----------
    params, lr
        As in `SGD`.
    betas, eps, weight_decay, amsgrad, maximize
        As in `torch.optim.Adam`.

    Raises
    ------
    ValueError
        As in `SGD`.

    Curriculum: O5, O6.
    """

    _update = staticmethod(updates.adam_update)

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ):
        _not_negative(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        _betas(type(self).__name__, betas)
        options = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {"lr": lr, "maximize": maximize, **options})

    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        names = ("betas", "eps", "weight_decay", "amsgrad")
        return _step(self, closure, self._update, names)


class AdamW(Adam):
    """Step along `adamw_update`: Adam with the decay beside the gradient, not in it.

    Parameters
    ----------
    params, lr
        As in `SGD`.
    betas, eps, weight_decay, amsgrad, maximize
        As in `torch.optim.AdamW`.

    Raises
    ------
    ValueError
        As in `SGD`.

    Curriculum: O5.
    """

    _update = staticmethod(updates.adamw_update)

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)


class AdaHessian(torch.optim.Optimizer):
    """Step along `adahessian_update`, with one random probe of the Hessian's diagonal a step.

    D = z ⊙ (H z) with z of independent ±1, whose mean is the diagonal of H.

    Parameters
    ----------
    params
        As in `SGD`.
    lr, betas, eps, weight_decay, hessian_power
        As in `adahessian_update`; the defaults are the authors'.
    spatial_average
        Average abs(D) over the positions of a convolution's filter, as the authors do.
    generator
        Draws the probes, on its own device.

    Raises
    ------
    ValueError
        As in `SGD`.
    TypeError
        In ``step``, without a closure.

    Convention: the gradient's graph is needed, so ``step`` takes the loss itself, as a closure
    that must *not* call ``backward``; a step costs about two more gradients than SGD's.

    Source: Z. Yao et al., ADAHESSIAN, arXiv:2006.00719, algorithm 1. Curriculum: O9.

    Examples
    --------
    >>> w = torch.tensor([3.0, 3.0], requires_grad=True)
    >>> optimizer = AdaHessian([w], lr=1.0, eps=0.0, generator=torch.Generator())
    >>> loss = optimizer.step(lambda: w[0] ** 2 + 50 * w[1] ** 2)  # both curvatures divided out
    >>> w.abs().max() < 1e-5
    tensor(True)
    """

    needs_the_loss = True  # `train.fit` hands the loss to step and leaves backward to it

    def __init__(
        self,
        params,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        *,
        spatial_average: bool = True,
        generator: torch.Generator,
    ):
        _not_negative("AdaHessian", lr=lr, eps=eps, weight_decay=weight_decay)
        _betas("AdaHessian", betas)
        if not 0 < hessian_power <= 1:
            raise ValueError(f"AdaHessian: expected hessian_power in (0, 1], got {hessian_power}")
        options = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"hessian_power": hessian_power, "spatial_average": spatial_average}
        super().__init__(params, {"lr": lr, "maximize": False, **options})
        self.generator = generator

    def step(self, closure=None):
        """Differentiate the loss that ``closure`` returns, twice, and take one step."""
        if closure is None:
            raise TypeError("AdaHessian: expected step(closure) where closure returns the loss")
        with torch.enable_grad():
            loss = closure()
        everything = [(group, p) for group in self.param_groups for p in group["params"]]
        groups = [(group, p) for group, p in everything if p.requires_grad]
        params = [p for _, p in groups]
        grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        for _, p in everything:
            p.grad = None  # of a weight that was frozen since the last step, too
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.detach()
        _require_finite(self, "gradients", [p.grad for p in params])
        diagonals = list(self._diagonals(groups, grads))
        _require_finite(self, "curvatures", diagonals)
        of = dict(zip(params, diagonals, strict=True))

        def update(p, grad, state, **options):
            return updates.adahessian_update(p, grad, state, of[p], **options)

        _step(self, None, update, ("betas", "eps", "weight_decay", "hessian_power"))
        return loss.detach()

    def _diagonals(self, groups, grads):
        """Probe once: z ⊙ (H z) for each parameter."""
        device = self.generator.device
        probes = [
            torch.randint(0, 2, p.shape, generator=self.generator, device=device).to(p) * 2 - 1
            for _, p in groups
        ]
        params = [p for _, p in groups]
        bent = [i for i, g in enumerate(grads) if g.requires_grad]  # others have no curvature
        products = [torch.zeros_like(p) for p in params]
        if bent:
            slopes, signs = [grads[i] for i in bent], [probes[i] for i in bent]
            products = list(torch.autograd.grad(slopes, params, signs, materialize_grads=True))
        for (group, p), z, hz in zip(groups, probes, products, strict=True):
            diagonal = z * hz
            if group["spatial_average"] and p.ndim == 4:
                diagonal = diagonal.abs().mean(dim=(2, 3), keepdim=True).expand_as(p)
            yield diagonal


@torch.no_grad()
def _step(optimizer, closure, update, names):
    """Check all gradients, then move every parameter by −lr · direction."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    groups = []
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        groups.append((group, params, [p.grad for p in params]))
    _require_finite(optimizer, "gradients", [grad for *_, grads in groups for grad in grads])
    for group, params, grads in groups:
        if not params:
            continue
        directions: Any = [-grad for grad in grads] if group["maximize"] else grads
        if update is updates.sgd_update and not group["momentum"]:
            # nothing is kept, so the rule is one call for all tensors, or none
            if group["weight_decay"]:
                directions = torch._foreach_add(directions, params, alpha=group["weight_decay"])
        else:
            rule = partial(update, **{name: group[name] for name in names}, inplace=True)
            directions = [
                rule(p, grad, optimizer.state[p])[0]
                for p, grad in zip(params, directions, strict=True)
            ]
        torch._foreach_add_(params, directions, alpha=-group["lr"])
    return loss


def _require_finite(optimizer, what, tensors):
    """Refuse infinity and NaN, before anything has changed."""
    if not tensors or math.isfinite(_total(tensors)):
        return
    for i, values in enumerate(tensors):  # or the sum itself has overflowed
        bad = int((~values.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{type(optimizer).__name__}: expected finite {what}, got {bad} values that are "
                f"not in parameter {i} of shape {tuple(values.shape)}; nothing was changed"
            )


def _total(tensors):
    """Return the sum of all entries.

    Large tensors are summed where they lie; for small ones a call each would cost more than a copy.
    """
    sums, small = [], []
    for values in tensors:
        if values.numel() > 8192:
            sums.append(values.sum())
        else:
            small.append(values)
    try:
        sums += [_flatten_dense_tensors(small).sum()] if small else []
    except RuntimeError:  # on several devices
        sums += [values.sum() for values in small]
    return sum(one.item() for one in sums)


def _not_negative(name, **options):
    for option, value in options.items():
        _check.in_range(name, option, value, 0, math.inf)


def _betas(name, betas):
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: expected betas[{i}] in [0, 1), got {beta}")
