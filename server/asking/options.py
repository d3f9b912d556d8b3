"""What all endpoints that answer take: sampling, stops, lengths, streaming; and what none of them takes.

In: the fields of a request. Out: `Options`. Knows nothing of messages and prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.grammar import ANY_OBJECT, read_schema
from autoglm_edge.runtime.sampling import SamplingParams
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.problem import problem_of, refuse

from .fields import Fields, kind_of, shown, wrong_type

NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
MOST_TOKENS = 10_000_000
_SEEDS = 2**64
_FORMATS = ("text", "json_object", "json_schema")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_NOT_TOKENS = "the engine hands out no probabilities"
_NOT_TOOLS = "this model writes its actions as text, see the system prompt of the phone agent"
UNSUPPORTED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "logprobs": ((False, 0), _NOT_TOKENS),
    "top_logprobs": ((0,), _NOT_TOKENS),
    "prompt_logprobs": ((False, 0), _NOT_TOKENS),
    "tools": (([],), _NOT_TOOLS),
    "tool_choice": (("none", "auto"), _NOT_TOOLS),
    "parallel_tool_calls": ((True, False), _NOT_TOOLS),
    "functions": (([],), _NOT_TOOLS),
    "function_call": (("none", "auto"), _NOT_TOOLS),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), "drafts are made from the prompt, without being asked"),
    "reasoning_effort": ((), "this model has no such dial; enable_thinking switches thinking off"),
    "verbosity": (("medium",), "this model has no such dial"),
    "web_search_options": ((), "this server asks nobody else"),
    "store": ((False,), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one queue for all"),
    "suffix": (("",), "this model fills no gaps"),
    "echo": ((False,), "put the prompt in front of the answer yourself"),
    "best_of": ((1,), "ask for n answers"),
    "use_beam_search": ((False,), "answers are sampled token by token"),
    "ignore_eos": ((False,), "an end token ends the answer"),
    "min_tokens": ((0,), "an end token ends the answer"),
    "stop_token_ids": (([],), "write the text of the token into stop"),
    "include_stop_str_in_output": ((False,), "a stop string is not part of the answer"),
    "add_generation_prompt": ((True,), "the answer is always the assistant's next turn"),
    "continue_final_message": ((False,), "the answer is always the assistant's next turn"),
    "add_special_tokens": ((False,), "prompts are taken as they are"),
    "chat_template": ((), "the template is the checkpoint's"),
    "documents": (([],), "the template of this model has no place for them"),
    "structured_outputs": ((), "use response_format"),
    "guided_json": ((), "use response_format"),
}
"""Fields that clients know and this server does not honour: values that ask for nothing, and why not."""

NOTED: Mapping[str, type] = {
    "metadata": dict,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "skip_special_tokens": bool,
}
"""Fields that are taken and change nothing, because there is nothing for them to change: nothing is stored,
what prompts share is found by content, and of special tokens only the tags of thinking and answer ever stand
in a text, whatever is asked."""


@dataclass(frozen=True)
class Options:
    """How an answer is to be made.

    Attributes:
        sampling: of each answer; they differ in their seeds.
        stops: strings that end it.
        max_tokens: at most; None is what the context has left.
        stream: whether it is sent as it is made.
        include_usage: whether a stream ends with the counts.
        user: whom the client asks for; tells apart who takes turns.
        model: as named by the client; None if it named none.
        schema: JSON Schema that the answer is held to; None leaves it free.
    """

    sampling: tuple[SamplingParams, ...]
    stops: tuple[str, ...]
    max_tokens: int | None
    stream: bool
    include_usage: bool
    user: str
    model: str | None
    schema: Mapping[str, Any] | bool | None = None


def read_options(fields: Fields, limits: Limits) -> Options:
    """Take all common fields; what is left is the endpoint's own.

    Raises:
        ApiError: a value is wrong, or asks for what is not supported.
    """
    model = fields.text("model", longest=256)
    count = fields.whole("n", 1, limits.choices) or 1
    stream = fields.flag("stream")
    include_usage = _read_stream_options(fields.take("stream_options"), stream=stream)
    sampling = _read_sampling(fields, count)
    stops = _read_stops(fields.take("stop"), limits)
    max_tokens = _read_max_tokens(fields)
    user = fields.text("user", longest=512) or ""
    schema = _read_response_format(fields.take("response_format"))
    for name, (harmless, why) in UNSUPPORTED.items():
        fields.only(name, *harmless, why=why)
    for name, wanted in NOTED.items():
        value = fields.take(name)
        if value is not None and not isinstance(value, wanted):
            raise wrong_type(name, value, {dict: "an object", str: "a string", bool: "true or false"}[wanted])
    return Options(sampling, stops, max_tokens, stream, include_usage, user, model, schema)


def _read_sampling(fields: Fields, count: int) -> tuple[SamplingParams, ...]:
    values: dict[str, Any] = {name: fields.number(name) for name in NUMBERS}
    values["top_k"] = fields.whole("top_k", -1, 2**31 - 1)
    seed = fields.whole("seed", -(2**63), _SEEDS - 1)
    bias = fields.take("logit_bias")
    if bias is not None and not isinstance(bias, dict):
        raise wrong_type("logit_bias", bias, "an object of token ids and numbers")
    values["logit_bias"] = bias
    given = {name: value for name, value in values.items() if value is not None}
    try:
        params = SamplingParams(**given)
    except RequestError as error:
        raise problem_of(error, params=(*NUMBERS, "top_k", "logit_bias")) from error
    if seed is None:
        return (params,) * count
    return tuple(replace(params, seed=(seed + index) % _SEEDS) for index in range(count))


def _read_stops(value: object, limits: Limits) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong_type("stop", value, "a string or a list of strings")
    if len(stops) > limits.stops:
        raise refuse(f"stop has {len(stops)} strings, at most {limits.stops} are taken", "stop")
    for stop in stops:
        if not isinstance(stop, str):
            raise refuse(f"stop holds {kind_of(stop)}, must hold strings", "stop", code="invalid_type")
        if not 1 <= len(stop) <= limits.stop_characters:
            raise refuse(
                f"a stop string has {len(stop)} characters, must have 1 to {limits.stop_characters}", "stop"
            )
    return tuple(stops)


def _read_max_tokens(fields: Fields) -> int | None:
    old = fields.whole("max_tokens", 1, MOST_TOKENS)
    new = fields.whole("max_completion_tokens", 1, MOST_TOKENS)
    if old is not None and new is not None and old != new:
        raise refuse(f"max_tokens is {old} and max_completion_tokens {new}; give one of them", "max_tokens")
    return old if new is None else new


def _read_stream_options(value: object, *, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise refuse("stream_options is for streams; set stream to true, or leave it out", "stream_options")
    fields = Fields(value, "stream_options")
    usage = fields.flag("include_usage")
    fields.only("include_obfuscation", False, why="chunks are sent as they are")
    fields.only("continuous_usage_stats", False, why="the counts come once, at the end")
    fields.done()
    return usage


def _read_response_format(value: object) -> Mapping[str, Any] | bool | None:
    """The schema that is asked for; None for text. How large it may be is checked here, not what it means."""
    if value is None:
        return None
    fields = Fields(value, "response_format")
    kind = fields.take("type")
    described = fields.take("json_schema")
    fields.done()
    if kind not in _FORMATS:
        raise refuse(
            f"response_format.type is {shown(kind)}, must be one of {', '.join(_FORMATS)}", "response_format"
        )
    if kind != "json_schema":
        if described is not None:
            raise refuse(
                f"response_format.json_schema cannot go with the type {kind!r}; make it 'json_schema', or "
                "leave the schema out",
                "response_format",
            )
        return ANY_OBJECT if kind == "json_object" else None
    if described is None:
        raise refuse("response_format.json_schema is missing", "response_format", code="missing_field")
    return _read_schema(described)


def _read_schema(value: object) -> Mapping[str, Any] | bool:
    """`strict` changes nothing: an answer is held to its schema in any case."""
    inner = Fields(value, "response_format.json_schema")
    name = inner.text("name")
    inner.text("description")
    inner.flag("strict")
    schema = inner.take("schema")
    inner.done()
    if name is not None and not _NAME.fullmatch(name):
        raise refuse(
            f"response_format.json_schema.name is {shown(name)}, must be 1 to 64 letters, digits, _ and -",
            "response_format",
        )
    if schema is None:
        raise refuse(
            "response_format.json_schema.schema is missing; give a JSON Schema",
            "response_format",
            code="missing_field",
        )
    if not isinstance(schema, (dict, bool)):
        raise refuse(
            f"response_format.json_schema.schema is {kind_of(schema)}, must be an object",
            "response_format",
            code="invalid_type",
        )
    try:
        read_schema(schema)
    except RequestError as error:
        raise refuse(f"response_format is refused: {error}", "response_format") from error
    return schema
