"""Figures with one look: colours that colour-blind readers tell apart, spread shown as a band.

A figure is a light card with dark text, so it is read in the same way on a light and a dark page.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import ArrayLike

from coursekit import _check

#: Okabe and Ito's palette without its yellow, which is too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

STYLE: dict[Any, Any] = {
    "figure.figsize": (6.2, 3.9),
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "svg.hashsalt": "coursekit",
}


def use_style() -> None:
    """Set the look for all figures that follow; called once, with a chapter's imports."""
    plt.rcParams.update(STYLE)


def band(
    x: ArrayLike,
    runs: ArrayLike,
    label: str | None = None,
    *,
    ax: Axes | None = None,
    color: Any = None,
) -> Axes:
    """Draw the mean of several runs as a line, and one standard deviation around it as a band.

    Parameters
    ----------
    x
        Shape ``(n,)``.
    runs
        Shape ``(seeds, n)``, one row a run; at least two rows, or there is no spread to show.
    label
        Written at the end of the line, in its colour.
    ax
        Where to draw; the current axes unless given.
    color
        The next of the cycle unless given.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        When the shapes do not fit.

    Examples
    --------
    >>> ax = band([1, 2, 4], [[3.0, 2.0, 1.5], [3.2, 2.1, 1.4]], label="measured")
    >>> [text.get_text() for text in ax.texts]
    ['measured']
    """
    x, runs = np.asarray(x, dtype=float), np.asarray(runs, dtype=float)
    _check.shape("band", "x", x, ("n",))
    _check.shape("band", "runs", runs, ("seeds", len(x)))
    if len(runs) < 2:
        raise ValueError(f"band: expected two runs or more, got {len(runs)}")
    ax = plt.gca() if ax is None else ax
    mean, sd = runs.mean(axis=0), runs.std(axis=0, ddof=1)
    (line,) = ax.plot(x, mean, color=color)
    ax.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.25, linewidth=0)
    if label:
        direct_label(ax, label, x[-1], mean[-1], color=line.get_color())
    return ax


def direct_label(
    ax: Axes,
    text: str,
    x: float,
    y: float,
    *,
    color: Any = "black",
    offset: tuple[float, float] = (-4, 8),
) -> Axes:
    """Write beside a line what it is, in its colour, instead of in a legend.

    Parameters
    ----------
    ax, text
        Where to write, and what.
    x, y
        A point of the line, in data units; the text ends there.
    color
        That of the line; the text is darkened as far as its contrast with the card asks for.
    offset
        Of the text from the point, in points of 1/72 inch.

    Returns
    -------
    Axes
    """
    ink = _ink(color)
    ax.annotate(text, (x, y), color=ink, ha="right", xytext=offset, textcoords="offset points")
    return ax


def _ink(color: Any) -> np.ndarray:
    """Darken a colour until its contrast with white is 4.5:1, the least for text (WCAG 2)."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    brightest = 1.05 / 4.5 - 0.05
    # a factor f on sRGB is about f^2.2 on light; 2.1 errs to the dark side
    return rgb * min(1.0, (brightest / max(luminance, brightest)) ** (1 / 2.1))
