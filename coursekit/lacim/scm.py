"""Data of which the causes are known: structural models, coloured digits; and a score."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import avg_pool2d, leaky_relu

from coursekit import _check


class Simulation(NamedTuple):
    """Examples of all domains, domain after domain; s and v are what a learner does not see."""

    x: Tensor
    y: Tensor
    s: Tensor
    v: Tensor
    domain: Tensor


class Colored(NamedTuple):
    """Images ``(n, channels, side, side)``, labels, and the class whose colour each image has."""

    x: Tensor
    y: Tensor
    colour: Tensor


def simulate_scm(
    variant: str, n: int, domains: int | Sequence[float], *, sigma: float | None = None,
    generator: torch.Generator,
) -> Simulation:  # fmt: skip
    """Sample LaCIM's structural model: D → C → (S, V), (S, V) → X, S → Y; only p(s, v) shifts.

    ============  ==========================================================================
    ``linear``    s, v standard normal with correlation r_d; x = W (s, v) + σ ε in R⁸, σ = 2;
                  P(y = 1) = sigmoid(6 s). ``domains`` lists the r_d
    ``fair``      s, v in R², normal with means in (-2, 2) and standard deviations in (0.5, 2),
                  drawn *separately* for s and v; x in R⁴ and y in R² are orthogonal matrices
                  and leaky ReLUs of (s, v) and of s, plus noise of σ = 0.1
    ``official``  the released simulation: as fair, but s and v have the *same* domain means,
                  2 (N(0, 1) + 5k) in domain k; unit noise on x, none on y. Its pooled scores
                  are high before anything is learned
    ============  ==========================================================================

    Parameters
    ----------
    variant
        A name of the table.
    n
        Examples a domain.
    domains
        How many; for ``linear`` their correlations, each in [-1, 1].
    sigma
        Noise of x, where another than the table's is wanted.
    generator
        Draws mechanisms first, which all domains share, then domains.

    Returns
    -------
    Simulation
        ``s`` and ``v`` of shape ``(n, dim)``; y integer for ``linear``, else real ``(n, 2)``.

    Raises
    ------
    ValueError
        For an unknown variant, or domains that do not go with it.

    Convention: ``official`` draws standard deviations as ``fair`` does; the released code takes
    them from a random orthogonal map.

    Source: X. Sun et al., NeurIPS 2021, and its released code. Curriculum: L2, L5.
    """
    _check.one_of("simulate_scm", "variant", variant, ("linear", "fair", "official"))
    _check.integer("simulate_scm", "n", n, at_least=1)
    linear = variant == "linear"
    if linear == isinstance(domains, int):
        wanted = "a list of correlations" if linear else "a number"
        raise ValueError(f"simulate_scm: expected domains as {wanted}, got {domains!r}")
    many = range(domains) if isinstance(domains, int) else [float(r) for r in domains]

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def uniform(n):
        return torch.rand(n, generator=generator)

    weight = normal(8, 2)
    mix_x, mix_y = ([torch.linalg.qr(normal(d, d)).Q for _ in range(3)] for d in (4, 2))
    noise = {"linear": 2.0, "fair": 0.1, "official": 1.0}[variant] if sigma is None else sigma
    found = []
    for k, d in enumerate(many):
        if linear:
            _check.in_range("simulate_scm", "correlation", d, -1, 1)
            s = normal(n, 1)
            v = d * s + math.sqrt(1 - d**2) * normal(n, 1)
            x = torch.cat([s, v], dim=1) @ weight.T
            y = (uniform(n) < (6 * s[:, 0]).sigmoid()).long()
        else:
            mean, std = 4 * uniform(4) - 2, 0.5 + 1.5 * uniform(4)
            if variant == "official":  # one centre for s and v
                mean = (2 * (normal(2) + 5 * d)).repeat(2)
            s, v = (mean + std * normal(n, 4)).split(2, dim=1)
            x, y = _mix(torch.cat([s, v], dim=1), mix_x), _mix(s, mix_y)
            y = y + 0.1 * (variant == "fair") * normal(n, 2)
        found.append((x + noise * normal(*x.shape), y, s, v, torch.full((n,), k)))
    return Simulation(*(torch.cat(column) for column in zip(*found, strict=True)))


def _mix(t: Tensor, layers: list[Tensor]) -> Tensor:
    for q in layers[:-1]:
        t = leaky_relu(t @ q, 0.5)
    return t @ layers[-1]


def colored_mnist(
    images: Float[Tensor, "n ..."], digits: Int[Tensor, " n"], agreement: float, *,
    variant: str = "lacim", side: int | None = None, generator: torch.Generator,
) -> Colored:  # fmt: skip
    """Colour digits by class in one of two definitions that must not be mixed.

    =========== ============================== =====================================
    variant     ``lacim``                      ``irm``
    =========== ============================== =====================================
    y           0 for 0-4, 1 for 5-9           the same, then flipped with 25 %
    colour      the class, ``agreement`` of    the *noisy* label, ``agreement`` of
                the time                       the time
    pixels      green or red of height 0.8,    all in the colour's channel
                noise of 0.02 a channel
    image       3 channels, 28 or 14 wide      2 channels, 14 wide
    best shape  about 0.99                     0.75
    =========== ============================== =====================================

    Parameters
    ----------
    images
        Grey digits in [0, 1], shape ``(n, 28, 28)`` or ``(n, 1, 28, 28)``.
    digits
        Their classes, 0 to 9.
    agreement
        Probability that the colour is that of the class (``lacim``), or of the noisy label.
    variant
        ``"lacim"`` or ``"irm"``. Only the first is an instance of LaCIM's structural model: in the
        second the colour is a child of Y.
    side
        28 unless given for ``lacim``, where 14 averages 2 x 2 pixels; 14 for ``irm``, which takes
        every second pixel.
    generator
        Draws labels, colours and noise.

    Returns
    -------
    Colored

    Raises
    ------
    ValueError
        For images of another shape or range, digits outside 0-9, an unknown variant or side.

    Source: M. Arjovsky et al., Invariant Risk Minimization, arXiv:1907.02893, section 5.2; the
    released code of LaCIM for the other. Curriculum: L1, L6.
    """
    name = "colored_mnist"
    _check.one_of(name, "variant", variant, ("lacim", "irm"))
    _check.in_range(name, "agreement", agreement)
    sides = (28, 14) if variant == "lacim" else (14,)
    _check.one_of(name, "side", side or sides[0], sides)
    grey = images[:, None] if images.ndim == 3 else images
    _check.shape(name, "images", grey, ("n", 1, 28, 28))
    _check.shape(name, "digits", digits, (len(images),))
    _check.in_range(name, "pixel", float(grey.min()))
    _check.in_range(name, "pixel", float(grey.max()))
    _check.in_range(name, "digit", float(digits.min()), 0, 9)
    _check.in_range(name, "digit", float(digits.max()), 0, 9)
    n, device = len(grey), generator.device
    flips, keeps = torch.rand(2, n, generator=generator, device=device).to(grey.device)
    y = (digits >= 5).long()
    if variant == "irm":
        y = torch.where(flips < 0.25, 1 - y, y)
        grey = grey[:, :, ::2, ::2]
    elif side == 14:
        grey = avg_pool2d(grey, 2)
    colour = torch.where(keeps < agreement, y, 1 - y)
    if variant == "irm":
        return Colored(grey * torch.eye(2).to(grey)[colour][:, :, None, None], y, colour)
    paint = torch.tensor([[0.0, 0.8, 0.0], [0.8, 0.0, 0.0]]).to(grey)[colour]  # green 0, red 1
    noise = torch.randn(n, 3, generator=generator, device=device).to(grey)
    return Colored(grey * (paint + 0.02 * noise).clamp(0, 1)[:, :, None, None], y, colour)


def mean_correlation_coefficient(
    truth: Float[Tensor, "n dim"], guess: Float[Tensor, "n dim"], domain: Tensor | None = None
) -> float:
    """Return how well latents match up to order, sign and scale: 1 is perfect.

    The mean of abs(Pearson correlation) over the pairs of the best one-to-one matching.

    Parameters
    ----------
    truth, guess
        Latents of the same examples.
    domain
        With it, correlations are taken *within* each domain and averaged before the matching. The
        pooled score, without, is high as soon as the guess knows the domain.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If a latent does not vary (in some domain), so that it has no correlation.

    Source: A. Hyvärinen and H. Morioka, arXiv:1605.06336, for the score. Curriculum: L5.

    Examples
    --------
    >>> truth = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 4.0]])
    >>> mean_correlation_coefficient(truth, -3 * truth.flip(1))
    1.0
    """
    name = "mean_correlation_coefficient"
    _check.shape(name, "guess", guess, tuple(truth.shape))
    groups = [slice(None)] if domain is None else [domain == d for d in domain.unique()]
    pairs = [(truth[rows], guess[rows]) for rows in groups]
    matrix = torch.stack([_correlations(a, b) for a, b in pairs]).mean(dim=0)
    _check.finite(name, "the correlations (a latent is constant)", matrix)
    rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
    return round(float(matrix[rows, columns].mean()), 12)


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Return abs(Pearson) of all pairs of columns."""
    a, b = (t.detach().double().cpu() for t in (a, b))
    both = [(t - t.mean(dim=0)) / (t - t.mean(dim=0)).norm(dim=0) for t in (a, b)]
    return (both[0].T @ both[1]).abs()
