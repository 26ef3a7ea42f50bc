"""What is done with a new x whose domain nobody knows: candidates, ascent, three predictions."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coursekit import _check, models


class Inference(NamedTuple):
    """Latents of examples before and after the ascent.

    ``amortised`` has the log-probabilities of the heads' means, ``(batch, classes)``; ``initial``
    the best candidate and ``optimised`` the best iterate, ``(batch, latent)``; ``before`` and
    ``after`` their objectives in nats, ``(batch,)``, of which the second is never the smaller.
    """

    amortised: Tensor
    initial: Tensor
    optimised: Tensor
    before: Tensor
    after: Tensor


def latent_gaussian(
    model: Any, x: Float[Tensor, "n ..."], *, draws: int = 8, generator: torch.Generator
) -> tuple[Float[Tensor, " latent"], Float[Tensor, "latent latent"]]:
    """Fit a Gaussian to what all heads propose for training examples: a prior without a domain.

    s and v are independent in it: their correlation is what the confounder of the training domains
    made, and would carry colour from v into every part of s that the image leaves open.

    Parameters
    ----------
    model, x
        A trained model and training inputs.
    draws, generator
        Samples a head and example, so that the spread of q counts too; what draws them.

    Returns
    -------
    mean, precision
        The prior term of `infer_latents`.
    """
    _check.integer("latent_gaussian", "draws", draws, at_least=2)
    noise = torch.randn(draws, model.latent, generator=generator, device=generator.device).to(x)
    with torch.no_grad():
        t = torch.cat([model.candidates(rows, noise).flatten(0, 1) for rows in x.split(1000)])
    is_s = torch.arange(model.latent, device=x.device) < model.s_dim
    cov = torch.cov(t.T).reshape(model.latent, -1) * (is_s == is_s[:, None])
    return t.mean(dim=0), torch.linalg.inv(cov + 1e-4 * torch.eye(model.latent).to(x))


def infer_latents(
    model: Any, x: Float[Tensor, "n ..."], *, prior: tuple[Tensor, Tensor] | None = None,
    steps: int = 50, lr: float = 0.1, draws: int = 4, starts: int = 2, batch_size: int = 500,
    generator: torch.Generator | None = None,
) -> Inference:  # fmt: skip
    """Find s, v of examples of an unknown domain: maximise log p(x|s, v) - ½ (t-m)ᵀ P (t-m).

    1. Every training domain's head proposes its mean and ``draws`` samples.
    2. The ``starts`` candidates that reconstruct x best are kept, for each example.
    3. Each is optimised by Adam, and the iterate with the highest objective is kept.

    The objective is *summed* over examples, so each is solved as if it were alone, and the noise of
    step 1 is one draw for all: results depend neither on the batch size nor on the other examples,
    up to rounding. No label is seen.

    Parameters
    ----------
    model
        `LaCIM` or `SVAE`: has ``candidates``, ``log_likelihood`` and ``predict``.
    x
        Examples, one after the other.
    prior
        Mean m and precision P, as from `latent_gaussian`; no prior term unless given.
    steps, lr
        Of Adam; the rate falls to zero along a cosine. No step returns the candidates.
    draws, starts
        Samples a head, and candidates that are optimised.
    batch_size
        Bounds the memory.
    generator
        Needed when ``draws`` is not 0; `TypeError` without.

    Returns
    -------
    Inference

    Convention: the released code averages the objective over batch and pixels, which scales down
    the gradient of the likelihood but not the penalty; its steps then hardly move.

    Source: X. Sun et al., NeurIPS 2021, inference; L. Schott et al., arXiv:1805.09190, for the
    style. Curriculum: L4.
    """
    _check.integer("infer_latents", "steps", steps, at_least=0)
    _check.integer("infer_latents", "starts", starts, at_least=1)
    if draws and generator is None:
        raise TypeError("infer_latents: expected a generator to draw candidates from, got None")
    noise = torch.zeros(1 + draws, model.latent).to(x)
    if generator is not None:
        draw = torch.randn(draws, model.latent, generator=generator, device=generator.device)
        noise[1:] = draw.to(x)
    found = [_solve(model, part, prior, steps, lr, starts, noise) for part in x.split(batch_size)]
    return Inference(*(torch.cat(column) for column in zip(*found, strict=True)))


def _solve(model, x, prior, steps, lr, starts, noise) -> Inference:
    def objective(t):
        value = model.log_likelihood(x, t)
        if prior is None:
            return value
        off = t - prior[0]
        return value - 0.5 * ((off @ prior[1]) * off).sum(dim=-1)

    with torch.no_grad():
        found = model.candidates(x, noise)  # (heads · (1 + draws), batch, latent)
        kept = model.log_likelihood(x, found).topk(min(starts, len(found)), dim=0).indices
        t = found.gather(0, kept.unsqueeze(-1).expand(-1, -1, found.shape[-1]))
        best_value, best = objective(t), t.clone()
    initial, before = best[0].clone(), best_value[0].clone()
    t.requires_grad_(True)
    adam = torch.optim.Adam([t], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1))
    for step in range(steps + 1 if steps else 0):
        value = objective(t)
        with torch.no_grad():
            better = value > best_value
            best = torch.where(better.unsqueeze(-1), t, best)
            best_value = torch.where(better, value, best_value)
        if step < steps:
            t.grad = -torch.autograd.grad(value.sum(), t)[0]
            adam.step()
            schedule.step()
    after, winner = best_value.max(dim=0)
    optimised = best[winner, torch.arange(len(x), device=x.device)]
    return Inference(model.predict(x), initial, optimised, before, after)


def refit_head(
    model: Any, t: Float[Tensor, "n latent"], y: Shaped[Tensor, " n"], *, hidden: int = 64,
    steps: int = 300, lr: float = 1e-2, weight_decay: float = 1e-4, generator: torch.Generator,
) -> nn.Module:  # fmt: skip
    """Fit a new p(y|s) on latents that were inferred for *training* images as for new ones.

    Parameters
    ----------
    model
        Says how many of the latents are s; it is not changed.
    t, y
        ``infer_latents(model, x_train, ...).optimised`` and the training labels.
    hidden
        Units of the hidden layer; 0 for logistic regression.
    steps, lr, weight_decay
        Of AdamW on all examples at once, the rate falling to zero along a cosine.
    generator
        Draws the head's weights.

    Returns
    -------
    nn.Module
        Maps s to logits.

    Curriculum: L4.
    """
    _check.shape("refit_head", "y", y, (len(t),))
    s = t[:, : model.s_dim].detach()
    sizes = [model.s_dim, *([hidden] if hidden else []), int(y.max()) + 1]
    head = models.mlp(sizes, generator=generator).to(s)
    adam = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        adam.zero_grad()
        cross_entropy(head(s), y).backward()
        adam.step()
        schedule.step()
    return head


@torch.no_grad()
def predictions(model: Any, inference: Inference, head: nn.Module | None = None) -> dict:
    """Return log-probabilities ``amortised``, ``initial``, ``optimised``, always apart.

    Parameters
    ----------
    model, inference
        A model and what `infer_latents` found with it.
    head
        From `refit_head`: adds ``refit``, which it reads off the optimised latents.

    Returns
    -------
    dict of Tensor
        Each of shape ``(n, classes)``.
    """
    s, s_new = (t[:, : model.s_dim] for t in (inference.initial, inference.optimised))
    logits = {"initial": model.classifier(s), "optimised": model.classifier(s_new)}
    logits |= {} if head is None else {"refit": head(s_new)}
    logs = {name: out.log_softmax(dim=-1) for name, out in logits.items()}
    return {"amortised": inference.amortised} | logs


def saliency(model: Any, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Return abs(∂ margin / ∂x): how much each entry of x moves the lead of the predicted class.

    The margin is the highest less the second highest output of ``model.classify``, for methods of
    this room the differentiable form of ``predict``. Curriculum: L7.
    """
    x = x.detach().clone().requires_grad_(True)
    first, second = model.classify(x).topk(2, dim=-1).values.unbind(dim=-1)
    return torch.autograd.grad((first - second).sum(), x)[0].abs()
