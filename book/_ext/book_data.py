"""What the generated pages show, read from stored notebooks, docstrings and tests.

Everything here is a pure function of files: nothing is executed and nothing is imported.
Each ``*_page`` function returns MyST Markdown; ``book_pages`` puts it where a page asks for it.
"""

import ast
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

CLAIM = "application/vnd.coursekit.claim+json"
ENVIRONMENT = "application/vnd.coursekit.environment+json"
VERDICTS = {"holds": "✓ holds", "does not hold": "✗ does not hold"}


class BookDataError(ValueError):
    """A notebook, docstring or test says something that the book cannot show."""


@dataclass(frozen=True)
class Claim:
    """One record of ``experiment.claim`` and the cell that printed it."""

    record: dict
    cell: int

    @property
    def label(self):
        """Cross-reference target of the cell."""
        return "claim-" + re.sub(r"[^a-z0-9]+", "-", self.record["id"].lower())


@dataclass(frozen=True)
class Chapter:
    """One notebook, read without running it."""

    name: str
    curriculum: list[str]
    budget_s: float | None
    claims: list[Claim]
    rows: dict[str, list[int]]  # row -> indices of the headings under which a cell shows it
    headings: int
    cells: int
    exercises: int
    figures: int
    seconds: float | None
    environment: str | None


def load_curriculum(path):
    """Chapters of ``curriculum.yml``: a list of ``{name, title, rows: {id: title}}``."""
    chapters = yaml.safe_load(Path(path).read_text("utf-8"))
    ids = Counter(row for chapter in chapters for row in chapter["rows"])
    twice = sorted(row for row, n in ids.items() if n > 1)
    if twice:
        raise BookDataError(f"{Path(path).name}: row {twice[0]} stands in two chapters")
    return chapters


def heading_label(chapter, index):
    """Cross-reference target of a chapter's heading number ``index``, counted from 0."""
    return f"{chapter}-heading-{index}"


def read_chapter(path):
    """Read one notebook; a `BookDataError` names the file and the cell that is wrong."""
    path = Path(path)
    try:
        notebook = json.loads(path.read_text("utf-8"))
        cells, kit = notebook["cells"], notebook["metadata"].get("coursekit", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BookDataError(f"{path.name}: not a notebook ({error!r})") from error
    claims, rows, headings, exercises, figures, environment = [], defaultdict(list), 0, 0, 0, None
    markdown = MarkdownIt()
    try:
        for index, cell in enumerate(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                headings += sum(t.type == "heading_open" for t in markdown.parse(source))
                exercises += len(re.findall(r"^[`:]{3,}\{exercise(?:-start)?\}", source, re.M))
            for row in cell["metadata"].get("coursekit", {}).get("rows", []):
                if headings - 1 not in rows[row]:
                    rows[row].append(headings - 1)
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                figures += "image/png" in data or "ck-frames" in "".join(data.get("text/html", ""))
                if CLAIM in data:
                    claims.append(Claim(_checked_claim(data[CLAIM], path.stem), index))
                if ENVIRONMENT in data:
                    environment = _machine(data[ENVIRONMENT])
        return Chapter(
            name=path.stem,
            curriculum=list(kit.get("curriculum", [])),
            budget_s=kit.get("budget_s"),
            claims=claims,
            rows=dict(rows),
            headings=headings,
            cells=sum(cell["cell_type"] == "code" for cell in cells),
            exercises=exercises,
            figures=figures,
            seconds=_seconds(cells),
            environment=environment,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BookDataError):
            raise BookDataError(f"{path.name}, cell {index}: {error}") from error
        raise BookDataError(f"{path.name}, cell {index}: malformed ({error!r})") from error


def read_book(notebooks, curriculum):
    """All chapters of a folder in curriculum order, checked against the curriculum."""
    order = {chapter["name"]: n for n, chapter in enumerate(curriculum)}
    known = {row for chapter in curriculum for row in chapter["rows"]}
    chapters, owner = [], {}
    for path in sorted(Path(notebooks).glob("*.ipynb"), key=lambda p: order.get(p.stem, 999)):
        if path.stem not in order:
            raise BookDataError(f"{path.name}: no chapter of this name in curriculum.yml")
        chapter = read_chapter(path)
        unknown = sorted((set(chapter.curriculum) | set(chapter.rows)) - known)
        if unknown:
            raise BookDataError(f"{path.name}: no row {unknown[0]} in curriculum.yml")
        for claim in chapter.claims:
            id = claim.record["id"]
            if id in owner:
                raise BookDataError(f"{path.name}: claim {id} is already made in {owner[id]}")
            owner[id] = path.name
        chapters.append(chapter)
    return chapters


def functions_by_row(package):
    """``{row: [dotted names]}`` from docstring lines such as ``Curriculum: A3, A7.``."""
    found = defaultdict(list)
    for path in sorted(Path(package).rglob("*.py")):
        parts = path.relative_to(Path(package).parent).with_suffix("").parts
        room = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, node in _definitions(ast.parse(path.read_text("utf-8")), room):
            match = re.search(r"Curriculum:\s*([A-Z0-9, \n]+)", ast.get_docstring(node) or "", re.M)
            for row in re.findall(r"[A-Z]\d+", match[1]) if match else []:
                found[row].append(name)
    return dict(found)


def public_names(package):
    """``{where defined: where imported from}``, room by room, in the order of the source.

    A room that is a folder hands on the names its ``__init__`` imports; a room that is a file
    offers its own functions and classes. Names made by assignment have no docstring of ours and
    are left out.
    """
    package, names = Path(package), {}
    rooms = [*package.glob("[a-z]*.py"), *(p.parent for p in package.glob("[a-z]*/__init__.py"))]
    for path in sorted(rooms):
        room = f"{package.name}.{path.stem}"
        names[room] = room
        if path.is_dir():
            imports = ast.parse((path / "__init__.py").read_text("utf-8")).body
            for node in imports:
                if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{room}."):
                    parts = node.module.split(".")[1:]
                    defined = _public(package.joinpath(*parts).with_suffix(".py"))
                    for name in [a.name for a in node.names if a.name in defined]:
                        names[f"{node.module}.{name}"] = f"{room}.{name}"
        else:
            names |= {f"{room}.{name}": f"{room}.{name}" for name in _public(path)}
    return names


def tests_by_row(folder):
    """``{row: ["test_file.py::test_name"]}`` from ``@pytest.mark.covers("A3")``."""
    found = defaultdict(list)
    for path in sorted(Path(folder).glob("test_*.py")):
        for name, node in _definitions(ast.parse(path.read_text("utf-8")), path.name):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.covers":
                    for row in mark.args:
                        test = name[len(path.name) + 1 :].replace(".", "::")
                        found[ast.literal_eval(row)].append(f"{path.name}::{test}")
    return dict(found)


def check_rows(found, curriculum, where):
    """Refuse rows that the curriculum does not have."""
    unknown = sorted(found.keys() - {row for chapter in curriculum for row in chapter["rows"]})
    if unknown:
        raise BookDataError(f"{where}: {found[unknown[0]][0]} names row {unknown[0]}, not known")


# Pages


def chapters_page(curriculum, chapters):
    """The table of contents of the intro: what is written and what is not."""
    written = {chapter.name for chapter in chapters}
    rows = [
        [
            f"{{doc}}`/notebooks/{c['name']}`" if c["name"] in written else c["title"],
            f"{len(c['rows'])}",
            "written" if c["name"] in written else "not written yet",
        ]
        for c in curriculum
    ]
    return _table(["Chapter", "Curriculum rows", "State"], rows)


def claims_page(chapters):
    """Every claim with its expectation, value and verdict; counts first."""
    claims = [claim for chapter in chapters for claim in chapter.claims]
    if not claims:
        return "No chapter makes a claim yet."
    holds = sum(claim.record["verdict"] == "holds" for claim in claims)
    counts = f"**{len(claims)} claims: {holds} hold, {len(claims) - holds} do not.**"
    rows = []
    for record, label in [(claim.record, claim.label) for claim in claims]:
        verdict = record["verdict"]
        rows.append(
            [
                f"{{ref}}`{record['id']} <{label}>`",
                f"[{VERDICTS[verdict]}]{{.ck-{verdict.replace(' ', '-')}}}",
                ours(record),
                expectation(record),
                record.get("source") or "",
            ]
        )
    return f"{counts}\n\n" + _table(["Claim", "Verdict", "Ours", "Expected", "Source"], rows)


def coverage_page(curriculum, chapters, functions, tests, public, source):
    """A section a chapter; a row of a written chapter with its section, functions and tests.

    ``public`` holds the names that have an entry in the API reference; ``source`` is the address
    of the tests' folder.
    """
    written = {chapter.name: chapter for chapter in chapters}
    pages = []
    for planned in curriculum:
        pages.append(f"## {planned['title']}")
        if planned["name"] not in written:
            rows = [[row, title, "not written yet"] for row, title in planned["rows"].items()]
            pages.append(_table(["Row", "What", "Chapter"], rows))
            continue
        chapter = written[planned["name"]]
        for row, title in planned["rows"].items():
            shown = [
                f"{{ref}}`{heading_label(chapter.name, h)}`" for h in chapter.rows.get(row, [])
            ]
            calls = [_function(name, public) for name in functions.get(row, [])]
            links = [_test_link(test, source) for test in tests.get(row, [])]
            pages.append(
                f"{row}. {title}\n"
                f": Shown in: {'; '.join(shown) or '–'}\n"
                f": Functions: {', '.join(calls) or '–'}\n"
                f": Tests: {'; '.join(links) or '–'}"
            )
    return "\n\n".join(pages)


def status_page(chapters):
    """What each chapter holds, how long it took and on which machine."""
    if not chapters:
        return "No chapter has been run yet."
    holds = [
        [_link(c), *map(str, (len(c.curriculum), c.cells, len(c.claims), c.exercises, c.figures))]
        for c in chapters
    ]
    runs = [
        [
            _link(c),
            "not measured" if c.seconds is None else f"{c.seconds:.0f} s",
            "none set" if c.budget_s is None else f"{c.budget_s:g} s",
            c.environment or "not recorded",
        ]
        for c in chapters
    ]
    return "\n\n".join(
        [
            _table(["Chapter", "Rows", "Code cells", "Claims", "Exercises", "Figures"], holds),
            _table(["Chapter", "Run time", "Budget", "Run on"], runs),
        ]
    )


def api_page(public):
    """An autodoc block a room, with the room's public names in the order of the source."""
    rooms = defaultdict(list)
    for shown in public.values():
        rooms[".".join(shown.split(".")[:2])].append(shown.split(".")[2:])
    return "\n\n".join(
        f"## {room.split('.')[1]}\n\n```{{eval-rst}}\n.. automodule:: {room}\n"
        f"   :members: {', '.join(name for [name] in filter(None, names))}\n```"
        for room, names in rooms.items()
    )


def expectation(record):
    """What a claim expects, in words."""
    if record.get("expect") is not None:
        within = record.get("within")
        if within == 0:
            return f"exactly {number(record['expect'])}"
        return number(record["expect"]) + (f" ± {number(within)}" if within is not None else "")
    bounds = [("at least", "at_least"), ("at most", "at_most")]
    said = [f"{w} {number(record[k])}" for w, k in bounds if record.get(k) is not None]
    return ", ".join(said) or "true"


def ours(record):
    """The value of a claim with its spread, with the digits that the spread or tolerance needs."""
    value, spread, over = record["value"], record.get("spread"), record.get("over")
    scale = spread or record.get("within")
    if isinstance(value, float) and scale:
        decimals = max(0, 1 - math.floor(math.log10(scale)))
        shown = f"{value:.{decimals}f}" + (f" ± {spread:.{decimals}f}" if spread else "")
    else:
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return shown.replace("-", "−") + (f" ({over})" if over else "")


def number(value):
    """A number as it was written in the claim, with a minus sign that does not break a line."""
    return (f"{value:g}" if isinstance(value, float) else str(value)).replace("-", "−")


def _checked_claim(record, chapter):
    if not isinstance(record, dict) or not {"id", "value", "verdict"} <= record.keys():
        raise BookDataError(f"claim without id, value or verdict: {record!r}")
    if record["verdict"] not in VERDICTS:
        raise BookDataError(f"claim {record['id']}: unknown verdict {record['verdict']!r}")
    if not re.fullmatch(rf"{chapter}/[a-z0-9-]+", record["id"]):
        raise BookDataError(f"claim {record['id']}: expected an id {chapter}/<slug>")
    return record


def _machine(record):
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['device']}, {record['cores']} cores; {versions}"


def _seconds(cells):
    """Sum of the cells' own run times, or None when one of them was not timed."""
    total = 0.0
    for cell in cells:
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
            stamps = cell["metadata"].get("execution", {})
            if not {"iopub.status.busy", "iopub.status.idle"} <= stamps.keys():
                return None
            busy, idle = (
                datetime.fromisoformat(stamps[f"iopub.status.{k}"].replace("Z", "+00:00"))
                for k in ("busy", "idle")
            )
            total += (idle - busy).total_seconds()
    return total


def _public(path):
    """Names of a module's own public functions and classes."""
    body = ast.parse(path.read_text("utf-8")).body
    kinds = ast.FunctionDef | ast.ClassDef
    return [node.name for node in body if isinstance(node, kinds) and node.name[0] != "_"]


def _definitions(tree, prefix):
    """Yield ``(dotted name, node)`` of a module and of every function and class in it."""
    yield prefix, tree
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}.{node.name}")
            else:
                yield f"{prefix}.{node.name}", node


def _function(name, public):
    """Link to the API entry of a function or method, written as a reader calls it."""
    owner, _, method = (name, "", "") if name in public else name.rpartition(".")
    if owner not in public:
        return f"`{name.removeprefix('coursekit.')}`"
    shown = ".".join(filter(None, [public[owner], method]))
    return f"{{py:obj}}`{shown.removeprefix('coursekit.')} <{shown}>`"


def _link(chapter):
    return f"{{doc}}`/notebooks/{chapter.name}`"


def _test_link(test, source):
    """Link to a test's file; a test's name is a sentence and is shown as one."""
    file, _, name = test.partition("::")
    return f"[{name.rpartition('test_')[2].replace('_', ' ')}]({source}/{file})"


def _table(header, rows):
    """A MyST table; a bar inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
