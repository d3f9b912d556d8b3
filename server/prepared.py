"""From what is asked for to prompts: all that can be wrong with a request is found here, before it queues.

In: `ChatAsked`, `TextAsked`, an engine. Out: `Prepared`. Runs in threads beside the engine's own; knows
nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from autoglm_edge.errors import EdgeError
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.sampling import Sampler

from .asking.asked import COMPLETION_TOKENS, ChatAsked, TextAsked
from .asking.options import Options
from .problem import problem_of
from .work.answering import Answering, Wanted


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
        _check_sampling(options, engine)
        prompt = engine.chat_prompt(
            asked.messages, max_tokens=options.max_tokens or 1, thinking=asked.thinking
        )
    except EdgeError as error:
        raise problem_of(error, params=_PARAMS) from error
    return _prepared(options, [prompt], options.max_tokens, engine, started)


def prepare_text(asked: TextAsked, engine: Answering, started: float) -> Prepared:
    """The prompts of texts and ids; arguments and errors as for `prepare_chat`."""
    options = asked.options
    room = options.max_tokens or COMPLETION_TOKENS
    try:
        _check_sampling(options, engine)
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
    return _prepared(options, prompts, room, engine, started)


_PARAMS = ("messages", "prompt", "logit_bias", "enable_thinking")


def _check_sampling(options: Options, engine: Answering) -> None:
    """Bias of an id that the model does not have is found by whoever samples."""
    Sampler(options.sampling[0], vocab=engine.vocab)


def _prepared(
    options: Options, prompts: Sequence[Prompt], max_tokens: int | None, engine: Answering, started: float
) -> Prepared:
    wanted = tuple(
        Wanted(prompt, sampling, options.stops, max_tokens or engine.context - len(prompt.ids))
        for prompt in prompts
        for sampling in options.sampling
    )
    return Prepared(wanted, len(options.sampling), time.perf_counter() - started)
