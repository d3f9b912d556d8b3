"""Block-quantized weights become 8-bit integers of one scale per channel, and stay the same weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoglm_edge.quantize.formats import BlockFormat, dequantize_rows, quantize_rows
from autoglm_edge.runtime.layerwise.expansion import Blocks, expand, transpose_bytes


def expanded(
    weights: NDArray[np.float32], fmt: BlockFormat, tasks: int = 2
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int8], NDArray[np.float32]]:
    """Float weights (N, K) that the blocks mean, and the integers; integers (K, N) and scales (N,)."""
    made = quantize_rows(weights, fmt)
    blocks = Blocks(made.data, made.scales, made.zero_points, weights.shape[1], fmt.field_bits)
    integers = np.full((weights.shape[1], len(weights)), 99, np.int8)
    scales = np.full(len(weights), np.nan, np.float32)
    with ThreadPoolExecutor(tasks) as pool:
        expand(blocks, integers, scales, pool, tasks)
    return dequantize_rows(made, fmt, weights.shape[1]), (integers * scales).T, integers, scales


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 65), (64, 64), (300, 200), (257, 1100)])
def test_integers_mean_what_the_blocks_mean(bits: int, symmetric: bool, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows * columns + bits)
    weights = rng.standard_normal((rows, columns), np.float32) * np.exp(rng.standard_normal((rows, 1)))

    stored, meant, integers, scales = expanded(weights.astype(np.float32), BlockFormat(bits, 64, symmetric))

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


def test_a_channel_of_zeros_stays_zero_and_makes_no_nan() -> None:
    weights = np.zeros((3, 128), np.float32)
    weights[1] = 1.0

    stored, meant, _, scales = expanded(weights, BlockFormat(4, 32, False))

    assert np.isfinite(scales).all()
    np.testing.assert_allclose(meant, stored, atol=1e-6)


def test_a_huge_block_does_not_overflow_its_neighbours() -> None:
    weights = np.full((2, 256), 1e-3, np.float32)
    weights[0, :64] = 1e4

    stored, meant, integers, scales = expanded(weights, BlockFormat(4, 64, True))

    assert (np.abs(stored - meant) <= 0.6 * scales[:, None]).all()
    assert integers[:64, 0].min() >= 100


def test_negative_scales_keep_their_sign() -> None:
    data = np.tile(np.array([0x10, 0xFE], np.uint8), 8)[
        None, None
    ]  # one row, one block of 32: 0, 1, 14, 15, ...
    blocks = Blocks(data, np.array([[-0.5]], np.float32), None, 32, 4)
    weights, scales = np.empty((32, 1), np.int8), np.empty(1, np.float32)

    with ThreadPoolExecutor(1) as pool:
        expand(blocks, weights, scales, pool, 1)

    np.testing.assert_allclose((weights * scales)[:4, 0], [4.0, 3.5, -3.0, -3.5], atol=0.02)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_bytes_are_transposed_whatever_the_shape(rows: int, columns: int, seed: int) -> None:
    source = np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)
    frame = np.zeros((columns, rows + 8), np.uint8)

    transpose_bytes(source, frame[:, :rows])

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
