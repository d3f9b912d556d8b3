"""Calibration: the sums are those of the reference model's own inputs, whatever the shape and the cuts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_fixtures import user, write_set, write_usual_set
from numpy.typing import NDArray
from PIL import Image

from autoglm_edge.errors import ExportError
from autoglm_edge.export.calibrate import calibration as module
from autoglm_edge.export.calibrate import gram as gram_module
from autoglm_edge.export.calibrate.calibration import Calibration
from autoglm_edge.export.calibrate.calibration_set import CalibrationSet, read_calibration
from autoglm_edge.export.calibrate.gram import Gram, gram_bytes
from autoglm_edge.export.calibrate.probe import Probe
from autoglm_edge.export.graphs.text import plan_norm
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.pipeline import prepare
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.quantize.recipe import PRESETS

Checkpoints = Callable[..., Path]
LAYER = "model.language_model.layers.{}."
BLOCK = "model.visual.blocks.{}."


@pytest.fixture
def prompts(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    return write_usual_set(tmp_path / "set.jsonl", pictures)


@pytest.fixture
def tiny(checkpoint_of: Checkpoints) -> Checkpoint:
    return Checkpoint.open(checkpoint_of("tiny"))


def matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """The reference's linear layers, and the convolution that is one here."""
    import torch

    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) or name.endswith("downsample"):
            yield f"{name}.weight", part


def reference_grams(model: Any, samples: CalibrationSet) -> dict[str, NDArray[np.float64]]:
    """X^T X of every matrix, by hooks on the reference model, in float64."""
    import torch
    from reference import model_inputs

    sums: dict[str, NDArray[np.float64]] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(part: Any, arguments: tuple[Any, ...]) -> None:
            inputs = arguments[0]
            if name.endswith("downsample.weight"):  # patches first, channels last
                inputs = inputs.permute(0, 2, 3, 1).flatten(1)
            x = inputs.reshape(-1, inputs.shape[-1]).double().numpy()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    handles = [part.register_forward_pre_hook(hook(name)) for name, part in matrices(model)]
    try:
        with torch.no_grad():
            for sample in samples.samples:
                model(**model_inputs(model, sample))  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()
    return sums


def whole(gram: Gram) -> NDArray[np.float32]:
    (panel,) = gram.panels
    return panel


def order_of(name: str) -> tuple[bool, bool, int]:
    """The order of the data files: decoder, head, vision."""
    number = [int(part) for part in name.split(".") if part.isdigit()]
    return name.startswith("model.visual."), not number, number[0] if number else 0


@pytest.mark.parametrize("shape", ["tiny", "odd-heads6", "odd-mqa", "odd-axes"])
def test_the_sums_are_those_of_the_reference_model(
    shape: str,
    checkpoint_of: Checkpoints,
    reference_of: Callable[[Path], Any],
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", 48)  # several chunks per prompt, the last one shorter
    checkpoint = Checkpoint.open(checkpoint_of(shape))
    samples = read_calibration(prompts, checkpoint, checkpoint.config)
    wanted = reference_grams(reference_of(checkpoint_of(shape)), samples)
    assert min(len(sample.ids) for sample in samples.samples) > 48

    calibration = Calibration(checkpoint.tensors, checkpoint.config, samples, list(wanted))

    layers, depth = checkpoint.config.text.layers, checkpoint.config.vision.depth
    assert len(wanted) == 6 * layers + 1 + 5 * depth + 5
    for name in sorted(wanted, key=order_of):
        found, expected = whole(calibration.take(name)), wanted[name]
        # Two float32 computations of the same activations: each entry is a sum of products of two columns,
        # so its rounding is measured by the two columns' norms. Layers pass their rounding on.
        norms = np.sqrt(expected.diagonal())
        worst = np.abs(found - expected) / np.maximum(np.outer(norms, norms), 1e-12)
        assert worst.max() < 2e-5, name


class Store:
    """A checkpoint's tensors, with a list of what was read, and changed values."""

    def __init__(self, checkpoint: Checkpoint, **changed: float) -> None:
        self.tensors = checkpoint.tensors
        self.changed = {name.replace("__", "."): value for name, value in changed.items()}
        self.read: list[str] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(name)

    def rows(
        self, name: str, start: int, stop: int, *, permute: tuple[int, ...] | None = None
    ) -> NDArray[np.float32]:
        self.read.append(name)
        values = self.tensors.rows(name, start, stop, permute=permute)
        if name in self.changed:
            values[:] = self.changed[name]
        return values

    def release(self, name: str) -> None:
        self.tensors.release(name)


def test_a_wide_input_is_summed_in_panels_on_the_diagonal(
    tiny: Checkpoint, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = read_calibration(prompts, tiny, tiny.config)
    name = LAYER.format(0) + "mlp.down_proj.weight"
    full = whole(Calibration(tiny.tensors, tiny.config, samples, [name]).take(name))

    monkeypatch.setattr(gram_module, "PANEL", 40)
    gram = Calibration(tiny.tensors, tiny.config, samples, [name]).take(name)

    assert [len(panel) for panel in gram.panels] == [40, 40, 16]
    assert gram.tokens == samples.tokens
    for start, panel in zip((0, 40, 80), gram.panels, strict=True):
        part = full[start : start + len(panel), start : start + len(panel)]
        np.testing.assert_allclose(panel, part, rtol=1e-4, atol=1e-5 * part.max())
    assert gram_bytes(96) == sum(panel.nbytes for panel in gram.panels)


@pytest.mark.parametrize("columns", [1, 2, 4096, 4097, 13696])
def test_panels_cover_all_columns(columns: int) -> None:
    gram = Gram(columns)

    assert sum(len(panel) for panel in gram.panels) == columns
    assert max(len(panel) for panel in gram.panels) <= 4096
    assert gram_bytes(columns) == sum(panel.nbytes for panel in gram.panels)


def test_a_gram_matrix_is_given_away_once_and_not_kept(tiny: Checkpoint, prompts: Path) -> None:
    samples = read_calibration(prompts, tiny, tiny.config)
    q, k, o = (LAYER.format(0) + f"self_attn.{kind}_proj.weight" for kind in "qko")
    calibration = Calibration(tiny.tensors, tiny.config, samples, [q, k, o])

    first, second = calibration.take(q), calibration.take(k)
    assert first is second
    gone = weakref.ref(first)
    del first, second
    gc.collect()

    assert gone() is None
    with pytest.raises(ExportError, match="given away before"):
        calibration.take(q)
    calibration.take(o)


def test_only_what_is_wanted_is_run(tiny: Checkpoint, prompts: Path) -> None:
    samples = read_calibration(prompts, tiny, tiny.config)
    told: list[str] = []
    wanted = [LAYER.format(0) + "mlp.down_proj.weight", BLOCK.format(0) + "attn.qkv.weight"]

    calibration = Calibration(tiny.tensors, tiny.config, samples, wanted, told.append)
    assert told == []  # nothing before it is asked for
    for name in wanted:
        calibration.take(name)

    assert told == [
        "calibrating: looking at 3 pictures",
        "calibrating layer 1 of 2",
        "calibrating vision block 1 of 2",
    ]
    with pytest.raises(ExportError, match=r"no inputs of lm_head\.weight: not wanted"):
        calibration.take("lm_head.weight")


def test_a_layer_is_read_when_it_comes_up_and_once(tiny: Checkpoint, prompts: Path) -> None:
    store = Store(tiny)
    samples = read_calibration(prompts, tiny, tiny.config)
    wanted = [LAYER.format(i) + "self_attn.q_proj.weight" for i in (0, 1)] + ["lm_head.weight"]
    calibration = Calibration(store, tiny.config, samples, wanted)

    calibration.take(wanted[0])
    assert not any(name.startswith(LAYER.format(1)) for name in store.read)
    calibration.take(wanted[1])
    calibration.take(wanted[2])

    layers = [name for name in store.read if ".layers." in name]
    assert len(layers) == len(set(layers))
    assert "lm_head.weight" not in store.read  # its input is wanted, not its output


def test_a_set_without_pictures_does_for_the_decoder_but_not_for_the_vision_tower(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    path = write_set(tmp_path / "set", [user("hello")])
    samples = read_calibration(path, tiny, tiny.config)
    store = Store(tiny)

    Calibration(store, tiny.config, samples, ["lm_head.weight"]).take("lm_head.weight")

    assert not any(name.startswith("model.visual.") for name in store.read)
    options = ExportOptions(PRESETS["int4-all"].with_(refine="gptq"), calibration=path)
    with pytest.raises(ExportError, match=r"refines model\.visual\..* shows the vision tower no picture"):
        prepare(tiny, options)


def test_a_graph_that_fails_is_an_error_of_the_export(tiny: Checkpoint) -> None:
    probe = Probe(plan_norm(tiny.config))
    weights = probe.read_weights(tiny.tensors)

    with pytest.raises(ExportError, match="the calibration fails in the graph norm"):
        probe.run(weights, {"x": np.zeros((1, 3, 7), np.float32)}, ["y"])


def test_a_model_that_gives_no_numbers_is_named_by_the_matrix(tiny: Checkpoint, prompts: Path) -> None:
    samples = read_calibration(prompts, tiny, tiny.config)
    broken = Store(tiny, **{(LAYER.format(0) + "mlp.gate_up_proj.weight").replace(".", "__"): 1e30})
    name = LAYER.format(0) + "mlp.down_proj.weight"

    with pytest.raises(ExportError, match=f"inf or nan at the input of {name}"):
        Calibration(broken, tiny.config, samples, [name]).take(name)


def test_the_same_sums_come_out_every_time_and_whatever_else_is_wanted(
    tiny: Checkpoint, prompts: Path
) -> None:
    samples = read_calibration(prompts, tiny, tiny.config)
    last = LAYER.format(1) + "mlp.down_proj.weight"
    every = [LAYER.format(i) + f"mlp.{kind}_proj.weight" for i in (0, 1) for kind in ("gate_up", "down")]

    alone = Calibration(tiny.tensors, tiny.config, samples, [last]).take(last)
    calibration = Calibration(tiny.tensors, tiny.config, samples, every)
    together = [calibration.take(name) for name in every][-1]

    assert np.array_equal(whole(alone), whole(together))
