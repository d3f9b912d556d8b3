"""Calibration: the float model runs prompts layer by layer, and the inputs of its matrices are summed up.

In: a checkpoint's tensors and settings, a `CalibrationSet`, and names of matrices. Out: the Gram matrix of
the input of each, in the order of the data files, each computed when it is asked for. Knows nothing of
number formats.

The graphs are those of the export, one layer at a time (`text.plan_layer`, `vision.plan_block` and so on), in
float32, on onnxruntime, with weights read from the checkpoint as a layer comes up (`probe.Probe`). What is
propagated is the float model, whatever has been quantized before it, so the sums depend on checkpoint and set
alone and an export that goes on after an interruption finds the same ones. Images are looked up first; where
matrices of the vision tower are wanted too, its blocks run once more, as its file is written last.

Memory does not grow with the number of layers. With C the width, I the inner width and W the width of the
vision tower, in float32:

    hidden states   4 C bytes per token                             16 kB for the 9B model, 134 MB in all
    in the tower    4 (W + head size) per patch, four to a token    6.7 kB, and up to 220 MB in all
    weights         of the layer at work                            816 MB; of a vision block 113 MB
    sums            4 (3 C² + I PANEL) per layer, at most           411 MB, given away matrix by matrix
    activations     of CHUNK tokens, or of the largest picture      137 MB; 98 kB per patch
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import ExportError
from autoglm_edge.export.graphs.decoder import STEM as TEXT
from autoglm_edge.export.graphs.text import plan_layer, plan_norm
from autoglm_edge.export.graphs.vision import STEM as VISION
from autoglm_edge.export.graphs.vision import plan_block, plan_stem, plan_top
from autoglm_edge.export.source.config import ModelConfig
from autoglm_edge.export.source.shapes import EMBEDDING, HEAD
from autoglm_edge.export.weights.rows import Rows

from .calibration_set import CalibrationSet, Sample
from .gram import Gram
from .probe import Floats, Probe

CHUNK = 512
"""Tokens that go through a decoder layer at once, as in the runtime's prefill."""

Grams = dict[str, Gram]


class Calibration:
    """Gram matrices of a set, computed when they are asked for, and forgotten when they were given away."""

    def __init__(
        self,
        store: Rows,
        config: ModelConfig,
        samples: CalibrationSet,
        wanted: Collection[str],
        tell: Callable[[str], None] = lambda detail: None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            store: tensors of the checkpoint.
            config: of the checkpoint, with the image budget of the set.
            samples: what to run.
            wanted: names of matrices in the graphs (`lm_head.weight` for a tied head, too).
            tell: called with what is about to be computed.
        """
        tower = _Tower(store, config, samples, tell)
        vision = {name for name in wanted if name.startswith(f"{VISION}.")}
        text = set(wanted) - vision
        self._passes = (
            (text, _decoder(store, config, samples, tower, text, tell)),
            (vision, tower.run(vision)),
        )
        self._held: Grams = {}

    def take(self, name: str) -> Gram:
        """The Gram matrix of the input of a matrix, once; the same object for matrices of the same input.

        Matrices are to be asked for in the order of their layers: first those of the decoder and the head,
        then those of the vision tower; within a layer in any order.

        Raises:
            ExportError: the run fails, or gives no numbers; or this matrix was not wanted or taken before.
        """
        for wanted, steps in self._passes:
            while name in wanted and name not in self._held:
                grams = next(steps, None)
                if grams is None:
                    break
                self._held.update(grams)
        if name not in self._held:
            raise ExportError(f"the calibration has no inputs of {name}: not wanted, or given away before")
        gram = self._held.pop(name)
        gram.check(name)
        return gram


def _decoder(
    store: Rows,
    config: ModelConfig,
    samples: CalibrationSet,
    tower: _Tower,
    wanted: Collection[str],
    tell: Callable[[str], None],
) -> Iterator[Grams]:
    """Layer after layer, and the head, as far as anything is wanted."""
    text = config.text
    stems = [f"{TEXT}.layers.{index}." for index in range(text.layers)]
    counts = [sum(name.startswith(stem) for name in wanted) for stem in stems]
    last = (
        text.layers if HEAD in wanted else max((i + 1 for i, count in enumerate(counts) if count), default=0)
    )
    if not last:
        return
    states = _embed(store, config, samples, tower.features())  # (T, C) each
    probe = Probe(plan_layer(config))
    for index, stem in enumerate(stems[:last]):
        tell(f"calibrating layer {index + 1} of {text.layers}")
        weights = probe.read_weights(store, "layer.", stem)
        sums = Sums(probe, wanted, "layer.", stem)
        for sample, x in zip(samples.samples, states, strict=True):
            run_layer(probe, weights, config, sample, x, sums)
        del weights  # a layer's weights are not in memory while its matrices are rounded
        if counts[index]:
            yield sums.hand_over()
    if HEAD in wanted:
        tell("calibrating the head")
        norm = Probe(plan_norm(config))
        weights = norm.read_weights(store)
        gram = Gram(text.hidden)
        for x in states:
            gram.add(norm.run(weights, {"x": x[None]}, ["y"])[0][0])
        yield {HEAD: gram}


def first_states(
    store: Rows, config: ModelConfig, samples: CalibrationSet, tell: Callable[[str], None]
) -> list[Floats]:
    """What the first decoder layer is given: hidden states (T, C) of each sample, pictures looked at."""
    return _embed(store, config, samples, _Tower(store, config, samples, tell).features())


def run_layer(
    probe: Probe,
    weights: Mapping[str, Floats],
    config: ModelConfig,
    sample: Sample,
    x: Floats,
    sums: Sums | None = None,
) -> tuple[Floats, Floats]:
    """Run one sample through a decoder layer, CHUNK tokens at a time.

    Args:
        probe: of `plan_layer`.
        weights: of the layer.
        config: of the checkpoint.
        sample: its positions are used.
        x: (T, C) hidden states, replaced by those after the layer.
        sums: told of the inputs of matrices.

    Returns:
        Keys, rotated, and values: (1, K, T, D) each.
    """
    text = config.text
    key = value = np.zeros((1, text.kv_heads, 0, text.head_dim), np.float32)
    for start in range(0, len(x), CHUNK):
        part = slice(start, min(start + CHUNK, len(x)))
        feeds: dict[str, NDArray[Any]] = {
            "x": x[None, part],
            "attention_mask": np.ones((1, part.stop), np.int64),
            "position_ids": np.ascontiguousarray(sample.positions[:, None, part]),
            "past.key": key,
            "past.value": value,
        }
        fetches = ["y", "present.key", "present.value", *(sums.outputs if sums else ())]
        y, key, value, *inputs = probe.run(weights, feeds, fetches)
        if sums:
            sums.add(inputs)
        x[part] = y[0]
    return key, value


def _embed(
    store: Rows, config: ModelConfig, samples: CalibrationSet, features: list[list[Floats]]
) -> list[Floats]:
    """Hidden states (T, C) per sample: rows of the table, with image features over the placeholders.

    What the embedding graph does, for the rows that occur only: the whole table is 2.5 GB.
    """
    used = np.unique(np.concatenate([sample.ids for sample in samples.samples]))
    table = np.concatenate([store.rows(EMBEDDING, int(row), int(row) + 1) for row in used])
    store.release(EMBEDDING)
    states = []
    for sample, pictures in zip(samples.samples, features, strict=True):
        x = table[np.searchsorted(used, sample.ids)]
        places = np.flatnonzero(sample.ids == config.tokens.image)
        if pictures:
            x[places] = np.concatenate(pictures)[: len(places)]
        states.append(x)
    return states


class _Tower:
    """The vision tower over all pictures of a set."""

    def __init__(
        self, store: Rows, config: ModelConfig, samples: CalibrationSet, tell: Callable[[str], None]
    ) -> None:
        self._store, self._config, self._samples, self._tell = store, config, samples, tell

    def features(self) -> list[list[Floats]]:
        """Image features (N, C), per sample and picture."""
        found: list[Floats] = []
        if self._samples.images:
            self._tell(f"calibrating: looking at {len(self._samples.images)} pictures")
            for _ in self._stages(frozenset(), found):
                pass
        rest = iter(found)
        return [[next(rest) for _ in sample.images] for sample in self._samples.samples]

    def run(self, wanted: Collection[str]) -> Iterator[Grams]:
        """Block after block, and the top, as far as anything is wanted."""
        return self._stages(wanted, None)

    def _stages(self, wanted: Collection[str], features: list[Floats] | None) -> Iterator[Grams]:
        """Yields where something is wanted, and ends after that; or goes all the way and fills `features`."""
        depth = self._config.vision.depth
        left = set(wanted)
        if features is None and not left:
            return
        states = self._stem()
        probe = Probe(plan_block(self._config))
        for index in range(depth):
            if features is None:
                if not left:
                    return
                self._tell(f"calibrating vision block {index + 1} of {depth}")
            stem = f"{VISION}.blocks.{index}."
            weights = probe.read_weights(self._store, "block.", stem)
            sums = Sums(probe, wanted, "block.", stem)
            for state in states:
                state["x"], *inputs = probe.run(weights, state, ["y", *sums.outputs])
                sums.add(inputs)
            del weights
            if sums.grams:
                left -= set(sums.grams)
                yield sums.hand_over()
        if features is None:
            if not left:
                return
            self._tell("calibrating the top of the vision tower")
        probe = Probe(plan_top(self._config))
        weights = probe.read_weights(self._store)
        sums = Sums(probe, wanted)
        for state in states:
            found, *inputs = probe.run(weights, {"x": state["x"]}, ["image_features", *sums.outputs])
            sums.add(inputs)
            if features is not None:
                features.append(found)
        if sums.grams:
            yield sums.hand_over()

    def _stem(self) -> list[dict[str, Floats]]:
        """Per picture x (1, P, W), cos and sin (1, P, head size / 2)."""
        probe = Probe(plan_stem(self._config))
        weights = probe.read_weights(self._store)
        states = []
        for image in self._samples.images:
            feeds: dict[str, NDArray[Any]] = {
                "pixel_values": image.pixel_values,
                "image_grid_thw": np.array([image.grid], np.int64),
            }
            x, cos, sin = probe.run(weights, feeds, ["x", "cos", "sin"])
            states.append({"x": x, "cos": cos, "sin": sin})
        return states


class Sums:
    """The Gram matrices of one layer, one for each distinct input that is wanted.

    Attributes:
        outputs: graph outputs that `add` takes.
        grams: by name of the matrix in the bundle's graphs; empty until something was added.
    """

    def __init__(self, probe: Probe, wanted: Collection[str], own: str = "", stem: str = "") -> None:
        self._names: dict[str, list[str]] = {}
        for name, output in probe.inputs_of.items():
            whole = stem + name.removeprefix(own)
            if whole in wanted:
                self._names.setdefault(output, []).append(whole)
        self.outputs = list(self._names)
        self.grams: Grams = {}

    def add(self, inputs: list[Floats]) -> None:
        """Add the outputs of a run, (T, K) or (1, T, K) each."""
        for output, values in zip(self.outputs, inputs, strict=True):
            rows = values.reshape(-1, values.shape[-1])
            names = self._names[output]
            if names[0] not in self.grams:
                gram = Gram(rows.shape[1])
                self.grams.update({name: gram for name in names})
            self.grams[names[0]].add(rows)

    def hand_over(self) -> Grams:
        """The matrices, which are not held here any more."""
        grams, self.grams = self.grams, {}
        return grams
