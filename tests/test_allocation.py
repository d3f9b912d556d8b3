"""Allocation of bytes: exact on what can be tried out, within the promised error where sizes are rounded."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_edge.errors import QuantError
from autoglm_edge.quantize import allocation
from autoglm_edge.quantize.allocation import Candidate, Group, allocate


def group(name: str, *pairs: tuple[int, float]) -> Group:
    return Group(name, tuple(Candidate(str(number), *pair) for number, pair in enumerate(pairs)))


def least_cost(groups: list[Group], budget: int) -> float:
    """By trying everything; inf if nothing fits."""
    best = math.inf
    for chosen in itertools.product(*(group.candidates for group in groups)):
        if sum(candidate.size_bytes for candidate in chosen) <= budget:
            best = min(best, math.fsum(candidate.cost for candidate in chosen))
    return best


COSTS = st.one_of(st.just(0.0), st.floats(-1, 10, allow_nan=False), st.sampled_from([1e-6, 3e-5, 0.5]))


@st.composite
def instances(draw: st.DrawFn, most_bytes: int = 60) -> list[Group]:
    sizes = st.integers(0, most_bytes)
    scale = draw(st.sampled_from([1, 7, 4096]))
    count = draw(st.integers(0, 5))
    pairs = st.lists(st.tuples(sizes, COSTS), min_size=1, max_size=4)
    return [
        group(f"g{number}", *((size * scale, cost) for size, cost in draw(pairs))) for number in range(count)
    ]


@given(instances(), st.integers(0, 350), st.sampled_from([1, 7, 4096]))
@settings(max_examples=100, deadline=None)
def test_small_instances_get_the_best_of_all_choices(groups: list[Group], budget: int, scale: int) -> None:
    budget *= scale
    best = least_cost(groups, budget)
    if best == math.inf:
        with pytest.raises(QuantError, match=f"{sum(g.least_bytes for g in groups):,}"):
            allocate(groups, budget)
        return

    found = allocate(groups, budget)

    assert found.cost == pytest.approx(best, abs=1e-9)
    assert found.size_bytes <= budget
    assert found.slack_bytes == 0
    assert found.size_bytes == sum(candidate.size_bytes for candidate in found.choices.values())
    assert {name: found.choices[name] in g.candidates for g in groups for name in [g.name]} == {
        g.name: True for g in groups
    }


@given(instances(), st.lists(st.integers(0, 400), min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_larger_budget_is_never_worse_and_the_same_one_gives_the_same(
    groups: list[Group], extras: list[int]
) -> None:
    least = sum(g.least_bytes for g in groups)

    costs = [allocate(groups, least + extra).cost for extra in sorted(extras)]
    again = [allocate(groups, least + extra) for extra in extras]

    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(costs))
    assert again == [allocate(groups, least + extra) for extra in extras]


@given(instances(most_bytes=10**7), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_rounded_sizes_cost_no_more_than_the_slack_says(groups: list[Group], share: float) -> None:
    least, most = (sum(getattr(g, name) for g in groups) for name in ("least_bytes", "most_bytes"))
    budget = least + int(share * (most - least))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "UNITS", 64)
        found = allocate(groups, budget)
        larger = allocate(groups, budget + (most - least) // 10)

    assert found.size_bytes <= budget
    assert found.cost >= least_cost(groups, budget) - 1e-9
    assert found.cost <= least_cost(groups, budget - found.slack_bytes) + 1e-9
    assert larger.cost <= found.cost + 1e-12


def test_a_model_of_nine_billion_weights_in_whole_pages_is_solved_exactly() -> None:
    page = 4096
    groups = [
        group(f"{kind}{layer}", (high * page, 0.0), (low * page, cost * (1 + layer % 7)))
        for layer in range(40)
        for kind, high, low, cost in (
            ("a", 9000, 5003, 1e-6),
            ("g", 28000, 15519, 2e-6),
            ("d", 14001, 7760, 4e-6),
        )
    ]
    budget = sum(g.least_bytes for g in groups) + 777_777_777

    found = allocate(groups, budget)

    assert found.slack_bytes == 0
    assert budget - found.size_bytes < 12481 * page


def test_nothing_to_choose_is_fine() -> None:
    assert allocate([], 0).choices == {}
    only = allocate([group("a", (5, 2.0))], 5)
    assert (only.size_bytes, only.cost) == (5, 2.0)


def test_of_equal_costs_the_smallest_is_taken() -> None:
    found = allocate([group("a", (9, 0.0), (4, 0.0)), group("b", (4, 0.0), (9, 0.0))], 100)

    assert found.size_bytes == 8


def test_a_candidate_that_is_larger_and_worse_is_never_taken() -> None:
    found = allocate([group("a", (9, 5.0), (4, 1.0), (6, 3.0))], 100)

    assert found.choices["a"].size_bytes == 4


def test_a_budget_that_cannot_be_kept_is_refused_with_the_smallest_size() -> None:
    groups = [group("a", (5, 0.0), (3, 1.0)), group("b", (1234, 0.0))]

    with pytest.raises(QuantError, match=r"1,236 bytes cannot be kept.*1,237"):
        allocate(groups, 1236)


@pytest.mark.parametrize("budget", [1.5, "6", True, None])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget: object) -> None:
    with pytest.raises(QuantError, match="whole number"):
        allocate([], budget)  # type: ignore[arg-type]


def test_two_groups_of_one_name_are_refused() -> None:
    with pytest.raises(QuantError, match="two groups have the name 'a'"):
        allocate([group("a", (1, 0.0)), group("a", (2, 0.0))], 10)


@pytest.mark.parametrize(("size", "cost"), [(-1, 0.0), (1.0, 0.0), (True, 0.0), (1, math.nan), (1, math.inf)])
def test_candidates_that_make_no_sense_are_refused(size: int, cost: float) -> None:
    with pytest.raises(QuantError, match="candidate 'x'"):
        Candidate("x", size, cost)


def test_a_group_needs_candidates_of_different_names() -> None:
    with pytest.raises(QuantError, match="at least one"):
        Group("a", ())
    with pytest.raises(QuantError, match="no name twice"):
        Group("a", (Candidate("x", 1, 0.0), Candidate("x", 2, 0.0)))
