"""The parts of a latent model: priors of the domains, decoders, and the networks that encode.

Latents t = (s, v) are stacked, s first. Every example comes with the number of its domain.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coursekit import _check, models

PRIORS = ("rho", "table", "full", "mixture", "single")
DECODERS = ("linear", "generic", "paint", "film")
LOG_2PI = math.log(2 * math.pi)
Backbone = Callable[..., nn.Module]  # called with generator=
Inputs = Float[Tensor, "batch ..."]
Latents = Float[Tensor, "*samples batch latent"]
Nats = Float[Tensor, "*samples batch"]
Domain = Int[Tensor, " batch"]


def log_normal(eps: Tensor, log_std: Tensor) -> Tensor:
    """Return the log density, summed over the last axis, from standardised coordinates."""
    return -(0.5 * (eps**2 + LOG_2PI) + log_std).sum(dim=-1)


def gaussian_nll(error: Tensor, log_scale: Tensor, entries: int) -> Tensor:
    """Return -log of the Gaussian density of ``entries`` numbers, squared errors added up."""
    return 0.5 * error * (-2 * log_scale).exp() + entries * (log_scale + LOG_2PI / 2)


def starting_log_scale(shape: Sequence[int]) -> nn.Parameter:
    """Return log σ of x as training begins: σ = 0.14 for pixels, most of which are black, or 1."""
    return nn.Parameter(torch.tensor(-2.0 if len(shape) == 3 else 0.0))


class DomainPrior(nn.Module):
    """p^d(s, v), one law a domain, with tables of parameters.

    ============  =====================================================================
    ``rho``       z ~ N(0, I) in every domain, s = rho_s^d(z_s), v = rho_v^d(z_v)
    ``table``     N(m_d, diag σ_d²): s and v independent in a domain
    ``full``      N(m_d, L_d L_dᵀ): s and v may correlate, as confounding has it
    ``mixture``   Σ_c π^d_c N(s; a_c) N(v; b_c), parts shared, weights of the domain
    ``single``    N(0, I) in every domain: the control
    ============  =====================================================================

    Parameters
    ----------
    kind
        A name of the table.
    domains, s_dim, v_dim
        Sizes.
    parts
        Number of components of a mixture.
    hidden
        Width of the maps rho, which are perceptrons with one hidden layer.
    generator
        Draws maps and component means; the other tables begin at N(0, I).

    Raises
    ------
    ValueError
        For an unknown kind.

    Convention: the released code makes m_d and σ_d by a network with batch normalization from
    one-hot rows. Over a batch of one domain that is a constant; a table cannot lose its domain.
    """

    def __init__(self, kind, domains, s_dim, v_dim, *, parts=4, hidden=64, generator):
        super().__init__()
        _check.one_of("DomainPrior", "kind", kind, PRIORS)
        self.kind, self.sizes, latent = kind, [s_dim, v_dim], s_dim + v_dim
        sizes = [size for _ in range(domains) for size in self.sizes] * (kind == "rho")
        maps = [models.mlp([q, hidden, q], generator=generator) for q in sizes]
        self.maps = nn.ModuleList(maps)
        rows, learned = parts if kind == "mixture" else domains, kind not in ("rho", "single")
        start = torch.randn(rows, latent, generator=generator) * (kind == "mixture")
        self.mean = nn.Parameter(start, requires_grad=learned)
        self.log_std = nn.Parameter(torch.zeros(rows, latent), requires_grad=learned)
        if kind == "full":
            self.lower = nn.Parameter(torch.zeros(domains, latent, latent))
        if kind == "mixture":
            self.weights = nn.Parameter(torch.zeros(domains, parts))

    def transport(self, z: Latents, domain: Domain) -> Latents:
        """Map base latents to (s, v): by rho^d, or not at all."""
        if self.kind != "rho":
            return z
        s, v = z.split(self.sizes, dim=-1)
        pairs = zip(self.maps[::2], self.maps[1::2], strict=True)
        mapped = [torch.cat([f(s), g(v)], dim=-1) for f, g in pairs]
        mine = [(domain == d).unsqueeze(-1) * t for d, t in enumerate(mapped)]
        return torch.stack(mine).sum(dim=0)

    def log_prob(self, z: Latents, domain: Domain) -> Nats:
        """Log density of base latents in their domains, in nats."""
        if self.kind == "mixture":
            eps = (z.unsqueeze(-2) - self.mean) / self.log_std.exp()
            log_weights = self.weights.log_softmax(dim=-1)[domain]
            return (log_weights + log_normal(eps, self.log_std)).logsumexp(dim=-1)
        log_std = self.log_std[domain]
        eps = (z - self.mean[domain]) / log_std.exp()
        if self.kind == "full":  # z = m + diag(σ) (I + A) eps, A strictly lower triangular
            unit = torch.eye(z.shape[-1]).to(z) + self.lower.tril(-1)
            eps = (torch.linalg.inv(unit)[domain] @ eps.unsqueeze(-1)).squeeze(-1)
        return log_normal(eps, log_std)


class Decoder(nn.Module):
    """E[x | s, v] as a perceptron of s and v together; a matrix where there is no hidden layer.

    Parameters
    ----------
    s_dim, v_dim
        Latents.
    shape
        Of one input: ``(features,)``, or ``(channels, height, width)`` with values in [0, 1].
    hidden
        Widths of hidden layers.
    generator
        Draws the weights.
    """

    def __init__(self, s_dim, v_dim, shape, hidden=(), *, generator):
        super().__init__()
        self.shape, self.squash = tuple(shape), len(shape) > 1
        sizes = [s_dim + v_dim, *hidden, math.prod(shape)]
        self.net = models.mlp(sizes, generator=generator)

    def forward(self, s: Float[Tensor, "*batch s_dim"], v: Float[Tensor, "*batch v_dim"]) -> Tensor:
        """Return the mean of x, shape ``(*batch, *shape)``."""
        out = self.net(torch.cat([s, v], dim=-1))
        return (out.sigmoid() if self.squash else out).unflatten(-1, self.shape)

    def squared_error(self, x: Inputs, s: Tensor, v: Tensor) -> Tensor:
        """Return ‖x - E[x|s, v]‖², shape ``(samples, batch)``."""
        return ((x - self(s, v)) ** 2).flatten(-len(self.shape)).sum(dim=-1)


class Paint(nn.Module):
    """E[x | s, v] = Σ_f mask_f(s) ⊗ colour_f(v): s draws, v paints, and neither can do both.

    One map is the *paint* decoder; several, which v mixes into colour channels, the *FiLM-like*.
    This is an assumption about the world, put in by hand.

    Parameters
    ----------
    s_dim, v_dim
        Latents.
    image
        Channels, height, width.
    maps
        Number of masks, each with values in (0, 1).
    hidden
        Width of the hidden layer from which masks are drawn.
    generator
        Draws the weights.
    """

    def __init__(self, s_dim, v_dim, image, maps=1, hidden=128, *, generator):
        super().__init__()
        self.shape, self.maps = tuple(image), maps
        masks = [s_dim, hidden, maps * image[1] * image[2]]
        self.mask = models.mlp(masks, generator=generator)
        self.colour = models.mlp([v_dim, 32, image[0] * maps], generator=generator)

    def _parts(self, s, v):
        masks = self.mask(s).sigmoid().unflatten(-1, (self.maps, -1))  # (..., maps, pixels)
        return masks, self.colour(v).unflatten(-1, (-1, self.maps))  # (..., channels, maps)

    def forward(self, s: Float[Tensor, "*batch s_dim"], v: Float[Tensor, "*batch v_dim"]) -> Tensor:
        """Return the mean image, shape ``(*batch, channels, height, width)``."""
        masks, colours = self._parts(s, v)
        return (colours @ masks).unflatten(-1, self.shape[1:])

    def squared_error(self, x: Inputs, s: Tensor, v: Tensor) -> Tensor:
        """Return ‖x - Σ_f m_f c_fᵀ‖² = ‖x‖² - 2 Σ_f ⟨x, m_f c_fᵀ⟩ + Σ_fg ⟨m_f, m_g⟩⟨c_f, c_g⟩.

        No coloured image is made, so many samples of an image cost little more than their masks.
        """
        masks, colours = self._parts(s, v)
        flat = x.flatten(2)
        inner = torch.einsum("bkp,...bfp->...bkf", flat, masks)
        gram = masks.norm(dim=-1, keepdim=True) ** 2 if self.maps == 1 else masks @ masks.mT
        model = (gram * (colours.mT @ colours)).sum(dim=(-2, -1))
        return (flat**2).sum(dim=(1, 2)) - 2 * (inner * colours).sum(dim=(-2, -1)) + model


def backbone(shape: Sequence[int], width: int = 64, hidden: int = 64) -> Backbone:
    """Return what makes the network that all methods share: inputs to ``width`` features.

    Two convolutions (`models.small_cnn`) for an image ``(channels, height, width)``, two hidden
    layers for a row ``(features,)``. Call the result with ``generator=``; each call draws anew.

    Parameters
    ----------
    shape
        Of one input; `ValueError` for another number of dimensions than one or three.
    width, hidden
        Features that come out; units of a hidden layer for rows.

    Returns
    -------
    callable
    """
    if len(shape) not in (1, 3):
        raise ValueError(f"backbone: expected shape (features,) or (c, h, w), got {tuple(shape)}")
    if len(shape) == 3:
        channels, height, breadth = shape
        return partial(models.small_cnn, (channels, height, breadth), width)
    return partial(models.mlp, [shape[0], hidden, hidden, width])


def make_decoder(kind, s_dim, v_dim, shape, hidden, *, generator) -> Any:
    """Make the decoder of a name in ``DECODERS``; painting takes an image."""
    _check.one_of("make_decoder", "decoder", kind, DECODERS)
    if kind in ("linear", "generic"):
        layers = () if kind == "linear" else (hidden, hidden)
        return Decoder(s_dim, v_dim, shape, layers, generator=generator)
    if len(shape) != 3:
        raise ValueError(f"make_decoder: expected a shape (c, h, w) to paint, got {tuple(shape)}")
    return Paint(s_dim, v_dim, shape, 1 if kind == "paint" else 4, hidden, generator=generator)
