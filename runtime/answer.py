"""What a generation gives back: pieces of text, and at the end the counts and the times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from .plan import ModelPlan

FinishReason = Literal["stop", "length", "cancelled"]
_Stage = Literal["image", "reuse", "prefill", "waiting", "answer"]


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer.

    Attributes:
        prompt_tokens: image tokens included.
        image_tokens: placeholders of all images.
        completion_tokens: sampled tokens, the one that ended the answer included.
        cached_tokens: tokens of the prompt whose keys and values were there already.
    """

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in milliseconds, and what was not computed anew.

    Attributes:
        image_ms: reading and encoding the images.
        prefill_ms: running the prompt, but what was reused of it; its own turns, not those of others between.
        decode_ms: all tokens after the first, turns of others included.
        ttft_ms: from the call to the first token.
        prompt_tokens: tokens that were prefilled: those of the prompt but the reused ones.
        decoded_tokens: tokens that decode_ms covers.
        reuse_ms: finding the beginning of the prompt among what is kept, and putting it back.
        reused_tokens: tokens of that beginning.
        encoded_images: pictures that went through the vision graph.
        cached_images: pictures that did not: their features were kept, or their tokens were reused.
        drafted_tokens: tokens of the answer that were run before they were sampled.
        accepted_tokens: those of them that were sampled then.
        decoder_runs: runs after the prompt; without drafts one per token.
        waiting_ms: before the first token, while others had their turns.
        plan: how the graphs were opened; None where nobody said.
    """

    image_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    prompt_tokens: int
    decoded_tokens: int
    reuse_ms: float = 0.0
    reused_tokens: int = 0
    encoded_images: int = 0
    cached_images: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    decoder_runs: int = 0
    waiting_ms: float = 0.0
    plan: ModelPlan | None = None

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
    """Time and counts of one answer; it starts when it is made.

    Up to the first token all time goes to one stage or another, in order: pictures, with what is looked up
    between, and the prompt. Where others have their turns, it goes to none of them.

    Attributes:
        drafted_tokens: as in Timings.
        accepted_tokens: as in Timings.
        decoder_runs: as in Timings.
        reused_tokens: as in Timings.
    """

    def __init__(self) -> None:
        self.drafted_tokens = self.accepted_tokens = self.decoder_runs = self.reused_tokens = 0
        self._encoded = self._cached = 0
        self._ms = dict.fromkeys(get_args(_Stage), 0.0)
        self._stage: _Stage = "image"
        self._after: _Stage = "image"  # reuse or waiting
        now = time.perf_counter()
        self._started = self._since = self._first = self._last = now

    def waits(self) -> None:
        """Others have their turns from now on."""
        self._enter("waiting")

    def goes_on(self) -> None:
        """It has its turn."""
        self._turn_to(self._after)

    def reuse_begins(self) -> None:
        """It is looked for what is known of the prompt."""
        self._enter("reuse")

    def reuse_done(self, tokens: int) -> None:
        """So many more tokens of the prompt are in the cache."""
        self.reused_tokens += tokens
        self._turn_to(self._after)

    def image_done(self, *, cached: bool) -> None:
        """A picture is encoded, or need not be."""
        self._cached += cached
        self._encoded += not cached

    def encoded_beside(self, milliseconds: float) -> None:
        """A picture was encoded while others had their turns: it was not waiting all of that time."""
        self._ms["waiting"] -= milliseconds
        self._ms["image"] += milliseconds

    def images_done(self) -> None:
        """All images are encoded, or there are none."""
        self._turn_to("prefill")

    def prefill_done(self) -> None:
        """The prompt is in the cache."""
        self._turn_to("answer")

    def token_done(self, count: int) -> None:
        """The token of that number, from 1, is sampled."""
        self._last = time.perf_counter()
        if count == 1:
            self._first = self._last

    def timings(self, prompt_tokens: int, sampled: int, plan: ModelPlan | None = None) -> Timings:
        """Where the time went so far; what never came took 0 ms."""
        self._turn_to(self._stage)
        return Timings(
            image_ms=self._ms["image"],
            prefill_ms=self._ms["prefill"],
            decode_ms=1e3 * (self._last - self._first),
            ttft_ms=1e3 * (self._first - self._started),
            prompt_tokens=prompt_tokens - self.reused_tokens,
            decoded_tokens=max(0, sampled - 1),
            reuse_ms=self._ms["reuse"],
            reused_tokens=self.reused_tokens,
            encoded_images=self._encoded,
            cached_images=self._cached,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            decoder_runs=self.decoder_runs,
            waiting_ms=max(0.0, self._ms["waiting"]),
            plan=plan,
        )

    def _enter(self, stage: _Stage) -> None:
        """Go to a stage that is left for the one before it."""
        if self._stage not in ("reuse", "waiting"):
            self._after = self._stage
        self._turn_to(stage)

    def _turn_to(self, stage: _Stage) -> None:
        now = time.perf_counter()
        self._ms[self._stage] += 1e3 * (now - self._since)
        self._stage, self._since = stage, now
