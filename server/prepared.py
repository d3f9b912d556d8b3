"""From what is asked for to prompts: all that can be wrong with a request is found here, before it queues.

In: `ChatAsked`, `TextAsked`, an engine. Out: `Prepared`. Runs in threads beside the engine's own; knows
nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from autoglm_edge.errors import DependencyError, EdgeError, RequestError
from autoglm_edge.runtime.grammar import Grammar
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.sampling import Sampler, SamplingParams

from .asking.asked import COMPLETION_TOKENS, ChatAsked, TextAsked
from .asking.options import Options
from .problem import ApiError, problem_of, refuse
from .work.answering import Answering, Wanted


@runtime_checkable
class Holding(Protocol):
    """An engine that can hold answers to JSON."""

    def grammar(self, schema: Mapping[str, Any] | bool | None, *, after_thought: bool) -> Grammar:
        """As `Engine.grammar`."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request, ready to be answered.

    Attributes:
        wanted: its answers; those of one prompt stand together.
        per_prompt: answers of each prompt.
        prepare_s: what it took to read pictures and texts.
    """

    wanted: tuple[Wanted, ...]
    per_prompt: int
    prepare_s: float


def prepare_chat(asked: ChatAsked, engine: Answering, started: float) -> Prepared:
    """The prompt of a conversation.

    Args:
        asked: the request.
        engine: makes prompts.
        started: `time.perf_counter()` when reading began.

    Raises:
        ApiError: the request cannot be answered.
    """
    options = asked.options
    try:
        sampling = _sampling(options, engine, after_thought=asked.thinking is True)
        prompt = engine.chat_prompt(
            asked.messages, max_tokens=options.max_tokens or 1, thinking=asked.thinking
        )
    except EdgeError as error:
        raise problem_of(error, params=_PARAMS) from error
    return _prepared(options, sampling, [prompt], options.max_tokens, engine, started)


def prepare_text(asked: TextAsked, engine: Answering, started: float) -> Prepared:
    """The prompts of texts and ids; arguments and errors as for `prepare_chat`."""
    options = asked.options
    room = options.max_tokens or COMPLETION_TOKENS
    try:
        sampling = _sampling(options, engine, after_thought=False)
        prompts = [
            engine.text_prompt(item, max_tokens=room)
            if isinstance(item, str)
            else engine.ids_prompt(item, max_tokens=room)
            for item in asked.prompts
        ]
    except EdgeError as error:
        problem = problem_of(error, params=_PARAMS)
        problem.param = "prompt" if problem.param in (None, "messages") else problem.param
        raise problem from error
    return _prepared(options, sampling, prompts, room, engine, started)


_PARAMS = ("messages", "prompt", "logit_bias", "enable_thinking")


def _sampling(options: Options, engine: Answering, *, after_thought: bool) -> tuple[SamplingParams, ...]:
    """How the answers to a prompt are sampled, with the grammar that they share.

    Raises:
        RequestError: bias of an id that the model does not have, which is found by whoever samples; or a
            schema that an answer cannot be held to.
    """
    Sampler(options.sampling[0], vocab=engine.vocab)
    if options.schema is None:
        return options.sampling
    if not isinstance(engine, Holding):
        raise refuse(
            "response_format must be text: this engine holds no answer to a schema", "response_format"
        )
    try:
        grammar = engine.grammar(options.schema, after_thought=after_thought)
    except DependencyError as error:
        raise ApiError(
            400,
            f"response_format must be text here: {error}",
            param="response_format",
            code="unsupported_parameter",
        ) from error
    except RequestError as error:
        raise refuse(f"response_format is refused: {error}", "response_format") from error
    return tuple(replace(params, grammar=grammar) for params in options.sampling)


def _prepared(
    options: Options,
    sampling: Sequence[SamplingParams],
    prompts: Sequence[Prompt],
    max_tokens: int | None,
    engine: Answering,
    started: float,
) -> Prepared:
    wanted = tuple(
        Wanted(prompt, params, options.stops, max_tokens or engine.context - len(prompt.ids))
        for prompt in prompts
        for params in sampling
    )
    return Prepared(wanted, len(sampling), time.perf_counter() - started)
