"""Batches of the pocket model's training: which screens a step takes, and the tensors it is made of.

In: pools of drawn screens, a maker of rows. Out: screens of a step, tensors, and the answers within a row.
This module knows nothing of weights and losses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from pocket_pool import Pool
from pocket_questions import Question
from pocket_rows import Ids, Lesson, Row, RowMaker, shuffled
from pocket_vocabulary import BUTTONS, LABELS
from torch import Tensor

Batch = dict[str, Tensor]


class Schedule:
    """Which screens the steps of a cycle take: one image size per step, each pool in shuffled order."""

    def __init__(
        self,
        pools: list[Pool],
        shares: tuple[float, ...],
        steps: int,
        batch: int,
        seed: int,
        button_share: float,
    ) -> None:
        self._pools, self._batch = pools, batch
        rng = np.random.default_rng(seed)
        self._grids = rng.choice(len(pools), steps, p=shares)
        self._starts = np.zeros(steps, np.int64)
        self._orders: list[Ids] = []
        for grid, pool in enumerate(pools):
            mine = self._grids == grid
            self._starts[mine] = batch * np.arange(mine.sum())
            order = shuffled(len(pool.pixels), max(1, int(mine.sum()) * batch), seed + grid)
            self._orders.append(_favour_buttons(pool, order, button_share, rng))

    def pool(self, step: int) -> Pool:
        """The pool of a step."""
        return self._pools[self._grids[step]]

    def indices(self, step: int, rank: int, share: int) -> Ids:
        """A worker's screens of a step, `share` of them."""
        first = self._starts[step] + rank * share
        return self._orders[self._grids[step]][first : first + share]


def _favour_buttons(pool: Pool, order: Ids, share: float, rng: np.random.Generator) -> Ids:
    """Replace a share of the scheduled screens by screens with buttons."""
    if not share:
        return order
    classes = [LABELS.index(label) for label in BUTTONS]
    candidates = np.flatnonzero(np.isin(pool.cells[..., 0], classes).any(1))
    return np.where(rng.random(len(order)) < share, rng.choice(candidates, len(order)), order)


def make_rows(maker: RowMaker, pool: Pool, indices: Ids, lesson: Lesson, seeds: list[str]) -> list[Row]:
    """A row with fresh questions for each screen."""
    return [
        maker.make(pool.screen(int(index)), random.Random(seed), lesson)
        for index, seed in zip(indices, seeds, strict=True)
    ]


def collate(rows: list[Row], lesson: Lesson, pixels: npt.NDArray[np.uint8]) -> Batch:
    """Tensors of one step: rows of a lesson, and their screens (B, H, W, 3)."""
    batch = {
        name: torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
        for name in ("ids", "segments", "positions", "labels", "pointers", "sources")
    }
    batch["image_start"] = torch.tensor([row.image_start for row in rows])
    batch["prefix"] = torch.from_numpy(lesson.prefix)
    batch["pixels"] = torch.from_numpy(pixels)
    return batch


def answered(row: Row, best: Tensor) -> Iterator[tuple[Question, Tensor, Tensor]]:
    """Questions of a row, the tokens given for each, and those expected.

    Args:
        row: of L tokens.
        best: likeliest token at every answer position of the row, in its order.
    """
    labels, segments = torch.from_numpy(row.labels), torch.from_numpy(row.segments)
    is_answer = labels >= 0
    target, segment = labels[is_answer], segments[is_answer]
    for number, question in enumerate(row.questions, 1):
        mine = segment == number
        yield question, best[mine], target[mine]
