"""Exports whose integers are refined, or have few bits: what is stored, recorded, and computed with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from calibration_fixtures import assistant, user, write_set, write_usual_set
from checkpoint_shapes import SHAPES
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from autoglm_edge.errors import ExportError, QuantError
from autoglm_edge.export import forecast
from autoglm_edge.export.calibrate.calibration_cost import calibration_bytes, calibration_operations
from autoglm_edge.export.calibrate.calibration_set import CalibrationSet, Sample, read_calibration
from autoglm_edge.export.graphs.text import plan_decoder
from autoglm_edge.export.graphs.vision import plan_vision
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.pipeline import estimate, export, prepare
from autoglm_edge.export.progress import ProgressEvent
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.quantize.formats import BlockFormat, dequantize_rows
from autoglm_edge.quantize.recipe import Recipe
from autoglm_edge.quantize.rounding import quantize_rows
from autoglm_edge.quantize.rule import Refinement, Rule
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.prompt.image import PatchedImage

Checkpoints = Callable[..., Path]


@pytest.fixture
def tiny(checkpoint_of: Checkpoints) -> Path:
    return checkpoint_of("tiny")


@pytest.fixture
def prompts(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    return write_usual_set(tmp_path / "set.jsonl", pictures)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def everything(
    bits: int, block_size: int = 32, *, symmetric: bool = False, refine: Refinement = "none"
) -> Recipe:
    """Every matrix in one format, computed with in float32."""
    rule = Rule("*", BlockFormat(bits, block_size, symmetric), refine=refine)
    return Recipe(f"int{bits}-everything", "float32", 0, (rule,))


def log_probabilities(bundle: Path, talks: list[list[dict[str, Any]]]) -> NDArray[np.float64]:
    """(positions, V) of all talks, by the normal engine."""
    found = []
    with Engine.load(bundle, threads=1) as engine:
        for talk in talks:
            prompt = engine.prompt(talk)
            pictures = [part["image"] for part in talk[0]["content"] if part["type"] == "image"]
            found.append(engine.score(prompt.ids, pictures))
    logits = np.concatenate(found).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# --- gptq


def test_two_exports_with_calibration_give_the_same_bytes(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "int4-all", "refine": "gptq", "calibration": prompts}
    first = export(tiny, tmp_path / "a", **options)
    export(tiny, tmp_path / "b", **options)
    plain = export(tiny, tmp_path / "c", precision="int4-all")

    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first.verify()
    for part in ("decoder", "vision", "embedding"):
        data = f"{part}.onnx.data"
        assert (first.path / data).stat().st_size == (plain.path / data).stat().st_size
        assert (first.path / data).read_bytes() != (plain.path / data).read_bytes()
        assert (first.path / f"{part}.onnx").read_bytes() == (plain.path / f"{part}.onnx").read_bytes()


def test_manifest_and_card_say_what_was_calibrated_with(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    bundle = export(tiny, tmp_path / "out", refine="gptq", calibration=prompts)

    checkpoint = Checkpoint.open(tiny)
    samples = read_calibration(prompts, checkpoint, checkpoint.config)
    assert bundle.manifest.calibration == samples.description
    rules = {rule["pattern"]: rule for rule in bundle.manifest.recipe["rules"]}
    assert rules["model.language_model.layers.*"]["refine"] == "gptq"
    assert {rules["lm_head.weight"]["refine"], rules["model.visual.*"]["refine"]} == {"none"}
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert f"on 3 prompts, {samples.tokens} tokens" in card
    assert "with zero points, by GPTQ |" in card


def test_without_calibration_the_manifest_does_not_speak_of_it(tiny: Path, tmp_path: Path) -> None:
    bundle = export(tiny, tmp_path / "out")

    assert bundle.manifest.calibration is None
    assert "calibration" not in json.loads((bundle.path / "manifest.json").read_text())


class _StopError(Exception):
    """Stands for whatever ends an export in the middle."""


@pytest.mark.parametrize(
    ("stage", "count"), [("calibration", 2), ("calibration", 3), ("weights", 4), ("weights", 30), ("hash", 1)]
)
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(
    stage: str, count: int, tiny: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "autoglm_edge.export.weights.writer.SYNC_BYTES", 1
    )  # every weight is journalled at once
    options: dict[str, Any] = {"precision": "int4-all", "refine": "gptq", "calibration": prompts}
    export(tiny, tmp_path / "whole", **options)
    seen: list[str] = []

    def stop(event: ProgressEvent) -> None:
        seen.append(event.stage)
        if seen.count(stage) == count:
            raise _StopError

    with pytest.raises(_StopError):
        export(tiny, tmp_path / "out", progress=stop, **options)
    told: list[ProgressEvent] = []
    export(tiny, tmp_path / "out", resume=True, progress=told.append, **options)

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    if stage == "hash":  # all weights were done: nothing is run again
        assert "calibration" not in {event.stage for event in told}


def test_an_interrupted_export_is_not_gone_on_with_by_another_set(
    tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    def stop(event: ProgressEvent) -> None:
        if event.stage == "weights":
            raise _StopError

    with pytest.raises(_StopError):
        export(tiny, tmp_path / "out", refine="gptq", calibration=prompts, progress=stop)
    other = write_set(tmp_path / "other", [user("something else"), assistant()])

    with pytest.raises(ExportError, match="interrupted export of another kind"):
        export(tiny, tmp_path / "out", refine="gptq", calibration=other)
    with pytest.raises(ExportError, match="interrupted export of another kind"):
        export(tiny, tmp_path / "out", refine="search")


def test_the_same_prompts_in_another_file_go_on(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    def stop(event: ProgressEvent) -> None:
        if event.stage == "hash":
            raise _StopError

    with pytest.raises(_StopError):
        export(tiny, tmp_path / "out", refine="gptq", calibration=prompts, progress=stop)
    shutil.move(prompts, tmp_path / "moved")

    export(tiny, tmp_path / "out", refine="gptq", calibration=tmp_path / "moved", resume=True).verify()


def test_calibrated_integers_diverge_less_than_rounded_ones(tiny: Path, tmp_path: Path) -> None:
    def talks(first: int) -> list[list[dict[str, Any]]]:
        noise = [np.random.default_rng(seed) for seed in range(first, first + 6)]
        images = [Image.fromarray(one.integers(0, 256, (112, 140, 3), dtype=np.uint8)) for one in noise]
        return [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {
                            "type": "text",
                            "text": f"{first + number}: 打开设置, please, and tell me more of it",
                        },
                    ],
                }
            ]
            for number, image in enumerate(images)
        ]

    seen = [[user(talk[0]["content"][1]["text"], talk[0]["content"][0]["image"])] for talk in talks(0)]
    calibration = write_set(tmp_path / "set", *seen)
    export(tiny, tmp_path / "float", precision="fp32")
    expected = log_probabilities(tmp_path / "float", talks(100))  # none of them is in the set

    def divergence(name: str, recipe: Recipe, **options: Any) -> float:
        export(tiny, tmp_path / name, recipe=recipe, **options)
        found = log_probabilities(tmp_path / name, talks(100))
        return float((np.exp(expected) * (expected - found)).sum(axis=-1).mean())

    def decoder(refine: Refinement) -> Recipe:
        rule = Rule("model.language_model.layers.*", BlockFormat(4, 32, False), refine=refine)
        return Recipe("decoder", "float32", 0, (rule,))

    plain = divergence("none", decoder("none"))
    calibrated = divergence("gptq", decoder("gptq"), calibration=calibration)

    assert 0 < calibrated < 0.75 * plain


def test_the_table_of_the_embedding_is_searched_where_gptq_is_asked_for(tiny: Path, prompts: Path) -> None:
    options = ExportOptions(everything(4, refine="gptq"), calibration=prompts)

    plans = {plan.name: plan for plan in prepare(Checkpoint.open(tiny), options).plans}

    assert [weight.refine for weight in plans["embedding"].weights] == ["search"]
    refined = {
        w.refine for name in ("decoder", "vision") for w in plans[name].weights if w.action == "quantize"
    }
    assert refined == {"gptq"}
    assert {w.refine for plan in plans.values() for w in plan.weights if w.action != "quantize"} == {"none"}


def test_a_tied_head_is_calibrated_as_a_head(
    checkpoint_of: Checkpoints, prompts: Path, tmp_path: Path
) -> None:
    bundle = export(
        checkpoint_of("odd-axes"), tmp_path / "out", recipe=everything(4, refine="gptq"), calibration=prompts
    )

    bundle.verify()


def test_a_set_that_would_have_no_effect_is_refused(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    for options in ({}, {"refine": "search"}, {"precision": "fp32"}):
        with pytest.raises(
            ExportError, match=r"refines nothing by gptq, so the calibration set .* no effect"
        ):
            export(tiny, tmp_path / "out", calibration=prompts, **options)
    assert list(tmp_path.glob("out*")) == []


def test_a_refinement_of_floats_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="refine means nothing"):
        export(tiny, tmp_path / "out", precision="fp32", refine="search")


def test_a_set_that_cannot_be_used_is_told_before_anything_is_written(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a file"):
        export(tiny, tmp_path / "out", refine="gptq", calibration=tmp_path / "nothing")

    assert list(tmp_path.glob("out*")) == []


def test_the_set_of_the_package_is_taken_where_none_is_named(
    tiny: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm_edge.export.calibrate.preparation.built_in_set", lambda: prompts)

    bundle = export(tiny, tmp_path / "out", refine="gptq")

    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.prompts == 3


def test_calibrating_is_told_between_weights(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []

    export(tiny, tmp_path / "out", refine="gptq", calibration=prompts, progress=events.append)

    details = [event.detail for event in events if event.stage == "calibration"]
    assert details == [
        "calibrating: looking at 3 pictures", "calibrating layer 1 of 2", "calibrating layer 2 of 2",
    ]  # fmt: skip
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages[-4:] == ["graphs", "hash", "publish", "done"]


# --- search


def test_searched_integers_are_nearer_to_the_weights(tiny: Path, tmp_path: Path) -> None:
    def error(name: str, refine: Refinement) -> float:
        job = prepare(Checkpoint.open(tiny), ExportOptions(everything(3, refine=refine)))
        bundle = export(tiny, tmp_path / name, recipe=job.recipe)
        total = 0.0
        for plan in job.plans:
            graph = onnx.load(bundle.file(plan.graph_file))
            values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.graph.initializer}
            for weight in plan.weights:
                if weight.quant is None or plan.name == "embedding":
                    continue
                store = job.checkpoint.tensors
                rows = store.rows(weight.source, 0, weight.rows, permute=weight.permute)
                stored = _Stored(*(values[piece.name] for piece in weight.pieces))
                total += float(((dequantize_rows(stored, weight.quant, weight.columns) - rows) ** 2).sum())
        return total

    assert error("search", "search") < 0.95 * error("none", "none")


class _Stored:
    """What `dequantize_rows` takes."""

    def __init__(self, data: Any, scales: Any, zero_points: Any = None) -> None:
        self.data, self.scales, self.zero_points = data, scales, zero_points


# --- few bits


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("shape", ["tiny", "odd-heads6"])
def test_few_bits_compute_what_the_float_model_does_with_the_weights_they_stand_for(
    shape: str, bits: int, symmetric: bool, checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    recipe = everything(bits, symmetric=symmetric)
    export(checkpoint_of(shape), tmp_path / "few", recipe=recipe)
    rounded = tmp_path / shape
    shutil.copytree(checkpoint_of(shape), rounded)
    for path in rounded.glob("*.safetensors"):
        tensors = load_file(path)
        for name, values in tensors.items():
            tensors[name] = values.astype(np.float32)
            fmt = recipe.format_for(name)
            if fmt is not None:
                # The one matrix that is stored as a kernel is quantized patch first, channels last.
                turned = values.transpose(0, 2, 3, 1) if values.ndim == 4 else values
                flat = np.ascontiguousarray(turned, np.float32).reshape(len(turned), -1)
                back = dequantize_rows(quantize_rows(flat, fmt), fmt, flat.shape[1]).reshape(turned.shape)
                tensors[name] = np.ascontiguousarray(back.transpose(0, 3, 1, 2) if values.ndim == 4 else back)
        save_file(tensors, path)
    export(rounded, tmp_path / "float", precision="fp32")
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (126, 112, 3), dtype=np.uint8))
    talk = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Hi"}]}
    ]

    found, expected = (log_probabilities(tmp_path / name, [talk]) for name in ("few", "float"))

    # The same products in another order, in float32, over a handful of layers.
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("refine", ["none", "search"])
def test_few_bits_take_the_bytes_of_four_and_the_estimate_knows(
    bits: int, refine: Refinement, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "TRIAL_ROWS", 16)
    recipe = everything(bits, refine=refine)

    guess = estimate(tiny, tmp_path / "out", recipe=recipe)
    bundle = export(tiny, tmp_path / "out", recipe=recipe)

    four = export(tiny, tmp_path / "four", recipe=everything(4))
    assert guess.total_bytes == sum(path.stat().st_size for path in bundle.path.iterdir())
    for part in ("decoder", "embedding", "vision"):
        data = f"{part}.onnx.data"
        assert (bundle.path / data).stat().st_size == (four.path / data).stat().st_size
        assert (bundle.path / f"{part}.onnx").read_bytes() == (four.path / f"{part}.onnx").read_bytes()


# --- the estimate


def test_an_estimate_counts_calibration_in(
    tiny: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "TRIAL_ROWS", 16)
    options: dict[str, Any] = {"precision": "int4-all", "refine": "gptq", "calibration": prompts}

    guess = estimate(tiny, tmp_path / "out", **options)

    assert guess.refinement == "gptq"
    assert (guess.calibration_prompts, guess.calibration_tokens) > (0, 0)
    assert f"calibration on 3 prompts, {guess.calibration_tokens} tokens, included" in guess.to_table()
    assert list(tmp_path.glob("out*")) == []
    bundle = export(tiny, tmp_path / "out", **options)
    assert guess.total_bytes == sum(path.stat().st_size for path in bundle.path.iterdir())


@pytest.mark.parametrize(("refine", "line"), [("none", None), ("search", "a search for the scales included")])
def test_an_estimate_says_what_the_time_is_for(
    refine: Refinement, line: str | None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "TRIAL_ROWS", 16)

    guess = estimate(tiny, tmp_path / "out", refine=refine)

    assert (guess.refinement, guess.calibration_tokens) == (refine, 0)
    assert ("included" in guess.to_table()) == (line is not None)
    assert line is None or line in guess.to_table()


def test_calibrating_the_9b_model_stays_within_a_few_gigabytes(tiny: Path) -> None:
    shape = SHAPES["autoglm-9b"]
    base = Checkpoint.open(tiny).config
    text = replace(
        base.text, hidden=shape.hidden, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads,
        head_dim=shape.head_dim, intermediate=shape.intermediate, rotary_dim=64,
        mrope_section=shape.mrope_section, vocab=shape.vocab,
    )  # fmt: skip
    vision = replace(
        base.vision, hidden=shape.vision_hidden, depth=shape.vision_depth, heads=shape.vision_heads,
        head_dim=128, out_hidden=shape.hidden, merger_intermediate=shape.merger_intermediate,
    )  # fmt: skip
    config = replace(base, text=text, vision=vision)
    recipe = everything(4, refine="gptq")
    plans = (plan_decoder(config, recipe), plan_vision(config, recipe))
    weights = [weight for plan in plans for weight in plan.weights if weight.refine == "gptq"]
    picture = PatchedImage(
        np.zeros((13416, 3, 1, 1), np.uint8),
        np.zeros((3, 256), np.float32),
        2,
        (1, 172, 78),
        3354,
        (1080, 2400),
    )
    sample = Sample(np.zeros(8192, np.int64), np.zeros((3, 8192), np.int64), (picture, picture))
    samples = CalibrationSet((sample,), "0" * 64)

    most = calibration_bytes(config, samples, weights)

    layer, hidden, sums = 816_000_000, 4 * 4096 * 8192, 425_000_000
    assert layer + hidden + sums < most < 4_000_000_000
    # Two operations per weight and token, and about as much again for the sums.
    forward = 2 * 8192 * 40 * 204_000_000
    assert forward < calibration_operations(config, samples, weights) < 3 * forward
