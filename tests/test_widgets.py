"""Interactive figures: their texts, their bytes, and what they do in a browser with no network."""

import base64
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from matplotlib.figure import Figure
from test_pages import browser  # noqa: F401
from test_pages import pytestmark as needs_chromium

from coursekit import autodiff as ad
from coursekit import widgets

ALTS = ["one point", "two points", 'three "points" < 4']
CAPTIONS = ["The first.", "The second.", "The third & last."]
SVG = '<svg role="img" aria-label="a graph" width="20" height="20"><circle r="9"/></svg>'


def figures(n=3):
    made = []
    for i in range(n):
        figure, ax = plt.subplots()
        ax.plot(np.arange(i + 1), "o")
        made.append(figure)
    return made


def three(name="points", label="Points", **options):
    options = {"alts": ALTS, "captions": CAPTIONS} | options
    return widgets.frames(figures(), label=label, name=name, **options)


# ---- the HTML ----


def test_the_same_pictures_give_the_same_bytes():
    assert three()._repr_html_() == three()._repr_html_()


def test_the_version_of_matplotlib_is_not_in_the_picture():
    (data, *_) = re.findall(r"base64,([^\"]+)", three().html)
    assert b"matplotlib" not in base64.b64decode(data)


def test_drawn_figures_are_closed():
    before = plt.get_fignums()
    three()
    assert plt.get_fignums() == before


def test_five_figures_take_less_than_200_kilobytes():
    made = widgets.frames(figures(5), label="Points", name="five", alts=["a"] * 5)
    assert len(made.html) < 200_000


def test_nothing_is_loaded_from_elsewhere():
    html = re.sub(r"data:image/png;base64,[^\"]+", "", three().html)
    assert not re.search(r"https?:|//|@import|url\(", html)


def test_texts_are_escaped():
    html = three(label='a "b" <c>').html
    assert 'alt="three &quot;points&quot; &lt; 4"' in html
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in html
    assert "The third &amp; last." in html


def test_a_drawn_graph_brings_its_own_text():
    node = ad.Node(3.0)
    drawing = ad.draw(ad.exp(node))
    html = widgets.frames([drawing, drawing], label="Step", name="graph").html
    assert html.count('aria-label="Computation graph of 2 nodes') == 2
    assert f'<div role="img" aria-label="mine">{SVG}</div>' in (
        widgets.frames([SVG], label="Step", name="graph", alts=["mine"]).html
    )


def test_without_html_a_line_says_what_it_is():
    assert repr(three()) == "Interactive figure points: Points, 3 frames"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pictures": []}, "at least one picture, got none"),
        ({"alts": None}, "alts, one text for each figure, got none"),
        ({"alts": ["one", "two"]}, "alts with a text for each of 3 pictures, got 2 of which 0"),
        ({"alts": ["one", " ", "three"]}, "for each of 3 pictures, got 3 of which 1 empty"),
        ({"captions": ["one"]}, "captions with a text for each of 3 pictures, got 1 of which 0"),
        ({"name": "Two words"}, "a name like message-passing, got 'Two words'"),
        ({"label": " "}, "a label for the slider, got an empty one"),
        ({"pictures": ["<svg><g/></svg>"], "alts": None}, "SVG with role and aria-label, got nei"),
        ({"pictures": [SVG + " " * 1_500_000], "alts": None}, r"1,500,000 bytes, got 1,50\d,\d{3}"),
    ],
)
def test_an_incomplete_figure_is_refused(options, message):
    options = {"pictures": figures(), "alts": ALTS, "label": "Points", "name": "points"} | options
    with pytest.raises(ValueError, match=f"^frames: expected .*{message}"):
        widgets.frames(options.pop("pictures"), **options)
    plt.close("all")


@pytest.mark.parametrize("picture", [1, "plot.png", None])
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(TypeError, match="expected matplotlib figures or SVG text, got "):
        widgets.frames([picture], label="Points", name="points", alts=["a"])


# ---- in a browser ----


@pytest.fixture
def show(browser):  # noqa: F811
    """Open figures as a page that has no network; what goes wrong is in ``page.problems``."""
    contexts = []

    def show(*bodies, width=800, scheme="light", scripts=True):
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            java_script_enabled=scripts,
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith("data:") else page.problems.append(r.url),
        )
        style = "<meta name=color-scheme content='light dark'><title>Test</title>"
        body = "".join(f.html if isinstance(f, widgets.Frames) else f for f in bodies)
        page.set_content(f"<!doctype html><html lang=en>{style}<main><h1>T</h1>{body}</main>")
        return page

    yield show
    for context in contexts:
        context.close()


def seen(page, name="points"):
    """Alternative text and caption on view, the counter, and what the slider says."""
    root = page.locator(f"#ck-frames-{name}")
    (alt,) = root.locator("img:visible").evaluate_all("all => all.map(e => e.alt)")
    (caption,) = root.locator(".ck-caption:visible").all_inner_texts()
    said = root.locator("input").get_attribute("aria-valuetext")
    assert root.locator("output").inner_text() == said
    return ALTS.index(alt), CAPTIONS.index(caption), said


@needs_chromium
def test_the_keyboard_goes_through_pictures_captions_and_counter(show):
    page = show(three())
    assert seen(page) == (0, 0, "1 of 3")
    page.get_by_role("slider", name="Points").focus()
    for key, i in [("ArrowRight", 1), ("End", 2), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0)]:
        page.keyboard.press(key)
        assert seen(page) == (i, i, f"{i + 1} of 3")
    assert page.problems == []


@needs_chromium
def test_the_buttons_go_one_picture_on_and_stop_at_the_ends(show):
    page = show(three())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Previous"
    page.keyboard.press("Enter")
    assert seen(page)[0] == 0
    page.get_by_role("button", name="Next").focus()
    for i in (1, 2, 2):
        page.keyboard.press("Space")
        assert seen(page)[0] == i
    page.get_by_role("button", name="Previous").click()
    assert seen(page)[0] == 1


@needs_chromium
def test_new_pictures_and_captions_are_announced_once(show):
    page = show(three())
    live = page.locator("[aria-live=polite]")
    assert live.locator("img").count() == live.locator(".ck-caption").count() == 3
    assert live.locator("output").count() == 0
    assert page.locator("output").get_attribute("aria-live") == "off"


@needs_chromium
def test_two_figures_on_a_page_move_apart_and_leave_no_global_name(show):
    page = show("<script>before = Object.keys(window).length + 1</script>", three(), three("more"))
    assert page.evaluate("Object.keys(window).length === before")
    page.locator("#ck-frames-more input").focus()
    page.keyboard.press("End")
    assert (seen(page)[0], seen(page, "more")[0]) == (0, 2)


@needs_chromium
def test_one_output_in_two_views_works_in_both_and_steps_by_one(show):
    page = show(three(), three())  # Jupyter's second view of an output: the same id again
    for figure in page.locator(".ck-frames").all():
        figure.get_by_role("button", name="Next").click()
        assert figure.locator("output").inner_text() == "2 of 3"
        assert figure.locator("img:visible").get_attribute("alt") == ALTS[1]
    script = page.locator("script").first.inner_html()
    page.add_script_tag(content=script.replace("&lt;", "<").replace("&gt;", ">"))
    page.get_by_role("button", name="Next").first.click()
    assert page.locator("output").first.inner_text() == "3 of 3"


@needs_chromium
def test_without_scripts_all_pictures_are_shown_and_no_dead_control(show):
    page = show(three(), scripts=False)
    assert page.locator("img:visible").count() == page.locator(".ck-caption:visible").count() == 3
    assert page.locator("input:visible, button:visible").count() == 0


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(show, scheme):
    page = show(three(), widgets.frames([SVG], label="Step", name="graph"), scheme=scheme)
    assert [v["id"] for v in Axe().run(page).response["violations"]] == []


@needs_chromium
def test_it_fits_a_phone(show):
    page = show(three(label="Number of points in the picture"), width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("img:visible").bounding_box()
    assert box["height"] / box["width"] == pytest.approx(4.8 / 6.4, abs=0.01)


# ---- with a kernel ----


def plotting(h=-1.0):
    plotting.calls.append(h)


@pytest.fixture
def interact(monkeypatch):
    """Calls of ipywidgets.interact; none when the function was only drawn."""
    calls = []
    plotting.calls = []
    monkeypatch.delenv("COURSEKIT_STATIC", raising=False)
    monkeypatch.setattr("ipywidgets.interact", lambda f, **controls: calls.append((f, controls)))
    return calls


def test_a_running_reader_gets_controls(interact):
    widgets.live(plotting, h=(-15, 0))
    assert interact == [(plotting, {"h": (-15, 0)})]
    assert plotting.calls == []


def test_a_static_page_gets_one_picture_and_no_control(interact, monkeypatch):
    monkeypatch.setenv("COURSEKIT_STATIC", "1")
    widgets.live(plotting, h=(-15, 0))
    assert (interact, plotting.calls) == ([], [-1.0])


def test_without_ipywidgets_the_picture_is_drawn(interact, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    widgets.live(plotting, h=(-15, 0))
    assert plotting.calls == [-1.0]


def test_a_figure_that_pyplot_does_not_know_is_drawn_too():
    figure = Figure()
    figure.subplots().plot([1, 2])
    assert "data:image/png" in widgets.frames([figure], label="x", name="x", alts=["a"]).html
