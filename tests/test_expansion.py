"""Block-quantized weights become 8-bit integers of one scale per channel, and stay the same weights."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoglm_edge.quantize.formats import BlockFormat, dequantize_rows
from autoglm_edge.quantize.rounding import quantize_rows
from autoglm_edge.runtime.layerwise import tiles
from autoglm_edge.runtime.layerwise.blocks import Blocks
from autoglm_edge.runtime.layerwise.expansion import COMPILED, ExpandTile, expand

needs_compiler = pytest.mark.skipif(
    not COMPILED, reason="installed without a C compiler, or without Python's headers"
)
KINDS = [pytest.param(False, id="numpy"), pytest.param(True, id="compiled", marks=needs_compiler)]


def compiled_tile() -> ExpandTile:
    from autoglm_edge.runtime.layerwise import _expansion

    return _expansion.expand_tile


def expanded(
    weights: NDArray[np.float32], fmt: BlockFormat, tasks: int = 2, *, compiled: bool = COMPILED
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int8], NDArray[np.float32]]:
    """Float weights (N, K) that the blocks mean, and the integers; integers (K, N) and scales (N,)."""
    made = quantize_rows(weights, fmt)
    blocks = Blocks(made.data, made.scales, made.zero_points, weights.shape[1], fmt.field_bits)
    integers = np.full((weights.shape[1], len(weights)), 99, np.int8)
    scales = np.full(len(weights), np.nan, np.float32)
    with ThreadPoolExecutor(tasks) as pool:
        expand(blocks, integers, scales, pool, tasks, compiled=compiled)
    return dequantize_rows(made, fmt, weights.shape[1]), (integers * scales).T, integers, scales


@pytest.mark.parametrize("compiled", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 65), (64, 64), (300, 200), (257, 1100)])
def test_integers_mean_what_the_blocks_mean(
    bits: int, symmetric: bool, rows: int, columns: int, compiled: bool
) -> None:
    rng = np.random.default_rng(rows * columns + bits)
    weights = rng.standard_normal((rows, columns), np.float32) * np.exp(rng.standard_normal((rows, 1)))

    stored, meant, integers, scales = expanded(
        weights.astype(np.float32), BlockFormat(bits, 64, symmetric), compiled=compiled
    )

    # Half a step of rounding; and the block's scale is rounded to 1/256 of the channel's, at most half of
    # which each of the up to 2 ** bits - 1 levels of a block carries: (2 ** bits - 1) / 512.
    bound = (0.5 + (2**bits - 1) / 512) * scales[:, None] * (1 + 1e-5)
    assert (np.abs(stored - meant) <= bound).all()
    assert -127 <= integers.min() <= integers.max() <= 127


def test_the_added_error_is_a_small_part_of_what_four_bits_lost() -> None:
    weights = np.random.default_rng(0).standard_normal((256, 1024), np.float32)

    stored, meant, _, _ = expanded(weights, BlockFormat(4, 64, False))

    # Variances: the step of 8 bits is about a tenth of that of 4 bits.
    assert np.square(meant - stored).mean() < 0.02 * np.square(stored - weights).mean()


@pytest.mark.parametrize("compiled", KINDS)
def test_a_channel_of_zeros_stays_zero_and_makes_no_nan(compiled: bool) -> None:
    weights = np.zeros((3, 128), np.float32)
    weights[1] = 1.0

    stored, meant, _, scales = expanded(weights, BlockFormat(4, 32, False), compiled=compiled)

    assert np.isfinite(scales).all()
    np.testing.assert_allclose(meant, stored, atol=1e-6)


@pytest.mark.parametrize("compiled", KINDS)
def test_a_huge_block_does_not_overflow_its_neighbours(compiled: bool) -> None:
    weights = np.full((2, 256), 1e-3, np.float32)
    weights[0, :64] = 1e4

    stored, meant, integers, scales = expanded(weights, BlockFormat(4, 64, True), compiled=compiled)

    assert (np.abs(stored - meant) <= 0.6 * scales[:, None]).all()
    assert integers[:64, 0].min() >= 100


@pytest.mark.parametrize("compiled", KINDS)
def test_negative_scales_keep_their_sign(compiled: bool) -> None:
    data = np.tile(np.array([0x10, 0xFE], np.uint8), 8)[
        None, None
    ]  # one row, one block of 32: 0, 1, 14, 15, ...
    blocks = Blocks(data, np.array([[-0.5]], np.float32), None, 32, 4)
    weights, scales = np.empty((32, 1), np.int8), np.empty(1, np.float32)

    with ThreadPoolExecutor(1) as pool:
        expand(blocks, weights, scales, pool, 1, compiled=compiled)

    np.testing.assert_allclose((weights * scales)[:4, 0], [4.0, 3.5, -3.0, -3.5], atol=0.02)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_bytes_are_transposed_whatever_the_shape(rows: int, columns: int, seed: int) -> None:
    source = np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)
    frame = np.zeros((columns, rows + 8), np.uint8)

    tiles.transpose_bytes(source, frame[:, :rows])

    np.testing.assert_array_equal(frame[:, :rows], source.T)
    assert not frame[:, rows:].any()


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([32, 64, 128]),
    tasks=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_threads_and_shapes_do_not_change_the_integers(
    rows: int, columns: int, bits: int, block: int, tasks: int
) -> None:
    weights = np.random.default_rng(columns).standard_normal((rows, columns), np.float32)

    one = expanded(weights, BlockFormat(bits, block, False), 1)
    many = expanded(weights, BlockFormat(bits, block, False), tasks)

    np.testing.assert_array_equal(one[2], many[2])
    np.testing.assert_array_equal(one[3], many[3])


@needs_compiler
@given(
    rows=st.integers(1, 600),
    columns=st.integers(1, 700),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_compiled_loops_and_numpy_give_the_same_bytes(
    rows: int, columns: int, bits: int, block: int, symmetric: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count = math.ceil(columns / block)
    zero_bytes = math.ceil(count * bits / 8)
    # Any bytes, not only those that a quantizer would write, and scales over many magnitudes and signs.
    data = rng.integers(0, 256, (rows, count, block * bits // 8), np.uint8)
    zeros = None if symmetric else rng.integers(0, 256, (rows, zero_bytes), np.uint8)
    scales = (rng.standard_normal((rows, count)) * 10.0 ** rng.integers(-6, 3, (rows, count))).astype(
        np.float32
    )
    scales[rng.random((rows, count)) < 0.1] = 0
    found = []
    with ThreadPoolExecutor(2) as pool:
        for compiled in (False, True):
            weights, own = np.full((columns, rows), 99, np.int8), np.full(rows, np.nan, np.float32)
            blocks = Blocks(data, scales, zeros, columns, bits)
            expand(blocks, weights, own, pool, 2, compiled=compiled)
            found.append((weights, own))

    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@needs_compiler
def test_compiled_loops_write_into_a_part_of_a_larger_matrix_and_nothing_beside_it() -> None:
    rng = np.random.default_rng(3)
    data, scales = rng.integers(0, 256, (20, 2, 32), np.uint8), rng.random((20, 2), np.float32)
    frame = np.full((100, 40), 99, np.int8)

    compiled_tile()(data, scales, None, frame[:, 10:30], np.empty(20, np.float32), 4)

    alone = np.empty((100, 20), np.int8)
    tiles.expand_tile(data, scales, None, alone, np.empty(20, np.float32), 4)
    np.testing.assert_array_equal(frame[:, 10:30], alone)
    assert (frame[:, :10] == 99).all() and (frame[:, 30:] == 99).all()


@needs_compiler
def test_scales_that_are_no_numbers_stay_so() -> None:
    scales = np.array([[1.0, np.nan, 2.0]], np.float32)
    own = np.zeros(1, np.float32)

    compiled_tile()(np.zeros((1, 3, 16), np.uint8), scales, None, np.empty((96, 1), np.int8), own, 4)

    assert np.isnan(own).all()


@needs_compiler
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, np.zeros((4, 2, 15), np.uint8)),  # no multiple of 16 bytes
        (0, np.zeros((4, 2, 0), np.uint8)),
        (0, np.zeros((4, 2, 256), np.uint8)),
        (0, np.zeros((4, 32), np.uint8)),
        (0, np.zeros((4, 2, 16), np.float32)),
        (0, np.zeros((4, 4, 16), np.uint8)[:, ::2]),
        (1, np.zeros((4, 3), np.float32)),
        (1, np.zeros((3, 2), np.float32)),
        (1, np.zeros((4, 2), np.float64)),
        (2, np.zeros((3, 1), np.uint8)),
        (2, np.zeros((4, 0), np.uint8)),
        (2, "zeros"),
        (3, np.zeros((65, 4), np.int8)),  # more weights than there are fields
        (3, np.zeros((64, 5), np.int8)),
        (3, np.zeros((4, 64), np.int8).T),  # channels that are no neighbours
        (3, np.zeros((64, 4), np.int8)[::-1]),
        (3, np.zeros((64, 4), np.int16)),
        (3, bytes(256)),
        (4, np.zeros(3, np.float32)),
        (4, np.zeros(8, np.float32)[::2]),
        (5, 3),
        (5, 16),
        (5, -4),
        (5, "4"),
        (5, 2**40),
    ],
)
def test_compiled_loops_refuse_what_does_not_fit_together(place: int, value: object) -> None:
    given: list[object] = [
        np.zeros((4, 2, 16), np.uint8),
        np.ones((4, 2), np.float32),
        np.zeros((4, 1), np.uint8),
        np.zeros((64, 4), np.int8),
        np.zeros(4, np.float32),
        4,
    ]
    compiled_tile()(*given)  # type: ignore[arg-type]
    given[place] = value

    with pytest.raises((ValueError, TypeError, BufferError, OverflowError)):
        compiled_tile()(*given)  # type: ignore[arg-type]
