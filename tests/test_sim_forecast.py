"""The forecast: bytes by the runtime's own formulas, what fits, and how far it is from measured runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_traces import MB, budget, trace, whole_run

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.forecast import Forecast, expect, foretell, screen_tokens, usual_question
from autoglm_edge.android_sim.need import PHASES, Item, Need, Question, Widths, need
from autoglm_edge.embedded import pocket_path
from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.cache import KVCache
from autoglm_edge.runtime.layerwise.index import read_index
from autoglm_edge.runtime.plan import LAYERS_CHUNK, ModelPlan
from autoglm_edge.runtime.session import SessionOptions

PREPARED = ModelPlan("decoder", "test", "prepared", "test", 2, "test")
PACKED = dataclasses.replace(PREPARED, weights="packed")
LAYERS = dataclasses.replace(PREPARED, prefill="layers", prompt_from=64)


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(pocket_path(), "int4"))


def sum_of(found: Need, name: str) -> int:
    return sum(item.bytes for item in found.items if item.name == name)


def of(found: Need, name: str, phase: str) -> int:
    return sum(item.bytes for item in found.items if item.name == name and phase in item.phases)


def test_keys_and_values_are_those_that_the_cache_takes(bundle: Bundle) -> None:
    found = need(bundle, PREPARED, Question(1000, answer_tokens=24))
    cache = KVCache(bundle.manifest, 1)
    exact = cache.row_bytes * 1024
    assert exact <= of(found, "keys and values", "decode") <= exact + 4096 * 1000
    assert (
        of(found, "keys and values", "decode") - of(found, "keys and values", "prefill")
        == cache.row_bytes * 24
    )


def test_the_expanded_layer_is_the_one_of_the_runtime(bundle: Bundle) -> None:
    found = need(bundle, LAYERS, Question(1000))
    index = read_index(bundle.file("layers.json"), bundle.manifest.geometry.layers).layers
    arrays = [
        np.empty(shape, np.float32 if len(shape) == 1 else np.int8) for shape in index[0].shapes.values()
    ]
    assert sum_of(found, "one layer in 8 bits") == sum(array.nbytes for array in arrays)


def test_a_prompt_that_is_too_short_for_layers_goes_through_the_decoder(bundle: Bundle) -> None:
    short, long = (need(bundle, LAYERS, Question(tokens)) for tokens in (64, 66))
    assert sum_of(short, "one layer in 8 bits") == 0
    assert sum_of(long, "one layer in 8 bits") > 0


def test_hidden_states_are_bounded_by_the_piece_that_is_read_at_once(bundle: Bundle) -> None:
    sizes = [
        sum_of(need(bundle, LAYERS, Question(tokens)), "hidden states of a prompt")
        for tokens in (2048, 4096, 9000)
    ]
    assert sizes[1] == 2 * sizes[0]
    assert sizes[2] == sizes[1]
    assert LAYERS_CHUNK == 4096


def test_activations_of_the_decoder_stop_growing_with_the_chunk(bundle: Bundle) -> None:
    sizes = [
        sum_of(need(bundle, PREPARED, Question(tokens)), "activations of a prompt")
        for tokens in (256, 512, 5000)
    ]
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=1)
    assert sizes[2] == sizes[1]


def test_packed_weights_are_anonymous_and_prepared_ones_are_mapped(bundle: Bundle) -> None:
    stored = bundle.manifest.parts["decoder"].weight_bytes
    packed, prepared = (need(bundle, plan, Question(100)) for plan in (PACKED, PREPARED))
    assert packed.anonymous("decode") - prepared.anonymous("decode") == pytest.approx(1.09 * stored, rel=0.01)
    assert prepared.swept("decode") == pytest.approx(1.09 * stored, rel=0.01)
    assert packed.swept("decode") == 0
    assert (
        prepared.anonymous("load")
        > prepared.anonymous("load") - of(prepared, "largest matrix while packing", "load")
        > 0
    )


def test_the_largest_matrix_is_the_head_with_the_last_norm(bundle: Bundle) -> None:
    shape = bundle.manifest.geometry
    blocks = -(-shape.hidden // 128)  # of 128 weights in 8 bits with a float scale; the last one is padded
    head = shape.vocab * blocks * (128 + 4)
    assert Widths.of(bundle).largest_bytes == head + 4 * shape.hidden


def test_a_picture_costs_what_its_arrays_take_and_nothing_without_one(bundle: Bundle) -> None:
    image = bundle.manifest.image
    found = need(bundle, PREPARED, Question(300, image_tokens=100))
    assert of(found, "patches as numbers", "image") == 100 * image.merge_size**2 * image.patch_dim * 4
    assert of(found, "image features", "decode") == 100 * bundle.manifest.geometry.hidden * 4
    assert "patches as numbers" not in {item.name for item in need(bundle, PREPARED, Question(300)).items}


def test_the_9bs_measured_phases_are_met(bundle: Bundle) -> None:
    """Figures of benchmarks/results: weights_memory.json and bench-int4.json, by phase, within a tenth."""
    whole = nine_b(bundle)
    load = need(whole, PREPARED, Question(512, answer_tokens=16), WIDTHS_9B)
    assert load.anonymous("load") == pytest.approx(828e6, rel=0.1)
    assert load.anonymous("prefill") == pytest.approx(349e6, rel=0.1)
    assert load.anonymous("decode") == pytest.approx(166e6, rel=0.1)
    assert load.swept("decode") == pytest.approx(5.76e9, rel=0.01)
    packed = need(whole, PACKED, Question(512, answer_tokens=16), WIDTHS_9B)
    assert packed.anonymous("prefill") == pytest.approx(6.12e9, rel=0.03)
    by_layers = need(whole, LAYERS, Question(512, answer_tokens=16), WIDTHS_9B)
    assert by_layers.anonymous("prefill") == pytest.approx(695e6, rel=0.1)
    pictured = need(whole, PREPARED, Question(586, 576, 8), WIDTHS_9B)  # a run on the profile phone-16
    tokenizer = 42e6  # which those of benchmarks/results ran without
    assert pictured.anonymous("image") + tokenizer == pytest.approx(333e6, rel=0.15)
    assert pictured.anonymous("prefill") + tokenizer == pytest.approx(410e6, rel=0.15)
    assert pictured.anonymous("decode") + tokenizer == pytest.approx(225e6, rel=0.15)
    assert pictured.mapped("decode") == pytest.approx(7.31e9, rel=0.03)
    longer = need(whole, LAYERS, Question(1500, answer_tokens=16), WIDTHS_9B)
    assert longer.anonymous("prefill") == pytest.approx(948e6, rel=0.1)


WIDTHS_9B = Widths(13696, 1536, 4096, 13696, 204_000_000, 640_000_000)


def nine_b(bundle: Bundle) -> Any:
    """The pocket bundle with the 9B's manifest figures; nothing else is read of it here."""
    manifest = bundle.manifest
    shape = dataclasses.replace(
        manifest.geometry, layers=40, hidden=4096, heads=32, kv_heads=2, head_dim=128, vocab=151_552
    )
    sizes = {"decoder": 5_296_095_232, "embedding": 640_155_648, "vision": 902_525_952}
    parts = {
        name: dataclasses.replace(part, weight_bytes=sizes.get(name, part.weight_bytes))
        for name, part in manifest.parts.items()
    }
    files = tuple(
        dataclasses.replace(
            entry, size_bytes={"tokenizer.json": 0, "decoder.onnx": 600_000}.get(entry.path, entry.size_bytes)
        )
        for entry in manifest.files
    )
    changed = dataclasses.replace(
        manifest, geometry=shape, parts=parts, files=files, kv_bytes_per_token=81_920
    )
    return type("Stub", (), {"manifest": changed, "path": bundle.path})()


def test_without_index_and_config_the_usual_ratios_stand_in_and_say_so(
    bundle: Bundle, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    found = Bundle.open(copy)
    (copy / "config.json").write_text("[]")
    widths = Widths.of(found)
    assert len(widths.notes) == 2
    assert "config.json does not tell" in widths.notes[0]
    assert widths.intermediate == round(3.34 * bundle.manifest.geometry.hidden)
    for text in ('{"text_config": 3}', "\xff", '{"text_config": {"intermediate_size": -4}}', "[" * 5000):
        (copy / "config.json").write_text(text)
        assert Widths.of(found).intermediate == widths.intermediate


def test_a_need_sums_its_items_by_phase_and_kind() -> None:
    items = (
        Item("a", "anonymous", PHASES, 10),
        Item("b", "anonymous", ("load",), 5),
        Item("c", "mapped", ("decode",), 100, swept=True),
        Item("d", "mapped", ("decode",), 7),
    )
    found = Need(items)
    assert (found.peak, found.peak_phase) == (15, "load")
    assert (found.mapped("decode"), found.swept("decode"), found.swept("load")) == (107, 100, 0)
    assert expect(found, 14) == "killed"
    assert expect(found, 20) == "fits_thrash"
    assert expect(found, 110) == "fits"
    assert expect(found, 109) == "fits_thrash"
    held = Need((Item("a", "anonymous", PHASES, 10),))
    assert expect(held, 9) == "killed"
    assert expect(held, 9, swap_bytes=5) == "fits_swap"


def room(limit_mb: float, **changes: Any) -> Budget:
    return budget(limit_mb, **changes)


def test_the_longest_context_and_picture_are_the_last_that_fit(bundle: Bundle) -> None:
    asked = Question(300, image_tokens=100, answer_tokens=20)
    found = foretell(bundle, room(75), question=asked)
    assert 320 < found.context.alive < found.context.most
    for tokens, lives in ((found.context.alive, True), (found.context.alive + 8, False)):
        item = Question(tokens - 20, image_tokens=100, answer_tokens=20)
        assert (expect(need(bundle, found.plan, item), 75 * MB) != "killed") is lives


def test_more_memory_never_shortens_what_fits(bundle: Bundle) -> None:
    found = [foretell(bundle, room(limit)) for limit in (40, 60, 70, 80, 100, 400)]
    for reach in ("context", "image"):
        alive = [getattr(item, reach).alive for item in found]
        assert alive == sorted(alive)
    assert found[0].context.alive == 0 and found[0].expected == "killed"
    assert found[-1].context.alive == bundle.manifest.geometry.context_length
    assert found[-1].pixels[0] == found[-1].image.alive * 28 * 28


def test_a_question_beyond_the_models_context_is_refused(bundle: Bundle) -> None:
    with pytest.raises(SimulationError, match="positions for"):
        foretell(bundle, room(500), question=Question(10**6))
    for wrong in (
        {"prompt_tokens": 0},
        {"prompt_tokens": 5, "image_tokens": 6},
        {"prompt_tokens": 5, "answer_tokens": -1},
    ):
        with pytest.raises(SimulationError):
            Question(**wrong)


def test_the_usual_question_is_a_screenshot_and_a_system_prompt_within_the_context(bundle: Bundle) -> None:
    asked = usual_question(bundle)
    assert asked.image_tokens == screen_tokens(bundle) == bundle.manifest.image.max_tokens
    assert asked.tokens <= bundle.manifest.geometry.context_length
    assert usual_question(bundle, 40).tokens <= 40


def test_the_error_is_taken_of_a_run_that_came_to_its_end_and_only_of_its_phases(bundle: Bundle) -> None:
    found = foretell(bundle, room(800), question=Question(1500, 100, 40))
    errors = {(item.what, item.phase): item for item in found.errors(whole_run(800))}
    assert ("anonymous", "peak") in errors and ("anonymous", "image") in errors
    peak = errors["anonymous", "peak"]
    assert peak.error == pytest.approx(found.need.peak / whole_run(800).peak_held().bytes - 1)
    assert found.errors(whole_run(200, killed_at=6.1)) == ()
    assert [item.phase for item in found.errors(trace([], []))] == ["peak"]


def test_a_forecast_as_json_holds_what_was_promised(bundle: Bundle) -> None:
    document: dict[str, Any] = json.loads(json.dumps(foretell(bundle, room(90)).to_json()))
    assert document["longest_context"].keys() == {"alive", "smooth", "most"}
    assert document["largest_image_pixels"].keys() == {"alive", "smooth"}
    assert (
        sum(
            item["bytes"]
            for item in document["items"]
            if item["memory"] == "anonymous" and "decode" in item["phases"]
        )
        == document["anonymous_bytes"]["decode"]
    )
    assert isinstance(foretell(bundle, room(90)), Forecast)


def test_large_bundles_are_foretold_with_prepared_weights_and_small_ones_as_the_runtime_has_them(
    bundle: Bundle,
) -> None:
    assert foretell(bundle, room(400)).plan.weights == "packed"
    asked = foretell(bundle, room(400), options=SessionOptions(weights="prepared"))
    assert asked.plan.weights == "prepared"
