"""The assignments grade as they should, by nbgrader itself, in a folder beside the tree.

Blank earns nothing, the master's solution earns everything, and each typical wrong answer loses the
points of its question, no others, with a message that says what to look at.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbgrader.api import Gradebook

FOLDER = ROOT / "assignments"
README = (FOLDER / "README.md").read_text("utf-8")
NAMES = sorted(path.name for path in (FOLDER / "source").iterdir() if path.is_dir())
WRONG = {f"{path.parent.name}-{path.stem}": path for path in sorted(FOLDER.glob("wrong/*/*.py"))}


def cells(path):
    """Cells of a notebook that nbgrader knows, by their id."""
    known = [c for c in nbformat.read(path, 4).cells if "nbgrader" in c.metadata]
    return {cell.metadata.nbgrader.grade_id: cell for cell in known}


def points(path):
    """Points of each question, by the id of the cell that checks it."""
    graded = {id: cell.metadata.nbgrader for id, cell in cells(path).items()}
    return {id: meta.points for id, meta in graded.items() if meta.grade}


def question(wrong):
    """The question that a wrong answer belongs to: the first word of the file's name."""
    return wrong.stem.split("_")[0]


def master(name):
    return FOLDER / "source" / name / f"{name}.ipynb"


@dataclass
class Graded:
    """What nbgrader says about one submission."""

    scores: dict[str, float]
    errors: dict[str, str]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder with the students' versions; returns the folder and a function to run it."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(FOLDER / "source", folder / "source")
    shutil.copy(FOLDER / "nbgrader_config.py", folder)

    def nbgrader(*arguments):
        command = [Path(sys.executable).with_name("nbgrader"), *arguments]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    for name in NAMES:
        nbgrader("generate_assignment", name, "--create", "--force")
    return folder, nbgrader


@pytest.fixture(scope="module")
def graded(course):
    """A function of an assignment's name: its submissions, graded once, by student."""
    folder, nbgrader = course

    @functools.cache
    def grade(name):
        file = f"{name}.ipynb"
        handed_in = {"blank": nbformat.read(folder / "release" / name / file, 4)}
        handed_in["solved"] = nbformat.read(master(name), 4)
        for wrong in (path for path in WRONG.values() if path.parent.name == name):
            handed_in[wrong.stem] = nbformat.read(master(name), 4)
            for cell in handed_in[wrong.stem].cells:
                if cell.metadata.get("nbgrader", {}).get("grade_id") == question(wrong):
                    cell.source = wrong.read_text("utf-8")
        for student, notebook in handed_in.items():
            path = folder / "submitted" / student / name / file
            path.parent.mkdir(parents=True)
            nbformat.write(notebook, path)
        nbgrader("autograde", name, "--create")
        with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as book:
            return {student: read_result(folder, book, name, student) for student in handed_in}

    return grade


def read_result(folder, book, name, student):
    """Scores from the gradebook, messages from the notebook that nbgrader has run."""
    found = book.find_submission_notebook(name, name, student)
    run = cells(folder / "autograded" / student / name / f"{name}.ipynb")
    errors = {
        id: f"{output.ename}: {output.evalue}"
        for id, cell in run.items()
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    }
    return Graded({grade.name: grade.score for grade in found.grades}, errors)


@pytest.mark.parametrize("name", NAMES)
def test_the_blank_version_earns_nothing(graded, name):
    blank = graded(name)["blank"]
    assert blank.scores == dict.fromkeys(points(master(name)), 0)
    assert all(blank.errors.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_earns_every_point(graded, name):
    solved = graded(name)["solved"]
    assert solved.scores == points(master(name))
    assert sum(solved.scores.values()) > 0
    assert solved.errors == {}


@pytest.mark.parametrize("path", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_loses_its_question_alone_and_is_told_why(graded, path):
    name, check = path.parent.name, f"{question(path)}-check"
    result = graded(name)[path.stem]
    assert result.scores == points(master(name)) | {check: 0}
    assert list(result.errors) == [check]
    slip, message = re.match(r"# (.+)\n# says: (.+)\n", path.read_text("utf-8")).groups()
    assert re.search(message, result.errors[check]), result.errors[check]
    assert result.errors[check].startswith("AssertionError: ")
    assert slip.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_every_question_has_two_wrong_answers_or_more(name):
    tried = [question(path) for path in WRONG.values() if path.parent.name == name]
    assert {f"{asked}-check" for asked in tried} == set(points(master(name)))
    assert min(tried.count(asked) for asked in tried) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_some_slips_are_shown_to_the_student_and_some_are_found_by_grading_alone(name):
    """Visible checks help; hidden ones keep an answer from being fitted to them."""
    sources = {
        id: cell.source.split("### BEGIN HIDDEN") for id, cell in cells(master(name)).items()
    }
    for check in points(master(name)):
        wrong = [
            p for p in WRONG.values() if (p.parent.name, f"{question(p)}-check") == (name, check)
        ]
        caught = {fails(name, path, sources[check][0]) for path in wrong}
        assert caught == {True, False}, f"{check}: seen by the student {caught}"


def fails(name, answer, source):
    """Whether a wrong answer fails the checks in ``source``."""
    scope = {}
    for cell in cells(master(name)).values():
        if not (cell.metadata.nbgrader.grade or cell.metadata.nbgrader.solution):
            exec(cell.source, scope)
    exec(answer.read_text("utf-8"), scope)
    try:
        exec(source, scope)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", NAMES)
def test_a_student_sees_neither_solutions_nor_hidden_tests(course, name):
    folder, _ = course
    given, kept = cells(folder / "release" / name / f"{name}.ipynb"), cells(master(name))
    assert given.keys() == kept.keys()
    for id, cell in given.items():
        assert not re.search("SOLUTION|HIDDEN", cell.source)
        if kept[id].metadata.nbgrader.solution:
            assert "raise NotImplementedError" in cell.source
            assert len(cell.source) < len(kept[id].source)
        elif kept[id].metadata.nbgrader.grade:
            assert cell.source.strip() == kept[id].source.split("### BEGIN HIDDEN")[0].strip()
        assert not cell.get("outputs")


@pytest.mark.parametrize("name", NAMES)
def test_a_second_generation_gives_the_same_version(course, name):
    folder, nbgrader = course
    path = folder / "release" / name / f"{name}.ipynb"
    before = [(id, cell.source) for id, cell in cells(path).items()]
    nbgrader("generate_assignment", name, "--create", "--force")
    assert [(id, cell.source) for id, cell in cells(path).items()] == before


@pytest.mark.parametrize("name", NAMES)
def test_the_master_is_stored_without_outputs_and_with_known_rows(name):
    notebook = nbformat.read(master(name), 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    rows = (ROOT / "book" / "_data" / "curriculum.yml").read_text("utf-8")
    assert all(
        re.search(rf"^\s*{row}:", rows, re.M) for row in notebook.metadata.coursekit.curriculum
    )
    assert notebook.metadata.coursekit.curriculum


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_assignments_states_rows_and_points(name):
    given = points(master(name)).values()
    rows = nbformat.read(master(name), 4).metadata.coursekit.curriculum
    line = f"{', '.join(rows)} | {' + '.join(map(str, given))} = {sum(given)} |"
    assert re.search(rf"^\| `{name}` .*\| {re.escape(line)}$", README, re.M)
