"""Answers that are given together: prompts are read by turns, while all others go on token by token.

    add ─ waits for a slot ─ reading (a piece of one) ─ decoding (one run for all) ─ deltas
                              └────────── by turns, in `step` ─────────┘

In: prompts and how to answer them. Out: deltas, each with the number of its answer. Belongs to one thread.
Knows nothing of messages and of who asks; whose prompt comes next is said in turns.py.

A lone answer is drafted; several are not, because a row of a run is worth more as an answer than as a guess.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.runtime.answer import Delta, Usage
from autoglm_edge.runtime.generation import Drafter, Generation
from autoglm_edge.runtime.manifest import TokenSpec
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer
from autoglm_edge.runtime.reading import Reading
from autoglm_edge.runtime.reply import Reply
from autoglm_edge.runtime.reuse.options import Lookup
from autoglm_edge.runtime.reuse.pace import Pace
from autoglm_edge.runtime.reuse.sequence import CachedSequence
from autoglm_edge.runtime.runner import Runner

from .job import Job
from .turns import Turns

Event = tuple[int, "Delta | Exception"]
"""Of the answer of that number: what it adds, or why it failed. A delta with a finish_reason is the last."""

PATIENCE = 0.05
"""Seconds of a step in which there is nothing to do but to wait for a picture: others may come meanwhile."""


@dataclass(eq=False)
class _Answer:
    """A job on its way."""

    number: int
    job: Job
    reply: Reply
    reading: Reading | None = None
    sequence: CachedSequence | None = None
    generation: Generation | None = None


class Batch:
    """As many answers at a time as the runner has slots."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        tokens: TokenSpec,
        *,
        pace: Pace,
        lookup: Lookup,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Empty.

        Args:
            runner: nobody else uses it as long as there are answers.
            tokenizer: of the bundle.
            tokens: special ids.
            pace: what drafts are worth here; goes on learning.
            lookup: as in ReuseOptions.
            now: seconds, by which turns are shared out.
        """
        self._runner = runner
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._pace = pace
        self._lookup = lookup
        self._numbers = itertools.count()
        self._now = now
        self._turns = Turns()
        self._waiting: deque[_Answer] = deque()
        self._reading: list[_Answer] = []  # as they were added
        self._decoding: list[_Answer] = []  # in the order of their slots

    @property
    def active(self) -> int:
        """Answers that have been added and not ended."""
        return len(self._answers())

    @property
    def room(self) -> int:
        """Answers that would not wait for a slot."""
        return len(self._runner.slots.sequences) - self.active

    def add(self, job: Job) -> int:
        """Begin an answer as soon as there is a slot; returns its number."""
        reply = Reply(self._tokenizer, eos=self._tokens.eos, stops=job.stops, budget=job.budget)
        answer = _Answer(next(self._numbers), job, reply)
        job.clock.waits()
        self._waiting.append(answer)
        return answer.number

    def drop(self, number: int) -> None:
        """Forget an answer, if it has not ended; what is in the cache of it stays."""
        for answer in self._answers():
            if answer.number == number:
                self._leave(answer)

    def clear(self) -> None:
        """Forget all answers."""
        for answer in self._answers():
            self._leave(answer)

    def step(self) -> list[Event]:
        """A piece of one prompt, if one is to be read, and one run for all answers that are decoded.

        Where there is nothing to do but to wait for a picture, it takes PATIENCE at most and does nothing.

        Returns:
            What came of it, in no particular order of answers.
        """
        events = [self._cancel(answer) for answer in self._answers() if answer.job.cancel.is_set()]
        while self._waiting and self._runner.slots.free:
            self._begin(self._waiting[0], events)
        for answer in [*self._reading]:
            self._look_at_pictures(answer, events)
        read = self._read(events)
        if self._decoding:
            self._decode(events)
        elif self._reading and not read:
            self._runner.pictures.wait(PATIENCE)
        return events

    def _answers(self) -> list[_Answer]:
        """All that have been added and not ended."""
        return [*self._waiting, *self._reading, *self._decoding]

    def _begin(self, answer: _Answer, events: list[Event]) -> None:
        """Give it a slot; what is known of its prompt is put there, and its first picture is asked for."""
        self._waiting.remove(answer)
        self._reading.append(answer)
        self._advance(answer, events)

    def _look_at_pictures(self, answer: _Answer, events: list[Event]) -> None:
        """Take the picture that it waits for, if that is done; it costs nothing, so it needs no turn."""
        while (
            answer.reading is not None and answer.reading.picture is not None and answer.reading.picture.done
        ):
            self._advance(answer, events)

    def _read(self, events: list[Event]) -> bool:
        """Take one prompt a piece further; whether there was one."""
        started = self._now()
        readings = {answer.number: answer.reading for answer in self._reading if answer.reading is not None}
        number = self._turns.next(readings)
        if number is None:
            return False
        self._advance(next(answer for answer in self._reading if answer.number == number), events)
        self._turns.took(self._now() - started)
        return True

    def _advance(self, answer: _Answer, events: list[Event]) -> None:
        """The next step of its reading."""
        job = answer.job
        job.clock.goes_on()
        try:
            if answer.reading is None:
                answer.reading = Reading(
                    self._runner,
                    job.prompt,
                    len(job.prompt.ids) - 1,
                    cancelled=job.cancel.is_set,
                    clock=job.clock,
                    others=lambda: len(self._reading) + len(self._decoding) > 1,
                    beside=len(self._runner.slots.sequences) > 1,
                )
                answer.sequence = answer.reading.sequence
            rows = next(answer.reading.pieces, None)
            if rows is None:
                events.append(self._cancel(answer))
            elif len(rows):
                job.clock.prefill_done()
                self._activate(answer, answer.reading, rows[-1])
                self._sample(answer, events)
            else:
                job.clock.waits()
        except Exception as error:  # whatever a graph throws is the matter of this answer
            self._leave(answer)
            events.append((answer.number, error))
        except BaseException:
            self._leave(answer)
            raise

    def _activate(self, answer: _Answer, reading: Reading, scores: NDArray[np.float32]) -> None:
        job, never = answer.job, (self._tokens.image,)
        answer.generation = Generation(
            reading.sequence,
            scores,
            job.prompt.next_position,
            sampler=job.sampler,
            drafter=Drafter(job.prompt.ids, self._pace, self._lookup, never=never),
            budget=job.budget,
            clock=job.clock,
        )
        self._runner.slots.activate(reading.sequence)
        self._reading.remove(answer)
        self._decoding.append(answer)
        reading.close()  # with the features of its pictures
        answer.reading = None

    def _decode(self, events: list[Event]) -> None:
        """Run the last token of every answer, and sample the next ones."""
        answers = [*self._decoding]
        going = [answer.generation for answer in answers if answer.generation is not None]
        alone = len(going) == 1
        started = self._now()
        try:
            ids = [generation.next_run(alone=alone) for generation in going]
            if alone:
                sequence = self._runner.slots.sequences[0]
                rows = self._runner.feed(sequence, ids[0], going[0].position)[None]
            else:
                positions = [generation.position for generation in going]
                rows = self._runner.feed_each([run[0] for run in ids], positions)[:, None]
        except Exception as error:  # the run was for all of them
            for answer in answers:
                self._leave(answer)
                events.append((answer.number, error))
            return
        except BaseException:
            self.clear()
            raise
        milliseconds = 1e3 * (self._now() - started)
        for answer, generation, scores in zip(answers, going, rows, strict=True):
            generation.ran(scores, milliseconds, alone=alone)
            self._sample(answer, events)

    def _sample(self, answer: _Answer, events: list[Event]) -> None:
        """Take all tokens whose scores are there."""
        generation = answer.generation
        try:
            while generation is not None and generation.ready and answer.reply.ending is None:
                if answer.job.cancel.is_set():
                    events.append(self._cancel(answer))
                    return
                delta = answer.reply.push(generation.sample())
                if delta is not None:
                    events.append((answer.number, delta))
        except Exception as error:  # such as scores of damaged weights
            self._leave(answer)
            events.append((answer.number, error))
            return
        if answer.reply.ending is not None:
            events.append(self._end(answer))

    def _cancel(self, answer: _Answer) -> Event:
        answer.reply.cancel()
        return self._end(answer)

    def _end(self, answer: _Answer) -> Event:
        """The last delta, with the counts."""
        job, ending = answer.job, answer.reply.ending
        assert ending is not None
        self._leave(answer, persist=ending.reason != "cancelled")
        tokens = len(job.prompt.ids)
        usage = Usage(tokens, job.prompt.image_tokens, ending.sampled, job.clock.reused_tokens)
        timings = job.clock.timings(tokens, ending.sampled, self._runner.plan)
        return answer.number, Delta(ending.text, ending.token_ids, ending.reason, usage, timings)

    def _leave(self, answer: _Answer, *, persist: bool = False) -> None:
        """Give back the slot."""
        if answer in self._waiting:
            self._waiting.remove(answer)
        if answer in self._reading:
            self._reading.remove(answer)
        if answer in self._decoding:
            # The last one takes its place, as the sequences do in their slots.
            place = self._decoding.index(answer)
            self._decoding[place] = self._decoding[-1]
            self._decoding.pop()
        if answer.reading is not None:
            answer.reading.close()
            answer.reading = None
        if answer.sequence is not None:
            self._runner.release(answer.sequence, persist=persist)
            answer.sequence = None
