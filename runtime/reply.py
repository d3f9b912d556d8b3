"""The text of an answer: sampled ids in, deltas of text out.

In: ids one by one, end tokens, stop strings, the number of tokens asked for. Out: `Delta`s, and how it ended.
Knows nothing of graphs and of where ids come from.
"""

from __future__ import annotations

from collections.abc import Container
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


class Reply:
    """One answer as it grows.

    Attributes:
        ending: what is left for the last delta; None before the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, *, eos: Container[int], stops: StopText, budget: int) -> None:
        """Begin.

        Args:
            tokenizer: turns ids into text.
            eos: ids that end an answer and are not part of it.
            stops: strings that do.
            budget: ids after which the answer is cut off.
        """
        self.ending: Ending | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._eos = eos
        self._stops = stops
        self._budget = budget
        self._sampled = 0

    def push(self, token: int) -> Delta | None:
        """What a sampled id adds; None if it ends the answer."""
        self._sampled += 1
        if token in self._eos:
            self._end("", (), "stop")
            return None
        text, stopped = self._stops.push(self._decoder.push(token))
        if stopped or self._sampled == self._budget:
            self._end(text, (token,), "stop" if stopped else "length")
            return None
        return Delta(text, (token,))

    def cancel(self) -> None:
        """End it where it is."""
        self._end("", (), "cancelled")

    def _end(self, text: str, token_ids: tuple[int, ...], reason: FinishReason) -> None:
        """With what was held back: an incomplete character, the beginning of a stop string."""
        held, stopped = self._stops.push(self._decoder.flush())
        text += held if stopped else held + self._stops.flush()
        self.ending = Ending(text, token_ids, reason, self._sampled)
