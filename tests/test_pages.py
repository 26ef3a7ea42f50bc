"""Every page in a real browser: complete without a network, for every reader and any keyboard."""

import functools
import http.server
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from axe_playwright_python.sync_playwright import Axe
from book_site import build, documents, site  # noqa: F401
from conftest import ROOT
from playwright.sync_api import sync_playwright

SCRIPT = ROOT / "book" / "_ext" / "print_pdf.py"
sys.path.insert(0, str(SCRIPT.parent))
from print_pdf import chromium  # noqa: E402

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium on the path: pages are not tested in a browser"
)
CHAPTERS = [name for name in documents() if name.startswith("notebooks/")]
PAGES = [*documents(), "search", "genindex"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def origin(site):  # noqa: F811
    """Address of the site on this machine."""
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """One Chromium for all pages."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, origin):
    """Open pages of the site; whatever went wrong on the way is in ``page.problems``."""

    @contextmanager
    def visit(name, width=1280):
        context = browser.new_context(
            color_scheme="light",
            viewport={"width": width, "height": 900},
            reduced_motion="reduce",
            permissions=["clipboard-read", "clipboard-write"],
        )
        page = context.new_page()
        page.problems = []
        report = page.problems.append

        def allow_this_site_only(route):
            if route.request.url.startswith(f"{origin}/"):
                route.continue_()
            else:
                report(f"request to {route.request.url}")
                route.abort()

        context.route("**/*", allow_this_site_only)
        page.on("console", lambda m: report(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: report(f"page error: {error}"))
        page.on("requestfailed", lambda request: report(f"failed: {request.url}"))
        page.on("response", lambda r: report(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.goto(f"{origin}/{name}.html")
        page.wait_for_function("!window.MathJax || MathJax.startup.promise.then(() => true)")
        yield page
        context.close()

    return visit


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_without_network_or_error_and_shows_its_formulas(visit, name):
    with visit(name) as page:
        page.evaluate("document.fonts.ready")
        assert page.problems == []
        assert page.locator(".math").count() <= page.locator("mjx-container").count()
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
        text = page.locator("main").inner_text()
        assert r"\(" not in text
        assert "$$" not in text


@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_serious_violation_in_light_and_dark(visit, name):
    with visit(name) as page:
        # Dark differs in its colours only. Listing what passes would take longer than finding it.
        for scheme, rules in ("light", {}), ("dark", {"runOnly": ["color-contrast"]}):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
            # The insides of a formula are thousands of spans that readers get as MathML.
            found = Axe().run(
                page,
                context={"exclude": ["mjx-container"]},
                options=rules | {"resultTypes": ["violations"]},
            )
            assert [
                (v["id"], [node["html"][:200] for node in v["nodes"][:3]])
                for v in found.response["violations"]
                if v["impact"] in ("serious", "critical")
            ] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone_and_what_is_wider_scrolls_by_keyboard(visit, name):
    with visit(name, width=360) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        unreachable = page.evaluate(
            """() => [...document.querySelectorAll("article *")].filter(e =>
                 e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0 && e.checkVisibility() &&
                 ["auto", "scroll"].includes(getComputedStyle(e).overflowX)
               ).map(e => e.outerHTML.slice(0, 200))"""
        )
        assert unreachable == []


def test_the_first_stop_of_the_keyboard_skips_to_the_text(visit):
    with visit(CHAPTERS[0]) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.innerText") == "Skip to main content"
        page.keyboard.press("Enter")
        assert page.url.endswith("#main-content")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('main') !== null")


def test_the_focus_is_visible(visit):
    with visit(CHAPTERS[0]) as page:
        for _ in range(5):
            page.keyboard.press("Tab")
            style = "getComputedStyle(document.activeElement)"
            assert page.evaluate(f"{style}.outlineStyle !== 'none' || {style}.boxShadow !== 'none'")


def test_the_search_finds_a_chapter_by_a_word_in_it(visit):
    with visit("book/intro") as page:
        page.keyboard.press("Control+k")
        page.keyboard.type("checkpointing")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a")
        addresses = page.locator("#search-results li a").evaluate_all("a => a.map(x => x.href)")
        assert any("notebooks/autodiff.html" in address for address in addresses)
        assert page.problems == []


def test_the_theme_is_switched_by_keyboard_and_kept(visit):
    with visit("book/intro") as page:
        theme = "document.documentElement.dataset.theme"

        def switch():
            page.locator(".theme-switch-button").first.focus()
            page.keyboard.press("Enter")
            return page.evaluate(theme)

        seen = [switch() for _ in range(3)]  # automatic, light, dark, in the theme's order
        assert {"light", "dark"} == set(seen)
        for _ in range(seen.index("dark") + 1):
            switch()
        page.reload()
        assert page.evaluate(theme) == "dark"


@pytest.mark.parametrize("name", CHAPTERS)
def test_interactive_figures_are_driven_by_keyboard(visit, name):
    with visit(name) as page:
        figures = page.locator(".ck-frames")
        assert figures.count() > 0
        for figure in figures.all():
            shown = figure.locator("img:visible, svg:visible")
            before = shown.evaluate_all("all => all.map(e => e.outerHTML)")
            figure.locator("input[type=range]").focus()
            page.keyboard.press("ArrowRight")
            assert shown.count() == len(before) > 0
            assert shown.evaluate_all("all => all.map(e => e.outerHTML)") != before
            page.keyboard.press("ArrowLeft")
            assert shown.evaluate_all("all => all.map(e => e.outerHTML)") == before
        assert page.problems == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_solutions_are_folded_and_open_by_keyboard(visit, name):
    with visit(name) as page:
        solutions = page.locator(".solution")
        assert solutions.count() >= page.locator(".exercise").count() > 0
        for solution in solutions.all():
            button = solution.locator(".toggle-button")
            content = solution.locator("> :not(.admonition-title)").first
            assert not content.is_visible()
            button.focus()
            page.keyboard.press("Enter")
            assert content.is_visible()
            assert button.get_attribute("aria-expanded") == "true"


def test_code_is_copied_without_prompts_or_output(visit):
    with visit(CHAPTERS[0]) as page:
        cell = page.locator(".cell_input").first
        cell.hover()
        cell.locator("button.copybtn").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.strip() == cell.locator("pre").inner_text().strip()


def test_the_whole_book_is_printed(tmp_path):
    folder = build(tmp_path, builder="singlehtml")
    # In its own process: this one has Playwright's event loop running already.
    subprocess.run([sys.executable, SCRIPT, folder, tmp_path / "book.pdf"], check=True)
    pdf = (tmp_path / "book.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert b"/StructTreeRoot" in pdf  # tagged: a screen reader knows headings from text
    assert b"/Outlines" in pdf
