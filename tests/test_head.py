"""The head in slices: cut where it should be, the same scores to the bit, one matrix to everybody else."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibration_fixtures import write_usual_set
from checkpoint_shapes import Shape
from hypothesis import given
from hypothesis import strategies as st
from make_checkpoint import make_checkpoint
from numpy.typing import NDArray
from PIL import Image

from autoglm_edge.errors import ExportError
from autoglm_edge.export import forecast
from autoglm_edge.export.calibrate.calibration_cost import calibration_bytes, calibration_operations
from autoglm_edge.export.calibrate.calibration_set import CalibrationSet, Sample
from autoglm_edge.export.graphs import head
from autoglm_edge.export.graphs.head import SLICE_ROWS
from autoglm_edge.export.graphs.plan import (
    ITEM_BYTES,
    SLICE_STEP,
    PartPlan,
    Piece,
    RowSlice,
    Weight,
    by_matrix,
    row_slices,
)
from autoglm_edge.export.graphs.text import plan_decoder
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.pipeline import estimate, export, prepare
from autoglm_edge.export.progress import ProgressEvent
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.export.source.shapes import EMBEDDING, HEAD
from autoglm_edge.quantize.channels import ChannelFormat
from autoglm_edge.quantize.recipe import INT8, PRESETS, Recipe
from autoglm_edge.quantize.rule import Refinement, Rule
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions

ROWS = 192
"""Most rows of a slice here: the head of 509 rows is cut into 192, 192 and 125."""

CUT = [192, 192, 125]

RECIPES: dict[str, Recipe] = {
    **{name: PRESETS[name] for name in ("fp32", "fp16", "int8", "int8-blocks", "int4", "int4-all")},
    "symmetric": PRESETS["int4-all"].with_(symmetric=True),
    "groups": Recipe("groups", "float32", 4, (Rule(HEAD, ChannelFormat(8, 2)),)),
    "exact": Recipe("exact", "float32", 0, (Rule(HEAD, INT8),)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary that no multiple of anything divides."""
    return make_checkpoint(tmp_path_factory.mktemp("head") / "odd", Shape(vocab=509), dtype="float32")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("head") / "tied", Shape(vocab=509, tied_head=True))


@pytest.fixture
def prompts(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    return write_usual_set(tmp_path / "set.jsonl", pictures)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE_ROWS", ROWS)


def both(checkpoint: Path, folder: Path, patch: pytest.MonkeyPatch, **options: Any) -> tuple[Bundle, Bundle]:
    """The same export with a head in one piece and in slices."""
    whole = export(checkpoint, folder / "whole", **options)
    patch.setattr(head, "SLICE_ROWS", ROWS)
    return whole, export(checkpoint, folder / "sliced", **options)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def graph_of(bundle: Bundle, part: str = "decoder") -> onnx.GraphProto:
    return onnx.load(bundle.file(f"{part}.onnx"), load_external_data=False).graph


def of_head(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers of the head."""
    return {item.name: item for item in graph.initializer if item.name.startswith("lm_head")}


def stored(bundle: Bundle, item: onnx.TensorProto) -> NDArray[Any]:
    """Values of an initializer outside."""
    place = {entry.key: entry.value for entry in item.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(item.data_type)
    count = int(place["length"]) // dtype.itemsize
    found = np.fromfile(bundle.file(place["location"]), dtype, count, offset=int(place["offset"]))
    return found.reshape(item.dims)


def logits(graph: Path, tokens: int, keep: int, threads: int = 1) -> NDArray[np.float32]:
    """Scores for random hidden states, with an empty cache."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    session = ort.InferenceSession(graph, settings)
    inputs = {item.name: item for item in session.get_inputs()}
    half = "float16" in inputs["inputs_embeds"].type
    dtype = np.float16 if half else np.float32
    width = inputs["inputs_embeds"].shape[2]
    feeds: dict[str, NDArray[Any]] = {
        "inputs_embeds": np.random.default_rng(tokens).standard_normal((1, tokens, width)).astype(dtype),
        "attention_mask": np.ones((1, tokens), np.int64),
        "position_ids": np.broadcast_to(np.arange(tokens), (3, 1, tokens)).copy(),
        "num_logits_to_keep": np.array(keep, np.int64),
    }
    for name, item in inputs.items():
        if name.startswith("past_key_values"):
            feeds[name] = np.zeros((1, item.shape[1], 0, item.shape[3]), dtype)
    found: NDArray[np.float32] = session.run(["logits"], feeds)[0]
    return found


# --- where it is cut


@given(rows=st.integers(1, 300_000), most=st.integers(1, 400).map(lambda count: count * SLICE_STEP))
def test_slices_cover_all_rows_in_order_and_are_as_few_and_as_equal_as_can_be(rows: int, most: int) -> None:
    slices = row_slices(rows, most)
    sizes = [len(own) for own in slices]

    assert [row for own in slices for row in (own.start, own.stop)] == sorted(
        [0, rows, *(own.start for own in slices[1:]), *(own.stop for own in slices[:-1])]
    )
    assert len(slices) == -(-rows // most)
    assert min(sizes) > 0
    assert max(sizes) <= most
    assert all(size % SLICE_STEP == 0 for size in sizes[:-1])
    assert max(sizes[:-1], default=0) - min(sizes[:-1], default=0) <= SLICE_STEP


def test_the_head_of_the_9b_is_ten_slices_of_whole_steps() -> None:
    sizes = [len(own) for own in row_slices(151_552, SLICE_ROWS)]

    assert len(sizes) == 10
    assert all(size % SLICE_STEP == 0 for size in sizes)
    assert max(sizes) - min(sizes) == SLICE_STEP
    assert max(sizes) <= SLICE_ROWS


def test_slices_that_are_no_multiple_of_a_step_are_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="slices of 100 rows"):
        row_slices(1000, 100)


@pytest.mark.parametrize(("first", "total"), [(-1, 5), (5, 5), (6, 5), (0, 0)])
def test_a_slice_that_begins_outside_of_its_matrix_is_refused(first: int, total: int) -> None:
    with pytest.raises(ExportError, match=f"begins at row {first} of {total}"):
        RowSlice("w", first, total)


@pytest.mark.parametrize(("rows", "action"), [(6, "transpose"), (5, "copy")])
def test_a_weight_that_cannot_be_a_slice_is_refused(rows: int, action: Any) -> None:
    with pytest.raises(ExportError, match=f"cuts rows 5 to {5 + rows} out of 10"):
        Weight("w", rows, 4, action, (Piece("w", "float32", (4, rows)),), part=RowSlice("w", 5, 10))


def test_a_small_head_is_one_product_with_the_checkpoint_s_name(checkpoint: Path, tmp_path: Path) -> None:
    graph = graph_of(export(checkpoint, tmp_path / "out"))

    assert list(of_head(graph)) == ["lm_head.weight_data", "lm_head.weight_scales"]
    assert "lm_head" not in "".join(node.name for node in graph.node if node.op_type == "Concat")


# --- what is computed and stored


@pytest.mark.parametrize("name", RECIPES)
def test_scores_are_those_of_the_whole_head_to_the_bit(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sliced = both(checkpoint, tmp_path, monkeypatch, recipe=RECIPES[name])

    onnx.checker.check_model(sliced.file("decoder.onnx"))
    for tokens, keep in ((1, 1), (9, 1), (9, 0), (40, 0)):
        expected = logits(whole.file("decoder.onnx"), tokens, keep)
        for threads in (1, 2):
            found = logits(sliced.file("decoder.onnx"), tokens, keep, threads)
            assert found.shape == expected.shape == (1, keep or tokens, 509)
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_slices_together_are_the_whole_head_to_the_byte(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sliced = both(checkpoint, tmp_path, monkeypatch, recipe=RECIPES[name])
    pieces, parts = of_head(graph_of(whole)), of_head(graph_of(sliced))

    assert len(parts) == 3 * len(pieces)
    for label, item in pieces.items():
        own = [parts[label.replace("lm_head.", f"lm_head.{number}.")] for number in range(3)]
        expected = stored(whole, item)
        axis = expected.shape.index(509)
        assert [part.dims[axis] for part in own] == CUT
        joined = np.concatenate([stored(sliced, part) for part in own], axis)
        assert np.array_equal(joined.view(np.uint8), expected.view(np.uint8))
    assert sliced.manifest.parts["decoder"].weight_bytes == whole.manifest.parts["decoder"].weight_bytes
    others = {part for part in whole.manifest.parts if part not in ("decoder", "layer")}
    for part in others:
        assert sliced.file(f"{part}.onnx.data").read_bytes() == whole.file(f"{part}.onnx.data").read_bytes()


def test_a_tied_head_is_cut_out_of_the_embedding(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sliced = both(tied, tmp_path, monkeypatch, precision="int4")

    weights = by_matrix(prepared_plan(tied, PRESETS["int4"]).weights)[HEAD]
    assert [(weight.source, weight.first_row, weight.rows) for weight in weights] == [
        (EMBEDDING, 0, 192),
        (EMBEDDING, 192, 192),
        (EMBEDDING, 384, 125),
    ]
    expected, found = (logits(bundle.file("decoder.onnx"), 9, 0) for bundle in (whole, sliced))
    assert np.array_equal(found, expected)


def test_onnxruntime_keeps_the_products_apart(checkpoint: Path, tmp_path: Path, cut: None) -> None:
    for name, product in (
        ("fp32", "MatMul"),
        ("int4-all", "MatMulNBits"),
        ("int8", "MatMulIntegerToFloat"),
    ):
        bundle = export(checkpoint, tmp_path / name, precision=name)
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        ort.InferenceSession(bundle.file("decoder.onnx"), settings)
        optimized = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph

        for graph in (graph_of(bundle), optimized):
            (last,) = (node for node in graph.node if "logits" in node.output)
            assert last.op_type == "Concat"
            readers = [node.op_type for node in graph.node if set(node.input) & set(of_head(graph))]
            assert readers == [product] * 3


def test_the_bytes_of_the_input_are_made_once(checkpoint: Path, tmp_path: Path, cut: None) -> None:
    graph = graph_of(export(checkpoint, tmp_path / "out", precision="int8"))

    makers = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if set(node.input) & set(of_head(graph))]
    assert len({node.input[0] for node in products}) == 1
    assert makers[products[0].input[0]].op_type == "QuantizeLinear"


def test_prepared_weights_of_a_sliced_head_give_the_very_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOGLM_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(head, "SLICE_ROWS", 4096)
    checkpoint = make_checkpoint(tmp_path / "wide", Shape(vocab=17_000, hidden=256, mrope_section=(4, 6, 6)))
    bundle = export(checkpoint, tmp_path / "out", precision="int4")

    def scores(weights: Any) -> NDArray[np.float32]:
        model = Model(bundle, SessionOptions(threads=1, weights=weights))
        assert model.plan.weights == weights
        cache, ids = model.new_cache(40), np.arange(5, 45)
        found: NDArray[np.float32] = model.forward(
            model.embed(ids), np.arange(40)[None].repeat(3, 0), cache, keep=0
        )
        return found

    assert len(of_head(graph_of(bundle))) == 2 * 5
    assert np.array_equal(scores("prepared"), scores("packed"))


def test_onnxruntime_genai_takes_a_sliced_head(checkpoint: Path, tmp_path: Path, cut: None) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    bundle = export(checkpoint, tmp_path / "out", precision="int4")
    ids = np.arange(1, 21, dtype=np.int32)

    model = genai.Model(str(bundle.path))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=24, do_sample=False)
    generator = genai.Generator(model, params)
    inputs = genai.NamedTensors()
    inputs["input_ids"] = ids[None]
    generator.set_inputs(inputs)
    first = np.asarray(generator.get_output("logits")).reshape(-1)[-509:]

    ours = Model(bundle, SessionOptions(threads=1))
    expected = ours.forward(
        ours.embed(ids.astype(np.int64)), np.arange(20)[None].repeat(3, 0), ours.new_cache(24)
    )
    np.testing.assert_allclose(first, expected.reshape(-1), atol=1e-5)


# --- one matrix to everybody else


def prepared_plan(checkpoint: Path, recipe: Recipe) -> PartPlan:
    """The decoder's plan, as an export makes it."""
    return prepare(Checkpoint.open(checkpoint), ExportOptions(recipe)).plans[0]


def test_a_sliced_head_has_the_name_that_recipes_know(checkpoint: Path, cut: None) -> None:
    weights = by_matrix(prepared_plan(checkpoint, PRESETS["int4"]).weights)

    assert [weight.name for weight in weights[HEAD]] == [f"lm_head.{number}.weight" for number in range(3)]
    assert {weight.matrix for weight in weights[HEAD]} == {HEAD}
    assert {weight.matrix_rows for weight in weights[HEAD]} == {509}
    assert {weight.quant for weight in weights[HEAD]} == {PRESETS["int4"].format_for(HEAD)}
    others = [slices for name, slices in weights.items() if name != HEAD]
    assert all(len(slices) == 1 and slices[0].name == slices[0].matrix for slices in others)


@pytest.mark.parametrize("refine", ["search", "gptq"])
def test_refined_integers_are_those_of_the_whole_head(
    refine: Refinement, checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"precision": "int4-all", "refine": refine}
    if refine == "gptq":
        options["calibration"] = prompts
    whole, sliced = both(checkpoint, tmp_path, monkeypatch, **options)
    plain = export(checkpoint, tmp_path / "plain", precision="int4-all", refine="none")

    def integers(bundle: Bundle, *names: str) -> NDArray[Any]:
        items = of_head(graph_of(bundle))
        return np.concatenate([stored(bundle, items[name]) for name in names])

    slices = [f"lm_head.{number}.weight_data" for number in range(3)]
    assert np.array_equal(integers(sliced, *slices), integers(whole, "lm_head.weight_data"))
    assert not np.array_equal(integers(sliced, *slices), integers(plain, *slices))


class _StopError(Exception):
    """Stands for whatever ends an export in the middle."""


@pytest.mark.parametrize("refine", ["none", "gptq"])
@pytest.mark.parametrize("slices", [1, 2])
def test_an_export_interrupted_in_the_head_goes_on_to_the_same_bytes(
    slices: int,
    refine: Refinement,
    checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: None,
) -> None:
    monkeypatch.setattr("autoglm_edge.export.weights.writer.SYNC_BYTES", 1)  # journalled at once
    options: dict[str, Any] = {"precision": "int4-all", "refine": refine}
    if refine == "gptq":
        options["calibration"] = prompts
    export(checkpoint, tmp_path / "whole", **options)
    seen: list[str] = []

    def stop(event: ProgressEvent) -> None:
        seen.append(event.detail)
        if seen.count(HEAD) > slices:
            raise _StopError

    with pytest.raises(_StopError):
        export(checkpoint, tmp_path / "out", progress=stop, **options)
    journal = (tmp_path / "out.partial" / "journal").read_text()
    told: list[ProgressEvent] = []
    export(checkpoint, tmp_path / "out", resume=True, progress=told.append, **options)

    assert "lm_head.0.weight_data" in journal
    again = [event for event in told if event.detail == HEAD]
    assert len(again) < 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["fp32", "int8", "int4"])
def test_an_estimate_of_a_sliced_head_is_right_to_the_byte(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: None
) -> None:
    monkeypatch.setattr(forecast, "TRIAL_ROWS", 16)
    guess = estimate(checkpoint, tmp_path / "out", precision=name)

    bundle = export(checkpoint, tmp_path / "out", precision=name)

    assert guess.total_bytes == sum(path.stat().st_size for path in bundle.path.iterdir())
    assert guess.parts[0].data_bytes == bundle.file("decoder.onnx.data").stat().st_size
    assert guess.parts[0].weight_bytes == bundle.manifest.parts["decoder"].weight_bytes


def test_calibrating_a_sliced_head_costs_what_a_whole_one_does(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Checkpoint.open(checkpoint).config
    recipe = PRESETS["int4-all"].with_(refine="gptq")
    ids, positions = np.zeros(100, np.int64), np.zeros((3, 100), np.int64)
    samples = CalibrationSet((Sample(ids, positions, ()),), "0" * 64)

    def cost() -> tuple[float, int, int]:
        weights = [weight for weight in plan_decoder(config, recipe).weights if weight.refine == "gptq"]
        return (
            calibration_operations(config, samples, weights),
            calibration_bytes(config, samples, weights),
            len(weights),
        )

    whole = cost()
    monkeypatch.setattr(head, "SLICE_ROWS", ROWS)
    sliced = cost()

    assert sliced[:2] == whole[:2]
    assert sliced[2] == whole[2] + 2


def test_an_interrupted_export_of_another_cut_is_not_gone_on_with(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: ProgressEvent) -> None:
        if event.stage == "hash":
            raise _StopError

    with pytest.raises(_StopError):
        export(checkpoint, tmp_path / "out", progress=stop)
    monkeypatch.setattr(head, "SLICE_ROWS", ROWS)

    with pytest.raises(ExportError, match="interrupted export of another kind"):
        export(checkpoint, tmp_path / "out")


def test_a_head_that_recipes_keep_in_floats_is_cut_too(checkpoint: Path, tmp_path: Path, cut: None) -> None:
    recipe = replace(PRESETS["int4"], rules=(Rule(HEAD, None), *PRESETS["int4"].rules))
    graph = graph_of(export(checkpoint, tmp_path / "out", recipe=recipe))

    kinds = Counter(node.op_type for node in graph.node if set(node.input) & set(of_head(graph)))
    assert kinds == {"MatMul": 3}
    assert ITEM_BYTES["float32"] * 64 * 509 == sum(
        int(next(entry.value for entry in item.external_data if entry.key == "length"))
        for item in of_head(graph).values()
    )
