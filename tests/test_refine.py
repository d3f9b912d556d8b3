"""Search for scales and zero points: never worse than plain rounding, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoglm_edge.errors import QuantError
from autoglm_edge.quantize import BlockFormat, Quantized, dequantize_rows, quantize_rows, refine
from autoglm_edge.quantize.formats import unpack_nibbles
from autoglm_edge.quantize.refine import search_rows
from autoglm_edge.quantize.rounding import LARGEST_WEIGHT

ALL_FORMATS = [BlockFormat(b, size, sym) for b in (2, 3, 4, 8) for size in (32, 128) for sym in (True, False)]


def _weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.02).astype(np.float32)


def _block_errors(
    weights: np.ndarray, quantized: Quantized, fmt: BlockFormat, importance: np.ndarray | None = None
) -> np.ndarray:
    """Weighted squared error (N, blocks), in each block relative to its largest weight and importance."""
    rows, columns = weights.shape
    back = dequantize_rows(quantized, fmt, columns).astype(np.float64)
    padded = np.zeros((3, rows, fmt.blocks(columns) * fmt.block_size))
    padded[0, :, :columns], padded[1, :, :columns] = back - weights, weights
    padded[2, :, :columns] = 1 if importance is None else importance
    errors, values, weight = padded.reshape(3, rows, -1, fmt.block_size)
    largest = np.abs(values).max(axis=2, keepdims=True)
    largest[largest == 0] = 1
    heaviest = weight.max(axis=2, keepdims=True)
    heaviest[heaviest == 0] = 1
    return np.sum(weight / heaviest * (errors / largest) ** 2, axis=2)


def _integers(quantized: Quantized, fmt: BlockFormat) -> np.ndarray:
    packed = quantized.data.reshape(len(quantized.data), -1)
    return unpack_nibbles(packed) if fmt.field_bits == 4 else packed


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    fmt=st.sampled_from(ALL_FORMATS),
    scale_dtype=st.sampled_from(["float32", "float16"]),
    weighted=st.booleans(),
)
def test_no_block_is_worse_than_plain_rounding_and_zeros_stay_zeros(data, fmt, scale_dtype, weighted):
    largest = LARGEST_WEIGHT[scale_dtype]
    floats = st.floats(-largest, largest, width=32)
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 140)))
    weights = data.draw(hnp.arrays(np.float32, shape, elements=floats, fill=floats))
    importance = None
    if weighted:
        heights = st.floats(0, 2.0**126, width=32)
        importance = data.draw(hnp.arrays(np.float32, shape[1], elements=heights, fill=heights))

    found = search_rows(weights, fmt, importance=importance, scale_dtype=scale_dtype)

    plain = quantize_rows(weights, fmt, scale_dtype=scale_dtype)
    before = _block_errors(weights, plain, fmt, importance)
    assert (_block_errors(weights, found, fmt, importance) <= before).all()
    back = dequantize_rows(found, fmt, shape[1])
    assert np.isfinite(back).all()
    assert (back[weights == 0] == 0).all()
    integers = _integers(found, fmt)
    assert integers.min() >= fmt.lowest and integers.max() <= fmt.highest
    assert found.scales.dtype == scale_dtype and found.scales.shape == plain.scales.shape


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one outlier a block", "one-sided"])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_weights_as_models_have_them_get_better(fmt, kind):
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((32, 1024)).astype(np.float32)
    if kind == "heavy tails":
        weights = rng.standard_t(3, weights.shape).astype(np.float32)
    elif kind == "one outlier a block":
        weights[:, ::32] *= 8
    elif kind == "one-sided":
        weights = np.abs(weights)

    plain = _block_errors(weights, quantize_rows(weights, fmt), fmt).sum()
    found = _block_errors(weights, search_rows(weights, fmt), fmt).sum()

    least_gain = {2: 0.88, 3: 0.93, 4: 0.97, 8: 0.995}[fmt.bits]
    assert found < least_gain * plain


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_importance_makes_the_important_columns_better(fmt):
    weights = _weights(64, 512)
    importance = np.full(512, 0.01, np.float32)
    importance[::7] = 5

    alike = search_rows(weights, fmt)
    weighted = search_rows(weights, fmt, importance=importance)

    def error(quantized: Quantized) -> float:
        return float(_block_errors(weights, quantized, fmt, importance).sum())

    assert error(weighted) < error(alike)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_a_plain_importance_changes_nothing_but_rounding(fmt):
    weights = _weights(16, 300)

    alike = search_rows(weights, fmt)
    weighted = search_rows(weights, fmt, importance=np.full(300, 3e7, np.float32))

    one, two = (_block_errors(weights, quantized, fmt).sum() for quantized in (alike, weighted))
    assert one == pytest.approx(two, rel=2e-3)


def test_only_proportions_of_importance_matter():
    weights, fmt = _weights(16, 300), BlockFormat(4, 64, False)
    importance = np.random.default_rng(0).random(300).astype(np.float32)

    one = search_rows(weights, fmt, importance=importance)
    two = search_rows(weights, fmt, importance=importance * np.float32(2**40))

    np.testing.assert_array_equal(one.data, two.data)
    np.testing.assert_array_equal(one.scales, two.scales)


def test_columns_of_no_importance_do_not_spoil_the_others():
    fmt = BlockFormat(4, 32, False)
    weights = _weights(8, 64)
    weights[:, 5], weights[:, 40] = 1e30, -1e30
    importance = np.ones(64, np.float32)
    importance[[5, 40]] = 0

    # The range does not hold the two outliers any more, but a share of it that is tried at most.
    plain = _block_errors(weights, quantize_rows(weights, fmt), fmt, importance)
    found = _block_errors(weights, search_rows(weights, fmt, importance=importance), fmt, importance)

    assert (found <= plain).all()


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.1, -3e4, 0.05])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_a_constant_block_comes_back_as_the_constant(fmt, value, scale_dtype):
    weights = np.full((2, fmt.block_size), value, np.float32)

    back = dequantize_rows(search_rows(weights, fmt, scale_dtype=scale_dtype), fmt, fmt.block_size)

    np.testing.assert_allclose(back, weights, rtol=1e-3 if scale_dtype == "float16" else 5e-7)


def test_a_block_of_zeros_has_scale_zero():
    for fmt in ALL_FORMATS:
        quantized = search_rows(np.zeros((1, fmt.block_size), np.float32), fmt)
        assert quantized.scales.tobytes() == bytes(4)


@pytest.mark.parametrize("columns", [1, 31, 33, 300, 320])
@pytest.mark.parametrize("fmt", [BlockFormat(4, 64, False), BlockFormat(3, 32, True)], ids=str)
def test_rows_do_not_depend_on_each_other(columns, fmt, monkeypatch):
    monkeypatch.setattr(refine, "CHUNK_WEIGHTS", 4 * columns)
    weights = _weights(9, columns)
    importance = np.random.default_rng(0).random(columns).astype(np.float32)

    whole = search_rows(weights, fmt, importance=importance)

    for index in range(9):
        one = search_rows(weights[index : index + 1], fmt, importance=importance)
        np.testing.assert_array_equal(one.data[0], whole.data[index])
        np.testing.assert_array_equal(one.scales[0], whole.scales[index])
        if whole.zero_points is not None:
            np.testing.assert_array_equal(one.zero_points[0], whole.zero_points[index])


def test_rows_are_left_as_they_were_and_may_be_read_only_or_transposed():
    weights = _weights(100, 4).T
    weights.flags.writeable = False
    fmt = BlockFormat(4, 32, False)

    view, copy = search_rows(weights, fmt), search_rows(weights.copy(), fmt)

    np.testing.assert_array_equal(view.data, copy.data)
    np.testing.assert_array_equal(weights, _weights(100, 4).T)


def test_an_empty_matrix_gives_empty_arrays_of_the_right_shape():
    quantized = search_rows(np.zeros((0, 70), np.float32), BlockFormat(4, 32, False))

    assert quantized.data.shape == (0, 3, 16) and quantized.zero_points.shape == (0, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -3e38])
def test_a_weight_that_is_not_finite_or_too_large_is_refused(bad):
    weights = _weights(5, 100)
    weights[3, 99] = bad

    with pytest.raises(QuantError, match=r"weight at or after row 0 is (nan|inf|3e\+38)"):
        search_rows(weights, BlockFormat(4, 32, False))


@pytest.mark.parametrize(
    "importance, said",
    [
        (np.ones(99, np.float32), r"float32 \(99,\), must be float32 \(100,\)"),
        (np.ones(100), r"float64 \(100,\), must be float32 \(100,\)"),
        (np.ones((1, 100), np.float32), r"\(1, 100\), must be"),
        (np.full(100, -1, np.float32), "negative or not finite"),
        (np.full(100, np.nan, np.float32), "negative or not finite"),
        (np.full(100, np.inf, np.float32), "negative or not finite"),
    ],
)
def test_an_importance_that_means_nothing_is_refused(importance, said):
    with pytest.raises(QuantError, match=said):
        search_rows(_weights(5, 100), BlockFormat(4, 32, False), importance=importance)


@pytest.mark.parametrize("rows", [np.zeros(32, np.float32), np.zeros((2, 32), np.float64)])
def test_anything_but_a_float32_matrix_is_refused(rows):
    with pytest.raises(QuantError, match="must be a float32 matrix"):
        search_rows(rows, BlockFormat(4, 32, False))
