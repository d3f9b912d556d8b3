"""Products on integer units: the nodes against the same arithmetic in numpy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import GraphBuilder, nn
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.errors import QuantError
from autoglm_edge.export.graphs.nn import Linear, Outputs, WeightBook, build_part
from autoglm_edge.export.graphs.plan import PartPlan
from autoglm_edge.quantize import ChannelFormat, Recipe, Rule, dequantize_channels, quantize_channels

K = 48
Arrays = dict[str, np.ndarray]


class Two(nn.Module):
    """Two matrices with one input, and a third with another."""

    def __init__(self, book: WeightBook, bias: bool) -> None:
        super().__init__()
        self.a = Linear(book, "a", K, 20, bias=bias)
        self.b = Linear(book, "b", K, 7)
        self.c = Linear(book, "c", 20, 5)

    def forward(self, op: OpBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        first = self.a(op, x)
        return first, self.b(op, x), self.c(op, first)


def plan(groups: int = 1, bias: bool = False, rank: int = 3) -> PartPlan:
    book = WeightBook(Recipe("test", "float32", 4, (Rule("*", ChannelFormat(8, groups)),)))
    module = Two(book, bias)
    leading: list[int | str] = ["batch", "tokens"][: rank - 1]

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        widths = (20, 7, 5)
        return [
            (f"y{number}", value, ir.DataType.FLOAT, [*leading, width])
            for number, (value, width) in enumerate(zip(module(op, *values), widths, strict=True))
        ]

    return build_part("part", book, [("x", ir.DataType.FLOAT, [*leading, K])], trace)


def weights(rng: np.random.Generator) -> Arrays:
    return {
        "a.weight": rng.standard_normal((20, K)).astype(np.float32),
        "b.weight": rng.standard_normal((7, K)).astype(np.float32),
        "c.weight": rng.standard_normal((5, 20)).astype(np.float32),
        "a.bias": rng.standard_normal(20).astype(np.float32),
    }


def session(part: PartPlan, values: Arrays, *, packed: bool = True) -> ort.InferenceSession:
    """The graph with its weights inside."""
    for weight in part.weights:
        rows = values[weight.source]
        arrays = [rows]
        if isinstance(weight.quant, ChannelFormat):
            made = quantize_channels(rows, weight.quant)
            parts = np.split(made.data, weight.quant.groups, axis=1)
            arrays = [
                array
                for group, data in enumerate(parts)
                for array in (data.T.copy(), made.scales[:, group].copy())
            ]
        for piece, array in zip(weight.pieces, arrays, strict=True):
            assert piece.shape == array.shape and piece.dtype == array.dtype
            part.model.graph.initializers[piece.name].const_value = ir.tensor(array, name=piece.name)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(ir.to_proto(part.model).SerializeToString(), options)


def expected(x: np.ndarray, rows: np.ndarray, groups: int, bias: np.ndarray | None = None) -> np.ndarray:
    """Bytes times bytes in whole numbers; scales as float32."""
    fmt = ChannelFormat(8, groups)
    made = quantize_channels(rows, fmt)
    total = np.zeros((*x.shape[:-1], len(rows)), np.float64)
    width = x.shape[-1] // groups
    for group in range(groups):
        columns = slice(group * width, (group + 1) * width)
        part = x[..., columns]
        scale = np.maximum(np.abs(part).max(axis=-1, keepdims=True), np.float32(1e-30 * 127)) / np.float32(
            127
        )
        integers = np.rint(part / scale).astype(np.int64)
        assert np.abs(integers).max() <= 127
        sums = integers @ made.data[:, columns].T.astype(np.int64)
        total += sums * made.scales[:, group].astype(np.float64) * scale
    return total if bias is None else total + bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1, K), (1, 33, K), (2, 9, K)])
def test_a_product_is_that_of_the_bytes_with_all_scales(
    shape: tuple[int, ...], groups: int, bias: bool
) -> None:
    rng = np.random.default_rng(groups)
    values, x = weights(rng), rng.standard_normal(shape).astype(np.float32)

    first, second, third = session(plan(groups, bias), values).run(None, {"x": x})

    # Sums of integers are exact; two factors in float32 follow.
    want = expected(x, values["a.weight"], groups, values["a.bias"] if bias else None)
    np.testing.assert_allclose(first, want, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(second, expected(x, values["b.weight"], groups), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(third, expected(first, values["c.weight"], groups), rtol=1e-6, atol=1e-5)


def test_a_matrix_of_tokens_without_a_batch_is_multiplied_too() -> None:
    rng = np.random.default_rng(0)
    values, x = weights(rng), rng.standard_normal((12, K)).astype(np.float32)

    first, *_ = session(plan(rank=2), values).run(None, {"x": x})

    np.testing.assert_allclose(first, expected(x, values["a.weight"], 1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_that_stay_unpacked_give_the_same_bits(groups: int) -> None:
    rng = np.random.default_rng(0)
    values, x = weights(rng), rng.standard_normal((1, 40, K)).astype(np.float32)

    packed, unpacked = (
        session(plan(groups), values, packed=packed).run(None, {"x": x}) for packed in (True, False)
    )

    for one, other in zip(packed, unpacked, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_largest_sums_are_exact_on_this_machine() -> None:
    """All products at their largest: saturating units, as processors without VNNI have, would be off."""
    values = weights(np.random.default_rng(0))
    values["a.weight"][:] = 1
    values["a.weight"][10:] = -1

    first, *_ = session(plan(), values).run(None, {"x": np.full((1, 4, K), 3, np.float32)})

    np.testing.assert_allclose(first[..., :10], 3 * K, rtol=1e-6)
    np.testing.assert_allclose(first[..., 10:], -3 * K, rtol=1e-6)


def test_a_token_does_not_feel_what_stands_beside_it() -> None:
    rng = np.random.default_rng(0)
    run = session(plan(), weights(rng))
    x = rng.standard_normal((1, 8, K)).astype(np.float32)
    loud = x.copy()
    loud[0, 3] *= 1e6

    plain, beside = run.run(["y0"], {"x": x})[0], run.run(["y0"], {"x": loud})[0]
    alone = run.run(["y0"], {"x": x[:, 5:6]})[0]

    np.testing.assert_array_equal(np.delete(plain, 3, axis=1), np.delete(beside, 3, axis=1))
    np.testing.assert_array_equal(alone[0, 0], plain[0, 5])


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_a_token_of_any_size_gives_finite_numbers_and_zeros_give_zeros(size: float) -> None:
    rng = np.random.default_rng(0)
    values = weights(rng)
    x = np.full((1, 2, K), size, np.float32)

    first, *_ = session(plan(), values).run(None, {"x": x})

    assert np.isfinite(first).all()
    if size in (0.0, 1e-38):  # far below the least scale, so it rounds to nothing
        assert not first.any()
    else:
        np.testing.assert_allclose(first, expected(x, values["a.weight"], 1), rtol=1e-5, atol=1e-35)


def test_the_error_of_a_product_is_that_of_two_roundings_to_8_bits() -> None:
    rng = np.random.default_rng(0)
    values, x = weights(rng), rng.standard_normal((1, 500, K)).astype(np.float32)

    first, *_ = session(plan(), values).run(None, {"x": x})
    exact = x @ values["a.weight"].T

    # Steps are about 2.5 / 127 of a spread of 1, each rounding an error of step / sqrt(12), twice.
    assert 0.002 < np.linalg.norm(first - exact) / np.linalg.norm(exact) < 0.015
    back = dequantize_channels(quantize_channels(values["a.weight"], ChannelFormat()), ChannelFormat())
    assert np.linalg.norm(x @ back.T - exact) < np.linalg.norm(first - exact)


def test_matrices_with_one_input_share_its_bytes(tmp_path: Path) -> None:
    part = plan()

    operators = Counter(node.op_type for node in part.model.graph)

    assert operators["MatMulIntegerToFloat"] == 3
    assert operators["QuantizeLinear"] == operators["ReduceMax"] == 2
    assert part.is_integer and "MatMulNBits" not in operators


def test_the_graph_passes_the_checker_of_onnx() -> None:
    part = plan(2, True)
    session(part, weights(np.random.default_rng(0)))

    onnx.checker.check_model(ir.to_proto(part.model))


def test_groups_that_do_not_divide_a_matrix_are_refused_before_anything_is_built() -> None:
    with pytest.raises(QuantError, match="5 groups do not divide 48 columns"):
        plan(5)
