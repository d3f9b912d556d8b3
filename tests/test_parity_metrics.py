"""Measures against values worked out by hand, and what must hold for all inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_edge.parity.limits import LIMITS, at_most, limits_for, share_at_least, share_at_most
from autoglm_edge.parity.metrics import (
    Share,
    Spread,
    common_prefix,
    cosine,
    kl_divergence,
    kl_from_top,
    log_sum_exp,
    perplexity_change,
    rms,
)
from autoglm_edge.parity.plots import decades
from autoglm_edge.parity.rows import Rows, compare, reduce_logits
from autoglm_edge.parity.taps import ActionFigures, compare_actions
from autoglm_edge.quantize.recipe import PRESETS, Recipe


def logits_of(probabilities: list[list[float]]) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def test_kl_of_two_known_distributions_is_the_sum_by_hand() -> None:
    p, q = logits_of([[0.5, 0.25, 0.25]]), logits_of([[0.25, 0.5, 0.25]])

    # 0.5 ln(0.5/0.25) + 0.25 ln(0.25/0.5) + 0 = 0.25 ln 2
    assert kl_divergence(p, q)[0] == pytest.approx(0.25 * math.log(2), rel=1e-6)


def test_kl_does_not_change_when_all_logits_of_a_row_are_shifted() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.normal(size=(2, 5, 40)).astype(np.float32)

    assert kl_divergence(p + 300, q - 70) == pytest.approx(kl_divergence(p, q), rel=1e-4)


def test_kl_from_the_top_takes_the_rest_as_one_outcome() -> None:
    p, q = logits_of([[0.7, 0.2, 0.06, 0.04]]), logits_of([[0.6, 0.2, 0.1, 0.1]])
    rows = reduce_logits(p, np.array([0]), top_k=2)
    theirs = reduce_logits(q, np.array([0]), ids=rows.top_ids)

    # 0.7 ln(0.7/0.6) + 0.2 ln(0.2/0.2) + 0.1 ln(0.1/0.2)
    by_hand = 0.7 * math.log(0.7 / 0.6) + 0.1 * math.log(0.1 / 0.2)
    found = compare(rows, theirs)
    assert found.kl[0] == pytest.approx(by_hand, rel=1e-6)
    assert found.tail_mass[0] == pytest.approx(0.1, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 60), st.floats(0.01, 30))
def test_kl_from_the_top_is_a_lower_bound_that_is_exact_for_all_tokens(
    seed: int, vocab: int, top_k: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    p, q = (rng.normal(size=(2, 4, vocab)) * spread).astype(np.float32)
    following = rng.integers(0, vocab, 4)
    rows = reduce_logits(p, following, top_k=top_k)
    exact = kl_divergence(p, q)

    found = compare(rows, reduce_logits(q, following, ids=rows.top_ids)).kl

    assert (found >= 0).all()
    assert (found <= exact + 1e-9 + 1e-6 * exact).all()
    if top_k >= vocab:
        assert found == pytest.approx(exact, rel=1e-5, abs=1e-9)


def test_the_tail_of_a_peaked_row_keeps_its_digits() -> None:
    logits = np.array([[40.0, 0.0, 0.0, 0.0]], np.float32)

    rows = reduce_logits(logits, np.array([0]), top_k=1)

    # 1 - p would round to 0 in float64 below 1e-16; the tail here is 3 e^-40.
    assert rows.tail_mass[0] == pytest.approx(3 * math.exp(-40), rel=1e-9)


def test_the_same_logits_have_no_divergence_whatever_is_kept() -> None:
    logits = np.random.default_rng(2).normal(size=(6, 300)).astype(np.float32) * 10
    following = np.arange(6)
    for rows in (
        reduce_logits(logits, following, top_k=8),
        reduce_logits(logits, following, top_k=8, keep_all=True),
    ):
        found = compare(rows, rows)
        assert found.kl.max() < 1e-12
        assert found.same_best.all()
        assert found.delta_p == pytest.approx(np.zeros(6))


def test_full_logits_make_the_divergence_exact() -> None:
    rng = np.random.default_rng(3)
    p, q = rng.normal(size=(2, 3, 50)).astype(np.float32)
    rows = reduce_logits(p, np.zeros(3, int), top_k=4, keep_all=True)

    found = compare(rows, reduce_logits(q, np.zeros(3, int), ids=rows.top_ids, keep_all=True))

    assert found.kl == pytest.approx(kl_divergence(p, q))
    assert found.tail_mass.max() == 0


def test_tokens_that_the_reference_finds_equally_likely_count_as_the_same() -> None:
    reference = reduce_logits(np.array([[2.0, 2.0, 1.0]], np.float32), np.array([0]), top_k=3)

    tied = reduce_logits(np.array([[2.0, 2.1, 1.0]], np.float32), np.array([0]), ids=reference.top_ids)
    other = reduce_logits(np.array([[2.0, 2.0, 2.5]], np.float32), np.array([0]), ids=reference.top_ids)

    assert compare(reference, tied).same_best.all()
    assert not compare(reference, other).same_best.any()


def test_top_ids_are_the_likeliest_in_order() -> None:
    rows = reduce_logits(np.array([[0.0, 3.0, 1.0, 2.0]], np.float32), np.array([2]), top_k=3)

    assert rows.top_ids.tolist() == [[1, 3, 2]]
    assert rows.best.tolist() == [1]
    assert rows.next_logits.tolist() == [1.0]


def test_rows_joined_are_the_rows_in_order() -> None:
    logits = np.random.default_rng(4).normal(size=(5, 20)).astype(np.float32)
    whole = reduce_logits(logits, np.arange(5), top_k=3)

    parts = [
        reduce_logits(logits[:2], np.arange(2), top_k=3),
        reduce_logits(logits[2:], np.arange(2, 5), top_k=3),
    ]

    assert np.array_equal(Rows.join(parts).lse, whole.lse)
    assert np.array_equal(Rows.join(parts).top_ids, whole.top_ids)
    assert np.array_equal(whole.part(np.arange(5) > 2).best, whole.best[3:])


def test_log_sum_exp_survives_what_would_overflow_and_empty_rows() -> None:
    assert log_sum_exp(np.array([1000.0, 1000.0])) == pytest.approx(1000 + math.log(2))
    assert log_sum_exp(np.array([-np.inf, -np.inf])) == -np.inf
    assert log_sum_exp(np.zeros((3, 0))).tolist() == [-np.inf] * 3


def test_kl_is_zero_where_the_reference_gives_nothing() -> None:
    log_p, log_q = np.array([[0.0, -np.inf]]), np.array([[-0.1, -2.0]])

    assert kl_from_top(log_p, np.array([-np.inf]), log_q, np.array([-3.0]))[0] == pytest.approx(0.1)


def test_the_wilson_interval_has_its_published_values() -> None:
    # E. B. Wilson's formula at z = 1.96: 10 of 10 -> 0.7225, 0 of 10 -> 0.2775, 50 of 100 -> 0.4038..0.5962
    assert Share(10, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert Share(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Share(50, 100).interval == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert Share(0, 0).interval == (0.0, 1.0)
    assert math.isnan(Share(0, 0).value)


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_wilson_interval_holds_the_share(hits: int, total: int) -> None:
    found = Share(min(hits, total), total)
    low, high = found.interval

    assert 0 <= low <= found.value + 1e-12
    assert found.value - 1e-12 <= high <= 1


def test_perplexity_of_a_fair_coin_is_two() -> None:
    nll = np.full(10, math.log(2))

    found = perplexity_change(nll, nll)

    assert found.reference == pytest.approx(2)
    assert (found.change, found.standard_error) == (0, 0)


def test_the_error_of_a_perplexity_change_uses_the_covariance() -> None:
    rng = np.random.default_rng(5)
    p = rng.exponential(1.0, 400)
    q = p + rng.normal(0.02, 0.01, 400)

    found = perplexity_change(p, q)

    # d(exp(mean q) - exp(mean p)) for q - p = 0.02 ± 0.01: almost all of the variance of p cancels.
    assert found.change == pytest.approx(found.reference * (math.exp((q - p).mean()) - 1))
    apart = math.hypot(found.reference * p.std() / math.sqrt(400), found.candidate * q.std() / math.sqrt(400))
    assert 0 < found.standard_error < apart / 10


def test_numbers_over_nothing_do_not_exist() -> None:
    empty = np.zeros(0)

    assert math.isnan(perplexity_change(empty, empty).change)
    assert math.isnan(Spread.of(empty).mean)
    assert math.isnan(rms(empty))


def test_percentiles_are_those_of_numpy() -> None:
    found = Spread.of(np.arange(101, dtype=float))

    assert (found.count, found.mean, found.median, found.p90, found.p99, found.highest) == (
        101,
        50,
        50,
        90,
        99,
        100,
    )


def test_cosine_of_rows() -> None:
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    b = np.array([[0.0, 2.0], [3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])

    assert cosine(a, b) == pytest.approx([0, 1, 1, 0])


def test_rms_and_common_prefix() -> None:
    assert rms(np.array([3.0, -4.0])) == pytest.approx(math.sqrt(12.5))
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1], [1, 2]) == 1
    assert common_prefix([], [1]) == 0


# --- actions


def tap(x: int, y: int) -> str:
    return f'<think>it</think><answer>do(action="Tap", element=[{x},{y}])'


def test_a_moved_tap_is_measured_in_thousandths_and_in_pixels() -> None:
    found = compare_actions("a", tap(100, 200), tap(130, 240), size=(1000, 2000), box=(90, 190, 110, 210))

    assert found is not None
    assert (found.same_kind, found.same_arguments) == (True, False)
    assert found.distance == pytest.approx(50)
    assert found.distance_pixels == pytest.approx(math.hypot(30, 80))
    assert (found.reference_hits, found.candidate_hits) == (True, False)


def test_another_kind_of_action_in_the_box_is_no_hit() -> None:
    press = tap(100, 200).replace("Tap", "Long Press")

    found = compare_actions("a", tap(100, 200), press, size=None, box=(90, 190, 110, 210))

    assert found is not None
    assert (found.same_kind, found.candidate_hits) == (False, False)
    assert math.isnan(found.distance_pixels)


def test_an_answer_without_an_action_loses_the_tap() -> None:
    found = compare_actions("a", tap(5, 5), "I do not know", size=(10, 10), box=(0, 0, 10, 10))

    assert found is not None
    assert (found.candidate, found.same_kind, found.candidate_hits) == ("", False, False)
    assert math.isnan(found.distance)


def test_a_reference_without_an_action_is_not_counted() -> None:
    assert compare_actions("a", "hello", tap(1, 2), size=None, box=None) is None


def test_order_of_arguments_does_not_matter() -> None:
    one = 'do(action="Swipe", start=[1,2], end=[3,4])'
    other = 'do(action="Swipe", end=[3,4], start=[1,2])'

    found = compare_actions("a", one, other, size=None, box=None)

    assert found is not None
    assert found.same_arguments


def test_lost_taps_are_counted_among_those_that_the_reference_hits() -> None:
    box = (90, 190, 110, 210)
    pairs = [((100, 200), (100, 200)), ((100, 200), (500, 500)), ((500, 500), (100, 200))]
    outcomes = [
        compare_actions(str(index), tap(*a), tap(*b), size=None, box=box)
        for index, (a, b) in enumerate(pairs)
    ]

    found = ActionFigures.of([outcome for outcome in outcomes if outcome is not None])

    assert (found.lost.hits, found.lost.total) == (1, 2)
    assert (found.reference_hits.hits, found.candidate_hits.hits) == (2, 2)
    assert found.distance.count == 3
    assert found.distance_pixels.count == 0


# --- limits


@pytest.mark.parametrize(
    ("preset", "row"),
    [
        *[("fp32", "fp32"), ("fp16", "fp16"), ("int8", "int8"), ("int4", "int4"), ("int4-mixed", "int4")],
        *[("int4-all", "int4"), ("int3", "int4"), ("int2", "int4")],
    ],
)
def test_a_recipe_is_judged_by_its_fewest_bits(preset: str, row: str) -> None:
    assert limits_for(PRESETS[preset].to_json()) is LIMITS[row]


@pytest.mark.parametrize("level", [0, 1])
def test_8_bits_with_float_activations_have_less_to_lose(level: int) -> None:
    assert limits_for(PRESETS["int8-blocks"].with_(accuracy_level=level).to_json()) is LIMITS["int8-weights"]
    assert limits_for(PRESETS["int4"].with_(accuracy_level=level).to_json()) is LIMITS["int4"]
    assert LIMITS["int8-weights"].mean_kl < LIMITS["int8"].mean_kl


def test_a_recipe_of_ones_own_without_rules_is_judged_by_its_activations() -> None:
    assert limits_for(Recipe("mine", "float16", 0, ()).to_json()) is LIMITS["fp16"]


def test_limits_grow_looser_with_fewer_bits() -> None:
    rows = list(LIMITS.values())

    assert [row.mean_kl for row in rows] == sorted(row.mean_kl for row in rows)
    assert [row.p99_kl for row in rows] == sorted(row.p99_kl for row in rows)
    assert [row.top1 for row in rows] == sorted((row.top1 for row in rows), reverse=True)


def test_the_floor_is_added_to_a_limit() -> None:
    assert not at_most("kl", 0.011, 0.01, None).kept
    assert at_most("kl", 0.011, 0.01, 0.002).kept
    assert at_most("kl", 0.011, 0.01, 0.002).limit == pytest.approx(0.012)


def test_a_figure_that_does_not_exist_keeps_no_limit() -> None:
    assert not at_most("kl", math.nan, 1.0, None).kept


def test_a_share_fails_when_its_interval_excludes_the_limit() -> None:
    assert share_at_least("top1", Share(199, 200), 0.999).kept  # 200 rows cannot tell 99.5 from 99.9 %
    assert not share_at_least("top1", Share(950, 1000), 0.999).kept
    assert share_at_most("lost", Share(0, 30), 0.003).kept
    assert all(share_at_most("lost", Share(0, n), 0.0).kept for n in range(1, 200))
    assert all(share_at_least("top1", Share(n, n), 1.0).kept for n in range(1, 200))
    assert not share_at_most("lost", Share(5, 30), 0.003).kept


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.02, 3.0], (-2, 1)), ([], (-1, 0)), ([0.0, math.inf], (-1, 0)), ([1.0], (-1, 1))],
)
def test_a_logarithmic_axis_holds_its_values(values: list[float], expected: tuple[int, int]) -> None:
    assert decades(values) == expected
