"""Something to draw a plot on: a PNG by Pillow, or SVG text, by the same few calls.

In: rectangles, areas, lines and words, in points from the upper left corner. Out: a picture or an `<svg>`
element. Knows nothing of what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image, ImageDraw, ImageFont

from autoglm_edge.errors import SimulationError
from autoglm_edge.parity import svg

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]
SCALE = 2
"""Pixels per point of a PNG, so that it is sharp on any screen."""
_FINE = 2
"""Drawn so many times larger and reduced, which smooths slanted lines."""
_PIL_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


class Canvas(Protocol):
    """What a plot needs."""

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle by its upper left corner."""

    def area(self, points: Sequence[Point], colour: str) -> None:
        """A filled polygon."""

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0, dashed: bool = False) -> None:
        """Lines from point to point."""

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        """A filled circle."""

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str,
        *,
        anchor: Anchor = "start",
        size: float = 13,
        bold: bool = False,
    ) -> None:
        """Words at a base line."""

    def width_of(self, words: str, size: float) -> float:
        """How wide words will be, about."""


class SvgCanvas:
    """Draws SVG text."""

    def __init__(self, width: int, height: int) -> None:
        self._size = width, height
        self._parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle by its upper left corner."""
        self._parts.append(svg.rect(x, y, width, height, colour))

    def area(self, points: Sequence[Point], colour: str) -> None:
        """A filled polygon."""
        self._parts.append(f'<polygon points="{_points(points)}" fill="{colour}"/>')

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0, dashed: bool = False) -> None:
        """Lines from point to point."""
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{_points(points)}" fill="none" stroke="{colour}" '
            f'stroke-width="{width:g}"{dash}/>'
        )

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        """A filled circle."""
        self._parts.append(svg.dot(x, y, radius, colour))

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str,
        *,
        anchor: Anchor = "start",
        size: float = 13,
        bold: bool = False,
    ) -> None:
        """Words at a base line."""
        self._parts.append(svg.text(x, y, words, colour, anchor, bold=bold, size=size))

    def width_of(self, words: str, size: float) -> float:
        """How wide words will be, about."""
        return 0.56 * size * len(words)

    def document(self) -> str:
        """The `<svg>` element."""
        return svg.document(*self._size, self._parts)


class PngCanvas:
    """Draws a picture with Pillow and the font that it brings."""

    def __init__(self, width: int, height: int) -> None:
        self._scale = SCALE * _FINE
        self._image = Image.new("RGB", (width * self._scale, height * self._scale), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle by its upper left corner."""
        if width > 0 and height > 0:
            self._draw.rectangle(self._scaled([(x, y), (x + width, y + height)]), fill=colour)

    def area(self, points: Sequence[Point], colour: str) -> None:
        """A filled polygon."""
        if len(points) > 2:
            self._draw.polygon(self._scaled(points), fill=colour)

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.0, dashed: bool = False) -> None:
        """Lines from point to point."""
        pieces = _dashes(points) if dashed else [points]
        for piece in pieces:
            self._draw.line(
                self._scaled(piece), fill=colour, width=max(1, round(width * self._scale)), joint="curve"
            )

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        """A filled circle."""
        corners = [(x - radius, y - radius), (x + radius, y + radius)]
        self._draw.ellipse(self._scaled(corners), fill=colour)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str,
        *,
        anchor: Anchor = "start",
        size: float = 13,
        bold: bool = False,
    ) -> None:
        """Words at a base line; bold ones are drawn with a thin edge, since there is one font only."""
        font = self._font(size)
        edge = round(0.35 * self._scale) if bold else 0
        known = words.encode("latin-1", "replace").decode("latin-1")  # what that font has
        place = (x * self._scale, y * self._scale)
        if isinstance(font, ImageFont.FreeTypeFont):
            self._draw.text(
                place, known, colour, font, _PIL_ANCHORS[anchor], stroke_width=edge, stroke_fill=colour
            )
        else:  # Pillow without FreeType has one small bitmap font, which knows no anchors
            shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * font.getlength(known)
            self._draw.text((place[0] - shift, place[1] - size * self._scale), known, colour, font)

    def width_of(self, words: str, size: float) -> float:
        """How wide words will be."""
        return float(self._font(size).getlength(words.encode("latin-1", "replace").decode("latin-1"))) / (
            self._scale
        )

    def save(self, path: Path) -> None:
        """Write the PNG.

        Raises:
            SimulationError: the file cannot be written.
        """
        width, height = self._image.size
        picture = self._image.resize((width // _FINE, height // _FINE), Image.Resampling.LANCZOS)
        try:
            picture.save(path, "PNG", optimize=True)
        except OSError as error:
            raise SimulationError(
                f"the picture {path} cannot be written ({error.strerror or error}); name another place"
            ) from error

    def _scaled(self, points: Sequence[Point]) -> list[tuple[float, float]]:
        return [(x * self._scale, y * self._scale) for x, y in points]

    def _font(self, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        pixels = round(size * self._scale)
        if pixels not in self._fonts:
            self._fonts[pixels] = ImageFont.load_default(pixels)
        return self._fonts[pixels]


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _dashes(points: Sequence[Point], on: float = 6, off: float = 4) -> list[list[Point]]:
    """Straight lines cut into dashes."""
    found = []
    for (x0, y0), (x1, y1) in pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        at = 0.0
        while at < length:
            end = min(at + on, length)
            found.append([(x0 + (x1 - x0) * s / length, y0 + (y1 - y0) * s / length) for s in (at, end)])
            at += on + off
    return found
