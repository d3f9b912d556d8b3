"""The loop that samples an answer's tokens and runs them, several at a time where a draft is likely right.

In: the scores after a prompt. Out: sampled ids, one by one. Knows nothing of text; what ends an answer is the
caller's matter.

Drafts change how many runs an answer takes, not what is sampled: every id is picked by the sampler from the
scores after the ids before it, in order, with the same random numbers. A draft only makes some of these
scores come from one run instead of several.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterator

import numpy as np
from numpy.typing import NDArray

from .answer import Clock
from .reuse.lookup import Draft, NGramIndex
from .reuse.options import Lookup
from .reuse.pace import MOST_TOKENS, Pace
from .runner import Runner
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


def generate(
    runner: Runner,
    scores: NDArray[np.float32],
    position: int,
    *,
    sampler: Sampler,
    drafter: Drafter,
    budget: int,
    cancelled: Callable[[], bool],
    clock: Clock,
) -> Iterator[int]:
    """Sample an answer.

    Args:
        runner: holds the prompt.
        scores: (V,) after the prompt.
        position: of the first sampled token, on all axes.
        sampler: picks ids.
        drafter: proposes what may come.
        budget: tokens to sample at most.
        cancelled: checked before each token.
        clock: told of tokens, runs and drafts.

    Returns:
        Iterator of ids; it ends with the budget or when cancelled. A token is run when the one after it is
        asked for, so the caller may end the answer with any of them.
    """
    rows = scores[None]
    draft, right = Draft(), 0  # what the last run tried, and how much of it was sampled since
    for count in range(1, budget + 1):
        if cancelled():
            return
        token = sampler.sample(rows[right])
        clock.token_done(count)
        drafter.push(token)
        hit = right < len(draft.ids) and draft.ids[right] == token
        if right < len(draft.ids):
            drafter.pace.verified(draft.chances[right], right=hit)
            right += hit
            clock.accepted_tokens += hit
            if not hit:
                runner.take_back(len(draft.ids) - right)
        yield token
        if hit:
            continue
        if count == budget:
            return
        draft, right = drafter.propose(budget - count - 1), 0
        started = time.perf_counter()
        rows = runner.feed((token, *draft.ids), position + count - 1)
        drafter.pace.ran(len(rows), 1e3 * (time.perf_counter() - started))
        clock.decoder_runs += 1
        clock.drafted_tokens += len(draft.ids)
