"""Number formats: bytes, rounding, and agreement with the kernels that read them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from autoglm_edge.errors import QuantError
from autoglm_edge.quantize import rounding
from autoglm_edge.quantize.formats import (
    BlockFormat,
    Quantized,
    dequantize_rows,
    pack_nibbles,
    unpack_nibbles,
)
from autoglm_edge.quantize.rounding import LARGEST_WEIGHT, quantize_rows

ALL_FORMATS = [
    BlockFormat(b, size, sym) for b in (2, 3, 4, 8) for size in (32, 64, 128) for sym in (True, False)
]
BITS = st.sampled_from([2, 3, 4, 8])


def _weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.02).astype(np.float32)


def _run(node, inputs, initializers, output_shape) -> np.ndarray:
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        [
            helper.make_tensor(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape, v.tobytes(), raw=True)
            for k, v in initializers.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def _matmul_nbits(x: np.ndarray, q: Quantized, fmt: BlockFormat, columns: int, level: int) -> np.ndarray:
    weights = {"data": q.data, "scales": q.scales}
    if q.zero_points is not None:
        weights["zero_points"] = q.zero_points
    node = helper.make_node(
        "MatMulNBits",
        ["x", *weights],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=len(q.data),
        bits=fmt.field_bits,
        block_size=fmt.block_size,
        accuracy_level=level,
    )
    return _run(node, {"x": x}, weights, (len(x), len(q.data)))


@pytest.mark.parametrize("columns", [128, 320, 300, 33, 384, 13])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_matmulnbits_computes_with_exactly_the_dequantized_weights(fmt, columns):
    # 300, 33 and 13: the last block is padded. 300 and 320 in blocks of 64: an odd number of zero points.
    weights = _weights(24, columns, seed=columns)
    x = np.random.default_rng(1).standard_normal((5, columns)).astype(np.float32)
    quantized = quantize_rows(weights, fmt)

    y = _matmul_nbits(x, quantized, fmt, columns, level=0)

    wanted = x.astype(np.float64) @ dequantize_rows(quantized, fmt, columns).T.astype(np.float64)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("columns", [128, 384])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_gatherblockquantized_returns_exactly_the_dequantized_rows(fmt, columns):
    table = _weights(40, columns, seed=3)
    quantized = quantize_rows(table, fmt)
    ids = np.array([[0, 39, 7], [7, 1, 2]], np.int64)
    weights = {"data": quantized.data.reshape(40, -1), "scales": quantized.scales}
    if quantized.zero_points is not None:
        weights["zero_points"] = quantized.zero_points
    names = ["data", "ids", "scales", *(["zero_points"] if quantized.zero_points is not None else [])]
    node = helper.make_node(
        "GatherBlockQuantized",
        names,
        ["y"],
        domain="com.microsoft",
        bits=fmt.field_bits,
        block_size=fmt.block_size,
        gather_axis=0,
        quantize_axis=1,
    )

    rows = _run(node, {"ids": ids}, weights, (2, 3, columns))

    np.testing.assert_allclose(rows, dequantize_rows(quantized, fmt, columns)[ids], rtol=0, atol=1e-7)


@pytest.mark.parametrize("level", [4])
@pytest.mark.parametrize("fmt", [BlockFormat(4, 64, False), BlockFormat(8, 128, True)], ids=str)
def test_matmulnbits_with_integer_activations_stays_within_a_few_thousandths(fmt, level):
    weights = _weights(64, 1024)
    x = np.random.default_rng(1).standard_normal((3, 1024)).astype(np.float32)
    quantized = quantize_rows(weights, fmt)

    y = _matmul_nbits(x, quantized, fmt, 1024, level)

    wanted = x @ dequantize_rows(quantized, fmt, 1024).T
    assert np.linalg.norm(y - wanted) < 0.02 * np.linalg.norm(wanted)


def _reference(
    weights: np.ndarray, fmt: BlockFormat, scale_dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers (N, padded K), scales and zero points, block by block in the words of the module."""
    rows, columns = weights.shape
    top, half = 2**fmt.bits - 1, 2 ** (fmt.bits - 1)
    middle = 128 if fmt.bits == 8 else 8
    lowest = middle - half if fmt.symmetric else 0
    padded = np.zeros((rows, fmt.blocks(columns) * fmt.block_size), np.float32)
    padded[:, :columns] = weights
    blocks = padded.reshape(-1, fmt.block_size)
    integers = np.empty(blocks.shape, np.uint8)
    scales, zeros = np.empty(len(blocks), scale_dtype), np.empty(len(blocks), np.uint8)
    for index, block in enumerate(blocks):
        if fmt.symmetric:
            extreme = max(block, key=abs)
            scale = extreme / np.float32(-half)
        else:
            scale = (max(block.max(), np.float32(0)) - min(block.min(), np.float32(0))) / np.float32(top)
        stored = np.dtype(scale_dtype).type(scale)
        if abs(np.float32(stored)) < abs(scale):
            stored = np.nextafter(stored, np.copysign(stored.dtype.type(np.inf), stored))
        scale = np.float32(stored)
        divisor = scale if scale else np.float32(1)
        zero = middle if fmt.symmetric else min(round(float(min(block.min(), np.float32(0)) / -divisor)), top)
        integers[index] = np.clip(np.rint(block / divisor) + np.float32(zero), lowest, lowest + top)
        scales[index], zeros[index] = stored, zero
    return integers.reshape(rows, -1), scales.reshape(rows, -1), zeros.reshape(rows, -1)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_quantize_rows_equals_a_loop_over_blocks(fmt, scale_dtype):
    weights = _weights(37, 200)

    quantized = quantize_rows(weights, fmt, scale_dtype=scale_dtype)

    integers, scales, zeros = _reference(weights, fmt, scale_dtype)
    packed = quantized.data.reshape(37, -1)
    np.testing.assert_array_equal(unpack_nibbles(packed) if fmt.field_bits == 4 else packed, integers)
    assert quantized.scales.dtype == scale_dtype
    np.testing.assert_array_equal(quantized.scales, scales)
    if quantized.zero_points is not None:
        stored = pack_nibbles(zeros) if fmt.field_bits == 4 else zeros
        np.testing.assert_array_equal(quantized.zero_points, stored)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 100])
def test_a_matrix_of_several_chunks_equals_its_rows_one_by_one(rows, monkeypatch):
    monkeypatch.setattr(rounding, "CHUNK_WEIGHTS", 8 * 300)
    fmt = BlockFormat(4, 32, False)
    weights = _weights(rows, 300)

    whole = quantize_rows(weights, fmt)

    for index in range(rows):
        one = quantize_rows(weights[index : index + 1], fmt)
        np.testing.assert_array_equal(one.data[0], whole.data[index])
        np.testing.assert_array_equal(one.scales[0], whole.scales[index])
        np.testing.assert_array_equal(one.zero_points[0], whole.zero_points[index])


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=33), elements=st.integers(0, 15))
)
def test_pack_then_unpack_returns_the_same_integers(integers):
    count = integers.shape[-1]

    unpacked = unpack_nibbles(pack_nibbles(integers))

    np.testing.assert_array_equal(unpacked[..., :count], integers)
    assert not unpacked[..., count:].any()


def _matrices(largest: float):
    floats = st.floats(-largest, largest, width=32)
    return hnp.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 140)), elements=floats, fill=floats
    )


def _errors_in_steps(
    weights: np.ndarray, fmt: BlockFormat, scale_dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """|w - back| and w, in units of the block's scale."""
    columns = weights.shape[1]
    quantized = quantize_rows(weights, fmt, scale_dtype=scale_dtype)
    back = dequantize_rows(quantized, fmt, columns)
    steps = np.repeat(quantized.scales.astype(np.float64), fmt.block_size, axis=1)[:, :columns]
    assert np.isfinite(back).all()
    assert (back[weights == 0] == 0).all()
    assert (back[steps == 0] == 0).all() and (np.abs(weights[steps == 0]) < 2e-43).all()
    steps[steps == 0] = 1
    return np.abs((back.astype(np.float64) - weights) / steps), weights / steps


SLACK = 1e-4  # steps: 255 steps in float32 are exact to 1.5e-5


@settings(max_examples=120, deadline=None)
@given(data=st.data(), scale_dtype=st.sampled_from(["float32", "float16"]), bits=BITS)
def test_asymmetric_weights_come_back_within_half_a_step(data, scale_dtype, bits):
    weights = data.draw(_matrices(LARGEST_WEIGHT[scale_dtype]))

    errors, _ = _errors_in_steps(weights, BlockFormat(bits, 32, False), scale_dtype)

    assert errors.max() <= 0.5 + SLACK


@settings(max_examples=120, deadline=None)
@given(data=st.data(), scale_dtype=st.sampled_from(["float32", "float16"]), bits=BITS)
def test_symmetric_weights_come_back_within_half_a_step_or_one_at_the_short_end(data, scale_dtype, bits):
    fmt = BlockFormat(bits, 32, True)
    weights = data.draw(_matrices(LARGEST_WEIGHT[scale_dtype]))

    errors, places = _errors_in_steps(weights, fmt, scale_dtype)

    short_end = places > 2 ** (bits - 1) - 1
    assert errors[~short_end].max(initial=0) <= 0.5 + SLACK
    assert errors[short_end].max(initial=0) <= 1 + SLACK


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.1, -3e4, 0.05])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_a_constant_block_comes_back_as_the_constant(fmt, value, scale_dtype):
    weights = np.full((2, fmt.block_size), value, np.float32)

    back = dequantize_rows(quantize_rows(weights, fmt, scale_dtype=scale_dtype), fmt, fmt.block_size)

    # A float16 scale is rounded by up to one part in 1024.
    np.testing.assert_allclose(back, weights, rtol=1e-3 if scale_dtype == "float16" else 2e-7)


def test_a_block_of_zeros_has_scale_zero_and_no_sign():
    for fmt in ALL_FORMATS:
        quantized = quantize_rows(np.full((1, fmt.block_size), -0.0, np.float32), fmt)
        assert quantized.scales.tobytes() == bytes(4)


@pytest.mark.parametrize("fmt", [BlockFormat(4, 32, False), BlockFormat(8, 128, True)], ids=str)
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1.2e-38, 1e-31])
def test_weights_near_the_smallest_float_become_zero_without_warning(tiny, fmt):
    weights = np.full((1, fmt.block_size), tiny, np.float32)

    quantized = quantize_rows(weights, fmt)

    assert np.abs(quantized.scales).max() in (0, np.float32(2.0**-100))
    assert not dequantize_rows(quantized, fmt, fmt.block_size).any()


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("fmt", [BlockFormat(4, 32, False), BlockFormat(8, 32, True)], ids=str)
def test_a_weight_that_is_not_finite_or_too_large_is_refused(fmt, bad, scale_dtype):
    weights = _weights(5, 100)
    weights[3, 99] = bad

    with pytest.raises(QuantError, match=r"weight at or after row 0 is (nan|inf|3e\+38)"):
        quantize_rows(weights, fmt, scale_dtype=scale_dtype)


def test_a_weight_that_float16_cannot_hold_is_refused_with_float16_scales_only():
    weights = np.full((1, 32), 40000, np.float32)

    quantize_rows(weights, BlockFormat(4, 32, False))
    with pytest.raises(QuantError, match=r"4e\+04, but with float16 scales"):
        quantize_rows(weights, BlockFormat(4, 32, False), scale_dtype="float16")


def test_rows_are_left_as_they_were_and_may_be_read_only():
    weights = _weights(4, 100)
    weights.flags.writeable = False
    before = weights.copy()

    quantize_rows(weights, BlockFormat(4, 32, False))

    np.testing.assert_array_equal(weights, before)


def test_a_transposed_view_gives_the_same_as_its_copy():
    view = _weights(128, 6).T

    for fmt in (BlockFormat(4, 32, False), BlockFormat(8, 64, True)):
        one, two = quantize_rows(view, fmt), quantize_rows(view.copy(), fmt)
        np.testing.assert_array_equal(one.data, two.data)


@pytest.mark.parametrize(
    "rows", [np.zeros(32, np.float32), np.zeros((2, 32), np.float64), np.zeros((2, 0), np.float32)]
)
def test_anything_but_a_float32_matrix_is_refused(rows):
    with pytest.raises(QuantError, match="must be a float32 matrix"):
        quantize_rows(rows, BlockFormat(4, 32, False))


def test_an_empty_matrix_gives_empty_arrays_of_the_right_shape():
    quantized = quantize_rows(np.zeros((0, 70), np.float32), BlockFormat(4, 32, False))

    assert quantized.data.shape == (0, 3, 16) and quantized.zero_points.shape == (0, 2)


@pytest.mark.parametrize("bits, size", [(1, 32), (5, 32), (0, 64), (16, 32), (4, 16), (8, 256), (4, 0)])
def test_formats_that_no_kernel_reads_are_refused(bits, size):
    with pytest.raises(QuantError, match="must be"):
        BlockFormat(bits, size, True)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
@pytest.mark.parametrize("columns", [31, 32, 300, 320])
def test_size_bytes_is_the_size_of_what_quantize_rows_returns(fmt, columns):
    quantized = quantize_rows(_weights(3, columns), fmt)

    arrays = [quantized.data, quantized.scales, quantized.zero_points]
    assert fmt.size_bytes(3, columns) == sum(array.nbytes for array in arrays if array is not None)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_two_and_three_bits_take_up_as_much_as_four(bits, symmetric):
    fmt = BlockFormat(bits, 64, symmetric)

    assert fmt.field_bits == 4
    assert fmt.size_bytes(7, 200) == BlockFormat(4, 64, symmetric).size_bytes(7, 200)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=BITS, symmetric=st.booleans())
def test_stored_integers_are_no_more_than_the_bits_allow(data, bits, symmetric):
    fmt = BlockFormat(bits, 32, symmetric)
    weights = data.draw(_matrices(LARGEST_WEIGHT["float32"]))

    quantized = quantize_rows(weights, fmt)

    packed = quantized.data.reshape(len(weights), -1)
    integers = unpack_nibbles(packed) if fmt.field_bits == 4 else packed
    middle = {4: 8, 8: 128}[fmt.field_bits]
    lowest = middle - 2 ** (bits - 1) if symmetric else 0
    assert integers.min() >= lowest and integers.max() < lowest + 2**bits
    if quantized.zero_points is not None:
        zeros = unpack_nibbles(quantized.zero_points) if fmt.field_bits == 4 else quantized.zero_points
        assert zeros.max() < 2**bits


def test_fewer_bits_lose_more():
    weights = _weights(64, 512)

    errors = []
    for bits in (8, 4, 3, 2):
        fmt = BlockFormat(bits, 64, False)
        errors.append(np.linalg.norm(dequantize_rows(quantize_rows(weights, fmt), fmt, 512) - weights))

    assert all(more > 1.7 * less for less, more in itertools.pairwise(errors))


def test_dequantize_refuses_arrays_of_another_format():
    quantized = quantize_rows(_weights(3, 96), BlockFormat(4, 32, False))

    for fmt, columns in [
        (BlockFormat(8, 32, False), 96),
        (BlockFormat(4, 32, True), 96),
        (BlockFormat(4, 64, False), 96),
        (BlockFormat(4, 32, False), 97),
    ]:
        with pytest.raises(QuantError, match=r"quantized \w+ (is|have)"):
            dequantize_rows(quantized, fmt, columns)


def test_the_bytes_of_the_example_in_the_format_specification():
    text = (Path(__file__).resolve().parent.parent / "docs" / "bundle.md").read_text(encoding="utf-8")
    lines = text.partition("```example\n")[2].partition("```")[0].splitlines()
    wanted = {"data": "", "scales": "", "zero points": ""}
    for line in lines:
        wanted[line[:13].strip()] += line[13:]
    rising = np.arange(16)
    blocks = [0.5 * rising - 2.5, 0.5 * rising - 2.5, 0.25 * rising, 0 * rising, -0.125 * rising]
    row = np.concatenate(blocks).astype(np.float32)

    quantized = quantize_rows(row[None], BlockFormat(4, 32, False))

    assert quantized.data.tobytes() == bytes.fromhex(wanted["data"])
    assert quantized.scales.astype("<f4").tobytes() == bytes.fromhex(wanted["scales"])
    assert quantized.zero_points.tobytes() == bytes.fromhex(wanted["zero points"])
    np.testing.assert_array_equal(dequantize_rows(quantized, BlockFormat(4, 32, False), 80)[0], row)
