"""Allocation: one candidate for every group of tensors, so that the total cost is least within a byte budget.

In: groups, each with candidates that have a size and a cost (added divergence), and a budget. Out: an
`Allocation`. Pure arithmetic: knows nothing of tensors, formats, files and of how costs are measured.

This is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter
11), solved by dynamic programming over bytes. Costs are taken as additive. Sizes are counted in units: their
greatest common divisor if the table then has at most UNITS columns, which makes the result exact, else a
multiple of it, to which sizes are rounded up. `Allocation.slack_bytes` says what rounding can have cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import QuantError

UNITS = 1 << 21
"""Columns of the table at most, each a byte per group; of a page each they are 8.6 GB to choose from."""


@dataclass(frozen=True)
class Candidate:
    """One way to store a group.

    Attributes:
        name: of the format; unique within the group.
        size_bytes: what it takes.
        cost: what it does to the model, in any unit that adds up; may be negative.
    """

    name: str
    size_bytes: int
    cost: float

    def __post_init__(self) -> None:
        if isinstance(self.size_bytes, bool) or not isinstance(self.size_bytes, int) or self.size_bytes < 0:
            raise QuantError(f"candidate {self.name!r} has {self.size_bytes!r} bytes, must be 0 or more")
        if not math.isfinite(self.cost):
            raise QuantError(f"candidate {self.name!r} costs {self.cost!r}, must be a finite number")


@dataclass(frozen=True)
class Group:
    """Tensors that are stored in the same way, and the ways to do so.

    Attributes:
        name: unique among the groups.
        candidates: at least one.
    """

    name: str
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        names = [candidate.name for candidate in self.candidates]
        if not names or len(set(names)) < len(names):
            raise QuantError(
                f"group {self.name!r} has the candidates {names}, must have at least one, and no name twice"
            )

    @property
    def least_bytes(self) -> int:
        """Of the smallest candidate."""
        return min(candidate.size_bytes for candidate in self.candidates)

    @property
    def most_bytes(self) -> int:
        """Of the largest candidate."""
        return max(candidate.size_bytes for candidate in self.candidates)


@dataclass(frozen=True)
class Allocation:
    """A candidate for every group.

    Attributes:
        choices: candidate by group name.
        size_bytes: of all choices, exact.
        cost: of all choices.
        slack_bytes: how far from the best this can be: no allocation within budget - slack_bytes costs less.
            0 means that it is the best.
    """

    choices: Mapping[str, Candidate]
    size_bytes: int
    cost: float
    slack_bytes: int


def allocate(groups: Sequence[Group], budget_bytes: int) -> Allocation:
    """Choose for least total cost within a budget.

    The same groups and budget give the same choices, and a larger budget never gives a higher cost: rounding
    depends on the groups alone. Among allocations of equal cost the smallest is taken.

    Args:
        groups: in any order; names unique.
        budget_bytes: what all choices together may take.

    Raises:
        QuantError: two groups of one name, or not even the smallest candidates fit; the error names the
            smallest possible size.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
        raise QuantError(f"the budget is {budget_bytes!r}, must be a whole number of bytes")
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise QuantError(f"two groups have the name {twice!r}; each must have its own")
    least = sum(group.least_bytes for group in groups)
    if least > budget_bytes:
        raise QuantError(
            f"a budget of {budget_bytes:,} bytes cannot be kept: the smallest candidates of all groups take "
            f"{least:,}; allow at least that, or offer formats with fewer bits"
        )
    unit, slack = _unit(groups)
    columns = (budget_bytes - least) // unit + 1
    picked = _solve(groups, unit, columns)
    chosen = {group.name: group.candidates[index] for group, index in zip(groups, picked, strict=True)}
    return Allocation(
        MappingProxyType(chosen),
        sum(candidate.size_bytes for candidate in chosen.values()),
        float(sum(candidate.cost for candidate in chosen.values())),
        slack,
    )


def _unit(groups: Sequence[Group]) -> tuple[int, int]:
    """Bytes that a column stands for, and how many bytes rounding up to it can take in all."""
    extras = [candidate.size_bytes - group.least_bytes for group in groups for candidate in group.candidates]
    divisor = math.gcd(*extras)
    if divisor == 0:  # nothing to choose by size
        return 1, 0
    span = sum(group.most_bytes - group.least_bytes for group in groups)
    unit = divisor * -(-span // (UNITS * divisor))
    rounded = sum(
        any((c.size_bytes - group.least_bytes) % unit for c in group.candidates) for group in groups
    )
    return unit, rounded * (unit - divisor)


def _solve(groups: Sequence[Group], unit: int, columns: int) -> list[int]:
    """Index of the chosen candidate of every group.

    Column b of the table holds the least cost of all groups so far that take exactly b units more than their
    smallest candidates, inf if that cannot be.
    """
    sizes = [
        [-(-(candidate.size_bytes - group.least_bytes) // unit) for candidate in group.candidates]
        for group in groups
    ]
    columns = min(columns, sum(max(column) for column in sizes) + 1)
    costs = np.full(columns, np.inf)
    costs[0] = 0.0
    choices: list[NDArray[np.unsignedinteger]] = []
    for group, shifts in zip(groups, sizes, strict=True):
        grown = np.full(columns, np.inf)
        choice = np.zeros(columns, np.min_scalar_type(len(shifts)))
        for index, shift in enumerate(shifts):
            if shift >= columns:
                continue
            trial = costs[: columns - shift] + group.candidates[index].cost
            better = trial < grown[shift:]
            np.copyto(grown[shift:], trial, where=better)
            choice[shift:][better] = index
        costs = grown
        choices.append(choice)
    place = int(np.argmin(costs))  # the first of equals is the smallest
    picked = []
    for choice, shifts in zip(reversed(choices), reversed(sizes), strict=True):
        index = int(choice[place])
        picked.append(index)
        place -= shifts[index]
    return picked[::-1]
