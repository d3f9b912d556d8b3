"""Asking the engine from the command line: what was said so far, and an answer printed while it is made.

In: an engine and messages. Out: text on stdout, counts and times on stderr or as a document. Shared by single
answers and conversations.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.cli_common import harmless
from autoglm_edge.errors import ContextLengthError

if TYPE_CHECKING:
    from PIL.Image import Image

    from autoglm_edge.runtime.answer import Delta
    from autoglm_edge.runtime.engine import Engine

DEFAULT_MAX_TOKENS = 3000
"""What Open-AutoGLM's client asks for; an answer that goes round in circles ends there."""


@dataclass(frozen=True)
class Answer:
    """One finished answer and the delta that ended it."""

    text: str
    last: Delta


@dataclass
class Conversation:
    """Messages so far, and pictures that wait for the next one."""

    system: str | None
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.images = []

    def ask(self, text: str) -> None:
        """Add what the user says: pictures first, as the phone agent sends them."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        if text:
            parts.append({"type": "text", "text": text})
        self.messages.append({"role": "user", "content": parts})
        self.images = []

    def take_back(self) -> None:
        """Forget the last thing the user said; its pictures wait again."""
        parts = self.messages.pop()["content"]
        self.images = [part["image"] for part in parts if part["type"] == "image"]


def load_images(paths: Sequence[Path]) -> list[Image]:
    """Pictures of the command line, as the engine will see them.

    Raises:
        ImageError: a file is missing or no picture.
    """
    from autoglm_edge.runtime.prompt.image import load_image

    return [load_image(path) for path in paths]


def give_answer(
    engine: Engine, messages: list[dict[str, Any]], options: dict[str, Any], cancel: threading.Event | None
) -> Answer:
    """Print an answer while it is made."""
    pieces: list[str] = []
    last: Delta | None = None
    terminal = sys.stdout.isatty()
    try:
        for last in _start(engine, messages, options, cancel):
            pieces.append(last.text)
            click.echo(harmless(last.text) if terminal else last.text, nl=False)
    finally:
        if last is not None:
            click.echo()
    assert last is not None, "the engine ends every answer with a delta"
    return Answer("".join(pieces), last)


def _start(
    engine: Engine, messages: list[dict[str, Any]], options: dict[str, Any], cancel: threading.Event | None
) -> Iterator[Delta]:
    """Ask the engine; without --max-tokens for the default, or for as much as the context has left."""
    if "max_tokens" in options:
        return engine.chat(messages, cancel=cancel, **options)
    try:
        return engine.chat(messages, cancel=cancel, max_tokens=DEFAULT_MAX_TOKENS, **options)
    except ContextLengthError as error:
        if error.prompt_tokens >= error.limit:
            raise ContextLengthError(error.prompt_tokens, 1, error.limit) from None
        return engine.chat(messages, cancel=cancel, **options)


def counts_of(last: Delta) -> dict[str, Any]:
    """Counts and times of an answer, for programs."""
    usage, timings = last.usage, last.timings
    assert usage is not None and timings is not None, "the last delta carries both"
    return {
        "finish_reason": last.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "image_tokens": usage.image_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "timings": {
            "ttft_ms": round(timings.ttft_ms, 3),
            "reuse_ms": round(timings.reuse_ms, 3),
            "image_ms": round(timings.image_ms, 3),
            "prefill_ms": round(timings.prefill_ms, 3),
            "decode_ms": round(timings.decode_ms, 3),
            "prefill_tokens_per_s": round(timings.prefill_tokens_per_s, 2),
            "decode_tokens_per_s": round(timings.decode_tokens_per_s, 2),
            "reused_tokens": timings.reused_tokens,
            "encoded_images": timings.encoded_images,
            "cached_images": timings.cached_images,
            "decoder_runs": timings.decoder_runs,
            "drafted_tokens": timings.drafted_tokens,
            "accepted_tokens": timings.accepted_tokens,
        },
        "plan": None if timings.plan is None else asdict(timings.plan),
    }


def print_summary(last: Delta) -> None:
    """Counts and times of an answer, for people, on stderr."""
    counts = counts_of(last)
    usage, timings = counts["usage"], counts["timings"]
    kinds = ((usage["image_tokens"], "of images"), (usage["cached_tokens"], "reused"))
    told = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
    drafts = f" ({timings['accepted_tokens']} drafted)" if timings["accepted_tokens"] else ""
    ends = {"length": "; cut off by the token limit", "cancelled": "; cancelled"}
    click.echo(
        f"{usage['prompt_tokens']} prompt tokens{f' ({told})' if told else ''}"
        f", {usage['completion_tokens']} answer tokens{drafts}"
        f"; first after {timings['ttft_ms'] / 1e3:.2f} s"
        f", prefill {timings['prefill_tokens_per_s']:.0f} tokens/s"
        f", decode {timings['decode_tokens_per_s']:.1f} tokens/s{ends.get(counts['finish_reason'], '')}",
        err=True,
    )
