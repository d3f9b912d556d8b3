"""An answer, printed while it is made: its text on stdout, its counts and times on stderr or as a document.

In: an engine and messages. Out: an `Answer`. Shared by single answers and conversations.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.errors import ContextLengthError

from .options.sampling import DEFAULT_MAX_TOKENS
from .terminal import harmless

if TYPE_CHECKING:
    from autoglm_edge.runtime.answer import Delta
    from autoglm_edge.runtime.engine import Engine


@dataclass(frozen=True)
class Answer:
    """One finished answer and the delta that ended it."""

    text: str
    last: Delta


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
