"""The built book, for the tests of its files and for the tests of its pages in a browser."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from filelock import FileLock


def config():
    """The book's configuration."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def documents():
    """Names of all pages in the table of contents, the root first."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Folder of the site, built with warnings as errors, once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    output = base / "book"
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-W", "--keep-going"]
    with FileLock(base / "book.lock"):
        if not (output / "built").exists():
            build = subprocess.run(
                [*command, "-n", "--path-output", output],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert build.returncode == 0, build.stdout[-5000:] + build.stderr[-5000:]
            (output / "built").touch()
    return output / "_build" / "html"
