"""Text between a command and the terminal: documents out, arguments and standard input in.

In: strings of models, strangers and locales. Out: what a terminal or a pipe can take. Results go to stdout,
everything else to stderr.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import click

_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def print_json(document: Mapping[str, Any]) -> None:
    """One document as one line, so that it can be the last line of stdout."""
    text = json.dumps(document, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(document)  # the same document, in escapes
    click.echo(text)


def harmless(text: str) -> str:
    """Text without control characters but newline and tab.

    What a model says may come from a stranger's screen, and what a manifest says from a stranger: neither is
    to move the cursor or set a title in the user's terminal.
    """
    return text.translate(_CONTROLS)


def tolerate_encodings() -> None:
    """A character that stdout or stderr cannot show, or stdin cannot read, is no traceback.

    On stdout it becomes a question mark, on stderr an escape; bytes of stdin that are no text stay in it as
    lone surrogates, which the runtime refuses by name.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def as_unicode(text: str) -> str:
    """An argument as the UTF-8 that it is, also where the locale is not UTF-8."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError:
            return text  # no UTF-8 either: whoever uses it says so


def read_stdin() -> str:
    """All of standard input as text.

    Raises:
        click.UsageError: it is empty, or not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not UTF-8 text (byte {error.start})") from error
    if not text:
        raise click.UsageError("standard input is empty, so there is nothing to answer")
    return text
