r"""Thinking and answer of one text, told apart as it comes.

In: pieces of an answer such as `<think>why</think>\n<answer>do(...)`. Out: for each piece, what of it is
thinking and what is answer, without the tags. Knows nothing of tokens, HTTP or models.

A thought is what stands in `<think>` at the very beginning, after white space; without its end all is
thought. Then a beginning `<answer>` is taken away. Tags further on are text. What comes out does not depend
on how the text was cut into pieces.
"""

from __future__ import annotations

from typing import Literal

OPEN, CLOSE, ANSWER = "<think>", "</think>", "<answer>"
SKIP = f"{OPEN}{CLOSE}{ANSWER}"
"""What an answer begins with if it is to do without a thought."""


class ThinkingSplitter:
    """Takes one answer apart."""

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["start", "thinking", "between", "answer"] = "start"

    def push(self, text: str) -> tuple[str, str]:
        """The next piece.

        Returns:
            What became sure of the thought, and of the answer; either may be empty.
        """
        self._held += text
        thought, answer = "", ""
        while True:
            before = self._state
            if before == "start":
                self._begin(OPEN, "thinking", otherwise="between")
            elif before == "thinking":
                thought += self._think()
            elif before == "between":
                self._begin(ANSWER, "answer", otherwise="answer")
            else:
                answer, self._held = self._held, ""
            if self._state == before:
                return thought, answer

    def flush(self) -> tuple[str, str]:
        """What was held back; the answer has ended."""
        rest, self._held = self._held, ""
        if self._state == "thinking":
            return rest, ""
        return "", rest if rest.strip() else ""

    def _begin(self, tag: str, then: Literal["thinking", "answer"], *, otherwise: str) -> None:
        """Leave the state when it is known whether the tag comes; white space before it is dropped."""
        stripped = self._held.lstrip()
        if stripped.startswith(tag):
            self._held, self._state = stripped[len(tag) :], then
        elif stripped and not tag.startswith(stripped):
            self._state = "between" if otherwise == "between" else "answer"
            if self._state == "answer":
                self._held = stripped

    def _think(self) -> str:
        thought, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._held, self._state = rest, "between"
            return thought
        kept = next((n for n in range(len(CLOSE) - 1, 0, -1) if thought.endswith(CLOSE[:n])), 0)
        self._held = thought[len(thought) - kept :]
        return thought[: len(thought) - kept]
