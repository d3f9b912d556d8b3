"""A prompt that is read layer by layer fills the cache as the decoder does, from the same weights on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoglm_edge.errors import BundleError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.layerwise.index import index_to_json, read_index
from autoglm_edge.runtime.layerwise.layers import Layers
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.plan import LAYERS_FROM_TOKENS, PREFILL_FROM_TOKENS
from autoglm_edge.runtime.session import SessionOptions

OPTIONS = SessionOptions(threads=1, prefill="layers")


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(checkpoint_of("tiny"), "int4"))


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Model:
    return Model(bundle, OPTIONS)


def filled(model: Model, count: int, pieces: tuple[int, ...] = ()) -> np.ndarray:
    """Rows of the cache after `count` tokens, read in pieces that end so."""
    ids, cache = np.arange(5, 5 + count), model.new_cache(count)
    start = 0
    for stop in (*pieces, count):
        positions = np.arange(start, stop)[None].repeat(3, 0)
        model.prefill(model.embed(ids[start:stop]), positions, cache)
        start = stop
    assert cache.length == count
    return cache.read(0, count)


@pytest.mark.parametrize("precision", ["int4", "int4-mixed", "int3"])
def test_the_cache_is_filled_as_by_the_decoder(
    precision: str, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    bundle = Bundle.open(bundle_of(checkpoint_of("tiny"), precision))
    layered, decoder = (
        Model(bundle, SessionOptions(threads=1, prefill=way)) for way in ("layers", "decoder")
    )

    found, expected = filled(layered, 64), filled(decoder, 64)

    assert "_layers" in vars(layered)
    assert not (found == expected).all()
    # The weights agree to 8 bits. Activations are rounded to 8 bits per token here and per block there, half
    # a percent each; both errors grow from layer to layer.
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert np.linalg.norm(one - other) < 0.03 * (layer + 1) * np.linalg.norm(other)


def test_pieces_of_a_prompt_fill_the_cache_as_the_whole(model: Model) -> None:
    # Products round each token by itself; attention adds up in other blocks.
    np.testing.assert_allclose(filled(model, 96, (40,)), filled(model, 96), rtol=0, atol=1e-2)


def test_several_runs_per_layer_are_one_prompt(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filled(model, 96)
    monkeypatch.setattr("autoglm_edge.runtime.layerwise.layers.CHUNK", 16)

    np.testing.assert_allclose(filled(model, 96), whole, rtol=0, atol=1e-2)


def test_short_pieces_go_through_the_decoder(bundle: Bundle) -> None:
    model = Model(bundle, OPTIONS)

    filled(model, PREFILL_FROM_TOKENS - 1)

    assert "_layers" not in vars(model)


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_prompt_that_is_given_up_leaves_the_cache_as_it_was(
    model: Model, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.layerwise.layers.CHUNK", 16)
    ids, positions = np.arange(5, 69), np.arange(64)[None].repeat(3, 0)
    cache = model.new_cache(64)
    kept = filled(model, 32)
    cache.write(0, kept)

    work = model.prefill_pieces(model.embed(ids[32:]), positions[:, 32:], cache)
    for _ in range(pieces):
        next(work)
    work.close()  # type: ignore[attr-defined]

    assert cache.length == 32
    assert (cache.read(0, 32) == kept).all()


def test_the_engine_takes_it_for_long_prompts_and_says_so(bundle: Bundle) -> None:
    words = [{"role": "user", "content": "打开 " * max(LAYERS_FROM_TOKENS.values())}]
    with Engine(bundle, options=OPTIONS) as engine:
        *_, last = engine.chat(words, max_tokens=2)
        again = [delta.token_ids for delta in engine.chat(words, max_tokens=2)]
    with Engine(bundle, options=OPTIONS) as engine:
        cold = [delta.token_ids for delta in engine.chat(words, max_tokens=2)]

    assert last.timings is not None
    assert last.timings.plan is not None
    assert last.timings.plan.prefill == "layers"
    assert again == cold


def test_float_activations_and_eight_bits_have_no_layer_part(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    for precision, options in (
        ("fp32", {}),
        ("int8", {}),
        ("int8-blocks", {}),
        ("int4", {"accuracy_level": 1}),
        ("int4", {"activations": "float16"}),
    ):
        made = Bundle.open(bundle_of(checkpoint_of("tiny"), precision, **options))
        assert "layer" not in made.manifest.parts


# --- the index


def test_the_index_survives_a_round_trip(bundle: Bundle) -> None:
    path = bundle.file("layers.json")
    layers = read_index(path, bundle.manifest.geometry.layers)

    assert index_to_json(layers) == path.read_text()


def damaged(bundle: Bundle, folder: Path, change: Callable[[Any], object]) -> Bundle:
    """A copy of the bundle with another index; sizes in the manifest are those of the copy."""
    shutil.copytree(bundle.path, folder)
    document = json.loads((folder / "layers.json").read_text())
    document = change(document) or document
    (folder / "layers.json").write_text(json.dumps(document))
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == "layers.json":
            entry["size_bytes"] = (folder / "layers.json").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["layers"].pop() and None, "layers of one shape"),
        (lambda d: d["layers"][0]["matrices"][0].update(bits=5), "5 bits"),
        (lambda d: d["layers"][0]["matrices"][0].update(block_size=48), "blocks of 48"),
        (lambda d: d["layers"][0]["matrices"][0].update(data_offset=-4096), "below zero"),
        (lambda d: d["layers"][0]["matrices"][0].update(data_offset=1 << 60), "said to lie at"),
        (lambda d: d["layers"][1]["vectors"][0].update(offset=2), "said to lie at 2"),
        (lambda d: d["layers"][0]["vectors"][0].update(length=True), "length is True"),
        (lambda d: d["layers"][0]["vectors"][0].update(extra=1), "has the keys"),
        (lambda d: d["layers"][0]["matrices"][0].update(rows=1), "of one shape"),
        (lambda d: [layer["vectors"].pop() for layer in d["layers"]] and None, "disagree about"),
        (lambda d: [1, 2], "not an index of layers"),
        (lambda d: {"layers": 3}, "not an index of layers"),
    ],
)
def test_an_index_that_leads_astray_is_refused(
    bundle: Bundle, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    wrong = damaged(bundle, tmp_path / "copy", change)

    with pytest.raises(BundleError, match=message):
        Layers(wrong, OPTIONS)


def test_a_graph_of_another_shape_is_refused(
    bundle: Bundle, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    parts = dict(bundle.manifest.parts)
    parts["layer"] = dataclasses.replace(parts["layer"], graph=parts["embedding"].graph)
    manifest = dataclasses.replace(bundle.manifest, parts=parts)

    with pytest.raises(BundleError, match="disagree about"):
        Layers(dataclasses.replace(bundle, manifest=manifest), OPTIONS)
