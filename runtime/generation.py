"""How an answer goes on: sampled tokens, and what is to be run next, a draft with it where that likely pays.

In: the scores after a prompt, and after each run. Out: sampled ids, one by one, and ids to run. Knows nothing
of text and graphs; who runs, alone or with others, and what ends an answer is the caller's matter.

Drafts change how many runs an answer takes, not what is sampled: every id is picked by the sampler from the
scores after the ids before it, in order, with the same random numbers. A draft only makes some of these
scores come from one run instead of several.
"""

from __future__ import annotations

import threading
from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

from .answer import Clock
from .reuse.lookup import Draft, NGramIndex
from .reuse.options import Lookup
from .reuse.pace import MOST_TOKENS, Pace
from .reuse.sequence import CachedSequence
from .sampling import Sampler


class Cancel:
    """A cancel event that stays set, so that one which is set and cleared ends an answer all the same."""

    def __init__(self, event: threading.Event | None) -> None:
        self._event = event
        self._seen = False

    def is_set(self) -> bool:
        """Whether the event was ever seen set."""
        self._seen = self._seen or (self._event is not None and self._event.is_set())
        return self._seen


class Drafter:
    """Proposes how an answer goes on, and learns whether that pays."""

    def __init__(
        self, ids: NDArray[np.int64], pace: Pace, lookup: Lookup = "auto", *, never: Container[int] = ()
    ) -> None:
        """Start an answer; the prompt is read when the first draft is asked for.

        Args:
            ids: (T,) of the prompt.
            pace: of the engine; "auto" asks it for the length of a draft.
            lookup: as in ReuseOptions.
            never: ids at which a draft ends.
        """
        self.pace = pace
        self._lookup = lookup
        self._prompt = ids
        self._answer: list[int] = []
        self._never = never
        self._index: NGramIndex | None = None

    def push(self, token: int) -> None:
        """The next id of the answer."""
        if self._index is not None:
            self._index.push(token)
        else:
            self._answer.append(token)

    def propose(self, most: int) -> Draft:
        """Up to `most` ids that may come next; none where drafting does not pay."""
        if self._lookup is False or most < 1:
            return Draft()
        if self._index is None:
            self._index = NGramIndex([*self._prompt.tolist(), *self._answer], never=self._never)
        draft = self._index.draft(min(most, MOST_TOKENS - 1))
        return draft.cut(self.pace.length(draft.chances)) if self._lookup == "auto" else draft


class Generation:
    """One answer.

    while not generation.done:
        token = generation.sample()
        if not generation.ready: run generation.next_run(), and tell the scores by generation.ran()
    """

    def __init__(
        self,
        sequence: CachedSequence,
        scores: NDArray[np.float32],
        position: int,
        *,
        sampler: Sampler,
        drafter: Drafter,
        budget: int,
        clock: Clock,
    ) -> None:
        """Begin.

        Args:
            sequence: holds the prompt; drafted tokens that turn out wrong are taken back from it.
            scores: (V,) after the prompt.
            position: of the first sampled token, on all axes.
            sampler: picks ids.
            drafter: proposes what may come.
            budget: tokens to sample at most.
            clock: told of tokens, runs and drafts.
        """
        self._first = position
        self._sequence = sequence
        self._rows = scores[None]
        self._sampler = sampler
        self._drafter = drafter
        self._budget = budget
        self._clock = clock
        self._count = 0
        self._token = 0
        # What the last run tried, and how much of it was sampled since.
        self._draft, self._right = Draft(), 0
        self._ready = True

    @property
    def done(self) -> bool:
        """Whether as many tokens were sampled as may be."""
        return self._count >= self._budget

    @property
    def position(self) -> int:
        """Of the last token, which is the first to be run, on all axes."""
        return self._first + self._count - 1

    @property
    def ready(self) -> bool:
        """Whether the scores of the next token are there; else something is to be run first."""
        return self._ready

    def sample(self) -> int:
        """The next token; its scores are there."""
        draft, right = self._draft, self._right
        token = self._sampler.sample(self._rows[right])
        self._count += 1
        self._clock.token_done(self._count)
        self._drafter.push(token)
        hit = right < len(draft.ids) and draft.ids[right] == token
        if right < len(draft.ids):
            self._drafter.pace.verified(draft.chances[right], right=hit)
            self._right += hit
            self._clock.accepted_tokens += hit
            if not hit:
                self._sequence.take_back(len(draft.ids) - right)
        self._token, self._ready = token, hit
        return token

    def next_run(self, *, alone: bool = True) -> tuple[int, ...]:
        """The last token and, if the run is for this answer alone, what may follow it."""
        most = self._budget - self._count - 1 if alone else 0
        self._draft, self._right = self._drafter.propose(most), 0
        return (self._token, *self._draft.ids)

    def ran(self, rows: NDArray[np.float32], milliseconds: float, *, alone: bool = True) -> None:
        """The scores (n, V) after the n tokens of `next_run`, and what it took."""
        if alone:
            self._drafter.pace.ran(len(rows), milliseconds)
        self._rows, self._ready = rows, True
        self._clock.decoder_runs += 1
        self._clock.drafted_tokens += len(self._draft.ids)
