"""The data the pocket model is trained on: screens, questions, answers and packed rows."""

from __future__ import annotations

import ast
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("PIL")
from pocket_canvas import Screen, render  # noqa: E402
from pocket_clients import FORMS, HELD_OUT, TRAINED, converse  # noqa: E402
from pocket_pool import GRIDS  # noqa: E402
from pocket_questions import (  # noqa: E402
    Question,
    action_type,
    ask,
    ask_toggle,
    box_of,
    inside,
    point_of,
    tapped_point,
)
from pocket_screens import KINDS, make_screen  # noqa: E402
from pocket_vocabulary import CHINESE, LABELS  # noqa: E402

SCREENS = 60
ACTIONS = {"Tap", "Long Press", "Double Tap", "Swipe", "Type", "Back", "Home", "Launch", "Wait", "finish"}


@pytest.fixture(scope="module")
def screens() -> list[Screen]:
    return [make_screen(f"unit:{index}") for index in range(SCREENS)]


@pytest.fixture(scope="module")
def questions(screens: list[Screen]) -> list[Question]:
    rng = random.Random(0)
    return [ask(screen, rng, TRAINED.manner) for screen in screens for _ in range(30)]


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
    assert ask(first, random.Random(3), TRAINED.manner) == ask(second, random.Random(3), TRAINED.manner)


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
    lists = (make_screen(f"t:{i}", "list") for i in range(80))
    asked = [(s, q) for s in lists if (q := ask_toggle(s, rng, TRAINED.manner))]

    assert len(asked) > 40
    for screen, question in asked:
        label, state = question.think.split(" is ")
        element = next(element for element in screen.elements if element.label == label)
        assert element.state == state
        verb = re.search(r"(?i)\bon\b|enable|\bactivate|打开|开启|启用|开着", question.text)
        asks = re.search(r"(?i)^is |check|tell|what|吗|是否|看看|检查", question.text)
        if question.box is not None:
            assert not asks
            assert state == ("off" if verb else "on")


def test_text_parts_sometimes_carry_screen_facts_and_a_line_break() -> None:
    rng = random.Random(2)
    texts = [TRAINED.decorate("打开设置", rng) for _ in range(200)]

    assert "打开设置" in texts
    assert any(text.startswith("\n") for text in texts)
    assert any(re.fullmatch(r'\n?打开设置\n\n\{"current_app": "[^"]+"\}', text) for text in texts)


def test_held_out_wordings_and_prompts_share_nothing_with_the_trained_ones() -> None:
    def templates(wording: object) -> set[str]:
        pairs = [
            pair
            for value in vars(wording).values()
            for pair in (value.values() if hasattr(value, "values") else [value])
        ]
        return {template for pair in pairs for side in pair for template in side}

    def parts(style: object) -> set[str]:
        languages = (style.source.chinese, style.source.english)  # type: ignore[attr-defined]
        fields = ("roles", "formats", "notes", "rules", "remarks", "headings", "words")
        return {part for language in languages for field in fields for part in getattr(language, field)}

    shared = templates(HELD_OUT.manner.wording) & templates(TRAINED.manner.wording)
    assert not shared
    assert not parts(HELD_OUT) & parts(TRAINED)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_request_is_what_it_says(form: str) -> None:
    found = [
        made
        for index in range(30)
        if (made := converse(form, make_screen(f"form:{index}", "list"), random.Random(index), len))
    ]

    assert len(found) > 10
    for made in found:
        assert bool(made.history) == (form in ("tasks", "steps"))
        assert form not in ("system-zh", "system-en") or len(made.system or "") >= 2000
        if form == "steps":
            assert made.question.text in made.history[0].user and made.question.text not in made.text
        elif form != "plain":
            assert made.question.text in made.text
        assert form != "toggles" or made.question.kind == "toggle"


def test_texts_to_be_typed_do_not_break_the_answer() -> None:
    rng = random.Random(5)

    for style in (TRAINED, HELD_OUT):
        for _ in range(300):
            text = style.manner.typed(rng, rng.choice(("zh", "en")))
            assert text and ast.literal_eval(f'"{text}"') == text


def _tokenizer() -> Any:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(ROOT / "autoglm_edge" / "pocket")


@pytest.mark.parametrize("has_history", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_packed_rows_hold_the_text_the_chat_template_gives(grid: Any, has_history: bool) -> None:
    tokenizer = _tokenizer()
    from pocket_rows import RowMaker

    maker = RowMaker(tokenizer)
    lesson = maker.lesson(grid, random.Random(3), float(has_history), 300)
    row = maker.make(make_screen("row"), random.Random(4), lesson)
    number = len(row.questions)
    question = row.questions[-1]
    mine = row.ids[(row.segments == 0) | (row.segments == number)]
    text = tokenizer.decode([*lesson.prefix, *mine])

    picture = "<|begin_of_image|>" + "<|image|>" * grid.cells + "<|end_of_image|>"
    assert text.count(picture) == 1
    turns: list[dict[str, object]] = []
    for part in text.replace(picture, "<IMAGE>").split("<|")[1:]:
        role, _, content = part.partition("|>\n")
        plain = content.removeprefix("<IMAGE>")
        image = [{"type": "image"}] if plain != content else []
        turns.append({"role": role, "content": [*image, {"type": "text", "text": plain}]})
    last = turns.pop()
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    shown = prompt.replace("<|image|>", "<|image|>" * grid.cells)
    assert last["role"] == "assistant"
    assert text == shown + question.answer.removesuffix("</answer>")
    assert len(turns) > 2 or not has_history


def test_positions_of_packed_rows_are_those_of_the_runtime() -> None:
    tokenizer = _tokenizer()
    import numpy as np
    from pocket_rows import RowMaker
    from pocket_tokenizer import TOKEN_IDS

    from autoglm_edge.runtime.prompt.positions import image_positions

    maker, grid = RowMaker(tokenizer), GRIDS[0]
    lesson = maker.lesson(grid, random.Random(3), 1.0, 300)
    row = maker.make(make_screen("row"), random.Random(4), lesson)
    mine = (row.segments == 0) | (row.segments == len(row.questions))
    ids = np.concatenate([lesson.prefix, row.ids[mine]])

    expected, _ = image_positions(ids, [(1, 2 * grid.rows, 2 * grid.columns)], TOKEN_IDS["<|image|>"], 2)
    own = np.broadcast_to(np.arange(len(lesson.prefix)), (3, len(lesson.prefix)))
    np.testing.assert_array_equal(np.concatenate([own, row.positions[:, mine]], axis=1), expected)


def test_cells_name_nearly_every_element(screens: list[Screen]) -> None:
    pytest.importorskip("numpy")
    from pocket_pool import BACKGROUND, cell_labels

    shown = seen = 0
    for screen in screens:
        classes = set(cell_labels(screen, GRIDS[-1])[:, 0]) - {BACKGROUND}
        shown += len(screen.elements)
        seen += len(classes)
    assert seen > 0.98 * shown


def test_pointers_sit_on_the_last_token_of_the_label_a_thought_begins_with() -> None:
    tokenizer = _tokenizer()
    from pocket_rows import ABSENT, RowMaker

    maker = RowMaker(tokenizer)
    row = maker.make(make_screen("row"), random.Random(4), maker.lesson(GRIDS[0], random.Random(0), 0.0, 40))

    named = 0
    for question, (place, label) in zip(row.questions, row.pointers, strict=False):
        if question.target is None:
            continue
        named += 1
        assert question.think.startswith(question.target)
        assert tokenizer.decode(row.ids[: place + 1]).endswith(f"<think>{question.target}")
        assert label == (ABSENT if question.kind == "absent" else LABELS.index(question.target))
    assert named
