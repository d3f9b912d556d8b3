"""Packed training rows: one screen and as many independent questions about it as fit.

In: a screen, the tokenizer and a `Lesson` that a batch shares. Out: per screen one row of token ids with
segment numbers, 3-D positions and labels. A sequence is the prefix (the system prompt), then the row's own
head (earlier turns, image), then questions: every question sees prefix, head and itself, as if it were asked
alone, and its positions restart where the head ends. This module knows how the chat template lays out turns;
a test compares it with the template. It knows nothing of weights.

Shapes: S length of the prefix, L row length.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pocket_canvas import Screen
from pocket_clients import SHORT_PROMPTS, TRAINED, Style, Turn
from pocket_pool import Grid
from pocket_questions import Question, ask
from pocket_tokenizer import TOKEN_IDS
from pocket_vocabulary import LABELS
from transformers import PreTrainedTokenizerFast

QUESTION_ROOM = 180
"""Tokens of a row behind the image."""
HISTORY_ROOM = 200
"""Tokens before the image of rows with earlier turns."""
MAX_POINTERS = 16
PAD_SEGMENT = -1
IGNORE = -100
ABSENT = -2
Asker = Callable[[Screen, random.Random], Question]
Ids = npt.NDArray[np.int64]


@dataclass
class Row:
    """One packed row.

    `ids`, `segments` and `labels` are (L,), `positions` is (3, L). Segment 0 is the head, question k has
    segment k + 1, padding -1. `labels[i]` is the answer token expected after token i, or `IGNORE`.
    `pointers` is (16, 2): the index of the last token of a thought's label and the class of that label, or
    `ABSENT`, for each question that names something, then -1. `sources` is (L,): at tokens before a digit of
    a point, the index of that last token, elsewhere -1.
    """

    ids: Ids
    segments: Ids
    positions: Ids
    labels: Ids
    questions: list[Question]
    image_start: int
    pointers: Ids
    sources: Ids


@dataclass(frozen=True)
class Lesson:
    """What the rows of one batch have in common.

    Attributes:
        grid: of their images.
        prefix: token ids of `[gMASK]<sop>` and the system prompt, (S,).
        has_history: whether there are earlier turns.
    """

    grid: Grid
    prefix: Ids
    has_history: bool

    @property
    def length(self) -> int:
        """L."""
        return self.grid.cells + QUESTION_ROOM + (HISTORY_ROOM if self.has_history else 0)


class RowMaker:
    """Turns screens into rows; keeps the token ids of texts it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, style: Style = TRAINED) -> None:
        self._tokenizer = tokenizer
        self._style = style
        self._cache: dict[str, list[int]] = {}
        self._digits = {token for digit in "0123456789" for token in self.encode(digit)}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, added tokens recognised."""
        if text not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            self._cache[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return str(self._tokenizer.decode(ids))

    def lesson(self, grid: Grid, rng: random.Random, history_share: float, longest: int) -> Lesson:
        """Draw what a batch shares; system prompts have up to `longest` tokens, a quarter has none."""
        draw = rng.random()
        system = ""
        if 0.25 <= draw < 0.45:
            system = rng.choice(SHORT_PROMPTS)
        elif draw >= 0.45:
            tokens = round(20 * (longest / 20) ** rng.random())
            system = self._style.source.system_prompt(rng, tokens, lambda text: len(self.encode(text)))
        head = "[gMASK]<sop>" + (f"<|system|>\n{system}" if system else "")
        ids = self._tokenizer(head, add_special_tokens=False).input_ids
        return Lesson(grid, np.array(ids, np.int64), rng.random() < history_share)

    def make(self, screen: Screen, rng: random.Random, lesson: Lesson, asker: Asker | None = None) -> Row:
        """Pack one screen and questions about it into a row."""
        style = self._style
        if lesson.has_history:
            question = ask(screen, rng, style.manner)
            if question.kind != "blind" and rng.random() < 0.5:
                turns = style.earlier_steps(question, rng, rng.randint(1, 3))
                if row := self.pack(lesson, turns, [(question, style.later_step(rng))]):
                    return row
            turns = style.earlier_tasks(screen, rng, rng.randint(1, 3))
        else:
            turns = ()

        def asked() -> tuple[Question, str]:
            question = asker(screen, rng) if asker else ask(screen, rng, style.manner)
            return question, style.decorate(question.text, rng)

        pairs = [asked() for _ in range(MAX_POINTERS)]
        row = self.pack(lesson, turns, pairs) or self.pack(lesson, (), pairs)
        assert row is not None, "a question alone fits into every row"
        return row

    def pack(
        self, lesson: Lesson, turns: Sequence[Turn], pairs: Sequence[tuple[Question, str]]
    ) -> Row | None:
        """A row of earlier turns, the image, and the first questions that fit.

        Each question comes with the text beside the image.

        Returns:
            None if not even one fits.
        """
        head = "".join(f"<|user|>\n{turn.user}<|assistant|>\n{turn.assistant}" for turn in turns)
        before = self.encode(head + "<|user|>\n<|begin_of_image|>")
        length, grid, first = lesson.length, lesson.grid, len(lesson.prefix)
        ids = np.full(length, TOKEN_IDS["<|endoftext|>"], np.int64)
        segments = np.full(length, PAD_SEGMENT, np.int64)
        positions = np.zeros((3, length), np.int64)
        labels = np.full(length, IGNORE, np.int64)
        start = len(before)
        prefix = start + grid.cells + 1
        if prefix >= length:
            return None
        ids[:start] = before
        ids[start : prefix - 1] = TOKEN_IDS["<|image|>"]
        ids[prefix - 1] = TOKEN_IDS["<|end_of_image|>"]
        segments[:prefix] = 0
        positions[:, :start] = first + np.arange(start)
        rows, columns = np.divmod(np.arange(grid.cells), grid.columns)
        positions[:, start : prefix - 1] = first + start + np.stack((np.zeros_like(rows), rows, columns))
        text_start = first + start + max(grid.rows, grid.columns)
        positions[:, prefix - 1] = text_start
        questions: list[Question] = []
        pointers = np.full((MAX_POINTERS, 2), -1, np.int64)
        sources = np.full(length, -1, np.int64)
        at = prefix
        for question, text in pairs[:MAX_POINTERS]:
            prompt = self.encode(f"{text}<|assistant|>\n")
            answer = self.encode(question.answer)
            end = at + len(prompt) + len(answer) - 1  # the terminator is only ever a label
            if end > length:
                break
            if question.target is not None:
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
        if not questions:
            return None
        return Row(ids, segments, positions, labels, questions, start, pointers, sources)


def shuffled(size: int, passes_total: int, seed: int) -> Ids:
    """`passes_total` indices into a pool of `size` screens, each once before any comes again."""
    rng = np.random.default_rng(seed)
    epochs = -(-passes_total // size)
    return np.concatenate([rng.permutation(size) for _ in range(epochs)])[:passes_total]
