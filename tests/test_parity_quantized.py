"""INT4 and INT8 graphs against transformers with the dequantized weights.

At accuracy level 0 the kernels multiply fp32 activations with the dequantized weights, so nothing but
summation order is left and the fp32 tolerance holds. Level 4, the fast one, also rounds activations to 8 bits
per block; it has a bound of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import reference_logits
from test_parity import TOLERANCE, conversation

from autoglm_edge.export.checkpoint import Checkpoint
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.pipeline import prepare
from autoglm_edge.quantize.formats import dequantize_rows, quantize_rows
from autoglm_edge.quantize.recipe import Recipe, resolve

CASES = [
    ("int4", 32, False),
    ("int4", 64, False),
    ("int4", 128, False),
    ("int4", 32, True),
    ("int4", 64, True),
    ("int8", 32, True),
    ("int8", 128, False),
    ("int4-all", 32, False),
]


def dequantized(model: Any, checkpoint: Path, recipe: Recipe) -> Any:
    """The reference with balanced channels, and each matrix replaced by what its integers mean."""
    rounded = copy.deepcopy(model)
    store = prepare(Checkpoint.open(checkpoint), ExportOptions(recipe)).store
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            parameter.copy_(torch.tensor(store.rows(name, 0, len(parameter)).reshape(parameter.shape)))
            format = recipe.format_for(name)
            if format is None or not name.endswith("weight") or parameter.ndim < 2:
                continue
            values = parameter.numpy()
            if "downsample" in name:
                values = values.transpose(0, 2, 3, 1)
            rows = np.ascontiguousarray(values.reshape(len(values), -1))
            back = dequantize_rows(quantize_rows(rows, format), format, rows.shape[1]).reshape(values.shape)
            if "downsample" in name:
                back = back.transpose(0, 3, 1, 2)
            parameter.copy_(torch.tensor(np.ascontiguousarray(back)))
    return rounded


@pytest.mark.parametrize(("precision", "block", "symmetric"), CASES)
@pytest.mark.parametrize("geometry", ["tiny", "odd-head48"])
def test_quantized_graphs_equal_torch_with_the_dequantized_weights(
    geometry: str,
    precision: str,
    block: int,
    symmetric: bool,
    checkpoint_of: Callable[..., Path],
    engine_of: Callable[..., Any],
    reference_of: Callable[[Path], Any],
    pictures: list[Image.Image],
) -> None:
    checkpoint = checkpoint_of(geometry, dtype="float32")
    engine = engine_of(checkpoint, precision, block_size=block, symmetric=symmetric, accuracy_level=0)
    recipe = resolve(precision).with_(block_size=block, symmetric=symmetric, accuracy_level=0)
    reference = dequantized(reference_of(checkpoint), checkpoint, recipe)
    prompt = engine.prompt(conversation(pictures, 2))

    ours = engine.score(prompt.ids, pictures[:2])

    assert np.abs(ours - reference_logits(reference, prompt)).max() < TOLERANCE


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_fast_kernels_stay_near_the_exact_ones(
    precision: str,
    checkpoint_of: Callable[..., Path],
    engine_of: Callable[..., Any],
    pictures: list[Image.Image],
) -> None:
    checkpoint = checkpoint_of("tiny", dtype="float32")
    exact, fast = engine_of(checkpoint, precision, accuracy_level=0), engine_of(checkpoint, precision)
    prompt = exact.prompt(conversation(pictures, 1))

    difference = exact.score(prompt.ids, pictures[:1]) - fast.score(prompt.ids, pictures[:1])

    # 8-bit activations: about half a percent per product, on logits of spread 1.
    assert np.sqrt(np.mean(difference**2)) < 0.05
