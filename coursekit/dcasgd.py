"""Delay compensation: DC-ASGD's server rules, what they rest on, and an optimizer with a delay.

``diagonal_curvature``  what stands in for the Hessian: λ_t g², and its controls
``compensate``          the stale gradient, corrected by curvature times displacement
``curvature_error``     how much of the gradient's change a prediction explains
``dc_asgd_c``           the rule with constant λ
``dc_asgd_a``           the rule with λ divided by the root of a running mean of g²
``DCASGD``              both in one process, as a `torch.optim.Optimizer` with a fixed delay

Source of the method: S. Zheng et al., Asynchronous Stochastic Gradient Descent with Delay
Compensation, ICML 2017, arXiv:1609.08326.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coursekit import _check

Curvature = Float[Tensor, "*shape"] | Callable[[Tensor], Tensor]
CURVATURES = ("squared", "absolute", "none", "mean", "permuted")


def diagonal_curvature(
    gradient: Float[Tensor, "*shape"],
    strength: float,
    mean_square: Float[Tensor, "*shape"] | None = None,
    *,
    epsilon: float = 1e-7,
    curvature: str = "squared",
    sizes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the diagonal that stands in for the Hessian, one number a weight.

    λ_t ⊙ g ⊙ g with λ_t = λ_0, or λ_t = λ_0 / √(mean_square + ε)

    Parameters
    ----------
    gradient
        The stale gradient g, of a mini-batch.
    strength
        λ_0.
    mean_square
        The running mean of g² that makes λ_t adaptive; without it λ_t is constant.
    epsilon
        ε, inside the root.
    curvature
        ``"squared"`` is the paper's g². ``"absolute"`` has abs(g) in its place, as the authors'
        first public updater did. The others are controls: ``"none"`` has ones, so nothing is known
        of the loss; ``"mean"`` gives every weight of a tensor the mean over that tensor;
        ``"permuted"`` deals the values of a tensor out to other weights of it.
    sizes
        Lengths of the tensors in a flat ``gradient``; one tensor unless given.
    generator
        Draws the permutation.

    Returns
    -------
    Tensor
        Of the shape of ``gradient``.

    Raises
    ------
    ValueError
        For an unknown ``curvature``.
    TypeError
        For a permutation and nothing to draw it from.

    Convention: λ is not free of units. With g → c·g the term λ_0 g² grows by c², the adaptive one
    by c like the gradient itself.

    Source: arXiv:1609.08326, the server's algorithm. Curriculum: C2, C3.

    Examples
    --------
    >>> g = torch.tensor([3.0, -0.5])
    >>> diagonal_curvature(g, 0.1)
    tensor([0.9000, 0.0250])
    >>> diagonal_curvature(g, 2.0, g * g, epsilon=0.0)
    tensor([6., 1.])
    """
    _check.one_of("diagonal_curvature", "curvature", curvature, CURVATURES)
    if curvature == "permuted" and generator is None:
        raise TypeError("diagonal_curvature: expected a generator to permute with, got None")
    base = {"absolute": gradient.abs(), "none": torch.ones_like(gradient)}
    scale = strength if mean_square is None else strength / torch.sqrt(mean_square + epsilon)
    diagonal = scale * base.get(curvature, gradient * gradient)
    if curvature not in ("mean", "permuted"):
        return diagonal
    parts = diagonal.reshape(-1).split(list(sizes or [diagonal.numel()]))
    if curvature == "mean":
        parts = [part.mean().expand_as(part) for part in parts]
    else:
        orders = [torch.randperm(len(part), generator=generator) for part in parts]
        parts = [part[order.to(part.device)] for part, order in zip(parts, orders, strict=True)]
    return torch.cat(parts).view_as(gradient)


def compensate(
    gradient: Float[Tensor, "*shape"],
    displacement: Float[Tensor, "*shape"],
    curvature: Curvature,
    *,
    lr: float = 0.0,
    cap: float | None = 1.0,
) -> Float[Tensor, "*shape"]:
    """Return the gradient that is expected where the server's weights are now.

    g + min(c, cap / lr) ⊙ (w − w_bak)

    Parameters
    ----------
    gradient, displacement
        g, computed at w_bak, and w − w_bak.
    curvature
        The diagonal c, or a function that multiplies a displacement by the Hessian.
    lr
        Learning rate of the step to come, which together with c makes the gain lr · c: the share of
        the way back to w_bak that the correction goes. 0: no bound.
    cap
        Largest gain of a weight; ``None`` for none. Above 1 the correction overshoots w_bak, above
        2 it ends farther off than it began. A function's products are not capped.

    Returns
    -------
    Tensor
        Of the shape of ``gradient``; ``gradient`` itself, to the last bit, where the displacement
        or the curvature is 0.

    Raises
    ------
    ValueError
        For a ``cap`` that is not positive.

    Source: arXiv:1609.08326, the server's algorithm; the cap is ours. Curriculum: C1, C2.

    Examples
    --------
    >>> g, d = torch.tensor([1.0, 1.0]), torch.tensor([-0.5, 0.25])
    >>> compensate(g, d, torch.tensor([2.0, 2.0]))
    tensor([0.0000, 1.5000])
    """
    if callable(curvature):
        return gradient + curvature(displacement)
    if cap is not None:
        _check.positive("compensate", "cap", cap)
        curvature = curvature.clamp(max=cap / lr if lr else math.inf)
    return gradient + curvature * displacement


class CurvatureError(NamedTuple):
    """How well a prediction explains the change of the gradient.

    ``left`` is the share of the error that it leaves, ``cosine`` its angle to the true change,
    ``strength`` the factor on it that would leave least, and ``best`` the share left then.
    """

    left: float
    cosine: float
    strength: float
    best: float


def curvature_error(
    stale: Float[Tensor, "*shape"],
    fresh: Float[Tensor, "*shape"],
    prediction: Float[Tensor, "*shape"],
) -> CurvatureError:
    """Compare a predicted change of the gradient with the true one, of the same mini-batch.

    left = ‖stale + p − fresh‖ / ‖stale − fresh‖, strength = ⟨p, fresh − stale⟩ / ‖p‖²

    Parameters
    ----------
    stale, fresh
        Gradients at w_bak and at w, of one shape.
    prediction
        What the correction adds to ``stale``, for instance c ⊙ (w − w_bak).

    Returns
    -------
    CurvatureError
        A prediction of 0 leaves 1, and has cosine and strength 0.

    Raises
    ------
    ValueError
        When the gradient has not changed: there is nothing to predict.

    Curriculum: C2.

    Examples
    --------
    >>> stale, fresh = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])
    >>> curvature_error(stale, fresh, torch.tensor([0.0, 1.0]))
    CurvatureError(left=0.5, cosine=1.0, strength=2.0, best=0.0)
    """
    change = (fresh - stale).double()
    predicted = prediction.double()
    scale, size = change.norm().item(), predicted.norm().item()
    if scale == 0:
        raise ValueError("curvature_error: expected a gradient that changed, got fresh = stale")
    dot = (predicted * change).sum().item()
    cosine = dot / (scale * size) if size else 0.0
    strength = dot / size**2 if size else 0.0
    left = (predicted - change).norm().item() / scale
    return CurvatureError(left, cosine, strength, math.sqrt(max(0.0, 1 - cosine**2)))


class DCASGD(torch.optim.Optimizer):
    """Step with gradients that are a fixed number of steps old, compensated for the delay.

    Every step puts (gradient, weights) into a queue and uses the pair put there ``delay`` steps
    ago; the first ``delay`` steps change nothing. Update k therefore has the k-th batch and a
    gradient as stale as that of ``delay + 1`` workers that take turns.

    Parameters
    ----------
    params
        Tensors, or dictionaries that give groups of them options of their own.
    lr
        Learning rate, not negative.
    delay
        τ; 0 is SGD to the last bit.
    strength, epsilon, curvature, cap
        As in `dc_asgd_a`, without ``"permuted"``; strength 0 is SGD with delayed gradients.
    decay
        m of the running mean of g² (DC-ASGD-a); ``None`` for constant λ (DC-ASGD-c).
    weight_decay
        Added as weight_decay · w with the present w, outside the correction.

    Raises
    ------
    ValueError
        For an option outside its range; in ``step`` for a gradient that is not finite, before
        anything has changed.

    Curriculum: C3.

    Examples
    --------
    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = DCASGD([w], lr=0.1, delay=1, strength=1.0, decay=None)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     (w**2).sum().backward()
    ...     optimizer.step()
    ...     print(f"{w.item():.3f}")
    1.000
    0.800
    0.680
    """

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        delay: int = 1,
        strength: float = 2.0,
        decay: float | None = 0.95,
        epsilon: float = 1e-7,
        *,
        curvature: str = "squared",
        cap: float | None = 1.0,
        weight_decay: float = 0.0,
    ):
        options: dict = {"strength": strength, "decay": decay, "epsilon": epsilon, "cap": cap}
        _check_options("DCASGD", **options)
        _check.one_of("DCASGD", "curvature", curvature, CURVATURES[:-1])
        _check.integer("DCASGD", "delay", delay, at_least=0)
        _check.in_range("DCASGD", "lr", lr, 0, math.inf)
        _check.in_range("DCASGD", "weight_decay", weight_decay, 0, math.inf)
        options |= {"lr": lr, "delay": delay, "curvature": curvature, "weight_decay": weight_decay}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        pairs = [(p, group) for p, group in pairs if p.grad is not None]
        for p, _ in pairs:
            _check.finite("DCASGD", "gradients", p.grad)
        for p, group in pairs:
            state, lr = self.state[p], group["lr"]
            state.setdefault("queue", []).append((p.grad.clone(), p.clone()))
            if len(state["queue"]) <= group["delay"]:
                continue
            gradient, backup = state["queue"].pop(0)
            mean_square = _mean_square(gradient, state.get("mean_square"), group["decay"])
            if mean_square is not None:
                state["mean_square"] = mean_square
            options = {name: group[name] for name in ("strength", "epsilon", "curvature")}
            diagonal = diagonal_curvature(gradient, mean_square=mean_square, **options)
            direction = compensate(gradient, p - backup, diagonal, lr=lr, cap=group["cap"])
            if group["weight_decay"]:
                direction = direction + group["weight_decay"] * p
            p.copy_(p - lr * direction)
        return loss


def _mean_square(gradient, before, decay):
    """m · MeanSquare + (1 − m) · g², from 0; None where λ is constant."""
    if decay is None:
        return None
    before = torch.zeros_like(gradient) if before is None else before
    return decay * before + (1 - decay) * gradient * gradient


def _check_options(function, strength, decay, epsilon, cap):
    """Refuse what no rule or optimizer here can use."""
    _check.in_range(function, "strength", strength, 0, math.inf)
    _check.in_range(function, "epsilon", epsilon, 0, math.inf)
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"{function}: expected decay in [0, 1), got {decay}")
    if cap is not None:
        _check.positive(function, "cap", cap)
