"""How people word an instruction: the wordings the pocket model is trained on, and others kept for tests.

In: pocket_wordings.toml. Out: two `Wording`s that share no template and no politeness. `{}` stands for a
label, a direction or a text in the same language. Chinese comes first in every pair. This module knows
nothing of screens, answers or tokens.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

Pair = tuple[tuple[str, ...], tuple[str, ...]]
LANGUAGES = ("zh", "en")


@dataclass(frozen=True)
class Wording:
    """Templates of instructions.

    Attributes:
        touch: by the kind of thing, what asks for a tap.
        other_touch: by the action, what asks for a long press or a double tap.
        state: what asks whether a switch is on.
        turn_on, turn_off: what asks for a switch to be on or off.
        title: what asks for the page title.
        swipe, type, launch: with a direction, a text and an app.
        fixed: by the action ("Back", "Home", "Wait", "finish"), what asks for it.
        wrap: what is said around an instruction. English ones begin in the middle of a sentence when
            they do not begin with {}.
    """

    touch: Mapping[str, Pair]
    other_touch: Mapping[str, Pair]
    state: Pair
    turn_on: Pair
    turn_off: Pair
    title: Pair
    swipe: Pair
    type: Pair
    launch: Pair
    fixed: Mapping[str, Pair]
    wrap: Pair


def pick(pair: Pair, rng: random.Random) -> tuple[str, str]:
    """A template and its language, "zh" or "en"."""
    language = rng.choice(LANGUAGES)
    return rng.choice(pair[LANGUAGES.index(language)]), language


def strew(
    template: str,
    language: str,
    noise: Callable[[random.Random, str], str],
    rng: random.Random,
    anywhere: bool = True,
) -> str:
    """A template with meaningless words at one or two places: the beginning, or anywhere between words.

    Chinese is not cut within what stands before or after {}.
    """
    parts = template.split(" ") if language == "en" else [p for p in re.split(r"(\{\})", template) if p]
    for _ in range(rng.choice((1, 1, 2))):
        parts.insert(rng.randint(0, len(parts)) if anywhere else 0, noise(rng, language))
    return (" " if language == "en" else "").join(parts)


def polish(
    text: str,
    language: str,
    wording: Wording,
    rng: random.Random,
    remark: Callable[[random.Random, str], str] | None = None,
) -> str:
    """Vary politeness, punctuation and capitals; `remark` gives a sentence that has nothing to do with it."""
    if rng.random() < 0.35:
        frame = rng.choice(wording.wrap[LANGUAGES.index(language)])
        keeps = language == "zh" or frame.startswith("{}") or text.startswith("I ")
        inner = text if keeps else text[0].lower() + text[1:]
        text = frame.format(inner)
    ended = text[-1] in "。.!?！？"
    if not ended and rng.random() < 0.15:
        text += "。" if language == "zh" else "."
        ended = True
    if remark is not None and rng.random() < 0.12:
        said = remark(rng, language)
        gap = "" if language == "zh" else " "
        stop = "" if ended else "。" if language == "zh" else "."
        text = f"{said}{gap}{text}" if rng.random() < 0.5 else f"{text}{stop}{gap}{said}"
    return text.lower() if language == "en" and rng.random() < 0.08 else text


def read_wording(table: Mapping[str, Any]) -> Wording:
    """A `Wording` from its table of the file."""

    def pair(sides: Mapping[str, list[str]]) -> Pair:
        return tuple(sides["zh"]), tuple(sides["en"])

    nested = {"touch", "other_touch", "fixed"}
    return Wording(
        **{
            name: MappingProxyType({key: pair(sides) for key, sides in value.items()})
            if name in nested
            else pair(value)
            for name, value in table.items()
        }
    )


_FILE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
TRAINED = read_wording(_FILE["trained"])
"""What training shows."""
HELD_OUT = read_wording(_FILE["held_out"])
"""What only tests show."""
