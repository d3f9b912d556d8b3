"""Screens of a training run, drawn once: resized pixels and labels of every image cell, in memory maps.

In: a seed, a number of screens, a size and a work folder. Out: a `Pool` that gives screen i as uint8 pixels
of the size the processor would produce for one image budget and as cell labels. A cell is the 28 x 28 pixel
square behind one image token. This module knows nothing of questions, tokens or weights.
"""

from __future__ import annotations

import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from pocket_canvas import Screen, render
from pocket_screens import make_screen
from pocket_vocabulary import LABELS

CELL_SIDE = 28
BACKGROUND = len(LABELS)
CELL_FACTS = 7
STATES = (None, "on", "off")
SCALE_WEIGHTS = (75, 15, 10)


@dataclass(frozen=True)
class Grid:
    """What an image budget makes of a tall phone screenshot: rows and columns of cells, a token each."""

    rows: int
    columns: int

    @property
    def cells(self) -> int:
        """Image tokens."""
        return self.rows * self.columns

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width after resizing."""
        return self.rows * CELL_SIDE, self.columns * CELL_SIDE


GRIDS = (Grid(17, 8), Grid(15, 7), Grid(13, 6))
"""The sizes trained, finest first: budgets of 144, 112 and 81 image tokens."""

_CLASS = {label: index for index, label in enumerate(LABELS)}


@dataclass(frozen=True)
class Pool:
    """A number of drawn screens.

    `pixels` is (M, H, W, 3) uint8 of `grid`. `cells` is (M, N, 7) int16: the label class, the digits of the
    element centre (hundreds and tens of x, then of y, on the 0-999 scale), the index of its state, and 1
    where the cell can be named: it shows the element's text or icon, or background.
    """

    seed: str
    grid: Grid
    pixels: npt.NDArray[np.uint8]
    cells: npt.NDArray[np.int16]

    def screen(self, index: int) -> Screen:
        """Layout of screen `index`, without drawing it."""
        return make_screen(f"{self.seed}:{index}")


def shrink(image: Image.Image, grid: Grid) -> npt.NDArray[np.uint8]:
    """Resize a tall phone screenshot as the image processor does; (H, W, 3) uint8."""
    return np.asarray(image.resize(grid.pixels[::-1], Image.Resampling.BICUBIC))


def cell_labels(screen: Screen, grid: Grid) -> npt.NDArray[np.int16]:
    """Label the image cells of a screen by the element that covers most of each; (N, 7) int16."""
    labels = np.zeros((grid.rows, grid.columns, CELL_FACTS), np.int16)
    labels[..., 0] = BACKGROUND
    labels[..., 6] = 1
    best = np.zeros((grid.rows, grid.columns))
    height, width = screen.height / grid.rows, screen.width / grid.columns
    edges_y, edges_x = np.arange(grid.rows + 1) * height, np.arange(grid.columns + 1) * width
    for element in screen.elements:
        x0, y0, x1, y1 = element.box
        over_x = np.clip(np.minimum(edges_x[1:], x1) - np.maximum(edges_x[:-1], x0), 0, None)
        over_y = np.clip(np.minimum(edges_y[1:], y1) - np.maximum(edges_y[:-1], y0), 0, None)
        cover = over_y[:, None] * over_x[None, :]
        enough = (cover > 0.25 * width * height) | (cover > 0.4 * (x1 - x0) * (y1 - y0))
        wins = enough & (cover > best)
        best[wins] = cover[wins]
        x0, y0, x1, y1 = element.sign
        sign_x = np.minimum(edges_x[1:], x1) - np.maximum(edges_x[:-1], x0) > min(10, 0.4 * (x1 - x0))
        sign_y = np.minimum(edges_y[1:], y1) - np.maximum(edges_y[:-1], y0) > min(10, 0.4 * (y1 - y0))
        named = wins & sign_y[:, None] & sign_x[None, :]
        x0, y0, x1, y1 = element.box
        x, y = int((x0 + x1) / 2 / screen.width * 100 + 0.5), int((y0 + y1) / 2 / screen.height * 100 + 0.5)
        state = STATES.index(element.state)
        labels[wins] = (_CLASS[element.label], x // 10, x % 10, y // 10, y % 10, state, 0)
        labels[named, 6] = 1
    return labels.reshape(grid.cells, CELL_FACTS)


def open_pool(folder: Path, seed: str, size: int, grid: Grid, processes: int = 2) -> Pool:
    """Open the pool of a seed and a grid, drawing it first when the folder does not hold it yet.

    Each screen is drawn at one, two or three pixels per dp before it is resized. Pools of one seed hold other
    screens for other grids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed = f"{seed}-{grid.cells}"
    pixels_path, cells_path = folder / f"{seed}-{size}-pixels.npy", folder / f"{seed}-{size}-cells.npy"
    if not cells_path.exists():
        pixels = np.lib.format.open_memmap(pixels_path, "w+", np.uint8, (size, *grid.pixels, 3))
        cells = np.zeros((size, grid.cells, CELL_FACTS), np.int16)
        with multiprocessing.Pool(processes) as workers:
            jobs = workers.imap(_draw, ((seed, index, grid) for index in range(size)), chunksize=64)
            for index, (image, labels) in enumerate(jobs):
                pixels[index], cells[index] = image, labels
        pixels.flush()
        np.save(cells_path, cells)
    return Pool(seed, grid, np.load(pixels_path, mmap_mode="r"), np.load(cells_path))


def _draw(job: tuple[str, int, Grid]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16]]:
    seed, index, grid = job
    screen = make_screen(f"{seed}:{index}")
    scale = random.Random(f"scale:{seed}:{index}").choices((1, 2, 3), SCALE_WEIGHTS)[0]
    return shrink(render(screen, scale), grid), cell_labels(screen, grid)
