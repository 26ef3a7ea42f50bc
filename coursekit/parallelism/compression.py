"""Gradients made small for the wire: the largest entries, or a sketch; and what they give away."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coursekit import _check

Vector = Float[Tensor, " d"]


def top_k(x: Vector, k: int) -> Vector:
    """Return x with all but its k largest entries, by magnitude, set to zero.

    k values and k indices go over the wire. It is biased, and a contraction:

    ‖x − top_k(x)‖² ≤ (1 − k/d) ‖x‖²

    Parameters
    ----------
    x
        Of shape (d,).
    k
        From 1 to d; `ValueError` or `TypeError` otherwise.

    Source: S. U. Stich et al., Sparsified SGD with memory, arXiv:1809.07599v2, definition 2.1.
    Curriculum: P6.

    Examples
    --------
    >>> top_k(torch.tensor([1.0, -5.0, 3.0, 2.0]), 2)
    tensor([ 0., -5.,  3.,  0.])
    """
    _check.shape("top_k", "x", x, ("d",))
    _check.integer("top_k", "k", k, at_least=1)
    _check.in_range("top_k", "k", k, 1, len(x))
    kept = x.abs().topk(k).indices
    return torch.zeros_like(x).index_copy(0, kept, x[kept])


@dataclass(frozen=True, eq=False)
class CountSketch:
    """A random matrix S in R^{s×d} with one entry of ±1 in each column; made by `count_sketch`.

    E[SᵀS] = I, so SᵀSx is an unbiased estimate of x, with Var[(SᵀSx)ᵢ] = (‖x‖² − xᵢ²)/s.

    Attributes
    ----------
    bucket, sign
        Row and value of the entry in each column, of shape (d,).
    size
        s, the number of rows.

    Source: M. Charikar, K. Chen and M. Farach-Colton, Finding frequent items in data streams,
    Theoretical Computer Science 312 (2004), section 3.1, with one hash function.
    Curriculum: P6.
    """

    bucket: Int[Tensor, " d"]
    sign: Int[Tensor, " d"]
    size: int

    def compress(self, x: Vector) -> Float[Tensor, " s"]:
        """Return Sx. It is linear: the sketch of a sum is the sum of the sketches."""
        _check.shape("CountSketch.compress", "x", x, self.sign.shape)
        return x.new_zeros(self.size).index_add(0, self.bucket, self.sign * x)

    def expand(self, y: Float[Tensor, " s"]) -> Vector:
        """Return Sᵀy, an unbiased estimate of x for y = Sx."""
        _check.shape("CountSketch.expand", "y", y, (self.size,))
        return self.sign * y[self.bucket]

    def matrix(self) -> Float[Tensor, "s d"]:
        """Return S itself, which nobody needs to store."""
        rows = torch.arange(self.size, device=self.sign.device)[:, None]
        return ((self.bucket == rows) * self.sign).float()


def count_sketch(
    d: int, size: int, *, generator: torch.Generator, device: str | torch.device = "cpu"
) -> CountSketch:
    """Draw a sketch from R^d to R^s.

    Parameters
    ----------
    d, size
        Length of what is sketched, and s, of the sketch; at least 1 each.
    generator
        Sender and receiver draw the same sketch from the same seed, so it is never sent.
    device
        Where the sketch is used; it is drawn on the generator's device.

    Returns
    -------
    CountSketch

    Curriculum: P6.

    Examples
    --------
    >>> sketch = count_sketch(4, 2, generator=torch.Generator().manual_seed(3))
    >>> sketch.matrix()
    tensor([[-1., -1.,  0.,  0.],
            [ 0.,  0., -1.,  1.]])
    """
    _check.integer("count_sketch", "d", d, at_least=1)
    _check.integer("count_sketch", "size", size, at_least=1)
    where = generator.device
    bucket = torch.randint(size, (d,), generator=generator, device=where).to(device)
    bit = torch.randint(2, (d,), generator=generator, device=where).to(device)
    return CountSketch(bucket, 2 * bit - 1, size)


def error_feedback(
    gradient: Vector, residual: Vector, compress: Callable[[Vector], Vector]
) -> tuple[Vector, Vector]:
    """Compress a gradient together with what earlier messages left out.

    message = C(g + e),  e ← g + e − message

    Nothing is lost, only late: messages sent and residual kept add up to all gradients so far.

    Parameters
    ----------
    gradient, residual
        g and e, of shape (d,); a worker begins with e = 0.
    compress
        C, such as ``lambda x: top_k(x, 10)``.

    Returns
    -------
    (message, residual)
        What is sent, and the new e.

    Source: S. P. Karimireddy et al., Error feedback fixes SignSGD, arXiv:1901.09847v2, algorithm 2.
    Curriculum: P6.

    Examples
    --------
    >>> g = torch.tensor([3.0, 2.0])
    >>> error_feedback(g, torch.zeros(2), lambda x: top_k(x, 1))
    (tensor([3., 0.]), tensor([0., 2.]))
    """
    _check.shape("error_feedback", "residual", residual, tuple(gradient.shape))
    total = gradient + residual
    message = compress(total)
    return message, total - message


def recover_input(weight: Float[Tensor, "out d"], bias: Float[Tensor, " out"]) -> Vector:
    """Return the input of a linear layer from the gradients of its weight and bias.

    For one example ∂L/∂W = δ xᵀ and ∂L/∂b = δ, so x = (∂L/∂W)ᵀ δ / ‖δ‖²

    Exact for a single example; for a batch it is a mixture of the inputs.

    Parameters
    ----------
    weight, bias
        The gradients, of shapes (out, d) and (out,).

    Raises
    ------
    ValueError
        If the bias has no gradient other than zero.

    Source: L. T. Phong et al., Privacy-preserving deep learning via additively homomorphic
    encryption, IEEE TIFS 13 (2018).
    Curriculum: P6.

    Examples
    --------
    >>> layer, x = torch.nn.Linear(3, 2), torch.tensor([1.0, -2.0, 0.5])
    >>> layer(x).square().sum().backward()
    >>> print(recover_input(layer.weight.grad, layer.bias.grad).numpy().round(4))
    [ 1.  -2.   0.5]
    """
    _check.shape("recover_input", "bias", bias, (len(weight),))
    if not bias.any():
        raise ValueError("recover_input: expected a gradient of the bias, got zeros")
    return weight.T @ bias / bias.square().sum()


def match_gradient(
    gradient_of: Callable[[Tensor], Vector], observed: Vector, start: Tensor, *, steps: int = 200
) -> Tensor:
    """Look for the input whose gradient is the observed one, by L-BFGS.

    x̂ = argmin ‖g(x) − observed‖² / ‖observed‖²

    Parameters
    ----------
    gradient_of
        Maps a guess to what would be observed, differentiably: the gradient, or its sketch, or its
        entries that were sent.
    observed
        Of shape (d,), not all zero.
    start
        The first guess, of the shape of the input.
    steps
        At most so many iterations.

    Returns
    -------
    Tensor of the shape of start
        A local minimum: nothing says that it is the input.

    Raises
    ------
    ValueError
        If ``observed`` is zero.

    Source: L. Zhu, Z. Liu and S. Han, Deep leakage from gradients, arXiv:1906.08935v2, algorithm 1.
    Curriculum: P6.
    """
    _check.integer("match_gradient", "steps", steps, at_least=1)
    scale = observed.square().sum()
    if not scale:
        raise ValueError("match_gradient: expected an observed gradient, got zeros")
    x = start.detach().clone().requires_grad_()
    search = torch.optim.LBFGS(
        [x], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def distance() -> Tensor:
        off = (gradient_of(x) - observed).square().sum() / scale
        (x.grad,) = torch.autograd.grad(off, x)
        return off.detach()

    search.step(distance)
    return x.detach()
