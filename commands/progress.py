"""How far a command is, on stderr: bytes of a stage, notes, prompts.

In: what an export, a preparation or a comparison reports. Out: a bar on a terminal, else a line now and then.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from .quantities import format_bytes

if TYPE_CHECKING:
    from autoglm_edge.export.progress import ProgressEvent

_BYTES_STAGES = {"weights": "Weights", "hash": "Checking", "copy": "Copying"}
_NOTED_STAGES = ("calibration", "measure")


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


def show_event(progress: ProgressLine, event: ProgressEvent) -> None:
    """What an export says of itself."""
    if event.stage in _BYTES_STAGES:
        progress.show(_BYTES_STAGES[event.stage], event.done_bytes, event.total_bytes)
    elif event.stage in _NOTED_STAGES:
        progress.note(event.detail)
    elif event.stage == "resume":
        progress.say(event.detail)


def show_prompt(name: str, done: int, total: int) -> None:
    """A line for every prompt that is begun."""
    if done < total:
        click.echo(f"[{done + 1}/{total}] {name}", err=True)
