"""Resampling, voting, averaging, and what members get wrong alone and together."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor
from torch.nn.functional import one_hot

from coursekit import _check


def bootstrap_indices(
    n: int, members: int, *, size: int | None = None, generator: torch.Generator
) -> Int[Tensor, "members size"]:
    """Draw for each member a sample of rows, with replacement.

    Parameters
    ----------
    n
        Rows there are.
    members
        Samples to draw, K.
    size
        Rows of a sample; n unless given.
    generator
        Draws them, on its device.

    Returns
    -------
    Tensor of shape (members, size)
        Row numbers from 0 to n - 1. Of a sample of size n, a share 1 - (1 - 1/n)ⁿ → 1 - 1/e of the
        n rows is expected to be there, some of them more than once.

    Raises
    ------
    ValueError
        When n, members or size is below 1.

    Source: L. Breiman, Bagging Predictors, Machine Learning 24 (1996), section 1. Curriculum: B2.

    Examples
    --------
    >>> bootstrap_indices(5, 2, generator=torch.Generator().manual_seed(0))
    tensor([[4, 4, 3, 0, 3],
            [4, 2, 3, 2, 3]])
    """
    size = n if size is None else size
    for name, value in (("n", n), ("members", members), ("size", size)):
        _check.integer("bootstrap_indices", name, value, at_least=1)
    return torch.randint(n, (members, size), generator=generator, device=generator.device)


def out_of_bag(indices: Int[Tensor, "members size"], n: int) -> Bool[Tensor, "members n"]:
    """Return which of n rows each member's sample has missed.

    A row is a test row for every member that has not seen it. Handed as ``where`` to
    `majority_vote` or `average_probabilities`, the mask makes an ensemble predict each of its
    training rows by the members that did not learn it.

    Parameters
    ----------
    indices
        Row numbers, one sample a row, as `bootstrap_indices` returns.
    n
        Rows there are.

    Returns
    -------
    Tensor of shape (members, n)
        True where the row is not in the sample.

    Raises
    ------
    ValueError
        For an empty sample, or row numbers outside 0 … n - 1.

    Source: L. Breiman, Out-of-Bag Estimation, technical report, Berkeley (1996). Curriculum: B4.

    Examples
    --------
    >>> out_of_bag(torch.tensor([[0, 0, 2]]), 4)
    tensor([[False,  True, False,  True]])
    """
    _check.shape("out_of_bag", "indices", indices, ("members", "size"))
    _check.integer("out_of_bag", "n", n, at_least=1)
    if indices.numel() == 0:
        raise ValueError(f"out_of_bag: expected samples that hold rows, got {(*indices.shape,)}")
    _in_range("out_of_bag", "indices", indices, n)
    missed = torch.ones(len(indices), n, dtype=torch.bool, device=indices.device)
    return missed.scatter_(1, indices.long(), False)


def majority_vote(
    labels: Integer[Tensor, "members n"],
    classes: int,
    *,
    where: Bool[Tensor, "members n"] | None = None,
) -> Int[Tensor, " n"]:
    """Return for each example the label that most members give; the lowest label in a tie.

    ŷ_i = min argmax_c Σ_k 1[labels_ki = c]

    Parameters
    ----------
    labels
        From 0 to classes - 1, one row a member.
    classes
        How many labels there are.
    where
        Who votes on what; everybody on everything unless given. `out_of_bag` makes one.

    Returns
    -------
    Tensor of shape (n,)

    Raises
    ------
    ValueError
        For no member, labels out of range, or an example on which nobody votes.

    Source: L. Breiman, Bagging Predictors, Machine Learning 24 (1996), section 2. Curriculum:
    B2.

    Examples
    --------
    >>> majority_vote(torch.tensor([[2, 0], [2, 1], [1, 3]]), 4)  # a tie of 0, 1 and 3
    tensor([2, 0])
    """
    _check.integer("majority_vote", "classes", classes, at_least=1)
    voters = _voters("majority_vote", "labels", labels, ("members", "n"), where)
    _in_range("majority_vote", "labels", labels, classes)
    counts = (one_hot(labels.long(), classes) * voters[..., None]).sum(dim=0)
    return counts.argmax(dim=1)  # the first of equal ones


def average_probabilities(
    probabilities: Float[Tensor, "members n classes"],
    *,
    where: Bool[Tensor, "members n"] | None = None,
) -> Float[Tensor, "n classes"]:
    """Return the mean over members of the probabilities they give to each class.

    P̄_ic = Σ_k w_ki P_kic / Σ_k w_ki

    Parameters
    ----------
    probabilities
        Not negative, with sum 1 over the classes.
    where
        Who is asked about what, w; everybody about everything unless given.

    Returns
    -------
    Tensor of shape (n, classes)

    Raises
    ------
    ValueError
        For no member, what are no probabilities (logits, say), or an example that nobody is asked
        about.

    Convention: scikit-learn's BaggingClassifier does this, not a vote, whenever its members give
    probabilities.

    Source: L. Breiman, Bagging Predictors, Machine Learning 24 (1996), section 6.1. Curriculum: B2.

    Examples
    --------
    >>> average_probabilities(torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]))
    tensor([[0.7500, 0.2500]])
    """
    name, shape = "average_probabilities", ("members", "n", "classes")
    voters = _voters(name, "probabilities", probabilities, shape, where)[..., None]
    off = (probabilities.sum(dim=-1) - 1).abs().max().item()
    if not (off < 1e-3 and probabilities.min() >= 0):  # NaN included
        raise ValueError(
            f"{name}: expected probabilities, not negative with sum 1, got sums off by {off:.2g}"
        )
    return (probabilities * voters).sum(dim=0) / voters.sum(dim=0)


def _in_range(function: str, name: str, x: Tensor, stop: int) -> None:
    if x.min() < 0 or x.max() >= stop:
        raise ValueError(
            f"{function}: expected {name} from 0 to {stop - 1}, got {x.min()} to {x.max()}"
        )


def _voters(function: str, name: str, x: Tensor, shape: Any, where: Tensor | None) -> Tensor:
    """Return the mask of who is asked, after checking that somebody is."""
    _check.shape(function, name, x, shape)
    if x.numel() == 0:
        raise ValueError(f"{function}: expected at least one member and example, got {(*x.shape,)}")
    if where is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    _check.shape(function, "where", where, tuple(x.shape[:2]))
    silent = int((~where.any(dim=0)).sum())
    if silent:
        raise ValueError(
            f"{function}: expected where to name a member for each of {x.shape[1]} examples, "
            f"got none for {silent}"
        )
    return where


class ErrorCovariance(NamedTuple):
    """Squared error of one member, and the mean product of two members' errors."""

    v: float
    c: float


def error_covariance(errors: Float[Tensor, "members n ..."]) -> ErrorCovariance:
    """Measure how much members get wrong alone, v, and together, c.

    v = E[‖ε_k‖²],  c = E[ε_j · ε_k], j ≠ k

    The means are over examples, and over members or pairs of different members; c is at most v. For
    members with independent training samples, c estimates the squared bias and v - c the variance,
    both without a bias of their own.

    Parameters
    ----------
    errors
        Prediction minus target. Of shape ``(members, n)`` for a number; for a classifier
        ``(members, n, classes)``, probability minus one-hot label: v is then its Brier score.

    Returns
    -------
    ErrorCovariance

    Raises
    ------
    ValueError
        For fewer than two members, or no example.

    Source: A. Krogh and J. Vedelsby, NeurIPS 1994, section 2, in other letters. Curriculum: B1, B3.

    Examples
    --------
    >>> error_covariance(torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
    ErrorCovariance(v=3.0, c=2.0)
    """
    _check.shape("error_covariance", "errors", errors, ("members", "n", ...))
    k, n = errors.shape[:2]
    if k < 2 or n < 1:
        raise ValueError(
            f"error_covariance: expected two members or more, and examples, got {(*errors.shape,)}"
        )
    own = errors.square().sum().item() / n
    all_pairs = errors.sum(dim=0).square().sum().item() / n  # K² products, K of them j = k
    return ErrorCovariance(own / k, (all_pairs - own) / (k * (k - 1)))


def expected_ensemble_error(v: float, c: float, members: int) -> float:
    """Return the squared error of an average of K members.

    E[((1/K) Σ_k ε_k)²] = v / K + (K - 1) / K · c

    Parameters
    ----------
    v, c
        As `error_covariance` measures them, on other members than those it is to predict: for the
        same ones this is an identity.
    members
        K, at least 1.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For K below 1, or c that no errors with this v have: ``|c| > v``.

    Source: I. Goodfellow, Y. Bengio and A. Courville, Deep Learning (2016), section 7.11.
    Curriculum: B3.

    Examples
    --------
    >>> [expected_ensemble_error(1.0, 0.5, k) for k in (1, 2, 10)]
    [1.0, 0.75, 0.55]
    """
    _check.integer("expected_ensemble_error", "members", members, at_least=1)
    if not abs(c) <= v < math.inf:
        raise ValueError(f"expected_ensemble_error: expected |c| <= v, got v = {v}, c = {c}")
    return v / members + (members - 1) / members * c
