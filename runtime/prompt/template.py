"""The checkpoint's chat template: messages to the text of a prompt.

In: Jinja source, the names of tokens, messages. Out: text with one placeholder per image. Knows nothing of
token ids or image sizes.

A template comes with the weights and is foreign code, so it runs in Jinja's immutable sandbox. Filters,
globals and whitespace rules are those of transformers' `apply_chat_template`, and so is the text. An image
is never lost: the placeholders in the text are counted.

Two layouts of a turn with images (both are in use with GLM-4.1V, and differ by one token):

- "plain": the template gets a list of parts, as from transformers.
- "newline": it gets one string, images first, all joined by newlines, as vLLM makes it with
  `--chat-template-content-format string`.

In both, a system or assistant turn that holds only text is passed as one string even if it came as a list:
templates of this family print those contents as they are, and would print the Python list.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from autoglm_edge.errors import BundleError, PromptError

from .messages import Message, TextPart

ImageLayout = Literal["plain", "newline"]
IMAGE_LAYOUTS: tuple[str, ...] = get_args(ImageLayout)
FILE_NAME = "chat_template.jinja"
MAX_REPEATED = 1_000_000
"""Characters or items that a template may make with one `*`."""
MAX_BITS = 10_000
"""Bits of a number that a template may make with one `**`."""
_OWN_VARIABLES = ("messages", "add_generation_prompt", "tools", "documents")
# What transformers calls the named special tokens; it hands exactly these to a template.
_NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class ChatTemplate:
    """A compiled template.

    Attributes:
        source: the Jinja text.
        tokens: text of the named special tokens ("eos_token" and so on), variables of the template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile.

        Raises:
            PromptError: the template has a syntax error.
        """
        self.source = source
        self.tokens = dict(tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(
                f"the chat template has a syntax error in line {error.lineno}: {error.message}"
            ) from error
        except RecursionError as error:
            raise PromptError("the chat template is nested too deeply") from error

    @classmethod
    def from_folder(cls, path: str | Path) -> ChatTemplate:
        """Read the template of a bundle or checkpoint, and the named special tokens next to it.

        Args:
            path: holds chat_template.jinja, or tokenizer_config.json with a "chat_template"; named tokens
                (eos_token and so on) are taken from tokenizer_config.json and special_tokens_map.json.

        Raises:
            BundleError: there is no template, or a file cannot be read.
            PromptError: the template has a syntax error.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        named = _read_json(folder / "special_tokens_map.json") | config
        tokens = {key: text for key in _NAMED_TOKENS if (text := _token_text(named.get(key))) is not None}
        file = folder / FILE_NAME
        try:
            source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} cannot be read ({error}); export the checkpoint again") from error
        if not isinstance(source, str):
            raise BundleError(f"{FILE_NAME} is not in {folder}; export the checkpoint again")
        return cls(source, tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        image_layout: ImageLayout = "plain",
        variables: Mapping[str, Any] | None = None,
        image_tokens: tuple[str, str, str] | None = None,
    ) -> str:
        """The text of a prompt.

        Args:
            messages: as from read_messages. Special tokens in their text are no matter of this module; see
                prompt.py.
            add_generation_prompt: end with the header of the assistant's turn.
            image_layout: "plain" or "newline", see the top of this module.
            variables: more variables for the template, for example {"enable_thinking": False}.
            image_tokens: text of the tokens of one image: start, placeholder, end. Needed with images.

        Returns:
            Text with exactly one image placeholder per image, in order.

        Raises:
            PromptError: the template refuses the messages or fails, an image is lost or doubled, image_tokens
                are missing, or a variable has the name of one that is always set.
        """
        if image_layout not in IMAGE_LAYOUTS:
            raise PromptError(f"image_layout is {image_layout!r}, must be one of {', '.join(IMAGE_LAYOUTS)}")
        extra = dict(variables or {})
        if taken := [name for name in _OWN_VARIABLES if name in extra]:
            raise PromptError(
                f"the template variable {taken[0]!r} is always set by the runtime; choose another name"
            )
        count = sum(len(message.images) for message in messages)
        if count and not (image_tokens and all(image_tokens)):
            raise PromptError("the messages hold images, but the text of the image tokens is not given")
        placeholder = "".join(image_tokens or ())
        content = _newline_content if image_layout == "newline" else _plain_content
        try:
            text = self._template.render(
                **(self.tokens | extra),
                messages=[{"role": m.role, "content": content(m, placeholder)} for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template refuses the messages: {error.message}") from error
        # A template can raise anything that an expression can: type, key, arithmetic, recursion errors.
        except Exception as error:
            raise PromptError(f"the chat template fails with {type(error).__name__}: {error}") from error
        if image_tokens and (found := text.count(image_tokens[1])) != count:
            raise PromptError(
                f"the chat template made {found} image placeholders of {count} images; put images into user "
                "messages, one part each, or use a template that supports them where they are"
            )
        return text


def _plain_content(message: Message, placeholder: str) -> str | list[dict[str, str]]:
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    if message.is_string or (message.role != "user" and len(texts) == len(message.parts)):
        return "".join(texts)
    # Templates ask for the type or for the key "image"; nothing of the picture itself is shown to them.
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": "image"}
        for part in message.parts
    ]


def _newline_content(message: Message, placeholder: str) -> str:
    texts = "\n".join(part.text for part in message.parts if isinstance(part, TextPart))
    return "\n".join([placeholder] * len(message.images) + ([texts] if texts else []))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which bounds loops, and here the two operators that could ask for all memory too."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply or raise to a power.

        Raises:
            SecurityError: the result would be huge.
        """
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, (str, bytes, list, tuple)) and isinstance(count, int):
                    size = len(text) * count
                    if size > MAX_REPEATED:
                        raise SecurityError(f"one multiplication would make {size} characters or items")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
            raise SecurityError(f"one power would make a number of {left.bit_length() * right} bits")
        return super().call_binop(context, operator, left, right)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _TemplateNamespace
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks answers for training in some templates; here its body is simply printed."""

    tags = {"generation"}  # noqa: RUF012 (the attribute's form is Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as the call block of transformers has.
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateNamespace(Namespace):
    """Jinja's namespace, without names that could lead to the interpreter's insides."""

    def __init__(*arguments: Any, **attributes: Any) -> None:  # "self" is a legal attribute
        values = dict(*arguments[1:], **attributes)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(arguments[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the private name {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read ({error}); export the checkpoint again") from error
    if not isinstance(document, dict):
        raise BundleError(f"{file} holds no JSON object; export the checkpoint again")
    return document


def _token_text(value: Any) -> str | None:
    """A token is written as a string, or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
