"""The format of integer matrix units: what comes back, how far off, and what is refused."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoglm_edge.errors import QuantError
from autoglm_edge.quantize import (
    BlockFormat,
    ChannelFormat,
    QuantizedChannels,
    Rule,
    dequantize_channels,
    quantize_channels,
    quantize_rows,
)

Refine = Literal["none", "search"]
WEIGHTS = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32)


def matrices(columns: int = 12) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(columns)), elements=WEIGHTS)


def random(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@given(rows=matrices())
def test_every_weight_comes_back_within_half_a_step_of_its_row_and_group(
    groups: int, rows: np.ndarray
) -> None:
    fmt = ChannelFormat(8, groups)

    made = quantize_channels(rows, fmt)
    back = dequantize_channels(made, fmt)

    steps = np.repeat(made.scales, 12 // groups, axis=1).astype(np.float64)
    # The quotient w / scale is rounded to float32 before it is rounded to an integer: 127 * 2**-24 of a step.
    # A row that is denormal through and through is taken for zeros.
    assert (np.abs(back - rows.astype(np.float64)) <= steps * (0.5 + 1e-4) + 2.0**-140).all()


@pytest.mark.parametrize("refine", ["none", "search"])
@given(rows=matrices())
def test_integers_are_symmetric_and_zero_stays_zero(refine: Refine, rows: np.ndarray) -> None:
    made = quantize_channels(rows, ChannelFormat(), refine=refine)
    mirrored = quantize_channels(-rows, ChannelFormat(), refine=refine)

    assert made.data.min() >= -127
    assert (made.data[rows == 0] == 0).all()
    np.testing.assert_array_equal(made.data, -mirrored.data)
    np.testing.assert_array_equal(made.scales, mirrored.scales)
    assert (made.scales >= 0).all() and np.isfinite(made.scales).all()


@pytest.mark.parametrize("refine", ["none", "search"])
def test_the_largest_weight_of_a_row_is_the_largest_integer_and_a_row_of_zeros_has_scale_0(
    refine: Refine,
) -> None:
    rows = np.array([[1, -2, 0.5, 0], [0, 0, 0, 0]], np.float32)

    made = quantize_channels(rows, ChannelFormat(), refine=refine)

    assert made.data[0, 1] == -127 and not made.data[1].any()
    assert made.scales[1, 0] == 0


@pytest.mark.parametrize("groups", [1, 4])
@given(rows=matrices())
def test_a_search_leaves_no_row_a_larger_error(groups: int, rows: np.ndarray) -> None:
    fmt = ChannelFormat(8, groups)
    parts = (len(rows), groups, -1)
    plain, searched = (
        dequantize_channels(quantize_channels(rows, fmt, refine=refine), fmt).astype(np.float64) - rows
        for refine in ("none", "search")
    )

    before, after = ((error.reshape(parts) ** 2).sum(axis=2) for error in (plain, searched))
    step = np.abs(rows.astype(np.float64)).reshape(parts).max(axis=2) / 127
    assert (after <= before * (1 + 1e-4) + 1e-5 * step**2).all()  # compared in float32, in steps


def test_a_search_gains_where_weights_have_heavy_tails() -> None:
    rows = random(64, 4096)

    errors = [
        np.linalg.norm(
            dequantize_channels(quantize_channels(rows, ChannelFormat(), refine=refine), ChannelFormat())
            - rows
        )
        for refine in ("none", "search")
    ]

    assert errors[1] < 0.995 * errors[0]


@pytest.mark.parametrize("refine", ["none", "search"])
@pytest.mark.parametrize("groups", [1, 5])
def test_rows_do_not_depend_on_each_other(groups: int, refine: Refine) -> None:
    rows, fmt = random(700, 515), ChannelFormat(8, groups)

    whole = quantize_channels(rows, fmt, refine=refine)

    for start, stop in ((0, 1), (3, 600), (699, 700)):
        part = quantize_channels(rows[start:stop], fmt, refine=refine)
        np.testing.assert_array_equal(part.data, whole.data[start:stop])
        np.testing.assert_array_equal(part.scales, whole.scales[start:stop])


def test_rows_of_any_layout_give_the_same_integers_and_stay_as_they_are() -> None:
    rows = random(60, 96)
    kept = rows.copy()

    made = quantize_channels(np.asfortranarray(rows), ChannelFormat(8, 3))

    np.testing.assert_array_equal(made.data, quantize_channels(rows, ChannelFormat(8, 3)).data)
    np.testing.assert_array_equal(rows, kept)


def test_a_scale_per_row_is_coarser_than_one_per_block_and_groups_are_between() -> None:
    rows = random(256, 1024)

    def error(groups: int) -> float:
        fmt = ChannelFormat(8, groups)
        return float(np.linalg.norm(dequantize_channels(quantize_channels(rows, fmt), fmt) - rows))

    assert error(8) < error(2) < error(1)
    assert quantize_rows(rows, BlockFormat(8, 128, True)).scales.shape == (256, 8)
    assert quantize_channels(rows, ChannelFormat(8, 8)).scales.shape == (256, 8)


def test_a_size_is_what_is_stored() -> None:
    fmt = ChannelFormat(8, 4)
    made = quantize_channels(random(10, 64), fmt)

    assert fmt.size_bytes(10, 64) == made.data.nbytes + made.scales.nbytes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**127])
def test_a_weight_that_would_not_come_back_is_refused_by_its_row(value: float) -> None:
    rows = random(500, 512)
    rows[300, 7] = value

    with pytest.raises(QuantError, match=r"a weight at or after row (256|300) is (nan|inf|1.7e\+38)"):
        quantize_channels(rows, ChannelFormat())


@pytest.mark.parametrize(
    "rows",
    [np.zeros((2, 3)), np.zeros(3, np.float32), np.zeros((2, 0), np.float32), np.zeros((2, 3), np.int8)],
)
def test_what_is_no_float32_matrix_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(QuantError, match="must be a float32 matrix"):
        quantize_channels(rows, ChannelFormat())


def test_groups_that_are_not_equal_are_refused() -> None:
    with pytest.raises(QuantError, match="3 groups do not divide 64 columns"):
        quantize_channels(random(2, 64), ChannelFormat(8, 3))


@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (7, 1), (16, 1), (8, 0), (8, -1), (8, 65)])
def test_formats_that_are_none_are_refused(bits: int, groups: int) -> None:
    with pytest.raises(QuantError, match="must be"):
        ChannelFormat(bits, groups)


def test_arrays_of_another_format_are_not_read() -> None:
    made = quantize_channels(random(4, 8), ChannelFormat(8, 2))

    for wrong in (
        QuantizedChannels(made.data, made.scales[:, :1]),
        QuantizedChannels(made.data.astype(np.uint8), made.scales),  # type: ignore[arg-type]
        QuantizedChannels(made.data[0], made.scales),
    ):
        with pytest.raises(QuantError, match="must be int8"):
            dequantize_channels(wrong, ChannelFormat(8, 2))


def test_gptq_is_refused_as_it_rounds_for_blocks() -> None:
    with pytest.raises(QuantError, match="rounds for blocks only; take refine"):
        Rule("*", ChannelFormat(), None, "gptq")
