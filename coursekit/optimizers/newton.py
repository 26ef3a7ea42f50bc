"""Methods that use curvature: Newton's step, and one coordinate at a time."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from coursekit import _check


def newton_step(
    grad: Float[Tensor, " n"], hessian: Float[Tensor, "n n"], *, damping: float = 0.0
) -> Float[Tensor, " n"]:
    """Return the step to the stationary point of the quadratic model, −(H + damping · I)⁻¹ g.

    Damped Newton takes a share of it, w ← w + η · step. The step costs about n³/3 multiplications.

    Parameters
    ----------
    grad, hessian
        Gradient, shape ``(n,)``, and Hessian, shape ``(n, n)``.
    damping
        Added to the diagonal, not negative; it also turns a step that would lead to a saddle or a
        maximum downhill once it exceeds the size of the most negative eigenvalue.

    Returns
    -------
    Tensor of shape (n,)

    Raises
    ------
    ValueError
        For shapes that do not fit, values that are not finite, or a singular matrix.

    Source: J. Nocedal and S. Wright, Numerical Optimization, 2nd edition, equation 2.15.
    Curriculum: O4.

    Examples
    --------
    >>> newton_step(torch.tensor([2.0, 6.0]), torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    tensor([-1., -2.])
    """
    _check.shape("newton_step", "grad", grad, ("n",))
    _check.shape("newton_step", "hessian", hessian, (len(grad), len(grad)))
    _check.in_range("newton_step", "damping", damping, 0, float("inf"))
    _check.finite("newton_step", "grad", grad)
    _check.finite("newton_step", "hessian", hessian)
    eye = torch.eye(len(grad), dtype=grad.dtype, device=grad.device)
    step, singular = torch.linalg.solve_ex(hessian + damping * eye, -grad)
    if singular:
        raise ValueError(
            f"newton_step: expected an invertible hessian, got a singular one with damping "
            f"{damping}; a larger damping makes it invertible"
        )
    return step


@torch.no_grad()
def random_coordinate_descent(
    partial: Callable[[Float[Tensor, " n"], int], Tensor],
    w: Float[Tensor, " n"],
    lipschitz: Float[Tensor, " n"],
    *,
    steps: int,
    generator: torch.Generator,
) -> Float[Tensor, " n"]:
    """Minimise along one coordinate after another, drawn at random in proportion to Lᵢ.

    wᵢ ← wᵢ − ∂ᵢf(w) / Lᵢ

    Parameters
    ----------
    partial
        ``partial(w, i)`` returns the derivative along coordinate i, a scalar.
    w
        Start, shape ``(n,)``; it is not changed.
    lipschitz
        Largest curvature along each coordinate, shape ``(n,)``, positive.
    steps
        Number of coordinates to visit.
    generator
        A CPU generator that draws them.

    Returns
    -------
    Tensor of shape (n,)

    Raises
    ------
    ValueError
        For shapes that do not fit, a curvature that is not positive, or less than one step.

    Source: Y. Nesterov, Efficiency of coordinate descent methods on huge-scale optimization
    problems, SIAM J. Optimization 22 (2012), method 2.5 with α = 1. Curriculum: O2.

    Examples
    --------
    >>> h = torch.tensor([1.0, 4.0])
    >>> random_coordinate_descent(lambda w, i: h[i] * w[i], torch.ones(2), h, steps=20,
    ...                           generator=torch.Generator())
    tensor([0., 0.])
    """
    _check.shape("random_coordinate_descent", "lipschitz", lipschitz, tuple(w.shape))
    _check.integer("random_coordinate_descent", "steps", steps, at_least=1)
    _check.positive("random_coordinate_descent", "lipschitz", float(lipschitz.min()))
    w = w.clone()
    weights = lipschitz.to("cpu", torch.float64)
    for i in torch.multinomial(weights, steps, replacement=True, generator=generator).tolist():
        w[i] -= partial(w, i) / lipschitz[i]
    return w
