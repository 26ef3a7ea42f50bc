"""Argument checks: what passes, what is refused, and the words of each message."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coursekit import _check


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("got", "pattern"),
    [
        ((8, 16, 4), ("batch", 16, ...)),
        ((8, 16), ("batch", 16, ...)),
        ((8, 2, 2, 16), ("batch", ..., 16)),
        ((3, 3), ("n", "n")),
        ((3, 4, 3), ("n", ..., "n")),
        ((), ()),
        ((0, 5), ("n", 5)),
        ((2, 2), (...,)),
    ],
)
def test_a_matching_shape_passes(make, got, pattern):
    _check.shape("f", "x", make(got), pattern)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("got", "pattern", "words"),
    [
        ((8, 12, 4), ("batch", 16, ...), "(batch, 16, ...), got (8, 12, 4)"),
        ((8,), ("batch", 16, ...), "(batch, 16, ...), got (8,)"),
        ((3, 4), ("n", "n"), "(n, n), got (3, 4)"),
        ((3, 7, 4), ("n", ..., "n"), "(n, ..., n), got (3, 7, 4)"),
        ((2, 3), ("n",), "(n,), got (2, 3)"),
        ((), (5,), "(5,), got ()"),
    ],
)
def test_another_shape_is_refused_with_both_shapes(make, got, pattern, words):
    with pytest.raises(ValueError, match=re.escape(f"batch_norm: expected x of shape {words}")):
        _check.shape("batch_norm", "x", make(got), pattern)


@given(st.lists(st.integers(0, 3), max_size=4), st.integers(0, 4), st.integers(0, 4))
def test_an_ellipsis_stands_for_any_run_of_dimensions(shape, start, stop):
    x = np.zeros(shape)
    _check.shape("f", "x", x, (*shape[:start], ..., *shape[max(start, stop) :]))
    with pytest.raises(ValueError, match="expected x of shape"):
        _check.shape("f", "x", x, (*shape, ..., 1))


def test_a_list_is_no_array():
    with pytest.raises(TypeError, match=r"^f: expected x as an array, got list$"):
        _check.shape("f", "x", [1, 2], ("n",))


@pytest.mark.parametrize("value", [3, np.int64(3), 0])
def test_integers_of_python_and_numpy_pass(value):
    _check.integer("f", "n", value, at_least=0)


@pytest.mark.parametrize("value", [3.0, "3", True, None])
def test_what_is_no_integer_is_a_type_error(value):
    with pytest.raises(TypeError, match=f"^f: expected n as an integer, got {value!r}$"):
        _check.integer("f", "n", value)


def test_a_small_integer_is_refused_with_its_bound():
    with pytest.raises(ValueError, match=r"^f: expected n of at least 1, got 0$"):
        _check.integer("f", "n", 0, at_least=1)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_what_is_not_positive_and_finite_is_refused(value):
    _check.positive("f", "lr", 1e-300)
    with pytest.raises(ValueError, match=f"^f: expected lr positive and finite, got {value}$"):
        _check.positive("f", "lr", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_probability_outside_the_unit_interval_is_refused(value):
    _check.in_range("f", "p", 0)
    _check.in_range("f", "p", 1)
    with pytest.raises(ValueError, match=re.escape(f"f: expected p in [0, 1], got {value}")):
        _check.in_range("f", "p", value)


def test_a_range_names_its_ends():
    _check.in_range("f", "rate", 5, 2, 5)
    with pytest.raises(ValueError, match=r"^f: expected rate in \[2, 5\], got 6$"):
        _check.in_range("f", "rate", 6, 2, 5)


def test_an_unknown_option_is_refused_with_the_known_ones():
    _check.one_of("load", "name", "wine", ("wine", "beer"))
    with pytest.raises(
        ValueError, match=r"^load: expected name to be one of 'wine', 'beer', got 'mead'$"
    ):
        _check.one_of("load", "name", "mead", ("wine", "beer"))


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_infinity_and_nan_are_refused_and_counted(make):
    _check.finite("f", "x", make([[0.0, -1e38]]))
    _check.finite("f", "x", make([1, 2]))
    with pytest.raises(ValueError, match=r"^f: expected x finite, got 3 values that are not$"):
        _check.finite("f", "x", make([1.0, math.nan, math.inf, -math.inf]))


def test_the_checks_do_not_import_torch():
    code = "import sys; import coursekit._check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
