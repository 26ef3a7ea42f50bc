"""A computation graph as a picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from coursekit.autodiff.core import Node, toposort, value_of

WIDTH, HEIGHT, GAP_X, GAP_Y = 124, 58, 18, 24  # of a box and between boxes, in CSS pixels


class Drawing(str):
    """SVG text that Jupyter shows as a picture. Its lines take the colour of the text around it."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return self.split('"')[3]  # the alternative text


def draw(
    end: Node,
    names: Mapping[Node, str] | None = None,
    notes: Mapping[Node, str] | None = None,
    highlight: Collection[Node] = (),
    hide: Collection[Node] = (),
    alt: str | None = None,
) -> Drawing:
    """Draw the graph of a node from its inputs, on top, down to the node itself.

    Parameters
    ----------
    end : Node
        The output; all that it was computed from is drawn.
    names : mapping from Node to str, optional
        What to call a node in front of its value.
    notes : mapping from Node to str, optional
        A second line in the box, such as the gradient that arrived there.
    highlight : collection of Node
        Boxes to fill.
    hide : collection of Node
        Boxes whose value is not known yet.
    alt : str, optional
        The alternative text; by default every node is read out, inputs first.

    Returns
    -------
    Drawing
        Inline SVG, the same text for the same graph.

    Raises
    ------
    TypeError
        When ``end`` is not a node.

    Curriculum: A3.
    """
    if not isinstance(end, Node):
        raise TypeError(f"draw: expected a Node, got {type(end).__name__}")
    names, notes = names or {}, notes or {}
    highlight, hide = set(highlight), set(hide)  # by identity: `==` on nodes compares values
    order = list(toposort(end))[::-1]
    place = _layout(order)
    text = {node: _label(node, names, "?" if node in hide else _short(node)) for node in order}
    if alt is None:
        alt = f"Computation graph of {len(order)} nodes, inputs first: " + "; ".join(
            text[n] + (f", {notes[n]}" if n in notes else "") for n in order
        )
    right = max(x for x, _ in place.values()) + WIDTH + 2
    bottom = max(y for _, y in place.values()) + HEIGHT + 2
    lines = [
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {right} {bottom}" '
        f'width="{right}" style="max-width:100%;height:auto" font-size="13" '
        'font-family="sans-serif" stroke="currentColor" fill="currentColor">'
    ]
    lines += [_edge(place[p], place[n]) for n in order for p in dict.fromkeys(n.parents)]
    lines += [_box(place[n], text[n], notes.get(n), n in highlight) for n in order]
    return Drawing("\n".join([*lines, "</svg>"]))


def _layout(order: list[Node]) -> dict[Node, tuple[int, int]]:
    """Put each node below its lowest parent and, where it fits, under the middle of its parents."""
    row: dict[Node, int] = {}
    users: dict[Node, list[Node]] = {node: [] for node in order}
    for node in order:
        for parent in dict.fromkeys(node.parents):
            users[parent].append(node)
    for node in order:
        row[node] = 1 + max((row[p] for p in node.parents), default=-1)
    for node in reversed(order):  # an input stands just above its first use
        if not node.parents and users[node]:
            row[node] = min(row[n] for n in users[node]) - 1
    at: dict[Node, float] = {}
    for r in range(max(row.values()) + 1):
        wished = [(_middle(n.parents, at), i, n) for i, n in enumerate(order) if row[n] == r]
        free = 0.0
        for wish, _, node in sorted(wished, key=lambda w: w[:2]):
            at[node] = max(wish, free)
            free = at[node] + WIDTH + GAP_X
    for node in order:  # an input used once moves over its user, where there is room
        beside = [at[n] for n in order if row[n] == row[node] and n is not node]
        if not node.parents and len(users[node]) == 1:
            above = at[users[node][0]]
            if all(abs(above - other) >= WIDTH + GAP_X for other in beside):
                at[node] = above
    return {n: (1 + round(at[n]), 1 + row[n] * (HEIGHT + GAP_Y)) for n in order}


def _middle(parents: Sequence[Node], at: Mapping[Node, float]) -> float:
    return sum(at[p] for p in parents) / len(parents) if parents else 0.0


SYMBOLS = {
    "add": "{} + {}",
    "subtract": "{} − {}",
    "multiply": "{} × {}",
    "divide": "{} / {}",
    "power": "{} ^ {}",
    "negative": "−{}",
}


def _label(node: Node, names: Mapping[Node, str], value: str) -> str:
    own = f"{names[node]} = " if node in names else ""
    if node.fun is None:
        return own + value
    args, _, argnums = node.call
    given = dict(zip(argnums, node.parents, strict=True))
    said = [names.get(given[i], "·") if i in given else _short(a) for i, a in enumerate(args)]
    name = node.fun.__name__
    formula = SYMBOLS[name].format(*said) if name in SYMBOLS else f"{name}({', '.join(said)})"
    return f"{own}{formula} = {value}"


def _short(x: Any) -> str:
    x = value_of(x)
    if isinstance(x, tuple | slice | list):
        return "…"
    if np.ndim(x):
        return "array " + "×".join(map(str, np.shape(x)))
    return f"{x:.4g}".replace("-", "−") if isinstance(x, float | int | np.ndarray) else str(x)


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x1, y1), (x2, y2) = start, end
    x1, y1, x2 = x1 + WIDTH // 2, y1 + HEIGHT, x2 + WIDTH // 2
    return (
        f'<path fill="none" d="M{x1} {y1} L{x2} {y2 - 6}"/>'
        f'<path d="M{x2 - 4} {y2 - 7} h8 l-4 7 z" stroke="none"/>'
    )


def _box(at: tuple[int, int], text: str, note: str | None, filled: bool) -> str:
    x, y = at
    fill = 'fill="#E69F00" fill-opacity="0.35"' if filled else 'fill="none"'
    formula, _, value = text.rpartition(" = ")
    said = [part for part in (formula, value, note) if part]
    rows = [
        (part, HEIGHT // 2 + 5 + 17 * i - 17 * (len(said) - 1) // 2) for i, part in enumerate(said)
    ]
    words = "".join(
        f'<text x="{x + WIDTH // 2}" y="{y + dy}" text-anchor="middle" stroke="none">'
        f"{escape(part)}</text>"
        for part, dy in rows
    )
    return f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" {fill}/>{words}'
