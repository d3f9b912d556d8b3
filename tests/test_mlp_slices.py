"""The MLP on integer units: gate and up in slices, the same bits, one matrix to recipes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoint_shapes import Shape
from make_checkpoint import make_checkpoint
from numpy.typing import NDArray

from autoglm_edge.export.graphs import decoder
from autoglm_edge.export.pipeline import export
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.layerwise.index import read_index
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions

WIDTH = 200
"""Of gate and of up: with at most 64 rows a slice, four of each: 64, 64, 64 and 8."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mlp") / "odd", Shape(intermediate=WIDTH), dtype="float32")


def both(checkpoint: Path, folder: Path, patch: pytest.MonkeyPatch, *precision: str) -> tuple[Bundle, Bundle]:
    """The same export with gate and up in one slice each, and in four."""
    name, prefill = precision
    whole = export(checkpoint, folder / "whole", precision=name, prefill=prefill)  # type: ignore[arg-type]
    patch.setattr(decoder, "SLICE_ROWS", 64)
    sliced = export(checkpoint, folder / "sliced", precision=name, prefill=prefill)  # type: ignore[arg-type]
    return whole, sliced


def products(bundle: Bundle, part: str) -> int:
    graph = onnx.load(bundle.file(f"{part}.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)["MatMulIntegerToFloat"]


def filled(bundle: Bundle, prefill: str) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
    """Cache and scores after a prompt."""
    model = Model(bundle, SessionOptions(threads=1, prefill=prefill))  # type: ignore[arg-type]
    ids, positions = np.arange(5, 55), np.tile(np.arange(50), (3, 1))
    cache = model.new_cache(51)
    model.prefill(model.embed(ids), positions, cache)
    scores = model.forward(model.embed(np.array([7])), np.full((3, 1), 50), cache)
    return cache.read(0, 51), scores


@pytest.mark.parametrize(
    ("precision", "prefill", "part", "by"),
    [
        ("int4", "none", "layer", "layers"),
        ("int4", "int8", "prefill", "integer"),
        ("int8", "none", "decoder", "decoder"),
    ],
)
def test_slices_give_the_same_bits(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    prefill: str,
    part: str,
    by: str,
) -> None:
    whole, sliced = both(checkpoint, tmp_path, monkeypatch, precision, prefill)

    assert products(sliced, part) > products(whole, part)
    for one, other in zip(filled(whole, by), filled(sliced, by), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_index_cuts_slices_out_of_the_matrix_as_it_is_stored(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sliced = both(checkpoint, tmp_path, monkeypatch, "int4", "none")

    assert whole.file("decoder.onnx.data").read_bytes() == sliced.file("decoder.onnx.data").read_bytes()
    data = np.memmap(sliced.file("decoder.onnx.data"), np.uint8, "r")
    layers = sliced.manifest.geometry.layers
    for one, other in zip(
        read_index(whole.file("layers.json"), layers).layers,
        read_index(sliced.file("layers.json"), layers).layers,
        strict=True,
    ):
        stored = [matrix.read(data) for matrix in one.matrices if "gate_up" in matrix.weight]
        cut = [matrix.read(data) for matrix in other.matrices if "gate_up" in matrix.weight]
        assert [blocks.rows for blocks in cut] == [64, 64, 64, 8] * 2
        for name in ("data", "scales", "zero_points"):
            parts = ([getattr(blocks, name) for blocks in found] for found in (stored, cut))
            np.testing.assert_array_equal(*(np.concatenate(found) for found in parts))


def test_in_blocks_gate_and_up_stay_one_product(checkpoint: Path, tmp_path: Path) -> None:
    graph = onnx.load(
        export(checkpoint, tmp_path / "out").file("decoder.onnx"), load_external_data=False
    ).graph

    names = {item.name for item in graph.initializer if "gate_up" in item.name}
    assert "model.language_model.layers.0.mlp.gate_up_proj.weight_data" in names
