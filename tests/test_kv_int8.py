"""A KV cache in 8-bit integers: what is stored, what attention sees of it, and all that uses a cache."""

from __future__ import annotations

import inspect
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from calibration_fixtures import write_usual_set
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from test_warm_answers import agent_messages, greedy

from autoglm_edge.commands.info import info
from autoglm_edge.errors import BundleError, CheckpointError, ExportError
from autoglm_edge.export import pipeline
from autoglm_edge.export.calibrate import kv_scales
from autoglm_edge.export.calibrate.calibration_set import read_calibration
from autoglm_edge.export.calibrate.kv_scales import (
    LEAST,
    MARGIN,
    TOP,
    find_scales,
    pair_lengths,
    scale_names,
    scales_of,
)
from autoglm_edge.export.graphs.kv import FEW_TOKENS
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.pipeline import estimate, export
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.quantize.recipe import PRESETS
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.cache import KVCache
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.machine.integers import integers
from autoglm_edge.runtime.machine.prepared import prepare
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import SessionOptions

Bundles = Callable[..., Path]
Rows = NDArray[np.int8]
SHAPES = ("tiny", "odd-mqa", "odd-head48", "odd-axes")
DECODER = SessionOptions(threads=1, prefill="decoder")
TOKENS = 40


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> Path:
    return write_usual_set(tmp_path_factory.mktemp("set") / "set.jsonl", pictures)


@pytest.fixture(scope="module")
def int8_of(checkpoint_of: Bundles, bundle_of: Bundles, prompts: Path) -> Bundles:
    """A bundle with such a cache, by shape, precision and options of `export`."""

    def make(shape: str = "tiny", precision: str = "fp32", **options: Any) -> Path:
        return bundle_of(checkpoint_of(shape), precision, kv="int8", calibration=prompts, **options)

    return make


def stored_scales(bundle: Path, layers: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What lies in the decoder's data file, per layer."""
    graph = onnx.load(bundle / "decoder.onnx").graph
    values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    return [(values[key], values[value]) for key, value in map(scale_names, range(layers))]


def fill(model: Model, cache: KVCache, ids: NDArray[np.int64], piece: int) -> NDArray[np.float32]:
    """Scores (T, V) of tokens that are run so many at a time."""
    rows = []
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        positions = np.arange(start, start + len(part))[None].repeat(3, 0)
        rows.append(model.forward(model.embed(part), positions, cache, keep=0))
    return np.concatenate(rows)


def filled(model: Model, ids: NDArray[np.int64], piece: int) -> tuple[NDArray[np.float32], Rows]:
    cache = model.new_cache(len(ids))
    return fill(model, cache, ids, piece), cache.read(0, len(ids))


def assert_nearly_the_same(found: Rows, expected: Rows) -> None:
    """Two computations of the same floats differ in their last bits, so a value that lies between two steps
    may go either way: by one step, and seldom, as a step is 10^5 times what floats differ by."""
    difference = np.abs(found.astype(int) - expected)

    assert difference.max() <= 1
    assert (difference > 0).mean() < 2e-3


# --- what is computed


def held_in(model: Any, cache: Any) -> dict[str, Any]:
    """Arguments that make a transformers model use a cache; the name changed in 5.24."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


def rounding_cache(scales: list[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Any:
    """transformers' cache, whose keys and values go through 8 bits on their way in."""
    import torch
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            rounded = []
            for x, scale in zip((keys, values), scales[layer_idx], strict=True):
                step = torch.tensor(scale).reshape(1, x.shape[1], 1, x.shape[3])
                rounded.append((x / step).round().clamp(-128, 127) * step)
            return super().update(*rounded, layer_idx, *args, **kwargs)

    return Rounding()


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_torch_with_keys_and_values_rounded_alike(
    shape: str, checkpoint_of: Bundles, int8_of: Bundles, reference_of: Callable[[Path], Any]
) -> None:
    import torch

    reference = reference_of(checkpoint_of(shape))
    bundle = Bundle.open(int8_of(shape))
    layers = bundle.manifest.geometry.layers
    scales = stored_scales(bundle.path, layers)
    ids = np.arange(5, 5 + TOKENS)
    with torch.no_grad():
        cache = rounding_cache(scales)
        wanted = reference(torch.tensor(ids[None]), **held_in(reference, cache)).logits[0].numpy()
        floats = reference(torch.tensor(ids[None])).logits[0].numpy()
    held = [(layer.keys.numpy()[0], layer.values.numpy()[0]) for layer in cache.layers]
    model = Model(bundle, DECODER)

    for piece in (TOKENS, 16, FEW_TOKENS + 1, FEW_TOKENS, 1):
        scores, rows = filled(model, ids, piece)

        for layer, pair in enumerate(held):
            for kind, (own, scale) in enumerate(zip(pair, scales[layer], strict=True)):
                steps = np.rint(own / scale.reshape(own.shape[0], 1, -1)).astype(np.int8)
                assert_nearly_the_same(rows[layer, kind], steps)
        # What is left is a step here and there, as above; rounding itself changes far more.
        error, rounding = np.abs(scores - wanted), np.abs(floats - wanted)
        assert error.mean() < 0.02 * rounding.mean()
        assert error.max() < 0.3 * rounding.max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_prompt_gives_the_same_in_pieces_and_token_by_token(
    precision: str, shape: str, int8_of: Bundles
) -> None:
    model = Model(Bundle.open(int8_of(shape, precision)), DECODER)
    ids = np.arange(5, 5 + TOKENS)
    scores, rows = filled(model, ids, TOKENS)

    for piece in (16, 7, FEW_TOKENS, 1):
        again, other = filled(model, ids, piece)

        if precision == "fp32":
            assert_nearly_the_same(other, rows)
        else:  # float16 has 11 bits: what differs in the last of them is a fifth of a step
            assert np.abs(other.astype(int) - rows).max() <= 2
        assert np.linalg.norm(again - scores) < 0.01 * np.linalg.norm(scores)


def test_both_forms_write_in_place_and_nothing_behind_the_new_rows(int8_of: Bundles) -> None:
    model = Model(Bundle.open(int8_of()), DECODER)
    cache = model.new_cache(TOKENS)
    buffers = [value.numpy() for value in cache.past.values()]
    for buffer in buffers:
        buffer[...] = 77
    ids = np.arange(5, 5 + TOKENS)

    fill(model, cache, ids[:20], 20)  # in floats
    assert all((buffer[:, :, 20:] == 77).all() and (buffer[:, :, :20] != 77).any() for buffer in buffers)
    kept = [buffer[:, :, :20].copy() for buffer in buffers]
    positions = np.arange(20, 22)[None].repeat(3, 0)
    model.forward(model.embed(ids[20:22]), positions, cache)  # in integers

    for buffer, before in zip(buffers, kept, strict=True):
        assert (buffer[:, :, :20] == before).all()
        assert (buffer[:, :, 22:] == 77).all()
    assert (cache.read(0, 22) != 77).any()


def rescaled(bundle: Path, folder: Path, factor: float) -> Bundle:
    """A copy whose scales are other ones."""
    shutil.copytree(bundle, folder)
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    with (folder / "decoder.onnx.data").open("r+b") as file:
        for item in graph.initializer:
            if kv_scales.is_scale(item.name):
                place = {entry.key: entry.value for entry in item.external_data}
                file.seek(int(place["offset"]))
                values = np.frombuffer(file.read(int(place["length"])), "<f4") * np.float32(factor)
                file.seek(int(place["offset"]))
                file.write(values.astype("<f4").tobytes())
    return Bundle.open(folder)


@pytest.mark.parametrize("piece", [TOKENS, 1])
def test_what_is_too_large_is_cut_and_keeps_its_sign(
    piece: int, bundle_of: Bundles, checkpoint_of: Bundles, int8_of: Bundles, tmp_path: Path
) -> None:
    small = Model(rescaled(int8_of(), tmp_path / "small", 0.01), DECODER)
    exact = Model(Bundle.open(bundle_of(checkpoint_of("tiny"))), DECODER)
    ids = np.arange(5, 5 + TOKENS)

    scores, rows = filled(small, ids, piece)
    _, floats = filled(exact, ids, piece)

    cut = np.abs(rows.astype(int)) >= 127
    assert cut.mean() > 0.5
    assert np.isfinite(scores).all()
    # The first layer's keys and values do not depend on what the cache holds.
    assert (np.sign(rows[0][cut[0]]) == np.sign(floats[0][cut[0]])).all()


# --- where scales come from


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_leave_room_over_the_largest_that_torch_sees_on_the_prompts(
    shape: str, checkpoint_of: Bundles, int8_of: Bundles, prompts: Path, reference_of: Callable[[Path], Any]
) -> None:
    import torch
    from reference import model_inputs
    from transformers import DynamicCache

    checkpoint = Checkpoint.open(checkpoint_of(shape))
    text = checkpoint.config.text
    samples = read_calibration(prompts, checkpoint, checkpoint.config, max_tokens=kv_scales.KV_TOKENS)
    reference = reference_of(checkpoint_of(shape))
    largest = np.zeros((text.layers, 2, text.kv_heads, text.head_dim))
    for sample in samples.samples:
        cache = DynamicCache()
        with torch.no_grad():
            reference(**model_inputs(reference, sample), **held_in(reference, cache))
        for layer, held in enumerate(cache.layers):
            keys, values = held.keys.numpy()[0], held.values.numpy()[0]
            turned = keys[..., : text.rotary_dim]
            pairs = np.linalg.norm(turned.reshape(*turned.shape[:2], -1, 2), axis=-1).repeat(2, axis=-1)
            own = np.concatenate([pairs, np.abs(keys[..., text.rotary_dim :])], axis=-1), np.abs(values)
            largest[layer] = np.maximum(largest[layer], [part.max(axis=1) for part in own])

    for layer, pair in enumerate(stored_scales(int8_of(shape), text.layers)):
        for kind, scale in enumerate(pair):
            wanted = np.maximum(largest[layer, kind], largest[layer, kind].max() * LEAST)
            np.testing.assert_allclose(scale, wanted.ravel() * MARGIN / TOP, rtol=1e-4)


def test_pairs_that_turn_have_their_length_and_the_rest_its_magnitude() -> None:
    keys = np.array([[3, 4, 0, -5, -7, 2]], np.float32)

    assert pair_lengths(keys, 4).tolist() == [[5, 5, 5, 5, 7, 2]]
    assert pair_lengths(keys, 6).tolist() == [
        [5, 5, 5, 5, np.float32(np.hypot(7, 2))] * 1 + [np.float32(np.hypot(7, 2))]
    ]


def test_channels_that_were_never_used_have_a_scale_too() -> None:
    some = scales_of(np.array([[0, 2, 4]], np.float32), 1.0)
    none = scales_of(np.zeros((1, 2), np.float32), 1.0)

    np.testing.assert_allclose(some, np.array([4 / TOP, 2, 4]) / TOP, rtol=1e-6)
    assert (none > 0).all()
    assert some.dtype == none.dtype == np.float32


def test_a_model_without_numbers_is_refused(checkpoint_of: Bundles, prompts: Path) -> None:
    checkpoint = Checkpoint.open(checkpoint_of("tiny"))
    samples = read_calibration(prompts, checkpoint, checkpoint.config)

    class Broken:
        shape, release = checkpoint.tensors.shape, checkpoint.tensors.release

        def rows(self, name: str, *args: Any, **kwargs: Any) -> Any:
            values = checkpoint.tensors.rows(name, *args, **kwargs)
            return values * np.nan if name.endswith("layers.1.self_attn.k_proj.weight") else values

    with pytest.raises(ExportError, match="layer 1 gives keys or values that are no numbers"):
        find_scales(Broken(), checkpoint.config, samples)


def test_prompts_that_the_scales_were_measured_on_are_recorded(
    checkpoint_of: Bundles, int8_of: Bundles, prompts: Path
) -> None:
    checkpoint = Checkpoint.open(checkpoint_of("tiny"))
    samples = read_calibration(prompts, checkpoint, checkpoint.config, max_tokens=kv_scales.KV_TOKENS)
    manifest = Bundle.open(int8_of()).manifest

    assert manifest.kv_calibration == samples.description
    assert manifest.calibration is None
    assert "8-bit integers" in (int8_of() / "README.md").read_text()


# --- export


def test_the_same_export_gives_the_same_bytes_and_goes_on_without_measuring_again(
    checkpoint_of: Bundles, int8_of: Bundles, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"precision": "fp32", "kv": "int8", "calibration": prompts}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_write_rest", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint_of("tiny"), tmp_path / "out", **arguments)
    monkeypatch.setattr(pipeline, "find_scales", lambda *args: pytest.fail("the scales are on the disk"))

    export(checkpoint_of("tiny"), tmp_path / "out", resume=True, **arguments)

    assert Bundle.open(tmp_path / "out").fingerprint == Bundle.open(int8_of()).fingerprint


def test_an_interrupted_export_is_not_continued_with_another_cache(
    checkpoint_of: Bundles, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_write_rest", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint_of("tiny"), tmp_path / "out", kv="int8", calibration=prompts)

    with pytest.raises(ExportError, match="another kind"):
        export(checkpoint_of("tiny"), tmp_path / "out")


def test_it_goes_with_calibrated_and_balanced_weights(int8_of: Bundles) -> None:
    folder = int8_of("tiny", "int4", refine="gptq")
    manifest = Bundle.open(folder).manifest

    assert manifest.calibration is not None and manifest.kv_calibration is not None
    scores, _ = filled(Model(Bundle.open(folder), DECODER), np.arange(5, 20), 15)
    assert np.isfinite(scores).all()


def test_the_estimate_knows_it(
    checkpoint_of: Bundles, int8_of: Bundles, prompts: Path, tmp_path: Path
) -> None:
    real = Bundle.open(int8_of("tiny", "int4")).manifest
    manifest_bytes = (int8_of("tiny", "int4") / "manifest.json").stat().st_size
    guess = estimate(checkpoint_of("tiny"), tmp_path / "out", kv="int8", calibration=prompts)
    plain = estimate(checkpoint_of("tiny"), tmp_path / "out")

    assert guess.total_bytes == real.total_bytes + manifest_bytes
    assert guess.kv_bytes_per_token == real.kv_bytes_per_token == plain.kv_bytes_per_token // 4
    assert (guess.kv_dtype, plain.kv_dtype) == ("int8", "float32")
    assert guess.kv_calibration_prompts == 3 and plain.kv_calibration_prompts == 0
    assert "scales of the cache on 3 prompts" in guess.to_table()
    assert "scales of the cache" not in plain.to_table()


def test_options_that_mean_nothing_are_refused(prompts: Path) -> None:
    with pytest.raises(ExportError, match="kv is 'int4', must be float or int8"):
        ExportOptions(PRESETS["int4"], kv="int4")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="would have no effect"):
        ExportOptions(PRESETS["int4"], calibration=prompts)
    assert ExportOptions(PRESETS["int4"], calibration=prompts, kv="int8").kv == "int8"


@pytest.mark.parametrize("precision, parts", [("fp32", 1), ("fp16", 1), ("int4", 3)])
def test_its_graphs_pass_the_checker_of_onnx(precision: str, parts: int, int8_of: Bundles) -> None:
    options = {"prefill": "int8"} if precision == "int4" else {}
    folder = int8_of("tiny", precision, **options)
    graphs = [folder / f"{name}.onnx" for name in ("decoder", "prefill", "layer")[:parts]]

    for graph in graphs:
        onnx.checker.check_model(graph)
    nodes = [node.op_type for node in onnx.load(graphs[0], load_external_data=False).graph.node]
    layers = Bundle.open(folder).manifest.geometry.layers
    assert (nodes.count("If"), nodes.count("GroupQueryAttention")) == (
        (0, layers) if precision == "fp16" else (layers, 0)
    )


# --- what uses a cache


@pytest.mark.parametrize("way", ["layers", "integer"])
def test_prompts_read_in_another_form_fill_the_cache_with_what_it_would_hold_in_floats(
    way: str, checkpoint_of: Bundles, bundle_of: Bundles, int8_of: Bundles
) -> None:
    if not integers().exact:
        pytest.skip("this CPU has no exact products of bytes")
    floats = Bundle.open(bundle_of(checkpoint_of("tiny"), "int4", prefill="int8"))
    rounded = Bundle.open(int8_of("tiny", "int4", prefill="int8"))
    ids = np.arange(5, 69)
    positions = np.arange(len(ids))[None].repeat(3, 0)
    caches = []
    for bundle in (floats, rounded):
        model = Model(bundle, SessionOptions(threads=1, prefill=way))  # type: ignore[arg-type]
        cache = model.new_cache(len(ids))
        model.prefill(model.embed(ids), positions, cache)
        caches.append(cache.read(0, len(ids)))

    wanted, rows = caches
    shape = (rows.shape[2], 1, rows.shape[4])
    for layer, pair in enumerate(stored_scales(rounded.path, len(rows))):
        for kind, scale in enumerate(pair):
            error = np.abs(rows[layer, kind] * scale.reshape(shape) - wanted[layer, kind])
            if layer == 0:  # no attention before it
                cut = np.abs(rows[layer, kind].astype(int)) >= TOP
                assert (cut | (error <= 0.501 * scale.reshape(shape))).all()
                assert cut.mean() < 1e-3
            assert np.linalg.norm(error) < 0.03 * (layer + 1) * np.linalg.norm(wanted[layer, kind])


@pytest.mark.parametrize("way", ["layers", "integer"])
def test_pieces_of_a_prompt_in_another_form_are_the_whole(way: str, int8_of: Bundles) -> None:
    if not integers().exact:
        pytest.skip("this CPU has no exact products of bytes")
    bundle = Bundle.open(int8_of("tiny", "int4", prefill="int8"))
    model = Model(bundle, SessionOptions(threads=1, prefill=way))  # type: ignore[arg-type]
    ids = np.arange(5, 101)
    found = []
    for cuts in ((0, 96), (0, 48, 96)):
        cache = model.new_cache(len(ids))
        for start, stop in itertools.pairwise(cuts):
            positions = np.arange(start, stop)[None].repeat(3, 0)
            model.prefill(model.embed(ids[start:stop]), positions, cache)
        found.append(cache.read(0, len(ids)).astype(int))

    # Activations are rounded to bytes after each other's rounding, so a step may become a few.
    assert np.abs(found[0] - found[1]).max() <= 4
    assert (found[0] != found[1]).mean() < 0.02


def test_answers_after_reuse_and_with_drafts_are_those_of_cold_runs(int8_of: Bundles, tmp_path: Path) -> None:
    bundle = int8_of()
    options = ReuseOptions(prefix_cache_bytes=75_000, prefix_cache_dir=tmp_path / "kv", lookup=True)
    rng = random.Random(5)
    reused = accepted = 0
    with (
        Engine.load(bundle, threads=1, reuse=options) as warm,
        Engine.load(bundle, threads=1, reuse=ReuseOptions.off()) as fresh,
    ):
        bias = {warm.bundle.manifest.tokens.image: -100}
        for _ in range(40):
            messages = agent_messages(rng)

            ids, text, last = greedy(warm, messages, max_tokens=16, logit_bias=bias)

            assert (ids, text) == greedy(fresh, messages, max_tokens=16, logit_bias=bias)[:2]
            reused += last.usage.cached_tokens
            accepted += last.timings.accepted_tokens
        kept = warm._runner.sequence.cache
        row_bytes = warm.bundle.manifest.kv_bytes_per_token
    assert (kept.dtype, kept.row_bytes) == (np.dtype(np.int8), row_bytes)
    assert reused > 1000
    assert accepted > 10
    # A restart finds what is on the disk, and no bundle with another cache does.
    with Engine.load(bundle, threads=1, reuse=ReuseOptions(prefix_cache_dir=tmp_path / "kv")) as again:
        assert greedy(again, messages, max_tokens=16, logit_bias=bias)[:2] == (ids, text)
        assert greedy(again, messages, max_tokens=1)[2].usage.cached_tokens > 0


def test_prepared_weights_give_the_very_scores_of_packed_ones(
    int8_of: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOGLM_EDGE_CACHE", str(tmp_path / "prepared"))
    bundle = Bundle.open(int8_of("tiny", "int4"))

    class Quiet:
        def say(self, text: str) -> None: ...
        def show(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...

    prepare(bundle, "decoder", DECODER, Quiet())
    ids = np.arange(5, 5 + TOKENS)

    for piece in (TOKENS, 1):
        packed, prepared = (
            filled(Model(bundle, SessionOptions(threads=1, weights=way, prefill="decoder")), ids, piece)
            for way in ("packed", "prepared")
        )
        assert (packed[0] == prepared[0]).all()
        assert (packed[1] == prepared[1]).all()


def test_onnxruntime_genai_gives_the_same_greedy_tokens(
    int8_of: Bundles, pictures: list[Image.Image]
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    from test_genai import generate

    folder = int8_of("odd-head48")
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "打开设置 open settings"}]
    with Engine.load(folder, threads=1) as engine:
        messages = [{"role": "user", "content": content}]
        ours = [token for delta in engine.chat(messages, max_tokens=16) for token in delta.token_ids]
        prompt = engine.prompt(messages)

    assert generate(folder, prompt, 16)[: len(ours)] == ours


def test_info_says_what_it_holds(int8_of: Bundles) -> None:
    folder = int8_of()
    found = CliRunner().invoke(info, [str(folder), "--json"])

    document = json.loads(found.stdout.splitlines()[-1])
    assert document["kv_dtype"] == "int8"
    assert document["kv_bytes_per_token"] == Bundle.open(folder).manifest.kv_bytes_per_token
    assert "int8, " in CliRunner().invoke(info, [str(folder)]).stdout


# --- hostile and mixed bundles


def changed(folder: Path, target: Path, **values: Any) -> Path:
    """A copy with other values in its manifest; None takes a key out."""
    shutil.copytree(folder, target)
    document = json.loads((target / "manifest.json").read_text())
    for key, value in values.items():
        document.pop(key, None)
        if value is not None:
            document[key] = value
    (target / "manifest.json").write_text(json.dumps(document))
    return target


def test_a_manifest_that_says_otherwise_than_the_graphs_is_refused(
    checkpoint_of: Bundles, bundle_of: Bundles, int8_of: Bundles, tmp_path: Path
) -> None:
    mark = json.loads((int8_of() / "manifest.json").read_text())["kv_calibration"]
    floats = bundle_of(checkpoint_of("tiny"))
    lies = {
        r"past_key_values\.0\.key is a tensor\(float\), but .* says int8": changed(
            floats, tmp_path / "a", kv_dtype="int8", kv_calibration=mark
        ),
        r"past_key_values\.0\.key is a tensor\(int8\), but .* says float32": changed(
            int8_of(), tmp_path / "b", kv_dtype="float32", kv_calibration=None
        ),
    }

    for said, folder in lies.items():
        with pytest.raises(BundleError, match=said):
            Model(Bundle.open(folder), DECODER)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"kv_calibration": None}, "kv_calibration belongs to a KV cache in int8"),
        ({"kv_dtype": "float32"}, "kv_calibration belongs to a KV cache in int8"),
        ({"kv_dtype": "int4"}, "names the dtype 'int4' for the KV cache"),
        ({"activations": "int8"}, "names the dtype 'int8' for activations"),
        ({"kv_calibration": {"sha256": "a" * 64, "prompts": 0, "tokens": 5}}, "prompts is 0"),
        ({"kv_calibration": {"sha256": "a" * 63, "prompts": 1, "tokens": 5}}, "64 hex digits"),
        ({"kv_calibration": 5}, "must be an object"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    values: dict[str, Any], said: str, int8_of: Bundles, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=said):
        Bundle.open(changed(int8_of(), tmp_path / "lie", **values))


def test_a_layer_graph_without_the_index_of_its_scales_is_refused(int8_of: Bundles, tmp_path: Path) -> None:
    if not integers().exact:
        pytest.skip("this CPU has no exact products of bytes")
    folder = tmp_path / "lie"
    shutil.copytree(int8_of("tiny", "int4"), folder)
    index = json.loads((folder / "layers.json").read_text())
    for layer in index["layers"]:
        layer["vectors"] = [item for item in layer["vectors"] if "cache" not in item["name"]]
    content = json.dumps(index)
    (folder / "layers.json").write_text(content)
    document = json.loads((folder / "manifest.json").read_text())
    (entry,) = [item for item in document["files"] if item["path"] == "layers.json"]
    entry["size_bytes"] = len(content)
    (folder / "manifest.json").write_text(json.dumps(document))
    model = Model(Bundle.open(folder), SessionOptions(threads=1, prefill="layers"))
    ids = np.arange(5, 69)

    with pytest.raises(BundleError, match=r"disagree about layer\.self_attn\.cache"):
        model.prefill(model.embed(ids), np.arange(64)[None].repeat(3, 0), model.new_cache(64))


def test_a_calibration_set_that_is_not_there_is_said_before_anything_is_written(
    checkpoint_of: Bundles, tmp_path: Path
) -> None:
    with pytest.raises((ExportError, CheckpointError), match="is not a file"):
        export(checkpoint_of("tiny"), tmp_path / "out", kv="int8", calibration=tmp_path / "none.jsonl")

    assert list(tmp_path.glob("out*")) == []
