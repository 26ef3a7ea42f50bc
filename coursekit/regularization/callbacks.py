"""Which weights to keep: the best epoch's, or an average over training."""

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from coursekit import _check, train


class EarlyStopping:
    """Stop when the loss on held-out rows has not fallen for ``patience`` epochs; keep the best.

    A callback of `train.fit`. What it watches is the *test* part of the `data.Split` that is
    trained on, so that part must be validation rows: to stop by the rows that are reported is to
    fit them.

    Parameters
    ----------
    patience
        Epochs without a new lowest loss after which training ends, at least 1.

    Attributes
    ----------
    best_epoch, best_loss
        Of the lowest loss so far, epochs counted from 0.

    Raises
    ------
    ValueError
        For a patience below 1.

    Convention: a new run of `train.fit` starts it afresh.

    Source: I. Goodfellow, Y. Bengio and A. Courville, Deep Learning (2016), algorithm 7.1.
    Curriculum: R5.

    Examples
    --------
    >>> stop, model, history = EarlyStopping(patience=2), nn.Linear(1, 1), train.History()
    >>> for loss in (3.0, 1.0, 2.0, 1.5):
    ...     history.test.append(train.Score(loss, None))
    ...     print(stop(model, history))
    False
    False
    False
    True
    >>> stop.best_epoch, stop.best_loss
    (1, 1.0)
    """

    def __init__(self, patience: int):
        _check.integer("EarlyStopping", "patience", patience, at_least=1)
        self.patience = patience
        self.best_epoch, self.best_loss = -1, math.inf
        self._state: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module, history: train.History) -> bool:
        """Look at the last score; return whether to end."""
        epoch, loss = len(history.test) - 1, history.test[-1].loss
        if epoch == 0 or not self._state or loss < self.best_loss:
            self.best_epoch, self.best_loss = epoch, loss
            self._state = {name: value.clone() for name, value in model.state_dict().items()}
        return epoch - self.best_epoch >= self.patience

    def restore_(self, model: nn.Module) -> None:
        """Put the weights and buffers of the best epoch back; `RuntimeError` before the first."""
        if not self._state:
            raise RuntimeError("EarlyStopping.restore_: expected an epoch to go back to, got none")
        model.load_state_dict(self._state)


class WeightAverage:
    """Average the weights that training passes through.

    w̄ ← w̄ + γ_n (w - w̄), with n counted from 1 and

    - γ_n = 1/n: the uniform mean (stochastic weight averaging), if there is no ``decay``;
    - γ_n = (1 - d) / (1 - dⁿ): the exponential mean, in which the i-th weights count ∝ d^(n-i).

    Parameters
    ----------
    decay
        d in [0, 1), or None.

    Attributes
    ----------
    count
        n, how many weights are in.

    Raises
    ------
    ValueError
        For a decay outside [0, 1).

    Convention: the exponential mean is Adam's, begun at zero and divided by 1 - dⁿ. The one of
    `torch.optim.swa_utils` begins at the first weights instead, which then count dⁿ too much:
    torch's = (1 - dⁿ) w̄ + dⁿ w₁.

    Source: P. Izmailov et al., arXiv:1803.05407, algorithm 1; D. Kingma and J. Ba,
    arXiv:1412.6980, section 3. Curriculum: R8.

    Examples
    --------
    >>> model, average = nn.Linear(1, 1, bias=False), WeightAverage()
    >>> for weight in (1.0, 2.0, 6.0):
    ...     _ = nn.init.constant_(model.weight, weight)
    ...     average.update(model)
    >>> average.copy_to_(model)
    >>> model.weight.item()
    3.0
    """

    def __init__(self, decay: float | None = None):
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"WeightAverage: expected decay in [0, 1) or None, got {decay}")
        self.decay, self.count = decay, 0
        self._mean = torch.empty(0)

    @torch.no_grad()
    def update(self, model: nn.Module, history: object = None) -> None:
        """Take the model's weights in.

        Fit for `train.fit` as ``after_step``, each step, and among ``callbacks``, each epoch.

        Parameters
        ----------
        model
            With as many parameters as before, all finite, else `ValueError` and nothing is taken.
        history
            Not looked at.
        """
        w = parameters_to_vector(model.parameters())
        _check.finite("WeightAverage.update", "the weights", w)
        if not self.count:
            self._mean = w.clone()
        _check.shape("WeightAverage.update", "the weights", w, (len(self._mean),))
        self.count += 1
        d, n = self.decay, self.count
        self._mean.lerp_(w, 1 / n if d is None else (1 - d) / (1 - d**n))

    @torch.no_grad()
    def copy_to_(
        self, model: nn.Module, x: Float[Tensor, "n ..."] | None = None, *, batch_size: int = 1000
    ) -> None:
        """Put the average into a model, and make its batch norm fit to it.

        Parameters
        ----------
        model
            With the parameters that were averaged.
        x
            Training inputs, needed if a module has running statistics: those are of activations
            under the last weights, not the averaged ones. They become the means over the batches of
            ``x``, all else being in evaluation mode; every module's mode is left as it was.
        batch_size
            Of those batches.

        Raises
        ------
        ValueError
            Without ``x`` where it is needed, and for other parameters than those averaged.
        RuntimeError
            Before the first `update`.
        """
        if not self.count:
            raise RuntimeError("WeightAverage.copy_to_: expected an update before, got none")
        twin = copy.deepcopy(model).eval()  # what fails below leaves the model as it was
        w = parameters_to_vector(twin.parameters())
        _check.shape("WeightAverage.copy_to_", "the weights", w, (len(self._mean),))
        vector_to_parameters(self._mean.clone(), twin.parameters())
        norms: list[Any] = [m for m in twin.modules() if hasattr(m, "running_mean")]
        norms = [norm.train() for norm in norms if norm.running_mean is not None]
        if norms and x is None:
            raise ValueError("WeightAverage.copy_to_: expected x to refresh batch norm, got None")
        for k, batch in enumerate(() if x is None else x.split(batch_size), start=1):
            for norm in norms:
                norm.momentum = 1 / k  # running statistics become the mean over the batches
            twin(batch)
        model.load_state_dict(twin.state_dict())
