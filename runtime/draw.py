"""Draws an action onto a screenshot, for people who look at what an agent is about to do.

In: a picture and an `Action`. Out: a marked copy of the same size. Marks scale with the picture: a tap is a
ring with a crosshair and its coordinates, a long press two rings, a double tap a ring with a filled core, a
swipe an arrow. An action without a point becomes a caption strip. Knows nothing of models or phones.
"""

from __future__ import annotations

import math
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from .actions import Action, Point, to_pixels

_COLOR = (255, 45, 85)
_EDGE = (255, 255, 255)
_STRIP = (17, 24, 39, 224)
_CAPTION_CHARACTERS = 160

_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simhei.ttf",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)
"""Fonts of Linux, macOS and Windows, those with Chinese characters first, looked for by file name; none is
shipped, and Pillow's own, the last resort, has little more than ASCII."""

_NO_CHARACTER = "\U0010ffff"
"""A code point that stands for nothing, and so shows what a font draws for lack of a glyph."""
_BLANKS = frozenset(" \t\r\n\u3000")

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_action(image: Image.Image, action: Action) -> Image.Image:
    """Mark what an action does.

    Args:
        image: the screenshot that the action is about; left as it is.
        action: what to mark; a point lies at to_pixels(point, image.size), as the client touches it.

    Returns:
        RGB copy of the same size.
    """
    copy = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(copy, "RGBA")
    unit = max(1.0, min(image.size) / 100)
    if action.start is not None and action.end is not None:
        _arrow(draw, to_pixels(action.start, image.size), to_pixels(action.end, image.size), unit)
        _label(draw, image.size, action.start, unit)
        _label(draw, image.size, action.end, unit)
    elif action.element is not None:
        center = to_pixels(action.element, image.size)
        _crosshair(draw, center, unit)
        _ring(draw, center, 5 * unit, unit)
        if action.kind == "Long Press":
            _ring(draw, center, 8 * unit, unit)
        if action.kind == "Double Tap":
            _disc(draw, center, 2.5 * unit, unit)
        _label(draw, image.size, action.element, unit)
    else:
        _caption(draw, image.size, action, unit)
    return copy


def _stroke(unit: float) -> int:
    return max(1, round(0.7 * unit))


def _edge(unit: float) -> int:
    return max(1, round(0.35 * unit))


def _ring(draw: ImageDraw.ImageDraw, center: Point, radius: float, unit: float) -> None:
    """A coloured circle line with a thin white edge on either side, so that it shows on any background."""
    stroke, edge = _stroke(unit), _edge(unit)
    draw.ellipse(_box(center, radius + edge), outline=_EDGE, width=stroke + 2 * edge)
    draw.ellipse(_box(center, radius), outline=_COLOR, width=stroke)


def _disc(draw: ImageDraw.ImageDraw, center: Point, radius: float, unit: float) -> None:
    draw.ellipse(_box(center, radius), fill=_COLOR, outline=_EDGE, width=_edge(unit))


def _crosshair(draw: ImageDraw.ImageDraw, center: Point, unit: float) -> None:
    x, y = center
    arm = 7.5 * unit
    for color, width in ((_EDGE, _edge(unit) * 2 + 1), (_COLOR, max(1, round(0.3 * unit)))):
        draw.line((x - arm, y, x + arm, y), fill=color, width=width)
        draw.line((x, y - arm, x, y + arm), fill=color, width=width)


def _arrow(draw: ImageDraw.ImageDraw, start: Point, end: Point, unit: float) -> None:
    """A line with a dot where the finger comes down and a head where it goes up."""
    length = math.dist(start, end)
    if length < 1:
        _ring(draw, start, 4 * unit, unit)
        return
    along = ((end[0] - start[0]) / length, (end[1] - start[1]) / length)
    head = min(6 * unit, length)
    for color, grow in ((_EDGE, _edge(unit)), (_COLOR, 0)):
        neck = (end[0] - along[0] * head * 0.8, end[1] - along[1] * head * 0.8)
        draw.line((*start, *neck), fill=color, width=2 * _stroke(unit) + 2 * grow)
        draw.polygon(_triangle(end, along, head, grow), fill=color)
        draw.ellipse(_box(start, 1.8 * unit + grow), fill=color)


def _triangle(tip: Point, along: tuple[float, float], head: float, grow: float) -> list[tuple[float, float]]:
    """Arrow head, pushed outwards by `grow` on every side."""
    front, back, half = 2 * grow, head + grow, head * 0.55 + 1.6 * grow
    foot = (tip[0] - along[0] * back, tip[1] - along[1] * back)
    return [
        (tip[0] + along[0] * front, tip[1] + along[1] * front),
        (foot[0] - along[1] * half, foot[1] + along[0] * half),
        (foot[0] + along[1] * half, foot[1] - along[0] * half),
    ]


def _label(draw: ImageDraw.ImageDraw, size: tuple[int, int], point: Point, unit: float) -> None:
    """The coordinates, 0..1000, beside a point and inside the picture."""
    center = to_pixels(point, size)
    font = _font(max(8, round(4 * unit)))
    text = f"{point[0]},{point[1]}"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(1, round(0.8 * unit))
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    gap = 6 * unit
    x = center[0] + gap if center[0] + gap + width <= size[0] else center[0] - gap - width
    y = center[1] - gap - height if center[1] - gap - height >= 0 else center[1] + gap
    x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
    draw.rounded_rectangle((x, y, x + width, y + height), radius=pad, fill=_STRIP)
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=_EDGE)


def _caption(draw: ImageDraw.ImageDraw, size: tuple[int, int], action: Action, unit: float) -> None:
    """A strip along the lower edge with the action as text, broken into lines that fit."""
    font = _font(max(9, round(4 * unit)))
    pad = max(2, round(2 * unit))
    text = _words(action, font)
    if len(text) > _CAPTION_CHARACTERS:
        text = text[: _CAPTION_CHARACTERS - 1] + "…"
    lines = _lines(draw, text, font, size[0] - 2 * pad)
    box = draw.textbbox((0, 0), "Äg", font=font)
    step = round((box[3] - box[1]) * 1.35)
    lines = lines[: max(1, (size[1] - 2 * pad) // max(1, step))]
    top = size[1] - step * len(lines) - 2 * pad
    draw.rectangle((0, top, size[0], size[1]), fill=_STRIP)
    for number, line in enumerate(lines):
        draw.text((pad, top + pad + number * step), line, font=font, fill=_EDGE)


def _lines(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> list[str]:
    """Break between any two characters: Chinese has no spaces, and calls few."""
    lines = [""]
    for character in text:
        if lines[-1] and draw.textlength(lines[-1] + character, font=font) > width:
            lines.append("")
        lines[-1] += character
    return lines


def _box(center: Point, radius: float) -> tuple[float, float, float, float]:
    return center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius


@lru_cache(maxsize=16)
def _font(size: int) -> _Font:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _words(action: Action, font: _Font) -> str:
    """The action as the model writes it; a text with characters that the font lacks is left out."""
    shown = tuple(
        (name, "…" if isinstance(value, str) and not _covers(font, value) else value)
        for name, value in action.arguments
    )
    return " ".join(str(Action(action.kind, shown)).split())


def _covers(font: _Font, text: str) -> bool:
    """Whether every character has a glyph, hence does not look like one that no font has."""
    try:
        missing = bytes(font.getmask(_NO_CHARACTER))
        return all(bytes(font.getmask(character)) != missing for character in set(text) - _BLANKS)
    except UnicodeEncodeError:  # Pillow without FreeType has Latin-1 only
        return text.isascii()
