"""Six ways to learn from several domains, one contract: ``update(minibatches)``, ``predict(x)``.

Every method is ERM plus terms that vanish at weight 0, on the same backbone: at weight 0, with the
same seeds and batches, it *is* ERM. ``minibatches`` holds one batch ``(x, y)`` a domain, all of one
size and always in the same order.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from coursekit import _check, models
from coursekit.lacim import parts
from coursekit.lacim.model import Batch, descend, stacked
from coursekit.lacim.parts import Inputs

Table = Float[Tensor, "*batch dim"]


def irm_penalty(logits: Float[Tensor, "n classes"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return (d/dw mean cross-entropy of w · logits at w = 1)², differentiable, in closed form.

    The derivative is mean_i (Σ_k p_ik logit_ik - logit_i,y_i), so nothing is differentiated twice.

    Source: M. Arjovsky et al., arXiv:1907.02893, equation (IRMv1). Curriculum: L6.
    """
    expected = (logits.softmax(dim=-1) * logits).sum(dim=-1)
    return (expected - logits.gather(-1, y[:, None])[:, 0]).mean() ** 2


def mmd(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> Float[Tensor, ""]:
    """Return the squared maximum mean discrepancy of two samples under seven Gaussian kernels.

    mean k(a, a') + mean k(b, b') - 2 mean k(a, b), k = mean over γ = 10⁻³, …, 10³ of
    exp(-γ ‖·‖²); the biased estimate, which is 0 for equal samples. Curriculum: L6.
    """
    gammas = 10.0 ** torch.arange(-3, 4)

    def kernel(p, q):
        square = ((p[:, None] - q) ** 2).sum(dim=-1, keepdim=True)
        return (-gammas.to(p) * square).exp().mean()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


def gaussian_kl(
    mean: Table, log_std: Table, other_mean: Table, other_log_std: Table
) -> Float[Tensor, "*batch"]:
    """Return KL(N(m, σ²) ‖ N(m', σ'²)) in nats, summed over independent coordinates.

    Parameters
    ----------
    mean, log_std, other_mean, other_log_std
        Of the first and of the second Gaussian.

    Returns
    -------
    Tensor

    Curriculum: L6.
    """
    ratio = 2 * (log_std - other_log_std)
    far = ((mean - other_mean) * (-other_log_std).exp()) ** 2
    return 0.5 * (ratio.exp() + far - 1 - ratio).sum(dim=-1)


def _reverse(f: Tensor, weight: float) -> Tensor:
    """Return f, through which gradients pass back multiplied by -weight."""
    return f.detach() + weight * (f.detach() - f)


class ERM(nn.Module):
    """Empirical risk minimisation: the mean over domains of the cross-entropy.

    Parameters
    ----------
    shape
        Of one input, ``(features,)`` or ``(channels, height, width)``.
    domains, classes
        Training domains; classes.
    features
        Makes the network that all methods share; `backbone` unless given.
    width
        Its features f(x), read by a ReLU and a linear layer.
    lr, l2
        Of Adam, which is ``self.optimizer``; weight of Σ‖w‖² in the loss.
    generator
        Draws weights, those that ERM has before all others, then the noise of training.

    Raises
    ------
    ValueError
        From ``update``, for another number of batches than domains, or batches of several sizes.
    RuntimeError
        From ``update``, at a loss that is not finite, before a parameter has changed.

    Source: I. Gulrajani and D. Lopez-Paz, In Search of Lost Domain Generalization,
    arXiv:2007.01434, for the contract. Curriculum: L6.
    """

    def __init__(
        self, shape, *, domains, classes=2, features=None, width=64, lr=1e-3, l2=0.0, generator
    ):
        super().__init__()
        _check.integer("ERM", "domains", domains, at_least=1)
        self.shape, self.domains, self.classes, self.width = shape, domains, classes, width
        self.lr, self.l2, self.generator, self.steps = lr, l2, generator, 0
        self.make_features = features or parts.backbone(shape, width)
        self.features = self.make_features(generator=generator)
        head = models.mlp([width, classes], generator=generator)
        self.classifier = nn.Sequential(nn.ReLU(), head)
        self._adam()

    def _adam(self) -> None:
        """Let Adam begin anew, with all that a method has beside ERM's parts."""
        self.optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)

    def penalties(self, x, y, domain, f, logits) -> dict[str, Tensor]:
        """Return the terms that a method adds, each already multiplied by its weight."""
        return {}

    def update(self, minibatches: Sequence[Batch]) -> dict[str, float]:
        """Take one step on one batch from each domain, in order; return the terms of the loss."""
        x, y, domain = stacked(type(self).__name__, minibatches, self.domains)
        f = self.features(x)
        logits = self.classifier(f)
        terms = {"class": cross_entropy(logits, y)}  # batches of one size: the mean over domains
        terms |= self.penalties(x, y, domain, f, logits)
        if self.l2:
            terms["l2"] = self.l2 * sum((w**2).sum() for w in self.parameters())
        self.steps += 1
        return descend(self, terms)

    def classify(self, x: Inputs) -> Float[Tensor, "batch classes"]:
        """Return logits, through which gradients pass."""
        return self.classifier(self.features(x))

    @torch.no_grad()
    def predict(self, x: Inputs) -> Float[Tensor, "batch classes"]:
        """Return logits."""
        return self.classify(x)


class IRM(ERM):
    """Invariant risk minimisation: ERM + weight · mean over domains of `irm_penalty`.

    Parameters
    ----------
    weight, anneal
        The weight is min(1, ``weight``) for the first ``anneal`` steps, then ``weight``, and Adam
        begins anew.
    options
        As in `ERM`.

    Source: M. Arjovsky et al., arXiv:1907.02893, (IRMv1). Curriculum: L6.
    """

    def __init__(self, shape, *, weight=100.0, anneal=0, **options):
        super().__init__(shape, **options)
        self.weight, self.anneal = weight, anneal

    def penalties(self, x, y, domain, f, logits):
        """IRMv1."""
        if self.steps == self.anneal > 0:
            self._adam()
        pairs = zip(logits.chunk(self.domains), y.chunk(self.domains), strict=True)
        weight = self.weight if self.steps >= self.anneal else min(1.0, self.weight)
        return {"irm": weight * torch.stack([irm_penalty(*pair) for pair in pairs]).mean()}


class DANN(ERM):
    """Domain-adversarial training: features from which a discriminator cannot tell the domain.

    min over f, g and max over h of CE_y - ``weight`` · CE_d(h(f(x))), by gradient reversal: h
    always descends its own CE_d.

    Parameters
    ----------
    weight, hidden
        Of the reversed gradient; units of the discriminator's two hidden layers.
    options
        As in `ERM`.

    Source: Y. Ganin et al., arXiv:1505.07818, section 4. Curriculum: L6.
    """

    def __init__(self, shape, *, weight=1.0, hidden=64, **options):
        super().__init__(shape, **options)
        self.weight = weight
        sizes = [self.width, hidden, hidden, self.domains]
        self.discriminator = models.mlp(sizes, generator=self.generator)
        self._adam()

    def penalties(self, x, y, domain, f, logits):
        """Cross-entropy of the discriminator."""
        return {"domain": cross_entropy(self.discriminator(_reverse(f, self.weight)), domain)}


class MMDAAE(ERM):
    """Adversarial autoencoder whose features have one law in all domains, a Laplace law.

    ERM + ``weight`` · (reconstruction · MSE + alignment · mean over pairs of domains of `mmd`),
    and a discriminator that tells features from Laplace(0, 1) draws, by gradient reversal with
    ``weight`` · adversarial.

    Parameters
    ----------
    weight, reconstruction, alignment, adversarial
        Common factor, and those of the three terms.
    hidden
        Units of the hidden layers of decoder and discriminator.
    options
        As in `ERM`.

    Source: H. Li et al., Domain Generalization with Adversarial Feature Learning, CVPR 2018;
    settings of its public ports. Curriculum: L6.
    """

    def __init__(
        self, shape, *, weight=1.0, reconstruction=0.1, alignment=2.0, adversarial=0.1, hidden=128,
        **options,
    ):  # fmt: skip
        super().__init__(shape, **options)
        self.weights = weight * reconstruction, weight * alignment, weight * adversarial
        g = self.generator
        self.decoder = parts.make_decoder("generic", self.width, 0, shape, hidden, generator=g)
        self.discriminator = models.mlp([self.width, hidden, 1], generator=g)
        self._adam()

    def penalties(self, x, y, domain, f, logits):
        """Reconstruction, alignment, and the discriminator's loss."""
        reconstruction, alignment, adversarial = self.weights
        error = self.decoder.squared_error(x, f, f[:, :0]).mean() / math.prod(self.shape)
        pairs = list(combinations(f.chunk(self.domains), 2))
        apart = sum((mmd(a, b) for a, b in pairs), f.sum() * 0) / max(1, len(pairs))
        u = torch.rand(f.shape, generator=self.generator, device=self.generator.device).to(f) - 0.5
        laplace = -u.sign() * torch.log1p(-2 * u.abs()).clamp(min=-20)
        told = self.discriminator(torch.cat([laplace, _reverse(f, adversarial)]))[:, 0]
        real = torch.arange(len(told), device=f.device) < len(f)
        return {
            "reconstruction": reconstruction * error,
            "mmd": alignment * apart,
            "adversarial": binary_cross_entropy_with_logits(told, real.to(f)),
        }


def _sample(mean: Tensor, log_std: Tensor, generator: torch.Generator) -> Tensor:
    eps = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
    return mean + log_std.exp() * eps


class DIVA(ERM):
    """Domain-invariant variational autoencoder: latents for domain, class and the rest.

    ERM on the mean of q(z_y|x), plus ``weight`` times, a number a pixel,
    -log p(x|z_d, z_x, z_y) + β [KL to p(z_d|d), N(0, I), p(z_y|y)], plus ``weight`` · 0.57 · CE_d
    from z_d.

    Parameters
    ----------
    weight, beta
        Of the generative part, and of the divergences in it.
    latent, hidden
        Size of z_d and of z_x (z_y has the backbone's width); units of the decoder's hidden layers.
    options
        As in `ERM`.

    Convention: the class is read from the mean of z_y in training too, not from a draw, so that
    weight 0 is ERM; CE_d : CE_y is the authors' 2000 : 3500. z_d and z_x share an encoder.
    The conditional priors are tables, without batch normalization; β does not rise with time.

    Source: M. Ilse et al., DIVA, arXiv:1905.10427, equation 5. Curriculum: L6.
    """

    def __init__(self, shape, *, weight=1.0, beta=1.0, latent=16, hidden=128, **options):
        super().__init__(shape, **options)
        self.weight, self.beta = weight, beta
        g, sizes = self.generator, (self.width, 2 * latent)
        self.prior_d = nn.Parameter(torch.zeros(2, self.domains, latent))
        self.prior_y = nn.Parameter(torch.zeros(2, self.classes, self.width))
        self.log_scale_x = parts.starting_log_scale(shape)
        self.spread_y = models.mlp([self.width, self.width], generator=g)
        rest = models.mlp([self.width, 4 * latent], generator=g)
        self.rest = nn.Sequential(self.make_features(generator=g), nn.ReLU(), rest)
        self.decoder = parts.make_decoder("generic", *sizes, shape, hidden, generator=g)
        head = models.mlp([latent, self.domains], generator=g)
        self.domain_head = nn.Sequential(nn.ReLU(), head)
        self._adam()

    def penalties(self, x, y, domain, f, logits):
        """The generative part and the domain's cross-entropy."""
        (d_mean, d_log_std, *other), pixels = self.rest(x).chunk(4, dim=1), math.prod(self.shape)
        q_d, q_y = (d_mean, d_log_std), (f, self.spread_y(f.relu()))
        z_d, z_x, z_y = (_sample(m, s, self.generator) for m, s in (q_d, other, q_y))
        kl = gaussian_kl(*q_d, *self.prior_d[:, domain]) + gaussian_kl(*q_y, *self.prior_y[:, y])
        kl = kl + gaussian_kl(*other, *torch.zeros_like(torch.stack(other)))
        error = self.decoder.squared_error(x, z_y, torch.cat([z_d, z_x], dim=1))
        nats = parts.gaussian_nll(error, self.log_scale_x, pixels) + self.beta * kl
        told = cross_entropy(self.domain_head(z_d), domain)
        terms = {"generative": nats.mean() / pixels, "domain": 0.57 * told}
        return {name: self.weight * term for name, term in terms.items()}


class SVAE(ERM):
    """Supervised variational autoencoder: one latent z that draws x and tells y, N(0, I) a priori.

    ERM on the mean of q(z|x), plus ``weight`` · (-log p(x|z) + ``beta`` · KL) a pixel.
    `infer_latents` takes it too, so it can be had with LaCIM's test-time optimisation.

    Parameters
    ----------
    weight, beta
        Of the generative part, and of the divergence in it.
    decoder, hidden
        A name that `LaCIM` knows; z stands for both s and v in it. Units of hidden layers.
    options
        As in `ERM`.

    Convention: the class is read from the mean of z in training too, so that weight 0 is ERM.

    Source: C. Liu et al., arXiv:2011.01681, for the baseline. Curriculum: L6.
    """

    def __init__(self, shape, *, weight=1.0, beta=1.0, decoder="generic", hidden=128, **options):
        super().__init__(shape, **options)
        self.weight, self.beta, self.latent, self.s_dim = weight, beta, self.width, self.width
        self.log_scale_x = parts.starting_log_scale(shape)
        g = self.generator
        self.spread = models.mlp([self.width, self.width], generator=g)
        sizes = self.width, self.width
        self.decoder = parts.make_decoder(decoder, *sizes, shape, hidden, generator=g)
        self._adam()

    def penalties(self, x, y, domain, f, logits):
        """The negative evidence bound, a pixel."""
        log_std = self.spread(f.relu())
        z = _sample(f, log_std, self.generator)
        zero = torch.zeros_like(f)
        nats = self.beta * gaussian_kl(f, log_std, zero, zero) - self.log_likelihood(x, z)
        return {"generative": self.weight * nats.mean() / math.prod(self.shape)}

    def log_likelihood(self, x, t):
        """Return log p(x|z), in nats."""
        error = self.decoder.squared_error(x, t, t)
        return -parts.gaussian_nll(error, self.log_scale_x, math.prod(self.shape))

    def candidates(self, x, noise):
        """Return the mean of q(z|x) moved by every row of standard noise."""
        f = self.features(x)
        return f + self.spread(f.relu()).exp() * noise[:, None]
