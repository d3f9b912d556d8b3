"""What all commands share: how they fail, how they print a document, how they show progress.

In: what a command throws and reports. Out: exit status 0 done, 1 failed, 2 wrong usage, 130 interrupted;
results on stdout, everything else on stderr. Knows no command.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from autoglm_edge.errors import BundleError, DependencyError, EdgeError

_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells have it."""

P = ParamSpec("P")
R = TypeVar("R")


class EdgeCommand(click.Command):
    """A command whose expected errors are one sentence on stderr, and whose Ctrl-C is quiet."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            click.ClickException: an EdgeError happened, or the system refuses something (a full disk);
                click prints it and exits with status 1.
            click.exceptions.Exit: Ctrl-C, with status 130.
        """
        try:
            return super().invoke(ctx)
        except EdgeError as error:
            raise click.ClickException(harmless(" ".join(str(error).split()))) from error
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly when a reader goes away
                raise
            raise click.ClickException(_os_reason(error)) from error


def examples(*lines: str) -> str:
    """The end of a help page: examples that click leaves as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


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


def _os_reason(error: OSError) -> str:
    return f"{error.filename or 'a read or a write'} failed: {error.strerror or error}"


image_layout_option = click.option(
    "--image-layout",
    type=click.Choice(["plain", "newline"]),
    default="plain",
    show_default=True,
    help="What stands between picture and text; vLLM's string format has a newline.",
)
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)

weights_option = click.option(
    "--weights",
    type=click.Choice(["auto", "packed", "prepared", "mapped"]),
    default="auto",
    show_default=True,
    help="Where the decoder's weights are while it runs.",
)
prompts_option = click.option(
    "--prompts",
    type=click.Choice(["auto", "integer", "layers", "decoder"]),
    default="auto",
    show_default=True,
    help="What reads prompts.",
)


@contextmanager
def needs_extra(extra: str, packages: Collection[str], who: str) -> Iterator[None]:
    """Around an import: say which extra brings a package that is missing.

    Args:
        extra: name of the extra.
        packages: what it brings; anything else that is missing is a fault of ours and goes through.
        who: beginning of the sentence, such as "an export".

    Raises:
        DependencyError: one of the packages is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in packages:
            raise
        raise DependencyError(
            f"{who} needs the package {error.name}, which is not installed; "
            f'run pip install "autoglm-edge[{extra}]"'
        ) from error


def check_is_bundle(path: Path) -> None:
    """Explain the likely mix-ups before a bundle is opened.

    Raises:
        BundleError: the path is a checkpoint, or not a folder.
    """
    if not path.exists():
        raise BundleError(f"{path} does not exist; make a bundle with `autoglm export -o {path}`")
    if not path.is_dir():
        raise BundleError(f"{path} is a file, must be the folder of a bundle")
    weights = any(path.glob("*.safetensors*"))
    if weights and (path / "config.json").exists() and not (path / "manifest.json").exists():
        raise BundleError(f"{path} is a checkpoint, not a bundle; run `autoglm export {path}` first")


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and model pages count: 512 B, 3.6 MB, 5.86 GB."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"


class ProgressLine:
    """Progress in bytes on stderr: a bar on a terminal, else a line per tenth, at most one a second."""

    _BAR_CELLS = 28
    _REDRAW_SECONDS = 0.1
    _LINE_SECONDS = 1.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing shown."""
        self._terminal = sys.stderr.isatty()
        self._now = clock
        self._stage = ""
        self._started = self._drawn = 0.0
        self._noted = -math.inf
        self._tenth = 0
        self._open_line = False

    def say(self, text: str) -> None:
        """A line of its own."""
        self.close()
        click.echo(text, err=True)

    def note(self, text: str) -> None:
        """What is done while no bytes grow: in the place of the bar, or else a line a second at most."""
        now = self._now()
        if self._terminal:
            click.echo(f"\r\x1b[K{text}", err=True, nl=False)
            self._open_line = True
        elif now - self._noted >= self._LINE_SECONDS:
            self._noted = now
            click.echo(text, err=True)

    def show(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """The state of a stage; call it as often as you like."""
        now = self._now()
        if stage != self._stage:
            self.close()
            self._stage, self._started, self._tenth = stage, now, 0
            self._drawn = -1.0 if self._terminal else now
        if total_bytes <= 0:
            return
        done = min(1.0, done_bytes / total_bytes)
        if self._terminal:
            if done < 1 and now - self._drawn < self._REDRAW_SECONDS:
                return
            self._drawn = now
            bar = f"{'█' * int(done * self._BAR_CELLS):·<{self._BAR_CELLS}}"
            amount = f"{format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
            click.echo(
                f"\r\x1b[K{stage:8} {bar} {100 * done:3.0f} %  {amount}{self._rest(now, done)}",
                err=True,
                nl=False,
            )
            self._open_line = True
        elif int(done * 10) > self._tenth and (done == 1 or now - self._drawn >= self._LINE_SECONDS):
            self._drawn = now
            self._tenth = int(done * 10)
            seconds = now - self._started
            click.echo(
                f"{stage}: {10 * self._tenth} % of {format_bytes(total_bytes)}, {seconds:.0f} s", err=True
            )

    def close(self) -> None:
        """End an unfinished line."""
        if self._open_line:
            click.echo("", err=True)
            self._open_line = False

    def _rest(self, now: float, done: float) -> str:
        if not 0 < done < 1 or now - self._started < 1:
            return ""
        seconds = round((now - self._started) * (1 - done) / done)
        return f"  {seconds // 60}:{seconds % 60:02} left"
