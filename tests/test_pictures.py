"""Features of pictures: encoded once, one at a time, also for those who went away meanwhile.

python -m pytest tests/test_pictures.py
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import reuse_fixtures as fakes

from autoglm_edge.runtime.pictures import Pictures
from autoglm_edge.runtime.reuse.features import FeatureCache


class Tower:
    """Encodes when it is let, and tells what it began."""

    def __init__(self, *, open_: bool = True) -> None:
        self.begun: list[int] = []
        self.at_once = self.most = 0
        self.go, self.inside = threading.Event(), threading.Event()
        if open_:
            self.go.set()

    def __call__(self, image: Any) -> np.ndarray:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.begun.append(int(image.patches[0, 0, 0, 0]))
        self.inside.set()
        assert self.go.wait(10)
        self.at_once -= 1
        return fakes.feature(image)


def test_a_picture_that_is_kept_is_known() -> None:
    pictures, tower = Pictures(FeatureCache(10**6)), Tower()
    features = pictures.encode(fakes.picture(1), b"1", tower)

    assert pictures.known(b"1") is features
    assert pictures.known(b"2") is None


def test_what_two_ask_for_is_encoded_once_and_told_to_the_first_as_work() -> None:
    pictures, tower = Pictures(), Tower()
    first, second = (pictures.ask(fakes.picture(1), b"1", tower) for _ in range(2))

    found, milliseconds = pictures.take(first)
    again, nothing = pictures.take(second)

    assert first is second
    assert again is found
    assert milliseconds is not None and milliseconds >= 0
    assert nothing is None
    assert tower.begun == [1]


def test_pictures_are_encoded_one_at_a_time_in_order() -> None:
    pictures, tower = Pictures(), Tower()
    asked = [pictures.ask(fakes.picture(seed), bytes([seed]), tower) for seed in range(5)]

    for encoding in asked:
        pictures.take(encoding)

    assert tower.begun == [*range(5)]
    assert tower.most == 1


def test_one_that_nobody_waits_for_any_more_is_not_begun() -> None:
    pictures, tower = Pictures(), Tower(open_=False)
    under_way = pictures.ask(fakes.picture(1), b"1", tower)
    assert tower.inside.wait(10)
    pictures.leave(pictures.ask(fakes.picture(2), b"2", tower))
    last = pictures.ask(fakes.picture(3), b"3", tower)
    tower.go.set()

    pictures.take(under_way)
    pictures.take(last)

    assert tower.begun == [1, 3]


def test_one_that_was_left_half_way_is_found_by_whoever_asks_again() -> None:
    pictures, tower = Pictures(FeatureCache(10**6)), Tower(open_=False)
    encoding = pictures.ask(fakes.picture(1), b"1", tower)
    assert tower.inside.wait(10)
    pictures.leave(encoding)
    pictures.wait(0.0)
    again = pictures.ask(fakes.picture(1), b"1", tower)
    pictures.leave(again)
    tower.go.set()
    encoding.work.result(10)

    assert again is encoding
    assert pictures.known(b"1") is not None
    assert tower.begun == [1]


def test_a_failure_is_told_to_those_who_wait_and_to_nobody_after_them() -> None:
    def broken(image: Any) -> np.ndarray:
        raise ValueError("no")

    pictures = Pictures()
    encoding = pictures.ask(fakes.picture(1), b"1", broken)
    with pytest.raises(ValueError, match="no"):
        pictures.take(encoding)
    left = pictures.ask(fakes.picture(1), b"1", broken)
    pictures.leave(left)
    assert left.work.exception(10) is not None if not left.work.cancelled() else True

    assert pictures.known(b"1") is None
    assert len(pictures.take(pictures.ask(fakes.picture(1), b"1", Tower()))[0]) == 2


def test_waiting_ends_when_a_picture_is_done_or_the_time_is_over() -> None:
    pictures, tower = Pictures(), Tower(open_=False)
    pictures.wait(10.0)  # nobody waits for anything
    encoding = pictures.ask(fakes.picture(1), b"1", tower)

    pictures.wait(0.001)
    assert not encoding.done
    tower.go.set()
    pictures.wait(10.0)

    assert encoding.done


def test_a_closed_one_forgets_and_begins_nothing() -> None:
    pictures, tower = Pictures(FeatureCache(10**6)), Tower(open_=False)
    pictures.encode(fakes.picture(3), b"3", fakes.feature)
    running = pictures.ask(fakes.picture(1), b"1", tower)
    assert tower.inside.wait(10)
    waiting = pictures.ask(fakes.picture(2), b"2", tower)
    pictures.close()
    tower.go.set()

    assert running.work.result(10)
    assert waiting.work.cancelled()
    assert pictures.known(b"3") is None
    assert tower.begun == [1]
