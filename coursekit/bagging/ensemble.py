"""All members of one architecture, trained at once."""

import copy
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from coursekit import _check
from coursekit.bagging.rules import _in_range
from coursekit.train import Loss

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
    >>> from coursekit import bagging, data, models, train
    >>> x, y, x_test, y_test = data.load("digits").tensors()
    >>> nets = [models.mlp([64, 16, 10], generator=train.generator(k, "init")) for k in range(4)]
    >>> ensemble, draw = Ensemble(nets), train.generator(0, "bootstrap")
    >>> rows = bagging.bootstrap_indices(len(x), 4, generator=draw)
    >>> adam = torch.optim.Adam(ensemble.parameters(), lr=0.01)
    >>> history = fit_members(ensemble, x, y, adam, 3, 32, rows=rows, generator=draw)
    >>> probabilities = bagging.average_probabilities(ensemble(x_test).softmax(dim=-1))
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
