"""What an answer came to: its text so far, why it ended, counts and times; and those of a whole request.

In: deltas. Out: pieces for a stream, totals as JSON. Knows nothing of the form of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoglm_edge.runtime.answer import Delta, Timings, Usage
from autoglm_edge.server.thinking import ThinkingSplitter

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}
"""A cancelled answer is never sent to its end; the name stands here for completeness."""

_TIMES = ("waiting_ms", "reuse_ms", "image_ms", "prefill_ms", "decode_ms")
_COUNTS = (
    "reused_tokens",
    "encoded_images",
    "cached_images",
    "decoder_runs",
    "drafted_tokens",
    "accepted_tokens",
)


class Answer:
    """One answer as it grows.

    Attributes:
        content: text so far, without the thought if that is told apart.
        reasoning: the thought; None if it is not told apart.
        finish: why it ended, in OpenAI's words; None before.
        usage: counts, at the end.
        timings: times, at the end.
    """

    def __init__(self, *, split: bool) -> None:
        """Begin empty.

        Args:
            split: whether thought and answer are told apart.
        """
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._splitter = ThinkingSplitter() if split else None
        self.finish: str | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None

    @property
    def content(self) -> str:
        """See the class."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str | None:
        """See the class."""
        return None if self._splitter is None else "".join(self._reasoning)

    def add(self, delta: Delta) -> tuple[str, str]:
        """Take a delta; returns what it adds to the thought and to the text."""
        thought, text = ("", delta.text) if self._splitter is None else self._splitter.push(delta.text)
        if delta.finish_reason is not None:
            self.finish = FINISH[delta.finish_reason]
            self.usage, self.timings = delta.usage, delta.timings
            if self._splitter is not None:
                last_thought, last_text = self._splitter.flush()
                thought, text = thought + last_thought, text + last_text
        self._reasoning.append(thought)
        self._content.append(text)
        return thought, text


def usage_json(answers: Sequence[Answer], per_prompt: int) -> dict[str, Any]:
    """Counts of a request: a prompt counts once, however many answers it gets."""
    all_usage = [answer.usage for answer in answers if answer.usage is not None]
    first = [answer.usage for answer in answers[::per_prompt] if answer.usage is not None]
    prompt = sum(usage.prompt_tokens for usage in first)
    completion = sum(usage.completion_tokens for usage in all_usage)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(usage.cached_tokens for usage in first),
            "image_tokens": sum(usage.image_tokens for usage in first),
        },
    }


def timings_json(answers: Sequence[Answer], *, prepare_s: float, waited_s: float) -> dict[str, Any]:
    """Times of a request, in milliseconds: before the engine began, and the sums of all its answers."""
    found = [answer.timings for answer in answers if answer.timings is not None]
    document: dict[str, Any] = {"prepare_ms": round(1e3 * prepare_s, 3), "queue_ms": round(1e3 * waited_s, 3)}
    document["ttft_ms"] = round(found[0].ttft_ms, 3) if found else 0.0
    document |= {name: round(sum(getattr(item, name) for item in found), 3) for name in _TIMES}
    document["prefill_tokens"] = prefilled = sum(item.prompt_tokens for item in found)
    document["decoded_tokens"] = decoded = sum(item.decoded_tokens for item in found)
    document |= {name: sum(getattr(item, name) for item in found) for name in _COUNTS}
    document["prefill_tokens_per_s"] = _rate(prefilled, document["prefill_ms"])
    document["decode_tokens_per_s"] = _rate(decoded, document["decode_ms"])
    return document


def _rate(tokens: int, ms: float) -> float:
    return round(1e3 * tokens / ms, 3) if ms > 0 else 0.0
