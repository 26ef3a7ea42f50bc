"""Normalization of activations, its backward pass, and the condition number it is meant to improve.

All norms subtract a mean (RMS norm does not) and divide by a root mean square; they differ in what
they average over. Variances are taken in two passes, mean first: E[x²] - E[x]² loses all its digits
where the mean is large.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coursekit import _check

Batch = Float[Tensor, "batch channels ..."]
Channels = Float[Tensor, " channels"] | None
Examples = Float[Tensor, "..."]
Features = Float[Tensor, "..."] | None
Sizes = int | Sequence[int]


class BatchNormResult(NamedTuple):
    """What `batch_norm` returns; the running statistics are new tensors without a graph."""

    output: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None


def batch_norm(
    x: Batch,
    running_mean: Channels = None,
    running_var: Channels = None,
    weight: Channels = None,
    bias: Channels = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNormResult:
    """Normalize each channel over the batch, or in evaluation by running statistics.

    y = γ (x - μ) / √(σ² + ε) + β, with μ, σ² over batch and positions, m values a channel

    running ← (1 - momentum) running + momentum · (μ, or σ² m / (m - 1))

    Parameters
    ----------
    x
        Shape ``(batch, channels, ...)``.
    running_mean, running_var, weight, bias
        Shape ``(channels,)``, the first two needed in evaluation; γ is 1 and β 0 unless given.
    training, momentum, eps
        Whether to use the statistics of this batch, its weight in the running ones, and ε.

    Returns
    -------
    BatchNormResult

    Raises
    ------
    ValueError
        In training for a single value per channel, whose variance is zero whatever it is, and for
        infinite or NaN statistics; in evaluation without running statistics; for wrong shapes.

    Convention: `torch.nn.functional.batch_norm` writes the running statistics in place; here new
    ones are returned. As there, the batch is divided by its biased standard deviation, the running
    variance averages the unbiased one, and ``momentum`` is one minus a usual averaging factor.

    Source: S. Ioffe and C. Szegedy, arXiv:1502.03167, algorithms 1 and 2. Curriculum: N3.

    Examples
    --------
    >>> y, _, _ = batch_norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]]), training=True, eps=0.0)
    >>> y
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    vectors = {"running_mean": running_mean, "running_var": running_var}
    shape = _per_channel("batch_norm", x, eps, **vectors, weight=weight, bias=bias)
    if running_mean is None or running_var is None:
        if not training or running_mean is not running_var:
            raise ValueError(
                "batch_norm: expected running_mean and running_var, or in training neither"
            )
    elif not training:
        x_hat = (x - running_mean.view(shape)) / (running_var.view(shape) + eps).sqrt()
        return BatchNormResult(_affine(x_hat, weight, bias, shape), running_mean, running_var)
    m, dims = _pooled("batch_norm", x)
    x_hat, mean, var = _standardize(x, dims, eps)
    if running_mean is not None and running_var is not None:
        _check.in_range("batch_norm", "momentum", momentum)
        running_mean = running_mean.lerp(mean.detach().flatten(), momentum)
        running_var = running_var.lerp(var.detach().flatten() * (m / (m - 1)), momentum)
        _check.finite("batch_norm", "the statistics of x", torch.stack([running_mean, running_var]))
    return BatchNormResult(_affine(x_hat, weight, bias, shape), running_mean, running_var)


class BatchNormGradients(NamedTuple):
    """Derivatives of the loss by everything in batch norm, in the order they are computed."""

    x_hat: Tensor
    var: Tensor
    mean: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor


def batch_norm_backward(
    grad_output: Batch, x: Batch, weight: Channels = None, eps: float = 1e-5
) -> BatchNormGradients:
    """Send a gradient back through batch norm in training, by the six formulas of the paper.

    Parameters
    ----------
    grad_output
        ∂ℓ/∂y, of the shape of ``x``.
    x, weight, eps
        What `batch_norm` was given.

    Returns
    -------
    BatchNormGradients
        ``x_hat`` and ``x`` of the shape of ``x``, the others of shape ``(channels,)``.

    Raises
    ------
    ValueError
        For wrong shapes and for a single value per channel.

    Source: S. Ioffe and C. Szegedy, arXiv:1502.03167, section 3, the display after algorithm 1.
    Curriculum: N4.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [1.0], [5.0]])
    >>> batch_norm_backward(torch.ones(3, 1), x).x.abs().max() < 1e-6  # a shift changes nothing
    tensor(True)
    """
    shape = _per_channel("batch_norm_backward", x, eps, weight=weight)
    _check.shape("batch_norm_backward", "grad_output", grad_output, tuple(x.shape))
    m, dims = _pooled("batch_norm_backward", x)
    x_hat, mean, var = _standardize(x, dims, eps)
    centred, std = x - mean, (var + eps).sqrt()
    gamma = 1.0 if weight is None else weight.view(shape)

    d_x_hat = grad_output * gamma  # (1)
    d_var = (d_x_hat * centred).sum(dims, keepdim=True) * (-0.5 / std**3)  # (2)
    d_mean = -(d_x_hat / std).sum(dims, keepdim=True)  # (3), first term
    d_mean = d_mean + d_var * (-2 / m) * centred.sum(dims, keepdim=True)  # (3), zero but rounding
    d_x = d_x_hat / std + d_var * 2 * centred / m + d_mean / m  # (4)
    d_weight = (grad_output * x_hat).sum(dims)  # (5)
    d_bias = grad_output.sum(dims)  # (6)
    return BatchNormGradients(d_x_hat, d_var.flatten(), d_mean.flatten(), d_x, d_weight, d_bias)


def layer_norm(
    x: Examples,
    normalized_shape: Sizes,
    weight: Features = None,
    bias: Features = None,
    eps: float = 1e-5,
) -> Examples:
    """Return ``x``, each example normalized over its features, in training as in evaluation.

    y = γ (x - μ) / √(σ² + ε) + β; σ is the root mean square of x - μ over the features

    Parameters
    ----------
    x, weight, bias, eps
        Shape ``(..., *normalized_shape)``; γ and β of shape ``normalized_shape``, 1 and 0 unless
        given; ε.
    normalized_shape
        The last dimensions, over which mean and variance are taken.

    Source: J. Ba, J. Kiros and G. Hinton, arXiv:1607.06450, equation 3. Curriculum: N5.

    Examples
    --------
    >>> layer_norm(torch.tensor([[1.0, 3.0], [10.0, 30.0]]), 2, eps=0.0)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """
    shape, dims = _last_dims("layer_norm", x, normalized_shape, eps, weight=weight, bias=bias)
    return _affine(_standardize(x, dims, eps)[0], weight, bias, shape)


def rms_norm(
    x: Examples, normalized_shape: Sizes, weight: Features = None, eps: float | None = None
) -> Examples:
    """Return ``x``, each example divided by the root mean square of its features.

    y = γ x / √(mean(x²) + ε); no mean is subtracted

    Parameters
    ----------
    x, normalized_shape, weight
        As in `layer_norm`.
    eps
        Under the root; the precision of the dtype unless given, as in torch.

    Source: B. Zhang and R. Sennrich, arXiv:1910.07467, equation 4. Curriculum: N5.

    Examples
    --------
    >>> rms_norm(torch.tensor([1.0, 7.0]), 2)
    tensor([0.2000, 1.4000])
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    shape, dims = _last_dims("rms_norm", x, normalized_shape, eps, weight=weight)
    return _affine(x / (x.square().mean(dims, keepdim=True) + eps).sqrt(), weight, None, shape)


def group_norm(
    x: Batch, num_groups: int, weight: Channels = None, bias: Channels = None, eps: float = 1e-5
) -> Batch:
    """Return ``x``, each example normalized over groups of channels and all positions.

    Parameters
    ----------
    x, weight, bias, eps
        Shape ``(batch, channels, ...)``; γ and β of shape ``(channels,)``, 1 and 0 unless given; ε.
    num_groups
        A divisor of ``channels``; neighbours make a group, and one group is layer norm.

    Raises
    ------
    ValueError
        When the channels do not fall into so many equal groups.

    Source: Y. Wu and K. He, arXiv:1803.08494, equation 7. Curriculum: N5.
    """
    shape = _per_channel("group_norm", x, eps, weight=weight, bias=bias)
    _check.integer("group_norm", "num_groups", num_groups, at_least=1)
    if x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm: expected num_groups that divides {x.shape[1]} channels, got {num_groups}"
        )
    grouped = x.reshape(len(x), num_groups, -1)
    return _affine(_standardize(grouped, (2,), eps)[0].view_as(x), weight, bias, shape)


def instance_norm(
    x: Batch, weight: Channels = None, bias: Channels = None, eps: float = 1e-5
) -> Batch:
    """Return ``x``, each channel of each example normalized over its positions.

    Parameters
    ----------
    x, weight, bias, eps
        As in `group_norm`, with two positions or more.

    Convention: without the running statistics that torch offers here and leaves off by default.

    Source: D. Ulyanov, A. Vedaldi and V. Lempitsky, arXiv:1607.08022, equation 3. Curriculum: N5.
    """
    shape = _per_channel("instance_norm", x, eps, weight=weight, bias=bias)
    _, (_, *dims) = _pooled("instance_norm", x[:1])
    return _affine(_standardize(x, tuple(dims), eps)[0], weight, bias, shape)


def condition_number(a: Float[Tensor, "m n"], *, nonzero: bool = False) -> float:
    """Return the ratio of a matrix's largest to its smallest singular value.

    For m ≥ n that of aᵀa is the square of it. Forming aᵀa first would lose half of the digits.

    Parameters
    ----------
    a
        Any matrix; computed in float64.
    nonzero
        Leave out the singular values that are zero to rounding: gradient descent stands still
        along their directions, so they do not slow it down.

    Returns
    -------
    float
        1 or more.

    Raises
    ------
    ValueError
        For a matrix that is empty, not finite, zero, or rank deficient unless ``nonzero``.

    Curriculum: N1, N2.

    Examples
    --------
    >>> condition_number(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    6.0
    """
    _check.shape("condition_number", "a", a, ("m", "n"))
    _check.finite("condition_number", "a", a)
    if not a.numel():
        raise ValueError(f"condition_number: expected entries, got shape {tuple(a.shape)}")
    s = torch.linalg.svdvals(a.double())
    rank = int((s > s[0] * max(a.shape) * torch.finfo(a.dtype).eps).sum())
    if rank == 0 or (rank < len(s) and not nonzero):
        raise ValueError(f"condition_number: expected rank {len(s)}, got {rank}")
    return (s[0] / s[rank - 1]).item()


# ---- shared by the functions ----


def _standardize(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x̂, mean and biased variance over ``dims``, which stay as dimensions of size 1."""
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    return (x - mean) / (var + eps).sqrt(), mean, var


def _affine(x_hat: Tensor, weight, bias, shape) -> Tensor:
    y = x_hat if weight is None else x_hat * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _per_channel(function: str, x: Tensor, eps: float, **vectors) -> tuple[int, ...]:
    """Check what a norm with channels was given; return the shape that broadcasts a vector."""
    sizes = [len(v) for v in vectors.values() if v is not None]
    _check.shape(function, "x", x, ("batch", sizes[0] if sizes else "channels", ...))
    for name, v in vectors.items():
        if v is not None:
            _check.shape(function, name, v, (x.shape[1],))
    _check.in_range(function, "eps", eps, high=math.inf)
    return (1, -1, *[1] * (x.ndim - 2))


def _pooled(function: str, x: Tensor) -> tuple[int, tuple[int, ...]]:
    """Return how many values a channel has, which must be two or more, and their dimensions."""
    m = x[:, :1].numel()
    if m < 2:
        got = f"{m} in x of shape {tuple(x.shape)}"
        raise ValueError(f"{function}: expected two or more values to average over, got {got}")
    return m, (0, *range(2, x.ndim))


def _last_dims(function: str, x: Tensor, normalized_shape, eps: float, **parameters):
    """Check what a norm over features was given; return its shape and dimensions."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"{function}: expected normalized_shape of positive sizes, got {shape}")
    _check.shape(function, "x", x, (..., *shape))
    for name, p in parameters.items():
        if p is not None:
            _check.shape(function, name, p, shape)
    _check.in_range(function, "eps", eps, high=math.inf)
    return shape, tuple(range(-len(shape), 0))


# ---- modules ----


class BatchNorm(nn.Module):
    """`batch_norm` with learned weight and bias, for inputs ``(batch, num_features, ...)``.

    One class stands for `torch.nn.BatchNorm1d`, 2d and 3d; its arguments, defaults and
    ``state_dict`` are theirs. ``momentum=None`` averages all batches equally. Without
    ``track_running_stats`` it uses the batch's statistics in evaluation too. Curriculum: N3.
    """

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__()
        _check.integer("BatchNorm", "num_features", num_features, at_least=1)
        _check.in_range("BatchNorm", "eps", eps, high=math.inf)
        if momentum is not None:
            _check.in_range("BatchNorm", "momentum", momentum)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        start = torch.zeros(num_features), torch.ones(num_features), torch.tensor(0)
        names = ("running_mean", "running_var", "num_batches_tracked")
        for name, value in zip(names, start, strict=True):
            self.register_buffer(name, value if track_running_stats else None)

    def forward(self, x: Batch) -> Batch:
        """Normalize, and in training move the running statistics."""
        tracks, momentum = self.running_mean is not None, self.momentum
        if momentum is None:
            momentum = 1 / (self.num_batches_tracked.item() + 1) if tracks else 0.0
        y, mean, var = batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias),
            *(self.training or not tracks, momentum, self.eps),
        )
        if self.training and tracks:
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            self.num_batches_tracked += 1
        return y


class LayerNorm(nn.Module):
    """`layer_norm` with learned weight and bias, arguments as in torch. Curriculum: N5."""

    def __init__(
        self,
        normalized_shape: Sizes,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        ones = torch.ones(normalized_shape)
        self.weight = nn.Parameter(ones) if elementwise_affine else None
        self.bias = nn.Parameter(0 * ones) if elementwise_affine and bias else None

    def forward(self, x: Examples) -> Examples:
        """Normalize each example."""
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight, arguments as in torch. Curriculum: N5."""

    def __init__(
        self, normalized_shape: Sizes, eps: float | None = None, elementwise_affine: bool = True
    ):
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = nn.Parameter(torch.ones(normalized_shape)) if elementwise_affine else None

    def forward(self, x: Examples) -> Examples:
        """Normalize each example."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
