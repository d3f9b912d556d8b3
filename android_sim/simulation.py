"""The report of a simulation: one run of a bundle on one device, as JSON, as lines, and as what a page shows.

In: what was run, what became of it, what was foretold. Out: `Simulation`. Measures nothing, decides nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from autoglm_edge.measure.figures import columns
from autoglm_edge.measure.machine import Machine
from autoglm_edge.runtime.bundle import Bundle

from .budget import Budget
from .child_result import ParityResult
from .device import Device
from .forecast import Forecast, PhaseError
from .need import PHASES
from .projection import Projection
from .report.words import parity_text, plain, projection_rows, reach_rows, size
from .trace import Trace
from .verdict import LABELS, Verdict


@dataclass(frozen=True)
class Subject:
    """The bundle that is meant.

    Attributes:
        name: of its folder.
        model: it was exported from.
        recipe: name.
        fingerprint: of its content.
        total_bytes: of all files.
        part_bytes: weights by part.
    """

    name: str
    model: str
    recipe: str
    fingerprint: str
    total_bytes: int
    part_bytes: dict[str, int]

    @classmethod
    def of(cls, bundle: Bundle) -> Subject:
        """Of an opened bundle."""
        manifest = bundle.manifest
        return cls(
            bundle.path.name,
            manifest.source.model,
            str(manifest.recipe.get("name", "?")),
            bundle.fingerprint,
            manifest.total_bytes,
            {name: part.weight_bytes for name, part in manifest.parts.items()},
        )


@dataclass(frozen=True)
class Simulation:
    """One run.

    Attributes:
        subject: the bundle.
        device: the profile.
        budget: what the app had on it.
        trace: of the run.
        verdict: on it.
        forecast: of the same question, made without looking at the run.
        errors: of the forecast; empty if the run never came to its end.
        projection: decoding on the device; None if the profile does not tell enough.
        machine: that it ran on.
        prepared: whether weights were prepared outside the limits first.
        date: ISO.
        notes: what must be known with it, a sentence each.
    """

    subject: Subject
    device: Device
    budget: Budget
    trace: Trace
    verdict: Verdict
    forecast: Forecast | None
    errors: tuple[PhaseError, ...]
    projection: Projection | None
    machine: Machine
    prepared: bool
    date: str
    notes: tuple[str, ...] = ()

    @property
    def lives(self) -> bool:
        """Whether the app would be well on the device."""
        return self.verdict.lives

    @property
    def parity(self) -> ParityResult | None:
        """The output inside the limits against a reference."""
        return None if self.trace.result is None else self.trace.result.parity

    @property
    def host_tokens_per_s(self) -> float | None:
        """Decoding on this host, inside the limits; None if it did not come so far."""
        result = self.trace.result
        return result.decode_tokens_per_s or None if result else None

    @property
    def title(self) -> str:
        """The run in a few words."""
        return f"{self.subject.name} on {self.device.name}, {self.budget.state}"

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """All of it as JSON values.

        Args:
            samples: also every sample, as columns.
        """
        verdict, trace, result = self.verdict, self.trace, self.trace.result
        projection = self.projection
        document: dict[str, Any] = {
            "bundle": self.subject.name,
            "model": self.subject.model,
            "recipe": self.subject.recipe,
            "fingerprint": self.subject.fingerprint,
            "bundle_bytes": self.subject.total_bytes,
            "part_bytes": self.subject.part_bytes,
            "date": self.date,
            "device": self.device.id,
            "device_name": self.device.name,
            "state": self.budget.state,
            "lives": self.lives,
            "verdict": verdict.name,
            "reason": verdict.reason,
            "phase": verdict.phase,
            "at_s": verdict.at_s,
            "enforcement": trace.enforced.kind,
            "enforced": asdict(trace.enforced),
            "limit_bytes": self.budget.limit_bytes,
            "limit_basis": self._limit_basis(),
            "swap_bytes": trace.enforced.swap_bytes,
            "peak_anon_swap_bytes": verdict.peak_bytes,
            "peak_phase": verdict.peak_phase,
            "headroom_bytes": verdict.headroom_bytes,
            "mapped_bytes": verdict.mapped_bytes,
            "refault_bytes_per_token": verdict.refault_bytes_per_token,
            "psi_some_ms_per_s": verdict.psi_some_ms_per_s,
            "psi_full_ms_per_s": verdict.psi_full_ms_per_s,
            "swap_share": verdict.swap_share,
            "crossed_at_s": verdict.crossed_at_s,
            "ends_within_delay": verdict.ends_within_delay,
            "lmkd_risk": verdict.lmkd_risk,
            "play": None if verdict.play is None else {**asdict(verdict.play), "kept": verdict.play.kept},
            "limiter": None if verdict.limiter is None else asdict(verdict.limiter),
            "over_limiter": verdict.over_limiter,
            "phases": self.phases(),
            "prepared": self.prepared,
            "host": self.machine.to_json(),
            "host_tokens_per_s": self.host_tokens_per_s,
            "host_prefill_tokens_per_s": result.prefill_tokens_per_s if result else None,
            "projected_tokens_per_s": projection.burst.to_json() if projection else None,
            "projected_sustained_tokens_per_s": projection.sustained.to_json() if projection else None,
            "projection": projection.to_json() if projection else None,
            "parity": None if self.parity is None else asdict(self.parity),
            "answer": None if result is None else _answer(result.to_json()),
            "forecast": None if self.forecast is None else self.forecast.to_json(),
            "forecast_errors": [error.to_json() for error in self.errors],
            "sampling": {
                "interval_s": trace.interval_s,
                "samples": len(trace.samples),
                "share_of_a_core": trace.sampling_share,
            },
            "seconds": trace.seconds,
            "message": trace.message,
            "notes": [*self.notes, *verdict.notes],
        }
        if samples:
            document["samples"] = trace.to_json()["samples"]
        cleaned: dict[str, Any] = plain(document)
        return cleaned

    def to_json(self, *, samples: bool = False) -> str:
        """One document on one line."""
        return json.dumps(self.to_dict(samples=samples), ensure_ascii=False, allow_nan=False)

    def phases(self) -> list[dict[str, Any]]:
        """Seconds and peaks of each phase that the child reported; None where no sample fell into it."""
        found = []
        for phase in self.trace.phases:
            seen = bool(self.trace.during(phase.name))
            found.append(
                {
                    "phase": phase.name,
                    "start_s": phase.start_s,
                    "stop_s": phase.stop_s,
                    "peak_held_bytes": self.trace.peak_held(phase.name).bytes if seen else None,
                    "peak_mapped_bytes": self.trace.peak_file(phase.name).bytes if seen else None,
                }
            )
        return found

    def rows(self) -> list[tuple[str, str]]:
        """Label and words, line for line, for a terminal or a page."""
        verdict, trace, result = self.verdict, self.trace, self.trace.result
        held = trace.enforced.kind.replace("_", " ")
        rows = [
            ("bundle", f"{self.subject.name} ({self.subject.recipe}), {size(self.subject.total_bytes)}"),
            ("device", f"{self.device.name} ({self.device.id}), {self.budget.state}"),
            ("limit", f"{size(self.budget.limit_bytes)} by {held}; {self._limit_basis()}"),
            ("verdict", f"{LABELS[verdict.name].upper()}: {verdict.reason}"),
            ("peak", f"{size(verdict.peak_bytes)} anonymous + shared + swapped{_in(verdict.peak_phase)}"),
            ("mapped", f"{size(verdict.mapped_bytes)} of files were resident"),
        ]
        if trace.completed:
            rows.insert(-1, ("headroom", size(verdict.headroom_bytes)))
        elif self.forecast is not None:
            rows.append(
                (
                    "forecast",
                    f"it would have needed {size(self.forecast.need.peak)} of anonymous memory, in "
                    f"{self.forecast.need.peak_phase}",
                )
            )
        if verdict.refault_bytes_per_token is not None and result is not None:
            rows.append(("read again", f"{size(verdict.refault_bytes_per_token)} per token"))
        if verdict.psi_some_ms_per_s is not None:
            rows.append(
                (
                    "waited",
                    f"{verdict.psi_some_ms_per_s:.0f} ms for memory in the worst second of "
                    f"{'decoding' if any(item.name == 'decode' for item in trace.phases) else 'its run'}; "
                    f"{self.budget.psi_some_ms_per_s} wake the low memory killer",
                )
            )
        rows += self._android_rows()
        if result is not None:
            rows.append(
                (
                    "this host",
                    f"{result.decode_tokens_per_s:.2f} tokens/s inside the limits, prompt of "
                    f"{result.prompt_tokens} tokens at {result.prefill_tokens_per_s:.1f} tokens/s",
                )
            )
            rows.append(("ran with", f"weights {result.plan.weights}, prompts by {result.plan.prefill}"))
        rows += projection_rows(self.projection)
        if self.parity is not None:
            rows.append(("parity", parity_text(self.parity)))
        if (whole := next((item for item in self.errors if item.phase == "peak"), None)) is not None:
            rows.append(
                (
                    "forecast",
                    f"{size(whole.forecast_bytes)} anonymous at the peak, {100 * whole.error:+.0f} % beside "
                    "this run",
                )
            )
        if self.forecast is not None:
            rows += reach_rows(self.forecast)
        return rows

    def to_table(self) -> str:
        """Lines for people."""
        lines = [f"{label:<11}{words}" for label, words in self.rows()]
        if self.trace.phases:
            lines += ["", *columns(self.phase_table())]
        lines += [f"note       {note}" for note in (*self.notes, *self.verdict.notes)]
        return "\n".join(lines)

    def phase_table(self) -> list[tuple[str, ...]]:
        """Head and rows: seconds, peaks and forecast of each phase."""
        rows: list[tuple[str, ...]] = [
            ("phase", "seconds", "anonymous", "forecast", "error", "mapped", "without limit")
        ]
        foretold = {item.phase: item for item in self.errors if item.what == "anonymous"}
        for entry in self.phases():
            name, stop = entry["phase"], entry["stop_s"]
            seconds = (self.trace.seconds if stop is None else stop) - entry["start_s"]
            error = foretold.get(name)
            known = self.forecast is not None and name in PHASES
            rows.append(
                (
                    name,
                    f"{seconds:.2f}",
                    _seen(entry["peak_held_bytes"]),
                    size(self.forecast.need.anonymous(name)) if known and self.forecast else "",
                    "" if error is None else f"{100 * error.error:+.0f} %",
                    _seen(entry["peak_mapped_bytes"]),
                    size(self.forecast.need.mapped(name)) if known and self.forecast else "",
                )
            )
        return rows

    def _limit_basis(self) -> str:
        figure = self.device.figures[f"mem_{self.budget.state}"]
        return f"{figure.basis}: {figure.source}"

    def _android_rows(self) -> list[tuple[str, str]]:
        verdict, rows = self.verdict, []
        if verdict.lmkd_risk != "unknown":
            share = self.trace.peak_anon().bytes / self.budget.mem_total_bytes
            rows.append(
                (
                    "lmkd risk",
                    f"{verdict.lmkd_risk}: {100 * share:.0f} % of {size(self.budget.mem_total_bytes)} "
                    "is anonymous (an estimate)",
                )
            )
        if (band := verdict.play) is not None:
            place = f"{size(band.p90_bytes)} at the 90th percentile"
            if band.threshold_bytes is None:
                words = f"{place}; the {band.name} band has no threshold"
            else:
                side = "within" if band.kept else "ABOVE"
                words = f"{place}, {side} the {size(band.threshold_bytes)} of the {band.name} band"
            rows.append(("Play", words))
        if verdict.limiter is not None:
            word = "ABOVE" if verdict.over_limiter else "below"
            rows.append(
                (
                    "limiter",
                    f"{word} the {size(verdict.limiter.kill_bytes)} at which Android 17's set "
                    f"'{verdict.limiter.name}' kills",
                )
            )
        return rows


def _seen(count: int | None) -> str:
    return "too short" if count is None else size(count)


def _in(phase: str) -> str:
    return f", in {phase}" if phase else ""


def _answer(result: dict[str, Any]) -> dict[str, Any]:
    """What the child said, without what stands elsewhere."""
    return {name: value for name, value in result.items() if name != "parity"}
