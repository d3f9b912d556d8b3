"""Actions of a phone agent: the text of an answer in, what it asks the phone to do out.

The rules are those of Open-AutoGLM's client (zai-org/Open-AutoGLM, phone_agent/model/client.py and
actions/handler.py): the action starts at the first `finish(message=`, else at the first `do(action=`, else
in the `<answer>` block; points are 0..1000 of the screen's width and height. Text is never evaluated. Where
that client stumbles over an answer that is clear (a trailing `</answer>`, tags doubled by its own history),
this reads it; what is not clear is no action. Knows nothing of tokens or of how an action is carried out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

POINT_SCALE = 1000
"""Points are thousandths of the screen; prompts ask for 0..999, and the client divides by this."""

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "Launch": ("app",),
    "Tap": ("element",),
    "Type": ("text",),
    "Type_Name": ("text",),
    "Interact": (),
    "Swipe": ("start", "end"),
    "Note": (),
    "Call_API": (),
    "Long Press": ("element",),
    "Double Tap": ("element",),
    "Take_over": (),
    "Back": (),
    "Home": (),
    "Wait": (),
    "finish": ("message",),
}
"""Kinds of action, and the arguments without which one cannot be carried out."""

Point = tuple[int, int]
Value = str | int | float | Point

_POINTS = ("element", "start", "end")
_TEXTS = ("app", "text", "message", "instruction")
_MARKERS = ("finish(message=", "do(action=")
_ANSWER = "<answer>"
_TAG = re.compile(r"</?(?:think|answer)>")
_CALL = re.compile(r"\s*(do|finish)\s*\(\s*")
_KEY = re.compile(r"([A-Za-z_]\w*)\s*=\s*")
_NUMBER = r"(?:0|[1-9]\d{0,8})"  # Python, and so the client, refuses leading zeros
_POINT = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,?\s*[\])]")
_PLAIN_NUMBER = re.compile(rf"-?{_NUMBER}(\.\d{{1,9}})?(?![\w.])")
_NEXT_KEY = re.compile(r"\s*,\s*(?:action|element|start|end|text|message|app|duration|instruction)\s*=")
_END = re.compile(r"\s*,?\s*\)\s*(?:$|</?(?:think|answer)>|<\||do\s*\(|finish\s*\()")
_COMMA = re.compile(r"\s*,\s*")
_CLOSE = re.compile(r"\s*,?\s*\)")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True)
class Action:
    """One step on the phone.

    Attributes:
        kind: a key of REQUIRED, as the model writes it: "Tap", "Long Press", "finish", ...
        arguments: (name, value) in the order of the text, without `action`. Points are two integers, 0..1000.
    """

    kind: str
    arguments: tuple[tuple[str, Value], ...] = ()

    def get(self, name: str) -> Value | None:
        """The argument of that name, or None."""
        return dict(self.arguments).get(name)

    @property
    def element(self) -> Point | None:
        """Where to tap or press, 0..1000 of width and height."""
        return self._point("element")

    @property
    def start(self) -> Point | None:
        """Where a swipe begins."""
        return self._point("start")

    @property
    def end(self) -> Point | None:
        """Where a swipe ends."""
        return self._point("end")

    @property
    def text(self) -> str | None:
        """What is typed, launched or said: the text, app, message or instruction; the first that is there."""
        return next((str(value) for name, value in self.arguments if name in _TEXTS), None)

    def to_json(self, size: tuple[int, int] | None = None) -> dict[str, Any]:
        """A document for programs.

        Args:
            size: width and height of the screen in pixels; adds a `..._pixels` key for every point.

        Returns:
            `type` with the kind, and every argument by its name; points as lists, 0..1000.
        """
        document: dict[str, Any] = {"type": self.kind}
        for name, value in self.arguments:
            document[name] = list(value) if isinstance(value, tuple) else value
            if isinstance(value, tuple) and size is not None:
                document[f"{name}_pixels"] = list(to_pixels(value, size))
        return document

    def __str__(self) -> str:
        """The action as the model writes it."""
        head = [] if self.kind == "finish" else [f'action="{self.kind}"']
        rest = [
            f"{name}=[{value[0]},{value[1]}]" if isinstance(value, tuple) else _format(name, value)
            for name, value in self.arguments
        ]
        return f"{'finish' if self.kind == 'finish' else 'do'}({', '.join(head + rest)})"

    def _point(self, name: str) -> Point | None:
        value = self.get(name)
        return value if isinstance(value, tuple) else None


def to_pixels(point: Point, size: tuple[int, int]) -> tuple[int, int]:
    """Where the client touches the screen: int(x / 1000 * width), int(y / 1000 * height)."""
    return int(point[0] / POINT_SCALE * size[0]), int(point[1] / POINT_SCALE * size[1])


def parse_action(text: str) -> Action | None:
    """Read the action of an answer.

    `text=` of Type and `message=` of finish are taken as they stand, as the client types and shows them; in
    other texts backslash escapes are resolved.

    Args:
        text: the whole answer, thinking included.

    Returns:
        None if there is no action, the kind is unknown, an argument is missing, or a point is outside
        0..1000.
    """
    return next((action for start in _starts(text) if (action := _parse_call(text, start)) is not None), None)


def parse_thinking(text: str) -> str:
    """What the answer says before its action, without tags; all of it if there is no action."""
    start = next((start for start in _starts(text) if _parse_call(text, start) is not None), len(text))
    return _TAG.sub("", text[:start]).strip()


def _starts(text: str) -> list[int]:
    """Where an action may begin, in the order in which the client looks."""
    starts = [start for marker in _MARKERS if (start := text.find(marker)) >= 0]
    if (block := text.rfind(_ANSWER)) >= 0:
        starts.append(block + len(_ANSWER))
    if not starts:
        starts.append(0)
    return starts


def _parse_call(text: str, start: int) -> Action | None:
    call = _CALL.match(text, start)
    if call is None:
        return None
    limit = text.find("</answer>", call.end())
    text = text[: len(text) if limit < 0 else limit]
    arguments = _parse_arguments(text, call.end(), verbatim=call[1] == "finish")
    if arguments is None:
        return None
    kind = "finish" if call[1] == "finish" else arguments.pop("action", None)
    if not isinstance(kind, str) or kind not in REQUIRED or (kind == "finish") != (call[1] == "finish"):
        return None
    if any(name not in arguments for name in REQUIRED[kind]) or "action" in arguments:
        return None
    if any(isinstance(value, tuple) != (name in _POINTS) for name, value in arguments.items()):
        return None
    if any(name in _TEXTS and not isinstance(value, str) for name, value in arguments.items()):
        return None
    if kind == "Launch" and not arguments["app"]:
        return None
    return Action(kind, tuple(arguments.items()))


def _parse_arguments(text: str, at: int, *, verbatim: bool) -> dict[str, Value] | None:
    """Keyword arguments from `at` up to the closing parenthesis; None if they are not well formed."""
    arguments: dict[str, Value] = {}
    while True:
        key = _KEY.match(text, at)
        if key is None or key[1] in arguments:
            return None
        typed = arguments.get("action") in ("Type", "Type_Name") and key[1] == "text"
        parsed = _parse_value(text, key.end(), verbatim=verbatim or typed)
        if parsed is None:
            return None
        arguments[key[1]], at = parsed
        if _CLOSE.match(text, at):
            return arguments
        comma = _COMMA.match(text, at)
        if comma is None:
            return None
        at = comma.end()


def _parse_value(text: str, at: int, *, verbatim: bool) -> tuple[Value, int] | None:
    """One value and where it ends."""
    if text[at : at + 1] in ('"', "'"):
        end = _closing_quote(text, at)
        if end is None:
            return None
        inner = text[at + 1 : end]
        return (inner if verbatim else _ESCAPE.sub(_resolve, inner)), end + 1
    if point := _POINT.match(text, at):
        x, y = int(point[1]), int(point[2])
        return ((x, y), point.end()) if max(x, y) <= POINT_SCALE else None
    if number := _PLAIN_NUMBER.match(text, at):
        return (float(number[0]) if number[1] else int(number[0])), number.end()
    return None


def _closing_quote(text: str, opening: int) -> int | None:
    """The quote that ends a string, though the string may hold such quotes itself.

    It is the first one, not escaped, that the next argument follows, or the end of the call with nothing
    but a tag or another call behind it; else the first that any closing parenthesis follows.
    """
    quote = text[opening]
    fallback: int | None = None
    at = opening
    while (at := text.find(quote, at + 1)) >= 0:
        slash = at
        while text[slash - 1] == "\\":
            slash -= 1
        if (at - slash) % 2:
            continue
        if _NEXT_KEY.match(text, at + 1) or _END.match(text, at + 1):
            return at
        if fallback is None and _CLOSE.match(text, at + 1):
            fallback = at
    return fallback


def _resolve(escape: re.Match[str]) -> str:
    return _ESCAPED.get(escape[1], escape[1] if escape[1] in "\\'\"" else escape[0])


def _format(name: str, value: Value) -> str:
    return f"{name}={value}" if isinstance(value, (int, float)) else f'{name}="{value}"'
