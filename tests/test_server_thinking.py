"""Thought and answer are told apart, however the text comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_edge.server.thinking import ThinkingSplitter


def split(*pieces: str) -> tuple[str, str]:
    splitter = ThinkingSplitter()
    found = [splitter.push(piece) for piece in pieces] + [splitter.flush()]
    return "".join(thought for thought, _ in found), "".join(answer for _, answer in found)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("", "", ""),
        ("do()", "", "do()"),
        ("  do()", "", "do()"),
        ("<think>a</think><answer>do()", "a", "do()"),
        ("\n<think>a\n</think>\n <answer>do()", "a\n", "do()"),
        ("<think>a</think>do()", "a", "do()"),
        ("<think>a", "a", ""),
        ("<think>a</th", "a</th", ""),
        ("<think>a</think>", "a", ""),
        ("<think>a</think>\n", "a", ""),
        ("<think>a</think><ans", "a", "<ans"),
        ("<think></think><answer>x", "", "x"),
        ("<answer>x", "", "x"),
        ("<thi", "", "<thi"),
        ("<thin>x", "", "<thin>x"),
        ("x<think>y</think>", "", "x<think>y</think>"),
        ("<think><think>a</think>\n<answer>b</think><answer>c", "<think>a", "b</think><answer>c"),
        ("<think>a</think><answer><answer>b", "a", "<answer>b"),
        ("<think>思考</think><answer>完成", "思考", "完成"),
    ],
)
def test_a_text_is_told_apart(text: str, thought: str, answer: str) -> None:
    assert split(text) == (thought, answer)
    assert split(*text) == (thought, answer)


@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<answer>", "<", "think>", " ", "\n", "a", "</", "do()", "ans"]
        ),
        max_size=12,
    ),
    st.data(),
)
def test_the_pieces_do_not_matter_and_nothing_but_tags_and_space_is_lost(
    words: list[str], data: st.DataObject
) -> None:
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    assert split(*pieces) == split(text)

    def bare(said: str) -> str:
        for tag in ("<think>", "</think>", "<answer>"):
            said = said.replace(tag, "")
        return "".join(said.split())

    thought, answer = split(text)
    assert len(bare(thought + "|" + answer)) >= len(bare(text)) - 1


def test_a_thought_comes_as_soon_as_it_is_sure() -> None:
    splitter = ThinkingSplitter()

    assert splitter.push("<think>I see") == ("I see", "")
    assert splitter.push(" a </") == (" a ", "")
    assert splitter.push("b") == ("</b", "")
    assert splitter.push("</think>") == ("", "")
    assert splitter.push("do(") == ("", "do(")
