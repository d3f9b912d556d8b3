"""Instructions about a synthetic screen and the answers an Open-AutoGLM agent would expect.

In: the elements of a `pocket_canvas.Screen`, a `Manner` of asking and a seeded `random.Random`. Out:
`Question` records, Chinese or English, whose answer is `<think>…</think><answer>do(…)</answer>` or
`…finish(…)</answer>`. Points are on the 0-999 scale of the client, rounded to tens and never below 100, so
each number has three digits and no leading zero (the client reads them as Python).
This module knows nothing of pixels or tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from pocket_canvas import Element, Screen
from pocket_vocabulary import (
    APPS,
    BUTTONS,
    CHINESE,
    FIELDS,
    HEADER_ICONS,
    PEOPLE,
    PLAIN_ROWS,
    SWITCH_ROWS,
    TITLES,
)
from pocket_wordings import Pair, Wording, pick, polish, strew

Box = tuple[int, int, int, int]
Point = tuple[int, int]

SWIPES: dict[str, tuple[str, Point, Point]] = {
    "up": ("上", (500, 800), (500, 300)),
    "down": ("下", (500, 300), (500, 800)),
    "left": ("左", (800, 500), (200, 500)),
    "right": ("右", (200, 500), (800, 500)),
}

KIND_LABELS: dict[str, tuple[str, ...]] = {
    "app": tuple(APPS),
    "row": (*SWITCH_ROWS, *PLAIN_ROWS),
    "button": tuple(BUTTONS),
    "field": tuple(FIELDS),
    "person": tuple(PEOPLE),
    "icon": tuple(HEADER_ICONS),
    "title": tuple(TITLES),
}


@dataclass(frozen=True)
class Question:
    """One instruction about one screen.

    `kind` groups questions in score tables ("tap", "absent", "toggle", "title", "blind"). `box` is the target
    in 0-999 (x0, y0, x1, y1), or None when the expected action points nowhere in particular. `target` is the
    label that the answer is about; `think` begins with it.
    """

    kind: str
    text: str
    think: str
    action: str
    box: Box | None = None
    target: str | None = None

    @property
    def answer(self) -> str:
        """The complete assistant text, its terminator `</answer>` included."""
        return f"<think>{self.think}</think><answer>{self.action}</answer>"


def box_of(element: Element, screen: Screen) -> Box:
    """Box of an element on the 0-999 scale, rounded inwards."""
    x0, y0, x1, y1 = element.box
    return (
        max(0, -int(-x0 * 1000 // screen.width)),
        max(0, -int(-y0 * 1000 // screen.height)),
        min(999, int(x1 * 1000 // screen.width)),
        min(999, int(y1 * 1000 // screen.height)),
    )


def point_of(box: Box) -> Point:
    """Centre of a 0-999 box in tens, kept within 100..990 so that both numbers have three digits."""
    x, y = (int((low + high) / 20 + 0.5) * 10 for low, high in (box[::2], box[1::2]))
    return min(990, max(100, x)), min(990, max(100, y))


def touch(action: str, point: Point) -> str:
    """`do(...)` text of an action at a point."""
    return f'do(action="{action}", element=[{point[0]},{point[1]}])'


def swipe(direction: str) -> str:
    """`do(...)` text of a swipe of the finger in a direction."""
    _, (x0, y0), (x1, y1) = SWIPES[direction]
    return f'do(action="Swipe", start=[{x0},{y0}], end=[{x1},{y1}])'


def finish(message: str) -> str:
    """`finish(...)` text."""
    return f'finish(message="{message}")'


@dataclass(frozen=True)
class Manner:
    """How questions are asked.

    Attributes:
        wording: templates.
        typed: gives a text to be typed, in a language.
        remark: gives a sentence beside the point, or None for none.
        noise: gives words without meaning, which are strewn into templates, or None for none.
    """

    wording: Wording
    typed: Callable[[random.Random, str], str]
    remark: Callable[[random.Random, str], str] | None = None
    noise: Callable[[random.Random, str], str] | None = None

    def pick(self, pair: Pair, rng: random.Random, *, anywhere: bool = True) -> tuple[str, str]:
        """A template and its language; with noise at its beginning, or, unless not `anywhere`, in it, too."""
        template, language = pick(pair, rng)
        if self.noise is not None and rng.random() < 0.3:
            template = strew(template, language, self.noise, rng, anywhere)
        return template, language

    def polish(self, text: str, language: str, rng: random.Random) -> str:
        """The text with politeness and punctuation around it."""
        return polish(text, language, self.wording, rng, self.remark)


def ask(screen: Screen, rng: random.Random, manner: Manner) -> Question:
    """Draw one question about a screen.

    On a screen with switches 35 % of the questions are about one. Of the rest 16 % need no picture, 9 % name
    something that is not on the screen, 5 % ask for the title and 70 % for a touch. A kind the screen
    cannot serve falls back to a touch.
    """
    has_switches = any(element.switch is not None for element in screen.elements)
    if has_switches and rng.random() < 0.35:
        return ask_toggle(screen, rng, manner) or _tap(screen, rng, manner)
    draw = rng.random()
    if draw < 0.16:
        return ask_blind(rng, manner)
    if draw < 0.25:
        return _absent(screen, rng, manner)
    if draw < 0.30:
        return _title(screen, rng, manner) or _tap(screen, rng, manner)
    return _tap(screen, rng, manner)


def ask_tap(screen: Screen, label: str, language: str, template: str = "{}") -> Question:
    """The question that asks to tap a given label with a given wording; used for fixed examples."""
    element = next(element for element in screen.elements if element.label == label)
    return _touch_question(screen, element, "Tap", template.format(_name(label, language)))


ACTION = re.compile(r'(?:do\(action="([^"]+)"|(finish)\(message=)')
POINT = re.compile(r"element=\[(\d+),(\d+)\]")


def action_type(answer: str) -> str | None:
    """Name of the action in an answer ("Tap", "finish", ...), None when there is none."""
    found = ACTION.search(answer)
    return (found.group(1) or found.group(2)) if found else None


def tapped_point(answer: str) -> Point | None:
    """The point an answer touches, None when it touches nothing."""
    found = POINT.search(answer)
    return (int(found.group(1)), int(found.group(2))) if found else None


def inside(point: Point | None, box: Box) -> bool:
    """Whether a point lies in a box, borders included."""
    return point is not None and box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _name(label: str, language: str) -> str:
    return CHINESE[label] if language == "zh" else label


def _touch_question(screen: Screen, element: Element, action: str, text: str) -> Question:
    box = box_of(element, screen)
    return Question("tap", text, element.label, touch(action, point_of(box)), box, element.label)


def _tap(screen: Screen, rng: random.Random, manner: Manner) -> Question:
    element = rng.choice([element for element in screen.elements if element.kind != "title"])
    draw = rng.random()
    action = "Tap" if draw < 0.84 else "Long Press" if draw < 0.92 else "Double Tap"
    wording = manner.wording
    phrase, language = manner.pick(
        wording.touch[element.kind] if action == "Tap" else wording.other_touch[action], rng
    )
    if action == "Tap" and manner.noise is not None and rng.random() < 0.12:
        # Whatever is said of a thing, without another verb that is known, asks for a tap.
        phrase = strew("{}", language, manner.noise, rng)
    text = manner.polish(phrase.format(_name(element.label, language)), language, rng)
    return _touch_question(screen, element, action, text)


def _absent(screen: Screen, rng: random.Random, manner: Manner) -> Question:
    touches = manner.wording.touch
    kinds = {element.kind for element in screen.elements} - {"title"}
    kind = rng.choice(sorted(kinds)) if rng.random() < 0.7 else rng.choice(list(touches))
    shown = {element.label for element in screen.elements}
    missing = [label for label in KIND_LABELS[kind] if label not in shown]
    if not missing:
        return _tap(screen, rng, manner)
    label = rng.choice(missing)
    phrase, language = manner.pick(touches[kind], rng)
    text = manner.polish(phrase.format(_name(label, language)), language, rng)
    return Question("absent", text, f"{label} is not here", swipe("up"), target=label)


def ask_toggle(screen: Screen, rng: random.Random, manner: Manner) -> Question | None:
    """Draw a question about a switch, or None on a screen without one."""
    switches = [element for element in screen.elements if element.switch is not None]
    if not switches:
        return None
    element = rng.choice(switches)
    is_on = element.state == "on"
    state = element.state
    think = f"{element.label} is {state}"
    chinese = CHINESE[element.label]
    draw = rng.random()
    if draw < 0.25:
        phrase, language = manner.pick(manner.wording.state, rng)
        text = phrase.format(_name(element.label, language))
        zh_state = "已开启" if is_on else "未开启"
        message = f"{chinese}{zh_state}" if language == "zh" else f"{element.label} is {state}"
        return Question("toggle", text, think, finish(message), target=element.label)
    wants_on = draw < 0.625
    phrase, language = manner.pick(manner.wording.turn_on if wants_on else manner.wording.turn_off, rng)
    text = manner.polish(phrase.format(_name(element.label, language)), language, rng)
    if wants_on == is_on:
        message = (
            f"{chinese}{'已开启' if is_on else '已关闭'}"
            if language == "zh"
            else f"{element.label} is already {state}"
        )
        return Question("toggle", text, think, finish(message), target=element.label)
    assert element.switch is not None
    box = box_of(Element("switch", element.label, element.switch, element.switch), screen)
    return Question("toggle", text, think, touch("Tap", point_of(box)), box, element.label)


def _title(screen: Screen, rng: random.Random, manner: Manner) -> Question | None:
    titles = [element.label for element in screen.elements if element.kind == "title"]
    if not titles:
        return None
    phrase, _ = manner.pick(manner.wording.title, rng)
    return Question("title", phrase, "The title", finish(titles[0]))


def ask_blind(rng: random.Random, manner: Manner) -> Question:
    """Draw a question whose answer does not depend on the picture."""
    return rng.choice((_swipe_question, _type_question, _launch_question, *[_fixed_question] * 4))(
        rng, manner
    )


def _swipe_question(rng: random.Random, manner: Manner) -> Question:
    direction = rng.choice(list(SWIPES))
    phrase, language = manner.pick(manner.wording.swipe, rng)
    text = phrase.format(SWIPES[direction][0] if language == "zh" else direction)
    return Question("blind", manner.polish(text, language, rng), f"Swipe {direction}", swipe(direction))


def _type_question(rng: random.Random, manner: Manner) -> Question:
    phrase, language = manner.pick(manner.wording.type, rng, anywhere=False)
    typed = manner.typed(rng, language)
    return Question("blind", phrase.format(typed), "Type", f'do(action="Type", text="{typed}")')


def _launch_question(rng: random.Random, manner: Manner) -> Question:
    label = rng.choice(list(APPS))
    phrase, language = manner.pick(manner.wording.launch, rng)
    name = _name(label, language)
    text = manner.polish(phrase.format(name), language, rng)
    return Question("blind", text, "Launch", f'do(action="Launch", app="{name}")')


def _fixed_question(rng: random.Random, manner: Manner) -> Question:
    action = rng.choice(list(FIXED))
    phrase, language = manner.pick(manner.wording.fixed[action], rng)
    return Question("blind", manner.polish(phrase, language, rng), *FIXED[action])


FIXED: dict[str, tuple[str, str]] = {
    "Back": ("Back", 'do(action="Back")'),
    "Home": ("Home", 'do(action="Home")'),
    "Wait": ("Wait", 'do(action="Wait", duration="2 seconds")'),
    "finish": ("Done", finish("Done")),
}
"""Thought and action of instructions that are always answered alike."""
