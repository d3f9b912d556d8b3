"""A screen as a drawing: elements with boxes, and the operations that make the picture.

In: rectangles, lines, texts in dp. Out: a `Screen`, and its picture at 1, 2 or 3 pixels per dp (360x800,
720x1600, 1080x2400). The text font is the one embedded in Pillow, so a screen looks the same wherever the
same Pillow is installed. Knows nothing of what is on a phone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from pocket_vocabulary import Color

Area = tuple[float, float, float, float]


@dataclass(frozen=True)
class Element:
    """Something on a screen that an instruction can name.

    `box` is (x0, y0, x1, y1) in dp. `sign` is the part of it that tells what it is: its text or its icon.
    `state` and `switch` (its box) exist only for rows with a switch.
    """

    kind: str
    label: str
    box: Area
    sign: Area
    state: str | None = None
    switch: Area | None = None


@dataclass
class Screen:
    """Layout of one screen: named elements and the drawing operations behind them, all in dp."""

    kind: str
    width: int
    height: int
    elements: list[Element] = field(default_factory=list)
    operations: list[tuple[Any, ...]] = field(default_factory=list)

    def rectangle(self, area: Area, color: Color, radius: float = 0, outline: Color | None = None) -> None:
        """Record a filled, possibly rounded rectangle."""
        self.operations.append(("rectangle", area, color, radius, outline))

    def ellipse(self, area: Area, color: Color) -> None:
        """Record a filled ellipse."""
        self.operations.append(("ellipse", area, color))

    def line(self, points: tuple[float, ...], color: Color, width: float) -> None:
        """Record a polyline through x0, y0, x1, y1, ..."""
        self.operations.append(("line", points, color, width))

    def polygon(self, points: tuple[float, ...], color: Color) -> None:
        """Record a filled polygon."""
        self.operations.append(("polygon", points, color))

    def text(self, x: float, y: float, text: str, size: float, color: Color, anchor: str = "lm") -> Area:
        """Record a line of text and return its area; `anchor` is "lm" (left) or "mm" (centred)."""
        self.operations.append(("text", x, y, text, size, color, anchor))
        width = _font(round(size)).getlength(text)
        left = x if anchor == "lm" else x - width / 2
        return (left, y - size / 2, left + width, y + size / 2)


def render(screen: Screen, scale: int = 1) -> Image.Image:
    """Draw a screen: RGB, (width * scale) x (height * scale) pixels."""
    image = Image.new("RGB", (screen.width * scale, screen.height * scale))
    draw = ImageDraw.Draw(image)

    def pixels(values: tuple[float, ...]) -> list[int]:
        return [round(value * scale) for value in values]

    for name, *arguments in screen.operations:
        if name == "rectangle":
            area, color, radius, outline = arguments
            draw.rounded_rectangle(pixels(area), round(radius * scale), color, outline, scale)
        elif name == "ellipse":
            draw.ellipse(pixels(arguments[0]), arguments[1])
        elif name == "line":
            draw.line(pixels(arguments[0]), arguments[1], max(1, round(arguments[2] * scale)))
        elif name == "polygon":
            draw.polygon(pixels(arguments[0]), arguments[1])
        else:
            x, y, text, size, color, anchor = arguments
            draw.text(pixels((x, y)), text, color, _font(round(size * scale)), anchor)
    return image


@functools.lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
