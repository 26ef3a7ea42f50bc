"""What claims, records and interactive figures leave in a notebook, and what the book makes of it.

A chapter of four cells is run by a kernel, built by the strict book and opened in a browser.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from book_site import config
from bs4 import BeautifulSoup
from conftest import ROOT
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_pages import browser  # noqa: F401
from test_pages import pytestmark as needs_chromium

from coursekit.experiment import CLAIM, ENVIRONMENT

CELLS = [
    new_markdown_cell("# Chapter\n\nGlued {glue:text}`toy/third` and {glue:text}`toy/third:.2f`."),
    new_code_cell(
        "from coursekit import widgets\n"
        "from coursekit.experiment import claim, environment\n"
        "claim('toy/third', 1 / 3, expect=0.3333, within=1e-3, spread=0.01)"
    ),
    new_code_cell(
        "print('before')\nclaim('toy/whole', 5, at_least=4)\nprint('between')\n"
        "claim('toy/wrong', 1.0, at_least=2.0, holds=False)\nprint('after')",
    ),
    new_code_cell(
        'svg = \'<svg role="img" aria-label="{}" width="9" height="9"><circle r="{}"/></svg>\'\n'
        "widgets.frames([svg.format(f'dot {r}', r) for r in range(1, 4)], label='Radius',\n"
        "               name='dot', captions=['One.', 'Two.', 'Three.'])"
    ),
    new_code_cell("environment()"),
]


def toolchain(*command, cwd, **variables):
    """Run a tool of this environment; returns what it said."""
    tool, *arguments = command
    done = subprocess.run(
        [Path(sys.executable).with_name(tool), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Path of the chapter, executed."""
    path = tmp_path_factory.mktemp("toy") / "toy.ipynb"
    made = new_notebook(cells=CELLS)
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    NotebookClient(made, timeout=120, store_widget_state=False).execute(cwd=str(ROOT))
    nbformat.write(made, path)
    return path


@pytest.fixture(scope="module")
def page(notebook):
    """Path of the chapter's page, built with every warning an error."""
    given = {name: config()[name] for name in ("execute", "parse", "only_build_toc_files")}
    folder = notebook.parent
    (folder / "_config.yml").write_text(yaml.safe_dump({"title": "Toy"} | given))
    (folder / "_toc.yml").write_text("format: jb-book\nroot: toy\n")
    said = toolchain("jupyter-book", "build", ".", "-W", "-n", "--keep-going", cwd=folder)
    assert "WARNING" not in said
    return folder / "_build" / "html" / "toy.html"


def outputs(notebook):
    return [c.outputs for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]


def test_a_cell_shows_the_lines_in_order_and_stores_a_record_for_each(notebook):
    cell = outputs(notebook)[1]
    lines = "".join(out.text for out in cell if out.output_type == "stream").splitlines()
    assert [line.split()[0] for line in lines] == [
        "before", "toy/whole", "between", "toy/wrong", "after",
    ]  # fmt: skip
    records = [out.data[CLAIM] for out in cell if out.output_type == "display_data"]
    assert [(r["id"], r["verdict"]) for r in records] == [
        ("toy/whole", "holds"),
        ("toy/wrong", "does not hold"),
    ]


def test_jupyter_has_nothing_to_show_but_the_lines_and_the_figure(notebook):
    shown = {"text/plain", "text/html", "image/png", "application/json", "text/markdown"}
    kinds = [
        (out.output_type, sorted(shown & set(out.get("data", {}))))
        for cell in outputs(notebook)
        for out in cell
        if out.output_type != "stream"
    ]
    # four records, and one figure as the value of its cell
    assert kinds.count(("display_data", [])) == 4
    assert kinds.count(("execute_result", ["text/html", "text/plain"])) == 1
    assert len(kinds) == 5


def test_the_environment_is_found_in_its_cell(notebook):
    records = [out.data[ENVIRONMENT] for out in outputs(notebook)[3] if "data" in out]
    assert [set(record) for record in records] == [{"versions", "device", "cores"}]


def test_the_page_shows_lines_and_glued_values_and_no_record(page):
    html = BeautifulSoup(page.read_text("utf-8"), "html.parser")
    assert "Glued 0.333333 and 0.33." in html.select_one("article").get_text()
    cells = html.select("div.cell")
    said = "".join(out.get_text() for out in cells[0].select(".output"))
    assert said.split() == "toy/third 0.3333 ± 0.010 expected 0.3333 ± 0.001 holds".split()
    for hidden in "application/", "vnd.coursekit", "verdict", "scrapbook":
        assert hidden not in html.select_one("article").get_text()


def test_a_second_run_compares_equal_cell_by_cell(notebook):
    said = toolchain(
        "pytest", "--nbval", notebook, "--nbval-current-env", "-p", "no:cacheprovider",
        "-c", os.devnull, "--rootdir", notebook.parent, cwd=ROOT,
    )  # fmt: skip
    assert "4 passed" in said


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_figure_on_the_page_is_started_once_and_moved_by_keyboard(browser, page, scheme):  # noqa: F811
    context = browser.new_context(color_scheme=scheme, offline=True)
    tab = context.new_page()
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.as_uri())
    figure = tab.locator("#ck-frames-dot")
    assert tab.locator(".ck-frames").count() == 1
    figure.get_by_role("slider", name="Radius").focus()
    for key, radius in [("ArrowRight", 2), ("End", 3), ("Home", 1)]:
        tab.keyboard.press(key)
        assert figure.locator("svg:visible").get_attribute("aria-label") == f"dot {radius}"
        assert figure.locator("output").inner_text() == f"{radius} of 3"
    figure.get_by_role("button", name="Next").click()
    assert figure.locator("output").inner_text() == "2 of 3"
    assert [e for e in errors if "THEBE" not in e] == []  # the book mends that, see book/_ext
    context.close()
