"""Instructions about a synthetic screen and the answers an Open-AutoGLM agent would expect.

In: the elements of a `pocket_screens.Screen` and a seeded `random.Random`. Out: `Question` records, Chinese
or English, whose answer is `<think>…</think><answer>do(…)</answer>` or `…finish(…)</answer>`. Points are on
the 0-999 scale of the client, rounded to tens and never below 100, so each number has three digits and no
leading zero (the client reads them as Python). This module knows nothing of pixels or tokens.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pocket_screens import Element, Screen
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
    TYPED_TEXTS,
)

Box = tuple[int, int, int, int]
Point = tuple[int, int]

SWIPES: dict[str, tuple[str, Point, Point]] = {
    "up": ("上", (500, 800), (500, 300)),
    "down": ("下", (500, 300), (500, 800)),
    "left": ("左", (800, 500), (200, 500)),
    "right": ("右", (200, 500), (800, 500)),
}

# What a person may call a thing of each kind; {} is the label in the same language.
TAP_PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "app": (
        ("打开{}", "打开{}", "打开{}应用", "点击{}图标", "点开{}", "进入{}"),
        ("Open {}", "Open {}", "Open the {} app", "Tap {}", "Tap the {} icon", "Go to {}"),
    ),
    "row": (
        ("点击{}", "进入{}", "打开{}设置", "进入{}选项"),
        ("Tap {}", "Go to {}", "Open the {} settings", "Select the {} row"),
    ),
    "button": (
        ("点击{}", "点击{}按钮", "按{}", "选择{}"),
        ("Tap {}", "Press {}", "Tap the {} button", "Choose {}"),
    ),
    "field": (
        ("点击{}", "点击{}输入框", "选中{}输入框", "点击{}一栏"),
        ("Tap {}", "Tap the {} field", "Select the {} field", "Focus the {} box"),
    ),
    "person": (
        ("点击{}", "打开与{}的聊天", "进入{}的对话"),
        ("Tap {}", "Open the chat with {}", "Go to the chat with {}"),
    ),
    "icon": (
        ("点击{}", "点击{}图标", "点击{}按钮"),
        ("Tap {}", "Tap the {} icon", "Tap the {} button"),
    ),
}
OTHER_TAPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Long Press": (("长按{}", "按住{}"), ("Long press {}", "Press and hold {}")),
    "Double Tap": (("双击{}", "连点两下{}"), ("Double tap {}", "Tap {} twice")),
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


def ask(screen: Screen, rng: random.Random) -> Question:
    """Draw one question about a screen.

    On a screen with switches 35 % of the questions are about one. Of the rest 16 % need no picture, 9 % name
    something that is not on the screen, 5 % ask for the title and 70 % for a touch. A kind the screen
    cannot serve falls back to a touch.
    """
    has_switches = any(element.switch is not None for element in screen.elements)
    if has_switches and rng.random() < 0.35:
        return ask_toggle(screen, rng) or _tap(screen, rng)
    draw = rng.random()
    if draw < 0.16:
        return _blind(screen, rng)
    if draw < 0.25:
        return _absent(screen, rng)
    if draw < 0.30:
        return _title(screen, rng) or _tap(screen, rng)
    return _tap(screen, rng)


def ask_toggle(screen: Screen, rng: random.Random) -> Question | None:
    """Draw a question about a switch, or None on a screen without one."""
    return _toggle(screen, rng)


def ask_tap(screen: Screen, label: str, language: str, template: str = "{}") -> Question:
    """The question that asks to tap a given label with a given wording; used for fixed examples."""
    element = next(element for element in screen.elements if element.label == label)
    return _touch_question(screen, element, "Tap", template.format(_name(label, language)))


def with_current_app(text: str, app: str) -> str:
    """Append the screen facts as Open-AutoGLM does on the first turn."""
    return f"{text}\n\n{json.dumps({'current_app': app}, ensure_ascii=False)}"


def decorate(text: str, rng: random.Random) -> str:
    """Text part of a user turn as clients send it: some with screen facts, some a line below the image."""
    if rng.random() < 0.3:
        app = rng.choice(("System Home", rng.choice(list(APPS)), APPS[rng.choice(list(APPS))].chinese))
        text = with_current_app(text, app)
    return "\n" + text if rng.random() < 0.2 else text


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


def _pick(phrases: tuple[Sequence[str], Sequence[str]], rng: random.Random) -> tuple[str, str]:
    language = rng.choice(("zh", "en"))
    return rng.choice(phrases[0] if language == "zh" else phrases[1]), language


def _polish(text: str, language: str, rng: random.Random) -> str:
    """Vary politeness, final punctuation and capitals."""
    draw = rng.random()
    if language == "zh":
        text = f"请{text}" if draw < 0.12 else f"帮我{text}" if draw < 0.2 else text
        return text + "。" if rng.random() < 0.12 else text
    lowered = text[0].lower() + text[1:]
    text = f"Please {lowered}" if draw < 0.12 else f"Can you {lowered}?" if draw < 0.2 else text
    if rng.random() < 0.12 and not text.endswith("?"):
        text += "."
    return text.lower() if rng.random() < 0.1 else text


def _touch_question(screen: Screen, element: Element, action: str, text: str) -> Question:
    box = box_of(element, screen)
    return Question("tap", text, element.label, touch(action, point_of(box)), box, element.label)


def _tap(screen: Screen, rng: random.Random) -> Question:
    element = rng.choice([element for element in screen.elements if element.kind != "title"])
    draw = rng.random()
    action = "Tap" if draw < 0.84 else "Long Press" if draw < 0.92 else "Double Tap"
    phrases = TAP_PHRASES[element.kind] if action == "Tap" else OTHER_TAPS[action]
    phrase, language = _pick(phrases, rng)
    text = _polish(phrase.format(_name(element.label, language)), language, rng)
    return _touch_question(screen, element, action, text)


def _absent(screen: Screen, rng: random.Random) -> Question:
    kinds = {element.kind for element in screen.elements} - {"title"}
    kind = rng.choice(sorted(kinds)) if rng.random() < 0.7 else rng.choice(list(TAP_PHRASES))
    shown = {element.label for element in screen.elements}
    missing = [label for label in KIND_LABELS[kind] if label not in shown]
    if not missing:
        return _tap(screen, rng)
    label = rng.choice(missing)
    phrase, language = _pick(TAP_PHRASES[kind], rng)
    text = _polish(phrase.format(_name(label, language)), language, rng)
    return Question("absent", text, f"{label} is not here", swipe("up"), target=label)


def _toggle(screen: Screen, rng: random.Random) -> Question | None:
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
        phrase, language = _pick((("{}开着吗？", "{}是否开启"), ("Is {} on?", "Check whether {} is on")), rng)
        text = phrase.format(_name(element.label, language))
        zh_state = "已开启" if is_on else "未开启"
        message = f"{chinese}{zh_state}" if language == "zh" else f"{element.label} is {state}"
        return Question("toggle", text, think, finish(message), target=element.label)
    wants_on = draw < 0.625
    phrases = (
        (("打开{}", "开启{}"), ("Turn on {}", "Enable {}", "Switch {} on"))
        if wants_on
        else (("关闭{}", "关掉{}"), ("Turn off {}", "Disable {}", "Switch {} off"))
    )
    phrase, language = _pick(phrases, rng)
    text = _polish(phrase.format(_name(element.label, language)), language, rng)
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


def _title(screen: Screen, rng: random.Random) -> Question | None:
    titles = [element.label for element in screen.elements if element.kind == "title"]
    if not titles:
        return None
    phrase, _ = _pick(
        (
            ("这个页面的标题是什么？", "页面标题是什么"),
            ("What is the title of this page?", "Read the page title"),
        ),
        rng,
    )
    return Question("title", phrase, "The title", finish(titles[0]))


def _swipe_question(rng: random.Random) -> Question:
    direction = rng.choice(list(SWIPES))
    phrase, language = _pick((("向{}滑动", "往{}滑一下"), ("Swipe {}", "Swipe {} once")), rng)
    text = _polish(phrase.format(SWIPES[direction][0] if language == "zh" else direction), language, rng)
    return Question("blind", text, f"Swipe {direction}", swipe(direction))


def _type_question(rng: random.Random) -> Question:
    typed = rng.choice(TYPED_TEXTS)
    phrase, _ = _pick((("输入{}", "在输入框里输入{}"), ("Type {}", "Enter the text {}")), rng)
    return Question("blind", phrase.format(typed), "Type", f'do(action="Type", text="{typed}")')


def _launch_question(rng: random.Random) -> Question:
    label = rng.choice(list(APPS))
    phrase, language = _pick((("启动{}", "启动{}应用"), ("Launch {}", "Launch the {} app")), rng)
    name = _name(label, language)
    return Question(
        "blind", _polish(phrase.format(name), language, rng), "Launch", f'do(action="Launch", app="{name}")'
    )


def _fixed_question(
    think: str, action: str, chinese: tuple[str, ...], english: tuple[str, ...]
) -> Callable[[random.Random], Question]:
    def build(rng: random.Random) -> Question:
        phrase, language = _pick((chinese, english), rng)
        return Question("blind", _polish(phrase, language, rng), think, action)

    return build


BLIND: tuple[Callable[[random.Random], Question], ...] = (
    _swipe_question,
    _type_question,
    _launch_question,
    _fixed_question(
        "Back",
        'do(action="Back")',
        ("返回", "返回上一页", "后退"),
        ("Go back", "Return to the previous page"),
    ),
    _fixed_question(
        "Home", 'do(action="Home")', ("回到桌面", "返回主屏幕"), ("Go to the home screen", "Return home")
    ),
    _fixed_question(
        "Wait",
        'do(action="Wait", duration="2 seconds")',
        ("等待两秒", "等待页面加载"),
        ("Wait two seconds", "Wait for the page"),
    ),
    _fixed_question(
        "Done", finish("Done"), ("结束任务", "任务完成了"), ("Finish the task", "The task is done")
    ),
)
"""Questions whose answer does not depend on the picture."""


def _blind(screen: Screen, rng: random.Random) -> Question:
    del screen
    return rng.choice(BLIND)(rng)
