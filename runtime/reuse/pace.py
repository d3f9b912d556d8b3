"""How many tokens to draft: what a run of M tokens costs here, against how many of them turn out right.

In: measured times of decoder runs, and how far drafts were right. Out: a draft length, 0 where drafting does
not pay. Knows nothing of tokens.

A run of 1 + k tokens yields 1 + p1 + p1 p2 + ... + p1 ... pk tokens of an answer, p being the share of
drafted tokens that turned out right among those of a like chance. The length with the most tokens per
millisecond is taken. Times are running medians; until a length was run three times, they are the times of one
token multiplied by a factor measured for the form of the weights. Where no length pays, a short draft is
tried every 32nd time, so that a change is noticed.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

MOST_TOKENS = 16
"""Tokens of the longest run."""
PROBE_EVERY = 32
_WINDOW = 15
_ENOUGH = 3
_MEMORY = 0.98
"""What a count keeps of its weight when another is added: about the last 50 matter."""
_PRIOR_WEIGHT = 16.0
_GRADES = 8
"""Chances are told apart by eighths."""

BLOCK_COSTS: Mapping[int, float] = {1: 1.0, 2: 1.14, 4: 1.82, 8: 3.14, 16: 6.1}
"""Times of M tokens relative to one, weights in blocks of 4 bits (MatMulNBits)."""
INTEGER_COSTS: Mapping[int, float] = {1: 1.0, 2: 1.26, 4: 1.37, 8: 1.39, 16: 1.98}
"""The same for whole integer matrices (u8 x s8)."""


class Pace:
    """Draft lengths for one engine; it goes on learning from answer to answer."""

    def __init__(self, costs: Mapping[int, float]) -> None:
        """Begin with what is known of the form of the weights.

        Args:
            costs: time of M tokens relative to one, ascending, from 1 to MOST_TOKENS.
        """
        self._prior = [_between(costs, tokens) for tokens in range(MOST_TOKENS + 1)]
        self._times: list[deque[float]] = [deque(maxlen=_WINDOW) for _ in range(MOST_TOKENS + 1)]
        self._right = [_PRIOR_WEIGHT * (grade + 0.5) / _GRADES for grade in range(_GRADES)]
        self._tried = [_PRIOR_WEIGHT] * _GRADES
        self._refused = 0

    def ran(self, tokens: int, milliseconds: float) -> None:
        """A decoder run of so many tokens took so long; more tokens than MOST_TOKENS are not counted."""
        if 1 <= tokens <= MOST_TOKENS:
            self._times[tokens].append(milliseconds)

    def verified(self, chance: float, *, right: bool) -> None:
        """A drafted token of that chance was right, all before it having been, or was not."""
        grade = _grade(chance)
        self._right[grade] = self._right[grade] * _MEMORY + right
        self._tried[grade] = self._tried[grade] * _MEMORY + 1

    def cost(self, tokens: int) -> float:
        """Milliseconds of a run; relative to that of one token as long as none was timed."""
        if len(self._times[tokens]) >= _ENOUGH:
            return statistics.median(self._times[tokens])
        one = self._times[1]
        return self._prior[tokens] * (statistics.median(one) if len(one) >= _ENOUGH else 1.0)

    def share(self, chance: float) -> float:
        """The share of tokens that were right among those of a like chance."""
        grade = _grade(chance)
        return self._right[grade] / self._tried[grade]

    def length(self, chances: Sequence[float]) -> int:
        """How many tokens of a draft to run.

        Args:
            chances: of its tokens.
        """
        best = self._best(chances)
        if best or not chances:
            return best
        self._refused += 1
        if self._refused % PROBE_EVERY:
            return 0
        # By turns one token and three: the price of longer runs is learnt anew as well.
        return min(len(chances), 1 if self._refused % (2 * PROBE_EVERY) else 3)

    def _best(self, chances: Sequence[float]) -> int:
        best, best_rate = 0, 1.0 / self.cost(1)
        tokens, term = 1.0, 1.0
        known = len(self._times[1]) >= _ENOUGH
        for length, chance in enumerate(chances[: MOST_TOKENS - 1], 1):
            term *= self.share(chance)
            tokens += term
            # Without a time of one token the times of others say nothing, only the factors do.
            cost = self.cost(length + 1) if known else self._prior[length + 1]
            if tokens / cost > best_rate:
                best, best_rate = length, tokens / cost
        return best


def _grade(chance: float) -> int:
    return min(int(chance * _GRADES), _GRADES - 1)


def _between(costs: Mapping[int, float], tokens: int) -> float:
    """A cost from its neighbours, on a straight line."""
    sizes = sorted(costs)
    for low, high in itertools.pairwise(sizes):
        if low <= tokens <= high:
            return costs[low] + (costs[high] - costs[low]) * (tokens - low) / (high - low)
    return costs[sizes[0]] if tokens < sizes[0] else costs[sizes[-1]]
