"""Who is read next: the shortest, but nobody later than twice the time of all that was there before.

python -m pytest tests/test_turns.py
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from autoglm_edge.runtime.batch.turns import Turns


@dataclass
class Prompt:
    """Pieces of different lengths; some of them, one after the other, hold what is there only once."""

    pieces: list[float]
    kind: str = "plain"
    picture: object = None
    inside: bool = False

    @property
    def left(self) -> int:
        return round(100 * sum(self.pieces))

    @property
    def layered(self) -> bool:
        return self.kind == "layered"

    def read(self) -> float:
        self.inside = self.layered and len(self.pieces) > 1
        return self.pieces.pop(0)


def order(turns: Turns, prompts: dict[int, Prompt]) -> list[int]:
    """Who is read, piece by piece, until all are done."""
    found = []
    while prompts:
        number = turns.next(prompts)
        assert number is not None
        found.append(number)
        turns.took(prompts[number].read())
        if not prompts[number].pieces:
            del prompts[number]
    return found


def test_nobody_is_read_where_nobody_waits() -> None:
    assert Turns().next({}) is None
    assert Turns().next({1: Prompt([1.0], picture=object())}) is None


def test_the_one_with_the_least_left_is_read_first_and_the_first_one_by_turns_with_it() -> None:
    prompts = {0: Prompt([1.0] * 4), 1: Prompt([1.0] * 3), 2: Prompt([1.0] * 2)}

    assert order(Turns(), prompts) == [2, 0, 2, 0, 0, 0, 1, 1, 1]


def test_what_the_first_one_had_while_it_was_alone_is_counted() -> None:
    turns, long = Turns(), Prompt([1.0] * 9)
    for _ in range(3):
        assert turns.next({0: long}) == 0
        turns.took(long.read())

    assert order(turns, {0: long, 1: Prompt([1.0] * 3)}) == [1] * 3 + [0] * 6


def test_of_two_equals_the_first_is_read_to_its_end() -> None:
    assert order(Turns(), {0: Prompt([1.0] * 3), 1: Prompt([1.0] * 3)}) == [0, 0, 0, 1, 1, 1]


def test_a_long_one_gets_every_second_piece_while_short_ones_come() -> None:
    turns, prompts = Turns(), {0: Prompt([1.0] * 5)}
    found = []
    for number in range(1, 30):
        prompts[number] = Prompt([1.0])
        chosen = turns.next(prompts)
        assert chosen is not None
        found.append(chosen)
        turns.took(prompts[chosen].read())
        prompts = {key: one for key, one in prompts.items() if one.pieces}

    # At its last piece it is as short as they are, and was there before.
    assert [place for place, number in enumerate(found) if number == 0] == [1, 3, 5, 7, 8]


def test_turns_are_shared_by_time_and_not_by_count() -> None:
    prompts = {0: Prompt([0.25] * 16), 1: Prompt([1.0] * 3)}

    assert order(Turns(), prompts) == [1, *[0] * 4, 1, *[0] * 4, 1, *[0] * 8]


def test_time_in_which_a_prompt_waits_for_its_picture_is_not_owed_to_it() -> None:
    turns, long, short = Turns(), Prompt([1.0] * 9, picture=object()), Prompt([1.0] * 4)
    for _ in range(3):
        assert turns.next({0: long, 1: short}) == 1
        turns.took(short.read())
    long.picture = None

    assert turns.next({0: long, 1: short}) == 1


def test_one_prompt_at_a_time_is_read_layer_by_layer() -> None:
    turns, prompts = Turns(), {number: Prompt([1.0] * (5 - number), "layered") for number in range(4)}
    inside = []
    while prompts:
        number = turns.next(prompts)
        assert number is not None
        turns.took(prompts[number].read())
        prompts = {key: one for key, one in prompts.items() if one.pieces}
        inside.append([key for key, one in prompts.items() if one.inside])

    assert all(len(numbers) <= 1 for numbers in inside)


def test_a_short_prompt_passes_one_that_is_read_layer_by_layer() -> None:
    turns, prompts = Turns(), {0: Prompt([1.0] * 9, "layered")}
    turns.took(prompts[turns.next(prompts) or 0].read())
    prompts[1] = Prompt([1.0] * 20, "layered")
    prompts[2] = Prompt([1.0])

    assert turns.next(prompts) == 2


def test_who_has_waited_for_one_layered_prompt_does_not_wait_for_another() -> None:
    turns, prompts = Turns(), {0: Prompt([1.0] * 6, "layered"), 1: Prompt([1.0] * 4, "layered")}
    found = []
    for number in range(2, 40):
        chosen = turns.next(prompts)
        assert chosen is not None
        found.append(chosen)
        turns.took(prompts[chosen].read())
        prompts = {key: one for key, one in prompts.items() if one.pieces}
        prompts[number] = Prompt([1.0] * 4, "layered")
        if 0 not in prompts:
            break

    assert found == [1] * 4 + [0] * 6


@pytest.mark.parametrize("kinds", [("plain",), ("plain", "layered")])
def test_nobody_is_read_later_than_twice_the_time_of_it_and_those_before_it(kinds: tuple[str, ...]) -> None:
    """Random prompts that come and go, with pictures that take their time: the bound of turns.py."""
    for seed in range(300):
        rng = random.Random(seed)
        turns, now = Turns(), 0.0
        prompts: dict[int, Prompt] = {}
        # For each: its work; when it came, the work of it and those before it, as a whole, and how many they
        # are; what went by while pictures were waited for.
        whole: dict[int, float] = {}
        came: dict[int, tuple[float, float, int]] = {}
        idle: dict[int, float] = {}
        longest = 0.0
        added = 0
        while added < 40 or prompts:
            if added < 40 and rng.random() < 0.5:
                kind = rng.choice(kinds)
                pieces = [rng.choice((0.1, 0.5, 1.0)) for _ in range(rng.choice((1, 2, 5, 30)))]
                one = Prompt(pieces, kind, object() if rng.random() < 0.3 else None)
                whole[added] = sum(pieces)
                before = sum(whole[other] for other in prompts)
                came[added] = (now, before + whole[added], len(prompts) + 1)
                idle[added] = 0.0
                prompts[added] = one
                added += 1
            for one in prompts.values():
                if one.picture is not None and rng.random() < 0.2:
                    one.picture = None
            number = turns.next(prompts)
            if number is None:
                continue
            seconds = prompts[number].read()
            turns.took(seconds)
            now += seconds
            longest = max(longest, seconds)
            for other in prompts:
                # Nobody owes a prompt the time in which it, or one before it, waits for a picture.
                if any(prompts[key].picture is not None for key in prompts if key <= other):
                    idle[other] += seconds
            if not prompts[number].pieces:
                del prompts[number]
                start, work, count = came[number]
                passed = 30.0 * count if "layered" in kinds else 0.0
                assert now - start - idle[number] <= 2 * (work + passed) + count * longest + 1e-6
