"""Threads that share the work of one kernel after another.

In: a kernel and its arguments. Out: nothing before all of it is done. Kernels let go of the interpreter and
take their work from a common counter, so a thread that the system holds up is not waited for longer than one
piece of it takes. Knows nothing of what the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .trace import Trace

_TASKS = 4
"""Pieces per thread where rows are handed out beforehand."""


class Crew:
    """A context manager of `threads` threads, each with scratch memory of its own."""

    def __init__(self, threads: int, scratch_bytes: int = 0, trace: Trace | None = None) -> None:
        """Start with the scratch memory of each, which is touched when it is first used."""
        self._threads = threads
        self._trace = trace
        self._pool = ThreadPoolExecutor(threads, "native")
        self._scratch = [np.empty(scratch_bytes, np.uint8) for _ in range(threads)]

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    def share(self, kernel: Callable[..., None], *given: Any, scratch: bool = False) -> None:
        """Run a kernel that takes its work from a counter.

        Args:
            kernel: called once per thread.
            given: its arguments; the counter is added, and after it the scratch memory.
            scratch: whether it takes any.
        """
        counter: NDArray[np.int64] = np.zeros(1, np.int64)
        work = [(kernel, *given, counter, *([own] if scratch else [])) for own in self._scratch]
        self._run(kernel.__name__, work)

    def rows(self, name: str, kernel: Callable[[int, int], None], count: int) -> None:
        """Run a kernel on all rows: it is given the first one and how many; `name` is for traces."""
        step = max(1, -(-count // (self._threads * _TASKS)))
        self._run(name, [(kernel, first, min(step, count - first)) for first in range(0, count, step)])

    def _run(self, name: str, work: Sequence[tuple[Any, ...]]) -> None:
        with nullcontext() if self._trace is None else self._trace.kernel(name):
            for piece in [self._pool.submit(*call) for call in work]:
                piece.result()
