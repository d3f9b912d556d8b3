"""A file of requests becomes a file of answers, in one run or in several.

In: two paths, and whoever answers lines. Out: a `Summary`. Knows nothing of the command line and of engines.

What is answered is in the output file, and only there; so a run that was ended, by whatever, is continued by
the same call.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autoglm_edge.errors import EdgeError, RequestError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.opening import Opening

from .job import Rules
from .output import Output, same_file
from .record import Answered
from .source import Source

Work = Callable[[Source, Sequence[int]], Generator[Answered, None, None]]
"""Answers requests of a source, given by their indices; one of them twice or not at all is no harm."""
MOST_FAULTS = 5
"""Requests in a row that may fail by a fault of ours: more, and it is not the requests that are wrong."""


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        requests: in the file.
        before: answered by earlier runs.
        answered: by this one, refused ones included.
        refused: of those, requests that got no answer but an error.
        tokens: of all answers of this run.
        seconds: from the first line to the last.
    """

    requests: int
    before: int
    answered: int
    refused: int
    tokens: int
    seconds: float


class Watch(Protocol):
    """Is told how it goes on."""

    def began(self, requests: int, before: int, repaired_bytes: int) -> None:
        """So many requests, of which so many are answered; bytes of a torn line were cut off."""

    def answered(self, item: Answered) -> None:
        """One more is in the file."""


def made_from(source: Source, opening: Opening, rules: Rules) -> Mapping[str, Any]:
    """What decides about answers, beside chance: a file that was begun with something else is not continued.

    How many threads and workers there are, and on which device, may change between two runs.
    """
    folder = rules.images_from
    return {
        "input_sha256": source.sha256,
        "bundle": Bundle.open(opening.bundle).fingerprint,
        "context": opening.context,
        "image_layout": opening.image_layout,
        "max_image_tokens": opening.max_image_tokens,
        "names": list(rules.names),
        "images_from": None if folder is None else str(folder.resolve()),
    }


def answer_file(
    asked: Path,
    answers: Path,
    opening: Opening,
    rules: Rules,
    work: Work,
    watch: Watch,
    *,
    ordered: bool = False,
) -> Summary:
    """Answer what of a file is not answered yet.

    Args:
        asked: requests, one in each line.
        answers: the output file; begun, or continued.
        opening: of the engine, for comparison with earlier runs.
        rules: what requests may ask for.
        work: answers lines; not called where nothing is missing.
        watch: told how it goes on.
        ordered: put the answers into the order of the requests when all are there.

    Raises:
        RequestError: the files cannot be used.
        EdgeError: the engine fails at everything.
        OSError: the system refuses, such as on a full disk; what is written stays.
    """
    if same_file(asked, answers):
        raise RequestError(f"{answers} is the input, too; name another output file")
    with (
        Source(asked, rules.limits) as source,
        Output(answers, made_from(source, opening, rules), source.last) as output,
    ):
        before = len(output)
        watch.began(len(source), before, output.repaired)
        started = time.perf_counter()
        count = _Count()
        while missing := _missing(source, output):
            had = len(output)
            with closing(work(source, missing)) as items:
                for item in _sound(items):
                    if output.append(item.number, item.record):
                        count.add(item)
                        watch.answered(item)
            if len(output) == had:
                raise EdgeError(
                    f"{len(missing)} requests of {asked} got no answer, though every one was tried; "
                    "start again to go on"
                )
        seconds = time.perf_counter() - started
        if ordered:
            output.sort(source.numbers)
        return Summary(len(source), before, count.answered, count.refused, count.tokens, seconds)


@dataclass
class _Count:
    """What this run has done so far."""

    answered: int = 0
    refused: int = 0
    tokens: int = 0

    def add(self, item: Answered) -> None:
        self.answered += 1
        self.refused += item.status != 200
        self.tokens += item.tokens


def _missing(source: Source, output: Output) -> array[int]:
    return array("Q", (index for index, number in enumerate(source.numbers) if number not in output))


def _sound(items: Iterator[Answered]) -> Iterator[Answered]:
    """Pass on what was answered; a fault of ours only once something else went well after it.

    Raises:
        EdgeError: too many in a row; they are not in the output, so the next run tries them again.
    """
    faults: list[Answered] = []
    for item in items:
        if item.status < 500:
            yield from faults
            faults.clear()
            yield item
            continue
        faults.append(item)
        if len(faults) >= MOST_FAULTS:
            numbers = ", ".join(str(fault.number) for fault in faults)
            raise EdgeError(
                f"{len(faults)} requests in a row failed by a fault that is not theirs (lines {numbers}), so "
                "the run was ended; the log says more, and the same command goes on"
            )
    yield from faults
