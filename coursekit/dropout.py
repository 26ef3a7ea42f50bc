"""Dropout: a random part of a network at each step of training, the average of all parts after it.

``dropout Dropout``                     inverted dropout: the mean is kept while training
``all_masks mask_probabilities``        every thinned network of a layer, and how likely it is
``geometric_mean_probabilities``        the ensemble that weight scaling computes
``mc_predict entropy_decomposition``    the ensemble by sampling, and how far its members disagree
``linear_dropout_penalty``              what dropout adds to the loss of a linear model
``linear_dropout_minimizer``            and where that loss is lowest
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coursekit import _check


def _drop_probability(function: str, p: float) -> None:
    if not 0 <= p < 1:  # NaN included
        raise ValueError(f"{function}: expected p in [0, 1), got {p}")


def dropout(
    x: Float[Tensor, "*shape"], p: float, *, generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Set each entry to zero with probability p, and divide the others by 1 - p.

    x̃ = x ⊙ m / (1 - p),  m_i = 0 with probability p, else 1, independently

    E[x̃] = x and E[x̃²] = x² / (1 - p): the mean stays, the second moment grows.

    Parameters
    ----------
    x
        Of any shape, in floating point. Each entry has a mask bit of its own, so each example of a
        batch sees another thinned network.
    p
        Probability of dropping, in [0, 1). With p = 0 nothing is drawn.
    generator
        Draws the mask. Its device need not be that of ``x``, so one CPU generator gives one mask on
        every device, and in every precision.

    Returns
    -------
    Tensor of the shape of x
        A new tensor, or ``x`` itself when p = 0.

    Raises
    ------
    ValueError
        For p outside [0, 1).
    TypeError
        For integers, which cannot hold x / (1 - p).

    Convention: p is torch's probability of *dropping*; in the paper p is the probability of
    keeping, the mask is not divided by it, and the weights are multiplied by it after training.
    Torch also takes p = 1 and returns zeros; no factor gives those the mean of x.

    Source: N. Srivastava et al., Dropout, JMLR 15 (2014), section 4, with the scale of section 10.
    Curriculum: D1.

    Examples
    --------
    >>> dropout(torch.ones(2, 4), 0.5, generator=torch.Generator().manual_seed(0))
    tensor([[0., 2., 0., 0.],
            [0., 2., 0., 2.]])
    """
    _drop_probability("dropout", p)
    if not torch.is_floating_point(x):
        raise TypeError(f"dropout: expected x in floating point, got {x.dtype}")
    if p == 0:
        return x
    kept = torch.rand(x.shape, generator=generator, device=generator.device) >= p
    return x * (kept.to(x) / (1 - p))


class Dropout(nn.Module):
    """`dropout` while training, nothing in evaluation.

    It has a random stream of its own, so that dropping does not reorder anything else and a run can
    be repeated. A copy by `copy.deepcopy` continues the stream from the same state.

    Parameters
    ----------
    p
        Probability of dropping, in [0, 1); `ValueError` otherwise.
    generator
        Draws the masks, a new one at each call. Its state is not part of ``state_dict``.

    Curriculum: D1.

    Examples
    --------
    >>> layer = Dropout(0.5, generator=torch.Generator().manual_seed(0))
    >>> layer(torch.ones(4)), layer.eval()(torch.ones(4))
    (tensor([0., 2., 0., 0.]), tensor([1., 1., 1., 1.]))
    """

    def __init__(self, p: float = 0.5, *, generator: torch.Generator):
        super().__init__()
        _drop_probability("Dropout", p)
        self.p, self.generator = p, generator

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `dropout` of x in training mode, and x itself in evaluation mode."""
        return dropout(x, self.p, generator=self.generator) if self.training else x

    def extra_repr(self) -> str:
        """Return what stands between the parentheses of ``repr``."""
        return f"p={self.p}"


def all_masks(n: int) -> Bool[Tensor, "masks n"]:
    """Return every subset of n units that dropout can keep, of shape ``(2**n, n)``.

    Row k has the binary digits of k, the last digit first, so row 0 keeps nothing. `ValueError` for
    n below 1 or above 20, where the masks would no longer fit.

    Curriculum: D2.

    Examples
    --------
    >>> all_masks(2).int().tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    _check.integer("all_masks", "n", n, at_least=1)
    if n > 20:
        raise ValueError(f"all_masks: expected n of at most 20, as it makes 2^n masks, got {n}")
    return (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2 == 1


def mask_probabilities(masks: Bool[Tensor, "masks n"], p: float) -> Float[Tensor, " masks"]:
    """Return how likely dropout with probability p draws each mask.

    P(m) = (1 - p)^k p^(n - k) for a mask that keeps k of n units

    In float64; `ValueError` for p outside [0, 1). Over the rows of `all_masks` it sums to 1.

    Source: D. Warde-Farley et al., arXiv:1312.6197. Curriculum: D2.

    Examples
    --------
    >>> mask_probabilities(all_masks(2), 0.25).tolist()
    [0.0625, 0.1875, 0.1875, 0.5625]
    """
    _drop_probability("mask_probabilities", p)
    kept = masks.sum(dim=1).double()
    return (1 - p) ** kept * p ** (masks.shape[1] - kept)


def geometric_mean_probabilities(
    logits: Float[Tensor, "members batch classes"],
    weights: Float[Tensor, " members"] | None = None,
) -> Float[Tensor, "batch classes"]:
    """Average the predictions of an ensemble geometrically, and normalize.

    P(y) = Π_k P_k(y)^{w_k} / Σ_{y'} Π_k P_k(y')^{w_k},  P_k = softmax(logits_k)

    Over all masks of one softmax layer, each with its probability, this is the layer with its
    weights multiplied by 1 - p: weight scaling is exact there. In a deeper net it is not.

    Parameters
    ----------
    logits
        What each member says before its softmax, shape ``(members, batch, classes)``.
    weights
        Shape ``(members,)``, not negative, with sum 1; all equal unless given.

    Returns
    -------
    Tensor of shape (batch, classes)
        Rows sum to 1.

    Raises
    ------
    ValueError
        For another shape, no member, or weights that are negative or do not sum to 1.

    Source: P. Baldi and P. Sadowski, Understanding Dropout, NeurIPS 2013; N. Srivastava et al.,
    JMLR 15 (2014), section 7.5. Curriculum: D2.

    Examples
    --------
    >>> two = torch.tensor([[[0.8, 0.2]], [[0.5, 0.5]]]).log()
    >>> geometric_mean_probabilities(two)
    tensor([[0.6667, 0.3333]])
    """
    name = "geometric_mean_probabilities"
    _check.shape(name, "logits", logits, ("members", "batch", "classes"))
    if len(logits) == 0:
        raise ValueError(f"{name}: expected at least one member, got none")
    if weights is None:
        weights = logits.new_full((len(logits),), 1 / len(logits))
    _check.shape(name, "weights", weights, (len(logits),))
    total = weights.sum().item()
    if not (weights.min() >= 0 and abs(total - 1) < 1e-4):
        raise ValueError(f"{name}: expected weights not negative with sum 1, got sum {total:.6g}")
    log_mean = torch.einsum("m,mbc->bc", weights.to(logits), logits.log_softmax(dim=-1))
    return log_mean.softmax(dim=-1)


@torch.no_grad()
def mc_predict(
    model: nn.Module, x: Float[Tensor, "batch ..."], samples: int
) -> Float[Tensor, "samples batch ..."]:
    """Run a network several times with its dropout on, and everything else in evaluation mode.

    Each run draws a thinned network for each example. The mean of ``softmax`` over the first axis
    is the Monte Carlo average of their predictions; its error falls like 1/√samples. (The mean of
    the outputs, put through one softmax, estimates their geometric mean.)

    Parameters
    ----------
    model
        With at least one `Dropout`. The mode of every module is left as it was.
    x
        A batch of inputs.
    samples
        Runs, at least 1.

    Returns
    -------
    Tensor of shape (samples, batch, ...)
        The outputs, without a graph.

    Raises
    ------
    ValueError
        When the model has no `Dropout`: all samples would be equal.

    Convention: ``torch.nn.Dropout`` is not switched on; it draws from the global random state.

    Source: Y. Gal and Z. Ghahramani, arXiv:1506.02142, eq. 6. Curriculum: D2, D4.

    Examples
    --------
    >>> net = nn.Sequential(Dropout(0.5, generator=torch.Generator().manual_seed(0)))
    >>> mc_predict(net, torch.ones(1, 1), 4).flatten()
    tensor([0., 2., 0., 0.])
    """
    _check.integer("mc_predict", "samples", samples, at_least=1)
    modes = [(module, module.training) for module in model.modules()]
    if not any(isinstance(module, Dropout) for module, _ in modes):
        raise ValueError("mc_predict: expected a model with coursekit.dropout.Dropout, got none")
    try:
        for module, _ in modes:
            module.training = isinstance(module, Dropout)
        return torch.stack([model(x) for _ in range(samples)])
    finally:
        for module, was_training in modes:
            module.training = was_training


class Entropies(NamedTuple):
    """What an ensemble doubts, in nats an example: total = expected + mutual_information."""

    total: Tensor
    expected: Tensor
    mutual_information: Tensor


def entropy_decomposition(logits: Float[Tensor, "members batch classes"]) -> Entropies:
    """Split the entropy of an averaged prediction into what each member doubts and the rest.

    H[P̄] = (1/K) Σ_k H[P_k] + I,  P̄ = (1/K) Σ_k P_k,  P_k = softmax(logits_k)

    The mutual information I is how much the members disagree; it is 0 where all say the same.

    Parameters
    ----------
    logits
        Shape ``(members, batch, classes)``, as `mc_predict` returns or from an ensemble.

    Returns
    -------
    Entropies
        Three tensors of shape ``(batch,)``.

    Source: N. Houlsby et al., arXiv:1112.5745, eq. 2. Curriculum: D4.

    Examples
    --------
    >>> opposed = torch.tensor([[[99.0, 0.0]], [[0.0, 99.0]]])
    >>> [round(h.item(), 4) for h in entropy_decomposition(opposed)]
    [0.6931, 0.0, 0.6931]
    """
    _check.shape("entropy_decomposition", "logits", logits, ("members", "batch", "classes"))
    each = logits.softmax(dim=-1)
    total = torch.special.entr(each.mean(dim=0)).sum(dim=-1)
    expected = torch.special.entr(each).sum(dim=-1).mean(dim=0)
    return Entropies(total, expected, total - expected)


def linear_dropout_penalty(
    x: Float[Tensor, "n features"], w: Float[Tensor, " features"], p: float
) -> Float[Tensor, ""]:
    """Return what dropping the inputs of a linear model adds to its mean squared loss.

    (1/n) E_m‖y - X̃ w‖² = (1/n)‖y - X w‖² + p / (1 - p) Σ_j s_j w_j²,  s_j = (1/n) Σ_i x_ij²

    Parameters
    ----------
    x
        Inputs, one row an example; X̃ is `dropout` of them.
    w
        Weights; the penalty is differentiable by them and does not depend on the targets.
    p
        Probability of dropping, in [0, 1).

    Returns
    -------
    Tensor of shape ()

    Raises
    ------
    ValueError
        For p outside [0, 1) or shapes that do not fit.

    Convention: mean over the examples, no factor ½, weights in the scale in which they predict. The
    paper sums, keeps with probability p, and has p w in place of w.

    Source: N. Srivastava et al., Dropout, JMLR 15 (2014), section 9.1; S. Wager, S. Wang and P.
    Liang, arXiv:1307.1493. Curriculum: D4.

    Examples
    --------
    >>> x, w = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([3.0, 1.0])
    >>> linear_dropout_penalty(x, w, 0.5)  # 1 · (1 · 9 + 2 · 1)
    tensor(11.)
    """
    _drop_probability("linear_dropout_penalty", p)
    _check.shape("linear_dropout_penalty", "x", x, ("n", "features"))
    _check.shape("linear_dropout_penalty", "w", w, (x.shape[1],))
    return p / (1 - p) * (x.square().mean(dim=0) @ w.square())


def linear_dropout_minimizer(
    x: Float[Tensor, "n features"], y: Float[Tensor, " n"], p: float
) -> Float[Tensor, " features"]:
    """Return the weights that minimize the mean squared loss under dropout of the inputs.

    ((1/n) XᵀX + p / (1 - p) diag(s)) w = (1/n) Xᵀy,  s_j = (1/n) Σ_i x_ij²

    For features of one second moment s this is ridge regression with strength p s / (1 - p).

    Parameters
    ----------
    x, y
        Inputs, one row an example, and targets; there is no intercept, so center both.
    p
        Probability of dropping, in [0, 1). With p = 0 it is least squares.

    Returns
    -------
    Tensor of shape (features,)
        Solved as least squares with one more row a feature, which does not square the condition.

    Raises
    ------
    ValueError
        For p outside [0, 1) or shapes that do not fit.

    Source: N. Srivastava et al., Dropout, JMLR 15 (2014), section 9.1. Curriculum: D4.

    Examples
    --------
    >>> x, y = torch.tensor([[2.0], [2.0]]), torch.tensor([4.0, 4.0])
    >>> [round(linear_dropout_minimizer(x, y, p).item(), 4) for p in (0.0, 0.5, 0.75)]
    [2.0, 1.0, 0.5]
    """
    _drop_probability("linear_dropout_minimizer", p)
    _check.shape("linear_dropout_minimizer", "x", x, ("n", "features"))
    _check.shape("linear_dropout_minimizer", "y", y, (x.shape[0],))
    root = (p / (1 - p) * x.square().sum(dim=0)).sqrt()
    rows = torch.cat([x, root.diag()])
    target = torch.cat([y, y.new_zeros(x.shape[1])])
    return torch.linalg.lstsq(rows, target[:, None]).solution[:, 0]
