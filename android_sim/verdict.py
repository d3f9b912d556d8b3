"""The verdict on a run: whether the app would have lived on the device, and how well.

In: a `Trace` and the `Budget` it ran under. Out: a `Verdict`. The first that holds, of:

    interrupted     the caller stopped it: nothing is known
    killed_oom      the kernel killed it for the limit
    killed_limiter  anonymous + shared + swapped memory crossed the line above which Android 17 kills
    alloc_failed    it was refused memory
    timeout         it did not come to its end in the time it had
    failed          it ended with an error that has nothing to do with memory, or somebody else killed it
    exceeded        it came to its end, but above a limit that this host could not hold it to
    fits_thrash     it lives, but reads its weights from storage again and again
    fits_swap       it lives, but a part of its memory was swapped out in decoding
    fits            none of these

Knows nothing of bundles and devices beyond the numbers of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .android import LimiterSet, PlayBand, Risk, limiter_set, lmkd_risk, play_band
from .budget import Budget
from .report.words import size
from .trace import Sample, Trace

VerdictName = Literal[
    "interrupted",
    "killed_oom",
    "killed_limiter",
    "alloc_failed",
    "timeout",
    "failed",
    "exceeded",
    "fits_thrash",
    "fits_swap",
    "fits",
]
LIVES: tuple[VerdictName, ...] = ("fits", "fits_swap")
"""Verdicts with which an app may be shipped for a device."""
LABELS: dict[str, str] = {
    "interrupted": "interrupted",
    "killed_oom": "killed: out of memory",
    "killed_limiter": "killed by the limiter",
    "alloc_failed": "memory refused",
    "timeout": "out of time",
    "failed": "failed",
    "exceeded": "limit exceeded",
    "fits_thrash": "lives, but thrashes",
    "fits_swap": "fits, swapping",
    "fits": "fits",
}
"""Verdicts in words."""
THRASH_SHARE = 0.01
"""Refaults per token, as a share of the weights, from which a run counts as thrashing."""
NOISE_BYTES = 2_000_000
"""Refaults of a whole decoding below which nothing is thrashing: pages of libraries come and go anywhere."""
LIBRARY_BYTES = 64_000_000
"""Mapped pages that may cost a run nothing: code of interpreter and libraries that others use as well."""
SWAP_SHARE = 0.01
"""Swapped share of anonymous memory from which a run counts as swapping."""
PERCENTILE = 0.90
"""Of Play's metric."""


@dataclass(frozen=True)
class Verdict:
    """What became of a run.

    Attributes:
        name: the verdict.
        reason: one sentence.
        phase: in which it was decided; "" if that is the whole run.
        at_s: when; None if that is the whole run.
        peak_bytes: most of anonymous + shared + swapped.
        peak_phase: where that was.
        headroom_bytes: the limit less that; negative if it was crossed.
        mapped_bytes: most resident pages of files in decoding, or in all if there was none: the working set
            that the limit let stay.
        refault_bytes_per_token: of decoding; None where the host does not tell.
        psi_some_ms_per_s: in the worst second of decoding; None where the host does not tell.
        psi_full_ms_per_s: in the worst second of decoding, all tasks waiting.
        swap_share: of anonymous memory in decoding.
        crossed_at_s: when anonymous + shared + swapped crossed the kill line; None if never.
        ends_within_delay: whether the run ended by itself before the killer's delay was over; None if the
            line was never crossed.
        lmkd_risk: of the low memory killer, by the share of anonymous memory.
        play: Google Play's band; None if not a phone.
        limiter: the published set of Android 17's limiter for so much memory; None if there is none.
        over_limiter: whether the peak is above that set's own kill line; None without a set.
        notes: what must be known with it, a sentence each.
    """

    name: VerdictName
    reason: str
    phase: str
    at_s: float | None
    peak_bytes: int
    peak_phase: str
    headroom_bytes: int
    mapped_bytes: int
    refault_bytes_per_token: float | None
    psi_some_ms_per_s: float | None
    psi_full_ms_per_s: float | None
    swap_share: float
    crossed_at_s: float | None
    ends_within_delay: bool | None
    lmkd_risk: Risk
    play: PlayBand | None
    limiter: LimiterSet | None
    over_limiter: bool | None
    notes: tuple[str, ...] = ()

    @property
    def lives(self) -> bool:
        """Whether it would be well on the device."""
        return self.name in LIVES

    def to_json(self) -> dict[str, Any]:
        """By name."""
        document = asdict(self)
        if self.play is not None:
            document["play"]["kept"] = self.play.kept
        return document


@dataclass(frozen=True)
class _Steady:
    """What a run did while it decoded, the first token aside as far as that can be told."""

    samples: tuple[Sample, ...]
    tokens: int
    refault_per_token: float | None
    some_ms: float | None
    full_ms: float | None
    swap_share: float
    notes: tuple[str, ...]


def classify(
    trace: Trace, budget: Budget, *, weights_bytes: int | None = None, tokens: int | None = None
) -> Verdict:
    """Judge a run.

    Args:
        trace: of the run.
        budget: it ran under.
        weights_bytes: that a token reads; default what the child said, else the most of mapped memory.
        tokens: that were decoded; default what the child said, else 1: then what was read again counts as a
            whole.
    """
    result = trace.result
    weights = weights_bytes or (result.weights_bytes if result else 0) or trace.peak_file().bytes
    decoded = tokens or (result.decoded_tokens if result else 0) or 1
    line = budget.limit_bytes + trace.enforced.swap_bytes
    peak, steady = trace.peak_held(), _steady(trace, decoded)
    crossed = trace.first_above(line)
    within = None
    if crossed is not None:
        end = trace.seconds or (trace.samples[-1].at_s if trace.samples else crossed)
        within = trace.completed and end - crossed <= budget.kill_delay_s
    name, reason, phase, at_s = _decide(trace, budget, steady, weights, line, crossed, within)
    mapped = max(
        (sample.file_bytes for sample in steady.samples or trace.samples),
        default=0,
    )
    found_set = limiter_set(budget.mem_total_bytes, budget.state) if budget.android else None
    return Verdict(
        name=name,
        reason=reason,
        phase=phase,
        at_s=at_s,
        peak_bytes=peak.bytes,
        peak_phase=peak.phase,
        headroom_bytes=budget.limit_bytes - peak.bytes,
        mapped_bytes=mapped,
        refault_bytes_per_token=steady.refault_per_token,
        psi_some_ms_per_s=steady.some_ms,
        psi_full_ms_per_s=steady.full_ms,
        swap_share=steady.swap_share,
        crossed_at_s=crossed,
        ends_within_delay=within,
        lmkd_risk=lmkd_risk(trace.peak_anon().bytes, budget.mem_total_bytes if budget.android else 0),
        play=play_band(budget.mem_total_bytes, budget.state, play_p90(trace)) if budget.android else None,
        limiter=found_set,
        over_limiter=None if found_set is None else peak.bytes > found_set.kill_bytes,
        notes=(*trace.enforced.notes, *steady.notes, *_swap_note(trace, budget)),
    )


def play_p90(trace: Trace) -> int:
    """The 90th percentile of anonymous + swapped bytes over the time of a run, as Play counts."""
    values = sorted(sample.anon_bytes + sample.swap_bytes for sample in trace.samples)
    return values[min(len(values) - 1, int(PERCENTILE * len(values)))] if values else 0


def _decide(
    trace: Trace,
    budget: Budget,
    steady: _Steady,
    weights: int,
    line: int,
    crossed: float | None,
    within: bool | None,
) -> tuple[VerdictName, str, str, float | None]:
    """Name, reason, phase, moment: the first rule that holds."""
    held, last = trace.enforced, trace.last_phase
    end = trace.seconds or (trace.samples[-1].at_s if trace.samples else 0.0)
    if trace.ending == "interrupted":
        return "interrupted", "the run was stopped before its end", last, end
    if trace.killed_by == "limit" or (trace.ending == "killed" and trace.oom_kills > 0):
        seen = trace.samples[-1].held_bytes if trace.samples else 0
        return (
            "killed_oom",
            f"the kernel killed it in {last or 'its run'}: it needs more than the {size(line)} it may have, "
            f"{size(seen)} were the last that was seen",
            last,
            end,
        )
    if crossed is not None:
        phase = trace.phase_at(crossed)
        above = f"anonymous, shared and swapped memory passed {size(line)}"
        if trace.completed and held.kind in ("watchdog", "none"):
            more = "; it ended by itself before a killer would have come" if within else ""
            return "exceeded", f"{above}, and this host could not hold it back{more}", phase, crossed
        if within:
            wait = (
                f"; it ended within the {budget.kill_delay_s:g} s that Android 17 waits, the next one may not"
            )
        elif budget.kill_delay_s:
            wait = f"; Android 17 kills {budget.kill_delay_s:g} s later"
        else:
            wait = ""
        return "killed_limiter", f"{above}{wait}", phase, crossed
    if trace.killed_by == "watchdog":
        return "killed_limiter", f"the watchdog killed it above {size(line)}", last, end
    if trace.alloc_failed:
        return "alloc_failed", f"it was refused memory{_quoted(trace.message)}", last, end
    if trace.ending == "timeout":
        thrashes = _thrash_reason(steady, weights, budget)
        return "timeout", "it did not end in time" + (f"; {thrashes}" if thrashes else ""), last, end
    if not trace.completed:
        how = f"by signal {trace.signal}" if trace.signal else f"with status {trace.exit_code}"
        return "failed", f"it ended {how}{_quoted(trace.message)}", last, end
    return _fitting(trace, budget, steady, weights)


def _fitting(
    trace: Trace, budget: Budget, steady: _Steady, weights: int
) -> tuple[VerdictName, str, str, float | None]:
    """The verdict on a run that came to its end within the kill line."""
    phase = "decode" if _decoding(trace) else ""
    if (found := _uncounted(trace, budget, steady.samples or trace.samples)) is not None:
        return found
    if reason := _thrash_reason(steady, weights, budget):
        return "fits_thrash", reason, phase, None
    if steady.swap_share > SWAP_SHARE:
        return (
            "fits_swap",
            f"{100 * steady.swap_share:.0f} % of its anonymous memory was swapped out in decoding",
            phase,
            None,
        )
    left = budget.limit_bytes - trace.peak_held().bytes
    return "fits", f"{size(left)} of {size(budget.limit_bytes)} were left at the peak", "", None


def _uncounted(
    trace: Trace, budget: Budget, samples: Sequence[Sample]
) -> tuple[VerdictName, str, str, float | None] | None:
    """What to say where mapped pages beyond the limit were resident and cost the run nothing; else None.

    Either this host does not limit mapped pages, or they were in memory for another process before, which is
    charged for them. Pages of libraries are, on every phone too, and are allowed for.
    """
    worst, free = None, 0
    for sample in samples:
        resident = sample.anon_bytes + sample.shmem_bytes + sample.file_bytes
        if not trace.enforced.counts_files:
            uncounted = sample.file_bytes
        else:
            uncounted = max(
                0, resident - (resident if sample.charged_bytes is None else sample.charged_bytes)
            )
        over = resident > budget.limit_bytes and uncounted > LIBRARY_BYTES
        if over and (worst is None or resident > worst.anon_bytes + worst.shmem_bytes + worst.file_bytes):
            worst, free = sample, uncounted
    if worst is None:
        return None
    total = worst.anon_bytes + worst.shmem_bytes + worst.file_bytes
    if trace.enforced.counts_files:
        why = f"{size(free)} of them were in memory for another process and cost it nothing; try again alone"
    else:
        why = "this host does not limit those"
    reason = (
        f"with its mapped pages it had {size(total)} of {size(budget.limit_bytes)}, and {why}; a device "
        "would drop and read them again"
    )
    return "exceeded", reason, trace.phase_at(worst.at_s), worst.at_s


def _thrash_reason(steady: _Steady, weights: int, budget: Budget) -> str:
    """Why a run counts as thrashing, a part of a sentence; "" if it does not."""
    per_token = steady.refault_per_token
    enough = per_token is not None and per_token * steady.tokens >= NOISE_BYTES
    if per_token is not None and enough and per_token > THRASH_SHARE * weights:
        share = f" ({100 * per_token / weights:.0f} % of its weights)" if weights else ""
        return f"each token reads {size(per_token)}{share} from storage again"
    if steady.some_ms is not None and steady.some_ms > budget.psi_some_ms_per_s:
        return (
            f"in its worst second it waited {steady.some_ms:.0f} ms for memory, "
            f"{budget.psi_some_ms_per_s} ms call the low memory killer"
        )
    return ""


def _steady(trace: Trace, decoded: int) -> _Steady:
    """Figures of decoding; of the whole run if no phase of that name was reported."""
    phases, notes = _decoding(trace), []
    samples = trace.during(*phases)
    reread = trace.change("refaulted_bytes", *phases)
    if reread is None:
        reread = _rereads(samples)
        if reread is not None:
            notes.append("this host does not count refaults: what was read again is estimated from reads")
        else:
            blind = all(sample.read_bytes is None for sample in trace.samples)
            what = "this host tells neither refaults nor reads" if blind else "decoding was too short"
            notes.append(f"{what}, so thrashing cannot be seen")
    swap = max((item.swap_bytes / max(1, item.anon_bytes + item.swap_bytes) for item in samples), default=0.0)
    return _Steady(
        samples,
        decoded,
        None if reread is None else reread / decoded,
        _worst_second(samples, "psi_some_s"),
        _worst_second(samples, "psi_full_s"),
        swap,
        tuple(notes),
    )


def _decoding(trace: Trace) -> tuple[str, ...]:
    """Phases to look at; none stands for all of them.

    A few tokens of a small model may pass between two samples: then what was counted up to the next one,
    after them, is an upper bound. Nothing before them may be: loading reads a lot.
    """
    if trace.during("decode"):
        return ("decode",)
    if any(phase.name == "decode" for phase in trace.phases) and trace.during("decode", "done"):
        return ("decode", "done")
    return ()


def _rereads(samples: Sequence[Sample]) -> float | None:
    """Bytes read beyond what the resident set grew by: those came again."""
    told = [sample for sample in samples if sample.read_bytes is not None]
    if len(told) < 2:
        return None
    read = (told[-1].read_bytes or 0) - (told[0].read_bytes or 0)
    return float(max(0, read - max(0, told[-1].file_bytes - told[0].file_bytes)))


def _worst_second(samples: Sequence[Sample], name: str) -> float | None:
    """Most milliseconds of stall within any second, as the killer's daemon counts; None if not told."""
    points = [(item.at_s, value) for item in samples if (value := getattr(item, name)) is not None]
    if len(points) < 2:
        return None
    worst, first = 0.0, 0
    for at_s, value in points:
        while points[first][0] < at_s - 1.0:
            first += 1
        worst = max(worst, value - points[first][1])
    return 1e3 * worst


def _swap_note(trace: Trace, budget: Budget) -> tuple[str, ...]:
    """Swap that the device has and this host could not give."""
    missing = budget.swap_bytes - trace.enforced.swap_bytes
    if missing <= 0:
        return ()
    return (f"without {size(missing)} of compressed swap that the device would lend: stricter than it",)


def _quoted(message: str) -> str:
    text = " ".join(message.split())
    return f": {text[:300]}" if text else ""
