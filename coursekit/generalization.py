"""Which of many minima training finds, how wide it is, and how far a step can be before it leaves.

``min_norm_solution``     the interpolator that gradient descent from zero finds, and ridge
``max_margin_direction``  the direction that gradient descent on separable classes turns to
``random_features``       a hidden layer that is never trained: models of any width
``epsilon_sharpness``     how much the loss can rise in a small box around a minimum
``stability_limit``       the largest learning rate at which a minimum holds (S)GD
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import Bounds, minimize, nnls
from torch import Tensor

from coursekit import _check
from coursekit.curvature import top_eigenvalue


def min_norm_solution(
    x: Float[Tensor, "n features"],
    y: Float[Tensor, " n *outputs"],
    *,
    ridge: float = 0.0,
    rtol: float | None = None,
) -> Float[Tensor, " features *outputs"]:
    """Solve least squares by the smallest weights of all that are best.

    w = X⁺ y = Σ_i v_i (u_iᵀ y) / σ_i  over the singular values σ_i > 0 of X = Σ_i σ_i u_i v_iᵀ

    With a ridge α > 0 it is the minimizer of ‖X w - y‖² + α ‖w‖², in which σ_i / (σ_i² + α) stands
    for 1 / σ_i. Where X has more columns than rows, and full rank, X w = y.

    Parameters
    ----------
    x, y
        Inputs, one row an example, and one or several targets an example. There is no intercept.
    ridge
        Strength α, not negative: a penalty on the *sum* of squared errors.
    rtol
        Singular values up to ``rtol`` times the largest count as zero; unless given, max(n,
        features) times the rounding of the precision, as in `torch.linalg.pinv`.

    Returns
    -------
    Tensor of shape (features,) or (features, outputs)

    Raises
    ------
    ValueError
        For shapes that do not fit, no example, entries that are not finite, a negative ridge.

    Convention: not `torch.linalg.solve` of XᵀX w = Xᵀy, whose matrix is singular as soon as there
    are more features than examples.

    Source: R. Penrose, Proc. Cambridge Philos. Soc. 52 (1956), 17-19. Curriculum: R10, R12.

    Examples
    --------
    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])  # one equation, two unknowns
    >>> [round(v, 4) for v in min_norm_solution(x, y).tolist()]
    [0.6, 0.8]
    """
    name = "min_norm_solution"
    _check.shape(name, "x", x, ("n", "features"))
    _check.shape(name, "y", y, (len(x), ...))
    if 0 in x.shape:
        raise ValueError(f"{name}: expected at least one example and feature, got {tuple(x.shape)}")
    _check.finite(name, "x", x)
    _check.finite(name, "y", y)
    if not 0 <= ridge < math.inf:
        raise ValueError(f"{name}: expected ridge not negative and finite, got {ridge}")
    u, sigma, vt = torch.linalg.svd(x, full_matrices=False)
    cut = max(x.shape) * torch.finfo(x.dtype).eps if rtol is None else rtol
    kept = sigma > cut * sigma[0]
    inverse = torch.where(kept, sigma / torch.where(kept, sigma**2 + ridge, 1), 0)
    targets = y.reshape(len(y), -1)
    return (vt.T @ (inverse[:, None] * (u.T @ targets))).reshape(-1, *y.shape[1:])


def max_margin_direction(
    x: Float[Tensor, "n features"], y: Float[Tensor, " n"]
) -> Float[Tensor, " features"]:
    """Return the unit vector that keeps two classes farthest from the plane through the origin.

    maximize over ‖w‖ = 1:  min_i y_i x_iᵀ w

    It is the direction of the hard-margin support vector machine without an intercept, and that of
    the shortest vector in the convex hull of the points y_i x_i. The program is solved exactly, by
    a finite method, as nonnegative least squares.

    Parameters
    ----------
    x
        Inputs, one row an example. A column of ones gives the plane an offset, which then counts as
        a part of w.
    y
        Labels -1 and 1.

    Returns
    -------
    Tensor of shape (features,)
        Of length 1; the margin is ``(y * (x @ w)).min()``.

    Raises
    ------
    ValueError
        For shapes that do not fit, other labels, entries that are not finite, and classes that no
        plane through the origin separates.

    Convention: `sklearn.svm.SVC` has an intercept that is not a part of w. Given each example and
    its reflection, x and -x with y and -y, it makes that intercept zero.

    Source: D. Soudry et al., arXiv:1710.10345, theorem 3; C. Lawson and R. Hanson, Solving Least
    Squares Problems (1974), chapter 23, problem LDP. Curriculum: R11.

    Examples
    --------
    >>> x = torch.tensor([[3.0, 1.0], [1.0, 3.0], [-2.0, -2.0]])
    >>> max_margin_direction(x, torch.tensor([1.0, 1.0, -1.0]))
    tensor([0.7071, 0.7071])
    """
    name = "max_margin_direction"
    _check.shape(name, "x", x, ("n", "features"))
    _check.shape(name, "y", y, (len(x),))
    _check.finite(name, "x", x)
    if len(x) == 0 or not bool((abs(y) == 1).all()):
        got = sorted(set(y.tolist()))[:5]
        raise ValueError(f"{name}: expected labels -1 and 1, got {got}")
    points = (y[:, None] * x).double().cpu().numpy()
    scale = np.linalg.norm(points, axis=1).max() or 1.0
    # least distance programming: min ‖w‖ with points w >= 1 has the dual min ‖Eᵀu - e‖, u >= 0
    system = np.vstack([points.T / scale, np.ones(len(points))])
    goal = np.append(np.zeros(points.shape[1]), 1.0)
    dual, distance = nnls(system, goal, maxiter=30 * len(points))
    w = system[:-1] @ dual
    if distance < 1e-7 or (points @ w).min() <= 0:
        raise ValueError(
            f"{name}: expected classes that a plane through the origin separates, got "
            f"{len(points)} examples that none does; a column of ones gives the plane an offset"
        )
    return torch.as_tensor(w / np.linalg.norm(w)).to(x)


def random_features(
    inputs: int,
    width: int,
    *,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    generator: torch.Generator,
) -> Callable[[Tensor], Tensor]:
    """Draw a hidden layer once and for all, and return the map from inputs to its outputs.

    φ(x) = activation(W x) / √width,  W_ij ~ N(0, 1)

    Only what stands behind φ is learned, by a linear solve. As the width grows, φ(x)ᵀφ(x') tends to
    a kernel; for ReLU it is half the arc-cosine kernel of order 1.

    Parameters
    ----------
    inputs, width
        Number of inputs and of features, at least 1.
    activation
        Applied to each entry.
    generator
        A CPU generator, which draws W.

    Returns
    -------
    callable
        Maps ``(n, inputs)`` to ``(n, width)``, in the precision and on the device of what it gets;
        `ValueError` for another number of inputs.

    Source: A. Rahimi and B. Recht, Random features for large-scale kernel machines, NeurIPS 2007;
    the kernel: Y. Cho and L. Saul, NeurIPS 2009, eq. 1 and 6. Curriculum: R12.

    Examples
    --------
    >>> features = random_features(3, 5, generator=torch.Generator().manual_seed(0))
    >>> features(torch.ones(2, 3)).shape
    torch.Size([2, 5])
    """
    _check.integer("random_features", "inputs", inputs, at_least=1)
    _check.integer("random_features", "width", width, at_least=1)
    weight = torch.randn(width, inputs, generator=generator, dtype=torch.float64)

    def features(x: Tensor) -> Tensor:
        _check.shape("random_features", "x", x, ("n", inputs))
        return activation(x @ weight.to(x).T) / math.sqrt(width)

    return features


def epsilon_sharpness(
    loss: Callable[[], Tensor],
    params: Sequence[Float[Tensor, "..."]],
    epsilon: float = 1e-3,
    *,
    iterations: int = 10,
    generator: torch.Generator,
) -> float:
    """Return by how many per cent the loss can rise in a small box around the parameters.

    100 · (max_{z ∈ C} L(w + z) - L(w)) / (1 + L(w)),  C = {z : abs(z_i) ≤ ε (abs(w_i) + 1)}

    The maximum is searched by a few steps of L-BFGS-B, so the result is a lower bound. The search
    starts at a random point of the box: at a minimum the gradient is zero and leads nowhere.

    Parameters
    ----------
    loss
        Takes nothing and returns the scalar loss, computed from ``params``.
    params
        Tensors that require a gradient; they have their values back afterwards, also after an
        error.
    epsilon
        Half the side of the box, relative to abs(w_i) + 1; positive.
    iterations
        Steps of the search, at least 1; the paper makes ten.
    generator
        Draws the start.

    Returns
    -------
    float
        At least 0.

    Raises
    ------
    ValueError
        For an ε that is not positive, no parameters, and a loss that is not finite or no scalar.

    Convention: the box of the paper's matrix A = I, all parameters; the paper also searches random
    subspaces.

    Source: N. Keskar et al., arXiv:1609.04836, metric 2.1. Curriculum: R9.

    Examples
    --------
    >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> valley = lambda: 3 * w[0] ** 2 + w[1] ** 2  # highest at a corner: 4 ε²
    >>> round(epsilon_sharpness(valley, [w], 0.1, generator=torch.Generator()), 6)
    4.0
    """
    name = "epsilon_sharpness"
    _check.positive(name, "epsilon", epsilon)
    _check.integer(name, "iterations", iterations, at_least=1)
    if not params or not all(p.requires_grad for p in params):
        raise ValueError(f"{name}: expected params that all require a gradient")
    before = [p.detach().clone() for p in params]
    center = np.concatenate([p.double().cpu().numpy().ravel() for p in before])

    def height(shift: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the loss at a point of the box, and its gradient."""
        parts = np.split(center + shift, np.cumsum([p.numel() for p in params])[:-1])
        with torch.no_grad():
            for p, part in zip(params, parts, strict=True):
                p.copy_(torch.as_tensor(part).view(p.shape))
        value = loss()
        _check.shape(name, "the loss", value, ())
        _check.finite(name, "the loss", value.detach())
        slope = torch.autograd.grad(value, list(params), materialize_grads=True)
        flat = np.concatenate([g.double().cpu().numpy().ravel() for g in slope])
        return -value.item(), -flat

    half = epsilon * (np.abs(center) + 1)
    start = torch.rand(len(center), generator=generator, device=generator.device).cpu().numpy()
    try:
        bottom = -height(np.zeros_like(center))[0]
        found = minimize(
            *(height, half * (2 * start - 1)),
            jac=True,
            method="L-BFGS-B",
            bounds=Bounds(-half, half),
            options={"maxiter": iterations},
        )
    finally:
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
    return 100 * max(0.0, -float(found.fun) - bottom) / (1 + bottom)


def stability_limit(
    gradients: Float[Tensor, "n parameters"], batch_size: int | None = None
) -> float:
    """Return the largest learning rate at which a minimum does not throw SGD out.

    Around a minimum with zero loss ½ (f_i - y_i)² for every example, the Hessian of example i is
    H_i = g_i g_iᵀ with g_i = ∇f_i, and SGD is e ← (I - η H_batch) e. Its second moments do not grow
    as long as η is at most

    2 / max over symmetric Z of [(1 - p) tr(H Z H Z) + p mean_i (g_iᵀ Z g_i)²] / tr(H Z²)

    with H = mean_i H_i and p = (n - B) / (B (n - 1)). Whole batches, p = 0, give 2 / λ_max(H). One
    example a step, p = 1, gives at most 2 / tr(H), which is what Z = I shows.

    Parameters
    ----------
    gradients
        The gradient of the model's one output for each of ``n`` examples, at the minimum.
    batch_size
        Examples a step, drawn anew and without replacement at each step; all ``n`` unless given.

    Returns
    -------
    float
        Infinite where all gradients are zero.

    Raises
    ------
    ValueError
        For another shape, entries that are not finite, and a batch size outside 1 to ``n``.

    Convention: the loss has the factor ½. For (f_i - y_i)² without it, as in
    `torch.nn.functional.mse_loss`, the learning rate is half as large.

    Source: R. Mulayoff and T. Michaeli, arXiv:2306.07850, section 3; the bound by the trace: L.
    Wu and W. Su, arXiv:2305.17490. Curriculum: R13.

    Examples
    --------
    >>> gradients = 2 * torch.eye(4)  # H = I, tr(H) = 4
    >>> round(stability_limit(gradients), 4), round(stability_limit(gradients, 1), 4)
    (2.0, 0.5)
    """
    name = "stability_limit"
    _check.shape(name, "gradients", gradients, ("n", "parameters"))
    _check.finite(name, "gradients", gradients)
    n = len(gradients)
    batch_size = n if batch_size is None else batch_size
    _check.integer(name, "batch_size", batch_size, at_least=1)
    if batch_size > n:
        raise ValueError(f"{name}: expected batch_size of at most n = {n}, got {batch_size}")
    g = gradients.detach().double()
    eigenvalues, vectors = torch.linalg.eigh(g @ g.T / n)  # those of H that are not zero
    kept = eigenvalues > n * torch.finfo(torch.float64).eps * eigenvalues[-1]
    h = eigenvalues[kept]
    if len(h) == 0:
        return math.inf
    if batch_size == n:
        return 2 / h[-1].item()
    q = vectors[:, kept] * (n * h).sqrt()  # q[i, a] is the part of g_i along eigenvector a
    p = (n - batch_size) / (batch_size * (n - 1))
    root = ((h[:, None] + h) / 2).sqrt()
    z = torch.zeros_like(root, requires_grad=True)

    def quotient() -> Tensor:
        """Return half the bracket, in coordinates in which tr(H Z²) is ‖z‖²."""
        whole = (h[:, None] * h * (z / root).square()).sum()
        single = ((q @ (z / root)) * q).sum(dim=1).square().mean()
        return ((1 - p) * whole + p * single) / 2

    return 2 / top_eigenvalue(quotient, [z], tol=1e-6, max_iter=500, generator=torch.Generator())
