"""What every loader returns."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Shaped

from coursekit import _check

if TYPE_CHECKING:
    import torch

Tier = Literal["subset", "full"]
Task = Literal["classification", "regression"]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """A data set, split into what may be learned from and what is only for the test.

    Inputs are images ``(n, channels, height, width)`` or table rows ``(n, features)``, targets are
    int64 classes counted from 0 or real numbers, ``(n,)``. The rest says what the data are:
    ``target_names`` names the classes, or the one real target, ``feature_names`` a table's columns.
    """

    x_train: Float[np.ndarray, " train *features"]
    y_train: Shaped[np.ndarray, " train"]
    x_test: Float[np.ndarray, " test *features"]
    y_test: Shaped[np.ndarray, " test"]
    name: str
    tier: Tier
    task: Task
    target_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()
    licence: str = ""
    citation: str = ""

    def __post_init__(self):
        _check.shape("Split", "x_test", self.x_test, ("n", *self.x_train.shape[1:]))
        _check.shape("Split", "y_train", self.y_train, (len(self.x_train),))
        _check.shape("Split", "y_test", self.y_test, (len(self.x_test),))

    def __repr__(self):
        what = f"{len(self.target_names)} classes" if self.task == "classification" else self.task
        sizes = f"train {self.x_train.shape}, test {self.x_test.shape}"
        return f"Split({self.name}, {self.tier}: {sizes}, {what})"

    def tensors(
        self, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]":
        """Copy to torch: ``x_train, y_train, x_test, y_test``.

        Inputs and real targets get ``dtype``, float32 unless given; classes stay int64. Real
        targets come as columns ``(n, 1)``, the shape of a network's output: subtracting ``(n,)``
        from that would broadcast to ``(n, n)`` without a word.

        Examples
        --------
        >>> from coursekit import data
        >>> x, y, _, _ = data.load("diabetes").tensors()
        >>> x.shape, y.shape, y.dtype
        (torch.Size([353, 10]), torch.Size([353, 1]), torch.float32)
        """
        import torch

        def inputs(x):
            return torch.tensor(x, dtype=dtype or torch.float32, device=device)

        def targets(y):
            if self.task == "regression":
                return inputs(y)[:, None]
            return torch.tensor(y, dtype=torch.int64, device=device)

        x_train, x_test = inputs(self.x_train), inputs(self.x_test)
        return x_train, targets(self.y_train), x_test, targets(self.y_test)

    def standardized(self) -> "Split":
        """Give every feature mean 0 and variance 1 over the *training* rows.

        The test rows get the training rows' shift and scale, so nothing about them leaks. A feature
        that never varies in training is only shifted.
        """
        x = self.x_train
        mean = x.mean(axis=0, dtype=np.float64).astype(x.dtype)
        std = x.std(axis=0, dtype=np.float64).astype(x.dtype)
        std[x.max(axis=0) == x.min(axis=0)] = 1  # rounding may leave their computed std above 0
        return dataclasses.replace(
            self, x_train=(x - mean) / std, x_test=(self.x_test - mean) / std
        )
