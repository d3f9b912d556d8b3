"""A scatter plot over two logarithmic axes, with labelled points, a frontier and a scale at the side.

In: numbers and names. Out: an `<svg>` element as a string. Knows nothing of what is plotted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import svg
from .plots import decades
from .svg import COLOURS, FAINT, GRID

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge."""


@dataclass(frozen=True)
class Spot:
    """One point of a scatter plot.

    Attributes:
        name: beside it.
        x: its place, above 0.
        y: its place, above 0; what is below the axis is drawn on its lower end, as a triangle.
        error: half the length of its error bar, upwards and downwards; 0 for none.
        colour: of point and name.
        hollow: drawn as a ring, for what is there for comparison.
    """

    name: str
    x: float
    y: float
    error: float = 0.0
    colour: str = COLOURS[0]
    hollow: bool = False


@dataclass(frozen=True)
class SideScale:
    """Known values of the vertical axis, drawn as a scale of its own on the right.

    Attributes:
        title: above it, three lines at most.
        marks: value and name.
        note: below it, three lines at most.
    """

    title: tuple[str, ...]
    marks: tuple[tuple[float, str], ...]
    note: tuple[str, ...] = ()


def frontier(spots: Sequence[Spot]) -> list[Spot]:
    """Spots that no other beats in one direction without losing in the other, from left to right.

    Small is good on both axes. Of two spots at the same place the first is kept.
    """
    best: list[Spot] = []
    for spot in sorted(spots, key=lambda item: (item.x, item.y)):
        if not best or spot.y < best[-1].y:
            best.append(spot)
    return best


def scatter(
    spots: Sequence[Spot],
    *,
    x_label: str,
    y_label: str,
    lowest: float,
    edge: Sequence[Spot] = (),
    side: SideScale | None = None,
) -> str:
    """Labelled points over two logarithmic axes.

    Args:
        spots: at least one.
        x_label: below the horizontal axis.
        y_label: above the vertical axis.
        lowest: end of the vertical axis; spots below it are drawn there.
        edge: points that a line joins, such as those of `frontier`.
        side: a scale on the right.
    """
    width, height, left, right, top, bottom = 900, 560, 62, 40 if side is None else 210, 50, 52
    marks = () if side is None else side.marks
    _, high = decades([lowest, *(item.y + item.error for item in spots), *(value for value, _ in marks)])
    low = math.floor(math.log10(lowest) + 1e-9)
    xs = [math.log(item.x) for item in spots]
    x_low, x_high = min(xs), max(xs)
    margin = 0.06 * (x_high - x_low) or 0.1
    x_low, x_high = x_low - margin, x_high + 1.6 * margin  # names stand on the right

    def x(value: float) -> float:
        return left + (math.log(value) - x_low) / (x_high - x_low) * (width - left - right)

    def y(value: float) -> float:
        share = (math.log10(max(value, lowest)) - low) / (high - low)
        return height - bottom - min(1.0, max(0.0, share)) * (height - top - bottom)

    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for exponent in range(low, high + 1):
        level = y(10.0**exponent)
        parts.append(svg.line(left, level, width - right, level, GRID))
        parts.append(svg.text(left - 8, level + 4, f"10{svg.superscript(exponent)}", FAINT, "end"))
    for value in _round_numbers(math.exp(x_low), math.exp(x_high)):
        parts.append(svg.line(x(value), top, x(value), height - bottom, GRID))
        parts.append(svg.text(x(value), height - bottom + 18, f"{value:g}", FAINT, "middle"))
    parts.append(svg.text((left + width - right) / 2, height - bottom + 38, x_label, FAINT, "middle"))
    parts.append(svg.text(left - 40, top - 20, y_label, FAINT, "start"))
    if side is not None:
        parts += _side_scale(side, width - right + 26, y, top, height - bottom)
    if edge:
        line = " ".join(f"{x(item.x):.1f},{y(item.y):.1f}" for item in edge)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="7" '
            'stroke-linejoin="round" stroke-linecap="round" opacity="0.18"/>'
        )
    places = [(x(item.x), y(item.y)) for item in spots]
    for item, (px, py) in zip(spots, places, strict=True):
        if item.error and item.y > lowest:
            ends = y(item.y + item.error), y(item.y - item.error)
            parts.append(svg.line(px, ends[0], px, ends[1], item.colour, opacity=0.5))
        parts.append(_mark(item, px, py, below=item.y < lowest))
    labels = place_labels([item.name for item in spots], places, (left, top, width - right, height - bottom))
    for item, (px, py), (lx, ly, anchor) in zip(spots, places, labels, strict=True):
        middle = lx + {"start": 1, "end": -1, "middle": 0}[anchor] * 3
        if math.hypot(lx - px, ly - 4 - py) > 20:
            parts.append(svg.line(px, py, middle, ly - 4, item.colour, opacity=0.7))
        parts.append(svg.text(lx, ly, item.name, item.colour, anchor, bold=not item.hollow, halo=True))
    return svg.document(width, height, parts)


def place_labels(
    names: Sequence[str], places: Sequence[tuple[float, float]], area: Box
) -> list[tuple[float, float, str]]:
    """Where names stand so that they cover neither points nor each other, if there is room.

    Args:
        names: as they are written.
        places: x and y of the points.
        area: left, top, right and bottom edge, which names keep to where they can.

    Returns:
        x, y of the base line, and anchor ("start", "middle" or "end") of each name.
    """
    taken: list[Box] = []
    dots = [(px - 5, py - 5, px + 5, py + 5) for px, py in places]
    found: dict[int, tuple[float, float, str]] = {}
    # The most crowded first: they have the fewest places to choose from.
    crowd = [sum(math.hypot(px - ox, py - oy) < 60 for ox, oy in places) for px, py in places]
    for index in sorted(range(len(names)), key=lambda i: (-crowd[i], i)):
        (px, py), length = places[index], 7.0 * len(names[index])
        best, least = (px + 9, py + 4, "start"), math.inf
        for candidate in _candidates(px, py):
            lx, ly, anchor = candidate
            start = lx - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * length
            box = (start, ly - 11, start + length, ly + 3)
            others = [dot for i, dot in enumerate(dots) if i != index]
            cost = sum(_common_area(box, other) for other in [*taken, *others]) + 4 * _outside(box, area)
            cost += 0.02 * math.hypot(lx - px, ly - 4 - py)
            if cost < least:
                best, least, chosen = candidate, cost, box
        taken.append(chosen)
        found[index] = best
    return [found[index] for index in range(len(names))]


def _candidates(px: float, py: float) -> list[tuple[float, float, str]]:
    """Places for a name around a point, the nearest first."""
    near = [
        (px + 9, py + 4, "start"),
        (px - 9, py + 4, "end"),
        (px, py - 9, "middle"),
        (px, py + 18, "middle"),
    ]
    for away in (18, 30, 44, 60):
        for dx, dy in (
            (1, -0.7),
            (1, 0.7),
            (-1, -0.7),
            (-1, 0.7),
            (0.6, -1),
            (0.6, 1),
            (-0.6, -1),
            (-0.6, 1),
        ):
            near.append((px + away * dx, py + 4 + away * dy, "start" if dx > 0 else "end"))
    return near


def _common_area(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, area: Box) -> float:
    inside = _common_area(box, area)
    return (box[2] - box[0]) * (box[3] - box[1]) - inside


def _side_scale(
    side: SideScale, x: float, y: Callable[[float], float], top: float, bottom: float
) -> list[str]:
    parts = [svg.line(x, top, x, bottom, FAINT)]
    for row, words in enumerate(side.title):
        parts.append(svg.text(x - 6, top - 36 + 14 * row, words, FAINT, "start", size=11))
    for row, words in enumerate(side.note):
        parts.append(svg.text(x - 6, bottom + 18 + 13 * row, words, FAINT, "start", size=10))
    last = math.inf
    for value, name in sorted(side.marks):
        level = min(y(value) + 4, last - 13)
        last = level
        parts.append(svg.line(x - 4, y(value), x + 4, y(value), FAINT))
        parts.append(svg.line(x + 4, y(value), x + 14, level - 4, GRID))
        parts.append(svg.text(x + 18, level, name, FAINT, "start", size=11.5))
    return parts


def _mark(spot: Spot, px: float, py: float, *, below: bool) -> str:
    if below:
        return f'<path d="M{px - 6:.1f} {py - 9:.1f}h12l-6 9z" fill="{spot.colour}"/>'
    if spot.hollow:
        return (
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="#fff" stroke="{spot.colour}" '
            'stroke-width="2"/>'
        )
    return svg.dot(px, py, 5.0, spot.colour)


def _round_numbers(low: float, high: float) -> list[float]:
    """Numbers of one digit, or 1.5 times a power of ten, within bounds; fewer where they would be many."""
    digits = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 30 else (1, 2, 5)
    found = [digit * 10.0**e for e in range(math.floor(math.log10(low)), 20) for digit in digits]
    return [value for value in found if low <= value <= high]
