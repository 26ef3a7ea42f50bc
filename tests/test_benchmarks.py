"""Benchmarks are run small, so that they do not rot; their stored records keep their promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_runs_small_and_writes_nothing(script):
    record = ROOT / "benchmarks" / "results" / f"{script.stem}.json"
    before = record.read_bytes()
    done = subprocess.run(
        [sys.executable, script, "--smoke"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "ms" in done.stdout
    assert record.read_bytes() == before


@pytest.mark.covers("A7")
@pytest.mark.covers("A8")
def test_the_stored_record_of_autodiff_keeps_the_promised_ratios():
    record = json.loads((ROOT / "benchmarks" / "results" / "autodiff.json").read_text())
    assert record["course_over_by_hand"] <= 1.3
    assert record["course_over_hips"] <= 0.7
    assert record["unfused_over_hips"] <= 0.7
    assert record["chain"]["nodes"] == 400_000
    memory = record["memory"]
    assert max(memory["steps"]) >= 4096
    assert memory["stored"] == pytest.approx(memory["steps"], rel=0.05, abs=4)
    law = [2 * n**0.5 + 4 for n in memory["steps"]]
    assert memory["checkpointed"] == pytest.approx(law, abs=1)
    assert record["memory_off_the_law"] <= 1
    times = record["gradient_ms"]
    assert record["course_over_by_hand"] == pytest.approx(times["course"] / times["by hand"])
    assert record["course_over_hips"] == pytest.approx(times["course"] / times["hips autograd"])
