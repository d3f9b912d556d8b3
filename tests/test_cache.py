"""KV cache: rows taken out and put back, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.cache import KVCache
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions

IDS = np.arange(5, 13)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def model(
    request: pytest.FixtureRequest, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> Model:
    bundle = Bundle.open(bundle_of(checkpoint_of("tiny"), request.param))
    return Model(bundle, SessionOptions(threads=1))


def append(model: Model, cache: KVCache, ids: np.ndarray) -> np.ndarray:
    positions = np.arange(cache.length, cache.length + len(ids))[None].repeat(3, 0)
    return model.forward(model.embed(ids), positions, cache)


def test_the_buffer_of_a_host_value_is_seen_and_not_copied(model: Model) -> None:
    value = next(iter(model.new_cache(3).past.values()))

    value.numpy()[...] = 7

    assert (value.numpy() == 7).all()


def test_rows_put_back_into_another_cache_go_on_as_the_first_would(model: Model) -> None:
    first, second = model.new_cache(9), model.new_cache(30)
    append(model, first, IDS)
    rows = first.read(0, first.length)
    second.write(0, rows)

    assert rows.shape == (*first.row_shape[:3], len(IDS), first.row_shape[4])
    assert rows.flags.c_contiguous
    assert rows.nbytes == len(IDS) * first.row_bytes
    assert second.length == len(IDS)
    assert (append(model, second, IDS[:1]) == append(model, first, IDS[:1])).all()


def test_rows_in_two_pieces_are_the_rows_in_one(model: Model) -> None:
    cache = model.new_cache(8)
    append(model, cache, IDS)
    whole, pieces = cache.read(0, 8), [cache.read(0, 3), cache.read(3, 8)]
    again = model.new_cache(8)
    again.write(0, pieces[0])
    again.write(3, pieces[1])

    assert (np.concatenate(pieces, axis=3) == whole).all()
    assert (again.read(0, 8) == whole).all()


def test_rows_read_are_a_copy_that_later_runs_leave_alone(model: Model) -> None:
    cache = model.new_cache(8)
    append(model, cache, IDS[:4])
    rows = cache.read(0, 4)
    kept = rows.copy()
    cache.clear()
    append(model, cache, IDS[4:])

    assert (rows == kept).all()


def test_a_cut_cache_goes_on_as_one_that_never_had_the_tail(model: Model) -> None:
    cut, never = model.new_cache(9), model.new_cache(9)
    append(model, cut, IDS)
    cut.truncate(5)
    append(model, never, IDS)
    never.truncate(5)
    fresh = model.new_cache(9)
    fresh.write(0, never.read(0, 5))

    assert cut.length == 5
    assert (append(model, cut, IDS[:2]) == append(model, fresh, IDS[:2])).all()


def test_writing_before_the_end_forgets_what_came_after(model: Model) -> None:
    cache = model.new_cache(8)
    append(model, cache, IDS)
    cache.write(2, cache.read(4, 6))

    assert cache.length == 4


def test_no_rows_are_rows_too(model: Model) -> None:
    cache = model.new_cache(4)
    append(model, cache, IDS[:2])
    cache.write(2, cache.read(1, 1))

    assert cache.length == 2


@pytest.mark.parametrize("length", [-1, 4])
def test_a_cache_is_not_cut_to_what_it_does_not_hold(model: Model, length: int) -> None:
    cache = model.new_cache(8)
    append(model, cache, IDS[:3])

    with pytest.raises(RequestError, match=f"holds 3 tokens, cannot be cut to {length}"):
        cache.truncate(length)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4), (4, 4)])
def test_rows_that_the_cache_does_not_hold_are_not_given(model: Model, start: int, stop: int) -> None:
    cache = model.new_cache(8)
    append(model, cache, IDS[:3])

    with pytest.raises(RequestError, match="holds 3 tokens, cannot give"):
        cache.read(start, stop)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (4, 1), (3, 6)])
def test_rows_that_leave_a_hole_or_do_not_fit_are_refused(model: Model, start: int, count: int) -> None:
    cache = model.new_cache(8)
    append(model, cache, IDS[:3])
    rows = np.zeros((*cache.row_shape[:3], count, cache.row_shape[4]), cache.dtype)

    with pytest.raises(RequestError, match=f"{count} tokens cannot be put at {start}"):
        cache.write(start, rows)
    assert cache.length == 3


def test_rows_of_another_cache_are_refused(model: Model) -> None:
    cache = model.new_cache(8)
    shape = (*cache.row_shape[:3], 2, cache.row_shape[4])

    for wrong in (
        np.zeros(shape, np.int8),
        np.zeros((shape[0] + 1, *shape[1:]), cache.dtype),
        np.zeros(shape[1:], cache.dtype),
    ):
        with pytest.raises(RequestError, match="but this cache takes"):
            cache.write(0, wrong)
    assert cache.length == 0
