"""GPTQ: agreement with a plain implementation, gain over search, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_edge.errors import QuantError
from autoglm_edge.quantize import BlockFormat, Quantized, dequantize_rows, gptq
from autoglm_edge.quantize.formats import unpack_nibbles
from autoglm_edge.quantize.gptq import factor, gptq_rows
from autoglm_edge.quantize.refine import search_rows

FORMATS = [BlockFormat(b, 32, sym) for b in (2, 3, 4, 8) for sym in (True, False)]
INT4 = BlockFormat(4, 32, False)


def _weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.02).astype(np.float32)


def _inputs(columns: int, tokens: int = 0, seed: int = 1) -> np.ndarray:
    """Inputs whose columns go together, as those of layers do."""
    rng = np.random.default_rng(seed)
    tokens = tokens or 4 * columns
    common = rng.standard_normal((tokens, max(1, columns // 4))) @ rng.standard_normal(
        (max(1, columns // 4), columns)
    )
    strength = np.exp(rng.standard_normal(columns))
    return ((common + 0.5 * rng.standard_normal((tokens, columns))) * strength).astype(np.float32)


def _gram(columns: int, tokens: int = 0, seed: int = 1) -> np.ndarray:
    inputs = _inputs(columns, tokens, seed)
    return inputs.T @ inputs


def _loss(weights: np.ndarray, quantized: Quantized, fmt: BlockFormat, gram: np.ndarray) -> float:
    """tr(E G E^T)."""
    error = dequantize_rows(quantized, fmt, weights.shape[1]).astype(np.float64) - weights
    return float(np.sum(error @ gram.astype(np.float64) * error))


def _integers(quantized: Quantized, fmt: BlockFormat, columns: int) -> np.ndarray:
    packed = quantized.data.reshape(len(quantized.data), -1)
    return (unpack_nibbles(packed) if fmt.field_bits == 4 else packed)[:, :columns]


def _zeros(quantized: Quantized, fmt: BlockFormat, columns: int) -> np.ndarray:
    if quantized.zero_points is None:
        return np.full((len(quantized.data), fmt.blocks(columns)), fmt.middle)
    packed = quantized.zero_points
    return (unpack_nibbles(packed) if fmt.field_bits == 4 else packed)[:, : fmt.blocks(columns)].astype(int)


def _published(
    weights: np.ndarray, gram: np.ndarray, quantized: Quantized, fmt: BlockFormat, damping: float
) -> np.ndarray:
    """Integers by the algorithm of the GPTQ paper, with the inverse of the Gram matrix, column by column."""
    columns = weights.shape[1]
    work = weights.astype(np.float64)
    hessian = gram.astype(np.float64)
    order = np.argsort(-hessian.diagonal(), kind="stable")
    hessian += damping * hessian.diagonal().mean() * np.eye(columns)
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T  # inverse = upper.T @ upper
    scales = quantized.scales.astype(np.float64)
    zeros = _zeros(quantized, fmt, columns)
    work = work[:, order]
    integers = np.zeros(weights.shape, int)
    for place, column in enumerate(order):
        scale, zero = scales[:, column // fmt.block_size], zeros[:, column // fmt.block_size]
        divisor = np.where(scale == 0, 1, scale)
        integer = np.clip(np.rint(work[:, place] / divisor) + zero, fmt.lowest, fmt.highest)
        integer = np.where(scale == 0, zero, integer)
        integers[:, column] = integer
        error = (work[:, place] - (integer - zero) * scale) / upper[place, place]
        work[:, place:] -= np.outer(error, upper[place, place:])
    return integers


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("columns", [1, 31, 64, 200])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_integers_are_those_of_the_published_algorithm(fmt, columns, scale_dtype):
    weights, gram = _weights(24, columns), _gram(columns)

    quantized = gptq_rows(weights, fmt, factor(gram, damping=0.02), scale_dtype=scale_dtype)

    wanted = _published(weights, gram, quantized, fmt, 0.02)
    same = _integers(quantized, fmt, columns) == wanted
    # float32 against float64: a weight near the middle of two integers may fall to the other one, and then
    # moves the columns after it.
    assert same.mean() > 0.97
    assert same.all(axis=1).mean() > 0.85
    assert quantized.scales.dtype == scale_dtype


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_outputs_are_much_better_than_with_the_least_error_of_weights(fmt):
    weights, inputs = _weights(48, 256), _inputs(256)
    gram = inputs.T @ inputs
    importance = np.ascontiguousarray(gram.diagonal())

    searched = _loss(weights, search_rows(weights, fmt, importance=importance), fmt, gram)
    found = gptq_rows(weights, fmt, factor(gram))

    assert _loss(weights, found, fmt, gram) < 0.5 * searched
    error = inputs @ (dequantize_rows(found, fmt, 256) - weights).T
    assert np.sum(error.astype(np.float64) ** 2) == pytest.approx(_loss(weights, found, fmt, gram), rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 130),
    tokens=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    fmt=st.sampled_from(FORMATS),
)
def test_any_inputs_give_finite_weights_and_integers_that_the_bits_allow(rows, columns, tokens, seed, fmt):
    weights, gram = _weights(rows, columns, seed), _gram(columns, tokens, seed)

    quantized = gptq_rows(weights, fmt, factor(gram))

    integers = _integers(quantized, fmt, columns)
    assert integers.min() >= fmt.lowest and integers.max() <= fmt.highest
    assert np.isfinite(dequantize_rows(quantized, fmt, columns)).all()


def test_fewer_tokens_than_columns_still_help():
    weights, gram = _weights(32, 256), _gram(256, tokens=64)

    found = _loss(weights, gptq_rows(weights, INT4, factor(gram)), INT4, gram)

    assert found < 0.5 * _loss(weights, search_rows(weights, INT4), INT4, gram)


@pytest.mark.parametrize("panel", [1, 31, 64, 100])
def test_a_matrix_cut_to_panels_is_the_same_as_its_panels(panel):
    weights, gram = _weights(10, 150), _gram(150)
    parts = [gram[start : start + panel, start : start + panel] for start in range(0, 150, panel)]

    one = gptq_rows(weights, INT4, factor(gram, panel=panel))
    two = gptq_rows(weights, INT4, factor(parts))

    np.testing.assert_array_equal(one.data, two.data)


def test_larger_panels_are_better():
    weights, gram = _weights(64, 256), _gram(256)

    losses = [
        _loss(weights, gptq_rows(weights, INT4, factor(gram, panel=p)), INT4, gram) for p in (1, 32, 256)
    ]

    assert losses[2] < 0.9 * losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_inputs_that_do_not_go_together_leave_each_weight_to_itself(fmt):
    weights = _weights(20, 100)
    strength = np.random.default_rng(0).random(100).astype(np.float32) + 0.1

    found = gptq_rows(weights, fmt, factor(np.diag(strength)))

    searched = search_rows(weights, fmt, importance=strength + np.float32(0.01) * strength.mean())
    np.testing.assert_allclose(found.scales, searched.scales, rtol=1e-5)
    same = _integers(found, fmt, 100) == _integers(searched, fmt, 100)
    assert same.mean() > 0.999


def test_a_gram_matrix_of_zeros_is_search():
    weights = _weights(20, 100)

    found, searched = gptq_rows(weights, INT4, factor(np.zeros((100, 100)))), search_rows(weights, INT4)

    np.testing.assert_array_equal(found.scales, searched.scales)
    assert (_integers(found, INT4, 100) == _integers(searched, INT4, 100)).mean() > 0.999


def test_a_dead_column_is_rounded_for_itself_and_moves_no_other():
    weights, gram = _weights(30, 96), _gram(96)
    gram[:, 40] = gram[40] = 0
    made = factor(gram)

    found = gptq_rows(weights, INT4, made)

    (panel,) = made.panels
    (place,) = np.flatnonzero(panel.order == 40)
    assert not panel.feedback[place].any() and not panel.feedback[:, place].any()
    back = dequantize_rows(found, INT4, 96)[:, 40]
    inside = np.abs(back - weights[:, 40]) <= 0.5001 * np.abs(found.scales[:, 1])
    assert inside.mean() > 0.9  # the others are cut off at the ends of a narrower range


def test_a_block_of_zeros_stays_zero():
    weights, gram = _weights(6, 96), _gram(96)
    weights[:, 32:64] = 0

    for fmt in FORMATS:
        found = gptq_rows(weights, fmt, factor(gram))
        assert not dequantize_rows(found, fmt, 96)[:, 32:64].any()
        assert not found.scales[:, 1].any()


@pytest.mark.parametrize("cut", [1, 5, 512, 700])
def test_rows_do_not_depend_on_the_chunk_they_are_in(cut):
    weights, made = _weights(1100, 90), factor(_gram(90), panel=64)

    whole = gptq_rows(weights, INT4, made)

    for start in (0, cut, 1100 - cut):
        part = gptq_rows(weights[start : start + cut], INT4, made)
        np.testing.assert_array_equal(part.data, whole.data[start : start + cut])
        np.testing.assert_array_equal(part.zero_points, whole.zero_points[start : start + cut])


def test_the_width_of_a_tile_of_columns_does_not_matter(monkeypatch):
    weights, made = _weights(16, 200), factor(_gram(200))

    wide = gptq_rows(weights, INT4, made)
    monkeypatch.setattr(gptq, "TILE_COLUMNS", 7)
    narrow = gptq_rows(weights, INT4, made)

    assert (wide.data == narrow.data).mean() > 0.99


def test_the_scale_of_inputs_does_not_matter():
    weights, gram = _weights(16, 96), _gram(96)

    one = gptq_rows(weights, INT4, factor(gram))
    two = gptq_rows(weights, INT4, factor(gram * np.float32(2.0**60)))

    np.testing.assert_array_equal(one.data, two.data)


@pytest.mark.parametrize("power", [-90, -30, 120, 125])
def test_the_magnitude_of_weights_does_not_matter(power):
    weights, made = _weights(16, 96), factor(_gram(96))
    weights /= np.abs(weights).max()
    weights[3] = 0

    one = gptq_rows(weights, INT4, made)
    two = gptq_rows(np.ldexp(weights, power), INT4, made)

    np.testing.assert_array_equal(one.data, two.data)
    np.testing.assert_array_equal(np.ldexp(one.scales, power), two.scales)


def test_an_outlier_that_dwarfs_its_row_leaves_everything_finite():
    weights = _weights(8, 96)
    weights[:, 10], weights[:, 70] = 8e37, -3e37

    for fmt in FORMATS:
        assert np.isfinite(dequantize_rows(gptq_rows(weights, fmt, factor(_gram(96))), fmt, 96)).all()


def test_an_empty_matrix_gives_empty_arrays_of_the_right_shape():
    quantized = gptq_rows(np.zeros((0, 70), np.float32), INT4, factor(_gram(70)))

    assert quantized.data.shape == (0, 3, 16) and quantized.zero_points.shape == (0, 2)


def test_weights_and_gram_matrix_are_left_as_they_were():
    weights, gram = _weights(8, 64), _gram(64)
    weights.flags.writeable = gram.flags.writeable = False

    gptq_rows(weights, INT4, factor(gram))

    np.testing.assert_array_equal(weights, _weights(8, 64))
    np.testing.assert_array_equal(gram, _gram(64))


def test_a_factor_of_other_columns_is_refused():
    with pytest.raises(QuantError, match="of 64 input columns, but the weights have 96"):
        gptq_rows(_weights(4, 96), INT4, factor(_gram(64)))


def test_a_slightly_indefinite_matrix_gets_more_damping():
    gram = np.eye(8) * 1.0
    gram[0, 1] = gram[1, 0] = 1.05

    assert factor(gram, damping=0.001).columns == 8


@pytest.mark.parametrize(
    "gram, said",
    [
        (np.zeros((3, 4)), r"float64 \(3, 4\), must be square"),
        (np.zeros(3), r"\(3,\), must be square"),
        (np.zeros((0, 0)), "must be square"),
        (np.eye(3, dtype=int), "int64"),
        ([], "has no columns"),
        ([np.eye(3), np.zeros((2, 3))], r"at column 3 is float64 \(2, 3\)"),
        (np.diag([1, np.nan]), "not finite"),
        (np.diag([1, np.inf]), "not finite"),
        (np.diag([1.0, -1.0]), "negative diagonal"),
        (np.array([[1.0, 9.0], [9.0, 1.0]]), "not one of real inputs"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, said):
    with pytest.raises(QuantError, match=said):
        factor(gram)


@pytest.mark.parametrize("damping", [0, -0.1, 1.5, float("nan")])
def test_a_damping_out_of_range_is_refused(damping):
    with pytest.raises(QuantError, match=r"damping is .*must be above 0"):
        factor(np.eye(3), damping=damping)


def test_a_panel_of_nothing_is_refused():
    with pytest.raises(QuantError, match="panel is 0 columns"):
        factor(np.eye(3), panel=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weights = _weights(5, 64)
    weights[3, 9] = bad

    with pytest.raises(QuantError, match="weight at or after row 0 is"):
        gptq_rows(weights, INT4, factor(_gram(64)))
