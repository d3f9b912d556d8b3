from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from autoglm_edge.errors import ExportError, QuantError
from autoglm_edge.export.calibrate.gram import Gram
from autoglm_edge.export.graphs.integers import channel_pieces
from autoglm_edge.export.graphs.plan import ITEM_BYTES, PartPlan, Piece, RowSlice, Weight, lay_out
from autoglm_edge.export.weights import writer
from autoglm_edge.export.weights.quantizer import RecipeQuantizer
from autoglm_edge.export.weights.rows import source_matrix
from autoglm_edge.export.weights.writer import chunk_rows, in_flight_bytes, write_part
from autoglm_edge.quantize.channels import ChannelFormat, quantize_channels
from autoglm_edge.quantize.formats import BlockFormat, Quantized
from autoglm_edge.quantize.gptq import TILE_ROWS
from autoglm_edge.quantize.refine import search_rows
from autoglm_edge.quantize.rounding import quantize_rows


class Store:
    """Tensors in memory, with the interface of a TensorStore."""

    def __init__(self, **tensors: NDArray[np.float32]) -> None:
        self.tensors = tensors
        self.reads: list[tuple[str, int, int]] = []
        self.released: list[str] = []
        self.lock = threading.Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def rows(
        self, name: str, start: int, stop: int, *, permute: tuple[int, ...] | None = None
    ) -> NDArray[np.float32]:
        with self.lock:
            self.reads.append((name, start, stop))
        tensor = self.tensors[name]
        if permute is not None:
            tensor = tensor.transpose(permute)
        return np.ascontiguousarray(tensor.reshape(len(tensor), -1)[start:stop])

    def release(self, name: str) -> None:
        self.released.append(name)


def plan_of(*weights: Weight) -> PartPlan:
    graph = ir.Graph([], [], nodes=[], name="part", opset_imports={"": 23})
    return PartPlan("part", ir.Model(graph, ir_version=11), lay_out(weights))


def copy_weight(name: str, *shape: int, dtype: Any = "float32", action: Any = "copy") -> Weight:
    rows, columns = shape[0], math.prod(shape[1:])
    stored = (columns, rows) if action == "transpose" else (rows, columns)
    return Weight(name, rows, columns, action, (Piece(name, dtype, stored),))


def quantized_weight(name: str, rows: int, columns: int, fmt: BlockFormat, dtype: Any = "float32") -> Weight:
    blocks = fmt.blocks(columns)
    pieces = [
        Piece(f"{name}_data", "uint8", (rows, blocks, fmt.block_bytes)),
        Piece(f"{name}_scales", dtype, (rows, blocks)),
    ]
    if not fmt.symmetric:
        pieces.append(Piece(f"{name}_zero_points", "uint8", (rows, fmt.zero_point_bytes(columns))))
    return Weight(name, rows, columns, "quantize", tuple(pieces), fmt)


def channel_weight(name: str, rows: int, columns: int, groups: int = 1) -> Weight:
    fmt = ChannelFormat(8, groups)
    return Weight(name, rows, columns, "quantize", channel_pieces(f"{name}", rows, columns, fmt), fmt)


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def read(path: Path, piece: Piece) -> NDArray[Any]:
    count = piece.size_bytes // ITEM_BYTES[piece.dtype]
    return np.fromfile(path, piece.dtype, count, offset=piece.offset).reshape(piece.shape)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks per tensor, also for tensors that fit a test."""
    monkeypatch.setattr(writer, "CHUNK_BYTES", (1 << 12, 1 << 12))
    monkeypatch.setattr(writer, "TALL_CHUNK_BYTES", (1 << 12, 1 << 12))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(37, 100), (1, 5000), (5000, 1), (1, 1), (3, 5, 7, 11)])
def test_a_copy_holds_the_cast_values_in_row_order(
    shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    values = random(*shape)
    plan = plan_of(copy_weight("w", *shape, dtype=dtype))

    write_part(plan, Store(w=values), tmp_path / "data", workers=3)

    stored = read(tmp_path / "data", plan.weights[0].pieces[0])
    assert np.array_equal(stored, values.reshape(shape[0], -1).astype(dtype))


def test_a_vector_is_copied_whether_the_plan_calls_it_a_row_or_a_column(tmp_path: Path) -> None:
    values = random(3000)
    plan = plan_of(Weight("w", 1, 3000, "copy", (Piece("w", "float32", (3000,)),)))

    write_part(plan, Store(w=values), tmp_path / "data")

    assert np.array_equal(np.fromfile(tmp_path / "data", np.float32), values)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(37, 100), (700, 3), (1, 5000), (5000, 1), (16, 16), (17, 2049)])
def test_a_transposed_weight_is_stored_column_by_column(
    shape: tuple[int, int], dtype: str, tmp_path: Path
) -> None:
    values = random(*shape)
    plan = plan_of(copy_weight("w", *shape, dtype=dtype, action="transpose"))

    write_part(plan, Store(w=values), tmp_path / "data", workers=3)

    stored = read(tmp_path / "data", plan.weights[0].pieces[0])
    assert np.array_equal(stored, values.T.astype(dtype))


@pytest.mark.parametrize("refine", ["none", "search"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(64, 96), (33, 132), (1, 1000), (5000, 4), (200, 8), (65, 2052)])
def test_integers_with_a_scale_per_channel_are_stored_column_by_column(
    shape: tuple[int, int], groups: int, refine: Any, tmp_path: Path
) -> None:
    values = random(*shape)
    plan = plan_of(replace(channel_weight("w", *shape, groups), refine=refine))

    write_part(plan, Store(w=values), tmp_path / "data", workers=3)

    whole = quantize_channels(values, ChannelFormat(8, groups), refine=refine)
    stored = [read(tmp_path / "data", piece) for piece in plan.weights[0].pieces]
    data, scales = np.concatenate(stored[0::2]), np.stack(stored[1::2], axis=1)
    assert [piece.dtype for piece in plan.weights[0].pieces] == ["int8", "float32"] * groups
    assert np.array_equal(data, whole.data.T)
    assert np.array_equal(scales, whole.scales)


def test_a_plan_that_does_not_fit_the_channels_is_refused(tmp_path: Path) -> None:
    weight = channel_weight("w", 60, 64, 2)
    data, scales, *rest = weight.pieces
    wrong = {
        "has 2 pieces, its format 4": (data, scales),
        r"w_scales should be float16 \(60,\), the format gives float32": (
            data,
            replace(scales, dtype="float16"),
            *rest,
        ),
        r"w_data should be int8 \(31, 60\), the format gives int8 \(32, 60\)": (
            replace(data, shape=(31, 60)),
            scales,
            *rest,
        ),
    }
    for said, pieces in wrong.items():
        with pytest.raises(ExportError, match=said):
            write_part(plan_of(replace(weight, pieces=pieces)), Store(w=random(60, 64)), tmp_path / "data")


@pytest.mark.parametrize("scales", ["float32", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(64, 96), (33, 131), (1, 1000), (200, 5)])
def test_chunks_quantize_to_the_same_bytes_as_the_whole_tensor(
    shape: tuple[int, int], bits: int, symmetric: bool, scales: Any, tmp_path: Path
) -> None:
    values = random(*shape)
    fmt = BlockFormat(bits, 32, symmetric)
    plan = plan_of(quantized_weight("w", *shape, fmt, scales))
    store = Store(w=values)

    write_part(plan, store, tmp_path / "data", workers=3)

    whole = quantize_rows(values, fmt, scale_dtype=scales)
    parts = [whole.data, whole.scales] + ([] if whole.zero_points is None else [whole.zero_points])
    stored = [read(tmp_path / "data", piece) for piece in plan.weights[0].pieces]
    assert [np.array_equal(a, b) for a, b in zip(stored, parts, strict=True)] == [True] * len(parts)
    assert len(store.reads) > 1 or shape[0] == 1 or math.prod(shape) <= 1024


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_table_is_stored_without_the_padding_of_its_last_block(bits: int, tmp_path: Path) -> None:
    values = random(60, 77)
    fmt = BlockFormat(bits, 64, False)
    weight = quantized_weight("w", 60, 77, fmt)
    row_bytes = math.ceil(77 * fmt.field_bits / 8)
    table = replace(weight.pieces[0], shape=(60, row_bytes))
    plan = plan_of(replace(weight, pieces=(table, *weight.pieces[1:])))

    write_part(plan, Store(w=values), tmp_path / "data")

    whole = quantize_rows(values, fmt).data.reshape(60, -1)
    assert np.array_equal(read(tmp_path / "data", plan.weights[0].pieces[0]), whole[:, :row_bytes])


def test_a_plan_with_another_number_of_bytes_than_the_format_is_refused(tmp_path: Path) -> None:
    weight = quantized_weight("w", 60, 77, BlockFormat(4, 64, False))
    short = replace(weight.pieces[0], shape=(60, 5))

    with pytest.raises(ExportError, match="w_data should have 5 bytes of uint8 per row, the format gives 64"):
        write_part(
            plan_of(replace(weight, pieces=(short, *weight.pieces[1:]))),
            Store(w=random(60, 77)),
            tmp_path / "d",
        )


def test_a_permuted_weight_is_seen_in_the_order_of_the_permutation(tmp_path: Path) -> None:
    values = random(6, 4, 2, 3)
    piece = Piece("w", "float32", (6, 24))
    plan = plan_of(Weight("w", 6, 24, "copy", (piece,), permute=(0, 2, 3, 1)))

    write_part(plan, Store(w=values), tmp_path / "data")

    stored = read(tmp_path / "data", plan.weights[0].pieces[0])
    assert np.array_equal(stored, values.transpose(0, 2, 3, 1).reshape(6, 24))


def test_the_number_of_threads_does_not_change_a_byte(tmp_path: Path) -> None:
    store = Store(a=random(300, 64), b=random(300, 64), c=random(300), d=random(300, 64))
    plan = plan_of(
        copy_weight("a", 300, 64, action="transpose"),
        quantized_weight("b", 300, 64, BlockFormat(4, 32, False)),
        copy_weight("c", 300, dtype="float16"),
        channel_weight("d", 300, 64, 2),
    )

    for workers in (1, 2, 7):
        write_part(plan, store, tmp_path / str(workers), workers=workers)

    assert len({(tmp_path / str(workers)).read_bytes() for workers in (1, 2, 7)}) == 1


def test_the_file_has_the_planned_size_and_zeros_between_pieces(tmp_path: Path) -> None:
    plan = plan_of(copy_weight("a", 10, 10), copy_weight("b", 10, 10))
    (tmp_path / "data").write_bytes(b"x" * 100_000)

    write_part(plan, Store(a=random(10, 10), b=random(10, 10)), tmp_path / "data")

    content = (tmp_path / "data").read_bytes()
    assert len(content) == plan.data_bytes
    assert set(content[400:4096]) == {0}


def test_finished_weights_are_neither_read_nor_written_again(tmp_path: Path) -> None:
    store = Store(a=random(50, 64), b=random(50, 64))
    plan = plan_of(copy_weight("a", 50, 64), copy_weight("b", 50, 64))
    path = tmp_path / "data"
    path.write_bytes(b"\1" * plan.data_bytes)

    write_part(plan, store, path, finished={"a"})

    assert {name for name, _, _ in store.reads} == {"b"}
    assert set(path.read_bytes()[: 50 * 64 * 4]) == {1}
    assert np.array_equal(read(path, plan.weights[1].pieces[0]), store.tensors["b"])


def test_weights_are_recorded_once_each_after_their_bytes_are_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SYNC_BYTES", 20_000)
    names = [f"w{index}" for index in range(12)]
    store = Store(**{name: random(40, 64) for name in names})
    plan = plan_of(*(copy_weight(name, 40, 64) for name in names))
    path = tmp_path / "data"
    recorded: list[str] = []

    def record(batch: list[str]) -> None:
        for name in batch:
            weight = plan.weights[names.index(name)]
            assert np.array_equal(read(path, weight.pieces[0]), store.tensors[name])
        recorded.extend(batch)

    write_part(plan, store, path, record=record)

    assert recorded == names
    assert store.released == names


def test_progress_adds_up_to_the_bytes_of_the_weights(tmp_path: Path) -> None:
    plan = plan_of(copy_weight("a", 333, 7), quantized_weight("b", 123, 45, BlockFormat(4, 32, False)))
    written: list[int] = []

    write_part(
        plan,
        Store(a=random(333, 7), b=random(123, 45)),
        tmp_path / "data",
        advance=lambda weight, count: written.append(count),
    )

    assert sum(written) == plan.weight_bytes
    assert len(written) > 2


@pytest.mark.parametrize("action", ["copy", "transpose"])
def test_a_value_beyond_float16_is_refused_with_its_place(action: str, tmp_path: Path) -> None:
    values = random(300, 64)
    values[217, 5] = 70_000
    plan = plan_of(copy_weight("model.w", 300, 64, dtype="float16", action=action))

    with pytest.raises(
        ExportError, match=r"model\.w holds 70000 at row 217, column 5, .*float32 activations"
    ):
        write_part(plan, Store(**{"model.w": values}), tmp_path / "data")


def test_the_largest_values_that_round_into_float16_are_kept(tmp_path: Path) -> None:
    values = np.array([[65504.0, -65504.0, 65519.99]], np.float32)
    plan = plan_of(copy_weight("w", 1, 3, dtype="float16"))

    write_part(plan, Store(w=values), tmp_path / "data")

    assert np.fromfile(tmp_path / "data", np.float16).tolist() == [65504.0, -65504.0, 65504.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_value_that_is_no_number_is_refused(bad: float, dtype: str, tmp_path: Path) -> None:
    values = random(20, 20)
    values[3, 4] = bad
    plan = plan_of(copy_weight("w", 20, 20, dtype=dtype))

    with pytest.raises(ExportError, match=f"w holds {bad} at row 3, column 4, which is no weight"):
        write_part(plan, Store(w=values), tmp_path / "data")


def test_a_weight_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    values = random(300, 64)
    values[200, 1] = np.nan
    plan = plan_of(quantized_weight("model.w", 300, 64, BlockFormat(4, 32, False)))

    with pytest.raises(QuantError, match=r"model\.w.* is nan"):
        write_part(plan, Store(**{"model.w": values}), tmp_path / "data")


def test_a_failure_records_what_was_finished_before_it(tmp_path: Path) -> None:
    values = random(40, 64)
    broken = values.copy()
    broken[-1, -1] = np.inf
    plan = plan_of(copy_weight("a", 40, 64), copy_weight("b", 40, 64), copy_weight("c", 40, 64))
    recorded: list[str] = []

    with pytest.raises(ExportError, match="b holds inf"):
        write_part(
            plan, Store(a=values, b=broken, c=values), tmp_path / "data", record=recorded.extend, workers=1
        )

    assert recorded == ["a"]


def test_a_full_disk_surfaces_as_an_os_error_and_closes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match="No space left"):
        write_part(plan_of(copy_weight("a", 40, 64)), Store(a=random(40, 64)), tmp_path / "data")

    assert len(os.listdir("/proc/self/fd")) == before


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random(37, 41)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, view, offset: pwrite(handle, view[:13], offset))
    plan = plan_of(copy_weight("w", 37, 41))

    write_part(plan, Store(w=values), tmp_path / "data")

    assert np.array_equal(np.fromfile(tmp_path / "data", np.float32).reshape(37, 41), values)


@pytest.mark.parametrize("action", ["transpose", "quantize"])
def test_a_plan_that_expects_another_shape_is_refused(action: str) -> None:
    weight = (
        copy_weight("w", 8, 64, action="transpose")
        if action == "transpose"
        else quantized_weight("w", 8, 64, BlockFormat(4, 32, True))
    )

    with pytest.raises(ExportError, match="w is 64 x 8 in the checkpoint, the graph needs 8 x 64"):
        source_matrix(weight, (64, 8))


def test_chunks_stay_within_the_budget_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight = quantized_weight("w", 151_552, 4096, BlockFormat(8, 128, True))

    held = {n: n * 4 * 4096 * chunk_rows(weight, 151_552, 4096, n) for n in (1, 2, 8, 32)}

    assert max(held.values()) <= writer.BUDGET_BYTES
    plan = plan_of(weight)
    table = Store(w=np.broadcast_to(np.float32(0), (151_552, 4096)))  # type: ignore[arg-type]
    assert in_flight_bytes(plan, table, 8) <= 2 * writer.BUDGET_BYTES


def test_a_row_wider_than_the_budget_is_a_chunk_of_its_own() -> None:
    weight = copy_weight("w", 3, 10_000_000)

    assert chunk_rows(weight, 3, 10_000_000, 64) == 1


# --- slices


def slice_of(weight: Weight, whole: str, first: int, total: int) -> Weight:
    """A weight as rows of a larger tensor."""
    return replace(weight, source=whole, part=RowSlice(whole, first, total))


@pytest.mark.parametrize("kind", ["transpose", "blocks", "channel"])
def test_slices_hold_the_rows_of_their_tensor(kind: str, tmp_path: Path) -> None:
    values, sizes = random(157, 96), (64, 64, 29)
    make: dict[str, Callable[[str, int], Weight]] = {
        "transpose": lambda name, rows: copy_weight(name, rows, 96, action="transpose"),
        "blocks": lambda name, rows: quantized_weight(name, rows, 96, BlockFormat(4, 32, False)),
        "channel": lambda name, rows: channel_weight(name, rows, 96),
    }
    starts = [sum(sizes[:number]) for number in range(3)]
    slices = [
        slice_of(make[kind](f"w.{number}", rows), "w", starts[number], 157)
        for number, rows in enumerate(sizes)
    ]
    store = Store(
        w=values, **{f"w{number}": values[start : start + 64] for number, start in enumerate(starts)}
    )
    plan = plan_of(*slices)
    alone = plan_of(*(make[kind](f"w{number}", rows) for number, rows in enumerate(sizes)))

    write_part(plan, store, tmp_path / "cut", workers=3)
    write_part(alone, store, tmp_path / "alone", workers=3)

    assert (tmp_path / "cut").read_bytes() == (tmp_path / "alone").read_bytes()
    assert store.released.count("w") == 3


def test_a_slice_of_a_permuted_tensor_is_cut_after_the_permutation(tmp_path: Path) -> None:
    values = random(4, 30, 5)
    piece = Piece("w.1", "float32", (20, 10))
    weight = Weight("w", 10, 20, "transpose", (piece,), permute=(1, 2, 0), part=RowSlice("w", 20, 30))
    plan = plan_of(weight)

    write_part(plan, Store(w=values), tmp_path / "data")

    expected = values.transpose(1, 2, 0).reshape(30, 20)[20:].T
    assert np.array_equal(read(tmp_path / "data", plan.weights[0].pieces[0]), expected)


def test_a_slice_wants_its_whole_tensor_in_the_checkpoint() -> None:
    weight = slice_of(copy_weight("w.0", 8, 64, action="transpose"), "w", 8, 24)

    assert source_matrix(weight, (24, 64)) == (8, 64)
    for shape in ((16, 64), (8, 64), (25, 64), (24, 63)):
        with pytest.raises(ExportError, match=r"the graph needs 24 x 64"):
            source_matrix(weight, shape)


def test_what_is_wrong_in_a_slice_is_told_by_the_row_of_the_tensor(tmp_path: Path) -> None:
    values = random(300, 64)
    values[217, 5] = np.inf
    floats = slice_of(copy_weight("w.1", 100, 64, action="transpose"), "w", 200, 300)
    blocks = slice_of(quantized_weight("w.1", 100, 64, BlockFormat(4, 32, False)), "w", 200, 300)

    with pytest.raises(ExportError, match="w holds inf at row 217, column 5"):
        write_part(plan_of(floats), Store(w=values), tmp_path / "data")
    with pytest.raises(QuantError, match="w, counted from row 216 of rows 216 to 232: "):
        write_part(plan_of(blocks), Store(w=values), tmp_path / "data")


class Inputs:
    """Gives the Gram matrix of an input away, once, as a calibration does."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def take(self, name: str) -> Gram:
        assert name not in self.taken
        self.taken.append(name)
        gram = Gram(64)
        gram.add(random(200, 64))
        return gram


@pytest.mark.parametrize("finished", [set(), {"w.0_data"}])
def test_slices_that_are_refined_by_gptq_share_the_sums_of_their_matrix(
    finished: set[str], tmp_path: Path
) -> None:
    fmt, values = BlockFormat(4, 32, False), random(200, 64)
    weights = [
        replace(
            slice_of(quantized_weight(f"w.{number}", 100, 64, fmt), "w", 100 * number, 200), refine="gptq"
        )
        for number in range(2)
    ]
    other = replace(quantized_weight("v", 100, 64, fmt), refine="gptq")
    whole = replace(quantized_weight("w", 200, 64, fmt), refine="gptq")
    plan, single, inputs = plan_of(*weights, other), plan_of(whole), Inputs()
    store = Store(w=values, v=random(100, 64))

    write_part(plan, store, tmp_path / "cut", quantizer=RecipeQuantizer(inputs), finished=finished)
    write_part(single, store, tmp_path / "whole", quantizer=RecipeQuantizer(Inputs()))

    assert inputs.taken == ["w", "v"]
    for piece in range(3):
        expected = read(tmp_path / "whole", single.weights[0].pieces[piece])
        for number in range(len(finished), 2):
            found = read(tmp_path / "cut", plan.weights[number].pieces[piece])
            assert np.array_equal(found, expected[100 * number : 100 * number + 100])


# --- refinements


class Quantizer:
    """Rounds, and notes what it was asked to be ready for and the heights of the chunks."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.heights: set[int] = set()

    def prepare(self, weight: Weight) -> Callable[[NDArray[np.float32]], Quantized]:
        self.prepared.append(weight.name)
        fmt = weight.quant
        assert fmt is not None

        def round_rows(rows: NDArray[np.float32]) -> Quantized:
            self.heights.add(len(rows))
            return quantize_rows(rows, fmt)

        return round_rows


def test_a_quantizer_is_made_ready_once_per_weight_in_the_order_of_the_file(tmp_path: Path) -> None:
    fmt = BlockFormat(4, 32, False)
    plan = plan_of(
        quantized_weight("b", 90, 64, fmt),
        copy_weight("c", 9, 9),
        quantized_weight("a", 90, 64, fmt),
        quantized_weight("d", 90, 64, fmt),
    )
    store = Store(**{name: random(90, 64) for name in "abd"}, c=random(9, 9))
    quantizer = Quantizer()

    write_part(plan, store, tmp_path / "data", quantizer=quantizer, finished={"d_data"}, workers=3)

    assert quantizer.prepared == ["b", "a"]
    assert max(quantizer.heights) < 90


@pytest.mark.parametrize("workers", [1, 7])
def test_chunks_of_a_weight_refined_by_gptq_are_tiles_whatever_the_number_of_threads(
    workers: int, tmp_path: Path
) -> None:
    weight = replace(quantized_weight("w", 1100, 64, BlockFormat(4, 32, False)), refine="gptq")
    quantizer = Quantizer()

    write_part(
        plan_of(weight), Store(w=random(1100, 64)), tmp_path / "data", quantizer=quantizer, workers=workers
    )

    assert quantizer.heights == {TILE_ROWS, 1100 % TILE_ROWS}


def test_gptq_without_a_calibration_is_refused(tmp_path: Path) -> None:
    weight = replace(quantized_weight("w", 60, 64, BlockFormat(4, 32, False)), refine="gptq")

    with pytest.raises(ExportError, match="w is to be refined by gptq, but there is no calibration set"):
        write_part(plan_of(weight), Store(w=random(60, 64)), tmp_path / "data")


def test_searched_weights_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    fmt, values = BlockFormat(3, 32, False), random(133, 131)
    plan = plan_of(replace(quantized_weight("w", 133, 131, fmt), refine="search"))

    write_part(plan, Store(w=values), tmp_path / "data", workers=3)

    whole = search_rows(values, fmt)
    assert np.array_equal(read(tmp_path / "data", plan.weights[0].pieces[0]), whole.data)
    assert np.array_equal(read(tmp_path / "data", plan.weights[0].pieces[1]), whole.scales)


def test_a_weight_to_be_quantized_without_a_format_is_refused(tmp_path: Path) -> None:
    weight = replace(quantized_weight("w", 60, 64, BlockFormat(4, 32, False)), quant=None)

    with pytest.raises(ExportError, match="the plan for w says quantize, but names no format"):
        write_part(plan_of(weight), Store(w=random(60, 64)), tmp_path / "data")
