"""A screenshot to measure with: coloured boxes, the same for a seed. Knows nothing of models."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SCREEN = (1080, 2400)
"""Width and height of a phone's."""


def screenshot(size: tuple[int, int] = SCREEN, seed: int = 0) -> Image.Image:
    """A phone screen of coloured boxes: bars above and below, rows between, none like another."""
    width, height = size
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, (245, 246, 248))
    draw = ImageDraw.Draw(image)
    row = max(1, height // 24)
    for top in range(0, height, row):
        colour = tuple(int(value) for value in random.integers(60, 240, 3))
        left = int(random.integers(0, max(1, width // 6)))
        right = int(random.integers(width // 2, width + 1))
        draw.rectangle((left, top + row // 6, max(left, right - 1), top + row - row // 6), fill=colour)
        draw.ellipse((left, top + row // 4, left + row // 2, top + 3 * row // 4), fill=(255, 255, 255))
    return image
