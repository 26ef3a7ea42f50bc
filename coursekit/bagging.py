"""Ensembles: many models instead of one, how to make them differ, and what their average is worth.

``bootstrap_indices out_of_bag``         samples with replacement, and the rows each one missed
``majority_vote average_probabilities``  two ways to one answer
``error_covariance``                     what members get wrong, alone and together
``expected_ensemble_error``              what the average of any number of them then gets wrong
``Ensemble fit_members``                 all members of one architecture trained at once
"""

import copy
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, one_hot

from coursekit import _check
from coursekit.train import Loss


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

    The means are over examples, and over members or pairs of different members; |c| ≤ v. For
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


# Layers that need no vmap, as a leading axis of members passes through them; for perceptrons of
# such layers its bookkeeping would take a third of the time.
DIRECT = {nn.Linear, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.Identity, nn.Dropout}


class Ensemble(nn.Module):
    """Members of one architecture whose weights are stacked, so that all run and learn at once.

    f_k(x) = f(x; W_k),  W of shape (K, ...)

    Where a member has a matrix product the ensemble has a batch of K; the number of calls is that
    of one member. Each member's output and gradient depend on its own weights only, so with an
    optimizer that treats every entry alike (SGD, Adam) it is the K members trained one by one. One
    that looks at all parameters together, such as a clipped global norm, would couple them.

    Parameters
    ----------
    members
        Modules with the same submodules, shapes, precision, device and mode; their weights are
        copied. What neither ``repr`` nor a tensor shows, they must have in common too.

    Raises
    ------
    ValueError
        For no member, or members of different architecture; the message says where they differ.
    TypeError
        For what is no module.

    Convention: as in torch, a parameter is named as in a member, after the prefix ``stacked.``, and
    has K as its first axis. A random layer such as ``nn.Dropout`` draws for each member by itself.

    Source: the interface of torch.func (``vmap`` of ``functional_call``). Curriculum: B5.

    Examples
    --------
    >>> from coursekit import models, train
    >>> nets = [models.mlp([4, 8, 3], generator=train.generator(k, "init")) for k in range(5)]
    >>> ensemble = Ensemble(nets)
    >>> ensemble(torch.zeros(2, 4)).shape, ensemble(torch.zeros(5, 2, 4), separate=True).shape
    (torch.Size([5, 2, 3]), torch.Size([5, 2, 3]))
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        if not len(members):
            raise ValueError("Ensemble: expected at least one member, got none")
        for k, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"Ensemble: expected members as modules, got {member!r}")
            for first, other in zip_longest(_outline(members[0]), _outline(member)):
                if first != other:
                    raise ValueError(
                        f"Ensemble: expected members of one architecture, got {first!r} in "
                        f"member 0 and {other!r} in member {k}"
                    )
        states = [_state(member) for member in members]
        stack = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.stacked = _copy_with(members[0], stack)
        self.members = len(members)

    def forward(
        self, x: Shaped[Tensor, "..."], *, separate: bool = False
    ) -> Shaped[Tensor, "members batch ..."]:
        """Return what each member says, of shape ``(members, batch, ...)``.

        Every member sees the whole of x, of shape ``(batch, ...)``; or, with ``separate``, its own
        part of x, of shape ``(members, batch, ...)``, `ValueError` for another length.
        """
        if separate:
            _check.shape("Ensemble", "x", x, (self.members, "batch", ...))
        layers = _layers(self.stacked)
        if x.ndim == 2 + separate and {type(layer) for layer in layers} <= DIRECT:
            x = x if separate else x.expand(self.members, *x.shape)
            for layer in layers:
                x = _linear(layer, x) if isinstance(layer, nn.Linear) else layer(x)
            return x

        def run(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.stacked, state, (x,))

        every = vmap(run, in_dims=(0, 0 if separate else None), randomness="different")
        return every(_state(self.stacked), x)

    def member(self, k: int) -> nn.Module:
        """Return a copy of member k by itself, counted from 0; `ValueError` if there is none."""
        _check.integer("Ensemble.member", "k", k, at_least=0)
        if k >= self.members:
            raise ValueError(f"Ensemble.member: expected k below {self.members}, got {k}")
        return _copy_with(self.stacked, {name: t[k] for name, t in _state(self.stacked).items()})


def _layers(module: nn.Module) -> list[nn.Module]:
    if type(module) is nn.Sequential:
        return [layer for part in module for layer in _layers(part)]
    return [module]


def _linear(
    layer: nn.Linear, x: Float[Tensor, "members batch n"]
) -> Float[Tensor, "members batch m"]:
    """Multiply each member's batch by its own weights: K products in one call."""
    if layer.bias is None:
        return torch.bmm(x, layer.weight.mT)
    return torch.baddbmm(layer.bias[:, None], x, layer.weight.mT)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _outline(module: nn.Module) -> list[str]:
    """Return all that members must have in common, a line each."""
    tensors = [f"{n}: {(*t.shape,)} {t.dtype} {t.device}" for n, t in _state(module).items()]
    return [str(type(module)), *repr(module).splitlines(), *tensors, f"{module.training=}"]


def _copy_with(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Copy a module with other tensors in place of its own; those it shares stay shared."""
    replacements: dict[int, Any] = {}
    for name, old in _state(module).items():
        new = state[name].detach().clone()
        learned = isinstance(old, nn.Parameter)
        replacements[id(old)] = nn.Parameter(new, old.requires_grad) if learned else new
    return copy.deepcopy(module, replacements)


def fit_members(
    ensemble: Ensemble,
    x: Shaped[Tensor, "n ..."],
    y: Shaped[Tensor, "n ..."],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    *,
    rows: Int[Tensor, "members size"] | None = None,
    generator: torch.Generator,
    loss: Loss = cross_entropy,
) -> list[float]:
    """Train all members in place, each on its own rows in its own order.

    L(W) = Σ_k L_k(W_k),  so  ∂L/∂W_k = ∂L_k/∂W_k

    Parameters
    ----------
    ensemble, x, y, optimizer
        All on one device; the optimizer has the ensemble's parameters.
    epochs, batch_size
        At least 1 each; a batch has this many rows *of each member*, the last what is left.
    rows
        Each member's training rows, as `bootstrap_indices` draws them; all of x unless given.
    generator
        Draws the orders; its device need not be that of x.
    loss
        Takes output and target, returns the mean over the batch.

    Returns
    -------
    list of float
        Loss of each epoch: mean over its batches and the members.

    Raises
    ------
    ValueError
        For no rows, row numbers that x does not have, or rows for another number of members.
    RuntimeError
        After the first epoch whose loss is not finite.

    Source: L. Breiman, Bagging Predictors, Machine Learning 24 (1996), section 1, for the rows.
    Curriculum: B5.

    Examples
    --------
    >>> from coursekit import data, models, train
    >>> x, y, x_test, y_test = data.load("digits").tensors()
    >>> nets = [models.mlp([64, 16, 10], generator=train.generator(k, "init")) for k in range(4)]
    >>> ensemble, draw = Ensemble(nets), train.generator(0, "bootstrap")
    >>> rows = bootstrap_indices(len(x), 4, generator=draw)
    >>> adam = torch.optim.Adam(ensemble.parameters(), lr=0.01)
    >>> history = fit_members(ensemble, x, y, adam, 3, 32, rows=rows, generator=draw)
    >>> probabilities = average_probabilities(ensemble(x_test).softmax(dim=-1))
    >>> bool((probabilities.argmax(dim=1) == y_test).double().mean() > 0.9)
    True
    """
    k = ensemble.members
    _check.integer("fit_members", "epochs", epochs, at_least=1)
    _check.integer("fit_members", "batch_size", batch_size, at_least=1)
    _check.shape("fit_members", "y", y, (len(x), ...))
    rows = torch.arange(len(x)).expand(k, -1) if rows is None else rows
    _check.shape("fit_members", "rows", rows, (k, "size"))
    if rows.numel() == 0:
        raise ValueError(f"fit_members: expected rows to train on, got {(*rows.shape,)}")
    _in_range("fit_members", "rows", rows, len(x))
    rows, history, was_training = rows.to(x.device), [], ensemble.training
    ensemble.train()
    try:
        for epoch in range(epochs):
            keys = torch.rand(rows.shape, generator=generator, device=generator.device)
            steps = rows.gather(1, keys.argsort(dim=1).to(x.device)).split(batch_size, dim=1)
            total = torch.zeros((), device=x.device)
            for batch in steps:  # (members, batch)
                output = ensemble(x[batch], separate=True)
                mean = loss(output.flatten(0, 1), y[batch].flatten(0, 1))
                optimizer.zero_grad()
                (k * mean).backward()  # the sum of the members' losses
                optimizer.step()
                total += mean.detach()
            history.append(total.item() / len(steps))
            if not math.isfinite(history[-1]):
                raise RuntimeError(
                    f"fit_members: expected a finite loss, got {history[-1]} in epoch {epoch}; "
                    "try a smaller learning rate"
                )
    finally:
        ensemble.train(was_training)
    return history
