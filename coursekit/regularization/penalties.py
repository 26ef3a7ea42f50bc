"""Small weights: penalties, the steps and projections that go with them, and their filters."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from coursekit import _check

Parameters = Tensor | Iterable[Tensor]
Spectrum = Float[Tensor, "..."]


def l1_penalty(params: Parameters, strength: float) -> Float[Tensor, ""]:
    """Return λ ‖w‖₁, λ times the sum of absolute values; its gradient is λ sign(w), and 0 at 0.

    Parameters
    ----------
    params
        One tensor or several, such as ``model.parameters()``.
    strength
        λ, not negative (`ValueError`).

    Returns
    -------
    Tensor
        Add it to the loss.

    Convention: at a kink torch's gradient is one subgradient, 0. A step along it is why plain
    gradient descent does not keep weights at zero; see `soft_threshold`.

    Source: R. Tibshirani, J. R. Stat. Soc. B 58 (1996), section 2, as a penalty. Curriculum: R3.

    Examples
    --------
    >>> w = torch.tensor([3.0, -4.0, 0.0], requires_grad=True)
    >>> torch.autograd.grad(l1_penalty(w, 0.5), w)
    (tensor([ 0.5000, -0.5000,  0.0000]),)
    """
    return _penalty("l1_penalty", params, strength, torch.abs)


def l2_penalty(params: Parameters, strength: float) -> Float[Tensor, ""]:
    """Return λ Σ w² over all entries; its gradient is 2λ w.

    Parameters
    ----------
    params, strength
        As in `l1_penalty`.

    Returns
    -------
    Tensor
        Add it to the loss. A step δ of gradient descent then multiplies w by 1 - 2δλ.

    Convention: there is no factor ½. ``weight_decay=a`` of `torch.optim.SGD` adds a·w to the
    gradient, hence is ½a Σ w², and equals this penalty at a = 2λ.

    Source: A. Hoerl and R. Kennard, Technometrics 12 (1970), section 2. Curriculum: R2.

    Examples
    --------
    >>> w = torch.tensor([3.0, -4.0], requires_grad=True)
    >>> torch.autograd.grad(l2_penalty(w, 0.5), w)
    (tensor([ 3., -4.]),)
    """
    return _penalty("l2_penalty", params, strength, torch.square)


def _penalty(function, params, strength, of) -> Tensor:
    _check.in_range(function, "strength", strength, 0, math.inf)
    terms = [of(p).sum() for p in ([params] if isinstance(params, Tensor) else params)]
    if not terms:
        raise ValueError(f"{function}: expected at least one tensor in params, got none")
    return strength * torch.stack(terms).sum()


def soft_threshold(
    w: Float[Tensor, "..."], threshold: float | Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Move every entry towards zero by ``threshold``, and stop there.

    S_τ(w) = sign(w) max(abs(w) - τ, 0) = argmin_u ½ (u - w)² + τ abs(u)

    Parameters
    ----------
    w
        Weights after the step δ on the loss alone.
    threshold
        τ, not negative (`ValueError`), one number or a tensor that broadcasts: τ = δλ for the
        penalty λ ‖w‖₁.

    Returns
    -------
    Tensor
        Exact zeros wherever abs(w) ≤ τ.

    Convention: `torch.nn.functional.softshrink` is the same function with a default of 0.5.

    Source: I. Daubechies, M. Defrise and C. De Mol, Comm. Pure Appl. Math. 57 (2004),
    section 2. Curriculum: R3.

    Examples
    --------
    >>> soft_threshold(torch.tensor([3.0, -0.25, -2.0]), 0.5)
    tensor([ 2.5000,  0.0000, -1.5000])
    """
    tau = torch.as_tensor(threshold, dtype=w.dtype, device=w.device)
    _check.in_range("soft_threshold", "threshold", tau.min().item(), 0, math.inf)
    return w - w.clamp(-tau, tau)  # what is taken away is w's projection on the box [-τ, τ]


@torch.no_grad()
def project_norm_ball_(
    w: Float[Tensor, "..."],
    radius: float,
    p: int | float = 2,
    *,
    dim: int | None = None,
) -> Float[Tensor, "..."]:
    """Replace weights by the nearest ones with ‖w‖_p ≤ radius, in place.

    ======= =========================================================
    p       nearest point
    ======= =========================================================
    1       S_θ(w), with the θ at which its norm is ``radius``
    2       w · min(1, radius / ‖w‖₂)
    inf     each entry clipped to [-radius, radius]
    ======= =========================================================

    Parameters
    ----------
    w
        Any shape; a parameter may require a gradient, no graph is kept.
    radius
        c, positive.
    p
        1, 2 or ``math.inf``.
    dim
        The whole of ``w`` is one vector unless given. With ``dim=1`` every row of a linear layer's
        weight is one, the weights into a unit: the max-norm constraint. For the filters of a
        convolution hand over ``w.flatten(1)``, a view.

    Returns
    -------
    Tensor
        ``w`` itself, so a call may be the last of `train.fit`'s ``after_step``.

    Raises
    ------
    ValueError
        For another ``p``, a radius that is not positive, or weights that are not finite; ``w`` is
        left as it was.

    Source: p = 1: J. Duchi, S. Shalev-Shwartz, Y. Singer and T. Chandra, ICML 2008, figure 1.
    Max-norm: G. Hinton et al., arXiv:1207.0580. Curriculum: R4.

    Examples
    --------
    >>> project_norm_ball_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0, dim=1)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    _check.one_of("project_norm_ball_", "p", p, (1, 2, math.inf))
    _check.positive("project_norm_ball_", "radius", radius)
    _check.finite("project_norm_ball_", "w", w)
    vectors, axis = (w.flatten(), 0) if dim is None else (w, dim)
    if p == math.inf:
        return w.clamp_(-radius, radius)
    if p == 2:
        norm = torch.linalg.vector_norm(vectors, dim=axis, keepdim=True)
        return w.mul_((radius / norm).clamp(max=1))
    u = vectors.abs().sort(axis, descending=True).values
    theta = (u.cumsum(axis) - radius) / torch.ones_like(u).cumsum(axis)  # if the first k stay
    rho = (u > theta).sum(axis, keepdim=True).clamp(min=1)  # so many do stay off zero
    return w.copy_(soft_threshold(w, theta.gather(axis, rho - 1).clamp(min=0)))


def ridge_filter(eigenvalues: Spectrum, alpha: float) -> Spectrum:
    """Return what ridge keeps of the minimum in each eigen-direction: λᵢ / (λᵢ + α).

    For L(w) = ½ (w - w*)ᵀ H (w - w*) with H = Q Λ Qᵀ, the minimum of L(w) + ½ α ‖w‖² is
    Q diag(f) Qᵀ w*.

    Parameters
    ----------
    eigenvalues
        λᵢ of H, not negative, any shape.
    alpha
        α, positive.

    Returns
    -------
    Tensor
        Of the same shape, in [0, 1).

    Raises
    ------
    ValueError
        For a negative eigenvalue or an α that is not positive.

    Convention: with the factor ½. The penalty λ ‖w‖² of `l2_penalty` has α = 2λ. For a loss that is
    the mean of (xᵀw - y)² over n rows, H = 2 XᵀX / n.

    Source: I. Goodfellow, Y. Bengio and A. Courville, Deep Learning (2016), eq. 7.13. Curriculum:
    R2, R5, R6.

    Examples
    --------
    >>> ridge_filter(torch.tensor([9.0, 1.0, 0.0]), 1.0)
    tensor([0.9000, 0.5000, 0.0000])
    """
    _check.finite("ridge_filter", "eigenvalues", eigenvalues)
    _check.in_range("ridge_filter", "eigenvalues", eigenvalues.min().item(), 0, math.inf)
    _check.positive("ridge_filter", "alpha", alpha)
    return eigenvalues / (eigenvalues + alpha)


def early_stopping_filter(eigenvalues: Spectrum, lr: float, steps: int) -> Spectrum:
    """Return what t steps of gradient descent from zero have reached: 1 - (1 - ηλᵢ)^t.

    With L as in `ridge_filter`, the iterate is w_t = Q diag(f) Qᵀ w*.

    Parameters
    ----------
    eigenvalues
        λᵢ of H, not negative, any shape.
    lr
        η, positive. Above 2 / λ_max the iterates, and the filter, grow without bound.
    steps
        t, at least 0.

    Returns
    -------
    Tensor
        Of the same shape.

    Raises
    ------
    ValueError
        For a negative eigenvalue, a rate that is not positive, or a negative t.

    Source: Goodfellow et al., 2016, eq. 7.40; where all ηλᵢ are small, it is `ridge_filter` at
    α = 1 / (ηt), eq. 7.44 and 7.45. Curriculum: R5.

    Examples
    --------
    >>> early_stopping_filter(torch.tensor([9.0, 1.0, 0.0]), 0.1, 10)
    tensor([1.0000, 0.6513, 0.0000])
    """
    _check.finite("early_stopping_filter", "eigenvalues", eigenvalues)
    _check.in_range("early_stopping_filter", "eigenvalues", eigenvalues.min().item(), 0, math.inf)
    _check.positive("early_stopping_filter", "lr", lr)
    _check.integer("early_stopping_filter", "steps", steps, at_least=0)
    x = lr * eigenvalues
    small = -torch.expm1(steps * torch.log1p(-x.clamp(max=0.5)))  # 1 - (1 - x)^t loses digits here
    return torch.where(x < 0.5, small, 1 - (1 - x) ** steps)
