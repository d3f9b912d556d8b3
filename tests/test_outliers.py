"""Outlier channels, put into a random checkpoint that goes on computing the same: what rounding does.

A channel whose activation is s times as large, and whose column of weights is s times as small, is the same
product. Blocks that share a scale with it see it on both sides: 8-bit activations become coarse for their
neighbours, and the small column becomes coarse among larger ones. An export that balances channels takes that
out again. benchmarks/outliers.py measures the same on the trained pocket model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outlier_channels import inject, links, read_tensors, write_checkpoint
from PIL import Image
from test_parity import conversation

from autoglm_edge.parity.metrics import kl_divergence
from autoglm_edge.quantize.recipe import PRESETS

SCALES = (1, 10, 100)

BUNDLES = [("int8", None), ("int8-blocks", 1), ("int8-blocks", 4), ("int4", 1), ("int4", 4)]
"""Preset and accuracy level; scales per channel have none."""

GROWTH = 1.5
"""By how much the divergence may grow with the outliers, whatever their scale: other weights share blocks."""


@pytest.fixture(scope="module")
def original(checkpoint_of: Callable[..., Path]) -> Path:
    return checkpoint_of("tiny", dtype="float32")


@pytest.fixture(scope="module")
def checkpoint_with(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """A checkpoint with outliers of a scale."""

    @functools.cache
    def make(scale: float) -> Path:
        folder = tmp_path_factory.mktemp("outliers") / f"{scale:g}"
        return write_checkpoint(inject(read_tensors(original), scale), original, folder)

    return make


@pytest.fixture(scope="module")
def divergence(
    original: Path,
    checkpoint_with: Callable[[float], Path],
    engine_of: Callable[..., Any],
    pictures: list[Image.Image],
) -> Callable[..., float]:
    """Mean KL of a quantized bundle of a checkpoint with outliers, from the fp32 bundle of the original."""

    def logits(engine: Any) -> np.ndarray:
        prompt = engine.prompt(conversation(pictures, 2))
        return engine.score(prompt.ids, pictures[:2])

    right = logits(engine_of(original))

    @functools.cache
    def measure(scale: float, precision: str, level: int | None = None, balanced: bool = True) -> float:
        recipe = PRESETS[precision].with_(accuracy_level=level)
        if not balanced:
            recipe = replace(recipe, balance=False)
        engine = engine_of(checkpoint_with(scale), recipe=recipe)
        return float(kl_divergence(right, logits(engine)).mean())

    return measure


def test_links_reach_every_matrix_behind_a_norm_and_every_way_down(original: Path) -> None:
    tensors = read_tensors(original)
    found = list(links(tensors))

    readers = {name for link in found for name in link.readers}
    expected = {
        name
        for name in tensors
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_up_proj.weight"))
        or name.endswith(("mlp.down_proj.weight", "attn.qkv.weight", "lm_head.weight"))
        or (".blocks." in name and name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")))
    }
    assert readers == expected
    assert len({link.source for link in found if link.rows == slice(0, None)}) + len(
        [link for link in found if link.rows != slice(0, None)]
    ) == len(found)


@pytest.mark.parametrize("scale", SCALES)
def test_injected_channels_are_larger_by_the_scale_and_few(original: Path, scale: int) -> None:
    before = read_tensors(original)
    after = inject(before, scale)

    for link in (item for item in links(before) if before[item.source].ndim == 1):
        grown = after[link.source] / before[link.source]
        assert set(np.unique(np.round(grown))) <= {1.0, float(scale)}
        assert scale == 1 or 0 < (np.round(grown) == scale).sum() <= max(1, len(grown) // 32)


@pytest.mark.parametrize("scale", SCALES)
def test_the_float_model_is_the_same_with_outlier_channels(
    scale: int, divergence: Callable[..., float]
) -> None:
    # Weights are rounded once more, by 6e-8 of their size; logits move by 1e-5, and KL goes with the square.
    assert divergence(scale, "fp32") < 1e-9


@pytest.mark.parametrize(("precision", "level"), BUNDLES)
@pytest.mark.parametrize("scale", SCALES[1:])
def test_outliers_cost_a_quantized_bundle_nothing(
    scale: int, precision: str, level: int | None, divergence: Callable[..., float]
) -> None:
    assert divergence(scale, precision, level) < GROWTH * divergence(1, precision, level)


@pytest.mark.parametrize(("precision", "level"), BUNDLES)
def test_balancing_costs_a_model_without_outliers_nothing(
    precision: str, level: int | None, divergence: Callable[..., float]
) -> None:
    plain = divergence(1, precision, level, balanced=False)

    assert divergence(1, precision, level) < GROWTH * plain


@pytest.mark.parametrize(
    ("precision", "level", "least"),
    [("int8", None, 50), ("int8-blocks", 4, 50), ("int8-blocks", 1, 20), ("int4", 4, 4)],
)
def test_without_balancing_they_cost_a_lot(
    precision: str, level: int | None, least: float, divergence: Callable[..., float]
) -> None:
    """Float activations alone, at level 1, do not help: the small columns are rounded among larger ones."""
    plain = divergence(1, precision, level, balanced=False)

    assert divergence(100, precision, level, balanced=False) > least * plain
