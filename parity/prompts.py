"""The prompts that are put to both models: a fixed set made from a seed, or a file of one's own.

In: "small" or "full" and a seed, or a path. Out: `Question`s, each with a name whose first word is its group:
text, image (one), images (several), long, tap (a drawn screen and a label to touch, with the box to hit) and
agent (system prompt, history and a screen, as a phone agent sends them). Half Chinese, half English. Knows
nothing of tokens and models.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from autoglm_edge.errors import PromptError
from autoglm_edge.runtime.prompt.questions import Question as Question
from autoglm_edge.runtime.prompt.questions import read_questions

from .screens import Size, draw_dialog, draw_list, draw_shapes

PROMPT_SETS = ("small", "full")
DEFAULT_SEED = 20261122
SCREEN_SIZES: tuple[Size, ...] = ((360, 800), (720, 1600), (1080, 2400), (1440, 900))

TEXTS = {
    "en": (
        "Explain in two sentences why a phone gets warm while it charges.",
        "Write a short, polite message that moves a meeting from Monday to Thursday at 3 pm.",
        "Which of these is the largest: 3.11, 3.9, 0.399? Answer with the number alone.",
        'Return JSON with the keys "city" and "country" for the capital of France.',
        "List three things to check when a screen stays black.",
        "Translate into Chinese: the battery is almost empty, please plug in the charger.",
    ),
    "zh": (
        "用两句话说明手机充电时为什么会发热。",
        "写一条简短礼貌的消息，把周一的会议改到周四下午三点。",
        "3.11、3.9 和 0.399 哪个最大？只回答数字。",
        "列出屏幕不亮时要检查的三件事。",
        "把这句话译成英文：电量快用完了，请接上充电器。",
        "北京到上海坐高铁大约要多久？",
    ),
}
IMAGE_QUESTIONS = {
    "en": (
        "Describe this picture.",
        "Which colours do you see, from left to right?",
        "What is written at the top?",
    ),
    "zh": ("描述这张图片。", "从左到右有哪些颜色？", "最上面写着什么？"),
}
COMPARE = {"en": "What is different between these pictures?", "zh": "这几张图片有什么不同？"}
TAPS = {"en": "Tap {}", "zh": "点击{}"}
SYSTEMS = {
    "en": (
        "You operate a phone. You are given a task and a screenshot, and answer with one step.\n"
        "Points are written as [x,y], each from 0 to 999: [0,0] is the upper left corner, [999,999] the "
        "lower right.\nAnswer as <think>why</think><answer>step</answer>, where step is one of\n"
        'do(action="Tap", element=[x,y])\ndo(action="Swipe", start=[x,y], end=[x,y])\n'
        'do(action="Type", text="words")\ndo(action="Launch", app="name")\ndo(action="Long Press", '
        'element=[x,y])\ndo(action="Back")\ndo(action="Home")\ndo(action="Wait", duration="2 seconds")\n'
        'finish(message="what was done")\nDo not repeat a step that changed nothing.\n'
    ),
    "zh": (
        "你来操作一部手机。每次给你一个任务和一张屏幕截图，请回答下一步。\n坐标写作 [x,y]，"
        "取值 0 到 999：左上角是 [0,0]，右下角是 [999,999]。\n"
        "按 <think>理由</think><answer>步骤</answer> 的格式"
        "回答，步骤是下列之一：\n"
        'do(action="Tap", element=[x,y])\ndo(action="Swipe", start=[x,y], end=[x,y])\n'
        'do(action="Type", text="文字")\ndo(action="Launch", app="应用名")\ndo(action="Back")\n'
        'do(action="Home")\nfinish(message="结果")\n没有效果的步骤不要重复。\n'
    ),
}
PARAGRAPHS = (
    "The manual of the phone says that the battery lasts longer when it is charged to eighty percent. ",
    "A lamp next to the door shows whether the network is up; it blinks while an update is being installed. ",
    "如果应用没有响应，先等待几秒钟，再从最近任务中关闭它并重新打开。",
    "Photos taken today are kept in the folder Camera, those from chats in the folder Downloads. ",
    "通知会按时间排列在屏幕顶部，向左滑动可以删除一条，长按可以更改它的提醒方式。",
    "The second account was added in March and has its own calendar, whose entries are shown in green. ",
    "存储空间不足时，系统会提示清理缓存；照片和视频可以先备份到电脑上。",
    "Maps can be saved for use without a network; an area the size of a town takes about forty megabytes. ",
)


def make_prompts(name: str, seed: int = DEFAULT_SEED) -> list[Question]:
    """A set by name, or the questions of a file.

    Args:
        name: "small" (12 prompts on small pictures, for a quick check), "full" (96, with pictures up to
            1080 x 2400 and longer texts) or the path of a file; see `read_prompts`.
        seed: of the drawing and the choices; a file has no use for it.

    Raises:
        PromptError: no set and no file of that name, or a file that cannot be used.
    """
    if name not in PROMPT_SETS:
        return read_prompts(Path(name))
    full = name == "full"
    questions = []
    for number in range(6 if full else 1):
        for language in ("en", "zh"):
            rng = random.Random(f"{seed}:{number}:{language}")
            size = SCREEN_SIZES[number % len(SCREEN_SIZES)] if full else SCREEN_SIZES[0]
            questions += _round(rng, language, number, size, 6000 if full else 900)
    for number in range(12 if full else 0):  # pointing is what users judge by
        for language in ("en", "zh"):
            rng = random.Random(f"{seed}:tap:{number}:{language}")
            questions.append(_tap(rng, language, number + 10, SCREEN_SIZES[number % 3]))
    return questions


def _round(rng: random.Random, language: str, number: int, size: Size, characters: int) -> list[Question]:
    """One prompt of every group."""
    tail = f"{language}-{number:02d}"
    side = (rng.randrange(90, 400), rng.randrange(90, 400))
    screen = draw_list(rng, size)
    pictures = [
        draw_shapes(rng, side),
        draw_shapes(rng, side[::-1]),
        draw_dialog(rng, SCREEN_SIZES[0]).image,
    ]
    return [
        Question(f"text-{tail}", _user(TEXTS[language][number % 6])),
        Question(f"image-{tail}", _user(IMAGE_QUESTIONS[language][number % 3], pictures[0])),
        Question(f"images-{tail}", _user(COMPARE[language], *pictures[: 2 + number % 2])),
        Question(f"long-{tail}", _user(_long(rng, characters) + "\n" + TEXTS[language][(number + 1) % 6])),
        _tap(rng, language, number, size),
        Question(f"agent-{tail}", _agent(rng, language, screen.image)),
    ]


def _tap(rng: random.Random, language: str, number: int, size: Size) -> Question:
    screen = (draw_dialog if rng.random() < 0.3 else draw_list)(rng, size)
    label = rng.choice(sorted(screen.boxes))
    system = {"role": "system", "content": SYSTEMS[language]}
    messages = (system, *_user(TAPS[language].format(label), screen.image))
    return Question(f"tap-{language}-{number:02d}", messages, box=screen.boxes[label])


def _agent(rng: random.Random, language: str, image: Any) -> tuple[dict[str, Any], ...]:
    """System prompt, a first step without its picture, and the screen after it, as agents send them."""
    task = {"en": "Open the settings and turn on {}", "zh": "打开设置，开启{}"}[language]
    facts = json.dumps({"current_app": rng.choice(("Settings", "Launcher", "设置"))}, ensure_ascii=False)
    thought = {"en": "The settings are on the home screen.", "zh": "设置在桌面上。"}[language]
    point = f"[{rng.randrange(100, 900)},{rng.randrange(100, 900)}]"
    answer = f'<think>{thought}</think><answer>do(action="Tap", element={point})</answer>'
    return (
        {"role": "system", "content": SYSTEMS[language]},
        {"role": "user", "content": [_text(f"{task.format('Bluetooth')}\n\n{facts}")]},
        {"role": "assistant", "content": answer},
        *_user(f"** Screen Info **\n\n{facts}", image),
    )


def _long(rng: random.Random, characters: int) -> str:
    text = ""
    while len(text) < characters:
        text += rng.choice(PARAGRAPHS)
    return text


def _user(text: str, *images: Any) -> tuple[dict[str, Any], ...]:
    """One user turn, pictures first."""
    parts = [{"type": "image", "image": image} for image in images]
    return ({"role": "user", "content": [*parts, _text(text)]},)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def read_prompts(path: Path) -> list[Question]:
    """Prompts of one's own: all of `runtime.questions.read_questions`.

    Raises:
        PromptError: no such file, or not one of this kind.
        ImageError: a picture cannot be read.
        RequestError: a message is wrong.
    """
    if not path.is_file():
        raise PromptError(
            f"there is no prompt set {str(path)!r}: it is neither {' nor '.join(PROMPT_SETS)}, nor a file"
        )
    return list(read_questions(path))
