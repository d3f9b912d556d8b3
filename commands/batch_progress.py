"""How far a file of requests is, on stderr.

In: what `offline.batch` tells of it. Out: a bar on a terminal, else a line every ten seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from .terminal import harmless

if TYPE_CHECKING:
    from autoglm_edge.offline.record import Answered

_BAR_CELLS = 28
_LINE_SECONDS = 10.0
_REDRAW_SECONDS = 0.2


class BatchProgress:
    """How far a batch is: a bar on a terminal, else a line every ten seconds.

    Attributes:
        began_at: when the first line was worked on; None before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is shown yet."""
        self.began_at: float | None = None
        self._now = clock
        self._terminal = sys.stderr.isatty()
        self._shown = -1e9
        self._open_line = False
        self._total = self._before = self._done = self._tokens = self._errors = 0

    @property
    def state(self) -> str:
        """How many of how many."""
        return f"{self._before + self._done} of {self._total} requests"

    def began(self, requests: int, before: int, repaired_bytes: int) -> None:
        """See `Watch`."""
        self._total, self._before = requests, before
        if repaired_bytes:
            click.echo(f"a torn last line of {repaired_bytes} bytes was cut off", err=True)
        if before:
            click.echo(f"going on: {self.state} are answered", err=True)
        self.start()

    def start(self) -> None:
        """The engine is loaded: rates count from here."""
        self.began_at = self._now()

    def answered(self, item: Answered) -> None:
        """See `Watch`."""
        self._done += 1
        self._tokens += item.tokens
        self._errors += item.status != 200
        now = self._now()
        if now - self._shown < (_REDRAW_SECONDS if self._terminal else _LINE_SECONDS):
            return
        self._shown = now
        text = harmless(self.text(now))
        if self._terminal:
            share = (self._before + self._done) / max(1, self._total)
            bar = f"{'█' * int(share * _BAR_CELLS):·<{_BAR_CELLS}}"
            click.echo(f"\r\x1b[K{bar} {text}", err=True, nl=False)
            self._open_line = True
        else:
            click.echo(text, err=True)

    def text(self, now: float) -> str:
        """Counts, tokens per second and the time that is left, as far as they can be said."""
        seconds = now - (now if self.began_at is None else self.began_at)
        errors = f", {self._errors} with an error" if self._errors else ""
        rate = f", {self._tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
        missing = self._total - self._before - self._done
        if not missing or not self._done or seconds <= 0:
            return f"{self.state}{errors}{rate}"
        left = round(seconds / self._done * missing)
        hours, minutes = divmod(left // 60, 60)
        return f"{self.state}{errors}{rate}, {hours}:{minutes:02}:{left % 60:02} left"

    def close(self) -> None:
        """End an unfinished line."""
        if self._open_line:
            click.echo("", err=True)
            self._open_line = False
