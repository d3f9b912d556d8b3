"""Conversations as clients send them: a question about a screen, with what stands before and around it.

In: a screen, a `Style` and a seeded `random.Random`. Out: a `Conversation`: system prompt, earlier turns
without their images, and the text beside the image. `TRAINED` and `HELD_OUT` styles share no template and no
filling words. Forms: Open-AutoGLM's screen facts in JSON, a line break between image and text, earlier
instructions with their answers, and the agent's later steps, where the task stands in the first turn and the
last one has only screen facts. This module knows nothing of tokens or pixels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pocket_systems as systems
import pocket_wordings as wordings
from pocket_canvas import Screen
from pocket_questions import Manner, Question, ask, ask_blind, ask_toggle, swipe
from pocket_vocabulary import APPS, LABELS

SHORT_PROMPTS = (
    "You operate a phone. Answer with one action.\n",
    "You are a phone agent. Think briefly, then act.\n",
    "你是手机助手，请根据截图给出下一步操作。\n",
)
"""System prompts that training shows most often; a user who sends one of them is well served."""


@dataclass(frozen=True)
class Turn:
    """An earlier turn: what the user said, and what was answered."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Conversation:
    """One request.

    Attributes:
        question: what is asked, and what a right answer is.
        text: of the last user turn, which stands after the image.
        system: the system prompt, or None.
        history: earlier turns; their images are gone.
    """

    question: Question
    text: str
    system: str | None = None
    history: tuple[Turn, ...] = ()

    def messages(self, image: dict[str, object]) -> list[dict[str, object]]:
        """OpenAI-style messages; `image` is the content part that carries the picture."""
        found: list[dict[str, object]] = []
        if self.system is not None:
            found.append({"role": "system", "content": self.system})
        for turn in self.history:
            found.append({"role": "user", "content": turn.user})
            found.append({"role": "assistant", "content": turn.assistant})
        found.append({"role": "user", "content": [image, {"type": "text", "text": self.text}]})
        return found


@dataclass(frozen=True)
class Style:
    """A way to ask, and where prompts and other texts come from."""

    manner: Manner
    source: systems.Source
    apps: tuple[str, ...] = field(default=())

    def facts(self, rng: random.Random) -> str:
        """Open-AutoGLM's screen facts."""
        names = [*APPS, *(app.chinese for app in APPS.values()), *self.apps, "System Home"]
        if self.source.noise and rng.random() < 0.3:
            names = [systems.noise(rng, rng.choice(("zh", "en")), rng.randint(1, 3))]
        return json.dumps({"current_app": rng.choice(names)}, ensure_ascii=False)

    def decorate(self, text: str, rng: random.Random) -> str:
        """The text beside an image: some with screen facts, some a line below the image."""
        if rng.random() < 0.35:
            text = f"{text}\n\n{self.facts(rng)}"
        return "\n" + text if rng.random() < 0.2 else text

    def later_step(self, rng: random.Random) -> str:
        """The text beside the image of a second or later step."""
        return f"** Screen Info **\n\n{self.facts(rng)}"

    def earlier_tasks(self, screen: Screen, rng: random.Random, turns: int) -> tuple[Turn, ...]:
        """Turns about other instructions, each answered."""
        found = []
        for _ in range(turns):
            question = ask_blind(rng, self.manner) if rng.random() < 0.4 else ask(screen, rng, self.manner)
            found.append(Turn(self.decorate(question.text, rng).strip("\n"), question.answer))
        return tuple(found)

    def earlier_steps(self, question: Question, rng: random.Random, turns: int) -> tuple[Turn, ...]:
        """The first steps of the task that the question states, none of which has done it."""
        found = []
        for number in range(turns):
            user = f"{question.text}\n\n{self.facts(rng)}" if number == 0 else self.later_step(rng)
            found.append(Turn(user, _vain_step(question, rng)))
        return tuple(found)


def _vain_step(question: Question, rng: random.Random) -> str:
    """An answer that leads on without having done what is asked."""
    target = question.target or rng.choice(LABELS)
    think, action = rng.choice(
        (
            (f"{target} is not here", swipe("up")),
            (f"{target} is not here", swipe(rng.choice(("down", "left", "right")))),
            ("Wait", 'do(action="Wait", duration="2 seconds")'),
            ("Launch", f'do(action="Launch", app="{rng.choice(list(APPS))}")'),
            ("Back", 'do(action="Back")'),
            ("Home", 'do(action="Home")'),
        )
    )
    return f"<think>{think}</think><answer>{action}</answer>"


def _style(wording: wordings.Wording, source: systems.Source, apps: tuple[str, ...] = ()) -> Style:
    filler = source.filler if source.noise else None
    return Style(Manner(wording, source.typed, source.remark, filler), source, apps)


TRAINED = _style(wordings.TRAINED, systems.TRAINED)
HELD_OUT = _style(
    wordings.HELD_OUT, systems.HELD_OUT, ("WeChat", "微信", "Spotify", "小红书", "com.android.launcher3")
)

FORMS = ("plain", "worded", "system-zh", "system-en", "tasks", "steps", "toggles")
"""What `converse` makes: trained wording; held-out wording, politeness and screen facts; that after a
held-out system prompt of 2,000 tokens in Chinese or English; after other tasks; as a later step; about
switches."""


def converse(
    form: str, screen: Screen, rng: random.Random, count: Callable[[str], int]
) -> Conversation | None:
    """One request of a form, or None if the screen cannot serve it; `count` counts tokens."""
    if form == "plain":
        question = ask(screen, rng, TRAINED.manner)
        system = rng.choice(SHORT_PROMPTS) if rng.random() < 0.3 else None
        return Conversation(question, TRAINED.decorate(question.text, rng), system)
    style = HELD_OUT
    if form == "toggles":
        toggle = ask_toggle(screen, rng, style.manner)
        return toggle and Conversation(toggle, style.decorate(toggle.text, rng))
    question = ask(screen, rng, style.manner)
    text = style.decorate(question.text, rng)
    if form == "worded":
        return Conversation(question, text)
    if form == "tasks":
        return Conversation(question, text, None, style.earlier_tasks(screen, rng, rng.randint(1, 3)))
    if form == "steps":
        if question.kind == "blind":
            return None
        steps = style.earlier_steps(question, rng, rng.randint(1, 3))
        return Conversation(question, style.later_step(rng), None, steps)
    language = form.removeprefix("system-")
    return Conversation(question, text, style.source.system_prompt(rng, 2000, count, language))
