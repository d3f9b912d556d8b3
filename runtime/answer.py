"""What a generation gives back: pieces of text, and at the end the counts and the times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer.

    Attributes:
        prompt_tokens: image tokens included.
        image_tokens: placeholders of all images.
        completion_tokens: sampled tokens, the one that ended the answer included.
    """

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in milliseconds.

    Attributes:
        image_ms: reading and encoding the images.
        prefill_ms: running the prompt through the decoder.
        decode_ms: all tokens after the first.
        ttft_ms: from the call to the first token.
        prompt_tokens: tokens that were prefilled.
        decoded_tokens: tokens that decode_ms covers.
    """

    image_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    prompt_tokens: int
    decoded_tokens: int

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second of prefill; image encoding not counted."""
        return 1e3 * self.prompt_tokens / self.prefill_ms if self.prefill_ms else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Answer tokens per second, the first one not counted."""
        return 1e3 * self.decoded_tokens / self.decode_ms if self.decode_ms else 0.0


@dataclass(frozen=True)
class Delta:
    """One step of an answer.

    Attributes:
        text: what this step adds; empty while a character or a possible stop string is incomplete.
        token_ids: sampled in this step; an id that ended the answer is not among them.
        finish_reason: set on the last delta only: "stop" (end token or stop string), "length" or "cancelled".
        usage: on the last delta only.
        timings: on the last delta only.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class Clock:
    """Moments of one answer; it starts when it is made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._images = self._prefill = self._first = self._last = self._started

    def images_done(self) -> None:
        """All images are encoded, or there are none."""
        self._images = time.perf_counter()

    def prefill_done(self) -> None:
        """The prompt is in the cache."""
        self._prefill = time.perf_counter()

    def token_done(self, count: int) -> None:
        """The token of that number, from 1, is sampled."""
        self._last = time.perf_counter()
        if count == 1:
            self._first = self._last

    def timings(self, prompt_tokens: int, sampled: int) -> Timings:
        """The times between those moments; what never came took 0 ms."""
        return Timings(
            image_ms=1e3 * (self._images - self._started),
            prefill_ms=1e3 * (self._prefill - self._images),
            decode_ms=1e3 * (self._last - self._first),
            ttft_ms=1e3 * (self._first - self._started),
            prompt_tokens=prompt_tokens,
            decoded_tokens=max(0, sampled - 1),
        )
