"""Times that were measured several times, and what is said of them.

In: seconds of repetitions. Out: mean, median and spread. Knows nothing of what was timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autoglm_edge.errors import RequestError


@dataclass(frozen=True)
class Times:
    """Repetitions of one thing, in seconds, in the order of measurement.

    Attributes:
        seconds: at least one, none of them negative.
    """

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds or not all(math.isfinite(value) and value >= 0 for value in self.seconds):
            raise RequestError(f"times are {self.seconds!r}, must be at least one, finite and not negative")

    @property
    def median_s(self) -> float:
        """The middle one: what a report calls the time."""
        return statistics.median(self.seconds)

    @property
    def mean_s(self) -> float:
        """Their sum by their number."""
        return statistics.fmean(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles by the median, 0 for one repetition; large on a busy machine."""
        if len(self.seconds) < 2 or not self.median_s:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median_s

    def to_json(self) -> dict[str, Any]:
        """Figures and repetitions."""
        return {
            "mean_s": self.mean_s,
            "median_s": self.median_s,
            "spread": self.spread,
            "seconds": list(self.seconds),
        }


def repeat(work: Callable[[], object], count: int, before: Callable[[], object] | None = None) -> Times:
    """Run `work` `count` times; `before` runs before each and is not timed."""
    seconds = []
    for _ in range(count):
        if before is not None:
            before()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return Times(tuple(seconds))


def rounded(value: Any, digits: int = 6) -> Any:
    """A document with its floats rounded to so many significant digits, dataclasses as dicts."""
    if hasattr(value, "__dataclass_fields__"):
        return rounded(asdict(value), digits)
    if isinstance(value, dict):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A table of text: the first column to the left, the others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
