"""Argument checks whose messages read ``"<function>: expected <argument> <what>, got <what>"``.

They ask arrays for attributes only, so NumPy's and torch's both pass and torch is not imported.
"""

import math
from collections.abc import Collection
from types import EllipsisType
from typing import Any

import numpy as np


def shape(function: str, name: str, x: Any, pattern: tuple[int | str | EllipsisType, ...]) -> None:
    """Refuse what is no array (`TypeError`) or has another shape than ``pattern`` (`ValueError`).

    Parameters
    ----------
    function, name
        Who asks, and about which argument ``x``: both stand in the message.
    pattern
        One entry a dimension. An integer asks for that size, a name for any size (the same one
        wherever the name comes back), and one ``...`` for any number of dimensions.

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
        text = ", ".join("..." if entry is ... else str(entry) for entry in pattern)
        comma = "," * (len(pattern) == 1)
        raise ValueError(f"{function}: expected {name} of shape ({text}{comma}), got {got}")


def integer(function: str, name: str, value: Any, *, at_least: float = -math.inf) -> None:
    """Refuse what is no integer (`TypeError`) or is smaller than ``at_least`` (`ValueError`)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{function}: expected {name} as an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{function}: expected {name} of at least {at_least}, got {value}")


def positive(function: str, name: str, value: float) -> None:
    """Refuse a number that is not above zero, infinity and NaN included (`ValueError`)."""
    if not 0 < value < math.inf:
        raise ValueError(f"{function}: expected {name} positive and finite, got {value}")


def in_range(function: str, name: str, value: float, low: float = 0, high: float = 1) -> None:
    """Refuse a number outside ``[low, high]``, a probability unless told else (`ValueError`)."""
    if not low <= value <= high:
        raise ValueError(f"{function}: expected {name} in [{low}, {high}], got {value}")


def one_of(function: str, name: str, value: Any, options: Collection) -> None:
    """Refuse a value that is not among ``options`` (`ValueError`)."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{function}: expected {name} to be one of {listed}, got {value!r}")


def finite(function: str, name: str, x: Any) -> None:
    """Refuse an array or tensor that holds infinity or NaN (`ValueError`)."""
    bad = int((~(abs(x) < math.inf)).sum())  # a comparison with NaN is false
    if bad:
        raise ValueError(f"{function}: expected {name} finite, got {bad} values that are not")
