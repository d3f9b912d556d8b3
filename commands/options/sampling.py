"""How a single answer is drawn, where it ends, and what it is held to.

In: the command line. Out: arguments of `Engine.chat`, and a JSON Schema.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from autoglm_edge.commands.terminal import as_unicode
from autoglm_edge.errors import RequestError

from .choice import gathered

DEFAULT_MAX_TOKENS = 3000
"""What Open-AutoGLM's client asks for; an answer that goes round in circles ends there."""
_OF_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "seed"),
)
"""Fields that `SamplingParams` has by the same names."""


@dataclass(frozen=True)
class SamplingChoice:
    """What was said of an answer; None leaves it to the engine.

    Attributes:
        max_tokens: after which it is cut off.
        temperature: as in SamplingParams, like all up to `seed`.
        top_p: see there.
        top_k: see there.
        min_p: see there.
        repetition_penalty: see there.
        frequency_penalty: see there.
        presence_penalty: see there.
        seed: see there.
        stop: texts before which it ends.
        json_schema: file of the schema that it is held to.
        json_object: whether it is held to JSON.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    stop: tuple[str, ...]
    json_schema: Path | None
    json_object: bool

    def arguments(self) -> dict[str, Any]:
        """Arguments of `Engine.chat`: what was given, and where the answer ends.

        Raises:
            click.UsageError: a value is out of range.
        """
        from autoglm_edge.runtime.sampling import SamplingParams
        from autoglm_edge.runtime.stops import StopText

        values = {name: getattr(self, name) for name in _OF_SAMPLING}
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        stop = tuple(as_unicode(item) for item in self.stop)
        try:
            SamplingParams(**given)
            StopText(stop)
        except RequestError as error:
            raise click.UsageError(str(error)) from error
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {**given, "stop": stop, **limit}

    def schema(self) -> dict[str, Any] | bool | None:
        """What the answer is held to; None leaves it free.

        Raises:
            click.UsageError: the file cannot be read, or holds no schema that is taken.
        """
        file = self.json_schema
        if file is None:
            return {"type": "object"} if self.json_object else None
        if self.json_object:
            raise click.UsageError("--json-schema says more than --json-object; leave one of them out")

        from autoglm_edge.runtime.grammar import read_schema

        try:
            schema: dict[str, Any] | bool = json.loads(file.read_text(encoding="utf-8"))
            read_schema(schema)
        except OSError as error:
            raise click.UsageError(f"--json-schema {file}: it cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise click.UsageError(f"--json-schema {file}: it is not JSON in UTF-8 ({error})") from error
        except RequestError as error:
            raise click.UsageError(f"--json-schema {file}: {error}") from error
        return schema


sampling_options = gathered(
    SamplingChoice,
    "sampling",
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help=f"Stop after N tokens. [default: {DEFAULT_MAX_TOKENS}, or what the context has left]",
    ),
    click.option("--temperature", type=float, help="0 takes the likeliest token. [default: 0]"),
    click.option("--top-p", type=float, help="Draw among the likeliest that reach this probability."),
    click.option("--top-k", type=int, help="Draw among so many of the likeliest tokens."),
    click.option("--min-p", type=float, help="Draw among tokens this fraction as likely as the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1: avoid what prompt and answer have."),
    click.option("--frequency-penalty", type=float, help="Subtract this per occurrence in the answer."),
    click.option("--presence-penalty", type=float, help="Subtract this from what the answer has."),
    click.option("--seed", type=int, help="Draw the same tokens again."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; repeatable."),
    click.option(
        "--json-schema",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Hold the answer to the JSON Schema in FILE.",
    ),
    click.option("--json-object", is_flag=True, help="Hold the answer to JSON: any object."),
)
