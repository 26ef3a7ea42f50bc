"""Where training starts: initializers, what depth does to a signal, and the theory of both.

``fan_in_and_fan_out``                    what an output reads, what an input feeds
``constant_ xavier_* kaiming_*``          fill a tensor in place, with torch's names and draws
``orthogonal_``                           a random rotation
``layer_statistics gradient_norms``       measure a network by layer, and leave it as it was
``variance_map``                          predict the same for infinite width
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coursekit import _check

Weight = Float[Tensor, "fan_out fan_in *kernel"]
Number = float | Float[Tensor, "..."]

#: Torch's factor on a weight's standard deviation, by the function that comes next.
GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": 2**0.5, "selu": 3 / 4}


def fan_in_and_fan_out(tensor: Shaped[Tensor, "fan_out fan_in *kernel"]) -> tuple[int, int]:
    """Return how many inputs one output reads, and how many outputs one input feeds.

    A filter ``(C_out, C_in, m, n)`` has fan-in C_in · m · n and fan-out C_out · m · n. `ValueError`
    for fewer than two dimensions or a size of zero.

    Convention: the fan-out is that of stride 1, as in torch. A stride s divides it by s in each
    direction, on average, and at a border padded with zeros both fans are smaller.

    Curriculum: I5.

    Examples
    --------
    >>> fan_in_and_fan_out(torch.empty(16, 3, 5, 5))
    (75, 400)
    """
    return _fans("fan_in_and_fan_out", tensor)


def _fans(function: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim < 2 or 0 in tensor.shape:
        raise ValueError(
            f"{function}: expected tensor of shape (fan_out, fan_in, ...) without a size of zero, "
            f"got {tuple(tensor.shape)}"
        )
    positions = math.prod(tensor.shape[2:])
    return tensor.shape[1] * positions, tensor.shape[0] * positions


def constant_(tensor: Float[Tensor, "..."], val: float) -> Tensor:
    """Fill a tensor with one finite number, else `ValueError`: fit for biases, not for weights.

    Curriculum: I2.
    """
    if not math.isfinite(val):
        raise ValueError(f"constant_: expected val finite, got {val}")
    return tensor.detach().fill_(val)


def xavier_uniform_(tensor: Weight, gain: float = 1.0, *, generator: torch.Generator) -> Tensor:
    """Draw weights from U(-b, b) with b = gain · √6 / √(fan_in + fan_out).

    Parameters
    ----------
    tensor
        Weight of a linear layer or a convolution, of shape ``(fan_out, fan_in, ...)``.
    gain
        Factor on the standard deviation, above 0.
    generator
        On the tensor's device; the draws are those of `torch.nn.init` from the same state.

    Returns
    -------
    The tensor, filled in place. What is refused (`ValueError`; no generator: `TypeError`) stays.

    Source: X. Glorot and Y. Bengio, 2010, eq. 16. Curriculum: I3.

    Examples
    --------
    >>> w = xavier_uniform_(torch.empty(200, 400), generator=torch.Generator())
    >>> bool(w.abs().max() <= (6 / 600) ** 0.5)
    True
    """
    return _xavier_("xavier_uniform_", tensor, gain, generator)


def xavier_normal_(tensor: Weight, gain: float = 1.0, *, generator: torch.Generator) -> Tensor:
    """Draw weights from N(0, σ²) with σ² = gain² · 2 / (fan_in + fan_out).

    Parameters
    ----------
    tensor, gain, generator
        As in `xavier_uniform_`, which has the same variance.

    Returns
    -------
    The tensor, as there.

    Source: Glorot and Bengio, 2010, eq. 12. Curriculum: I3.
    """
    return _xavier_("xavier_normal_", tensor, gain, generator)


def _xavier_(function, tensor, gain, generator):
    std = gain * math.sqrt(2 / sum(_fans(function, tensor)))  # eq. 12
    return _draw_(function, tensor, gain, std, generator)


def kaiming_uniform_(
    tensor: Weight,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    *,
    generator: torch.Generator,
) -> Tensor:
    """Draw weights from U(-b, b) with b = √3 · gain / √fan.

    Parameters
    ----------
    tensor, a, mode, nonlinearity, generator
        As in `kaiming_normal_`, which has the same variance.

    Returns
    -------
    The tensor, as there.

    Source: K. He, X. Zhang, S. Ren and J. Sun, 2015, arXiv:1502.01852. Curriculum: I4.
    """
    return _kaiming_("kaiming_uniform_", tensor, a, mode, nonlinearity, generator)


def kaiming_normal_(
    tensor: Weight,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    *,
    generator: torch.Generator,
) -> Tensor:
    """Draw weights from N(0, σ²) with σ² = gain² / fan.

    Parameters
    ----------
    tensor, generator
        As in `xavier_uniform_`.
    a
        Slope below zero of ``"leaky_relu"``: gain² = 2 / (1 + a²). No other function uses it.
    mode
        ``"fan_in"`` keeps the variance of activations, ``"fan_out"`` that of gradients.
    nonlinearity
        ``"leaky_relu"`` or a key of `GAINS`.

    Returns
    -------
    The tensor, as there.

    Convention: torch's gains of tanh and sigmoid are rules of thumb; those that keep a small signal
    are 1 and 4. `nn.Linear` starts its weights by ``kaiming_uniform_(a=√5)``, a gain of 1/√3.

    Source: He et al., 2015, eq. 10 (fan-in), eq. 14 (fan-out), eq. 15 (``a``). Curriculum: I4.

    Examples
    --------
    >>> w = kaiming_normal_(torch.empty(400, 200), generator=torch.Generator())
    >>> print(f"{w.var():.3f}, and 2 / fan_in is {2 / 200}")
    0.010, and 2 / fan_in is 0.01
    """
    return _kaiming_("kaiming_normal_", tensor, a, mode, nonlinearity, generator)


def _kaiming_(function, tensor, a, mode, nonlinearity, generator):
    fans = dict(zip(("fan_in", "fan_out"), _fans(function, tensor), strict=True))
    _check.one_of(function, "mode", mode, fans)
    gains = {**GAINS, "leaky_relu": math.sqrt(2 / (1 + a * a))}  # eq. 15
    _check.one_of(function, "nonlinearity", nonlinearity, gains)
    gain = gains[nonlinearity]
    return _draw_(function, tensor, gain, gain / math.sqrt(fans[mode]), generator)  # eq. 10, 14


def _draw_(function, tensor, gain, std, generator):
    """Fill by the law that the function's name says, after the last checks."""
    _check.positive(function, "gain", gain)
    if generator is None:
        raise TypeError(f"{function}: expected a generator to draw from, got None")
    weight, bound = tensor.detach(), math.sqrt(3) * std  # U(-b, b) has variance b² / 3
    if "uniform" in function:
        return weight.uniform_(-bound, bound, generator=generator)
    return weight.normal_(0, std, generator=generator)


def orthogonal_(tensor: Weight, gain: float = 1.0, *, generator: torch.Generator) -> Tensor:
    """Draw a matrix with orthonormal rows or columns, whichever are fewer, times a gain.

    The Q of a Gaussian matrix, with the signs of R's diagonal, is uniform over all such matrices.

    Parameters
    ----------
    tensor
        Shape ``(rows, ...)``: further axes count as columns.
    gain, generator
        As in `xavier_uniform_`.

    Returns
    -------
    The tensor, as there.

    Source: A. Saxe, J. McClelland and S. Ganguli, 2014, arXiv:1312.6120. Curriculum: I3.

    Examples
    --------
    >>> w = orthogonal_(torch.empty(3, 5), generator=torch.Generator())
    >>> torch.allclose(w @ w.T, torch.eye(3), atol=1e-6)
    True
    """
    _fans("orthogonal_", tensor)
    matrix = torch.empty_like(tensor.detach().flatten(1), memory_format=torch.contiguous_format)
    _draw_("orthogonal_", matrix, gain, 1.0, generator)
    wide = matrix.shape[0] < matrix.shape[1]
    q, r = torch.linalg.qr(matrix.T if wide else matrix)
    q = q * r.diagonal().sign()  # QR's own choice of signs is not uniform
    return tensor.detach().copy_((q.T if wide else q).reshape(tensor.shape)).mul_(gain)


class LayerStatistics(NamedTuple):
    """What each layer puts out, over all examples and units, in the order of execution."""

    names: tuple[str, ...]
    mean: Float[Tensor, " layers"]
    variance: Float[Tensor, " layers"]


class GradientNorms(NamedTuple):
    """Euclidean norms of a loss's gradient by each layer's weight and by what it puts out."""

    names: tuple[str, ...]
    weight: Float[Tensor, " layers"]
    output: Float[Tensor, " layers"]


def _run(function, model, x, kind=None):
    """Call a copy of a model; return its output, and names, weights, outputs of the layers."""
    seen: list[tuple[str, Any, Tensor]] = []

    def record(name, module, _, output):
        seen.append((name, getattr(module, "weight", None), output))
        return output.clone()  # what comes next may work in place

    def is_layer(module):
        return isinstance(module, kind) if kind else getattr(module, "weight", x[0, :0]).ndim > 1

    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    layers = [(name, module) for name, module in model.named_modules() if is_layer(module)]
    hooks = [m.register_forward_hook(functools.partial(record, name)) for name, m in layers]
    try:
        output = torch.func.functional_call(model, state, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(f"{function}: expected a model that runs such a layer, got none")
    return output, *zip(*seen, strict=True)


@torch.no_grad()
def layer_statistics(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    *,
    kind: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
) -> LayerStatistics:
    """Measure mean and variance of what each layer puts out.

    Parameters
    ----------
    model, x
        A network and a batch. It runs in its mode, on copies of parameters and running statistics.
    kind
        ``nn.Tanh``, say, for what comes out of those. Unless given: what comes out of the layers
        with a weight of two dimensions or more, which is what goes into the activations.

    Returns
    -------
    LayerStatistics
        One entry a call of a layer; if none runs, a `ValueError`. The theory's mean square is
        ``variance + mean**2``.

    Curriculum: I3, I4.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> _ = constant_(net[0].weight, 1.0)
    >>> layer_statistics(net, torch.tensor([[1.0, 1.0], [3.0, 3.0]]))
    LayerStatistics(names=('0',), mean=tensor([4.]), variance=tensor([4.]))
    """
    _, names, _, outputs = _run("layer_statistics", model, x, kind)
    mean, variance = zip(*((z.mean(), z.var(correction=0)) for z in outputs), strict=True)
    return LayerStatistics(names, torch.stack(mean), torch.stack(variance))


@torch.enable_grad()
def gradient_norms(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Shaped[Tensor, "batch ..."],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> GradientNorms:
    """Measure a loss's gradient layer by layer; no ``.grad`` is touched.

    Parameters
    ----------
    model, x, y
        A network, as in `layer_statistics`, a batch and its targets.
    loss
        Takes output and target, returns one number.

    Returns
    -------
    GradientNorms
        One entry a call of a layer with a weight of two dimensions or more; if none runs, a
        `ValueError`.

    Source: Glorot and Bengio, 2010, eq. 6 and 7. Curriculum: I6.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> _ = constant_(net[0].weight, 2.0), constant_(net[1].weight, 3.0)
    >>> gradient_norms(net, torch.ones(1, 1), torch.zeros(1, 1), loss=lambda z, _: z.sum())
    GradientNorms(names=('0', '1'), weight=tensor([3., 2.]), output=tensor([3., 1.]))
    """
    output, names, weights, outputs = _run("gradient_norms", model, x)
    gradients = torch.autograd.grad(loss(output, y), weights + outputs, materialize_grads=True)
    norms = torch.stack([g.norm() for g in gradients])
    return GradientNorms(names, norms[: len(names)], norms[len(names) :])


class VarianceMap(NamedTuple):
    """Mean square, correlation and gradient factor; the first axis is the layer, from 0."""

    q: Float[Tensor, "layers ..."]
    c: Float[Tensor, "layers ..."]
    chi: Float[Tensor, "layers ..."]


def variance_map(
    activation: Callable[[Tensor], Tensor],
    weight_variance: Number,
    bias_variance: Number = 0.0,
    *,
    q: Number = 1.0,
    c: Number = 1.0,
    depth: int = 1,
    points: int = 64,
) -> VarianceMap:
    """Follow two inputs through an infinitely wide random network.

    With u = √q z₁ and v = √q (c z₁ + √(1 - c²) z₂), where z₁ and z₂ are standard normal, a layer
    maps

    - the mean square of pre-activations to q' = σ_w² E[φ(u)²] + σ_b²,
    - the correlation of two inputs to c' = (σ_w² E[φ(u) φ(v)] + σ_b²) / q',
    - the mean square of the gradient, on its way back, to χ = σ_w² E[φ'(u)²] times itself.

    Parameters
    ----------
    activation
        φ, elementwise.
    weight_variance, bias_variance
        σ_w² and σ_b². Weights have variance σ_w² / fan_in: He's is 2; Xavier's, if square, is 1.
    q, c
        Of layer 0; both inputs have the same q. All four may be tensors that broadcast.
    depth
        Layers to go.
    points
        Nodes of the Gauss-Hermite quadrature in each direction; more where √q makes φ steep. For
        ReLU an even number gives q and χ exactly, and c within 1 / (3 points).

    Returns
    -------
    VarianceMap
        In float64; `ValueError` for numbers that are no variance or no correlation. At the fixed
        point of q, χ is also the slope of the map of c at 1: below 1 all inputs become alike
        (order), above 1 neighbours part (chaos).

    Source: B. Poole et al., 2016, arXiv:1606.05340, eq. 3, 5 and 6; for gradients S. Schoenholz
    et al., 2017, arXiv:1611.01232, section 4. Curriculum: I3, I4, I7.

    Examples
    --------
    >>> he = variance_map(torch.relu, 2.0, depth=2)
    >>> he.q.round(decimals=9).tolist(), he.chi.round(decimals=9).tolist()
    ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    """
    names = ("weight_variance", "q", "bias_variance", "c")
    given = (weight_variance, q, bias_variance, c)
    values: list[Tensor] = [torch.as_tensor(x, dtype=torch.float64) for x in given]
    for name, value in zip(names, values, strict=True):
        _check.finite("variance_map", name, value)
        if name in ("weight_variance", "q"):
            _check.positive("variance_map", name, value.min().item())
    _check.in_range("variance_map", "bias_variance", values[2].min().item(), 0, math.inf)
    _check.in_range("variance_map", "|c|", values[3].abs().max().item())
    _check.integer("variance_map", "depth", depth, at_least=0)
    _check.integer("variance_map", "points", points, at_least=2)
    w2, q_l, b2, c_l = torch.broadcast_tensors(*values)
    nodes, mass = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(points))
    mass = (mass / mass.sum()).to(w2.device)
    z1, z2 = nodes.to(w2.device), nodes.to(w2.device)[:, None]
    layers = []
    for _ in range(depth + 1):
        scale, cos = q_l.sqrt()[..., None], c_l[..., None, None]
        u, v = scale * z1, scale[..., None] * (cos * z1 + (1 - cos**2).sqrt() * z2)
        phi, pull_back = torch.func.vjp(activation, u)  # type: ignore[misc]
        (slope,) = pull_back(torch.ones_like(u))
        layers.append((q_l, c_l, w2 * (slope**2 @ mass)))  # eq. 6
        q_l = w2 * (phi**2 @ mass) + b2  # eq. 3
        both = ((activation(v) * phi[..., None, :]) @ mass) @ mass
        c_l = ((w2 * both + b2) / q_l).clamp(-1, 1).where(q_l > 0, c_l)  # eq. 5; q may underflow
    return VarianceMap(*map(torch.stack, zip(*layers, strict=True)))
