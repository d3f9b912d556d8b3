"""How an export tells what it is doing.

In: nothing. Out: `ProgressEvent`s, handed to a callable of the caller from the thread that called
`export`. Knows nothing of terminals: a bar is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """One sign of life.

    Attributes:
        stage: "checkpoint", "resume", "weights", "graphs", "hash", "publish" or "done", in this order
            ("resume" only when an interrupted export goes on); and "calibration" in between weights.
        detail: what is being worked on: a tensor name, a file name, or a sentence.
        done_bytes: bytes finished within the stage; 0 where bytes mean nothing.
        total_bytes: bytes of the whole stage; 0 where bytes mean nothing.
    """

    stage: str
    detail: str
    done_bytes: int
    total_bytes: int


Progress = Callable[[ProgressEvent], None]


def silent(event: ProgressEvent) -> None:
    """Progress that nobody watches."""
