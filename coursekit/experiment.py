"""Claims that are tests, runs over seeds, and records of long studies."""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from coursekit import _check

CLAIM = "application/vnd.coursekit.claim+json"
ENVIRONMENT = "application/vnd.coursekit.environment+json"
GLUE = "application/papermill.record/"  # myst-nb keeps this from the page and for {glue:text}
BOUNDS = {"at_least": ">=", "at_most": "<="}
DIGITS = 6  # significant digits of what is stored: the rest differs between machines


class ClaimError(AssertionError):
    """A claim came out otherwise than the page says."""


def claim(
    id: str,
    value: float,
    *,
    expect: float | None = None,
    within: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    spread: float | None = None,
    over: str | None = None,
    source: str | None = None,
    holds: bool = True,
) -> None:
    """Print a statement with its number, record it for the book, and raise if it is not so.

    Nothing is returned, so that a claim can be the last line of a cell. In the prose of the same
    notebook ``{glue:text}`` with the id, or with the id and a format as in ``bagging/law:.2f``,
    shows the value.

    Parameters
    ----------
    id
        ``<chapter>/<slug>``, in small letters, digits and hyphens.
    value
        What was measured: a number, or an array or tensor of one.
    expect, within
        Holds if ``|value - expect| <= within``.
    at_least, at_most
        Holds if the value is not below, not above. All that is given must hold.
    spread
        Standard deviation of the value, in its units; shown, not judged.
    over
        What the spread is over, such as ``"5 seeds"``.
    source
        Where the expected value comes from, such as ``"Breiman 1996, table 2"``.
    holds
        False declares a claim that is known to fail. It is shown as such, and raises if it holds.

    Raises
    ------
    ClaimError
        When the outcome differs from ``holds``; the line is printed before.
    ValueError
        For a malformed id, a number that is not finite, or no expectation.
    TypeError
        For a value that is no number.

    Examples
    --------
    >>> claim("bagging/error-law", 1.009, expect=1.0, within=0.05, spread=0.044)
    bagging/error-law               1.009 ± 0.044   expected 1.000 ± 0.05   holds
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*/[a-z0-9]+(-[a-z0-9]+)*", id):
        raise ValueError(f"claim: expected an id like bagging/error-law, got {id!r}")
    given = {"value": value, "expect": expect, "within": within, "at_least": at_least}
    given |= {"at_most": at_most, "spread": spread}
    numbers: dict[str, Any] = {
        k: None if x is None else _number(f"claim {id}", k, x) for k, x in given.items()
    }
    if numbers["value"] is None:
        raise TypeError(f"claim {id}: expected value as a number, got None")
    if (expect is None) != (within is None):
        raise ValueError(f"claim {id}: expected expect and within together, got one of them")
    if expect is at_least is at_most is None:
        raise ValueError(f"claim {id}: expected something: expect and within, at_least or at_most")
    for name in ("within", "spread"):
        if (numbers[name] or 0) < 0:
            raise ValueError(f"claim {id}: expected {name} not negative, got {numbers[name]}")
    outcome = _outcome(numbers)
    line = f"{id:31} {_sentence(numbers)}   {'holds' if outcome else 'does not hold'}"
    print(line)
    record = _rounded(numbers)
    record |= {"over": over, "source": source, "verdict": "holds" if outcome else "does not hold"}
    _publish(id, {CLAIM: {"id": id} | record, f"{GLUE}text/plain": repr(record["value"])})
    if outcome != holds:
        raise ClaimError(line if outcome is False else f"{line}, but holds=False says it does not")


def _number(who: str, name: str, x: Any) -> int | float:
    """Take a finite Python number out of a number, array or tensor."""
    if hasattr(x, "item"):
        if math.prod(x.shape) != 1:
            raise ValueError(f"{who}: expected {name} as one number, got shape {tuple(x.shape)}")
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{who}: expected {name} as a number, got {x!r}")
    if not math.isfinite(x):
        raise ValueError(f"{who}: expected {name} finite, got {x}")
    return x


def _outcome(n: dict[str, Any]) -> bool:
    return (
        (n["expect"] is None or abs(n["value"] - n["expect"]) <= n["within"])
        and (n["at_least"] is None or n["value"] >= n["at_least"])
        and (n["at_most"] is None or n["value"] <= n["at_most"])
    )


def _rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    """Round what is stored, with more digits where rounding would contradict the verdict."""
    for digits in range(DIGITS, 18):
        rounded = {
            k: float(f"{x:.{digits}g}") if isinstance(x, float) else x for k, x in numbers.items()
        }
        if _outcome(rounded) == _outcome(numbers):
            break
    return rounded


def _sentence(n: dict[str, Any]) -> str:
    """Write value and expectation with as many digits as it takes to see the outcome."""
    value = _text(n["value"], lambda shown: _outcome(n | {"value": shown}) == _outcome(n))
    spread = "" if n["spread"] is None else f" ± {n['spread']:#.2g}"
    said = []
    if n["expect"] is not None:
        near = _text(n["expect"], lambda shown: abs(shown - n["expect"]) <= n["within"] / 100)
        said.append(f"{near} ± {n['within']:g}")
    said += [f"{sign} {n[k]:.10g}" for k, sign in BOUNDS.items() if n[k] is not None]
    return f"{value}{spread}   expected {' and '.join(said)}"


def _text(x: int | float, says_enough: Callable[[float], bool]) -> str:
    """Write a number with four significant digits, or with more until they say enough."""
    if isinstance(x, int):
        return str(x)
    texts = (f"{x:#.{digits}g}".rstrip(".").replace(".e", "e") for digits in range(4, 18))
    return next(text for text in texts if says_enough(float(text)))


def _publish(name: str, bundle: dict[str, Any]) -> None:
    """Put a record that no reader sees into the output of the cell, if there is a notebook."""
    shell = sys.modules.get("IPython")
    if shell is not None and shell.get_ipython() is not None:
        from IPython.display import display

        metadata = {"scrapbook": {"name": name, "mime_prefix": GLUE}}
        display(bundle, raw=True, metadata=metadata)


def run_seeds(function: Callable[[int], Any], seeds: Iterable[int] = range(5)) -> Any:
    """Run an experiment once for each seed and stack what it returns.

    Parameters
    ----------
    function
        Takes a seed; returns a number, an array, or a dictionary of them.
    seeds
        Five unless given.

    Returns
    -------
    numpy.ndarray or dict of numpy.ndarray
        The first axis is the seed.

    Raises
    ------
    ValueError
        When there is no seed, or the runs do not return the same names or shapes.

    Examples
    --------
    >>> run_seeds(lambda seed: {"square": seed**2}, seeds=[1, 2, 3])
    {'square': array([1, 4, 9])}
    """
    runs = [function(seed) for seed in seeds]
    if not runs:
        raise ValueError("run_seeds: expected at least one seed, got none")
    if not isinstance(runs[0], dict):
        return _stacked("the result", runs)
    if any(run.keys() != runs[0].keys() for run in runs):
        names = sorted({", ".join(map(str, run)) for run in runs})
        raise ValueError(f"run_seeds: expected the same names from every seed, got {names}")
    return {name: _stacked(name, [run[name] for run in runs]) for name in runs[0]}


def _stacked(name: str, values: list[Any]) -> np.ndarray:
    arrays = [np.asarray(v.detach().cpu() if hasattr(v, "detach") else v) for v in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"run_seeds: expected one shape of {name}, got {sorted(shapes)}")
    if any(array.dtype == object for array in arrays):
        raise ValueError(f"run_seeds: expected {name} as numbers, got {values[0]!r}")
    return np.stack(arrays)


def interval(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Return the mean over seeds and half the width of its t-interval.

    Parameters
    ----------
    values
        Shape ``(seeds,)``, two or more.
    confidence
        Between 0 and 1.

    Raises
    ------
    ValueError
        For fewer than two values or a confidence that is no probability.

    Examples
    --------
    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> print(f"{mean:.2f} ± {half:.2f}")
    2.00 ± 2.48
    """
    values = np.asarray(values, dtype=float)
    _check.shape("interval", "values", values, ("seeds",))
    if len(values) < 2 or not 0 < confidence < 1:
        raise ValueError(
            "interval: expected two values or more and confidence in (0, 1), "
            f"got {len(values)} and {confidence}"
        )
    error = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error)


def _machine() -> dict[str, Any]:
    """Return versions, device and number of cores."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy"):
        versions[name] = importlib.metadata.version(name)
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if torch is not None and cuda else "cpu"
    return {"versions": versions, "device": device, "cores": os.cpu_count() or 1}


def environment() -> None:
    """Print on what the chapter ran, and record it for the book's Status page."""
    found = _machine()
    said = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"{said}, {found['device']}, {found['cores']} cores")
    _publish("environment", {ENVIRONMENT: found, f"{GLUE}text/plain": said})


@dataclass
class Record:
    """The result of a long study, with all that is needed to judge and to repeat it.

    Attributes
    ----------
    study
        What was run, such as ``"dcasgd/cifar10_resnet20"``.
    config
        Every setting.
    seeds, values
        The seeds, and for each metric one number or array a seed, in their order.
    selection
        The rule by which settings were chosen: a result without it is not a result.
    tier
        ``"subset"`` or ``"full"`` data.
    wall_s
        Time of the whole study, in seconds.
    command
        What to type to run it again.
    versions, device, cores, commit
        Filled in from this machine unless given.
    """

    study: str
    config: dict[str, Any]
    seeds: list[int]
    values: dict[str, Any]
    selection: str
    tier: str
    wall_s: float
    command: str
    versions: dict[str, str] = field(default_factory=lambda: _machine()["versions"])
    device: str = field(default_factory=lambda: _machine()["device"])
    cores: int = field(default_factory=lambda: _machine()["cores"])
    commit: str = field(default_factory=lambda: _commit())

    def __post_init__(self):
        self.values = {name: np.asarray(got).tolist() for name, got in self.values.items()}
        for name, got in self.values.items():
            if not isinstance(got, list) or len(got) != len(self.seeds):
                raise ValueError(
                    f"Record {self.study}: expected {len(self.seeds)} values of {name}, "
                    f"one a seed, got {got}"
                )

    def save(self, path: str | Path) -> None:
        """Write JSON; the file is there whole or, when anything fails, as it was before.

        Raises
        ------
        ValueError
            When something is no JSON: a number that is not finite, an array in ``config``.
        """
        path = Path(path)
        try:
            text = json.dumps(asdict(self), indent=2, allow_nan=False, default=lambda x: x.item())
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Record {self.study}: expected what JSON can hold: {error}"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            unfinished.write_text(text + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            When the file is no record; the message names the file and what is missing or wrong.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Record.load: expected JSON in {path}, got: {error}") from error
        names = {f.name for f in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            got = set(found) if isinstance(found, dict) else set()
            raise ValueError(
                f"Record.load: {path} lacks {sorted(names - got)} and has unknown "
                f"{sorted(got - names)}"
            )
        try:
            return cls(**found)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"Record.load: {path} is no record: {error}") from error

    def summarize(self) -> str:
        """Return a table, one line a metric: mean ± standard deviation (number of seeds).

        A metric with a whole curve for each seed has no line.
        """
        lines = []
        for name, values in self.values.items():
            if np.ndim(values) == 1:
                sd = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
                lines.append(f"{name:24} {np.mean(values):.4g}{sd} ({len(values)})")
        return "\n".join(lines)


def stored(name: str) -> Record:
    """Return a record that came with the book: from the checkout, or as installed with the package.

    Parameters
    ----------
    name
        Chapter and record, such as ``"optimizers/fashion_mnist_full"``; the chapter of a benchmark.

    Raises
    ------
    FileNotFoundError
        When there is none of that name; the message lists those there are.
    """
    package = Path(__file__).parent
    checkout = [package.parent / kind / "results" for kind in ("experiments", "benchmarks")]
    folders = [*checkout, package / "results"]
    for folder in folders:
        if (folder / f"{name}.json").is_file():
            return Record.load(folder / f"{name}.json")
    there = {
        p.relative_to(f).with_suffix("").as_posix() for f in folders for p in f.rglob("*.json")
    }
    raise FileNotFoundError(f"stored: expected name to be one of {sorted(there)}, got {name!r}")


def _commit() -> str:
    """Return the commit of the working folder, marked when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
