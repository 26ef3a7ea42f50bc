"""Sphinx extension: generated pages, MathJax from PyPI, and repairs of other extensions."""

import json
import re
from importlib.metadata import distribution
from pathlib import Path

import book_data
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.ext.napoleon import NumpyDocstring
from sphinx.util.fileutil import copy_asset

# What formulas in TeX need, of the 24 MB that the package brings.
MATHJAX = ["tex-chtml.js", "a11y/assistive-mml.js", "input/tex/extensions", "output/chtml/fonts"]
MARK = "% generated: "


def read_all(app):
    """Read notebooks, docstrings and tests once, before any page."""
    root = Path(app.srcdir)
    theme = app.config.html_theme_options
    source = f"{theme['repository_url']}/blob/{theme['repository_branch']}/tests"
    try:
        curriculum = book_data.load_curriculum(root / "book/_data/curriculum.yml")
        chapters = book_data.read_book(root / "notebooks", curriculum)
        functions = book_data.functions_by_row(root / "coursekit")
        tests = book_data.tests_by_row(root / "tests")
        book_data.check_rows(functions, curriculum, "coursekit")
        book_data.check_rows(tests, curriculum, "tests")
    except book_data.BookDataError as error:
        raise ExtensionError(str(error)) from error
    public = book_data.public_names(root / "coursekit")
    app.book_chapters = {f"notebooks/{chapter.name}": chapter for chapter in chapters}
    app.book_texts = {
        "chapters": book_data.chapters_page(curriculum, chapters),
        "claims": book_data.claims_page(chapters),
        "coverage": book_data.coverage_page(curriculum, chapters, functions, tests, public, source),
        "status": book_data.status_page(chapters),
        "api": book_data.api_page(public),
    }


def fill_page(app, docname, source):
    """Replace a line ``% generated: <name>`` by its text; take our records out of a notebook.

    The records are for the generated pages: no renderer knows their types.
    """
    if docname in app.book_chapters:
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            outputs = [
                o for o in cell.get("outputs", []) if book_data.ENVIRONMENT not in o.get("data", {})
            ]
            for output in outputs:
                output.get("data", {}).pop(book_data.CLAIM, None)
            if "outputs" in cell:
                cell["outputs"] = outputs
        source[0] = json.dumps(notebook)
    for name, text in app.book_texts.items():
        source[0] = source[0].replace(f"{MARK}{name}\n", text + "\n")


def outdated(app, env, added, changed, removed):
    """Generated pages are read anew in every build."""
    return [
        name
        for name in env.found_docs
        if env.doc2path(name).endswith(".md")
        and MARK in Path(env.doc2path(name)).read_text("utf-8")
    ]


def label_chapter(app, doctree):
    """Make a chapter's headings and claims targets of ``{ref}``."""
    docname = app.env.docname
    chapter = app.book_chapters.get(docname)
    if chapter is None:
        return
    std = app.env.domains["std"]

    def label(name, node, title):
        std.anonlabels[name] = docname, node["ids"][0]
        std.labels[name] = docname, node["ids"][0], title

    # Theorems and exercises hold sections too, without a title.
    sections = [s for s in doctree.findall(nodes.section) if isinstance(s.next_node(), nodes.title)]
    if len(sections) != chapter.headings:
        raise ExtensionError(
            f"{docname}: {chapter.headings} headings were counted, {len(sections)} are shown"
        )
    for index, section in enumerate(sections):
        title = section.next_node(nodes.title).astext()
        label(book_data.heading_label(chapter.name, index), section, title)
    cells = {
        node["cell_index"]: node
        for node in doctree.findall(nodes.container)
        if node.get("nb_element") == "cell_code"
    }
    for claim in chapter.claims:
        if claim.cell not in cells:
            raise ExtensionError(f"{docname}: claim {claim.record['id']} is in a hidden cell")
        cells[claim.cell]["ids"].append(claim.label)
        std.anonlabels[claim.label] = docname, claim.label
        std.labels[claim.label] = docname, claim.label, claim.record["id"]


def copy_mathjax(app, error):
    """Bring MathJax into the site, so that formulas need no network."""
    if error is None and app.builder.format == "html":
        source = Path(distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline"))
        for name in MATHJAX:
            origin = source / "static/mathjax" / name
            target = Path(app.outdir, "_static/mathjax", name)
            copy_asset(origin, target if origin.is_dir() else target.parent)


def fill_singlehtml(app):
    """sphinx-exercise registers for singlehtml alone and so hides sphinx-proof's nodes there."""
    handlers = app.registry.translation_handlers
    for name, pair in handlers.get("html", {}).items():
        handlers.setdefault("singlehtml", {}).setdefault(name, pair)


def format_docstring(app, what, name, obj, options, lines):
    """Show the house's one-line sections as fields, and a room's list of files as a list."""
    sections = re.compile(r"(Convention|Curriculum|Source): (.+)")
    rest, fields, field = [], [], False
    for line in "\n".join(lines).replace(" Curriculum: ", "\nCurriculum: ").split("\n"):
        if match := sections.match(line):
            fields.append(f":{match[1]}: {match[2]}")
            field = True
        elif field and line.strip():
            fields.append(f"   {line.strip()}")
        else:
            field = False
            rest.append(
                re.sub(r"^(``[^`]+``)\s{2,}", r"* \1: ", line) if what == "module" else line
            )
    numpydoc = NumpyDocstring(rest, app.config, app, what, name, obj, options)
    lines[:] = [*numpydoc.lines(), "", *fields, ""]


def drop_thebe(app, pagename, templatename, context, doctree):
    """sphinx-thebe adds its scripts, and an address outside the site, even when it is off."""

    def thebe(asset):
        attributes = getattr(asset, "attributes", {})
        return "thebe" in f"{getattr(asset, 'filename', asset)} {attributes.get('body')}"

    for kind in "script_files", "css_files":
        context[kind] = [asset for asset in context[kind] if not thebe(asset)]


def setup(app):
    app.connect("builder-inited", fill_singlehtml)
    app.connect("builder-inited", read_all)
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", fill_page)
    app.connect("doctree-read", label_chapter)
    app.connect("autodoc-process-docstring", format_docstring, priority=400)  # before napoleon
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
