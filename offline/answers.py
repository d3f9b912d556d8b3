"""The one place where a file's requests meet the engine: all its slots are busy, and the next ones prepared.

In: lines. Out: answered lines, as they are finished. Knows nothing of files.

Nothing is sorted: requests that begin alike are cheap where they stand one behind the other, because the
engine reuses what it has computed. With one slot, answers come in the order of the lines.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from autoglm_edge.server.work.answering import Answering, Answers

from .job import Job, Rules, make_job
from .record import Answered
from .source import Line

AHEAD = 2
"""Requests that are prepared before a slot is free: their pictures lie unpacked in memory."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Open:
    """A request of which answers are missing.

    Attributes:
        job: the request.
        left: answers that are missing.
        running: numbers of those that are given just now.
    """

    job: Job
    left: int
    running: set[int] = field(default_factory=set)


def answer_lines(engine: Answering, rules: Rules, lines: Iterable[Line]) -> Generator[Answered, None, None]:
    """Answer lines.

    Args:
        engine: nobody else asks it for answers.
        rules: what requests may ask for.
        lines: of a file.

    Returns:
        What stands in the output, as it is finished. Closing it ends the work within one run of a graph.

    Raises:
        RequestError: from the first step: the engine is giving another answer, or is closed.
    """
    with engine.answers() as answers:
        jobs = ahead(lambda line: make_job(line, engine, rules), lines, AHEAD)
        yield from _answer_all(answers, jobs)


def _answer_all(answers: Answers, jobs: Iterator[Job | Answered]) -> Iterator[Answered]:
    waiting: deque[tuple[_Open, int]] = deque()
    running: dict[int, tuple[_Open, int]] = {}
    more = True
    while True:
        while answers.room > 0 and (waiting or more):
            if not waiting:
                job = next(jobs, None)
                more = job is not None
                if isinstance(job, Answered):
                    yield job
                elif job is not None:
                    asked = _Open(job, len(job.prepared.wanted))
                    waiting.extend((asked, index) for index in range(asked.left))
                continue
            asked, index = waiting.popleft()
            if not asked.left:
                continue
            try:
                number = answers.begin(asked.job.prepared.wanted[index], threading.Event())
            # One request, whatever it sets off, must not end the run.
            except Exception as error:
                yield _failed(asked, error, answers, running)
                continue
            asked.running.add(number)
            running[number] = (asked, index)
        if not running:
            return
        for number, event in answers.step():
            if number not in running:  # dropped in this very step
                continue
            asked, index = running[number]
            if isinstance(event, Exception):
                yield _failed(asked, event, answers, running)
                continue
            asked.job.telling.answers[index].add(event)
            if event.finish_reason is not None:
                del running[number]
                asked.running.discard(number)
                asked.left -= 1
                if not asked.left:
                    yield asked.job.done()


def _failed(
    asked: _Open, error: Exception, answers: Answers, running: dict[int, tuple[_Open, int]]
) -> Answered:
    """One answer of a request failed: the others are of no use."""
    for number in asked.running:
        answers.drop(number)
        del running[number]
    asked.running.clear()
    asked.left = 0
    return asked.job.done(error)


def ahead(work: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """Results of a function, in the order of its arguments, of which the next few are worked on already.

    Args:
        work: called in a thread.
        items: taken in the caller's thread, at most `count` before they are needed.
        count: how many.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
