"""Balanced channels: the model computes the same, and what is quantized does not mind outliers."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_fixtures import write_usual_set
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from outlier_channels import inject, read_tensors, write_checkpoint
from PIL import Image
from test_parity import conversation

from autoglm_edge.errors import ExportError
from autoglm_edge.export.graphs.links import channel_links
from autoglm_edge.export.graphs.plan import Dtype
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.pipeline import estimate, export, prepare
from autoglm_edge.export.progress import ProgressEvent
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.export.source.shapes import expected_tensors
from autoglm_edge.export.weights import balance
from autoglm_edge.export.weights.balance import BOUNDS, Balanced, exponents
from autoglm_edge.quantize.formats import BlockFormat
from autoglm_edge.quantize.recipe import PRESETS, Recipe
from autoglm_edge.quantize.rule import Rule
from autoglm_edge.runtime.engine import Engine

Checkpoints = Callable[..., Path]
POSITIONS = "model.language_model.embed_tokens.weight"
TABLE_ONLY = Recipe("table", "float32", 4, (Rule(POSITIONS, BlockFormat(8, 128, True)),), balance=True)
"""Nothing but a table of rows, which no channel reaches, is quantized: the rest can be compared exactly."""


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def logits(bundle: Path, pictures: list[Image.Image]) -> np.ndarray:
    with Engine.load(bundle, threads=1) as engine:
        prompt = engine.prompt(conversation(pictures, 2))
        return engine.score(prompt.ids, pictures[:2])


def outliers(source: Path, target: Path, scale: float = 100) -> Path:
    return write_checkpoint(inject(read_tensors(source), scale), source, target)


# --- links


@pytest.mark.parametrize("shape", ["tiny", "odd-heads6", "odd-axes"])
def test_links_name_tensors_whose_shapes_fit(shape: str, checkpoint_of: Checkpoints) -> None:
    config = Checkpoint.open(checkpoint_of(shape)).config
    shapes = expected_tensors(config)
    found = list(channel_links(config))

    for link in found:
        (channels,) = {shapes[name][1] for name in link.readers}
        assert shapes[link.source][0] == link.first + channels
        assert len(shapes[link.source]) == (1 if "norm" in link.source else 2)
    readers = [name for link in found for name in link.readers]
    assert len(set(readers)) == len(readers)
    assert len({link.source for link in found}) == len(found)
    assert ("lm_head.weight" in readers) is not config.text.tied_head
    assert POSITIONS not in readers


# --- exponents


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_a_channel_is_scaled_by_the_root_of_the_ratio_and_the_middle_one_stays() -> None:
    rows, columns = vector(1, 1, 256, 1, 2**-6, 4), vector(1, 1, 1 / 256, 1, 1, 1)

    assert exponents(rows, columns, BOUNDS["float32"]).tolist() == [0, 0, -8, 0, 3, 0]
    assert exponents(rows, 4 * columns, BOUNDS["float32"]).tolist() == [0, 0, -8, 0, 3, 0]
    assert exponents(rows, columns, BOUNDS["float16"]).tolist() == [0, 0, -8, 0, 0, 0]


def test_channels_that_differ_a_little_stay() -> None:
    rows = np.random.default_rng(0).uniform(0.5, 2, 100).astype(np.float32)

    assert not exponents(rows, rows[::-1], BOUNDS["float32"]).any()


@pytest.mark.parametrize("bad", [0.0, 1e-40, np.inf, np.nan])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_channels_that_mean_nothing_stay(bad: float, dtype: Dtype) -> None:
    good = vector(1, 1, 1)
    for rows, columns in ((vector(1, bad, 1), good), (good, vector(1, bad, 1))):
        assert exponents(rows, columns, BOUNDS[dtype]).tolist() == [0, 0, 0]
    assert exponents(vector(bad), vector(bad), BOUNDS[dtype]).tolist() == [0]


sizes = arrays(np.float32, 7, elements=st.floats(0, 2.0**127, width=32))


@given(sizes, sizes, st.sampled_from(sorted(BOUNDS)))
def test_factors_are_bounded_and_what_they_make_can_be_stored(
    rows: np.ndarray, columns: np.ndarray, dtype: Dtype
) -> None:
    found, bounds = exponents(rows, columns, BOUNDS[dtype]), BOUNDS[dtype]

    assert found.min() >= -bounds.shrink and found.max() <= bounds.grow
    most = 2.0**bounds.size
    for before, power in ((rows, found), (columns, -found)):
        after = np.ldexp(before.astype(np.float64), power)
        assert (after <= np.maximum(before, most)).all()
        assert (after >= np.minimum(before, 1 / most)).all()


# --- the function


@pytest.mark.parametrize("shape", ["tiny", "odd-heads6", "odd-axes", "odd-head48"])
@pytest.mark.parametrize("scale", [1, 100])
def test_a_balanced_model_computes_the_same(
    shape: str, scale: int, checkpoint_of: Checkpoints, pictures: list[Image.Image], tmp_path: Path
) -> None:
    checkpoint = outliers(checkpoint_of(shape), tmp_path / "checkpoint", scale)
    for balanced in (True, False):
        export(checkpoint, tmp_path / str(balanced), recipe=replace(TABLE_ONLY, balance=balanced))

    found, expected = (logits(tmp_path / name, pictures) for name in ("True", "False"))

    assert contents(tmp_path / "True") != contents(tmp_path / "False")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_come_back_exactly(
    dtype: str, checkpoint_of: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "LEAST_EXPONENT", 1)
    checkpoint = Checkpoint.open(checkpoint_of("tiny", dtype=dtype))
    links = list(channel_links(checkpoint.config))
    store = Balanced(checkpoint.tensors, links, "float32")
    changed = 0
    for link in links:
        (reader, *_) = link.readers
        if len(checkpoint.tensors.shape(link.source)) > 1:
            continue
        count = checkpoint.tensors.shape(link.source)[0]
        height = checkpoint.tensors.shape(reader)[0]
        factor = store.rows(link.source, 0, count) / checkpoint.tensors.rows(link.source, 0, count)
        assert set(np.unique(np.frexp(factor)[0])) == {0.5}  # powers of two
        if any(link.first == 0 and other.source == reader for other in links):
            continue  # its rows are scaled as well
        before, after = checkpoint.tensors.rows(reader, 0, 4), store.rows(reader, 0, 4)
        assert height >= 4
        np.testing.assert_array_equal(after * factor.T, before)
        changed += int((factor != 1).sum())
    assert changed > 0


def test_rows_do_not_depend_on_how_they_are_cut_or_who_asks_first(
    checkpoint_of: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "LEAST_EXPONENT", 1)
    monkeypatch.setattr(balance, "SCAN_BYTES", 4096)  # many chunks, uneven ones, too
    checkpoint = Checkpoint.open(checkpoint_of("tiny"))
    links = list(channel_links(checkpoint.config))
    names = [name for name in expected_tensors(checkpoint.config) if "downsample" not in name]

    def whole(store: Balanced, name: str, step: int) -> bytes:
        count = store.shape(name)[0]
        cuts = range(0, count, step)
        return b"".join(store.rows(name, at, min(at + step, count)).tobytes() for at in cuts)

    right = {name: whole(Balanced(checkpoint.tensors, links, "float32", 1), name, 1 << 20) for name in names}
    for workers, step, order in ((1, 7, names), (2, 32, names[::-1]), (5, 13, sorted(names))):
        store = Balanced(checkpoint.tensors, links, "float32", workers)
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda name: whole(store, name, step), order)  # noqa: B023
            assert dict(zip(order, found, strict=True)) == right


# --- the export


class _StopError(Exception):
    """Stands for whatever ends an export in the middle."""


@pytest.mark.parametrize("count", [2, 9, 30])
def test_an_interrupted_export_goes_on_to_the_same_bytes(
    count: int, checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "autoglm_edge.export.weights.writer.SYNC_BYTES", 1
    )  # every weight is journalled at once
    monkeypatch.setattr("autoglm_edge.export.weights.writer.CHUNK_BYTES", (2048, 4096))
    monkeypatch.setattr("autoglm_edge.export.weights.writer.usable_cores", lambda: 3)
    tiny = outliers(checkpoint_of("tiny"), tmp_path / "checkpoint")
    seen: list[str] = []

    def stop(event: ProgressEvent) -> None:
        seen.append(event.stage)
        if seen.count("weights") == count:
            raise _StopError

    with pytest.raises(_StopError):
        export(tiny, tmp_path / "out", progress=stop)
    export(tiny, tmp_path / "out", resume=True)
    monkeypatch.undo()
    export(tiny, tmp_path / "whole")

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, {"activations": "float16"}, {"refine": "gptq"}])
def test_the_estimate_is_right_to_the_byte(
    options: dict[str, Any],
    checkpoint_of: Checkpoints,
    tmp_path: Path,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoglm_edge.export.forecast.TRIAL_ROWS", 16)
    monkeypatch.setattr("autoglm_edge.export.forecast._process_bytes", lambda: 0)
    if "refine" in options:
        options = {**options, "calibration": write_usual_set(tmp_path / "set.jsonl", pictures)}
    tiny = checkpoint_of("tiny")

    guess = estimate(tiny, tmp_path / "out", **options)
    bundle = export(tiny, tmp_path / "out", **options)

    assert guess.total_bytes == sum(path.stat().st_size for path in bundle.path.iterdir())
    assert bundle.manifest.recipe["balance"] is True
    plain = estimate(tiny, tmp_path / "plain", recipe=replace(PRESETS["int4"], balance=False))
    if not options:
        assert 0 < guess.peak_anonymous_bytes - plain.peak_anonymous_bytes < 1 << 30


def test_balance_leaves_the_size_and_the_graphs_alone(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    for balanced in (True, False):
        recipe = replace(PRESETS["int4"], balance=balanced)
        export(checkpoint_of("tiny"), tmp_path / str(balanced), recipe=recipe)
    for path in (tmp_path / "True").glob("*.onnx*"):
        other = tmp_path / "False" / path.name
        assert path.stat().st_size == other.stat().st_size
        if path.suffix == ".onnx":
            assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_dead_and_huge_channels_break_nothing(
    activations: Dtype, checkpoint_of: Checkpoints, pictures: list[Image.Image], tmp_path: Path
) -> None:
    tensors = read_tensors(checkpoint_of("tiny"))
    layer = "model.language_model.layers.0"
    norm, up = f"{layer}.input_layernorm.weight", f"{layer}.mlp.gate_up_proj.weight"
    half = len(tensors[up]) // 2
    tensors[norm][:3] = [0, 1e-40, -5000]  # dead, denormal, and an outlier that is negative
    for letter in "qkv":
        tensors[f"{layer}.self_attn.{letter}_proj.weight"][:, 2:5] *= np.float32([2e-4, 0, 1e-42])
    tensors[up][half] = 0
    tensors[f"{layer}.mlp.down_proj.weight"][:, 1] = 0
    tensors[up][half + 2] *= 1e-6
    checkpoint = write_checkpoint(tensors, checkpoint_of("tiny"), tmp_path / "checkpoint")

    export(checkpoint, tmp_path / "out", precision="int8-blocks", activations=activations, accuracy_level=1)
    export(checkpoint, tmp_path / "float", precision="fp32")

    found, expected = logits(tmp_path / "out", pictures), logits(tmp_path / "float", pictures)
    assert np.isfinite(found).all()
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.1 * expected.std()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_weight_is_still_named(value: float, checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    tensors = read_tensors(checkpoint_of("tiny"))
    norm = "model.language_model.layers.1.post_attention_layernorm.weight"
    tensors[norm][5] = value
    checkpoint = write_checkpoint(tensors, checkpoint_of("tiny"), tmp_path / "checkpoint")

    with pytest.raises(ExportError, match=f"{norm} holds {value} at row 5.*damaged"):
        export(checkpoint, tmp_path / "out")


def test_calibration_sees_balanced_inputs(
    checkpoint_of: Checkpoints, pictures: list[Image.Image], tmp_path: Path
) -> None:
    prompts = write_usual_set(tmp_path / "set.jsonl", pictures)
    checkpoint = outliers(checkpoint_of("tiny", dtype="float32"), tmp_path / "checkpoint")
    recipe = PRESETS["int4"].with_(refine="gptq", accuracy_level=1)
    job = prepare(Checkpoint.open(checkpoint), ExportOptions(recipe, calibration=prompts))
    assert isinstance(job.store, Balanced)

    export(checkpoint, tmp_path / "out", recipe=recipe, calibration=prompts)
    shutil.rmtree(checkpoint)
    plain = checkpoint_of("tiny", dtype="float32")
    export(plain, tmp_path / "plain", recipe=recipe, calibration=prompts)
    export(plain, tmp_path / "float", precision="fp32")

    expected = logits(tmp_path / "float", pictures)
    errors = [np.mean((logits(tmp_path / name, pictures) - expected) ** 2) for name in ("out", "plain")]
    assert errors[0] < 1.5 * errors[1]
