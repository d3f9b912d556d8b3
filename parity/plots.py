"""Plots as SVG text, drawn by a few lines of code: no library, no script, no font to load.

In: numbers. Out: an `<svg>` element as a string, to stand in an HTML page or a file of its own. Knows nothing
of models and comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import svg
from .svg import BAD, FAINT, GOOD, GRID, INK
from .svg import COLOURS as COLOURS


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: shown at its end.
        colour: of the line.
        values: one per column; values that are not positive are drawn at the bottom.
    """

    name: str
    colour: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Bar:
    """One bar of a plot.

    Attributes:
        name: before it.
        value: its length.
        label: behind it.
        colour: of the bar.
    """

    name: str
    value: float
    label: str
    colour: str = COLOURS[0]


def log_lines(
    columns: Sequence[str], lines: Sequence[Line], *, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """Lines over named columns, with a logarithmic axis of powers of ten.

    Args:
        columns: names on the horizontal axis.
        lines: drawn in order, each with a value per column.
        marks: values with a name that get a dashed line across.
    """
    width, height, left, right, top, bottom = 760, 300, 56, 220, 14, 34
    positive = [value for line in lines for value in line.values if value > 0] + [
        mark for mark, _ in marks if mark > 0
    ]
    low, high = decades(positive)

    def x(index: int) -> float:
        return left + index * (width - left - right) / max(1, len(columns) - 1)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        return height - bottom - min(1.0, max(0.0, share)) * (height - top - bottom)

    parts = []
    step = max(1, (high - low) // 8)
    for exponent in range(low, high + 1, step):
        level = y(10.0**exponent)
        parts.append(svg.line(left, level, width - right, level, GRID))
        parts.append(svg.text(left - 8, level + 4, f"10{svg.superscript(exponent)}", FAINT, "end"))
    for index, name in enumerate(columns):
        parts.append(svg.text(x(index), height - bottom + 18, name, FAINT, "middle"))
    for value, name in marks:
        parts.append(svg.line(left, y(value), width - right, y(value), BAD, dash="5 4"))
        parts.append(svg.text(left + 6, y(value) - 5, name, BAD, "start"))
    ends: list[float] = []
    for line in lines:
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(line.values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2.5"/>')
        parts += [svg.dot(x(i), y(value), 3.0, line.colour) for i, value in enumerate(line.values)]
        end = y(line.values[-1]) + 4
        while any(abs(end - other) < 14 for other in ends):
            end += 14
        ends.append(end)
        parts.append(svg.text(x(len(line.values) - 1) + 9, end, line.name, line.colour, "start", bold=True))
    return svg.document(width, height, parts)


def bars(items: Sequence[Bar], *, log: bool = False) -> str:
    """Horizontal bars, one below the other.

    Args:
        items: from top to bottom.
        log: lengths by order of magnitude, from the power of ten below the smallest.
    """
    width, left, right, row = 660, 120, 170, 26
    values = [item.value for item in items if item.value > 0]
    low, high = decades(values)
    longest = max(values, default=1.0)

    def length(value: float) -> float:
        if not value > 0:
            return 0.0
        share = (math.log10(value) - low) / (high - low) if log else value / longest
        return max(1.5, share * (width - left - right))

    parts = []
    for index, item in enumerate(items):
        top = index * row + 4
        parts.append(svg.text(left - 10, top + 14, item.name, INK, "end"))
        parts.append(svg.rect(left, top, length(item.value), row - 8, item.colour))
        parts.append(svg.text(left + length(item.value) + 8, top + 14, item.label, FAINT, "start"))
    return svg.document(width, row * len(items) + 6, parts)


@dataclass(frozen=True)
class Strip:
    """How far two answers go together.

    Attributes:
        name: before it.
        common: length until they part.
        total: length of the reference's.
        same: whether they never part.
        label: behind it.
    """

    name: str
    common: int
    total: int
    same: bool
    label: str


def strips(items: Sequence[Strip]) -> str:
    """A thin bar per answer: the common part in colour, the rest grey, a mark where they part."""
    width, left, right, row = 640, 120, 150, 16 if len(items) > 24 else 20
    longest = max((item.total for item in items), default=1) or 1
    parts = []
    for index, item in enumerate(items):
        top, scale = index * row + 3, (width - left - right) / longest
        parts.append(svg.text(left - 10, top + row - 8, item.name, INK, "end", size=11))
        parts.append(svg.rect(left, top, item.total * scale, row - 7, GRID))
        parts.append(svg.rect(left, top, item.common * scale, row - 7, GOOD if item.same else COLOURS[0]))
        if not item.same:
            parts.append(svg.rect(left + item.common * scale - 1, top - 2, 3, row - 3, BAD))
        parts.append(
            svg.text(left + item.total * scale + 8, top + row - 8, item.label, FAINT, "start", size=11)
        )
    return svg.document(width, row * len(items) + 6, parts)


@dataclass(frozen=True)
class Move:
    """A touch of the reference and the candidate's instead of it, in 0..999."""

    start: tuple[int, int]
    end: tuple[int, int]
    hit: bool | None


def moves(items: Sequence[Move]) -> str:
    """A screen: rings where the reference touches, dots where the candidate does, joined by lines.

    Touches that agree are drawn together as two paths of points, so that a thousand of them are a few lines.
    """
    width, height, edge = 230, 420, 10

    def place(point: tuple[int, int]) -> tuple[float, float]:
        return edge + point[0] / 999 * (width - 2 * edge), edge + point[1] / 999 * (height - 2 * edge)

    def points(some: Sequence[tuple[int, int]], size: float, colour: str) -> str:
        """Round dots, a path of lines of no length with round ends."""
        if not some:
            return ""
        path = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in map(place, some))
        return f'<path d="{path}" stroke="{colour}" stroke-width="{size:g}" stroke-linecap="round"/>'

    parts = [
        f'<rect x="{edge}" y="{edge}" width="{width - 2 * edge}" height="{height - 2 * edge}" rx="14" '
        f'fill="#f9fafb" stroke="{GRID}"/>'
    ]
    same = {False: set[tuple[int, int]](), True: set[tuple[int, int]]()}
    for item in items:
        if item.start == item.end:
            same[item.hit is False].add(item.end)
    every = sorted(same[False] | same[True])
    parts += [points(every, 13.5, FAINT), points(every, 10.5, "#f9fafb")]
    parts += [points(sorted(same[bad]), 6, BAD if bad else COLOURS[0]) for bad in (False, True)]
    for item in items:
        if item.start == item.end:
            continue
        (x0, y0), (x1, y1) = place(item.start), place(item.end)
        colour = BAD if item.hit is False else COLOURS[0]
        parts.append(svg.line(x0, y0, x1, y1, colour))
        parts.append(
            f'<circle cx="{x0:.1f}" cy="{y0:.1f}" r="6" fill="none" stroke="{FAINT}" stroke-width="1.5"/>'
        )
        parts.append(svg.dot(x1, y1, 3.0, colour))
    return svg.document(width, height, parts)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Exponents of the powers of ten around positive values; at least one apart."""
    finite = [value for value in values if value > 0 and math.isfinite(value)]
    if not finite:
        return -1, 0
    low = math.floor(math.log10(min(finite)) - 1e-9)
    return low, max(low + 1, math.ceil(math.log10(max(finite)) + 1e-9))
