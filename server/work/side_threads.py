"""A few threads for what a request needs before it can wait in a queue: parsing, pictures, sounds.

In: work of requests, from the event loop. Out: results, or errors as clients are told them. Knows nothing of
what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from autoglm_edge.errors import EdgeError
from autoglm_edge.server.problem import problem_of

from .scheduler import stopping

Result = TypeVar("Result")


class SideThreads:
    """Begin with the first work, and take none once they are closed."""

    def __init__(self, count: int, name: str) -> None:
        """Prepare.

        Args:
            count: threads at most; the engine wants the cores, too.
            name: what theirs begin with.
        """
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._closed = False

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of some work.

        Raises:
            ApiError: something is wrong with the request, or the threads are closed.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except EdgeError as error:
            raise problem_of(error) from error
        except RuntimeError as error:
            if self._closed:  # the pool takes no more work
                raise stopping() from error
            raise

    def close(self) -> None:
        """Take no more work, and drop what has not begun; does not wait for what has."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
