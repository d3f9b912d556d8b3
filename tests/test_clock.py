"""Where the time of an answer went, on a clock that is moved by hand.

python -m pytest tests/test_clock.py
"""

from __future__ import annotations

import pytest

from autoglm_edge.runtime.answer import Clock


class Hand:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def move(self, milliseconds: float) -> None:
        self.now += milliseconds / 1e3


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr("autoglm_edge.runtime.answer.time.perf_counter", hand)
    return hand


def test_all_time_before_the_first_token_goes_to_one_stage_or_another(hand: Hand) -> None:
    clock = Clock()
    hand.move(1)  # pictures are read
    clock.waits()
    hand.move(2)
    clock.goes_on()
    clock.reuse_begins()
    hand.move(4)
    clock.reuse_done(16)
    hand.move(8)
    clock.image_done(cached=False)
    clock.images_done()
    hand.move(16)
    clock.waits()
    hand.move(32)
    clock.goes_on()
    clock.reuse_begins()
    hand.move(64)
    clock.reuse_done(32)
    hand.move(128)
    clock.prefill_done()
    clock.token_done(1)
    hand.move(256)
    clock.token_done(2)

    found = clock.timings(60, 2)

    assert found.image_ms == pytest.approx(1 + 8)
    assert found.reuse_ms == pytest.approx(4 + 64)
    assert found.prefill_ms == pytest.approx(16 + 128)
    assert found.waiting_ms == pytest.approx(2 + 32)
    assert found.ttft_ms == pytest.approx(255)
    assert found.decode_ms == pytest.approx(256)
    assert (found.reused_tokens, found.prompt_tokens, found.encoded_images) == (48, 12, 1)
    assert found.prefill_tokens_per_s == pytest.approx(12 / 0.144)


def test_a_picture_that_is_encoded_beside_others_takes_its_own_time(hand: Hand) -> None:
    clock = Clock()
    clock.waits()
    hand.move(100)
    clock.goes_on()
    clock.encoded_beside(70)
    clock.images_done()
    clock.prefill_done()
    clock.token_done(1)

    found = clock.timings(5, 1)

    assert (found.image_ms, found.waiting_ms, found.ttft_ms) == pytest.approx((70, 30, 100))


def test_an_answer_that_never_got_its_turn_has_waited_only(hand: Hand) -> None:
    clock = Clock()
    clock.waits()
    hand.move(50)

    found = clock.timings(5, 0)

    assert found.waiting_ms == pytest.approx(50)
    assert (found.image_ms, found.prefill_ms, found.reuse_ms) == (0, 0, 0)
    assert (found.ttft_ms, found.decode_ms) == (0, 0)


def test_looking_for_what_is_known_may_be_cut_short_by_a_wait(hand: Hand) -> None:
    clock = Clock()
    clock.reuse_begins()
    clock.waits()
    hand.move(5)
    clock.goes_on()
    hand.move(7)

    assert clock.timings(5, 0).image_ms == pytest.approx(7)
