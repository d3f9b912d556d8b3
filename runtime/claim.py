"""Who has the engine: one answer, one batch or one scoring at a time.

Knows nothing of what is done with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from autoglm_edge.errors import RequestError


class Claim:
    """Taken by at most one, from whatever thread."""

    def __init__(self) -> None:
        """Free."""
        self._busy = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Have the engine until the context is left.

        Raises:
            RequestError: somebody else has it.
        """
        if not self._busy.acquire(blocking=False):
            raise RequestError(
                "this engine is giving another answer; finish or close that one, or load a second engine"
            )
        try:
            yield
        finally:
            self._busy.release()
