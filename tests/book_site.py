"""The built book, for the tests of its files and for the tests of its pages in a browser."""

import os
import re
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


def build(output, builder="html"):
    """Build the book with warnings as errors; returns the folder of its files."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-W", "--keep-going"]
    done = subprocess.run(
        [*command, "-n", "--builder", builder, "--path-output", output],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0, [line for line in lines if re.search("WARNING|rror|ERROR", line)]
    return output / "_build" / builder


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Folder of the site, built once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    done = base / "book" / "built"
    with FileLock(base / "book.lock"):
        if not done.exists():
            build(base / "book")
            done.touch()
    return base / "book" / "_build" / "html"
