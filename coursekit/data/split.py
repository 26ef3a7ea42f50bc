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

    Attributes
    ----------
    x_train, x_test
        Inputs, one row an example: images ``(n, channels, height, width)`` or table rows
        ``(n, features)``.
    y_train, y_test
        Targets ``(n,)``: int64 classes counted from 0, or real numbers.
    name, tier
        Which data, and whether all of it: ``"subset"`` or ``"full"``.
    task
        ``"classification"`` or ``"regression"``.
    target_names, feature_names
        Names of the classes (for regression: of the one target) and of a table's columns.
    licence, citation
        On what terms the data may be used, and whom to thank.

    Raises
    ------
    ValueError
        If inputs and targets differ in length, or training and test rows in shape.
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
        return (
            f"Split({self.name}, {self.tier}: train {self.x_train.shape}, "
            f"test {self.x_test.shape}, {what})"
        )

    def tensors(
        self, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]":
        """Copy to torch: ``x_train, y_train, x_test, y_test``.

        Parameters
        ----------
        device
            Where the tensors shall be.
        dtype
            Of inputs and real targets; float32 unless given. Classes are int64 always.

        Returns
        -------
        tuple of Tensor
            Real targets come as columns ``(n, 1)``, the shape of a network's output: subtracting
            ``(n,)`` from ``(n, 1)`` would broadcast to ``(n, n)`` without a word.

        Examples
        --------
        >>> from coursekit import data
        >>> x, y, _, _ = data.load("diabetes").tensors()
        >>> x.shape, y.shape, y.dtype
        (torch.Size([353, 10]), torch.Size([353, 1]), torch.float32)
        """
        import torch

        real = torch.float32 if dtype is None else dtype

        def inputs(x):
            return torch.tensor(x, dtype=real, device=device)

        def targets(y):
            if self.task == "regression":
                return inputs(y)[:, None]
            return torch.tensor(y, dtype=torch.int64, device=device)

        return (
            inputs(self.x_train),
            targets(self.y_train),
            inputs(self.x_test),
            targets(self.y_test),
        )

    def standardized(self) -> "Split":
        """Give every feature mean 0 and variance 1 over the *training* rows.

        The test rows get the training rows' shift and scale, so nothing about them leaks. A feature
        that never varies in training is only shifted.

        Examples
        --------
        >>> from coursekit import data
        >>> wine = data.load("wine").standardized()
        >>> bool(np.allclose(wine.x_train.std(axis=0), 1)), bool(abs(wine.x_test.mean()) < 0.1)
        (True, True)
        """
        x = self.x_train
        mean = x.mean(axis=0, dtype=np.float64).astype(x.dtype)
        std = x.std(axis=0, dtype=np.float64).astype(x.dtype)
        std[x.max(axis=0) == x.min(axis=0)] = 1  # rounding may leave their computed std above 0
        return dataclasses.replace(
            self, x_train=(x - mean) / std, x_test=(self.x_test - mean) / std
        )
