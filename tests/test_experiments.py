"""Studies are run small, so that they do not rot; their records say what they must."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomllib

from coursekit.experiment import Record

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "experiments").glob("*/*.py"))
RECORDS = sorted((ROOT / "experiments" / "results").glob("*/*.json"))


def study(path):
    """Name of a study, by which its records know it: the script's folder and name."""
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("script", SCRIPTS, ids=study)
def test_every_study_runs_small_and_writes_nothing(script):
    folder = ROOT / "experiments" / "results"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, script, "--smoke"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", SCRIPTS, ids=study)
def test_every_study_has_a_record_or_is_listed_as_not_run(script):
    found = [path for path in RECORDS if Record.load(path).study == study(script)]
    waiting = (ROOT / "experiments" / "README.md").read_text("utf-8").split("## Not run yet")[1]
    assert bool(found) != (f"`{study(script)}`" in waiting)


@pytest.mark.parametrize("path", RECORDS, ids=study)
def test_every_record_says_what_ran_and_how_to_run_it_again(path):
    record = Record.load(path)
    script = ROOT / "experiments" / f"{record.study}.py"
    assert script.exists()
    assert path.parent.name == script.parent.name
    assert path.stem.startswith(script.stem)
    assert f"experiments/{record.study}.py" in record.command
    assert record.selection
    assert record.tier in ("subset", "full")
    assert record.wall_s > 0
    assert "dirty" not in record.commit


FASHION = [path for path in RECORDS if study(path).startswith("optimizers/fashion_mnist_")]


@pytest.mark.parametrize("path", FASHION, ids=study)
def test_each_optimizer_ran_at_the_rate_that_the_rule_chooses(path):
    record = Record.load(path)
    assert len(record.seeds) >= 5
    assert not set(record.seeds) & set(record.config["tuning_seeds"])
    assert len(record.config["learning_rates"]) == 18
    for name, lr in record.config["learning_rates"].items():
        sweep = {
            float(k): np.mean(v) for k, v in record.config["validation_accuracy"][name].items()
        }
        best = max(sorted(sweep), key=sweep.get)
        assert best == pytest.approx(lr, rel=0.01), name
        assert min(sweep) < best < max(sweep), name


def test_a_stored_score_comes_out_again():
    path = ROOT / "experiments" / "results" / "optimizers" / "fashion_mnist_subset.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    script = runpy.run_path(str(ROOT / "experiments" / "optimizers" / "fashion_mnist.py"))
    lr = record["config"]["learning_rates"]["momentum/cosine"]
    again = script["run"](
        ("momentum", "cosine", lr, 0, "subset", record["config"]["epochs"], False)
    )
    stored = record["values"]["momentum/cosine/test_accuracy"][0]
    assert again["test_accuracy"] == pytest.approx(stored, abs=0.02)


def test_records_are_part_of_an_installed_package():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    targets = build["build"]["targets"]
    assert targets["wheel"]["force-include"]["experiments/results"] == "coursekit/results"
    assert "experiments/results" in targets["sdist"]["include"]
