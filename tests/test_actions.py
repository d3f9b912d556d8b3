import ast
import re
import string

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from autoglm_edge.runtime.actions import REQUIRED, Action, parse_action, parse_thinking, to_pixels


@pytest.mark.parametrize(
    ("text", "kind", "arguments"),
    [
        ('do(action="Tap", element=[499,120])', "Tap", {"element": (499, 120)}),
        ("do(action='Tap',element=[ 0 , 999 ])", "Tap", {"element": (0, 999)}),
        ('do(action="Tap", element=(7, 8), message="Pay?")', "Tap", {"element": (7, 8), "message": "Pay?"}),
        ('do(action="Long Press", element=[1,2])', "Long Press", {"element": (1, 2)}),
        ('do(action="Double Tap", element=[1,2])', "Double Tap", {"element": (1, 2)}),
        (
            'do(action="Swipe", start=[500,800], end=[500,200])',
            "Swipe",
            {"start": (500, 800), "end": (500, 200)},
        ),
        ('do(action="Launch", app="京东")', "Launch", {"app": "京东"}),
        ('do(action="Type", text="")', "Type", {"text": ""}),
        ('do(action="Type_Name", text="张三")', "Type_Name", {"text": "张三"}),
        ('do(action="Interact")', "Interact", {}),
        ('do(action="Note", message="True")', "Note", {"message": "True"}),
        ('do(action="Call_API", instruction="sum up")', "Call_API", {"instruction": "sum up"}),
        ('do(action="Take_over", message="log in")', "Take_over", {"message": "log in"}),
        ('do(action="Back")', "Back", {}),
        ('do(action="Home" )', "Home", {}),
        ('do(action="Wait", duration="2 seconds")', "Wait", {"duration": "2 seconds"}),
        ('do(action="Wait", duration=1.5)', "Wait", {"duration": 1.5}),
        ('finish(message="done")', "finish", {"message": "done"}),
    ],
)
def test_every_kind_of_action_is_read(text, kind, arguments):
    action = parse_action(text)

    assert action == Action(kind, tuple(arguments.items()))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "<answer>{}</answer>",
        "<think>Open the settings.</think>\n<answer>{}",
        "<think>a</think><answer>{}</answer>\n",
        "<think><think>a</think>\n<answer></think><answer>{}</answer>",
        "noise 12 ){{( {}",
        "{}\n\nThat will open it.",
        "{}<|user|>",
        '{}\ndo(action="Back")',
    ],
)
@pytest.mark.parametrize(
    "action",
    [
        'do(action="Type", text="he said "hi", (and) left)")',
        'do(action="Tap", element=[10,20])',
        'do(action="Launch", app="设置")',
    ],
)
def test_an_action_is_found_among_tags_and_noise(text, action):
    assert str(parse_action(text.format(action))) == action


@pytest.mark.parametrize(
    ("inner", "typed"),
    [
        ('say "hi"', 'say "hi"'),
        ("line\nline", "line\nline"),
        ("f(x), g(y)", "f(x), g(y)"),
        (r"a \"quoted\" word", r"a \"quoted\" word"),
        (r"back\slash\n", r"back\slash\n"),
        ("it's", "it's"),
        ('") and ("', '") and ("'),
        ("[1,2]", "[1,2]"),
        ("他说：“好”，然后走了。", "他说：“好”，然后走了。"),
    ],
)
def test_typed_and_final_text_is_taken_as_it_stands(inner, typed):
    assert parse_action(f'do(action="Type", text="{inner}")').text == typed
    assert parse_action(f'<think>x</think><answer>finish(message="{inner}")</answer>').text == typed


def test_escapes_are_resolved_in_other_texts_as_the_client_does():
    assert parse_action(r'do(action="Take_over", message="a \"b\"\n\\c \d")').text == 'a "b"\n\\c \\d'


AMBIGUOUS = re.compile(r'"\s*,?\s*\)|"\s*,|</answer>|finish\(message=|do\(action=|\\$|\\"')


@given(st.text(max_size=40))
@example('"')
@example('a" b "')
@example("a)")
def test_any_text_that_leaves_no_doubt_comes_back_as_it_was(text):
    assume(not AMBIGUOUS.search(text))

    assert parse_action(f'do(action="Type", text="{text}")').text == text
    assert parse_action(f'finish(message="{text}")').text == text


@given(st.text(string.printable, max_size=20), st.sampled_from(["Launch", "Take_over", "Note"]))
def test_other_texts_are_read_as_python_reads_them(text, kind):
    name = "app" if kind == "Launch" else "message"
    assume(text and not AMBIGUOUS.search(text) and "\\" not in text and '"' not in text)
    call = f'do(action="{kind}", {name}="{text}")'

    escaped = call.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    keywords = {
        item.arg: ast.literal_eval(item.value) for item in ast.parse(escaped, mode="eval").body.keywords
    }
    assert dict(parse_action(call).arguments)[name] == keywords[name]


@given(st.text("do(action=\"Tap',element[]1 0)finsh\\<>/answer\n", max_size=60))
def test_no_text_makes_the_parser_fail(text):
    for prefix in ("", "do(action=", 'do(action="Type", text="', "finish(message="):
        action = parse_action(prefix + text)
        assert action is None or action.kind in REQUIRED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "打开设置",
        "I would tap the button.",
        "<think>do it</think>",
        'do(action="Tap")',
        'do(action="Tap", element=[1,2]',
        'do(action="Tap", element=[1])',
        'do(action="Tap", element=[1,2,3,4])',
        'do(action="Tap", element=[087,300])',
        'do(action="Tap", element=[-1,300])',
        'do(action="Tap", element=[1001,300])',
        'do(action="Tap", element=[1.5,300])',
        'do(action="Tap", element="[1,2]")',
        'do(action="Tap", element=[__import__("os").getpid(),2])',
        'do(action="Tap", element=[1,2], element=[3,4])',
        'do(action="Swipe", start=[1,2])',
        'do(action="Swipe", start=[1,2], end=5)',
        'do(action="Launch", app="")',
        'do(action="Launch", app=Settings)',
        'do(action="Type", text=[1,2])',
        'do(action="Type", text="cut off',
        'do(action="Fly")',
        'do(action="finish", message="x")',
        'do(action="tap", element=[1,2])',
        "do(action=5)",
        'do(action="Tap" element=[1,2])',
        'do("Tap", [1,2])',
        'finish(message="cut off"',
        "finish(message=done)",
        'finish(action="Tap", element=[1,2])',
        'do（action="Tap"，element=[1,2]）',
        "do(action=“Tap”, element=[1,2])",
    ],
)
def test_what_is_not_clearly_an_action_is_none(text):
    assert parse_action(text) is None


def test_finish_is_looked_for_before_do_as_the_client_does():
    assert parse_action('do(action="Back") finish(message="ok")').kind == "finish"


def test_a_marker_in_the_thinking_that_is_no_action_does_not_hide_the_answer():
    text = '<think>maybe do(action=...) helps</think><answer>do(action="Back")</answer>'

    assert parse_action(text) == Action("Back")


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        ('<think>Open it.</think>\n<answer>do(action="Back")</answer>', "Open it."),
        ('<think><think>a</think>\n<answer></think><answer>do(action="Back")</answer>', "a"),
        ('do(action="Back")', ""),
        ("<think>no action</think>", "no action"),
        ('Tap it. do(action="Tap", element=[1,2])', "Tap it."),
    ],
)
def test_thinking_is_what_stands_before_the_action(text, thinking):
    assert parse_thinking(text) == thinking


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 5000), st.integers(1, 5000))
def test_pixels_are_those_that_the_client_touches(x, y, width, height):
    assert to_pixels((x, y), (width, height)) == (int(x / 1000 * width), int(y / 1000 * height))


def test_the_document_names_points_in_both_scales():
    action = parse_action('do(action="Swipe", start=[500,800], end=[499,200])')

    assert action.to_json((1080, 2400)) == {
        "type": "Swipe",
        "start": [500, 800],
        "start_pixels": [540, 1920],
        "end": [499, 200],
        "end_pixels": [538, 480],
    }
    assert action.to_json() == {"type": "Swipe", "start": [500, 800], "end": [499, 200]}


def test_a_long_hostile_answer_is_read_in_no_time():
    parse_action('do(action="Type", text="' + '"' * 20_000 + "\\" * 20_000 + '", ' * 20_000)
