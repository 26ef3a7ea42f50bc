"""A chapter in a machine like Colab's: torch and NumPy are there, coursekit is not.

The virtual environment sees the distributions that the package asks for and those that run a
notebook, nothing else, so a chapter that needs more than pyproject.toml declares fails here.
"""

import importlib.metadata
import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUNS_NOTEBOOKS = ["ipykernel", "nbclient", "ipywidgets"]
BUILDS_PACKAGES = ["pip", "hatchling"]

RUN = """
import importlib.metadata as m, importlib.util, json, sys
import nbclient, nbformat
def versions():
    return [m.version(name) for name in ("torch", "numpy")]
assert importlib.util.find_spec("coursekit") is None
before = versions()
nb = nbformat.read(sys.argv[1], as_version=4)
nb.cells = nb.cells[: int(sys.argv[2]) or None]
for attempt in range(3):  # a kernel's answer is lost now and then when several start at once
    try:
        nbclient.NotebookClient(nb, timeout=150, kernel_name="python3").execute()
        error = ""
    except nbclient.exceptions.CellTimeoutError:
        error = "CellTimeoutError"
        continue
    except nbclient.exceptions.CellExecutionError as e:
        error = e.ename
    break
print(json.dumps({"before": before, "after": versions(), "error": error}))
"""


def closure(names):
    """Distributions that installing the named ones brings."""
    found, queue = {}, list(names)
    while queue:
        name = canonicalize_name(queue.pop())
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for requirement in map(Requirement, found[name].requires or []):
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


@pytest.fixture
def colab(tmp_path):
    """Python of a new virtual environment without coursekit, and where it installs packages.

    The distributions stand in a folder of links outside it, so pip sees them and cannot touch
    them.
    """
    links = tmp_path / "links"
    links.mkdir()
    needed = closure(["coursekit", *RUNS_NOTEBOOKS, *BUILDS_PACKAGES])
    del needed["coursekit"]
    for dist in needed.values():
        for top in {file.parts[0] for file in dist.files} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(dist.locate_file(top))
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    out = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    site = Path(out.stdout.strip())
    (site / "links.pth").write_text(str(links))
    return python, site


def run(python, notebook, cells, folder, **environment):
    """Execute a notebook's first cells (0: all) away from the checkout; what RUN prints."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "COURSEKIT"))
    }
    # To pip, "no build isolation: 0" means that a build may use what is installed.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}
    command = [python, "-c", RUN, str(notebook), str(cells)]
    out = subprocess.run(
        command, cwd=folder, env=kept | offline | environment, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda path: path.stem)
class TestChapter:
    def test_without_package_and_network_its_first_cell_fails_at_the_import(
        self, colab, notebook, tmp_path
    ):
        python, site = colab
        result = run(python, notebook, 1, tmp_path)
        assert result["error"] == "ModuleNotFoundError"
        assert {p.name for p in site.iterdir()} == {"links.pth"}

    def test_its_first_cell_installs_the_package_and_the_whole_of_it_runs(
        self, colab, notebook, tmp_path
    ):
        python, site = colab
        spec = f"coursekit @ {ROOT.as_uri()}"
        result = run(python, notebook, 0, tmp_path, COURSEKIT_SPEC=spec)
        installed = {p.name.split("-")[0] for p in site.iterdir()}
        assert result["error"] == ""
        assert result["after"] == result["before"]
        assert installed == {"coursekit", "links.pth"}
