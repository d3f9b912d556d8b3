"""Scales of an 8-bit KV cache: found by running the float model on prompts, one per layer, head and channel.

In: a checkpoint's tensors and settings, a `CalibrationSet`. Out: two vectors (K * D) per layer, and the
checkpoint's rows with these among them, as the writer reads them. Knows nothing of graphs and files.

The scales are static: they are stored once and serve every prompt, so that a cached row means the same
whatever comes after it. A channel's scale is

    scale = MARGIN * largest / 127

with the largest magnitude that the channel has on the prompts, except that rotated keys are not measured as
they lie in the cache: there a pair of channels turns with the position, so at other positions than those of
the prompts either of the two can become as large as the pair is long. `largest` is that length, for both.

What is larger still is cut to 127 steps. MARGIN says how much room there is before that happens: the prompts
are a sample, and the quantized model, whose cache it is, is not quite the float one. benchmarks/kv_int8.py
tells how much of the room new prompts take, and what other margins cost.

The float model runs as for a calibration (calibration.py), a layer at a time, whatever the recipe, so neither
memory nor scales depend on how the weights are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import ExportError
from autoglm_edge.export.graphs.decoder import STEM
from autoglm_edge.export.graphs.kv import SCALE_NAMES
from autoglm_edge.export.graphs.text import plan_layer
from autoglm_edge.export.source.config import ModelConfig
from autoglm_edge.export.weights.rows import Rows

from .calibration import CHUNK, first_states, run_layer
from .calibration_set import CalibrationSet
from .probe import Floats, Probe

KV_TOKENS = 4096
"""Tokens of a set that are run: a largest value needs fewer than a sum of squares does."""

MARGIN = 1.5
"""How many times the largest value that was seen can be stored."""

TOP = 127
LEAST = 1 / TOP
"""Least magnitude of a channel, in parts of the layer's largest: one that was never used must not be cut to
nothing when it is."""

Scales = dict[str, NDArray[np.float32]]
"""Vectors (K * D) by their names in the graphs."""


def scale_names(layer: int) -> tuple[str, str]:
    """Names of a layer's two vectors."""
    key, value = (f"{STEM}.layers.{layer}.self_attn.cache.{name}" for name in SCALE_NAMES)
    return key, value


def is_scale(name: str) -> bool:
    """Whether a weight of a plan is one of these vectors, hence not in any checkpoint."""
    ends = tuple(f".self_attn.cache.{kind}" for kind in SCALE_NAMES)
    return name.startswith(f"{STEM}.layers.") and name.endswith(ends)


def find_scales(
    store: Rows,
    config: ModelConfig,
    samples: CalibrationSet,
    tell: Callable[[str], None] = lambda detail: None,
    margin: float = MARGIN,
) -> Scales:
    """Run the prompts and measure.

    Args:
        store: tensors of the checkpoint, with balanced channels if the bundle has them.
        config: of the checkpoint, with the image budget of the set.
        samples: what to run.
        tell: called with what is about to be computed.
        margin: see the module.

    Raises:
        ExportError: the run fails, or gives no numbers.
    """
    text = config.text
    states = first_states(store, config, samples, tell)
    probe = Probe(plan_layer(config))
    found: Scales = {}
    for layer in range(text.layers):
        tell(f"measuring keys and values of layer {layer + 1} of {text.layers}")
        weights = probe.read_weights(store, "layer.", f"{STEM}.layers.{layer}.")
        keys = values = np.zeros((text.kv_heads, text.head_dim), np.float32)
        for sample, x in zip(samples.samples, states, strict=True):
            key, value = run_layer(probe, weights, config, sample, x)
            keys = np.maximum(keys, pair_lengths(key[0], text.rotary_dim).max(axis=1, initial=0))
            values = np.maximum(values, np.abs(value[0]).max(axis=1, initial=0))
        for name, largest in zip(scale_names(layer), (keys, values), strict=True):
            if not np.isfinite(largest).all():
                raise ExportError(
                    f"layer {layer} gives keys or values that are no numbers on the calibration prompts; "
                    "check the checkpoint"
                )
            found[name] = scales_of(largest, margin)
    return found


def pair_lengths(keys: Floats, rotary: int) -> Floats:
    """Magnitudes (..., D) of rotated keys (..., D); of the first `rotary` channels, of pairs, for both."""
    turning = keys[..., :rotary].reshape(*keys.shape[:-1], rotary // 2, 2)
    lengths = np.repeat(np.hypot(turning[..., 0], turning[..., 1]), 2, axis=-1)
    return np.concatenate([lengths, np.abs(keys[..., rotary:])], axis=-1)


def scales_of(largest: Floats, margin: float = MARGIN) -> NDArray[np.float32]:
    """Scales (K * D) of channels (K, D) with these largest magnitudes."""
    top = float(largest.max())
    floor = top * LEAST if top > 0 else 1.0
    return (np.maximum(largest, floor).ravel() * (margin / TOP)).astype(np.float32)


@dataclass(frozen=True)
class ScaledRows:
    """Rows of a checkpoint, and the scales among them.

    Attributes:
        inner: the checkpoint's.
        width: K * D.
        scales: by name; empty where only shapes are asked for.
    """

    inner: Rows
    width: int
    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Rows`."""
        return (self.width,) if is_scale(name) else self.inner.shape(name)

    def rows(
        self, name: str, start: int, stop: int, *, permute: tuple[int, ...] | None = None
    ) -> NDArray[np.float32]:
        """See `Rows`.

        Raises:
            ExportError: a scale that was not measured.
        """
        if not is_scale(name):
            return self.inner.rows(name, start, stop, permute=permute)
        if name not in self.scales:
            raise ExportError(f"{name} was not measured; report this with the version")
        return self.scales[name][start:stop, None]

    def release(self, name: str) -> None:
        """See `Rows`."""
        if not is_scale(name):
            self.inner.release(name)


def kv_operations(config: ModelConfig, samples: CalibrationSet) -> float:
    """Multiplications and additions of the run, for an estimate."""
    text, vision = config.text, config.vision
    layer = text.hidden * (2 * text.heads + 2 * text.kv_heads) * text.head_dim
    layer += 3 * text.hidden * text.intermediate
    block = vision.hidden * (4 * vision.hidden + 3 * vision.out_hidden)
    patches = sum(len(image.patches) for image in samples.images)
    return 2.0 * samples.tokens * text.layers * layer + 2.0 * patches * vision.depth * block


def kv_bytes(config: ModelConfig, samples: CalibrationSet) -> int:
    """Most bytes of the run that are in memory at once; as in calibration_cost.py, without the sums."""
    text, vision = config.text, config.vision
    width = (2 * text.heads + 2 * text.kv_heads) * text.head_dim
    layer = 4 * (text.hidden * width + 3 * text.hidden * text.intermediate)
    longest = max(len(sample.ids) for sample in samples.samples)
    decoder = layer + 4 * text.hidden * samples.tokens + 4 * CHUNK * (4 * text.intermediate + 3 * text.hidden)
    decoder += 16 * text.kv_heads * text.head_dim * longest
    patches = [len(image.patches) for image in samples.images]
    tower = 4 * vision.hidden * (4 * vision.hidden + 3 * vision.out_hidden)
    tower += 4 * sum(patches) * (vision.hidden + vision.head_dim)
    tower += 4 * max(patches, default=0) * (8 * vision.hidden + 3 * vision.out_hidden)
    return math.ceil(max(decoder, tower))
