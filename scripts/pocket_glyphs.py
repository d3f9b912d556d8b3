"""Signs of the home screen applications.

In: the name of a sign, its place, size and colours. Out: drawing operations on a screen. This module knows
nothing of labels or layouts.
"""

from __future__ import annotations

import math

from pocket_canvas import Screen
from pocket_vocabulary import Color


def draw_glyph(screen: Screen, glyph: str, x: float, y: float, r: float, ink: Color, back: Color) -> None:
    """Draw the sign of an app inside the square of half side `r` around (x, y)."""

    def disc(cx: float, cy: float, radius: float, color: Color) -> None:
        screen.ellipse(
            (x + (cx - radius) * r, y + (cy - radius) * r, x + (cx + radius) * r, y + (cy + radius) * r),
            color,
        )

    def block(x0: float, y0: float, x1: float, y1: float, color: Color = ink) -> None:
        screen.rectangle((x + x0 * r, y + y0 * r, x + x1 * r, y + y1 * r), color)

    def shape(*points: float) -> None:
        screen.polygon(
            tuple((x if index % 2 == 0 else y) + point * r for index, point in enumerate(points)), ink
        )

    def stroke(*points: float) -> None:
        screen.line(
            tuple((x if index % 2 == 0 else y) + point * r for index, point in enumerate(points)),
            ink,
            r * 0.22,
        )

    if glyph in ("gear", "sun"):
        for step in range(8):
            angle = math.pi * step / 4
            stroke(0, 0, math.cos(angle), math.sin(angle))
        disc(0, 0, 0.66, ink)
        if glyph == "gear":
            disc(0, 0, 0.32, back)
    elif glyph in ("ring", "globe", "hands"):
        disc(0, 0, 1, ink)
        disc(0, 0, 0.74, back)
        if glyph == "ring":
            disc(0, 0, 0.4, ink)
        elif glyph == "globe":
            stroke(-1, 0, 1, 0)
            stroke(0, -1, 0, 1)
        else:
            stroke(0, -0.6, 0, 0, 0.5, 0.3)
    elif glyph == "hills":
        shape(-1, 0.9, -0.3, -0.3, 0.2, 0.5, 0.5, 0.1, 1, 0.9)
        disc(0.5, -0.6, 0.25, ink)
    elif glyph == "bar":
        stroke(-0.8, -0.8, -0.4, 0.3, 0.8, 0.8)
        disc(-0.75, -0.7, 0.35, ink)
        disc(0.7, 0.75, 0.35, ink)
    elif glyph == "bubble":
        block(-1, -0.8, 1, 0.4)
        shape(-0.6, 0.4, 0.1, 0.4, -0.6, 1)
    elif glyph == "person":
        disc(0, -0.45, 0.45, ink)
        shape(-0.9, 1, -0.6, 0.2, 0.6, 0.2, 0.9, 1)
    elif glyph in ("grid", "lines"):
        for row in (-0.8, 0.0, 0.8):
            stroke(-0.9, row, 0.9, row)
            if glyph == "grid":
                stroke(row, -0.9, row, 0.9)
    elif glyph == "pin":
        disc(0, -0.3, 0.65, ink)
        shape(-0.6, -0.1, 0.6, -0.1, 0, 1)
        disc(0, -0.3, 0.25, back)
    elif glyph == "note":
        disc(-0.5, 0.65, 0.35, ink)
        disc(0.6, 0.45, 0.35, ink)
        stroke(-0.25, 0.6, -0.25, -0.8, 0.85, -0.9, 0.85, 0.4)
    elif glyph == "play":
        shape(-0.6, -0.9, -0.6, 0.9, 0.9, 0)
    elif glyph in ("envelope", "card"):
        block(-1, -0.7, 1, 0.7)
        if glyph == "card":
            block(-1, -0.4, 1, -0.1, back)
        else:
            screen.line((x - r, y - 0.7 * r, x, y + 0.1 * r, x + r, y - 0.7 * r), back, r * 0.2)
    elif glyph == "folder":
        block(-1, -0.5, 1, 0.8)
        block(-1, -0.8, -0.1, -0.4)
    elif glyph == "plus":
        stroke(-0.9, 0, 0.9, 0)
        stroke(0, -0.9, 0, 0.9)
    elif glyph == "bag":
        block(-0.8, -0.3, 0.8, 0.9)
        stroke(-0.4, -0.3, -0.4, -0.9, 0.4, -0.9, 0.4, -0.3)
    elif glyph == "heart":
        disc(-0.42, -0.3, 0.5, ink)
        disc(0.42, -0.3, 0.5, ink)
        shape(-0.86, -0.05, 0.86, -0.05, 0, 0.95)
    elif glyph == "diamond":
        shape(0, -1, 0.9, 0, 0, 1, -0.9, 0)
    elif glyph == "book":
        block(-0.9, -0.8, -0.1, 0.8)
        block(0.1, -0.8, 0.9, 0.8)
    elif glyph == "car":
        block(-1, -0.1, 1, 0.5)
        shape(-0.6, -0.1, -0.35, -0.7, 0.35, -0.7, 0.6, -0.1)
        disc(-0.5, 0.55, 0.3, ink)
        disc(0.5, 0.55, 0.3, ink)
    else:  # cart
        stroke(-1, -0.8, -0.6, -0.8, -0.3, 0.4, 0.7, 0.4, 0.95, -0.5, -0.5, -0.5)
        disc(-0.2, 0.8, 0.2, ink)
        disc(0.6, 0.8, 0.2, ink)
