"""The verdict on recorded runs: one test per verdict, and the order in which they are tried."""

from __future__ import annotations

import math

import pytest
from simulated_traces import MB, RUN, budget, enforced, result, sample, trace, whole_run

from autoglm_edge.android_sim.trace import Sample
from autoglm_edge.android_sim.verdict import LABELS, LIVES, classify, play_p90

DECODE = [("load", 0.0, 1.0), ("decode", 1.0, None)]


def flat(anon: float = 100, **told: float) -> list[Sample]:
    """Two seconds at one level."""
    return [sample(step / 10, anon, **told) for step in range(21)]


def test_a_run_with_room_fits_and_tells_its_headroom() -> None:
    verdict = classify(whole_run(800), budget(800))
    assert (verdict.name, verdict.lives) == ("fits", True)
    assert verdict.headroom_bytes == 800 * MB - verdict.peak_bytes > 0
    assert verdict.peak_phase == "prefill"
    assert verdict.mapped_bytes == 505 * MB
    assert verdict.refault_bytes_per_token == 0


def test_the_kernels_kill_is_told_with_its_phase_and_moment() -> None:
    verdict = classify(whole_run(200, killed_at=6.1), budget(200))
    assert (verdict.name, verdict.phase) == ("killed_oom", "prefill")
    assert verdict.at_s == pytest.approx(6.08)
    assert not verdict.lives


def test_a_shell_whose_program_was_killed_for_the_limit_counts_as_killed() -> None:
    run = trace(flat(), [], exit_code=137, oom_kills=1, killed_by="limit")
    assert classify(run, budget()).name == "killed_oom"


def test_a_kill_from_outside_is_a_failure_and_no_verdict_on_memory() -> None:
    run = trace(flat(), [], ending="killed", exit_code=None, signal=9, killed_by="outside")
    verdict = classify(run, budget())
    assert verdict.name == "failed"
    assert "signal 9" in verdict.reason


def test_crossing_the_kill_line_is_the_limiters_kill_where_the_limit_should_have_held() -> None:
    samples = [sample(0, 100), sample(1, 500), sample(2, 700), sample(40, 700)]
    verdict = classify(trace(samples, [("load", 0, None)]), budget(600))
    assert (verdict.name, verdict.at_s, verdict.crossed_at_s) == ("killed_limiter", 2, 2)
    assert verdict.ends_within_delay is False
    assert "30 s later" in verdict.reason


def test_a_run_that_ends_before_the_killer_comes_says_so() -> None:
    samples = [sample(0, 100), sample(1, 700), sample(5, 100)]
    verdict = classify(trace(samples, []), budget(600))
    assert verdict.name == "killed_limiter"
    assert verdict.ends_within_delay is True
    assert "the next one may not" in verdict.reason


def test_swap_that_is_really_there_counts_on_top_and_swap_that_is_not_does_not() -> None:
    samples = [sample(0, 500), sample(1, 500, swap_mb=200), sample(2, 500, swap_mb=200)]
    there = trace(samples, DECODE, enforced=enforced(600, swap_bytes=300 * MB))
    verdict = classify(there, budget(600, 300))
    assert verdict.name == "fits_swap"
    assert verdict.swap_share == pytest.approx(200 / 700)
    missing = classify(trace(samples, DECODE), budget(600, 300))
    assert missing.name == "killed_limiter"
    assert any("stricter" in note for note in missing.notes)


def test_a_host_that_only_watches_never_says_fits_when_the_limit_was_passed() -> None:
    for kind in ("watchdog", "none"):
        run = trace(
            [sample(0, 100), sample(1, 700), sample(2, 100)],
            [],
            enforced=enforced(kind=kind, counts_files=False),
        )
        assert classify(run, budget(600)).name == "exceeded"


def test_mapped_pages_beyond_the_limit_are_no_fit_where_the_host_does_not_limit_them() -> None:
    run = trace(flat(100, file_mb=700), DECODE, enforced=enforced(kind="rlimit_data", counts_files=False))
    verdict = classify(run, budget(600))
    assert verdict.name == "exceeded"
    assert "drop and read them again" in verdict.reason
    small = trace(flat(100, file_mb=300), DECODE, enforced=enforced(kind="rlimit_data", counts_files=False))
    assert classify(small, budget(600)).name == "fits"


def test_pages_that_another_process_had_in_memory_are_no_fit_either() -> None:
    def run(charged_mb: float) -> str:
        samples = [sample(1 + step / 10, 100, 700, charged_bytes=int(charged_mb * MB)) for step in range(11)]
        return classify(trace(samples, DECODE), budget(600)).name

    assert run(150) == "exceeded"
    assert run(750) == "fits"  # 50 MB of libraries that others use, too
    many = [sample(1 + step / 10, 100, 300, charged_bytes=100 * MB) for step in range(11)]
    assert (
        classify(trace(many, DECODE), budget(600)).name == "fits"
    )  # it would fit if it paid for all of them


def test_the_watchdogs_kill_is_the_limiters() -> None:
    run = trace(
        flat(),
        [],
        ending="killed",
        exit_code=None,
        signal=9,
        killed_by="watchdog",
        enforced=enforced(kind="watchdog"),
    )
    assert classify(run, budget()).name == "killed_limiter"


def test_refused_memory_has_a_verdict_of_its_own_and_quotes_the_child() -> None:
    run = trace(
        flat(), [("load", 0, None)], exit_code=1, message="there is not\nenough memory", alloc_failed=True
    )
    verdict = classify(run, budget())
    assert (verdict.name, verdict.phase) == ("alloc_failed", "load")
    assert "there is not enough memory" in verdict.reason


def test_another_error_of_the_child_is_a_failure() -> None:
    verdict = classify(trace(flat(), [], exit_code=2, message="no such bundle"), budget())
    assert verdict.name == "failed"
    assert "status 2: no such bundle" in verdict.reason


def test_a_timeout_tells_whether_it_thrashed() -> None:
    calm = classify(trace(flat(), DECODE, ending="timeout", exit_code=None), budget())
    assert (calm.name, calm.reason) == ("timeout", "it did not end in time")
    samples = [sample(step, 100, 400, refaulted_bytes=step * 300 * MB) for step in range(4)]
    busy = classify(trace(samples, DECODE, ending="timeout", exit_code=None), budget())
    assert "from storage again" in busy.reason


def test_an_interrupted_run_has_no_verdict_whatever_was_seen() -> None:
    run = trace([sample(0, 9000)], [], ending="interrupted", exit_code=None, signal=9)
    assert classify(run, budget()).name == "interrupted"


def test_reading_more_than_a_hundredth_of_the_weights_again_per_token_is_thrashing() -> None:
    def run(per_token_mb: float) -> object:
        told = result(tokens=11, weights_mb=500, decoded_tokens=10)
        samples = [
            sample(1 + step / 10, 100, 400, refaulted_bytes=int(step * per_token_mb * MB))
            for step in range(11)
        ]
        return classify(trace(samples, [("decode", 1.0, None)], result=told), budget())

    assert run(4.9).name == "fits"  # type: ignore[attr-defined]
    assert run(5.1).name == "fits_thrash"  # type: ignore[attr-defined]
    assert run(5.1).refault_bytes_per_token == pytest.approx(5.1 * MB)  # type: ignore[attr-defined]


def test_what_is_read_again_while_loading_is_no_thrashing() -> None:
    samples = [sample(0, 50), sample(0.5, 50, 300, refaulted_bytes=900 * MB)]
    samples += [sample(1 + step / 10, 100, 400, refaulted_bytes=900 * MB) for step in range(11)]
    assert classify(trace(samples, DECODE, result=result()), budget()).name == "fits"


def test_tokens_that_passed_between_two_samples_are_not_charged_with_what_loading_read() -> None:
    phases = [("load", 0.0, 1.0), ("decode", 1.0, 1.02), ("done", 1.02, None)]
    samples = [sample(0.99, refaulted_bytes=90 * MB), sample(1.03, refaulted_bytes=91 * MB)]
    verdict = classify(trace(samples, phases, result=result(tokens=5)), budget())
    assert verdict.refault_bytes_per_token == MB / 4
    assert verdict.name == "fits"


def test_a_few_pages_of_libraries_are_no_thrashing_however_small_the_weights() -> None:
    samples = [sample(1 + step / 10, refaulted_bytes=step * 20_000) for step in range(11)]
    told = result(tokens=3, weights_mb=2)
    assert classify(trace(samples, [("decode", 1.0, None)], result=told), budget()).name == "fits"


def test_waiting_for_memory_beyond_the_killers_threshold_is_thrashing_too() -> None:
    def run(ms_per_s: float) -> str:
        samples = [
            sample(
                1 + step / 10, 100, psi_some_s=step / 10 * ms_per_s / 1000, psi_full_s=0.0, refaulted_bytes=0
            )
            for step in range(31)
        ]
        return classify(trace(samples, [("decode", 1.0, None)]), budget()).name

    assert run(69) == "fits"
    assert run(75) == "fits_thrash"


def test_a_short_stall_is_counted_as_it_was_and_not_scaled_to_a_second() -> None:
    samples = [sample(1.0, psi_some_s=0.0), sample(1.04, psi_some_s=0.02)]
    verdict = classify(trace(samples, [("decode", 1.0, None)]), budget())
    assert verdict.psi_some_ms_per_s == pytest.approx(20)
    assert verdict.name == "fits"


def test_without_refaults_reads_beyond_the_growth_of_the_resident_set_stand_for_them() -> None:
    samples = [sample(1 + step / 10, 100, 400, read_bytes=step * 100 * MB) for step in range(11)]
    verdict = classify(trace(samples, [("decode", 1.0, None)], result=result()), budget())
    assert verdict.name == "fits_thrash"
    assert any("estimated from reads" in note for note in verdict.notes)
    first = [sample(1 + step / 10, 100, 40 * step, read_bytes=step * 40 * MB) for step in range(11)]
    assert classify(trace(first, [("decode", 1.0, None)], result=result()), budget()).name == "fits"


def test_a_host_that_tells_nothing_is_said_to_be_blind() -> None:
    verdict = classify(trace(flat(), DECODE), budget())
    assert verdict.refault_bytes_per_token is None
    assert any("cannot be seen" in note for note in verdict.notes)


def test_a_command_without_phases_is_judged_as_a_whole() -> None:
    samples = [sample(step / 10, 50, 200, refaulted_bytes=step * 20 * MB) for step in range(11)]
    verdict = classify(trace(samples, []), budget())
    assert verdict.name == "fits_thrash"
    assert verdict.refault_bytes_per_token == 200 * MB


def test_a_run_without_a_single_sample_can_be_judged() -> None:
    assert classify(trace([], []), budget()).name == "fits"
    killed = trace([], [], ending="killed", exit_code=None, signal=9, oom_kills=1, killed_by="limit")
    assert classify(killed, budget()).name == "killed_oom"


def test_play_counts_the_ninetieth_percentile_of_anonymous_and_swapped_memory() -> None:
    samples = [sample(step, 100) for step in range(95)] + [sample(95 + step, 900) for step in range(5)]
    assert play_p90(trace(samples, [])) == 100 * MB
    samples = [sample(step, 100) for step in range(80)] + [
        sample(80 + step, 900, swap_mb=50) for step in range(20)
    ]
    assert play_p90(trace(samples, [])) == 950 * MB


def test_android_figures_are_left_out_for_a_board() -> None:
    verdict = classify(whole_run(800), budget(800, android=False))
    assert (verdict.lmkd_risk, verdict.play, verdict.limiter) == ("unknown", None, None)
    phone = classify(whole_run(800), budget(800))
    assert phone.lmkd_risk == "low"
    assert phone.over_limiter is False


def test_every_verdict_has_words_and_those_that_live_are_fits() -> None:
    assert set(LIVES) <= set(LABELS)
    assert all(name.startswith("fits") for name in LIVES)


def test_a_verdict_as_json_has_only_plain_values() -> None:
    document = classify(whole_run(500, thrash=True), budget(500)).to_json()
    assert document["name"] == "fits_thrash"
    assert document["play"]["kept"] is True
    assert all(not (isinstance(value, float) and math.isnan(value)) for value in document.values())
    assert RUN[0][0] == "start"
