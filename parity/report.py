"""The report of a validation: what was compared, the figures, the verdict.

In: comparisons and criteria. Out: `Report`, as a table for people and as JSON for programs. The page with
plots is in page.py. Knows nothing of how figures are measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .case import Fingerprint
from .comparison import Comparison
from .limits import Criterion
from .metrics import Share, Spread


@dataclass(frozen=True)
class InputFault:
    """Something about a prompt that is not as recorded.

    Attributes:
        case: name of the prompt.
        what: "grid", "patches", "ids" or "positions".
        detail: what was found and what was recorded.
        fatal: the case could not be scored.
    """

    case: str
    what: str
    detail: str
    fatal: bool = False


@dataclass(frozen=True)
class Subject:
    """The bundle that was validated.

    Attributes:
        path: folder.
        fingerprint: of its content.
        model: where it came from.
        recipe: name.
        total_bytes: of all files.
    """

    path: str
    fingerprint: str
    model: str
    recipe: str
    total_bytes: int


@dataclass(frozen=True)
class Report:
    """What a validation found.

    Attributes:
        bundle: what was validated.
        reference: path of the reference.
        reference_sha256: its digest.
        fingerprint: what it was recorded from.
        limits: name of the row of limits.
        cases: prompts in the reference.
        faults: inputs that are not as recorded.
        candidate: the bundle's figures; None if no prompt could be scored.
        floor: figures of the reference's own rounding, if given.
        baselines: figures of others, if given.
        criteria: limits and whether they are kept.
        seconds: it took.
    """

    bundle: Subject
    reference: str
    reference_sha256: str
    fingerprint: Fingerprint
    limits: str
    cases: int
    faults: tuple[InputFault, ...]
    candidate: Comparison | None
    floor: Comparison | None
    baselines: tuple[Comparison, ...]
    criteria: tuple[Criterion, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every criterion is kept."""
        return all(criterion.kept for criterion in self.criteria)

    @property
    def recorded(self) -> str:
        """The reference in a few words."""
        return f"{self.fingerprint.title}, {self.cases} prompts ({self.fingerprint.prompt_set})"

    @property
    def columns(self) -> list[Comparison]:
        """Bundle, floor and baselines, as far as they are there."""
        return [item for item in (self.candidate, self.floor, *self.baselines) if item is not None]

    def figures(self) -> dict[str, Any]:
        """The few figures that a manifest and a model card keep; names as in docs/parity.md."""
        own = self.candidate
        found: dict[str, Any] = {
            "parity_passed": self.passed,
            "parity_limits": self.limits,
            "parity_reference": self.recorded,
            "parity_reference_sha256": self.reference_sha256,
        }
        if own is not None:
            found |= {
                "kl_mean": _rounded(own.answer.kl.mean),
                "kl_p99": _rounded(own.answer.kl.p99),
                "top1_agreement": _rounded(own.answer.top1.value),
                "perplexity_change": _rounded(own.text.perplexity.change),
                "same_answers": f"{own.same_answers.hits}/{own.same_answers.total}",
                "vision_cosine": _rounded(own.vision_cosine),
                "actions_equal": f"{own.actions.arguments.hits}/{own.actions.arguments.total}",
                "taps_in_box": f"{own.actions.candidate_hits.hits}/{own.actions.candidate_hits.total}",
            }
        if self.floor is not None:
            found["floor_kl_mean"] = _rounded(self.floor.answer.kl.mean)
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self, *, indent: int | None = 2) -> str:
        """The whole report; numbers that do not exist are null."""
        document = {"passed": self.passed, "figures": self.figures(), **_plain(self)}
        return json.dumps(_plain(document), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_table(self) -> str:
        """The report for a terminal."""
        lines = [
            f"bundle     {self.bundle.path} ({self.bundle.recipe})",
            f"reference  {self.reference}: {self.fingerprint.model}, {self.recorded}",
            "",
        ]
        columns = self.columns
        if columns:
            rows = [["", *(column.title for column in columns)], *figure_rows(columns)]
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            for row in rows:
                cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
                lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
            lines.append("")
        lines += [f"input differs: {item.case}: {item.what}: {item.detail}" for item in self.faults[:10]]
        if len(self.faults) > 10:
            lines.append(f"input differs: {len(self.faults) - 10} more")
        for item in self.criteria:
            sign = "≤" if item.at_most else "≥"
            note = f"  ({item.note})" if item.note else ""
            lines.append(
                f"{'ok  ' if item.kept else 'FAIL'}  {item.name}: {number(item.value)}, must be {sign} "
                f"{number(item.limit)}{note}"
            )
        lines.append(
            f"{'PASSED' if self.passed else 'FAILED'} by the limits of {self.limits}, {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def figure_rows(columns: Sequence[Comparison]) -> list[list[str]]:
    """Name and a cell per comparison, of every figure."""

    def row(name: str, cells: list[str]) -> list[str]:
        return [name, *cells]

    rows = []
    for scope, label in (("answer", "answers"), ("text", "prompts and answers")):
        parts = [getattr(column, scope) for column in columns]
        rows += [
            row(f"KL in {label}, mean", [number(p.kl.mean) for p in parts]),
            row("   ± standard error", [number(p.kl_error) for p in parts]),
            row("   90th percentile", [number(p.kl.p90) for p in parts]),
            row("   99th percentile", [number(p.kl.p99) for p in parts]),
            row("   highest", [number(p.kl.highest) for p in parts]),
            row("   mass taken as one token", [number(p.tail_mass) for p in parts]),
            row("same likeliest token", [share(p.top1) for p in parts]),
            row("perplexity of the reference", [f"{p.perplexity.reference:.4f}" for p in parts]),
            row(
                "   change",
                [f"{p.perplexity.change:+.2g} ± {p.perplexity.standard_error:.1g}" for p in parts],
            ),
            row("RMS Δp", [f"{100 * p.rms_delta_p:.3g} %" for p in parts]),
        ]
    rows += [
        row("same greedy answer", [share(c.same_answers) for c in columns]),
        row("   common prefix, mean", [_prefix(c) for c in columns]),
    ]
    if any(column.images for column in columns):
        rows += [
            row("vision features, mean cosine", [f"{c.vision_cosine:.6f}" for c in columns]),
            row("   least cosine", [f"{c.least_vision_cosine:.6f}" for c in columns]),
        ]
    if any(column.actions.kinds.total for column in columns):
        rows += [
            row("same kind of action", [share(c.actions.kinds) for c in columns]),
            row("same arguments", [share(c.actions.arguments) for c in columns]),
            row(
                "click distance, mean / highest",
                [
                    f"{number(c.actions.distance.mean)} / {number(c.actions.distance.highest)}"
                    for c in columns
                ],
            ),
            row(
                "   in pixels",
                [
                    f"{number(c.actions.distance_pixels.mean)} / {number(c.actions.distance_pixels.highest)}"
                    for c in columns
                ],
            ),
        ]
        if any(column.actions.reference_hits.total for column in columns):
            rows += [
                row("taps in the box", [share(c.actions.candidate_hits) for c in columns]),
                row("   95 % interval", [_interval(c.actions.candidate_hits) for c in columns]),
                row("   of the reference", [share(c.actions.reference_hits) for c in columns]),
            ]
    return rows


def number(value: float) -> str:
    """Three digits, "-" for a number that does not exist."""
    if math.isnan(value):
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 0.99 else f"{value:.6g}"


def share(value: Share) -> str:
    """Percent and counts."""
    return "-" if not value.total else f"{100 * value.value:.2f} % ({value.hits}/{value.total})"


def _interval(value: Share) -> str:
    low, high = value.interval
    return f"{100 * low:.1f} to {100 * high:.1f} %" if value.total else "-"


def _extent(spread: Spread) -> str:
    return f"{number(spread.mean)} / {number(spread.highest)}"


def _prefix(comparison: Comparison) -> str:
    tokens = [outcome.prefix for outcome in comparison.greedy]
    lengths = [outcome.reference_tokens for outcome in comparison.greedy]
    return f"{sum(tokens) / len(tokens):.1f} of {sum(lengths) / len(lengths):.1f}" if tokens else "-"


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.4g}")


def _plain(value: Any) -> Any:
    """JSON values: dataclasses become objects, shares tell their interval, nan and infinities become None."""
    if isinstance(value, Share):
        low, high = value.interval
        return _plain(
            {"hits": value.hits, "total": value.total, "share": value.value, "low": low, "high": high}
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
