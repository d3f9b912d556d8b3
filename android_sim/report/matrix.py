"""Devices down, bundles across: what would live where.

In: simulations or forecasts. Out: a table as text, as Markdown, and as rows for a page. Knows nothing of how
they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoglm_edge.android_sim.planned import Planned
from autoglm_edge.android_sim.projection import Range
from autoglm_edge.android_sim.simulation import Simulation
from autoglm_edge.android_sim.verdict import LABELS
from autoglm_edge.measure.figures import columns

from .words import size

_HEAD = ("device", "state", "limit")


@dataclass(frozen=True)
class Cell:
    """One bundle on one device.

    Attributes:
        verdict: name.
        lives: whether that is well.
        headroom_bytes: the limit less the peak of anonymous memory.
        tokens_per_s: projected; None if not projected.
    """

    verdict: str
    lives: bool
    headroom_bytes: int
    tokens_per_s: Range | None

    @property
    def words(self) -> str:
        """For people."""
        label = LABELS.get(self.verdict, self.verdict)
        left = f", {size(self.headroom_bytes)} left" if self.verdict.startswith("fits") else ""
        rate = ""
        if self.tokens_per_s and self.verdict.startswith("fits"):
            rate = f", {self.tokens_per_s} tokens/s"
        return f"{label}{left}{rate}"


@dataclass(frozen=True)
class Matrix:
    """All of them.

    Attributes:
        devices: id, state and limit in bytes of each row, in order; files of users may share an id.
        subjects: names of the columns, in order.
        cells: by row and name of the column; a run that was not made is not there.
    """

    devices: tuple[tuple[str, str, int], ...]
    subjects: tuple[str, ...]
    cells: dict[tuple[tuple[str, str, int], str], Cell]

    @classmethod
    def of(cls, found: Sequence[Simulation | Planned]) -> Matrix:
        """From simulations or forecasts, in the order in which devices and bundles come."""
        devices: dict[tuple[str, str, int], None] = {}
        subjects: dict[str, None] = {}
        cells = {}
        for item in found:
            row, name = (item.device.id, str(item.budget.state), item.budget.limit_bytes), subject_name(item)
            devices[row] = None
            subjects[name] = None
            cells[row, name] = cell(item)
        return cls(tuple(devices), tuple(subjects), cells)

    @property
    def lives(self) -> bool:
        """Whether every cell is well."""
        return all(item.lives for item in self.cells.values())

    def rows(self) -> list[tuple[str, ...]]:
        """Head and cells as words."""
        found: list[tuple[str, ...]] = [(*_HEAD, *self.subjects)]
        for row in self.devices:
            device, state, limit = row
            cells = [self.cells.get((row, name)) for name in self.subjects]
            words = ["not run" if item is None else item.words for item in cells]
            found.append((device, state, size(limit), *words))
        return found

    def to_table(self) -> str:
        """Lines for people."""
        return "\n".join(columns(self.rows()))

    def to_markdown(self) -> str:
        """A table for documents."""
        head, *rows = self.rows()
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])

    def to_dict(self) -> list[dict[str, Any]]:
        """Cells as JSON values."""
        return [
            {
                "device": device,
                "state": state,
                "limit_bytes": limit,
                "bundle": name,
                "verdict": item.verdict,
                "lives": item.lives,
                "headroom_bytes": item.headroom_bytes,
                "projected_tokens_per_s": None if item.tokens_per_s is None else item.tokens_per_s.to_json(),
            }
            for ((device, state, limit), name), item in self.cells.items()
        ]


def subject_name(item: Simulation | Planned) -> str:
    """A bundle's name, with its recipe where that says more."""
    subject = item.subject
    return subject.name if subject.recipe in subject.name else f"{subject.name} ({subject.recipe})"


def cell(item: Simulation | Planned) -> Cell:
    """What a matrix shows of one."""
    rate = None if item.projection is None else item.projection.burst
    if isinstance(item, Simulation):
        return Cell(item.verdict.name, item.lives, item.verdict.headroom_bytes, rate)
    return Cell(item.forecast.expected, item.lives, item.forecast.headroom_bytes, rate)
