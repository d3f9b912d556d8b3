"""What the server needs of an engine: prompts of all kinds, and answers to them.

In: messages, texts, ids. Out: `Prompt`s, and the deltas of an answer. Knows nothing of HTTP and of queues.

Prompts are made in any thread, at any time; they are checked completely there, the context included.
Answers are given in one thread, several at a time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from autoglm_edge.errors import ContextLengthError, PromptError, RequestError
from autoglm_edge.runtime.batch.batch import Batch, Event
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.prompt.build import Prompt, prompt_from_ids
from autoglm_edge.runtime.sampling import SamplingParams
from autoglm_edge.server.thinking import SKIP

_SWITCH = re.compile(r"\benable_thinking\b")


@dataclass(frozen=True, eq=False)
class Wanted:
    """One answer that is asked for.

    Attributes:
        prompt: as from `Answering`; it fits the context together with `max_tokens`.
        sampling: how tokens are chosen.
        stops: strings that end it.
        max_tokens: at most.
    """

    prompt: Prompt
    sampling: SamplingParams
    stops: tuple[str, ...]
    max_tokens: int


class Answers(Protocol):
    """Answers that are given together."""

    @property
    def room(self) -> int:
        """Answers that could begin at once."""

    @property
    def active(self) -> int:
        """Answers that have begun and not ended."""

    def begin(self, wanted: Wanted, cancel: threading.Event) -> int:
        """Begin an answer; its time counts from now. Returns its number.

        Raises:
            RequestError: the engine is closed.
        """

    def drop(self, number: int) -> None:
        """Forget an answer, if it has not ended."""

    def step(self) -> list[Event]:
        """Go on with all; what came of it."""


class Answering(Protocol):
    """An engine, as the server sees it."""

    @property
    def concurrency(self) -> int:
        """Answers that it gives at a time."""

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""

    @property
    def vocab(self) -> int:
        """Ids that the tokenizer knows."""

    @property
    def fingerprint(self) -> str:
        """What tells one model from another."""

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, thinking: bool | None
    ) -> Prompt:
        """A conversation, up to where the answer begins."""

    def text_prompt(self, text: str, *, max_tokens: int) -> Prompt:
        """A text as it is, without template."""

    def ids_prompt(self, ids: Sequence[int], *, max_tokens: int) -> Prompt:
        """Token ids as they are."""

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation, of whatever length."""

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text."""

    def text_of(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def answers(self) -> AbstractContextManager[Answers]:
        """Give answers until the context is left; in one thread, and nowhere else meanwhile."""

    def close(self) -> None:
        """Free everything."""


class ServedEngine(Engine):
    """An engine whose prompts are made apart from their answers, which can be done while it is busy."""

    @property
    def vocab(self) -> int:
        """See `Answering`."""
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """See `Answering`."""
        return f"fp_{self.bundle.fingerprint[:12]}"

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, thinking: bool | None
    ) -> Prompt:
        """A conversation, up to where the answer begins.

        Args:
            messages: as for `Engine.chat`.
            max_tokens: room to leave for the answer.
            thinking: whether the model is to think first. A template that knows `enable_thinking` is told;
                with another one False begins the answer with an empty thought, and True changes nothing, as
                models without that switch think by themselves. None leaves everything to the template.

        Raises:
            RequestError: a message or an image is wrong.
            ContextLengthError: no room; known before an image is resized.
        """
        has_switch = _SWITCH.search(self.template.source) is not None
        variables = {"enable_thinking": thinking} if has_switch and thinking is not None else None
        begun = self._begin_of_answer() if thinking is False and not has_switch else []
        prompt = self.prompt(messages, max_tokens=max_tokens + len(begun), variables=variables)
        return _extend(prompt, begun) if begun else prompt

    def text_prompt(self, text: str, *, max_tokens: int) -> Prompt:
        """A text as it is; special tokens in it are the caller's own.

        Raises:
            RequestError: it is empty, no Unicode, or has placeholders of images.
            ContextLengthError: no room.
        """
        return self.ids_prompt(self.text_ids(text), max_tokens=max_tokens)

    def ids_prompt(self, ids: Sequence[int], *, max_tokens: int) -> Prompt:
        """Token ids as they are.

        Raises:
            RequestError: none, an unknown one, or placeholders of images.
            ContextLengthError: no room.
        """
        if not ids:
            raise PromptError("prompt is empty; give at least one token")
        if not 0 <= min(ids) <= max(ids) < self.vocab:
            raise PromptError(f"prompt holds the id {max(ids)}, the model knows 0 to {self.vocab - 1}")
        if self.bundle.manifest.tokens.image in ids:
            raise PromptError("prompt holds a placeholder of an image; pictures go into messages only")
        if len(ids) + max_tokens > self.context:
            raise ContextLengthError(len(ids), max_tokens, self.context)
        return prompt_from_ids(ids, (), image=self.image, tokens=self.bundle.manifest.tokens)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """See `Answering`."""
        return [int(token) for token in self.tokenize(messages)]

    def text_ids(self, text: str) -> list[int]:
        """See `Answering`."""
        return self.tokenizer.encode(text)

    def text_of(self, ids: Sequence[int]) -> str:
        """See `Answering`."""
        return self.tokenizer.decode(ids)

    @contextmanager
    def answers(self) -> Iterator[Answers]:
        """See `Answering`."""
        with self.batch() as batch:
            yield ServedAnswers(self, batch)

    def _begin_of_answer(self) -> list[int]:
        ids = self.tokenizer.encode(SKIP)
        if len(ids) != 3:
            raise RequestError(
                "enable_thinking is false, but this model has neither a switch for it in its template nor "
                "tokens for thinking; leave it out"
            )
        return ids


class ServedAnswers:
    """What an engine's batch is to the server; see `Answers`."""

    def __init__(self, engine: Engine, batch: Batch) -> None:
        self._engine = engine
        self._batch = batch

    @property
    def room(self) -> int:
        """See `Answers`."""
        return self._batch.room

    @property
    def active(self) -> int:
        """See `Answers`."""
        return self._batch.active

    def begin(self, wanted: Wanted, cancel: threading.Event) -> int:
        """See `Answers`."""
        job = self._engine.job(
            wanted.prompt, wanted.sampling, max_tokens=wanted.max_tokens, stop=wanted.stops, cancel=cancel
        )
        return self._batch.add(job)

    def drop(self, number: int) -> None:
        """See `Answers`."""
        self._batch.drop(number)

    def step(self) -> list[Event]:
        """See `Answers`."""
        return self._batch.step()


def _extend(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    """A prompt with text tokens at its end."""
    count, start = len(ids), prompt.next_position
    positions = np.broadcast_to(start + np.arange(count, dtype=np.int64), (3, count))
    return Prompt(
        np.concatenate([prompt.ids, np.array(ids, np.int64)]),
        prompt.images,
        np.concatenate([prompt.positions, positions], axis=1),
        start + count,
        prompt.text,
    )
