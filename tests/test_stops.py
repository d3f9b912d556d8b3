import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.stops import StopText


def run(stops, pieces):
    stopper = StopText(stops)
    emitted = []
    for piece in pieces:
        text, hit = stopper.push(piece)
        emitted.append(text)
        if hit:
            break
    emitted.append(stopper.flush())
    return "".join(emitted), stopper.hit


def cut(text, stops):
    """The definition, by trying every end: the first position at which the text so far ends in a stop."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def cut_into(text, sizes):
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


LETTERS = st.text("ab<", max_size=30)


@given(LETTERS, st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4), st.lists(st.integers(0, 4)))
@example("aab", ["aab", "ab"], [1, 1, 1])
@example("abcx", ["bc", "abcd"], [1, 2])
def test_what_comes_out_is_the_text_up_to_the_first_stop_however_it_is_cut(text, stops, sizes):
    assert run(stops, cut_into(text, sizes)) == cut(text, stops)


@given(LETTERS, st.lists(st.text("ab<", min_size=1, max_size=5), min_size=1, max_size=3))
def test_only_what_may_begin_a_stop_is_held_back(text, stops):
    stopper = StopText(stops)
    emitted = ""
    for letter in text:
        out, hit = stopper.push(letter)
        emitted += out
        if hit:
            return
    held = text[len(emitted) :]

    assert emitted + held == text
    assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    longer = [text[start:] for start in range(len(emitted))]
    assert not any(stop.startswith(tail) for stop in stops for tail in longer)


def test_a_stop_spread_over_pieces_is_found():
    assert run(["</answer>"], ["do(x)", "</", "ans", "wer", "> tail"]) == ("do(x)", True)


def test_text_that_only_looked_like_a_stop_comes_out_as_soon_as_that_is_clear():
    stopper = StopText(["</answer>"])

    assert stopper.push("a</ans") == ("a", False)
    assert stopper.push("i") == ("</ansi", False)


def test_the_end_of_an_answer_brings_out_what_was_held_back():
    stopper = StopText(["</answer>"])
    stopper.push("a</ans")

    assert stopper.flush() == "</ans"
    assert stopper.flush() == ""


def test_nothing_comes_after_a_stop():
    stopper = StopText(["x"])

    assert stopper.push("axb") == ("a", True)
    assert stopper.push("c") == ("", True)
    assert stopper.flush() == ""


def test_without_stops_everything_passes_at_once():
    assert StopText([]).push("abc") == ("abc", False)


@pytest.mark.parametrize("stops", [[""], [5], [None], "text"])
def test_a_stop_that_is_no_text_is_refused(stops):
    with pytest.raises(RequestError, match="must be"):
        StopText(stops)
