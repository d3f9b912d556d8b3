"""What a calibration costs: arithmetic and memory, added up from shapes. Nothing is run.

In: settings, a set, the weights that want it. Out: operations and bytes, for an estimate. Follows
calibration.py and knows nothing of machines.
"""

from __future__ import annotations

from collections.abc import Collection

from autoglm_edge.export.graphs.plan import Weight
from autoglm_edge.export.graphs.vision import STEM as VISION
from autoglm_edge.export.source.config import ModelConfig

from .calibration import CHUNK
from .calibration_set import CalibrationSet
from .gram import PANEL, gram_bytes

_SAME_INPUT = ("k_proj.weight", "v_proj.weight", "up_proj.weight")
"""Matrices whose input is that of the one before; of the decoder's, gate_up_proj is one matrix."""

_FACTOR_PASSES = 2
"""Operations of making a panel of n columns ready for rounding: about 2 n³, in float64."""

_FACTOR_COPIES = 5
"""Float64 copies of a panel that are in memory meanwhile."""


def calibration_operations(
    config: ModelConfig, samples: CalibrationSet, weights: Collection[Weight]
) -> float:
    """Multiplications and additions of the float model, of the sums, and of making these ready.

    Args:
        config: of the checkpoint.
        samples: what is run.
        weights: those that want it.
    """
    text, vision = config.text, config.vision
    tokens, patches = samples.tokens, _patches(samples)
    columns = {weight.matrix: weight.columns for weight in weights}  # a matrix in slices counts once
    decoder = any(not name.startswith(VISION) for name in columns)
    tower = any(name.startswith(VISION) for name in columns)
    layer = text.hidden * (2 * text.heads + 2 * text.kv_heads) * text.head_dim
    layer += 3 * text.hidden * text.intermediate
    block = vision.hidden * (4 * vision.hidden + 3 * vision.out_hidden)
    once = 2.0 * decoder * tokens * text.layers * layer
    once += 2.0 * (decoder + tower) * patches * vision.depth * block
    for name, width in columns.items():
        if name.endswith(_SAME_INPUT) and not name.endswith("gate_up_proj.weight"):
            continue
        rows = patches if name.startswith(VISION) else tokens
        panel = min(width, PANEL)
        once += float(rows) * width * panel + _FACTOR_PASSES * float(panel) ** 2 * width
    return once


def calibration_bytes(config: ModelConfig, samples: CalibrationSet, weights: Collection[Weight]) -> int:
    """Most bytes that are in memory at once: of the decoder's passes, or of the vision tower's.

    How many activations onnxruntime holds was measured, 1.31 on the 9B model's shapes; the rest is counted.
    """
    text, vision = config.text, config.vision
    c, i, w = text.hidden, text.intermediate, vision.hidden
    columns = max(weight.columns for weight in weights)
    factor = _FACTOR_COPIES * 8 * min(columns, PANEL) ** 2
    layer = 4 * (c * (2 * text.heads + 2 * text.kv_heads) * text.head_dim + 3 * c * i)
    decoder = 4 * c * samples.tokens + max(layer + 4 * CHUNK * (4 * i + 3 * c), factor)
    decoder += 3 * gram_bytes(c) + gram_bytes(i)
    largest = max((len(image.patches) for image in samples.images), default=0)
    block = 4 * w * (4 * w + 3 * vision.out_hidden)
    tower = 4 * _patches(samples) * (w + vision.head_dim)
    tower += max(block + 4 * largest * (8 * w + 3 * vision.out_hidden), factor)
    tower += 3 * gram_bytes(w) + gram_bytes(vision.out_hidden)
    return max(decoder, tower)


def _patches(samples: CalibrationSet) -> int:
    return sum(len(image.patches) for image in samples.images)
