"""Drawn phone screens for the prompt set: a picture, and where its labels are.

In: a seed and a size. Out: an RGB picture and boxes in 0..999. They look like settings lists and dialogs,
with text that a model can read and thumbnails of noise and gradients, which are hard on a vision tower; drawn
by Pillow with its own font, so no file is needed. Knows nothing of prompts and models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
Size = tuple[int, int]

LABELS = (
    "Wi-Fi", "Bluetooth", "Display", "Battery", "Sound", "Storage", "Privacy", "Location", "Accounts",
    "Language", "Updates", "Camera", "Calendar", "Messages", "Photos", "Music", "Maps", "Weather", "Clock",
    "Notes",
)  # fmt: skip
TITLES = ("Settings", "System", "Apps", "My phone", "Search")
DIALOGS = ("Delete this file?", "Restart the phone?", "Allow access to photos?", "Leave this page?")
BUTTONS = (("Cancel", "Delete"), ("Later", "Restart"), ("Deny", "Allow"), ("Stay", "Leave"))
ROWS = 8
TOP_ROWS = 2
"""Rows of height that the title takes."""


@dataclass(frozen=True, eq=False)
class Screen:
    """A drawn screen.

    Attributes:
        image: RGB.
        boxes: label -> (x0, y0, x1, y1) in 0..999 of width and height.
    """

    image: Image.Image
    boxes: dict[str, Box]


def draw_list(rng: random.Random, size: Size) -> Screen:
    """A title and a list of rows, each with a coloured icon, a label and now and then a picture."""
    width, height = size
    dark = rng.random() < 0.5
    ink, paper = ((235, 235, 235), (24, 26, 30)) if dark else ((20, 20, 20), (246, 246, 248))
    image = Image.new("RGB", size, paper)
    draw = ImageDraw.Draw(image)
    row = height // (ROWS + TOP_ROWS)
    draw.text((width // 16, row), rng.choice(TITLES), ink, _font(row // 2), anchor="lm")
    boxes = {}
    for index, label in enumerate(rng.sample(LABELS, ROWS)):
        top = (index + TOP_ROWS) * row
        draw.line((0, top, width, top), tuple((a + 3 * b) // 4 for a, b in zip(ink, paper, strict=True)))
        side, middle = row // 2, top + row // 2
        colour = tuple(rng.randrange(40, 230) for _ in range(3))
        draw.rounded_rectangle(
            (width // 16, middle - side // 2, width // 16 + side, middle + side // 2), side // 4, fill=colour
        )
        draw.text((width // 8 + side, middle), label, ink, _font(row // 3), anchor="lm")
        if rng.random() < 0.3:
            image.paste(_thumbnail(rng, side), (width - width // 16 - side, middle - side // 2))
        boxes[label] = _box((0, top, width, top + row), size)
    return Screen(image, boxes)


def draw_dialog(rng: random.Random, size: Size) -> Screen:
    """A question over a picture, with two buttons."""
    width, height = size
    image = _thumbnail(rng, max(8, width // 12)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    choice = rng.randrange(len(DIALOGS))
    line = height // 20
    left, right, top = width // 12, width - width // 12, height // 2 - 3 * line + rng.randrange(-line, line)
    draw.rounded_rectangle((left, top, right, top + 6 * line), line // 2, fill=(250, 250, 250))
    draw.text((width // 2, top + 2 * line), DIALOGS[choice], (20, 20, 20), _font(line * 3 // 5), anchor="mm")
    boxes = {}
    for place, label in enumerate(BUTTONS[choice]):
        x0 = left + place * (right - left) // 2
        x1 = x0 + (right - left) // 2
        area = (x0 + line // 3, top + 4 * line, x1 - line // 3, top + 5 * line + line // 2)
        draw.rounded_rectangle(area, line // 3, fill=(60, 110, 220) if place else (200, 200, 205))
        centre = ((area[0] + area[2]) // 2, (area[1] + area[3]) // 2)
        draw.text(centre, label, (255, 255, 255) if place else (30, 30, 30), _font(line // 2), anchor="mm")
        boxes[label] = _box(area, size)
    return Screen(image, boxes)


def draw_shapes(rng: random.Random, size: Size) -> Image.Image:
    """Discs and bars on a gradient: a picture that is no screen."""
    width, height = size
    ramp = np.linspace(rng.randrange(120), rng.randrange(130, 255), width)[None, :, None]
    colour = np.array([rng.random() for _ in range(3)])[None, None]
    plane = np.broadcast_to(ramp * (0.4 + 0.6 * colour), (height, width, 3))
    image = Image.fromarray(np.rint(plane).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, side = rng.randrange(width), rng.randrange(height), rng.randrange(8, max(9, min(size) // 3))
        fill = tuple(rng.randrange(256) for _ in range(3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - side, y - side // 2, x + side, y + side // 2), fill=fill)
    return image


def _thumbnail(rng: random.Random, side: int) -> Image.Image:
    noise = np.frombuffer(rng.randbytes(8 * 8 * 3), np.uint8).reshape(8, 8, 3)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(6, size))


def _box(area: tuple[int, int, int, int], size: Size) -> Box:
    """An area in pixels as 0..999."""
    x0, y0, x1, y1 = (value * 1000 // size[index % 2] for index, value in enumerate(area))
    return min(999, x0), min(999, y0), min(999, x1), min(999, y1)
