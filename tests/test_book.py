"""The generated pages from hand-made notebooks, and the files of the built site."""

import json
import re
import sys
from urllib.parse import urlsplit

import pytest
from book_site import config, documents, site  # noqa: F401
from bs4 import BeautifulSoup
from conftest import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import book_data

CURRICULUM = [
    {"name": "autodiff", "title": "Derivatives", "rows": {"A1": "Steps", "A2": "Chains"}},
    {"name": "bagging", "title": "Averages", "rows": {"B1": "Samples"}},
]


def record(id="autodiff/slope", **fields):
    """What ``experiment.claim`` stores."""
    keys = "expect", "within", "at_least", "at_most", "spread", "over", "source"
    return dict.fromkeys(keys) | {"id": id, "value": 0.96812, "verdict": "holds"} | fields


def output(mime, data):
    return {"output_type": "display_data", "metadata": {}, "data": {mime: data, "text/plain": "x"}}


def code(*outputs, seconds=None, **metadata):
    if seconds is not None:
        stamp = "2026-01-01T00:00:{:09.6f}Z"
        metadata["execution"] = {
            "iopub.status.busy": stamp.format(1),
            "iopub.status.idle": stamp.format(1 + seconds),
        }
    return {"cell_type": "code", "source": "x", "metadata": metadata, "outputs": list(outputs)}


def markdown(source, **metadata):
    return {"cell_type": "markdown", "source": source, "metadata": metadata}


def claim(id="autodiff/slope", **fields):
    return code(output(book_data.CLAIM, record(id, **fields)))


@pytest.fixture
def write(tmp_path):
    """Write a notebook of the given cells; returns its path."""

    def write(*cells, name="autodiff", curriculum=("A1",)):
        kit = {"curriculum": list(curriculum), "budget_s": 60}
        path = tmp_path / f"{name}.ipynb"
        path.write_text(json.dumps({"metadata": {"coursekit": kit}, "cells": list(cells)}))
        return path

    return write


# Reading


def test_a_chapter_is_counted_from_its_cells(write):
    machine = {"device": "cpu", "cores": 2, "versions": {"python": "3.11.7", "torch": "2.13.0"}}
    chapter = book_data.read_chapter(
        write(
            markdown("# Derivatives\n\n```python\n# no heading\n```\n\n## Steps"),
            code(output("image/png", ""), seconds=1.5, coursekit={"rows": ["A1"]}),
            code(output("text/html", ["<div class='", "ck-frames'>"]), seconds=2),
            markdown("```{exercise-start} Try\n```\n\n:::{exercise}\n:::\n\n## Chains"),
            markdown("More.", coursekit={"rows": ["A2", "A1"]}),
            code(output(book_data.ENVIRONMENT, machine), seconds=0.25),
        )
    )
    assert (chapter.cells, chapter.headings, chapter.exercises, chapter.figures) == (3, 3, 2, 2)
    assert chapter.rows == {"A1": [1, 2], "A2": [2]}
    assert chapter.seconds == pytest.approx(3.75)
    assert chapter.budget_s == 60
    assert chapter.environment == "cpu, 2 cores; python 3.11.7, torch 2.13.0"


def test_one_cell_without_a_time_leaves_the_chapter_unmeasured(write):
    chapter = book_data.read_chapter(write(code(seconds=1), code()))
    assert chapter.seconds is None
    assert "not measured" in book_data.status_page([chapter])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([{"cell_type": "code"}], r"autodiff.ipynb, cell 0: malformed \(KeyError\('source'\)\)"),
        (
            [markdown(""), claim("bagging/slope")],
            r"autodiff.ipynb, cell 1: claim bagging/slope: ex",
        ),
        ([claim(verdict="maybe")], r"claim autodiff/slope: unknown verdict 'maybe'"),
        ([code(output(book_data.CLAIM, {"id": 1}))], r"cell 0: claim without id, value or verdict"),
        ([claim(), claim()], r"claim autodiff/slope is already made in autodiff.ipynb"),
        ([code(coursekit={"rows": ["A9"]})], r"autodiff.ipynb: no row A9 in curriculum.yml"),
    ],
)
def test_a_notebook_that_the_book_cannot_show_is_named(write, cells, message):
    path = write(*cells)
    with pytest.raises(book_data.BookDataError, match=message):
        book_data.read_book(path.parent, CURRICULUM)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_that_is_no_notebook_is_named(tmp_path, text):
    (tmp_path / "autodiff.ipynb").write_text(text)
    with pytest.raises(book_data.BookDataError, match=r"autodiff.ipynb: not a notebook"):
        book_data.read_book(tmp_path, CURRICULUM)


def test_a_chapter_must_have_a_place_in_the_curriculum(write):
    path = write(name="cooking")
    with pytest.raises(book_data.BookDataError, match=r"cooking.ipynb: no chapter of this name"):
        book_data.read_book(path.parent, CURRICULUM)


def test_a_row_in_two_chapters_is_refused(tmp_path):
    (tmp_path / "c.yml").write_text("- {name: a, rows: {A1: x}}\n- {name: b, rows: {A1: x}}\n")
    with pytest.raises(book_data.BookDataError, match="c.yml: row A1 stands in two chapters"):
        book_data.load_curriculum(tmp_path / "c.yml")


def test_functions_and_tests_name_their_rows(tmp_path):
    room = tmp_path / "kit" / "room"
    (room / "deep").mkdir(parents=True)
    (room / "__init__.py").write_text(
        "from kit.room.core import step\nfrom kit.room.deep.run import go\n"
    )
    (room / "deep" / "run.py").write_text("def go():\n    pass\n")
    (room / "core.py").write_text(
        'def step():\n    """Go.\n\n    Curriculum: A1, A2.\n    """\n\ndef _no():\n    pass\n'
    )
    (tmp_path / "kit" / "flat.py").write_text(
        'class C:\n    def m(self):\n        "Curriculum: B1."\n'
    )
    (tmp_path / "test_x.py").write_text(
        "import pytest\n\n@pytest.mark.covers('A1', 'B1')\ndef test_it_goes(): pass\n"
        "@pytest.mark.skip('A2')\ndef test_other(): pass\n"
    )
    assert book_data.functions_by_row(tmp_path / "kit") == {
        "A1": ["kit.room.core.step"],
        "A2": ["kit.room.core.step"],
        "B1": ["kit.flat.C.m"],
    }
    assert book_data.public_names(tmp_path / "kit") == {
        "kit.flat": "kit.flat",
        "kit.flat.C": "kit.flat.C",
        "kit.room": "kit.room",
        "kit.room.core.step": "kit.room.step",
        "kit.room.deep.run.go": "kit.room.go",
    }
    tests = book_data.tests_by_row(tmp_path)
    assert tests == {"A1": ["test_x.py::test_it_goes"], "B1": ["test_x.py::test_it_goes"]}
    with pytest.raises(
        book_data.BookDataError, match="tests: test_x.py::test_it_goes names row B1"
    ):
        book_data.check_rows(tests, CURRICULUM[:1], "tests")


# Writing


@pytest.mark.parametrize(
    ("fields", "expected", "ours"),
    [
        ({"expect": 1.0, "within": 0.05, "spread": 0.0412}, "1 ± 0.05", "0.968 ± 0.041"),
        ({"expect": 1.3633, "within": 5e-05, "value": 1.36328}, "1.3633 ± 5e−05", "1.363280"),
        ({"expect": -8, "within": 0, "value": -8}, "exactly −8", "−8"),
        ({"at_least": 0.95, "over": "5 seeds"}, "at least 0.95", "0.968 (5 seeds)"),
        ({"at_least": 0, "at_most": 1e-10, "value": 4e-16}, "at least 0, at most 1e−10", "4e−16"),
        ({"value": True}, "true", "True"),
    ],
)
def test_a_claim_shows_the_digits_that_its_tolerance_needs(fields, expected, ours):
    assert book_data.expectation(record(**fields)) == expected
    assert book_data.ours(record(**fields)) == ours


def test_the_claims_page_counts_links_and_judges(write):
    failing = claim("autodiff/table-1", verdict="does not hold", source="paper | table 1")
    path = write(claim(), failing)
    page = book_data.claims_page(book_data.read_book(path.parent, CURRICULUM))
    assert "2 claims: 1 hold, 1 do not." in page
    assert "{ref}`autodiff/slope <claim-autodiff-slope>`" in page
    assert "[✗ does not hold]{.ck-does-not-hold}" in page
    assert r"paper \| table 1" in page
    assert "No chapter makes a claim yet." in book_data.claims_page([])


def test_the_coverage_page_links_what_exists_and_says_what_does_not(write):
    path = write(markdown("# Derivatives"), code(coursekit={"rows": ["A1"]}))
    page = book_data.coverage_page(
        CURRICULUM,
        book_data.read_book(path.parent, CURRICULUM),
        functions={"A1": ["kit.room.core.step", "kit.room.core.inner"]},
        tests={"A1": ["test_x.py::test_it_goes"]},
        public={"kit.room.core.step": "kit.room.step"},
        source="https://example.org/tests",
    )
    assert "A1. Steps\n: Shown in: {ref}`autodiff-heading-0`" in page
    assert "{py:obj}`kit.room.step <kit.room.step>`, `kit.room.core.inner`" in page
    assert "[it goes](https://example.org/tests/test_x.py)" in page
    assert "| B1 | Samples | not written yet |" in page


def test_pages_of_an_empty_book_say_so():
    assert "not written yet" in book_data.chapters_page(CURRICULUM, [])
    assert book_data.status_page([]) == "No chapter has been run yet."


# The repository's own chapters


@pytest.fixture(scope="module")
def chapters():
    curriculum = book_data.load_curriculum(ROOT / "book" / "_data" / "curriculum.yml")
    return book_data.read_book(ROOT / "notebooks", curriculum)


def test_every_row_that_a_chapter_promises_is_shown_and_tested(chapters):
    tests = book_data.tests_by_row(ROOT / "tests")
    for chapter in chapters:
        assert set(chapter.curriculum) == set(chapter.rows), chapter.name
        assert not set(chapter.curriculum) - tests.keys(), chapter.name


def test_every_chapter_makes_claims_and_sets_exercises(chapters):
    assert chapters
    for chapter in chapters:
        assert chapter.claims, chapter.name
        assert chapter.exercises >= 5, chapter.name
        assert chapter.environment, chapter.name


# The built site


@pytest.fixture(scope="module")
def pages(site):  # noqa: F811
    """Every HTML page of the site, parsed."""
    return {
        str(path.relative_to(site)): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.parts
    }


def test_every_chapter_and_no_other_page_has_launch_buttons(pages):
    repository, launch = config()["repository"], config()["launch_buttons"]
    name, branch = urlsplit(repository["url"]).path, repository["branch"]
    for document in documents():
        expected = {
            f"{launch['binderhub_url']}/v2/gh{name}/{branch}?urlpath=lab/tree/{document}.ipynb",
            f"{launch['colab_url']}/github{name}/blob/{branch}/{document}.ipynb",
        }
        buttons = pages[f"{document}.html"].select(".dropdown-launch-buttons a[href]")
        assert {a["href"] for a in buttons} == (
            expected if document.startswith("notebooks/") else set()
        )


def test_every_notebook_is_in_the_table_of_contents():
    stored = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert stored == {name for name in documents() if name.startswith("notebooks/")}


def test_every_asset_is_a_file_of_the_site(site, pages):  # noqa: F811
    assets = "script[src], link[rel=stylesheet], link[rel=preload], link[rel=icon], img, iframe"
    for name, page in pages.items():
        for tag in page.select(assets):
            address = tag.get("src") or tag.get("href")
            if not address.startswith("data:"):
                parts = urlsplit(address)
                assert not parts.scheme + parts.netloc, f"{name}: {address}"
                assert ((site / name).parent / parts.path).is_file(), f"{name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\W*(https?:)?//", style.read_text("utf-8")), style


def test_no_page_names_a_folder_of_the_machine_that_built_it(site):  # noqa: F811
    machine = re.compile(rf"{re.escape(str(ROOT))}/|/home/|/tmp/|site-packages/")
    for path in [*site.rglob("*.html"), site / "searchindex.js"]:
        assert not machine.search(path.read_text("utf-8")), path


def test_formulas_need_nothing_from_outside(site, pages):  # noqa: F811
    assert (site / "_static/mathjax/tex-chtml.js").is_file()
    assert list((site / "_static/mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))
    with_formulas = [name for name, page in pages.items() if page.select(".math")]
    assert {"book/notation.html", "notebooks/autodiff.html"} <= set(with_formulas)
    for name in with_formulas:
        assert pages[name].select("script[src*='mathjax/tex-chtml.js']"), name


def test_every_image_has_a_text_that_is_no_file_name(pages):
    for name in documents():
        for image in pages[f"{name}.html"].select("article img"):
            alt = image.get("alt", "")
            assert len(alt) > 10, f"{name}: {image.get('src', '')[:80]}"
            assert not re.search(r"\.(png|svg|jpe?g)$|^\.?\.?/", alt), f"{name}: {alt}"


def test_generated_pages_hold_what_the_notebooks_hold(pages, chapters):
    assert not [name for name, page in pages.items() if "% generated" in page.text]
    table = pages["book/claims.html"].select_one("article table")
    for made in (made for chapter in chapters for made in chapter.claims):
        link = table.find("a", string=made.record["id"])
        assert link, made.record["id"]
        target = urlsplit(link["href"])
        chapter = pages[target.path.removeprefix("../")]
        assert chapter.find(id=target.fragment), link["href"]
    for chapter in chapters:
        assert f"{chapter.seconds:.0f} s" in pages["book/status.html"].select_one("article").text
        for row in chapter.curriculum:
            assert re.search(rf"\b{row}\. ", pages["book/coverage.html"].text)


def test_the_reference_has_every_public_name(pages):
    names = book_data.public_names(ROOT / "coursekit").values()
    for name in (name for name in names if name.count(".") == 2):
        assert pages["book/api.html"].find(id=name), name
