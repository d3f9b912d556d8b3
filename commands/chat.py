"""`autoglm run --chat`: a conversation on the terminal, or from piped lines.

In: lines from stdin. Out: answers on stdout; prompts, hints and counts on stderr. Ctrl-C stops an answer,
not the conversation.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.errors import EdgeError

from .answer import give_answer, print_summary
from .conversation import Conversation, load_images

if TYPE_CHECKING:
    from autoglm_edge.runtime.engine import Engine

_CHAT_HELP = "/image PATH attaches a picture, /reset forgets everything, /quit ends; Ctrl-C stops an answer"


def hold_chat(engine: Engine, conversation: Conversation, text: str | None, options: dict[str, Any]) -> None:
    """Read lines and answer them until /quit or the end of input."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # editing of lines, wide characters included; Windows has its own
            import readline  # noqa: F401
        click.echo(_CHAT_HELP, err=True)
    while True:
        try:
            line = text if text is not None else _read_line(terminal)
        except EOFError:
            if terminal:
                click.echo(err=True)
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            click.echo("\nCtrl-D or /quit ends", err=True)
            continue
        text = None
        line = line.strip()
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            _chat_command(conversation, line)
        elif line:
            _chat_turn(engine, conversation, line, options)


def _read_line(terminal: bool) -> str:
    """A line from stdin, without its end. The prompt never goes to a file.

    Raises:
        EOFError: there is none.
    """
    if terminal and not sys.stdout.isatty():
        click.echo("> ", err=True, nl=False)
        return input()
    return input("> " if terminal else "")


def _chat_command(conversation: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        click.echo("Forgotten", err=True)
    elif name == "/image" and rest.strip():
        try:
            conversation.images += load_images([Path(rest.strip().strip("\"'")).expanduser()])
        except EdgeError as error:
            click.echo(f"Error: {error}", err=True)
        else:
            width, height = conversation.images[-1].size
            click.echo(f"Attached, {width}x{height} pixels", err=True)
    elif name == "/help":
        click.echo(_CHAT_HELP, err=True)
    else:
        click.echo(f"Error: {line!r} is no command here; {_CHAT_HELP}", err=True)


def _chat_turn(engine: Engine, conversation: Conversation, line: str, options: dict[str, Any]) -> None:
    """One question and its answer; without an answer it is as if it had not been asked."""
    conversation.ask(line)
    try:
        with _interrupts() as cancel:
            answer = give_answer(engine, conversation.messages, options, cancel)
    except EdgeError as error:
        conversation.take_back()
        click.echo(f"Error: {error}", err=True)
        return
    print_summary(answer.last)
    if answer.text:
        conversation.messages.append({"role": "assistant", "content": answer.text})
    else:
        conversation.take_back()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one, for when the engine does not come round, interrupts as usual."""
    cancel = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
