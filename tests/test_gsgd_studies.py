"""The records of the G-SGD studies are held against their own rules, and a stored score returns."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from coursekit.experiment import Record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "gsgd"
WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
RESCALED = Record.load(RESULTS / "rescaled.json")


def values(method, sigma, metric, lr=None):
    """One number a seed, at a rate or at the chosen one."""
    name = f"{method}/{sigma}"
    lr = lr or RESCALED.config["learning_rates"][name]
    return np.array(RESCALED.values[f"{name}/{lr}/{metric}"])


@pytest.mark.parametrize("name", RESCALED.config["learning_rates"])
def test_each_method_ran_at_the_rate_with_the_lowest_held_out_loss(name):
    grid = RESCALED.config["grids"][name]
    losses = [values(*name.split("/"), "valid_loss", lr).mean() for lr in grid]
    best = int(np.argmin(losses))
    assert grid[best] == RESCALED.config["learning_rates"][name]
    assert 0 < best < len(grid) - 1


@pytest.mark.parametrize("method", ["gsgd", "path_sgd", "unit_norm"])
def test_methods_that_do_not_see_the_scale_have_one_result_at_all_starts(method):
    for sigma in (1, 2):
        np.testing.assert_allclose(
            values(method, sigma, "train_loss"), values(method, 0, "train_loss"), atol=1e-5
        )
    assert abs(values("sgd", 2, "train_loss") - values("sgd", 0, "train_loss")).min() > 0.1


@pytest.mark.parametrize("width", WIDTHS)
def test_each_width_ran_at_the_rates_with_the_highest_held_out_accuracy(width):
    record = Record.load(RESULTS / f"invariant_ratio_{width:04}.json")
    assert len(record.seeds) >= 5
    assert not set(record.seeds) & set(record.config["tuning_seeds"])
    assert record.config["ratio"] == pytest.approx(2 / (width + 59))
    for method, lr in record.config["learning_rates"].items():
        sweep = record.config["validation_accuracy"][method]
        found = {float(k): np.mean(got) for k, got in sweep.items()}
        best = max(sorted(found), key=found.get)
        assert best == pytest.approx(lr, rel=0.01), method
        assert min(found) < best < max(found), method


def test_a_stored_score_of_the_rescaled_nets_comes_out_again(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments" / "gsgd"), *sys.path])
    script = runpy.run_path(str(ROOT / "experiments" / "gsgd" / "rescaled.py"))
    lr = script["METHODS"]["gsgd"] * script["STEP"]
    again = script["run"]("gsgd", 2, lr, 0)
    assert f"{lr:.3g}" == RESCALED.config["learning_rates"]["gsgd/2"]
    assert again["test_accuracy"] == pytest.approx(values("gsgd", 2, "test_accuracy")[0], abs=0.02)
