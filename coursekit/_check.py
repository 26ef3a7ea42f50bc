"""Argument checks whose messages read ``"<function>: expected <argument> <what>, got <what>"``.

They look at attributes only, so NumPy arrays and torch tensors both pass and torch is not imported.
"""

import math
from collections.abc import Collection
from types import EllipsisType
from typing import Any

import numpy as np


def shape(function: str, name: str, x: Any, pattern: tuple[int | str | EllipsisType, ...]) -> None:
    """Refuse ``x`` unless its shape matches ``pattern``.

    Parameters
    ----------
    function, name
        Who asks, and about which argument: both stand in the message.
    x
        Anything with a ``shape``.
    pattern
        One entry a dimension. An integer asks for that size, a name for any size (the same one
        wherever the name comes back), and one ``...`` for any number of dimensions.

    Raises
    ------
    TypeError
        If ``x`` has no shape.
    ValueError
        If the shape does not match.

    Examples
    --------
    >>> shape("batch_norm", "x", np.zeros((8, 16, 4)), ("batch", 16, ...))
    >>> shape("batch_norm", "x", np.zeros((8, 12, 4)), ("batch", 16, ...))
    Traceback (most recent call last):
    ValueError: batch_norm: expected x of shape (batch, 16, ...), got (8, 12, 4)
    """
    if not hasattr(x, "shape"):
        raise TypeError(f"{function}: expected {name} as an array, got {type(x).__name__}")
    got = tuple(x.shape)
    wanted = list(pattern)
    if ... in wanted:
        hole = wanted.index(...)
        wanted[hole : hole + 1] = [f"dimension {i}" for i in range(len(got) - len(wanted) + 1)]
    sizes: dict[str, int] = {}
    if len(wanted) != len(got) or any(
        (sizes.setdefault(want, size) if isinstance(want, str) else want) != size
        for want, size in zip(wanted, got, strict=True)
    ):
        entries = ["..." if entry is ... else str(entry) for entry in pattern]
        tuple_text = f"({entries[0]},)" if len(entries) == 1 else f"({', '.join(entries)})"
        raise ValueError(f"{function}: expected {name} of shape {tuple_text}, got {got}")


def integer(function: str, name: str, value: Any, *, at_least: int | None = None) -> None:
    """Refuse what is no integer (`TypeError`) or is smaller than ``at_least`` (`ValueError`)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{function}: expected {name} as an integer, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{function}: expected {name} of at least {at_least}, got {value}")


def positive(function: str, name: str, value: float) -> None:
    """Refuse a number that is not above zero, infinity and NaN included."""
    if not 0 < value < math.inf:
        raise ValueError(f"{function}: expected {name} positive and finite, got {value}")


def in_range(function: str, name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside the closed interval from ``low`` to ``high``."""
    if not low <= value <= high:
        raise ValueError(f"{function}: expected {name} in [{low}, {high}], got {value}")


def probability(function: str, name: str, value: float) -> None:
    """Refuse a number outside [0, 1]."""
    in_range(function, name, value, 0, 1)


def one_of(function: str, name: str, value: Any, options: Collection) -> None:
    """Refuse a value that is not among ``options``."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{function}: expected {name} to be one of {listed}, got {value!r}")


def finite(function: str, name: str, x: Any) -> None:
    """Refuse an array or tensor that holds infinity or NaN."""
    bad = ~((x - x) == 0)  # inf - inf and nan - nan are nan, in NumPy and in torch
    if bad.any():
        raise ValueError(f"{function}: expected {name} finite, got {int(bad.sum())} bad values")
