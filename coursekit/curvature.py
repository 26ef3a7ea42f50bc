"""Curvature of a loss without its Hessian: products, top eigenvalue, trace, diagonal.

The functions take ``loss``, a callable without arguments that computes the scalar loss from
``params``. It is called once; all products reuse the graph of its gradient.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from coursekit import _check

Loss = Callable[[], Tensor]
Tensors = Sequence[Float[Tensor, "..."]]


def hvp(loss: Loss, params: Tensors, vectors: Tensors) -> list[Tensor]:
    """Multiply the Hessian of a loss by a vector, at the price of about two gradients.

    H v = ∇(∇L(w)ᵀ v)

    Parameters
    ----------
    loss
        Takes nothing and returns the scalar loss, computed from ``params``.
    params
        Tensors that require a gradient; those the loss does not use have zeros in H.
    vectors
        One tensor a parameter, of its shape.

    Returns
    -------
    list of Tensor
        One a parameter, of its shape, without a graph.

    Raises
    ------
    ValueError
        For a loss that is no scalar, is not finite or has no graph, and for wrong shapes.

    Source: B. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994),
    section 2. Curriculum: N1.

    Examples
    --------
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp(lambda: w[0] ** 2 * w[1], [w], [torch.tensor([1.0, 0.0])])
    [tensor([4., 2.])]
    """
    _same_shapes("hvp", params, vectors)
    return _products("hvp", loss, params)(vectors)


def _products(function: str, loss: Loss, params: Tensors) -> Callable[[Tensors], list[Tensor]]:
    """Build the graph of the gradient once, and return what multiplies its Jacobian by vectors."""
    if not params or not all(p.requires_grad for p in params):
        raise ValueError(f"{function}: expected params that all require a gradient")
    with torch.enable_grad():
        value = loss()
        _check.shape(function, "the loss", value, ())
        if not value.requires_grad:
            raise ValueError(f"{function}: expected a loss with a graph that leads to params")
        _check.finite(function, "the loss", value.detach())
        gradient = torch.autograd.grad(value, params, create_graph=True, materialize_grads=True)
    rows = [i for i, g in enumerate(gradient) if g.requires_grad]  # the others are constant

    def multiply(vectors: Tensors) -> list[Tensor]:
        if not rows:
            return [torch.zeros_like(p) for p in params]
        products = torch.autograd.grad(
            [gradient[i] for i in rows],
            params,
            [vectors[i] for i in rows],
            retain_graph=True,
            materialize_grads=True,
        )
        for product in products:
            _check.finite(function, "the Hessian-vector product", product)
        return list(products)

    return multiply


def _same_shapes(function: str, params: Tensors, vectors: Tensors) -> None:
    if len(vectors) != len(params):
        raise ValueError(f"{function}: expected {len(params)} vectors, got {len(vectors)}")
    for i, (p, v) in enumerate(zip(params, vectors, strict=True)):
        _check.shape(function, f"vectors[{i}]", v, tuple(p.shape))


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _like(flat: Tensor, params: Tensors) -> list[Tensor]:
    parts = flat.split([p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]


def full_hessian(loss: Loss, params: Tensors) -> Float[Tensor, "M M"]:
    """Form the Hessian, all M x M entries: for small models, and to check the other functions.

    Parameters and errors are those of `hvp`; rows and columns follow ``params`` in order, each
    parameter flattened. It costs M Hessian-vector products.
    """
    multiply = _products("full_hessian", loss, params)
    flat = _flat(params).detach()
    eye = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    return torch.stack([_flat(multiply(_like(row, params))) for row in eye])


def top_eigenvalue(
    loss: Loss,
    params: Tensors,
    *,
    tol: float = 1e-3,
    max_iter: int = 200,
    generator: torch.Generator,
) -> float:
    """Return the largest eigenvalue of the Hessian, which bounds the step of gradient descent.

    "Largest" is algebraic: of -5 and 2 it is 2, since 2/λ_max knows no negative curvature. The
    smallest eigenvalue is minus the largest of ``lambda: -loss()``.

    Parameters
    ----------
    loss, params
        As in `hvp`.
    tol
        The result differs from an eigenvalue by at most ``tol`` times its size.
    max_iter
        Largest number of Hessian-vector products; each also stores one vector.
    generator
        Draws the start, so that it is unlikely to have no part along the top eigenvector.

    Raises
    ------
    RuntimeError
        When ``max_iter`` products do not reach ``tol``; in float32 it cannot be below about 1e-6.

    Source: C. Lanczos, J. Res. Nat. Bur. Standards 45 (1950); the bound: B. Parlett, The Symmetric
    Eigenvalue Problem (1998), section 13.2. Curriculum: N1.

    Examples
    --------
    >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> valley = lambda: w[0] ** 2 - 3 * w[1] ** 2
    >>> round(top_eigenvalue(valley, [w], generator=torch.Generator()), 4)
    2.0
    """
    _check.positive("top_eigenvalue", "tol", tol)
    _check.integer("top_eigenvalue", "max_iter", max_iter, at_least=1)
    multiply = _products("top_eigenvalue", loss, params)
    like = _flat(params).detach()
    start = torch.randn(like.shape, generator=generator, device=generator.device).to(like)
    basis = (start / start.norm())[None]  # (steps, M), orthonormal rows
    alpha: list[float] = []
    beta: list[float] = []
    for _ in range(max_iter):
        w = _flat(multiply(_like(basis[-1], params)))
        alpha.append((w @ basis[-1]).item())
        for _ in range(2):  # against all rows, twice: rounding would bring found vectors back
            w = w - basis.T @ (basis @ w)
        beta.append(w.norm().item())
        values, vectors = eigh_tridiagonal(alpha, beta[:-1])
        residual = beta[-1] * abs(vectors[-1, -1])  # |H v - λ v|, Parlett's β_ji
        rounding = 10 * torch.finfo(like.dtype).eps * abs(values).max()
        if residual <= max(tol * abs(values[-1]), rounding) or len(alpha) == len(like):
            return float(values[-1])
        basis = torch.cat([basis, (w / beta[-1])[None]])
    raise RuntimeError(
        f"top_eigenvalue: expected a relative residual of {tol:g} within {max_iter} products, "
        f"got {residual / abs(values[-1]):.1g} at {values[-1]:.6g}; raise max_iter or tol"
    )


class Estimate(NamedTuple):
    """A mean over random draws and its standard error, NaN for a single draw."""

    mean: float
    standard_error: float


def hutchinson_trace(
    loss: Loss, params: Tensors, *, samples: int, generator: torch.Generator
) -> Estimate:
    """Estimate the trace of the Hessian from products with random signs.

    tr H = E[vᵀ H v] for v with E[v vᵀ] = I; for signs the variance is 2 Σ_{i≠j} H_ij²

    Parameters
    ----------
    loss, params
        As in `hvp`.
    samples, generator
        Number of products, at least 1, and what draws the signs.

    Returns
    -------
    Estimate

    Source: M. Hutchinson, Comm. Statist. Simulation Comput. 19 (1990), proposition 1.
    """
    draws = _signed_products("hutchinson_trace", loss, params, samples, generator)
    values = [sum(d.double().sum().item() for d in draw) for draw in draws]
    error = np.std(values, ddof=1) / math.sqrt(samples) if samples > 1 else math.nan
    return Estimate(float(np.mean(values)), float(error))


def hutchinson_diagonal(
    loss: Loss, params: Tensors, *, samples: int, generator: torch.Generator
) -> list[Tensor]:
    """Estimate the diagonal of the Hessian from products with random signs.

    diag H = E[v ⊙ H v]; with signs the entry i has variance Σ_{j≠i} H_ij²

    Parameters
    ----------
    loss, params, samples, generator
        As in `hutchinson_trace`.

    Returns
    -------
    list of Tensor
        One a parameter, of its shape.

    Source: C. Bekas, E. Kokiopoulou and Y. Saad, An estimator for the diagonal of a matrix, Applied
    Numerical Mathematics 57 (2007), section 2. Curriculum: O9.
    """
    draws = _signed_products("hutchinson_diagonal", loss, params, samples, generator)
    return [sum(parts) / samples for parts in zip(*draws, strict=True)]


def _signed_products(function, loss, params, samples, generator) -> Iterator[list[Tensor]]:
    """Yield v ⊙ H v for random signs v, ``samples`` times."""
    _check.integer(function, "samples", samples, at_least=1)
    multiply = _products(function, loss, params)
    size = sum(p.numel() for p in params)
    for _ in range(samples):
        bits = torch.randint(0, 2, (size,), generator=generator, device=generator.device)
        signs = _like((2 * bits - 1).to(params[0]), params)
        yield [v * hv for v, hv in zip(signs, multiply(signs), strict=True)]


def per_sample_grads(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n ..."],
    y: Tensor,
) -> dict[str, Tensor]:
    """Return the gradient of every single example; their mean is the gradient of the mean loss.

    Parameters
    ----------
    model
        One in which the examples of a batch do not meet.
    loss
        Takes output and target of a batch, here of one example, and returns the mean.
    x, y
        ``n`` examples and targets.

    Returns
    -------
    dict of str to Tensor
        For each parameter's name a tensor of shape ``(n, *parameter.shape)``.

    Raises
    ------
    ValueError
        When there is not a target for each example, or the model has batch norm that uses the
        statistics of the batch: an example alone has no gradient then.

    Examples
    --------
    >>> line, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [3.0]])
    >>> per_sample_grads(line, lambda out, y: (out * y).mean(), x, torch.ones(2, 1))["weight"]
    tensor([[[1.]],
    <BLANKLINE>
            [[3.]]])
    """
    _check.shape("per_sample_grads", "y", y, (len(x), ...))
    for module in model.modules():
        name = type(module).__name__
        if "BatchNorm" in name and (module.training or module.running_mean is None):
            raise ValueError(
                f"per_sample_grads: expected examples that do not meet, got {name} in training "
                "mode or without running statistics"
            )
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def one(params, x, y):
        return loss(functional_call(model, (params, buffers), (x[None],)), y[None])

    return vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)
