"""Drafts from what came before, and how long they may be."""

from __future__ import annotations

import random

import pytest

from autoglm_edge.runtime.reuse.features import FeatureCache
from autoglm_edge.runtime.reuse.lookup import LONGEST, SHORTEST, Draft, NGramIndex
from autoglm_edge.runtime.reuse.pace import BLOCK_COSTS, INTEGER_COSTS, MOST_TOKENS, PROBE_EVERY, Pace


def ids_of(index: NGramIndex, most: int) -> tuple[int, ...]:
    draft = index.draft(most)
    assert len(draft.ids) == len(draft.chances)
    assert all(0 < chance < 1 for chance in draft.chances)
    return draft.ids


def test_what_followed_the_same_ids_is_the_draft() -> None:
    assert ids_of(NGramIndex([1, 2, 3, 4, 5, 6, 7, 9, 2, 3, 4]), 3) == (5, 6, 7)


def test_a_long_match_weighs_more_than_a_short_one() -> None:
    assert ids_of(NGramIndex([1, 2, 3, 4, 10, 9, 3, 4, 20, 1, 2, 3, 4]), 1) == (10,)


def test_what_followed_most_often_is_the_likeliest() -> None:
    index = NGramIndex([1, 2, 10, 1, 2, 20, 1, 2, 20, 1, 2])

    assert ids_of(index, 1) == (20,)


def test_the_more_often_and_the_more_alike_the_greater_the_chance() -> None:
    def chance(ids: list[int]) -> float:
        return NGramIndex(ids).draft(1).chances[0]

    often, once, mixed = [1, 2, 10] * 6 + [1, 2], [1, 2, 10, 1, 2], [1, 2, 10, 1, 2, 20, 1, 2, 10, 1, 2]
    assert chance(often) > chance(once) > 0
    assert chance(often) > chance(mixed) > 0


def test_ids_that_never_came_before_have_no_draft() -> None:
    for ids in ([], [1], [1, 2], [1, 2, 3, 4, 5], [1, 1], [2, 1, 3, 1]):
        assert NGramIndex(ids).draft(5) == Draft()


def test_a_sequence_that_repeats_is_drafted_beyond_its_end() -> None:
    assert ids_of(NGramIndex([7] * 20), 6) == (7,) * 6
    assert ids_of(NGramIndex([1, 2, 3] * 9), 7) == (1, 2, 3, 1, 2, 3, 1)


def test_a_draft_ends_at_ids_that_cannot_be_fed() -> None:
    index = NGramIndex([1, 2, 3, 99, 4, 1, 2], never={99})

    assert ids_of(index, 5) == (3,)
    index.push(3)
    assert index.draft(5) == Draft()


def test_a_draft_ends_where_it_is_hardly_right() -> None:
    ids = [token for other in range(10, 200) for token in (1, 2, other)]

    assert NGramIndex([*ids, 1, 2]).draft(5) == Draft()


def test_likeliest_ids_and_chances_equal_counting_through_everything() -> None:
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(4) for _ in range(rng.randrange(40))]
        index = NGramIndex()
        for token in ids:
            index.push(token)
        draft, expected = index.draft(1), counted(ids)
        assert len(index) == len(ids)
        assert bool(draft.ids) == bool(expected)
        if expected:
            assert draft.chances[0] == pytest.approx(max(expected.values()))
            assert expected[draft.ids[0]] == pytest.approx(draft.chances[0])


def counted(ids: list[int]) -> dict[int, float]:
    """Chance of every id, from the definition."""
    chances: dict[int, float] = {}
    for size in range(SHORTEST, min(LONGEST, len(ids)) + 1):
        places = [place for place in range(size, len(ids)) if ids[place - size : place] == ids[-size:]]
        if not places:
            break
        after = [ids[place] for place in places]
        trust = len(after) / (len(after) + 2 * len(set(after)))
        chances = {
            token: (1 - trust) * chances.get(token, 0) + trust * after.count(token) / len(after)
            for token in {*chances, *after}
        }
    return chances


# --- how long


def teach(pace: Pace, costs: dict[int, float]) -> None:
    for tokens, cost in costs.items():
        for _ in range(5):
            pace.ran(tokens, cost)


def tell(pace: Pace, chance: float, right: bool, times: int = 200) -> None:
    for _ in range(times):
        pace.verified(chance, right=right)


def test_drafts_that_are_right_grow_and_wrong_ones_end() -> None:
    pace = Pace(BLOCK_COSTS)
    start = pace.length([0.5] * 15)
    tell(pace, 0.5, right=True)
    assert pace.length([0.5] * 15) > start
    tell(pace, 0.5, right=False)
    assert pace.length([0.5] * 15) == 0


def test_every_grade_of_chance_is_counted_on_its_own() -> None:
    pace = Pace(BLOCK_COSTS)
    tell(pace, 0.9, right=True)
    tell(pace, 0.3, right=False)

    assert pace.share(0.9) > 0.95 > 0.05 > pace.share(0.3)
    assert pace.share(0.6) == pytest.approx(0.5625)
    assert pace.length([0.9] * 3) == 3
    assert pace.length([0.3] * 3) == 0
    assert pace.length([0.9, 0.3, 0.9]) == 1


def test_a_chance_that_was_never_tried_is_taken_as_it_is() -> None:
    pace = Pace(BLOCK_COSTS)

    for chance in (0.0, 0.1, 0.5, 0.99, 1.0):
        assert pace.share(chance) == pytest.approx(chance, abs=1 / 15)


def test_integer_matrices_allow_longer_drafts_than_blocks() -> None:
    chances = [0.7] * 15

    assert Pace(INTEGER_COSTS).length(chances) > Pace(BLOCK_COSTS).length(chances) > 0


def test_measured_times_count_more_than_what_was_thought() -> None:
    pace = Pace(INTEGER_COSTS)
    teach(pace, {tokens: 10.0 * tokens for tokens in range(1, MOST_TOKENS + 1)})

    assert pace.length([0.9] * 15) == 0
    assert pace.cost(4) == 40.0


def test_one_slow_run_changes_nothing() -> None:
    pace = Pace(BLOCK_COSTS)
    teach(pace, {1: 100.0, 2: 110.0})
    pace.ran(2, 9000.0)

    assert pace.cost(2) == 110.0


def test_a_length_never_run_is_priced_from_one_token() -> None:
    pace = Pace(BLOCK_COSTS)
    teach(pace, {1: 50.0})

    assert pace.cost(4) == pytest.approx(50 * BLOCK_COSTS[4])
    assert pace.cost(3) == pytest.approx(50 * (BLOCK_COSTS[2] + BLOCK_COSTS[4]) / 2)


def test_where_drafts_do_not_pay_a_short_one_is_tried_now_and_then() -> None:
    pace = Pace(BLOCK_COSTS)
    lengths = [pace.length([0.01] * 5) for _ in range(4 * PROBE_EVERY)]

    assert [length for length in lengths if length] == [1, 3, 1, 3]


def test_drafts_pay_again_after_the_answers_change() -> None:
    pace = Pace(BLOCK_COSTS)
    tell(pace, 0.6, right=False)
    for _ in range(5000):
        tell(pace, 0.6, right=True, times=pace.length([0.6] * 6))

    assert pace.length([0.6] * 6) > 1


def test_a_draft_is_never_longer_than_what_there_is_or_a_run_may_have() -> None:
    pace = Pace({1: 1.0, 16: 1.0})

    assert [pace.length([0.9] * most) for most in (0, 1, 5, 100)] == [0, 1, 5, MOST_TOKENS - 1]


# --- pictures


def test_features_are_kept_up_to_the_limit_the_least_recently_used_gone_first() -> None:
    import numpy as np

    cache = FeatureCache(3 * 40)
    pictures = [np.full((1, 10), value, np.float32) for value in range(4)]
    for name, features in zip(b"abc", pictures, strict=False):
        cache.put(bytes([name]), features)
    assert cache.get(b"a") is pictures[0]
    cache.put(b"d", pictures[3])

    assert [cache.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert cache.used_bytes == 120
    cache.put(b"e", np.zeros((1, 100), np.float32))
    assert cache.get(b"e") is None
    assert cache.used_bytes == 120
