"""System prompts of agents, written by chance: some for training, others kept for tests.

In: pocket_systems.toml, a seeded `random.Random` and a length. Out: Chinese or English text that looks like
the instructions real clients send: a role, an output format, a list of actions, rules, notes about the user.
Training and tests share neither sentences nor the words that fill them, apart from what every such prompt has
(the names of the actions).
This module knows nothing of screens or questions.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics  # ordinary English prose and code, in every Python

ACTION_CALLS = (
    'do(action="Launch", app="xxx")',
    'do(action="Tap", element=[x,y])',
    'do(action="Tap", element=[x,y], message="xxx")',
    'do(action="Type", text="xxx")',
    'do(action="Swipe", start=[x1,y1], end=[x2,y2])',
    'do(action="Long Press", element=[x,y])',
    'do(action="Double Tap", element=[x,y])',
    'do(action="Interact")',
    'do(action="Note", message="True")',
    'do(action="Take_over", message="xxx")',
    'do(action="Back")',
    'do(action="Home")',
    'do(action="Wait", duration="x seconds")',
    'finish(message="xxx")',
)


@dataclass(frozen=True)
class Language:
    """The parts of prompts in one language.

    Attributes:
        roles: openings.
        formats: how to answer; `{nl}` is a line break.
        notes: what is said about an action; rules and remarks fill their slots from `words`.
        rules: sentences of a list of rules.
        remarks: short sentences that a user adds to an instruction.
        headings: of lists.
        words: what fills `{a}`, `{b}` and `{n}`.
        bullets: how entries of a list begin; `{i}` is their number.
    """

    roles: tuple[str, ...]
    formats: tuple[str, ...]
    notes: tuple[str, ...]
    rules: tuple[str, ...]
    remarks: tuple[str, ...]
    headings: tuple[str, ...]
    words: tuple[str, ...]
    bullets: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where system prompts, remarks and odd texts come from: two languages, and whether noise is mixed in."""

    chinese: Language
    english: Language
    noise: bool

    def of(self, language: str) -> Language:
        """The parts in "zh" or "en"."""
        return self.chinese if language == "zh" else self.english

    def remark(self, rng: random.Random, language: str) -> str:
        """A sentence that has nothing to do with the instruction, without its full stop."""
        return _fill(rng.choice(self.of(language).remarks), self.of(language), rng)

    def typed(self, rng: random.Random, language: str) -> str:
        """A text to be typed: words, and in training sometimes nonsense, so that copying is learnt."""
        if self.noise and rng.random() < 0.35:
            return noise(rng, language, rng.randint(2, 8)).replace('"', "").replace("\\", "").strip() or "ok"
        words = self.of(language).words
        return rng.choice(words) if rng.random() < 0.7 else f"{rng.choice(words)} {rng.choice(words)}"

    def filler(self, rng: random.Random, language: str) -> str:
        """One to three words without meaning, for templates, so without braces."""
        return re.sub(r"[{}]", "", noise(rng, language, rng.randint(1, 3))) or "so"

    def system_prompt(
        self, rng: random.Random, tokens: int, count: Callable[[str], int], language: str | None = None
    ) -> str:
        """A system prompt of about so many tokens, as `count` counts them."""
        parts = self.of(language or rng.choice(("zh", "en")))
        pieces = [_fill(rng.choice(parts.roles), parts, rng)]
        used = count(pieces[0])
        while used < tokens:
            section = self._section(rng, parts, used > 0.5 * tokens)
            for line in section:
                pieces.append(line)
                used += count(line) + 1
                if used >= tokens:
                    break
        return "\n".join(pieces) + rng.choice(("", "\n"))

    def _section(self, rng: random.Random, parts: Language, late: bool) -> list[str]:
        draw = rng.random()
        if self.noise and draw < 0.25:
            language = "zh" if parts is self.chinese else "en"
            return [noise(rng, language, rng.randint(10, 60)) for _ in range(rng.randint(1, 4))]
        if draw < 0.4 and not late:
            return [_fill(rng.choice(parts.formats), parts, rng)]
        bullet = rng.choice(parts.bullets)
        close = "**" if bullet.endswith("**") else ""
        heading = [rng.choice(parts.headings)] if rng.random() < 0.7 else []
        if draw < 0.65:
            calls = rng.sample(ACTION_CALLS, rng.randint(3, len(ACTION_CALLS)))
            gap = rng.choice(("\n    ", ": ", " ", "\n  "))
            return heading + [
                bullet.format(i=i) + call + close + gap + _fill(rng.choice(parts.notes), parts, rng)
                for i, call in enumerate(calls, 1)
            ]
        return heading + [
            bullet.format(i=i) + _fill(rng.choice(parts.rules), parts, rng) + close
            for i in range(1, rng.randint(3, 12))
        ]


def noise(rng: random.Random, language: str, words: int) -> str:
    """Text of no meaning here: a piece of Python's manual, or Chinese characters by chance."""
    if language == "zh":
        return "".join(rng.choice(common_characters()) for _ in range(words))
    prose = manual()
    start = rng.randrange(len(prose) - words)
    return " ".join(prose[start : start + words])


@cache
def common_characters() -> tuple[str, ...]:
    """The 3,755 characters of GB 2312's first level."""
    rows = (bytes((high, low)) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    return tuple(row.decode("gb2312") for row in rows if not (row[0] == 0xD7 and row[1] > 0xF9))


@cache
def manual() -> tuple[str, ...]:
    """Words of the language reference that Python brings along."""
    return tuple(" ".join(topics[name] for name in sorted(topics)).split())


def _fill(template: str, parts: Language, rng: random.Random) -> str:
    weekday = rng.choice(
        ("Monday", "Friday", "Sunday") if parts.words[0].isascii() else ("星期一", "星期五", "星期日")
    )
    date = f"{rng.randint(2023, 2027)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d} {weekday}"
    return template.format(
        a=rng.choice(parts.words), b=rng.choice(parts.words), n=rng.randint(2, 60), w=date, nl="\n"
    )


def _source(table: Mapping[str, Mapping[str, list[str]]], *, noise: bool) -> Source:
    languages = [
        Language(**{name: tuple(parts) for name, parts in table[language].items()})
        for language in ("zh", "en")
    ]
    return Source(*languages, noise=noise)


_FILE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
TRAINED = _source(_FILE["trained"], noise=True)
HELD_OUT = _source(_FILE["held_out"], noise=False)
