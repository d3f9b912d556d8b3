"""Packed training rows: one screen and as many independent questions about it as fit.

In: a `pocket_pool.Pool` and the tokenizer. Out: per screen one row of token ids with segment numbers, 3-D
positions and labels. Every question sees the prefix (system text and image) and itself, as if it were asked
alone: its positions restart where the prefix ends. This module knows how the chat template lays out one
turn; a test compares it with the template. It knows nothing of weights.

Shapes: L row length, P prefix length.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pocket_pool import CELLS, NUM_CELLS, Pool
from pocket_questions import Question, ask, decorate
from pocket_screens import Screen
from pocket_tokenizer import TOKEN_IDS
from pocket_vocabulary import LABELS, SYSTEM_PROMPTS
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

ROW_LENGTH = 256
MAX_POINTERS = 16
PAD_SEGMENT = -1
IGNORE = -100
ABSENT = -2
Asker = Callable[[Screen, random.Random], Question]


@dataclass
class Row:
    """One packed row.

    `ids`, `segments` and `labels` are (L,), `positions` is (3, L). Segment 0 is the prefix, question k has
    segment k + 1, padding -1. `labels[i]` is the answer token expected after token i, or `IGNORE`.
    `pointers` is (16, 2): the index of the last token of a thought's label and the class of that label, or
    `ABSENT`, for each question that names something, then -1. `sources` is (L,): at tokens before a digit of
    a point, the index of that last token, elsewhere -1.
    """

    ids: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    questions: list[Question]
    image_start: int
    pointers: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]


class RowMaker:
    """Turns screens into rows; keeps the token ids of texts it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, asker: Asker = ask) -> None:
        self._tokenizer = tokenizer
        self._asker = asker
        self._cache: dict[str, list[int]] = {}
        self._digits = {token for digit in "0123456789" for token in self.encode(digit)}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, added tokens recognised."""
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def make(
        self, screen: Screen, rng: random.Random, length: int = ROW_LENGTH, max_questions: int = 99
    ) -> Row:
        """Pack one screen and questions about it into a row of `length` tokens."""
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None
        head = "[gMASK]<sop>" + (f"<|system|>\n{system}" if system else "") + "<|user|>\n<|begin_of_image|>"
        before = self.encode(head)
        ids = np.full(length, TOKEN_IDS["<|endoftext|>"], np.int64)
        segments = np.full(length, PAD_SEGMENT, np.int64)
        positions = np.zeros((3, length), np.int64)
        labels = np.full(length, IGNORE, np.int64)
        start = len(before)
        prefix = start + NUM_CELLS + 1
        ids[:start] = before
        ids[start : prefix - 1] = TOKEN_IDS["<|image|>"]
        ids[prefix - 1] = TOKEN_IDS["<|end_of_image|>"]
        segments[:prefix] = 0
        positions[:, :start] = np.arange(start)
        rows, columns = np.divmod(np.arange(NUM_CELLS), CELLS[1])
        positions[:, start : prefix - 1] = start + np.stack((np.zeros_like(rows), rows, columns))
        text_start = start + max(CELLS)
        positions[:, prefix - 1] = text_start
        questions: list[Question] = []
        pointers = np.full((MAX_POINTERS, 2), -1, np.int64)
        sources = np.full(length, -1, np.int64)
        at = prefix
        while len(questions) < max_questions:
            question = self._asker(screen, rng)
            prompt = self.encode(f"{decorate(question.text, rng)}<|assistant|>\n")
            answer = self.encode(question.answer)
            end = at + len(prompt) + len(answer) - 1  # the terminator is only ever a label
            if end > length:
                break
            if question.target is not None and len(questions) < MAX_POINTERS:
                last = at + len(prompt) + len(self.encode(question.target))
                is_absent = question.kind == "absent"
                pointers[len(questions)] = last, ABSENT if is_absent else LABELS.index(question.target)
                if question.box is not None:
                    digits = [i for i, token in enumerate(answer) if token in self._digits]
                    sources[at + len(prompt) - 1 + np.array(digits)] = last
            questions.append(question)
            ids[at:end] = (prompt + answer)[:-1]
            labels[at + len(prompt) - 1 : end] = answer
            segments[at:end] = len(questions)
            positions[:, at:end] = text_start + 1 + np.arange(end - at)
            at = end
        return Row(ids, segments, positions, labels, questions, start, pointers, sources)


class RowDataset(Dataset[dict[str, torch.Tensor]]):
    """Item k of a fixed schedule of screens: pixels, cell labels and a fresh row, all given by the seed."""

    def __init__(self, pool: Pool, maker: RowMaker, seed: int, order: npt.NDArray[np.int64]) -> None:
        self._pool, self._maker, self._seed, self._order = pool, maker, seed, order

    def __len__(self) -> int:
        """Number of scheduled screens."""
        return len(self._order)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """Tensors of scheduled screen `item`."""
        index = int(self._order[item])
        row = self._maker.make(self._pool.screen(index), random.Random(f"row:{self._seed}:{item}"))
        return {
            "pixels": torch.from_numpy(self._pool.pixels[index].copy()),
            "cells": torch.from_numpy(self._pool.cells[index].astype(np.int64)),
            "ids": torch.from_numpy(row.ids),
            "segments": torch.from_numpy(row.segments),
            "positions": torch.from_numpy(row.positions),
            "labels": torch.from_numpy(row.labels),
            "image_start": torch.tensor(row.image_start),
            "pointers": torch.from_numpy(row.pointers),
            "sources": torch.from_numpy(row.sources),
        }


def shuffled(size: int, passes_total: int, seed: int) -> npt.NDArray[np.int64]:
    """`passes_total` indices into a pool of `size` screens, each once before any comes again."""
    rng = np.random.default_rng(seed)
    epochs = -(-passes_total // size)
    return np.concatenate([rng.permutation(size) for _ in range(epochs)])[:passes_total]
