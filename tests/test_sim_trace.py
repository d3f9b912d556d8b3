"""Traces of runs: their peaks and counters, what a child may say, and what it may not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from autoglm_edge.android_sim.child_result import ChildResult, ParityResult, PlanFacts
from autoglm_edge.android_sim.run.reports import LIMIT_BYTES, Reports, says_memory
from autoglm_edge.android_sim.trace import Enforced, Phase, Sample, Trace
from autoglm_edge.errors import SimulationError

MIB = 1 << 20
PLAN = PlanFacts("decoder", "asked for", "packed", "small", 2, "2 cores")
RESULT = ChildResult(10, 4, 3, "ok", (1, 2), 0.5, 0.1, 0.2, 0.4, 2, 1000, PLAN)


def sample(at_s: float, anon: int = 0, **others: Any) -> Sample:
    values = {"shmem_bytes": 0, "swap_bytes": 0, "file_bytes": 0, **others}
    return Sample(at_s, anon * MIB, **values)


def trace(samples: list[Sample], phases: list[Phase], **others: Any) -> Trace:
    values: dict[str, Any] = {
        "ending": "exited",
        "exit_code": 0,
        "signal": None,
        "oom_kills": 0,
        "message": "",
        "result": None,
        "enforced": Enforced("none", None),
        "interval_s": 0.05,
        "sampling_share": 0.0,
        "seconds": 4.0,
        **others,
    }
    return Trace(tuple(samples), tuple(phases), **values)


PHASES = [Phase("start", 0, 1), Phase("load", 1, 2), Phase("decode", 2, 4)]


def test_a_peak_is_of_all_kinds_that_cannot_be_dropped_and_knows_its_phase() -> None:
    seen = trace(
        [
            sample(0.5, 50),
            sample(1.5, 20, shmem_bytes=20 * MIB, swap_bytes=20 * MIB),
            sample(3.0, 30, file_bytes=90 * MIB),
        ],
        PHASES,
    )

    peak = seen.peak_held()
    assert (peak.bytes, peak.at_s, peak.phase) == (60 * MIB, 1.5, "load")
    assert seen.peak_held("decode").bytes == 30 * MIB
    assert seen.peak_anon().phase == "start"
    assert (seen.peak_file().bytes, seen.peak_file().phase) == (90 * MIB, "decode")
    assert seen.first_above(55 * MIB) == 1.5
    assert seen.first_above(60 * MIB) is None


def test_a_trace_without_samples_has_no_peak() -> None:
    assert trace([], []).peak_held().bytes == 0


def test_a_phase_holds_its_beginning_and_not_its_end() -> None:
    seen = trace([sample(1.0), sample(2.0)], PHASES)

    assert [seen.phase_at(moment) for moment in (0.0, 1.0, 1.999, 2.0, 99.0)] == [
        "start",
        "load",
        "load",
        "decode",
        "decode",
    ]
    assert Phase("load", 1, 2).contains(1) and not Phase("load", 1, 2).contains(2)
    assert len(seen.during("load")) == 1


def test_a_counter_counts_in_its_phases_from_the_sample_before() -> None:
    seen = trace(
        [
            sample(0.5, refaulted_bytes=100),
            sample(1.5, refaulted_bytes=150),
            sample(2.5, refaulted_bytes=450),
            sample(3.5, refaulted_bytes=1000),
        ],
        PHASES,
    )

    assert seen.change("refaulted_bytes", "decode") == 850
    assert seen.change("refaulted_bytes") == 1000
    assert seen.change("psi_some_s") is None
    with pytest.raises(SimulationError, match="no counter"):
        seen.change("anon_bytes")


def test_a_phase_that_was_never_left_lasts_to_the_end_of_the_run() -> None:
    seen = trace([], [Phase("load", 1, None)], ending="killed", exit_code=None, signal=9)

    assert seen.phase_seconds("load") == 3.0
    assert not seen.completed


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"ending": "gone"}, "ending"),
        ({"signal": 9}, "only one"),
        ({"samples": [sample(2.0), sample(1.0)]}, "order"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(values: dict[str, Any], word: str) -> None:
    samples = values.pop("samples", [])
    with pytest.raises(SimulationError, match=word):
        trace(samples, [], **values)


def test_a_trace_is_json_with_samples_as_columns() -> None:
    document = json.loads(
        json.dumps(trace([sample(0.5, 1), sample(1.0, 2)], PHASES, result=RESULT).to_json())
    )

    assert document["samples"]["anon_bytes"] == [MIB, 2 * MIB]
    assert document["result"]["plan"]["weights"] == "packed"


# --- what a child says


def test_a_result_survives_its_way_through_the_pipe() -> None:
    parity = ParityResult(2, 30, 0.01, 0.2, 0.97, 1, 2, 0, None, ("case: a fault",))
    result = ChildResult(**{**RESULT.__dict__, "parity": parity})

    assert ChildResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "3"},
        {"tokens": -1},
        {"tokens": True},
        {"tokens": None},
        {"load_s": "0.5"},
        {"load_s": math.nan},
        {"load_s": math.inf},
        {"text": None},
        {"token_ids": ["1"]},
        {"token_ids": 3},
        {"plan": {}},
        {"plan": None},
        {"plan": {**PLAN.__dict__, "threads": -1}},
        {"plan": {**PLAN.__dict__, "threads": 1.5}},
        {"parity": []},
        {"parity": {"cases": 1}},
        {"extra": 1},
    ],
)
def test_a_result_of_a_broken_child_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SimulationError):
        ChildResult.from_json({**RESULT.to_json(), **change})


def test_reports_become_phases_without_gaps_and_exact_borders_replace_live_ones() -> None:
    reports = Reports(100.0)
    reports.feed(b'{"phase": "load", "at": 101}\n{"phase": "image", "at": 102}\n{"pha')
    reports.feed(b'se": "decode", "at": 104}\n{"borders": {"decode": 103.5, "prefill": 1000}}\n')

    phases = reports.phases(6.0, completed=True)

    assert [(item.name, item.start_s, item.stop_s) for item in phases] == [
        ("start", 0.0, 1.0),
        ("load", 1.0, 2.0),
        ("image", 2.0, 3.5),
        ("decode", 3.5, 6.0),
    ]
    assert reports.phases(6.0, completed=False)[-1].stop_s is None
    assert reports.faults == 0


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[1]",
        b"3",
        b"null",
        b'{"phase": "load", "at": "soon"}',
        b'{"phase": "load", "at": 1}',
        b'{"phase": "load", "at": NaN}',
        b'{"phase": "load"}',
        b'{"borders": 3}',
        b'{"launch": 3}',
        b'{"phase": "load", "at": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_line_that_is_no_report_is_counted_and_left_out(line: bytes) -> None:
    reports = Reports(100.0)

    reports.feed(line + b'\n{"phase": "load", "at": 101}\n')

    assert reports.faults == 1
    assert [phase.name for phase in reports.phases(2.0, completed=False)] == ["start", "load"]


def test_a_child_that_talks_without_end_is_no_longer_heard() -> None:
    reports = Reports(0.0)
    for _ in range(20):
        reports.feed(b"x" * (LIMIT_BYTES // 16))

    assert reports.faults > 0
    assert len(reports.phases(1.0, completed=True)) == 1


def test_a_moment_after_the_end_is_moved_to_the_end() -> None:
    reports = Reports(0.0)
    reports.feed(b'{"phase": "load", "at": 9}\n')

    assert reports.phases(2.0, completed=True)[-1] == Phase("load", 2.0, 2.0)


def test_a_result_that_is_none_is_said() -> None:
    reports = Reports(0.0)
    reports.feed(b'{"result": {"tokens": 1}}\n')

    assert reports.result is None
    assert "result" in reports.error


@pytest.mark.parametrize(
    "words", ["MemoryError", "std::bad_alloc", "OSError: [Errno 12] Cannot allocate memory"]
)
def test_words_that_mean_refused_memory_are_known(words: str) -> None:
    assert says_memory(f"something {words}: something")
    assert not says_memory("something else")
