"""Figures: what is drawn, in which colours, and how large the picture is."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from coursekit import plot

RUNS = np.array([[3.0, 2.0, 1.0], [5.0, 2.0, 4.0]])  # two runs at three points


@pytest.fixture(autouse=True)
def ax():
    """Axes of a new figure in the book's style."""
    with plt.rc_context():
        plot.use_style()
        _, ax = plt.subplots()
        yield ax
        plt.close("all")


def luminance(color):
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def contrast(first, second):
    """Contrast ratio of WCAG 2, from 1 to 21."""
    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_a_band_is_the_mean_and_one_standard_deviation(ax):
    assert plot.band([1, 2, 4], RUNS, ax=ax) is ax
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [1, 2, 4]
    assert line.get_ydata().tolist() == [4.0, 2.0, 2.5]
    sd = np.array([np.sqrt(2), 0, np.sqrt(4.5)])  # of two values: their distance over √2
    corners = ax.collections[0].get_paths()[0].vertices
    for x, low, high in zip([1, 2, 4], line.get_ydata() - sd, line.get_ydata() + sd, strict=True):
        at_x = corners[corners[:, 0] == x, 1]
        assert (at_x.min(), at_x.max()) == pytest.approx((low, high))


def test_line_band_and_label_have_one_colour_and_the_next_band_another(ax):
    for name in "ab":
        plot.band([1, 2, 4], RUNS, label=name, ax=ax)
    lines = [to_hex(line.get_color()).upper() for line in ax.lines]
    assert lines == list(plot.COLORS[:2])
    assert [to_hex(c.get_facecolor()[0]).upper() for c in ax.collections] == lines
    assert [text.get_text() for text in ax.texts] == ["a", "b"]
    assert to_hex(ax.texts[0].get_color()).upper() == lines[0]  # dark enough as it is
    plot.band([1, 2, 4], RUNS, ax=ax, color="black")
    assert ax.lines[2].get_color() == "black"


def test_a_band_goes_to_the_current_axes_unless_told_otherwise(ax):
    _, other = plt.subplots()
    assert plot.band([1, 2, 4], RUNS) is other
    assert plot.band([1, 2, 4], RUNS, ax=ax) is ax


def test_a_band_that_reaches_below_zero_is_drawn_on_logarithmic_axes(ax):
    ax.set(xscale="log", yscale="log")
    plot.band([1, 10, 100], [[1e-3, 1.0, 1.0], [1.0, 1.0, 2.0]], label="loss", ax=ax)
    low, high = ax.get_ylim()
    assert 0 < low < 0.6
    assert high > 2
    ax.figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize(
    ("x", "runs", "message"),
    [
        ([1, 2], RUNS, r"runs of shape \(seeds, 2\), got \(2, 3\)"),
        ([1, 2, 4], RUNS[0], r"runs of shape \(seeds, 3\), got \(3,\)"),
        ([[1, 2, 4]], RUNS, r"x of shape \(n,\), got \(1, 3\)"),
        ([1, 2, 4], RUNS[:1], "two runs or more, got 1"),
    ],
)
def test_what_is_no_set_of_runs_is_refused(ax, x, runs, message):
    with pytest.raises(ValueError, match=f"^band: expected {message}"):
        plot.band(x, runs, ax=ax)
    assert not ax.lines


def test_a_label_ends_beside_its_point(ax):
    ax.plot([0, 1], [0, 1])
    assert plot.direct_label(ax, "identity", 1, 1, color="#D55E00") is ax
    (text,) = ax.texts
    assert (text.get_text(), text.xy) == ("identity", (1, 1))
    box = text.get_window_extent(ax.figure.canvas.get_renderer())
    point = ax.transData.transform((1, 1))
    pixels = ax.figure.dpi / 72
    assert box.x1 == pytest.approx(point[0] - 4 * pixels, abs=2)
    assert box.y0 >= point[1]


@pytest.mark.parametrize("color", [*plot.COLORS, "yellow", "white"])
def test_a_label_can_be_read_and_keeps_the_hue_of_its_line(ax, color):
    plot.direct_label(ax, "name", 1, 1, color=color)
    ink = np.array(to_rgb(ax.texts[0].get_color()))
    assert contrast(ink, plot.STYLE["figure.facecolor"]) >= 4.5
    if contrast(color, "white") < 4.5:
        assert contrast(ink, "white") < 5  # no darker than it must be
    assert np.cross(ink, to_rgb(color)) == pytest.approx(0, abs=1e-9)


def test_every_colour_of_the_palette_is_told_from_the_card():
    assert len(set(plot.COLORS)) == len(plot.COLORS)
    assert min(contrast(color, plot.STYLE["figure.facecolor"]) for color in plot.COLORS) > 2


# Columns: what is left of red, green and blue to a reader without red or without green cones
# (Viénot, Brettel and Mollon 1999, on linear RGB).
PROTANOPE = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
DEUTERANOPE = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])


def nearest(colors, cones):
    """Distance of the two colours that such a reader tells apart with most effort."""
    seen = [np.clip(cones @ np.power(to_rgb(c), 2.2), 0, 1) ** (1 / 2.2) for c in colors]
    return min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("cones", [PROTANOPE, DEUTERANOPE])
def test_all_colours_differ_for_readers_without_red_or_green_cones(cones):
    assert nearest(plot.COLORS, cones) > 0.14
    assert nearest(plt.colormaps["tab10"].colors[:5], cones) < 0.1  # matplotlib's own do not


def test_a_figure_is_a_light_card_of_less_than_100_kilobytes(ax):
    rng = np.random.default_rng(0)
    for name in "abc":
        plot.band(np.arange(100), rng.normal(size=(5, 100)).cumsum(1), label=name, ax=ax)
    ax.set(xlabel="step", ylabel="loss")
    picture = io.BytesIO()
    ax.figure.savefig(picture, format="png")
    assert len(picture.getvalue()) < 100_000
    picture.seek(0)
    image = plt.imread(picture)
    assert image.shape[1] > 650
    assert np.allclose(image[0, 0], 1)


def test_the_style_is_set_by_a_call_and_not_by_the_import():
    with plt.rc_context():
        plt.rcdefaults()
        before = dict(plt.rcParams)
        __import__("importlib").reload(plot)
        assert dict(plt.rcParams) == before
        plot.use_style()
        assert plt.rcParams["axes.spines.top"] is False
