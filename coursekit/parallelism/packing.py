"""Weights of a model as one flat vector, the form in which servers and messages know them."""

import copy
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coursekit import _check, train

Vector = Float[Tensor, "n"]


def pack(params: Mapping[str, Tensor]) -> Vector:
    """Return all parameters as one new vector, in the order of their sorted names."""
    return torch.cat([params[name].detach().reshape(-1) for name in sorted(params)])


def unpack(flat: Vector, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return views of a vector in the shapes of ``like``, in the order of its sorted names.

    Examples
    --------
    >>> params = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    >>> pack(params)
    tensor([0., 0., 1., 1., 1., 1., 1., 1.])
    >>> unpack(pack(params), params)["weight"].shape
    torch.Size([2, 3])
    """
    names = sorted(like)
    _check.shape("unpack", "flat", flat, (sum(like[name].numel() for name in names),))
    parts = flat.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that take part in training, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_(model: nn.Module, flat: Vector) -> nn.Module:
    """Write a vector into the trainable parameters of a model, in place, and return the model."""
    params = trainable(model)
    with torch.no_grad():
        for name, value in unpack(flat, params).items():
            params[name].copy_(value)
    return model


def score_on(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: train.Loss = cross_entropy
) -> Callable[[Vector], dict[str, float]]:
    """Return a function that maps packed weights to the loss and error of the model on (x, y).

    Parameters
    ----------
    model, x, y
        A copy of the model is evaluated; targets are classes.
    loss
        Takes output and target, returns the mean over the batch.

    Returns
    -------
    Callable
        Its dictionary has ``"loss"`` and ``"error"``, the share of wrong answers; what `simulate`
        and `launch` take as ``evaluate``.
    """
    own = copy.deepcopy(model)

    def evaluate(weights: Vector) -> dict[str, float]:
        score = train.evaluate(load_(own, weights), x, y, loss=loss)
        return {"loss": score.loss} | (
            {} if score.accuracy is None else {"error": 1 - score.accuracy}
        )

    return evaluate
