"""The forms in which an answer is told: chat, completion, generate; whole, or chunk by chunk.

In: answers. Out: JSON documents as OpenAI's clients read them. Knows nothing of queues and sockets.

A stream's first chunk with content is the first token: clients measure from it. So the role comes with it and
not before, and a delta without text makes no chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from autoglm_edge.runtime.actions import parse_action, parse_thinking

from .tally import Answer, timings_json, usage_json


@dataclass(frozen=True)
class Frame:
    """What every document of a response repeats.

    Attributes:
        id: of the response.
        created: seconds since 1970.
        model: the served name.
        fingerprint: of the bundle.
    """

    id: str
    created: int
    model: str
    fingerprint: str

    def document(self, kind: str) -> dict[str, Any]:
        """The beginning of a document of that kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Form(Protocol):
    """One way to tell answers."""

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any], timings: dict[str, Any]) -> Any:
        """The document of a response that is not streamed."""

    def piece(self, index: int, thought: str, text: str, *, first: bool) -> list[dict[str, Any]]:
        """Chunks for what a step added to answer `index`; `first` until something was sent of it."""

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """The chunk that ends one answer."""


@dataclass(frozen=True)
class ChatForm:
    """chat.completion and chat.completion.chunk.

    Attributes:
        frame: see there.
    """

    frame: Frame

    def whole(
        self, answers: Sequence[Answer], usage: dict[str, Any], timings: dict[str, Any]
    ) -> dict[str, Any]:
        """See `Form`."""
        choices = []
        for index, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.content, "refusal": None}
            if answer.reasoning is not None:
                message["reasoning_content"] = answer.reasoning
            choices.append(
                {"index": index, "message": message, "logprobs": None, "finish_reason": answer.finish}
            )
        document = self.frame.document("chat.completion")
        return document | {"choices": choices, "usage": usage, "timings": timings}

    def piece(self, index: int, thought: str, text: str, *, first: bool) -> list[dict[str, Any]]:
        """See `Form`."""
        chunks: list[dict[str, Any]] = []
        for key, value in (("reasoning_content", thought), ("content", text)):
            if value:
                role = {"role": "assistant"} if first and not chunks else {}
                chunks.append(self._chunk(index, role | {key: value}, None))
        return chunks

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """See `Form`."""
        empty = not answer.content and not answer.reasoning
        return self._chunk(index, {"role": "assistant"} if empty else {}, answer.finish)

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self.frame.document("chat.completion.chunk") | {"choices": [choice]}


@dataclass(frozen=True)
class TextForm:
    """text_completion, whole and in chunks.

    Attributes:
        frame: see there.
    """

    frame: Frame

    def whole(
        self, answers: Sequence[Answer], usage: dict[str, Any], timings: dict[str, Any]
    ) -> dict[str, Any]:
        """See `Form`."""
        choices = [self._choice(index, answer.content, answer.finish) for index, answer in enumerate(answers)]
        document = self.frame.document("text_completion")
        return document | {"choices": choices, "usage": usage, "timings": timings}

    def piece(self, index: int, thought: str, text: str, *, first: bool) -> list[dict[str, Any]]:
        """See `Form`."""
        return [self._chunk(index, text, None)] if text else []

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """See `Form`."""
        return self._chunk(index, "", answer.finish)

    def _chunk(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return self.frame.document("text_completion") | {"choices": [self._choice(index, text, finish)]}

    def _choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


@dataclass(frozen=True)
class GenerateForm:
    """The plain document of /generate: text, thought and action; never streamed.

    Attributes:
        frame: see there.
        size: width and height of the last picture, for points in pixels; None without one.
    """

    frame: Frame
    size: tuple[int, int] | None

    def whole(
        self, answers: Sequence[Answer], usage: dict[str, Any], timings: dict[str, Any]
    ) -> dict[str, Any]:
        """See `Form`."""
        answer = answers[0]
        action = parse_action(answer.content)
        return {
            "id": self.frame.id,
            "model": self.frame.model,
            "text": answer.content,
            "thinking": parse_thinking(answer.content),
            "action": action.to_json(self.size) if action is not None else None,
            "finish_reason": answer.finish,
            "usage": usage,
            "timings": timings,
        }

    def piece(self, index: int, thought: str, text: str, *, first: bool) -> list[dict[str, Any]]:
        """See `Form`."""
        return []

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """See `Form`."""
        return {}


class Telling:
    """One response: its answers, and what is said of them when.

    Attributes:
        answers: as far as they are.
    """

    def __init__(self, form: Form, *, answers: int, per_prompt: int, split: bool, prepare_s: float) -> None:
        """Begin.

        Args:
            form: how it is told.
            answers: how many there will be.
            per_prompt: of each prompt.
            split: whether thought and answer are told apart.
            prepare_s: time that reading the request took.
        """
        self.answers = [Answer(split=split) for _ in range(answers)]
        self._form = form
        self._per_prompt = per_prompt
        self._prepare_s = prepare_s
        self._told: set[int] = set()

    def whole(self, waited_s: float) -> Any:
        """The complete document."""
        return self._form.whole(self.answers, *self._totals(waited_s))

    def chunks(self, index: int, thought: str, text: str) -> list[dict[str, Any]]:
        """Chunks for what a step added."""
        chunks = self._form.piece(index, thought, text, first=index not in self._told)
        if chunks:
            self._told.add(index)
        return chunks

    def end(self, index: int) -> dict[str, Any]:
        """The chunk that ends one answer."""
        return self._form.end(index, self.answers[index])

    def totals(self, frame: dict[str, Any], waited_s: float) -> dict[str, Any]:
        """The chunk with the counts, which has no choices.

        Args:
            frame: any chunk of this stream.
            waited_s: time in the queue.
        """
        usage, timings = self._totals(waited_s)
        return frame | {"choices": [], "usage": usage, "timings": timings}

    def timings(self, waited_s: float) -> dict[str, Any]:
        """The times alone."""
        return self._totals(waited_s)[1]

    def _totals(self, waited_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
        usage = usage_json(self.answers, self._per_prompt)
        return usage, timings_json(self.answers, prepare_s=self._prepare_s, waited_s=waited_s)
