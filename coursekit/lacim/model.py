"""`LaCIM`, its evidence bound `elbo`, its priors and its decoders.

Latents t = (s, v) are stacked, s first. A domain has a number, and numbers come one an example.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from coursekit import _check, models
from coursekit.lacim import parts
from coursekit.lacim.parts import Domain, Inputs, Latents, Nats

Batch = tuple[Tensor, Tensor]
Samples = Float[Tensor, "samples batch"]


def elbo(
    log_y: Samples, log_x: Samples, log_prior: Samples, log_q: Samples, *, class_weight: float = 1.0
) -> Float[Tensor, " batch"]:
    """Estimate LaCIM's evidence lower bound from M samples t_i of q^d(s, v | x), in log space.

    ::

        w_i = softmax_i log p(y|s_i),    log q(y|x) = logsumexp_i log p(y|s_i) - log M
        L = log q(y|x) + Σ_i w_i [log p(x|t_i) + log p^d(t_i) - log q^d(t_i|x)]

    Parameters
    ----------
    log_y, log_x, log_prior, log_q
        log p(y|s_i), log p(x|s_i, v_i), log p^d(s_i, v_i), log q^d(s_i, v_i | x), in nats, all at
        the same samples. Gradients flow through the weights.
    class_weight
        Multiplies log q(y|x); 1 is the bound itself.

    Returns
    -------
    Tensor
        L, in nats, to be maximised; its mean is at most log p^d(x, y), for every M.

    Convention: with M = 1 every weight is 1, so L is cross-entropy, reconstruction and KL added up.
    That is what the authors' released code optimises (there averaged over pixels and latents).

    Source: C. Liu et al., Learning Causal Semantic Representation for Out-of-Distribution
    Prediction, arXiv:2011.01681, for the form; X. Sun et al., Recovering Latent Causal Factor for
    Generalization to Distributional Shifts, NeurIPS 2021, for LaCIM. Curriculum: L3.

    Examples
    --------
    >>> two = torch.tensor([[0.9], [0.1]]).log()
    >>> zero = torch.zeros(2, 1)
    >>> elbo(two, torch.tensor([[-1.0], [-5.0]]), zero, zero)  # log 0.5 - 0.9 - 0.5
    tensor([-2.0931])
    """
    weights = log_y.softmax(dim=0)
    log_label = log_y.logsumexp(dim=0) - math.log(len(log_y))
    inner = log_x + log_prior - log_q
    return class_weight * log_label + (weights * inner).sum(dim=0)


class LaCIM(nn.Module):
    """Latent causal invariant model: p(x|s, v) and p(y|s) shared, p^d(s, v) and q^d of the domain.

    Parameters
    ----------
    shape
        Of one input: ``(features,)``, or ``(channels, height, width)`` with values in [0, 1].
    domains, outputs
        Training domains; classes, or the dimensions of a real y.
    s_dim, v_dim
        Sizes of S, from which alone y is read, and of V. Without V (0) it is a supervised VAE.
    decoder
        ``linear``: a matrix, and the encoder is one too; ``generic``: a perceptron of s and v;
        ``paint``, ``film``: see `Paint`, the latter with four maps.
    prior
        See `DomainPrior`.
    samples
        M of `elbo`. One is what the released code does.
    class_weight
        Of log q(y|x) in the objective.
    full_posterior
        Correlated latents in q^d(s, v | x), by one matrix a domain. For few latents.
    features
        Makes the encoder's shared part; `backbone` unless given.
    width, hidden
        Features that come out of it; units of hidden layers in decoder and label head.
    lr
        Of Adam, which is ``self.optimizer``.
    generator
        Draws weights, then all noise of training.

    Raises
    ------
    ValueError
        For an unknown decoder or prior, or inputs and domains that do not fit.

    Convention: log p(x|s, v) is Gaussian with one learned scale, summed over the entries of x.
    There is no batch normalization, and none over domains in particular. `predict` is the
    amortised prediction; `inference.infer_latents` gives the optimised one.

    Source: X. Sun et al., Recovering Latent Causal Factor for Generalization to Distributional
    Shifts, NeurIPS 2021. Curriculum: L3, L4.
    """

    def __init__(
        self, shape, *, domains, outputs=2, s_dim=16, v_dim=2, decoder="paint", prior="table",
        samples=1, class_weight=1.0, full_posterior=False, features=None, width=64, hidden=128,
        lr=1e-3, generator,
    ):  # fmt: skip
        super().__init__()
        _check.integer("LaCIM", "domains", domains, at_least=1)
        _check.integer("LaCIM", "samples", samples, at_least=1)
        self.shape, self.domains, self.s_dim, self.latent = shape, domains, s_dim, s_dim + v_dim
        self.samples, self.class_weight, self.generator = samples, class_weight, generator
        linear = decoder == "linear"
        made: Any = nn.Identity() if linear else (features or parts.backbone(shape, width))
        self.features: Any = made if linear else nn.Sequential(made(generator=generator), nn.ReLU())
        heads = [shape[0] if linear else width, 2 * domains * self.latent]
        self.heads: Any = models.mlp(heads, generator=generator)
        with torch.no_grad():  # at the start σ is about 1, whatever x
            weight = next(self.heads.parameters())
            weight.unflatten(0, (domains, 2, self.latent))[:, 1] = 0
        head = [s_dim, *([] if linear else [hidden]), outputs]
        self.classifier = models.mlp(head, generator=generator)
        self.prior = parts.DomainPrior(prior, domains, s_dim, v_dim, generator=generator)
        self.decoder = parts.make_decoder(decoder, s_dim, v_dim, shape, hidden, generator=generator)
        square = torch.zeros(domains, self.latent, self.latent)
        self.lower = nn.Parameter(square) if full_posterior else None
        self.log_scale_x = parts.starting_log_scale(shape)
        self.log_scale_y = nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def posterior(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation of q^d(z|x), each ``(batch, domains, latent)``."""
        _check.shape("LaCIM", "x", x, ("batch", *self.shape))
        out = self.heads(self.features(x)).unflatten(-1, (self.domains, 2, self.latent))
        return out[..., 0, :], out[..., 1, :]

    def _draw(self, posterior, domain, eps):
        """Return z = m + diag(σ) (I + A_d) ε, A_d strictly lower triangular, and log σ."""
        rows = torch.arange(len(domain), device=domain.device)
        mean, log_std = (table[rows, domain] for table in posterior)
        if self.lower is not None:
            eps = eps + (self.lower.tril(-1)[domain] @ eps.unsqueeze(-1)).squeeze(-1)
        return mean + log_std.exp() * eps, log_std

    def log_likelihood(self, x: Inputs, t: Latents) -> Nats:
        """Return log p(x|s, v), in nats, summed over the entries of x."""
        error = self.decoder.squared_error(x, t[..., : self.s_dim], t[..., self.s_dim :])
        return -parts.gaussian_nll(error, self.log_scale_x, math.prod(self.shape))

    def log_label(self, y: Shaped[Tensor, "batch ..."], s: Latents) -> Nats:
        """Return log p(y|s): categorical for integers, Gaussian with a learned scale for reals."""
        out = self.classifier(s)
        if y.is_floating_point():
            error = ((y - out) ** 2).sum(dim=-1)
            return -parts.gaussian_nll(error, self.log_scale_y, out.shape[-1])
        index = y.expand(out.shape[:-1]).unsqueeze(-1)
        return out.log_softmax(dim=-1).gather(-1, index).squeeze(-1)

    def bound(
        self, x: Inputs, y: Shaped[Tensor, "batch ..."], domain: Domain, samples: int | None = None
    ) -> Float[Tensor, " batch"]:
        """Return `elbo` of labelled examples of known domains, by ``samples`` reparametrised draws.

        The encoder runs once an example, whatever the number of samples.
        """
        for number in (int(domain.min()), int(domain.max())):
            _check.in_range("LaCIM", "domain", number, 0, self.domains - 1)
        shape = (samples or self.samples, len(x), self.latent)
        eps = torch.randn(shape, generator=self.generator, device=self.generator.device).to(x)
        z, log_std = self._draw(self.posterior(x), domain, eps)
        t = self.prior.transport(z, domain)
        log_y = self.log_label(y, t[..., : self.s_dim])
        log_q = parts.log_normal(eps, log_std)  # det(I + A) = 1
        terms = log_y, self.log_likelihood(x, t), self.prior.log_prob(z, domain), log_q
        return elbo(*terms, class_weight=self.class_weight)

    def update(self, minibatches: Sequence[Batch]) -> dict[str, float]:
        """Take one step on one batch from each domain, in order; return the loss it had."""
        x, y, domain = stacked("LaCIM", minibatches, self.domains)
        return descend(self, {"elbo": -self.bound(x, y, domain).mean()})

    def candidates(self, x: Inputs, noise: Float[Tensor, "draws latent"]) -> Latents:
        """Return (s, v) by every domain's head, at every row of standard noise."""
        posterior, found = self.posterior(x), []
        for d in range(self.domains):
            domain = torch.full((len(x),), d, device=x.device)
            z, _ = self._draw(posterior, domain, noise[:, None].expand(-1, len(x), -1))
            found.append(self.prior.transport(z, domain))
        return torch.cat(found)

    def classify(self, x: Inputs) -> Float[Tensor, "batch outputs"]:
        """Return amortised log-probabilities: p(y|s) averaged over the means of all heads."""
        t = self.candidates(x, torch.zeros(1, self.latent).to(x))
        logs = self.classifier(t[..., : self.s_dim]).log_softmax(dim=-1)
        return logs.logsumexp(dim=0) - math.log(self.domains)

    @torch.no_grad()
    def predict(self, x: Inputs) -> Float[Tensor, "batch outputs"]:
        """Return `classify`, without gradients."""
        return self.classify(x)


def stacked(function: str, minibatches: Sequence[Batch], domains: int) -> tuple:
    """Join batches of equal size into x, y and the number of the domain of each example."""
    sizes = [len(x) for x, _ in minibatches]
    if len(set(sizes)) != 1 or len(sizes) != domains:
        raise ValueError(f"{function}: expected {domains} batches of one size, got sizes {sizes}")
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    return x, y, torch.arange(domains, device=x.device).repeat_interleave(sizes[0])


def descend(model: Any, terms: dict[str, Tensor]) -> dict[str, float]:
    """Step ``model.optimizer`` down the sum of the terms, if finite; return all as numbers."""
    loss = torch.stack(list(terms.values())).sum()
    if not bool(loss.isfinite()):
        name = type(model).__name__
        raise RuntimeError(f"{name}: expected a finite loss, got {loss.item()}; lower the rate")
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    return {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}
