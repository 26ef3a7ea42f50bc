"""Interactive figures that work on a static page, with no kernel and no network."""

import base64
import io
import os
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LIMIT = 1_500_000  # bytes of one interactive figure; a page with three of them still loads quickly
SHARPNESS = 1.5  # pixels of a raster picture for one pixel of the page

# A screen reader says a new picture and its caption, because they appear in a live region; the
# counter is left to the slider. Jupyter may show one output twice, so the script starts whatever
# has this id and has not been started.
PAGE = """\
<figure class="ck-frames" id="{id}" role="group" aria-label="{label}">
<style>
#{id} .ck-controls[hidden], #{id} .ck-frame[hidden] {{ display: none; }}
#{id} .ck-controls {{ display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }}
#{id} .ck-controls input {{ flex: 1; min-width: 5rem; }}
#{id} .ck-controls button {{ min-width: 2.75rem; min-height: 2.75rem; font-size: 1.25rem;
  color: inherit; background: none; border: 1px solid currentColor; border-radius: .3rem; }}
#{id} img {{ max-width: 100%; height: auto; background: white; }}
</style>
<div class="ck-controls" hidden>
<button type="button" aria-label="Previous">&#8249;</button>
<button type="button" aria-label="Next">&#8250;</button>
<label for="{id}-range">{label}</label>
<input type="range" id="{id}-range" min="1" max="{count}" value="1">
<output for="{id}-range" aria-live="off">1 of {count}</output>
</div>
<div aria-live="polite">
{frames}
</div>
<script>
document.querySelectorAll("#{id}:not([data-ready])").forEach(function (root) {{
  root.dataset.ready = "yes";
  var frames = root.querySelectorAll(".ck-frame"), range = root.querySelector("input");
  function show() {{
    frames.forEach(function (f, i) {{ f.hidden = i !== range.value - 1; }});
    root.querySelector("output").textContent = range.value + " of {count}";
    range.setAttribute("aria-valuetext", range.value + " of {count}");
  }}
  root.querySelectorAll("button").forEach(function (b, i) {{
    b.addEventListener("click", function () {{
      range.value = Number(range.value) + (i ? 1 : -1); show();
    }});
  }});
  range.addEventListener("input", show);
  root.querySelector(".ck-controls").hidden = false;
  show();
}});
</script>
</figure>"""


class Frames:
    """What `frames` returns: Jupyter and the book show it as a figure."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def frames(
    pictures: Sequence[Figure | str],
    *,
    label: str,
    name: str,
    alts: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> Frames:
    """Let the reader go through pictures drawn beforehand with a slider, arrow keys or buttons.

    Left and right arrow, Home and End move the slider. Where scripts do not run, all pictures are
    shown below each other.

    Parameters
    ----------
    pictures
        Matplotlib figures, which are closed, or inline SVG as `coursekit.autodiff.draw` makes it.
    label
        What the slider changes, with its unit, such as ``"learning rate"``.
    name
        In small letters, digits and hyphens; unique on the page.
    alts
        One alternative text a picture. SVG that has ``role="img"`` and ``aria-label`` needs none.
    captions
        One line a picture, saying what to see in it; read out when the picture appears.

    Returns
    -------
    Frames
        The same HTML for the same pictures.

    Raises
    ------
    ValueError
        When there is no picture, a text is missing or empty, the name is malformed, or all
        together are larger than 1.5 MB.
    TypeError
        When a picture is neither a figure nor SVG.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"frames: expected a name like message-passing, got {name!r}")
    if not label.strip():
        raise ValueError("frames: expected a label for the slider, got an empty one")
    if not pictures:
        raise ValueError("frames: expected at least one picture, got none")
    for what, texts in (("alts", alts), ("captions", captions)):
        if texts is not None and (len(texts) != len(pictures) or not all(map(str.strip, texts))):
            raise ValueError(
                f"frames: expected {what} with a text for each of {len(pictures)} pictures, "
                f"got {len(texts)} of which {sum(not t.strip() for t in texts)} empty"
            )
    parts = []
    for i, picture in enumerate(pictures):
        shown = _html(picture, None if alts is None else alts[i])
        caption = "" if captions is None else f'<p class="ck-caption">{escape(captions[i])}</p>'
        parts.append(f'<div class="ck-frame">{shown}{caption}</div>')
    html = PAGE.format(
        id=f"ck-frames-{name}", label=escape(label), count=len(parts), frames="\n".join(parts)
    )
    size = len(html.encode())
    if size > LIMIT:
        raise ValueError(
            f"frames: expected at most {LIMIT:,} bytes, got {size:,}: draw fewer or smaller"
        )
    return Frames(html, f"Interactive figure {name}: {label}, {len(parts)} frames")


def _html(picture: Any, alt: str | None) -> str:
    if isinstance(picture, str) and picture.lstrip().startswith("<svg"):
        if alt is not None:
            return f'<div role="img" aria-label="{escape(alt)}">{picture}</div>'
        if not re.match(r'\s*<svg[^>]*role="img"[^>]*aria-label="[^"]', picture):
            raise ValueError("frames: expected alts, or SVG with role and aria-label, got neither")
        return picture
    if not isinstance(picture, Figure):
        kind = type(picture).__name__
        raise TypeError(f"frames: expected matplotlib figures or SVG text, got {kind}")
    if alt is None:
        raise ValueError("frames: expected alts, one text for each figure, got none")
    buffer = io.BytesIO()
    # 96 pixels of the page are an inch; without the version of matplotlib, the bytes are the same
    picture.savefig(buffer, format="png", dpi=96 * SHARPNESS, metadata={"Software": None})
    plt.close(picture)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = (round(96 * inches) for inches in picture.get_size_inches())
    size = f'width="{width}" height="{height}"'
    return f'<img alt="{escape(alt)}" {size} src="data:image/png;base64,{data}">'


def live(function: Callable[..., None], **controls: Any) -> None:
    """Give a running reader controls for a plotting function; on the static page, draw it once.

    Parameters
    ----------
    function
        Draws a figure; its keyword arguments have defaults, which the static page shows.
    **controls
        One for each argument, as `ipywidgets.interact` takes them: ``h=(-15, 0)`` is a slider.

    Notes
    -----
    `make notebooks` sets ``COURSEKIT_STATIC``, so that no dead control is stored.
    """
    try:
        import ipywidgets
    except ImportError:
        ipywidgets = None
    if ipywidgets is None or os.environ.get("COURSEKIT_STATIC"):
        function()
    else:
        ipywidgets.interact(function, **controls)
