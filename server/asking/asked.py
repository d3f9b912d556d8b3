"""What a request asks for, endpoint by endpoint.

In: parsed JSON. Out: `ChatAsked`, `TextAsked`, `TokenizeAsked`: every field taken, checked, or refused. Knows
nothing of engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoglm_edge.server.limits import Limits
from autoglm_edge.server.problem import ApiError, refuse

from .content import Fetch, check_text, read_conversation, read_images
from .fields import Fields, kind_of, shown, wrong_type
from .options import Options, read_options

COMPLETION_TOKENS = 16
"""Of /v1/completions if nothing is said, as OpenAI has it."""


@dataclass(frozen=True, eq=False)
class ChatAsked:
    """An answer in a conversation.

    Attributes:
        options: how to make it.
        messages: for `read_messages`, pictures as bytes.
        thinking: whether the model is to think first; None is its own choice.
        split: whether thought and answer are told apart.
    """

    options: Options
    messages: list[Any]
    thinking: bool | None
    split: bool


@dataclass(frozen=True, eq=False)
class TextAsked:
    """Continuations of texts.

    Attributes:
        options: how to make them.
        prompts: texts, or lists of token ids.
    """

    options: Options
    prompts: tuple[str | tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class TokenizeAsked:
    """Tokens of a text or of a conversation.

    Attributes:
        model: as named by the client.
        text: or None.
        messages: or None.
        pieces: whether the text of each token is wanted.
    """

    model: str | None
    text: str | None
    messages: list[Any] | None
    pieces: bool


def read_chat(body: object, limits: Limits, fetch: Fetch | None) -> ChatAsked:
    """A request of /v1/chat/completions.

    Raises:
        ApiError: something is wrong with it.
    """
    fields = Fields(body)
    options = read_options(fields, limits)
    thinking = _read_thinking(fields)
    split = fields.flag("return_reasoning")
    messages = fields.take("messages")
    fields.done()
    if messages is None:
        raise refuse("messages is missing; give a list of messages", "messages", code="missing_field")
    return ChatAsked(options, read_conversation(messages, limits, fetch), thinking, split)


def read_generate(body: object, limits: Limits) -> ChatAsked:
    """A request of /generate: one turn of text and pictures.

    Raises:
        ApiError: something is wrong with it.
    """
    fields = Fields(body)
    options = read_options(fields, limits)
    if options.stream:
        raise refuse("stream is for /v1/chat/completions; leave it out here", "stream")
    if len(options.sampling) > 1:
        raise refuse("n is for /v1/chat/completions; leave it out here", "n")
    thinking = _read_thinking(fields)
    text = fields.text("text")
    system = fields.text("system")
    image = fields.take("image")
    fields.done()
    parts = read_images(image, "image", limits) if image is not None else []
    if not text and not parts:
        raise refuse("text is missing; say what is to be answered", "text", code="missing_field")
    check_text((text or "") + (system or ""), limits, "text")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    if text:
        parts.append({"type": "text", "text": text})
    messages.append({"role": "user", "content": parts})
    return ChatAsked(options, messages, thinking, split=False)


def read_completion(body: object, limits: Limits) -> TextAsked:
    """A request of /v1/completions.

    Raises:
        ApiError: something is wrong with it.
    """
    fields = Fields(body)
    options = read_options(fields, limits)
    prompts = _read_prompts(fields.take("prompt"), limits)
    for name in ("enable_thinking", "return_reasoning"):
        fields.only(name, why="a text is continued as it is; use /v1/chat/completions")
    fields.done()
    if len(prompts) * len(options.sampling) > limits.choices:
        raise refuse(
            f"{len(prompts)} prompts with n {len(options.sampling)} are more than {limits.choices} answers",
            "prompt",
        )
    return TextAsked(options, prompts)


def read_tokenize(body: object, limits: Limits, fetch: Fetch | None) -> TokenizeAsked:
    """A request of /tokenize.

    Raises:
        ApiError: something is wrong with it.
    """
    fields = Fields(body)
    model = fields.text("model", longest=256)
    text = fields.text("prompt")
    content = fields.text("content")
    messages = fields.take("messages")
    pieces = fields.flag("return_token_strs")
    fields.only("add_special_tokens", False, why="a text is taken as it is")
    fields.only("add_generation_prompt", True, why="a conversation ends where the answer begins")
    fields.done()
    if sum(value is not None for value in (text, content, messages)) != 1:
        raise refuse("give one of prompt, content and messages", "prompt", code="missing_field")
    text = content if text is None else text
    if text is None:
        return TokenizeAsked(model, None, read_conversation(messages, limits, fetch), pieces)
    check_text(text, limits, "prompt")
    return TokenizeAsked(model, text, None, pieces)


def read_detokenize(body: object, limits: Limits) -> tuple[str | None, tuple[int, ...]]:
    """A request of /detokenize: the model's name and token ids.

    Raises:
        ApiError: something is wrong with it.
    """
    fields = Fields(body)
    model = fields.text("model", longest=256)
    tokens = fields.take("tokens")
    fields.done()
    if not isinstance(tokens, list):
        raise wrong_type("tokens", tokens, "a list of token ids")
    return model, _read_ids(tokens, "tokens")


def _read_thinking(fields: Fields) -> bool | None:
    """enable_thinking, on its own or among the variables of the template."""
    thinking = fields.choice("enable_thinking")
    variables = fields.take("chat_template_kwargs")
    if variables is None:
        return thinking
    inner = Fields(variables, "chat_template_kwargs")
    other = inner.choice("enable_thinking")
    inner.done()
    if thinking is not None and other is not None and thinking != other:
        raise refuse(
            "enable_thinking and chat_template_kwargs.enable_thinking contradict each other",
            "enable_thinking",
        )
    return thinking if other is None else other


def _read_prompts(value: object, limits: Limits) -> tuple[str | tuple[int, ...], ...]:
    if value is None:
        raise refuse("prompt is missing; give a text", "prompt", code="missing_field")
    if isinstance(value, str):
        check_text(value, limits, "prompt")
        return (value,)
    if not isinstance(value, list):
        raise wrong_type("prompt", value, "a text, a list of texts, or a list of token ids")
    if not value:
        raise refuse("prompt is an empty list; give a text", "prompt")
    if all(isinstance(item, str) for item in value):
        check_text("".join(value), limits, "prompt")
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_read_ids(item, "prompt") for item in value)
    return (_read_ids(value, "prompt"),)


def _read_ids(values: list[Any], name: str) -> tuple[int, ...]:
    for item in values:
        if not isinstance(item, int) or isinstance(item, bool):
            raise ApiError(
                400, f"{name} holds {kind_of(item)}, must hold token ids", param=name, code="invalid_type"
            )
        if not 0 <= item < 2**31:
            raise refuse(f"{name} holds {shown(item)}, which is no token id", name)
    return tuple(values)
