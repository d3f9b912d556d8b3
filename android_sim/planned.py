"""The report of a forecast: what is expected of a bundle on a device, without a run, as JSON and as lines.

In: what was meant, what was foretold. Out: `Planned`. Decides nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from autoglm_edge.measure.figures import columns

from .budget import Budget
from .device import Device
from .forecast import Forecast
from .need import PHASES
from .projection import Projection
from .report.words import plain, projection_rows, reach_rows, size
from .simulation import Subject
from .verdict import LABELS


@dataclass(frozen=True)
class Planned:
    """A forecast without a run.

    Attributes:
        subject: the bundle.
        device: the profile.
        budget: what the app has on it.
        forecast: of the question.
        projection: decoding on the device; None if the profile does not tell enough.
    """

    subject: Subject
    device: Device
    budget: Budget
    forecast: Forecast
    projection: Projection | None

    @property
    def lives(self) -> bool:
        """Whether the app is expected to be well on the device."""
        return self.forecast.expected in ("fits", "fits_swap")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        projection = self.projection
        document = {
            "bundle": self.subject.name,
            "model": self.subject.model,
            "recipe": self.subject.recipe,
            "fingerprint": self.subject.fingerprint,
            "bundle_bytes": self.subject.total_bytes,
            "device": self.device.id,
            "device_name": self.device.name,
            "state": self.budget.state,
            "lives": self.lives,
            "verdict": self.forecast.expected,
            "measured": False,
            **{f"forecast_{name}": value for name, value in self.forecast.to_json().items()},
            "limit_bytes": self.budget.limit_bytes,
            "headroom_bytes": self.forecast.headroom_bytes,
            "projected_tokens_per_s": projection.burst.to_json() if projection else None,
            "projected_sustained_tokens_per_s": projection.sustained.to_json() if projection else None,
            "projection": projection.to_json() if projection else None,
        }
        cleaned: dict[str, Any] = plain(document)
        return cleaned

    def to_json(self) -> str:
        """One document on one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_table(self) -> str:
        """Lines for people."""
        found, figure = self.forecast, self.device.figures[f"mem_{self.budget.state}"]
        words = {"killed": "killed", **LABELS}[found.expected].upper()
        question = found.question
        pictures = f" with {question.image_tokens} of a picture" if question.image_tokens else ""
        rows = [
            ("bundle", f"{self.subject.name} ({self.subject.recipe}), {size(self.subject.total_bytes)}"),
            ("device", f"{self.device.name} ({self.device.id}), {self.budget.state}"),
            ("limit", f"{size(self.budget.limit_bytes)}; {figure.basis}: {figure.source}"),
            (
                "question",
                f"{question.prompt_tokens} tokens{pictures}, {question.answer_tokens} of an answer",
            ),
            ("run with", f"weights {found.plan.weights}, prompts by {found.plan.prefill}"),
            ("expected", f"{words}: {size(found.need.peak)} anonymous in {found.need.peak_phase}"),
            ("headroom", size(found.headroom_bytes)),
            *reach_rows(found),
            *projection_rows(self.projection),
        ]
        lines = [f"{label:<11}{text}" for label, text in rows]
        lines += ["", *columns(self.item_table())]
        lines += [f"note       {note}" for note in found.need.notes]
        return "\n".join(lines)

    def item_table(self) -> list[tuple[str, ...]]:
        """Head and rows: bytes of each item by phase, and their sums."""
        rows: list[tuple[str, ...]] = [("", "kind", *PHASES)]
        merged: dict[tuple[str, str], dict[str, int]] = {}
        for item in self.forecast.need.items:
            cells = merged.setdefault((item.name, item.memory), dict.fromkeys(PHASES, 0))
            for phase in item.phases:
                cells[phase] += item.bytes
        for (name, memory), cells in sorted(merged.items(), key=lambda entry: entry[0][1] == "mapped"):
            rows.append((name, memory, *(size(cells[phase]) if cells[phase] else "" for phase in PHASES)))
        need = self.forecast.need
        rows.append(("sum", "anonymous", *(size(need.anonymous(phase)) for phase in PHASES)))
        rows.append(("sum", "mapped", *(size(need.mapped(phase)) for phase in PHASES)))
        return rows
