"""Times of kernels, written as onnxruntime writes its traces, so that one reader serves both.

In: what runs, while it runs. Out: a file of events (Chrome's trace format, times in microseconds):
"model_run" is a piece of a prompt, what ends in "_kernel_time" a kernel's part of it. Knows nothing of
kernels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Trace:
    """Events of one reader of prompts."""

    def __init__(self, path: Path) -> None:
        """Events are kept until `write`."""
        self._path = path
        self._events: list[dict[str, Any]] = []

    @contextmanager
    def run(self) -> Iterator[None]:
        """A piece of a prompt is read."""
        with self._timed("model_run", {}):
            yield

    @contextmanager
    def kernel(self, name: str) -> Iterator[None]:
        """All threads are busy with a kernel."""
        with self._timed(f"{name}_kernel_time", {"op_name": name}):
            yield

    def write(self) -> None:
        """Write the file."""
        self._path.write_text(json.dumps(self._events), encoding="utf-8")

    @contextmanager
    def _timed(self, name: str, about: dict[str, str]) -> Iterator[None]:
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        times = {"ts": int(1e6 * started), "dur": int(1e6 * (ended - started))}
        self._events.append({"ph": "X", "name": name, **times, "args": about})
