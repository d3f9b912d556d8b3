"""The text of an answer: sampled ids in, deltas of text out.

In: ids one by one, end tokens, stop strings, the number of tokens asked for. Out: `Delta`s, and how it ended.
Knows nothing of graphs and of where ids come from.
"""

from __future__ import annotations

from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass

from .answer import Delta, FinishReason
from .prompt.tokenizer import StreamDecoder, Tokenizer
from .stops import StopText


@dataclass(frozen=True)
class Ending:
    """What is left for the last delta.

    Attributes:
        text: of the last step, and what was held back.
        token_ids: of the last step.
        reason: why it ended.
        sampled: tokens in all, the one that ended the answer included.
    """

    text: str
    token_ids: tuple[int, ...]
    reason: FinishReason
    sampled: int


def reply(
    ids: Iterator[int], tokenizer: Tokenizer, *, eos: Container[int], stops: StopText, budget: int
) -> Generator[Delta, None, Ending]:
    """Deltas of an answer but its last, one per id; returns the rest.

    Args:
        ids: sampled; where they end early, the answer was cancelled. None is asked for once the answer ends.
        tokenizer: turns them into text.
        eos: ids that end an answer and are not part of it.
        stops: strings that do.
        budget: ids after which the answer is cut off.
    """
    decoder = StreamDecoder(tokenizer)
    sampled = 0
    text = ""
    shown: tuple[int, ...] = ()
    reason: FinishReason = "cancelled"
    for token in ids:
        sampled += 1
        if token in eos:
            reason = "stop"
            break
        shown = (token,)
        text, stopped = stops.push(decoder.push(token))
        if stopped or sampled == budget:
            reason = "stop" if stopped else "length"
            break
        yield Delta(text, shown)
        text, shown = "", ()
    return Ending(text + _held_back(decoder, stops), shown, reason, sampled)


def _held_back(decoder: StreamDecoder, stops: StopText) -> str:
    """An incomplete character, the beginning of a stop string."""
    text, stopped = stops.push(decoder.flush())
    return text if stopped else text + stops.flush()
