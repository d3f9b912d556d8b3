"""The data the pocket model is trained on: screens, questions, answers and packed rows."""

from __future__ import annotations

import ast
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("PIL")
from pocket_questions import (  # noqa: E402
    Question,
    action_type,
    ask,
    ask_toggle,
    box_of,
    decorate,
    inside,
    point_of,
    tapped_point,
)
from pocket_screens import KINDS, Screen, make_screen, render  # noqa: E402
from pocket_vocabulary import CHINESE, LABELS  # noqa: E402

SCREENS = 60
ACTIONS = {"Tap", "Long Press", "Double Tap", "Swipe", "Type", "Back", "Home", "Launch", "Wait", "finish"}


@pytest.fixture(scope="module")
def screens() -> list[Screen]:
    return [make_screen(f"unit:{index}") for index in range(SCREENS)]


@pytest.fixture(scope="module")
def questions(screens: list[Screen]) -> list[Question]:
    rng = random.Random(0)
    return [ask(screen, rng) for screen in screens for _ in range(30)]


def test_every_touch_lies_inside_its_target(questions: list[Question]) -> None:
    touches = [question for question in questions if question.box]

    assert len(touches) > 500
    assert all(question.box and inside(tapped_point(question.answer), question.box) for question in touches)


def test_every_coordinate_has_three_digits_and_ends_in_zero(questions: list[Question]) -> None:
    numbers = [number for question in questions for number in re.findall(r"(?<=[\[,])\d+", question.action)]

    assert numbers
    assert all(re.fullmatch(r"[1-9]\d0", number) for number in numbers)


def test_answers_are_python_calls_with_literal_arguments(questions: list[Question]) -> None:
    for question in questions:
        call = ast.parse(question.action, mode="eval").body

        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        assert call.func.id in ("do", "finish")
        assert not call.args
        assert all(ast.literal_eval(keyword.value) for keyword in call.keywords)


def test_answers_think_then_act_and_end_with_the_terminator(questions: list[Question]) -> None:
    for question in questions:
        assert re.fullmatch(r"<think>[^<]+</think><answer>(do|finish)\(.*\)</answer>", question.answer)
        assert action_type(question.answer) in ACTIONS


def test_all_actions_and_both_languages_occur(questions: list[Question]) -> None:
    assert {action_type(question.answer) for question in questions} == ACTIONS
    assert sum(question.text.isascii() for question in questions) > len(questions) / 4
    assert sum(not question.text.isascii() for question in questions) > len(questions) / 4


def test_same_seed_gives_the_same_screen_picture_and_questions() -> None:
    first, second = make_screen("again"), make_screen("again")

    assert first == second
    assert render(first).tobytes() == render(second).tobytes()
    assert ask(first, random.Random(3)) == ask(second, random.Random(3))


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_pictures_have_the_size_of_the_screen(scale: int) -> None:
    screen = make_screen("size")

    assert render(screen, scale).size == (screen.width * scale, screen.height * scale)


def test_elements_are_on_the_screen_and_named_once(screens: list[Screen]) -> None:
    for screen in screens:
        labels = [element.label for element in screen.elements]
        assert len(set(labels)) == len(labels)
        for element in screen.elements:
            x0, y0, x1, y1 = element.box
            assert 0 <= x0 < x1 <= screen.width and 0 <= y0 < y1 <= screen.height
            assert inside(point_of(box_of(element, screen)), box_of(element, screen))


def test_all_screen_kinds_occur(screens: list[Screen]) -> None:
    assert {screen.kind for screen in screens} == set(KINDS)


def test_labels_name_one_thing_each() -> None:
    assert len(LABELS) == len(set(LABELS)) == len(CHINESE)


def test_switch_questions_follow_the_state() -> None:
    rng = random.Random(1)
    asked = [(s, q) for s in (make_screen(f"t:{i}", "list") for i in range(80)) if (q := ask_toggle(s, rng))]

    assert len(asked) > 40
    for screen, question in asked:
        label, state = question.think.split(" is ")
        element = next(element for element in screen.elements if element.label == label)
        assert element.state == state
        wants_on = any(
            word in question.text.lower() for word in ("turn on", "enable", "switch", "打开", "开启")
        )
        if question.box is not None and "off" not in question.text.lower() and wants_on:
            assert state == "off"


def test_text_parts_sometimes_carry_screen_facts_and_a_line_break() -> None:
    rng = random.Random(2)
    texts = [decorate("打开设置", rng) for _ in range(200)]

    assert "打开设置" in texts
    assert any(text.startswith("\n") for text in texts)
    assert any(re.fullmatch(r'\n?打开设置\n\n\{"current_app": "[^"]+"\}', text) for text in texts)


def test_packed_rows_hold_the_text_the_chat_template_gives() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from pocket_pool import NUM_CELLS
    from pocket_rows import RowMaker

    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "autoglm_edge" / "pocket")
    row = RowMaker(tokenizer).make(make_screen("row"), random.Random(4), max_questions=2)
    question = row.questions[1]
    ids = row.ids[(row.segments == 0) | (row.segments == 2)]
    text = tokenizer.decode(ids)

    head, body = text.split("<|image|>" * NUM_CELLS)
    system = head.partition("<|system|>\n")[2].partition("<|user|>")[0]
    body = body.removeprefix("<|end_of_image|>").partition("<|assistant|>")[0]
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": body}]})
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == prompt.replace("<|image|>", "<|image|>" * NUM_CELLS) + question.answer.removesuffix(
        "</answer>"
    )
    assert question.text in body


def test_cells_name_nearly_every_element(screens: list[Screen]) -> None:
    pytest.importorskip("numpy")
    from pocket_pool import BACKGROUND, cell_labels

    shown = seen = 0
    for screen in screens:
        classes = set(cell_labels(screen)[:, 0]) - {BACKGROUND}
        shown += len(screen.elements)
        seen += len(classes)
    assert seen > 0.98 * shown


def test_pointers_sit_on_the_last_token_of_the_label_a_thought_begins_with() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from pocket_rows import ABSENT, RowMaker

    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "autoglm_edge" / "pocket")
    row = RowMaker(tokenizer).make(make_screen("row"), random.Random(4))

    named = 0
    for question, (place, label) in zip(row.questions, row.pointers, strict=False):
        if question.target is None:
            continue
        named += 1
        assert question.think.startswith(question.target)
        assert tokenizer.decode(row.ids[: place + 1]).endswith(f"<think>{question.target}")
        assert label == (ABSENT if question.kind == "absent" else LABELS.index(question.target))
    assert named
