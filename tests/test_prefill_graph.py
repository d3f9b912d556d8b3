"""The prefill graph: the decoder's layers once more, which fill the same cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from test_graphs import decoder_feeds, session

from autoglm_edge.errors import QuantError
from autoglm_edge.export.calibrate.preparation import prepare
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.pipeline import estimate, export
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.quantize import PRESETS, BlockFormat, ChannelFormat, Recipe, Rule
from autoglm_edge.runtime.bundle import Bundle

GEOMETRIES = ("tiny", "odd-head48", "odd-axes")
LAYERS = "model.language_model.layers.*"


def run(graph: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a graph makes of the cache."""
    names = [item.name for item in graph.get_outputs() if item.name.startswith("present.")]
    return dict(zip(names, graph.run(names, feeds), strict=True))


def fed(decoder: ort.InferenceSession, tokens: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    return decoder_feeds(decoder, np.random.default_rng(seed), tokens)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_fills_the_cache_as_a_decoder_in_the_same_form_does(
    geometry: str, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    """The int8 decoder has the same integers and the same products, so nothing is left but equal bits."""
    checkpoint = checkpoint_of(geometry)
    decoder = session(bundle_of(checkpoint, "int8") / "decoder.onnx")
    prefill = session(bundle_of(checkpoint, "int4", prefill="int8") / "prefill.onnx")

    for lengths in ([13], [5, 2, 4]):
        feeds = fed(decoder, lengths)
        want, found = run(decoder, feeds), run(prefill, feeds)

        assert list(found) == list(want)
        for name, array in want.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_in_floats_it_is_the_float_decoder_without_head_and_last_mlp(
    geometry: str, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    """Values of the last layer alone are rounded here: everything else lies in the decoder's file."""
    checkpoint = checkpoint_of(geometry)
    count = Checkpoint.open(checkpoint).config.text.layers
    last = f"model.language_model.layers.{count - 1}.self_attn.v_proj.weight"
    recipe = Recipe("one", "float32", 4, (Rule(last, BlockFormat(8, 32, True)),), prefill="int8")
    folder = bundle_of(checkpoint, recipe=recipe)
    decoder, prefill = session(folder / "decoder.onnx"), session(folder / "prefill.onnx")
    feeds = fed(decoder, [11])

    want, found = run(decoder, feeds), run(prefill, feeds)

    rounded = f"present.{count - 1}.value"
    for name in want.keys() - {rounded}:
        np.testing.assert_allclose(found[name], want[name], atol=1e-5, err_msg=name)
    difference = np.linalg.norm(found[rounded] - want[rounded]) / np.linalg.norm(want[rounded])
    assert 0 < difference < 0.02  # two roundings to 8 bits
    rows, columns = Checkpoint.open(checkpoint).tensors.shape(last)
    assert Bundle.open(folder).manifest.parts["prefill"].weight_bytes == ChannelFormat().size_bytes(
        rows, columns
    )


def test_chunks_fill_the_cache_as_one_run_does(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    folder = bundle_of(checkpoint_of("tiny"), "int4", prefill="int8")
    prefill = session(folder / "prefill.onnx")
    feeds = fed(session(folder / "decoder.onnx"), [20])
    whole = run(prefill, feeds)

    first = {**feeds, "inputs_embeds": feeds["inputs_embeds"][:, :12]}
    first |= {
        "attention_mask": feeds["attention_mask"][:, :12],
        "position_ids": feeds["position_ids"][..., :12],
    }
    grown = run(prefill, first)
    rest = {
        "inputs_embeds": feeds["inputs_embeds"][:, 12:],
        "attention_mask": feeds["attention_mask"],
        "position_ids": feeds["position_ids"][..., 12:],
    }
    rest |= {name.replace("present", "past_key_values"): array for name, array in grown.items()}
    chunked = run(prefill, rest)

    for name, array in whole.items():
        # A value that falls between two integers may go either way when attention adds up in another order.
        assert np.abs(chunked[name] - array).max() < 0.02 * np.abs(array).max(), name


def test_it_stays_near_the_cache_of_the_float_model(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    checkpoint = checkpoint_of("tiny")
    exact = session(bundle_of(checkpoint, "fp32") / "decoder.onnx")
    folder = bundle_of(checkpoint, "int4", prefill="int8")
    feeds = fed(exact, [40])
    want = run(exact, feeds)

    def off(graph: str) -> float:
        found = run(session(folder / graph), feeds)
        return max(
            float(np.linalg.norm(found[name] - want[name]) / np.linalg.norm(want[name])) for name in want
        )

    assert off("prefill.onnx") < 0.05
    assert off("prefill.onnx") < off("decoder.onnx") / 3  # its weights have 4 bits


def test_its_inputs_are_the_decoders_and_it_has_no_scores(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    folder = bundle_of(checkpoint_of("tiny"), "int4", prefill="int8")

    decoder, prefill = (
        onnx.load(folder / f"{name}.onnx", load_external_data=False).graph for name in ("decoder", "prefill")
    )

    described = [(item.name, item.type.SerializeToString()) for item in prefill.input]
    assert described == [
        (item.name, item.type.SerializeToString())
        for item in decoder.input
        if item.name != "num_logits_to_keep"
    ]
    assert [item.name for item in prefill.output] == [
        item.name for item in decoder.output if item.name != "logits"
    ]


def test_the_last_layer_has_what_keys_and_values_need_and_nothing_is_in_blocks(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    graph = onnx.load(
        bundle_of(checkpoint_of("tiny"), "int4", prefill="int8") / "prefill.onnx", load_external_data=False
    ).graph

    operators = Counter(node.op_type for node in graph.node)
    held = {item.name for item in graph.initializer if "layers.1." in item.name}

    assert operators["MatMulNBits"] == 0
    assert operators["MatMulIntegerToFloat"] == 7 + 2  # gate and up are two
    stem = "model.language_model.layers.1."
    assert held == {
        f"{stem}input_layernorm.weight",
        *(
            f"{stem}self_attn.{letter}_proj.{what}"
            for letter in "kv"
            for what in ("bias", "weight_data", "weight_scales")
        ),
    }


def test_norms_and_biases_are_read_from_the_decoders_file_and_stored_once(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    folder = bundle_of(checkpoint_of("tiny"), "int4", prefill="int8")
    places: dict[str, dict[str, tuple[str, str]]] = {}
    for name in ("decoder", "prefill"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        outside = [item for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
        entries = {item.name: {entry.key: entry.value for entry in item.external_data} for item in outside}
        places[name] = {key: (entry["location"], entry["offset"]) for key, entry in entries.items()}

    shared = {name for name, (file, _) in places["prefill"].items() if file == "decoder.onnx.data"}

    assert shared and all(name.endswith((".bias", "norm.weight")) for name in shared)
    assert all(places["prefill"][name] == places["decoder"][name] for name in shared)
    own = {name for name in places["prefill"] if name not in shared}
    assert all(name.endswith(("weight_data", "weight_scales")) for name in own)
    assert {places["prefill"][name][0] for name in own} == {"prefill.onnx.data"}


def test_what_the_decoder_has_in_this_form_or_in_floats_is_not_stored_again(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    rules = (
        Rule(f"{LAYERS}.mlp.gate_up_proj.weight", ChannelFormat(8, 2)),
        Rule(f"{LAYERS}.self_attn.q_proj.weight", None),
    )
    recipe = replace(PRESETS["int4"], name="mine", rules=(*rules, *PRESETS["int4"].rules), prefill="int8")

    job = prepare(Checkpoint.open(checkpoint_of("tiny")), ExportOptions(recipe))

    prefill = job.plans[-1]
    borrowed = {weight.matrix.partition("layers.0.")[2] for weight in prefill.borrowed}
    own = {weight.matrix.partition("layers.0.")[2] for weight in prefill.weights}
    assert {"mlp.gate_up_proj.weight", "self_attn.q_proj.weight", "self_attn.q_proj.bias"} <= borrowed
    assert {"self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight"} <= own
    assert not own & borrowed - {""}
    export(checkpoint_of("tiny"), tmp_path / "out", recipe=recipe).verify()
    session(tmp_path / "out" / "prefill.onnx")


def test_the_bundle_lists_it_and_an_estimate_knows_it(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    guess = estimate(checkpoint_of("tiny"), tmp_path / "out", precision="int4", prefill="int8")
    plain = estimate(checkpoint_of("tiny"), tmp_path / "out", precision="int4")

    bundle = export(checkpoint_of("tiny"), tmp_path / "out", precision="int4", prefill="int8")

    assert guess.total_bytes == sum(path.stat().st_size for path in bundle.path.iterdir())
    assert [part.name for part in guess.parts] == ["decoder", "embedding", "vision", "prefill"]
    assert guess.weights_copied_bytes == plain.weights_copied_bytes  # it is opened unpacked
    assert guess.weights_mapped_bytes > plain.weights_mapped_bytes
    part = bundle.manifest.parts["prefill"]
    assert (part.graph, part.data) == ("prefill.onnx", "prefill.onnx.data")
    assert {name: part.integer for name, part in bundle.manifest.parts.items()} == {
        "decoder": False,
        "embedding": False,
        "vision": True,
        "prefill": True,
        "layer": True,
    }
    assert bundle.manifest.recipe["prefill"] == "int8"
    assert "`prefill.onnx`" in (bundle.path / "README.md").read_text(encoding="utf-8")
    bundle.verify()


def test_the_decoder_is_the_same_with_and_without_it(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    plain, second = (
        bundle_of(checkpoint_of("tiny"), "int4", **options) for options in ({}, {"prefill": "int8"})
    )

    for name in ("decoder.onnx", "decoder.onnx.data", "vision.onnx.data", "embedding.onnx.data"):
        assert (plain / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    "options", [{"precision": "int8"}, {"precision": "fp32"}, {"activations": "float16"}]
)
def test_where_it_means_nothing_it_is_refused_before_anything_is_written(
    options: dict[str, Any], checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(QuantError, match="prefill"):
        export(checkpoint_of("tiny"), tmp_path / "out", prefill="int8", **options)

    assert list(tmp_path.iterdir()) == []
