"""Claims, runs over seeds and records: what is printed, what is stored, what is refused."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.display import display
from scipy import stats

from coursekit import experiment
from coursekit.experiment import CLAIM, ENVIRONMENT, GLUE, ClaimError, Record, claim

# ---- claims: the line ----


@pytest.mark.parametrize(
    ("value", "options", "line"),
    [
        (1.009, {"expect": 1.0, "within": 0.05}, "1.009   expected 1.000 ± 0.05   holds"),
        (0.96812, {"at_least": 0.95, "spread": 0.0042}, "0.9681 ± 0.0042   expected >= 0.95   h"),
        (2.84e-14, {"at_most": 1e-10}, "2.840e-14   expected <= 1e-10   holds"),
        (400_000, {"expect": 400_000, "within": 0}, "400000   expected 400000 ± 0   holds"),
        (1.36333, {"expect": 1.3633, "within": 5e-5}, "1.3633   expected 1.3633 ± 5e-05   holds"),
        (0.63, {"expect": 1 - 1 / math.e, "within": 0.01}, "0.6300   expected 0.6321 ± 0.01   h"),
        (0.3, {"at_least": 0.1, "at_most": 0.5}, "0.3000   expected >= 0.1 and <= 0.5   holds"),
        (6400.4, {"at_most": 7000}, "6400   expected <= 7000   holds"),
        (-1.02, {"expect": -1, "within": 0.15}, "-1.020   expected -1 ± 0.15   holds"),
        (0.0, {"at_most": 0.0}, "0.000   expected <= 0   holds"),
    ],
)
def test_a_claim_is_one_line(capsys, value, options, line):
    assert claim("bagging/error-law", value, **options) is None
    said = capsys.readouterr().out
    assert said.startswith("bagging/error-law  ")
    assert said.count("\n") == 1
    assert said.split(maxsplit=1)[1].startswith(line)


def test_claims_of_one_cell_stand_below_each_other(capsys):
    claim("bagging/vote", 1.0, at_least=0)
    claim("bagging/unique-fraction", 1.0, at_least=0)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index("1.000") for line in lines}) == 1


@pytest.mark.parametrize(
    ("value", "options", "shown"),
    [
        (0.949_99, {"at_least": 0.95}, "0.94999"),
        (0.950_000_1, {"at_most": 0.95}, "0.9500001"),
        (1.750_01, {"expect": 1.5, "within": 0.25}, "1.75001"),
    ],
)
def test_a_claim_that_barely_fails_shows_the_digit_by_which_it_fails(capsys, value, options, shown):
    with pytest.raises(ClaimError, match=rf"a/b +{shown}   expected .*   does not hold$"):
        claim("a/b", value, **options)
    assert f" {shown} " in capsys.readouterr().out


numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(numbers, numbers, st.floats(0, 1e3))
def test_the_verdict_is_the_inequality_and_the_printed_value_agrees_with_it(value, expect, within):
    parts = {"expect": expect, "within": within, "at_least": None, "at_most": None, "spread": None}
    holds = experiment._outcome({"value": value} | parts)
    assert holds == (abs(value - expect) <= within)
    shown = float(experiment._sentence({"value": value} | parts).split()[0])
    assert (abs(shown - expect) <= within) == holds
    assert shown == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        ({"expect": 2.0, "within": 0.5}, True),
        ({"expect": 2.0, "within": 0.4}, False),
        ({"at_least": 1.5}, True),
        ({"at_least": 1.6}, False),
        ({"at_most": 1.5}, True),
        ({"at_most": 1.4}, False),
        ({"at_least": 1.0, "at_most": 1.4}, False),
        ({"at_least": 1.6, "at_most": 2.0}, False),
        ({"expect": 1.5, "within": 0.1, "at_most": 1.4}, False),
    ],
)
def test_all_that_is_expected_must_hold_and_bounds_are_included(options, holds):
    if holds:
        claim("a/b", 1.5, **options)
    else:
        with pytest.raises(ClaimError, match="a/b .* does not hold"):
            claim("a/b", 1.5, **options)


def test_a_failing_claim_is_an_assertion_and_is_printed_before_it_raises(capsys):
    with pytest.raises(AssertionError):
        claim("a/b", 1.0, at_least=2.0)
    assert capsys.readouterr().out.endswith("1.000   expected >= 2   does not hold\n")


def test_a_claim_declared_to_fail_is_shown_as_failing(capsys):
    claim("a/b", 1.0, at_least=2.0, holds=False)
    assert capsys.readouterr().out.endswith("does not hold\n")


def test_a_claim_declared_to_fail_raises_when_it_holds(capsys):
    with pytest.raises(ClaimError, match=r"   holds, but holds=False says it does not$"):
        claim("a/b", 3.0, at_least=2.0, holds=False)
    assert capsys.readouterr().out.endswith("   holds\n")


@pytest.mark.parametrize("value", [np.float32(1.5), np.array([1.5]), torch.tensor(1.5), 1.5])
def test_a_number_an_array_and_a_tensor_are_the_same_claim(capsys, value):
    claim("a/b", value, at_most=np.int64(2))
    assert capsys.readouterr().out.endswith(" 1.500   expected <= 2   holds\n")


# ---- claims: what is refused ----


@pytest.mark.parametrize(
    "id", ["", "bagging", "bagging/", "/law", "Bagging/law", "bagging/a_b", "a/b/c", "a/b ", "a::b"]
)  # fmt: skip
def test_a_malformed_id_is_refused(id):
    with pytest.raises(ValueError, match="^claim: expected an id like bagging/error-law, got "):
        claim(id, 1.0, at_least=0)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (1.0, {}, "expected something: expect and within, at_least or at_most"),
        (1.0, {"spread": 1.0}, "expected something"),
        (1.0, {"expect": 1.0}, "expected expect and within together, got one of them"),
        (1.0, {"within": 1.0}, "expected expect and within together, got one of them"),
        (1.0, {"expect": 1.0, "within": -0.1}, r"expected within not negative, got -0\.1"),
        (1.0, {"at_most": 2, "spread": -1}, "expected spread not negative, got -1"),
        (math.nan, {"at_most": 2}, "expected value finite, got nan"),
        (torch.tensor(math.inf), {"at_most": 2}, "expected value finite, got inf"),
        (1.0, {"at_most": math.nan}, "expected at_most finite, got nan"),
        (np.zeros(3), {"at_most": 2}, r"expected value as one number, got shape \(3,\)"),
    ],
)
def test_a_claim_that_says_nothing_is_refused_and_not_printed(capsys, value, options, message):
    with pytest.raises(ValueError, match=f"^claim a/b: {message}"):
        claim("a/b", value, **options)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [None, "0.9", True, np.bool_(True), 1j])
def test_a_claim_about_no_number_is_refused(value):
    with pytest.raises(TypeError, match="^claim a/b: expected value as a number, got "):
        claim("a/b", value, at_least=0)


# ---- what is stored ----


@pytest.fixture
def published(monkeypatch):
    """What is displayed, as if in a notebook."""
    seen = []
    monkeypatch.setattr("IPython.get_ipython", object)
    monkeypatch.setattr(
        "IPython.display.display",
        lambda bundle, raw, metadata: seen.append((json.loads(json.dumps(bundle)), metadata)),
    )
    return seen


def test_a_claim_is_stored_with_all_that_it_says(published):
    claim("a/b", 1 / 3, at_least=0.3, spread=0.01, over="5 seeds", source="a paper")
    ((bundle, metadata),) = published
    assert bundle[CLAIM] == {
        "id": "a/b", "value": 0.333333, "expect": None, "within": None, "at_least": 0.3,
        "at_most": None, "spread": 0.01, "over": "5 seeds", "source": "a paper", "verdict": "holds",
    }  # fmt: skip
    assert bundle[f"{GLUE}text/plain"] == "0.333333"
    assert metadata == {"scrapbook": {"name": "a/b", "mime_prefix": GLUE}}


def test_a_failing_claim_is_stored_too(published):
    with pytest.raises(ClaimError):
        claim("a/b", 1.0, at_least=2.0)
    claim("a/b", 1.0, at_least=2.0, holds=False)
    assert [bundle[CLAIM]["verdict"] for bundle, _ in published] == ["does not hold"] * 2


def test_the_last_digits_which_differ_between_machines_are_not_stored(published):
    for value in 0.1 + 0.2, 0.3:
        claim("a/b", value, expect=0.3, within=1e-9)
    assert published[0] == published[1]


def test_a_whole_number_stays_whole(published):
    claim("a/b", np.int64(123_456_789), at_least=1)
    assert published[0][0][CLAIM]["value"] == 123_456_789


def test_outside_a_notebook_nothing_is_displayed(monkeypatch):
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: pytest.fail("displayed"))
    assert display is not None  # IPython is loaded, and still no notebook is there
    claim("a/b", 1.0, at_least=0)
    experiment.environment()


def test_the_environment_is_one_line_and_a_record(published, capsys):
    experiment.environment()
    found = published[0][0][ENVIRONMENT]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["numpy"] == np.__version__
    assert found["cores"] == os.cpu_count()
    assert (found["device"] == "cpu") == (not torch.cuda.is_available())
    (line,) = capsys.readouterr().out.splitlines()
    for word in (*found["versions"].values(), found["device"], f"{found['cores']} cores"):
        assert word in line


def test_importing_it_does_not_import_torch():
    code = "import sys, coursekit.experiment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- seeds ----


def test_five_seeds_are_run_in_order_unless_others_are_given():
    assert experiment.run_seeds(lambda seed: seed).tolist() == [0, 1, 2, 3, 4]
    assert experiment.run_seeds(lambda seed: seed, seeds=iter([7, 3])).tolist() == [7, 3]


def test_runs_are_stacked_with_the_seed_first():
    runs = experiment.run_seeds(
        lambda seed: {
            "number": seed / 2,
            "curve": np.full(3, seed),
            "tensor": torch.full((2, 2), float(seed), requires_grad=True),
        }
    )
    assert {name: run.shape for name, run in runs.items()} == {
        "number": (5,), "curve": (5, 3), "tensor": (5, 2, 2),
    }  # fmt: skip
    assert runs["tensor"][3, 0, 0] == runs["curve"][3, 2] == 3
    assert all(type(run) is np.ndarray for run in runs.values())


@pytest.mark.parametrize(
    ("function", "seeds", "message"),
    [
        (lambda seed: seed, [], "at least one seed, got none"),
        (lambda seed: {"ab"[seed]: 1}, [0, 1], r"the same names from every seed, got \['a', 'b'\]"),
        (lambda seed: np.zeros(seed), [1, 2], r"one shape of the result, got \[\(1,\), \(2,\)\]"),
        (lambda seed: {"x": np.zeros(seed)}, [1, 2], r"one shape of x, got "),
    ],
)
def test_runs_that_do_not_fit_together_are_refused(function, seeds, message):
    with pytest.raises(ValueError, match=f"^run_seeds: expected {message}"):
        experiment.run_seeds(function, seeds)


def test_the_interval_by_hand():
    mean, half = experiment.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302652730 / math.sqrt(3))  # t of 2 degrees of freedom; sd is 1


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(0.5, 0.99))
def test_the_interval_is_that_of_scipy(values, confidence):
    mean, half = experiment.interval(values, confidence)
    assert mean == pytest.approx(np.mean(values), abs=1e-12)
    if stats.sem(values) > 1e-9:
        low, high = stats.t.interval(
            confidence, len(values) - 1, np.mean(values), stats.sem(values)
        )
        assert (mean - half, mean + half) == pytest.approx((low, high))


def test_intervals_cover_the_mean_as_often_as_they_say():
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 5))
    within = [abs(m - 3.0) <= half for m, half in map(experiment.interval, samples)]
    assert np.mean(within) == pytest.approx(0.95, abs=0.015)  # 1.96 for t would cover 0.88


@pytest.mark.parametrize(
    ("values", "confidence", "message"),
    [
        ([1.0], 0.95, r"two values or more and confidence in \(0, 1\), got 1 and 0\.95"),
        ([1.0, 2.0], 95, "got 2 and 95"),
        ([[1.0, 2.0]], 0.95, r"expected values of shape \(seeds,\), got \(1, 2\)"),
    ],
)
def test_an_interval_of_nothing_is_refused(values, confidence, message):
    with pytest.raises(ValueError, match=f"^interval: .*{message}"):
        experiment.interval(values, confidence)


# ---- records ----


def record(**changes):
    given = {
        "study": "bagging/trees",
        "config": {"members": 32},
        "seeds": [0, 1, 2],
        "values": {"accuracy": [0.9, 0.92, 0.94], "curve": [[1, 2], [1, 3], [1, 4]]},
        "selection": "last epoch",
        "tier": "subset",
        "wall_s": 1.5,
        "command": "python experiments/bagging/trees.py",
    }
    return Record(**given | changes)


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "new" / "folder" / "trees.json"
    saved = record()
    saved.save(path)
    assert Record.load(path) == saved
    assert [file.name for file in path.parent.iterdir()] == ["trees.json"]


def test_what_run_seeds_returns_can_be_recorded(tmp_path):
    runs = experiment.run_seeds(lambda seed: {"x": torch.tensor(seed / 4), "y": np.arange(2)})
    record(seeds=list(range(5)), values=runs).save(tmp_path / "a.json")
    loaded = Record.load(tmp_path / "a.json")
    assert loaded.values == {"x": [0, 0.25, 0.5, 0.75, 1], "y": [[0, 1]] * 5}


def test_a_record_knows_its_machine_and_commit():
    made = record()
    assert made.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert made.cores == os.cpu_count()
    head = ["git", "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(head, capture_output=True, text=True, check=False)
    assert made.commit.startswith(done.stdout.strip()) if done.stdout else made.commit == "unknown"


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record().commit == "unknown"


def test_the_summary_is_mean_and_deviation_and_leaves_curves_out():
    (line,) = record().summarize().splitlines()
    assert line.split() == ["accuracy", "0.92", "±", "0.02", "(3)"]
    one = record(seeds=[0], values={"accuracy": [0.9]})
    assert one.summarize().split() == ["accuracy", "0.9", "(1)"]


@pytest.mark.parametrize("values", [{"x": [1.0]}, {"x": 1.0}, {"x": [1.0] * 4}])
def test_a_metric_without_one_value_a_seed_is_refused(values):
    message = r"^Record bagging/trees: expected 3 values of x, one a seed, got "
    with pytest.raises(ValueError, match=message):
        record(values=values)


@pytest.mark.parametrize(
    "changes",
    [
        {"values": {"x": [1.0, math.nan, 2.0]}},
        {"config": {"rate": math.inf}},
        {"config": {"grid": np.zeros(2)}},
    ],
)
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, changes):
    path = tmp_path / "trees.json"
    record().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="^Record bagging/trees: expected what JSON can hold: "):
        record(**changes).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "trees.json"
    record().save(path)
    before = path.read_bytes()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        record(wall_s=9.0).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], r"expected JSON in .*trees\.json, got: "),
        (lambda text: "\ufeff\udcff", r"expected JSON in .*trees\.json, got: "),
        (lambda text: "[]", r".*trees\.json lacks \['command', .*'wall_s'\] and has unknown \[\]"),
        (
            lambda text: text.replace('"tier"', '"level"'),
            r"lacks \['tier'\] .* unknown \['level'\]",
        ),
        (
            lambda text: text.replace("0.94", "0.94, 1"),
            r".*trees\.json is no record: .* of accuracy",
        ),
        (lambda text: text.replace('"seeds": [', '"seeds": 3, "x": ['), r"unknown \['x'\]"),
    ],
)
def test_a_broken_record_is_refused_with_its_path_and_what_is_wrong(tmp_path, spoil, message):
    path = tmp_path / "trees.json"
    record().save(path)
    broken = spoil(path.read_text("utf-8")).encode("utf-8", "surrogateescape")
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=f"^Record.load: .*{message}"):
        Record.load(path)


def test_a_record_that_is_not_there_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"trees\.json"):
        Record.load(tmp_path / "trees.json")


def test_a_stored_claim_never_contradicts_its_verdict(monkeypatch):
    stored = {}
    monkeypatch.setattr(experiment, "_publish", lambda name, bundle: stored.update(bundle))
    experiment.claim("a/b", 0.9499999, at_least=0.95, holds=False)
    assert stored[experiment.CLAIM]["value"] < 0.95


def test_bounds_are_printed_with_all_their_digits(capsys):
    experiment.claim("a/b", 1_234_568.0, at_least=1_234_567.0)
    assert ">= 1234567" in capsys.readouterr().out


def test_runs_that_return_no_numbers_are_refused():
    with pytest.raises(ValueError, match="run_seeds: expected the result as numbers, got None"):
        experiment.run_seeds(lambda seed: None)


def test_a_record_takes_numbers_of_numpy(tmp_path):
    record = experiment.Record(
        study="a/b",
        config={"width": np.int64(3)},
        seeds=[0],
        values={"error": [np.float32(0.5)]},
        selection="none",
        tier="subset",
        wall_s=1.0,
        command="true",
    )
    record.save(tmp_path / "r.json")
    assert experiment.Record.load(tmp_path / "r.json").config == {"width": 3}


def test_a_stored_record_is_found_by_chapter_and_name(tmp_path, monkeypatch):
    package = tmp_path / "coursekit"
    monkeypatch.setattr(experiment, "__file__", str(package / "experiment.py"))
    homes = (tmp_path / "experiments", tmp_path / "benchmarks", package)
    for folder in (home / "results" for home in homes):
        record().save(folder / "bagging" / f"{folder.parent.name}.json")
    assert experiment.stored("bagging/experiments").study == "bagging/trees"  # the checkout
    assert experiment.stored("bagging/benchmarks").study == "bagging/trees"
    assert experiment.stored("bagging/coursekit").study == "bagging/trees"  # the installed package


def test_a_record_that_was_not_stored_is_refused_with_the_names_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "__file__", str(tmp_path / "coursekit" / "experiment.py"))
    record().save(tmp_path / "experiments" / "results" / "bagging" / "trees.json")
    message = r"^stored: expected name to be one of \['bagging/trees'\], got 'bagging/tree'$"
    with pytest.raises(FileNotFoundError, match=message):
        experiment.stored("bagging/tree")
