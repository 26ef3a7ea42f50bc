"""The chapters as they are stored: executed, complete, legible, and free of accidents.

nbval runs them again; these tests read the files. Each checker takes a notebook and yields what is
wrong with it, and is tried on a planted fault before it is trusted with a chapter.
"""

import ast
import copy
import re
from datetime import datetime

import nbformat
import pytest
import yaml
from conftest import ROOT

CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CLAIM = "application/vnd.coursekit.claim+json"
WIDGET = "application/vnd.jupyter.widget-view+json"

FIRST_CELL = """\
import importlib.util
import os
if importlib.util.find_spec("coursekit") is None:
    repo = "git+{address}@{branch}"
    spec = os.environ.get("COURSEKIT_SPEC", f"coursekit @ {{repo}}")
    %pip install -q "{{spec}}"
import coursekit
"""


def config():
    """The book's configuration, the one place that states the repository's address."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def first_cell():
    """The source every notebook begins with."""
    repository = config()["repository"]
    return FIRST_CELL.format(address=repository["url"], branch=repository["branch"])


def curriculum_rows():
    """Every row id of the curriculum."""
    text = (ROOT / "book/_data/curriculum.yml").read_text(encoding="utf-8")
    return {row for chapter in yaml.safe_load(text) for row in chapter["rows"]}


# ---- reading ----


def code_cells(nb):
    """Position and cell of each code cell that has code."""
    return [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == "code" and c.source.strip()]


def tags(cell):
    """A cell's tags."""
    return cell.metadata.get("tags", [])


def data(cell):
    """Mime bundles that a cell displayed."""
    return [o.data for o in cell.outputs if "data" in o]


def printed(cell):
    """The text that a cell's outputs show: streams, plain representations and HTML."""
    parts = [o.text for o in cell.outputs if o.output_type == "stream"]
    for bundle in data(cell):
        parts += [str(bundle[mime]) for mime in ("text/plain", "text/html") if mime in bundle]
    return re.sub(r"data:[\w/+]+;base64,[\w+/=]+", "", "\n".join(parts))


def prose(nb):
    """All Markdown of a notebook as one text."""
    return "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")


def ends_its_plot(source):
    """Whether a cell shows its plot and draws nothing after that; a widget shows its own."""
    _, shown, after = source.rpartition("plt.show()")
    drawn = re.search(r"^(ax|fig|plt|plot)\b", after, flags=re.M)
    return source.startswith("widgets.") or bool(shown and not drawn)


def seconds(cell):
    """Time a cell took when it was stored; None where that was not recorded."""
    stamps = cell.metadata.get("execution", {})
    ends = [stamps.get(key) for key in ("iopub.execute_input", "shell.execute_reply")]
    if None in ends:
        return None
    start, stop = (datetime.fromisoformat(end.replace("Z", "+00:00")) for end in ends)
    return (stop - start).total_seconds()


# ---- the rules ----


def is_executed_from_top_to_bottom(nb, name):
    counts = [cell.execution_count for _, cell in code_cells(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}: run `make notebooks`"


def raises_only_where_it_says_so(nb, name):
    for i, cell in code_cells(nb):
        raised = [o.ename for o in cell.outputs if o.output_type == "error"]
        if bool(raised) != ("raises-exception" in tags(cell)):
            yield f"cell {i} raises {raised}, tags are {tags(cell)}"
        if any(o.output_type == "stream" and o.name == "stderr" for o in cell.outputs):
            yield f"cell {i} writes to stderr"


def begins_with_the_colab_cell(nb, name):
    cell = nb.cells[0]
    if cell.cell_type != "code" or cell.source.strip() != first_cell().strip():
        yield f"the first cell is not:\n{first_cell()}"
    if "remove-cell" not in tags(cell):
        yield "the first cell is not tagged remove-cell"


def has_short_cells(nb, name):
    for i, cell in code_cells(nb):
        lines = cell.source.splitlines()
        code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
        if len(code) > 15:
            yield f"cell {i} has {len(code)} lines of code, more than 15"
        yield from (f"cell {i} is wider than 80 columns: {s}" for s in lines if len(s) > 80)


def stores_no_accidents(nb, name):
    accidents = {
        "memory address": r"\b0x[0-9a-f]{6,}",
        "time": r"\b\d+(\.\d+)? ?(ns|[µu]s|ms|s|sec|secs|seconds|minutes)\b|CPU times|Wall time",
        "machine path": r"(?<![\w.])/(work|tmp|root|home|Users|opt|usr)/|[A-Z]:\\|site-packages",
    }
    for i, cell in enumerate(nb.cells):
        shown = printed(cell) if cell.cell_type == "code" else ""
        for what, pattern in accidents.items():
            text = shown + "\n" + cell.source if what == "machine path" else shown
            if found := re.search(pattern, text):
                yield f"cell {i} holds a {what}: {found[0]}"


def shows_its_plots_and_describes_them(nb, name):
    names = []
    for i, cell in code_cells(nb):
        images = [m for bundle in data(cell) for m in bundle if m.startswith("image/")]
        html = "".join(b.get("text/html", "") for b in data(cell))
        for tag in re.findall(r"<img\b[^>]*>", re.sub(r"base64,[\w+/=]+", "", html)):
            if not re.search(r"""\balt=(["'])[^"']{20,}""", tag):
                yield f"cell {i}: an image in its HTML has no alt text"
        if not images:
            continue
        if not ends_its_plot(cell.source):
            yield f"cell {i} draws and does not end its plot with plt.show()"
        about = cell.metadata.get("mystnb", {})
        figure = about.get("figure", {})
        names.append(figure.get("name"))
        if len(about.get("image", {}).get("alt", "")) < 40:
            yield f"cell {i}: mystnb.image.alt has fewer than 40 characters"
        if len(figure.get("caption", "")) < 40:
            yield f"cell {i}: mystnb.figure.caption does not say what to see"
        if not str(figure.get("name", "")).startswith("fig-"):
            yield f"cell {i}: mystnb.figure.name does not begin with fig-"
    if len(set(names)) < len(names):
        yield f"figure names are not unique: {names}"


def has_exercises_with_hints_and_folded_solutions(nb, name):
    text = prose(nb)
    starts = list(re.finditer(r"^(`{3,}|:{3,})\{exercise(?:-start)?\}", text, flags=re.M))
    if len(starts) < 5:
        yield f"{len(starts)} exercises, fewer than 5"
    for start, end in zip(starts, [s.start() for s in starts[1:]] + [len(text)], strict=True):
        block = text[start.start() : end]
        label = re.search(r"^:label: (\S+)", block, flags=re.M)
        if not label:
            yield f"an exercise has no label: {block.splitlines()[0]}"
            continue
        solution = re.search(
            rf"^(?:`{{3,}}|:{{3,}})\{{solution(?:-start)?\}} {label[1]}\s*\n((?::.*\n)*)",
            text,
            re.M,
        )
        if not solution or "dropdown" not in solution[1]:
            yield f"{label[1]} has no solution with `:class: dropdown`"
        question = re.split(r"^(?:`{3,}|:{3,})\{solution", block, flags=re.M)[0]
        if not re.search(r"\bhint\b", question, flags=re.I):
            yield f"{label[1]} has no hint"


def states_at_least_three_claims(nb, name):
    claims = [b[CLAIM] for _, cell in code_cells(nb) for b in data(cell) if CLAIM in b]
    ids = [claim["id"] for claim in claims]
    if len(ids) < 3:
        yield f"{len(ids)} claims, fewer than 3"
    if len(set(ids)) < len(ids):
        yield f"claim ids are not unique: {ids}"
    yield from (
        f"claim {i} does not begin with {name}/" for i in ids if not i.startswith(f"{name}/")
    )


def has_complete_metadata(nb, name):
    kinds = {"curriculum": list, "budget_s": int | float, "device": str, "prerequisites": list,
             "minutes": int}  # fmt: skip
    about = nb.metadata.get("coursekit", {})
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            yield f"metadata coursekit.{key} is {about.get(key)!r}"
    if about.get("device") not in ("cpu", "cuda", "cpu or cuda"):
        yield f"device is {about.get('device')!r}"
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"


def shows_the_rows_it_lists(nb, name):
    listed = set(nb.metadata.get("coursekit", {}).get("curriculum", []))
    shown = {r for _, c in code_cells(nb) for r in c.metadata.get("coursekit", {}).get("rows", [])}
    if not listed:
        yield "no curriculum row is listed"
    if listed - curriculum_rows():
        yield f"not in the curriculum: {sorted(listed - curriculum_rows())}"
    if listed ^ shown:
        yield f"listed and not shown by a cell, or the reverse: {sorted(listed ^ shown)}"


def keeps_its_time_budget(nb, name):
    times = [seconds(cell) for _, cell in code_cells(nb)]
    budget = nb.metadata.get("coursekit", {}).get("budget_s", 0)
    if None in times:
        yield "a cell has no recorded time: run `make notebooks`"
    elif sum(times) > budget:
        yield f"the stored run took {sum(times):.0f} s of a budget of {budget} s"


def stores_no_widget_state(nb, name):
    if "widgets" in nb.metadata:
        yield "widget state is stored"
    for i, cell in code_cells(nb):
        if any(WIDGET in bundle for bundle in data(cell)):
            yield f"cell {i} stores a widget, which is dead on the static page"


def compares_some_outputs_exactly(nb, name):
    if not any("nbval-check-output" in tags(cell) for _, cell in code_cells(nb)):
        yield "no cell is tagged nbval-check-output"


def has_one_sentence_per_line(nb, name):
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            yield from (f"cell {i}: {fault}" for fault in line_faults(cell.source))


def line_faults(markdown):
    """Lines with two sentences, and sentences that go on in the next line."""
    before = ""
    for line in prose_lines(markdown):
        if re.search(r"[a-z0-9)\]*_§][.!?][\"')*_]* +[A-Z§]", line):
            yield f"two sentences in a line: {line}"
        if re.search(r"[\w,]$", before) and re.match(r"[a-z]", line):
            yield f"a sentence is broken: {before} / {line}"
        before = line


def prose_lines(markdown):
    """Lines that are sentences, and an empty one for code, formulas, tables, headings, options."""
    fence = ""
    for line in markdown.splitlines():
        mark = re.match(r"\s*(`{3,}|:{3,}|\$\$)", line)
        if fence:
            if mark and line.strip().startswith(fence):
                fence = ""
            yield ""
        elif mark and (mark[1] == "$$" or not re.match(r"\s*(`{3,}|:{3,})\{", line)):
            closed = mark[1] == "$$" and line.strip() != "$$" and line.count("$$") > 1
            fence = "" if closed or mark[1][0] == ":" else mark[1]
            yield ""
        elif mark or re.match(r"\s*(\||#|:[\w-]+:|\(.*\)=$|```)", line):
            yield ""
        else:
            line = re.sub(r"`[^`]*`|\$[^$]*\$|\[([^\]]*)\]\([^)]*\)", "X", line)
            line = re.sub(r"\b(e\.g|i\.e|cf|vs|al|resp|Eq|Fig|Sec|Dr|St|[A-Z])\.", "X", line)
            if re.match(r"\s*([-*]|\d+\.)\s", line):
                yield ""  # a list item begins a sentence of its own
            yield re.sub(r"^\s*([-*>]|\d+\.)\s+", "", line).strip()


RULES = [
    is_executed_from_top_to_bottom,
    raises_only_where_it_says_so,
    begins_with_the_colab_cell,
    has_short_cells,
    stores_no_accidents,
    shows_its_plots_and_describes_them,
    has_exercises_with_hints_and_folded_solutions,
    states_at_least_three_claims,
    has_complete_metadata,
    shows_the_rows_it_lists,
    keeps_its_time_budget,
    stores_no_widget_state,
    compares_some_outputs_exactly,
    has_one_sentence_per_line,
]


# ---- the chapters ----


def test_there_are_chapters():
    assert CHAPTERS, "notebooks/ holds no chapter"


def test_every_chapter_is_in_the_table_of_contents_and_in_the_curriculum():
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    chapters = (ROOT / "book/_data/curriculum.yml").read_text(encoding="utf-8")
    for path in CHAPTERS:
        assert f"file: notebooks/{path.stem}" in toc
        assert path.stem in {chapter["name"] for chapter in yaml.safe_load(chapters)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path, rule):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    faults = list(rule(nb, path.stem))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_code_of_a_chapter_parses_without_magics_but_the_first_cell(path):
    for _, cell in code_cells(nbformat.read(path, as_version=4))[1:]:
        ast.parse(cell.source)


# ---- the rules themselves, on planted faults ----


EXERCISE = """\
```{{exercise-start}} A question
:label: ex-{n}
```
Which way does it go?
*Hint.* Draw it.
```{{exercise-end}}
```
```{{solution-start}} ex-{n}
:class: dropdown
```
Up.
```{{solution-end}}
```
"""


def chapter():
    """A small notebook with nothing wrong in it."""
    v4 = nbformat.v4
    cells = [
        v4.new_code_cell(first_cell(), metadata={"tags": ["remove-cell"]}),
        v4.new_markdown_cell("# Title\n\nOne sentence.\nAnother, with $a. B$ and `x. Y`."),
        v4.new_code_cell(
            "for i in range(3):\n    claim()",
            metadata={"tags": ["nbval-check-output"], "coursekit": {"rows": ["A1"]}},
            outputs=[v4.new_output("display_data", {CLAIM: {"id": f"demo/{i}"}}) for i in range(3)],
        ),
        v4.new_code_cell(
            "ax.plot(x)\nplt.show()",
            outputs=[v4.new_output("display_data", {"image/png": "aGk="})],
            metadata={
                "mystnb": {
                    "image": {"alt": "The error falls with the step and rises again, a letter U."},
                    "figure": {
                        "name": "fig-u",
                        "caption": "What to see: the curve has a lowest point.",
                    },
                }
            },
        ),
        *(v4.new_markdown_cell(EXERCISE.format(n=n)) for n in range(5)),
    ]
    nb = v4.new_notebook(cells=cells)
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nb.metadata.coursekit = nbformat.from_dict(
        {"curriculum": ["A1"], "budget_s": 10, "device": "cpu", "prerequisites": [], "minutes": 5}
    )
    for count, (_, cell) in enumerate(code_cells(nb), start=1):
        cell.execution_count = count
        cell.metadata.execution = {
            "iopub.execute_input": "2026-01-01T00:00:00.000000Z",
            "shell.execute_reply": "2026-01-01T00:00:02.000000Z",
        }
    return nb


def set_source(nb, index, source):
    nb.cells[index].source = source


def set_output(nb, text):
    nb.cells[2].outputs.append(nbformat.v4.new_output("stream", name="stdout", text=text))


def replace_all(nb, before, after):
    for cell in nb.cells:
        cell.source = cell.source.replace(before, after)


def put(mapping, **values):
    mapping.update(nbformat.from_dict(values))


def raising(nb):
    nb.cells[2].outputs.append(
        nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    )


def display(nb, **bundle):
    mimes = {key.replace("__", "/"): value for key, value in bundle.items()}
    nb.cells[2].outputs.append(nbformat.v4.new_output("display_data", mimes))


FAULTS = [
    (is_executed_from_top_to_bottom, lambda nb: put(nb.cells[2], execution_count=None), "counts"),
    (is_executed_from_top_to_bottom, lambda nb: put(nb.cells[2], execution_count=7), "counts"),
    (raises_only_where_it_says_so, raising, "ValueError"),
    (
        raises_only_where_it_says_so,
        lambda nb: nb.cells[2].metadata.tags.append("raises-exception"),
        "raises-exception",
    ),
    (begins_with_the_colab_cell, lambda nb: nb.cells.pop(0), "first cell"),
    (begins_with_the_colab_cell, lambda nb: put(nb.cells[0].metadata, tags=[]), "remove-cell"),
    (
        begins_with_the_colab_cell,
        lambda nb: replace_all(nb, config()["repository"]["url"], "https://github.com/else/where"),
        "first cell",
    ),
    (has_short_cells, lambda nb: set_source(nb, 2, "x = 1\n" * 16), "16 lines"),
    (has_short_cells, lambda nb: set_source(nb, 2, "x = " + "1" * 80), "80 columns"),
    (stores_no_accidents, lambda nb: set_output(nb, "<object at 0x7f3a2b4c>"), "address"),
    (stores_no_accidents, lambda nb: set_output(nb, "took 3.2 s"), "time"),
    (stores_no_accidents, lambda nb: set_output(nb, "12 ms per loop"), "time"),
    (stores_no_accidents, lambda nb: set_output(nb, "/home/me/data"), "machine path"),
    (stores_no_accidents, lambda nb: set_source(nb, 1, "See /home/me/data."), "machine path"),
    (
        shows_its_plots_and_describes_them,
        lambda nb: set_source(nb, 3, "plt.show()\nax.plot(x)"),
        "plt.show",
    ),
    (
        shows_its_plots_and_describes_them,
        lambda nb: put(nb.cells[3].metadata.mystnb.image, alt="A figure."),
        "image.alt",
    ),
    (
        shows_its_plots_and_describes_them,
        lambda nb: put(nb.cells[3].metadata.mystnb.figure, caption="U."),
        "caption",
    ),
    (
        shows_its_plots_and_describes_them,
        lambda nb: put(nb.cells[3].metadata.mystnb.figure, name="u"),
        "fig-",
    ),
    (
        shows_its_plots_and_describes_them,
        lambda nb: nb.cells.append(copy.deepcopy(nb.cells[3])),
        "unique",
    ),
    (
        shows_its_plots_and_describes_them,
        lambda nb: display(nb, text__html='<img src="data:image/png;base64,aGk=">'),
        "no alt",
    ),
    (has_exercises_with_hints_and_folded_solutions, lambda nb: nb.cells.pop(), "4 exercises"),
    (
        has_exercises_with_hints_and_folded_solutions,
        lambda nb: set_source(nb, 5, nb.cells[5].source.replace(":class: dropdown\n", "")),
        "dropdown",
    ),
    (
        has_exercises_with_hints_and_folded_solutions,
        lambda nb: set_source(nb, 5, nb.cells[5].source.replace("*Hint.*", "")),
        "no hint",
    ),
    (states_at_least_three_claims, lambda nb: nb.cells[2].outputs.pop(), "2 claims"),
    (
        states_at_least_three_claims,
        lambda nb: put(nb.cells[2].outputs[0].data[CLAIM], id="demo/1"),
        "unique",
    ),
    (
        states_at_least_three_claims,
        lambda nb: put(nb.cells[2].outputs[0].data[CLAIM], id="other/1"),
        "demo/",
    ),
    (has_complete_metadata, lambda nb: nb.metadata.coursekit.pop("minutes"), "minutes"),
    (has_complete_metadata, lambda nb: put(nb.metadata.coursekit, device="gpu"), "device"),
    (has_complete_metadata, lambda nb: put(nb.metadata.kernelspec, name="me"), "kernel"),
    (
        shows_the_rows_it_lists,
        lambda nb: put(nb.metadata.coursekit, curriculum=["A1", "Z9"]),
        "not in the curriculum",
    ),
    (
        shows_the_rows_it_lists,
        lambda nb: put(nb.metadata.coursekit, curriculum=["A1", "A2"]),
        "not shown",
    ),
    (keeps_its_time_budget, lambda nb: put(nb.metadata.coursekit, budget_s=5), "6 s"),
    (keeps_its_time_budget, lambda nb: nb.cells[2].metadata.pop("execution"), "no recorded"),
    (stores_no_widget_state, lambda nb: put(nb.metadata, widgets={}), "widget state"),
    (
        stores_no_widget_state,
        lambda nb: nb.cells[2].outputs.append(nbformat.v4.new_output("display_data", {WIDGET: {}})),
        "dead on the static page",
    ),
    (
        compares_some_outputs_exactly,
        lambda nb: put(nb.cells[2].metadata, tags=[]),
        "nbval-check-output",
    ),
    (has_one_sentence_per_line, lambda nb: set_source(nb, 1, "One. Two."), "two sentences"),
    (has_one_sentence_per_line, lambda nb: set_source(nb, 1, "It goes\non here."), "broken"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_is_let_through(rule):
    assert list(rule(chapter(), "demo")) == []


@pytest.mark.parametrize(
    ("rule", "plant", "message"), FAULTS, ids=[f"{f[0].__name__}-{f[2]}" for f in FAULTS]
)
def test_a_planted_fault_is_found(rule, plant, message):
    nb = chapter()
    plant(nb)
    faults = list(rule(nb, "demo"))
    assert any(message in fault for fault in faults), faults


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, *_ in FAULTS} == set(RULES)


@pytest.mark.parametrize(
    "text",
    [
        "See e.g. Griewank for more.",
        "$$\na. B\nc\n$$\nwhere it goes.",
        "```python\nx. Y\nz\n```",
        "```{prf:theorem} A. Name\n:label: thm-a\nOne sentence.\n```",
        "| a. B | c |\n| - | - |",
        "- one\n- two",
        "The formula is\n\n$$\nx\n$$\n\nand no more.",
        "Version 2.0 of it.",
    ],
)
def test_what_only_looks_like_two_sentences_is_let_through(text):
    assert not list(line_faults(text))
