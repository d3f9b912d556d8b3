"""Traces of runs that never were, for tests and for trying out pictures: a runtime of so many megabytes."""

from __future__ import annotations

import math

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.child_result import ChildResult, PlanFacts
from autoglm_edge.android_sim.trace import Enforced, Phase, Sample, Trace

MB = 1_000_000
PLAN = PlanFacts("layers", "8-bit products are exact", "prepared", "they are there", 2, "2 cores")


def budget(limit_mb: float = 600, swap_mb: float = 0, **changes: object) -> Budget:
    """A budget in megabytes."""
    values = {
        "device": "test-1",
        "state": "visible",
        "limit_bytes": int(limit_mb * MB),
        "swap_bytes": int(swap_mb * MB),
        "kill_delay_s": 30.0,
        "mem_total_bytes": 8_000 * MB,
    }
    return Budget(**{**values, **changes})  # type: ignore[arg-type]


def result(tokens: int = 40, weights_mb: float = 500, **changes: object) -> ChildResult:
    """What a child says at its end."""
    values = {
        "prompt_tokens": 1500,
        "image_tokens": 576,
        "tokens": tokens,
        "text": "do(action=...)",
        "token_ids": tuple(range(tokens)),
        "load_s": 1.0,
        "image_s": 2.0,
        "prefill_s": 5.0,
        "decode_s": 4.0,
        "decoded_tokens": tokens - 1,
        "weights_bytes": int(weights_mb * MB),
        "plan": PLAN,
    }
    return ChildResult(**{**values, **changes})  # type: ignore[arg-type]


def enforced(limit_mb: float = 600, **changes: object) -> Enforced:
    """A control group that counts files."""
    values = {"kind": "cgroup_v1", "limit_bytes": int(limit_mb * MB), "counts_files": True}
    return Enforced(**{**values, **changes})  # type: ignore[arg-type]


def sample(
    at_s: float, anon_mb: float = 100, file_mb: float = 0, swap_mb: float = 0, **told: float
) -> Sample:
    """One look, in megabytes; counters as they are."""
    return Sample(at_s, int(anon_mb * MB), 0, int(swap_mb * MB), int(file_mb * MB), **told)  # type: ignore[arg-type]


def trace(samples: list[Sample], phases: list[tuple[str, float, float | None]], **changes: object) -> Trace:
    """A trace that ended well, unless the changes say otherwise."""
    values = {
        "samples": tuple(samples),
        "phases": tuple(Phase(*item) for item in phases),
        "ending": "exited",
        "exit_code": 0,
        "signal": None,
        "oom_kills": 0,
        "message": "",
        "result": None,
        "enforced": enforced(),
        "interval_s": 0.04,
        "sampling_share": 0.003,
        "seconds": samples[-1].at_s if samples else 0.0,
    }
    return Trace(**{**values, **changes})  # type: ignore[arg-type]


RUN = [
    ("start", 0.0, 0.4),
    ("load", 0.4, 1.6),
    ("image", 1.6, 3.6),
    ("prefill", 3.6, 9.0),
    ("decode", 9.0, 13.0),
    ("done", 13.0, None),
]


def whole_run(limit_mb: float = 600, *, thrash: bool = False, killed_at: float | None = None) -> Trace:
    """A run of a runtime with 500 MB of mapped weights: load, image, prefill, decode."""
    samples, refaulted, read, stalled = [], 0.0, 0.0, 0.0
    for step in range(int(13.2 / 0.04) + 1):
        at_s = step * 0.04
        if killed_at is not None and at_s > killed_at:
            break
        anon, file = _level(at_s)
        room = limit_mb - anon
        if file > room:
            file = max(10.0, room)
            if thrash and at_s > 3.6:
                refaulted += 16 * (1 + 0.6 * math.sin(3 * at_s))
                stalled += 0.04 * 0.35
        read = max(read, file) + (refaulted if thrash else 0) * 0.0
        samples.append(
            Sample(
                at_s,
                int(anon * MB),
                0,
                0,
                int(file * MB),
                int((anon + file) * MB),
                int(refaulted * MB),
                int((read + refaulted) * MB),
                stalled,
                0.4 * stalled,
                1.8 * at_s,
            )
        )
    if killed_at is not None:
        return trace(
            samples,
            [item for item in RUN if item[1] <= killed_at][:-1]
            + [(item[0], item[1], None) for item in RUN if item[1] <= killed_at][-1:],
            ending="killed",
            exit_code=None,
            signal=9,
            oom_kills=1,
            killed_by="limit",
            enforced=enforced(limit_mb),
        )
    return trace(samples, RUN, result=result(), enforced=enforced(limit_mb))


def _level(at_s: float) -> tuple[float, float]:
    """Anonymous and mapped megabytes at a moment."""
    if at_s < 0.4:
        return 10 + 60 * at_s, 40 * at_s
    if at_s < 1.6:
        return 45 + 110 * math.sin((at_s - 0.4) / 1.2 * math.pi), 60 + 300 * (at_s - 0.4)
    if at_s < 3.6:
        return 60 + 120 * min(1.0, (at_s - 1.6) * 2), 420 + 40 * (at_s - 1.6)
    if at_s < 9.0:
        return 150 + 14 * (at_s - 3.6) + 20 * math.sin(at_s * 5), 500
    return 130 + 2 * (at_s - 9), 505
