"""A model whose keys and values tell how they came about, for tests of reuse without a graph.

The row of a token is a number made of the row before it, the token, its picture and position, and the graph
that computed it. So a cache is right if and only if all its rows are those of a cold run, which `cold` gives
without any cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from autoglm_edge.runtime.manifest import TokenSpec
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.prompt.image import PatchedImage
from autoglm_edge.runtime.prompt.positions import image_positions

VOCAB = 24
LEAST = 8
"""Fewest tokens that the fake model prefills with a graph of its own."""
LAYERS_FROM = 90
"""Tokens of the shortest prompt that it reads layer by layer."""
LAYERS, LAYER_CHUNK = 3, 32
TOKENS = TokenSpec(eos=(1,), pad=None, image=2, image_start=3, image_end=4)
_MASK = (1 << 61) - 1


def picture(seed: int, height: int = 1, width: int = 2) -> PatchedImage:
    """A picture of height * width tokens; seed is what it shows."""
    patches = np.full((4 * height * width, 3, 1, 1), seed, np.uint8)
    values = np.zeros((3, 256), np.float32)
    return PatchedImage(patches, values, 2, (1, 2 * height, 2 * width), height * width, (width, height))


def feature(image: PatchedImage) -> np.ndarray:
    """(N, 1) features: what the picture shows, and the place in it."""
    return 1000.0 * (1 + image.patches[0, 0, 0, 0]) + np.arange(image.tokens, dtype=np.float64)[:, None]


def make_prompt(parts: list[Any]) -> Prompt:
    """A prompt of ids and pictures, in order."""
    ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, PatchedImage):
            ids += [TOKENS.image_start, *[TOKENS.image] * part.tokens, TOKENS.image_end]
            images.append(part)
        else:
            ids.append(part)
    array = np.array(ids, np.int64)
    positions, after = image_positions(array, [image.grid for image in images], TOKENS.image, 2)
    return Prompt(array, tuple(images), positions, after, "")


class FakeCache:
    """The interface of KVCache, a row of one number; what lies behind the end is poison."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.dtype = np.dtype(np.int64)
        self.row_shape = (1, 2, 1, 0, 1)
        self.row_bytes = 16
        self.rows = np.full((1, 2, 1, capacity, 1), -1, np.int64)

    @property
    def states(self) -> list[int]:
        values: list[int] = self.rows[0, 0, 0, : self.length, 0].tolist()
        return values

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.rows[:, :, :, length:] = -1
        self.length = length

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.length
        return self.rows[:, :, :, start:stop].copy()

    def write(self, start: int, rows: np.ndarray) -> None:
        assert start <= self.length and start + rows.shape[3] <= self.capacity
        self.truncate(start)
        self.rows[:, :, :, start : start + rows.shape[3]] = rows
        self.length = start + rows.shape[3]

    def copy_from(self, other: FakeCache, start: int, stop: int) -> None:
        assert start <= self.length and stop <= other.length
        self.write(start, other.read(start, stop))

    def append(self, states: list[int]) -> None:
        self.rows[:, :, :, self.length : self.length + len(states), 0] = states
        self.length += len(states)


class FakeSlots:
    """The interface of KVSlots."""

    joined = True

    def __init__(self, capacity: int, count: int) -> None:
        self.caches = tuple(FakeCache(capacity) for _ in range(count))
        self.swaps = 0

    def swap(self, first: int, second: int) -> None:
        """Rows that a cache does not count yet are lost, as in the real one."""
        one, two = self.caches[first], self.caches[second]
        there, back = one.rows[:, :, :, : one.length].copy(), two.rows[:, :, :, : two.length].copy()
        for cache, rows in ((one, back), (two, there)):
            cache.truncate(0)
            cache.write(0, rows)
        self.swaps += 1


def next_state(before: int, token: float, position: Any, graph: int) -> int:
    return hash((before, int(token), *position, graph)) & _MASK


def favourite(state: int, token: float) -> int:
    """The likeliest next id: mostly a matter of the last one, so that answers repeat themselves."""
    return 5 + (state % 19 if state % 6 == 0 else int(token * 7 + 3) % 6)


@dataclass
class FakeModel:
    """The interface of Model; counts what it computes, and fails when told to.

    It reads prompts by the decoder, by an integer graph or, if they are long enough, layer by layer.
    """

    integer: bool = False
    layers: bool = False
    encoded: list[int] = field(default_factory=list)
    computed: int = 0
    runs: list[int] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    fail_after: int = -1
    caches: list[FakeCache] = field(default_factory=list)
    expanded: int = 0
    pieces: int = 0

    @property
    def prompt_from(self) -> int:
        return LAYERS_FROM if self.layers else LEAST if self.integer else 10**9

    @property
    def plan(self) -> Any:
        return SimpleNamespace(
            prefill="layers" if self.layers else "integer" if self.integer else "decoder",
            by_decoder=lambda tokens: tokens < self.prompt_from,
            prefill_chunk=192 if self.layers else 64,
            takes_breaks=self.layers,
        )

    @property
    def options(self) -> Any:
        return SimpleNamespace(device="cpu")

    def new_slots(self, capacity: int, count: int) -> FakeSlots:
        slots = FakeSlots(capacity, count)
        self.caches.extend(slots.caches)
        return slots

    def encode_image(self, image: PatchedImage) -> np.ndarray:
        self.encoded.append(int(image.patches[0, 0, 0, 0]))
        self._maybe_fail()
        return feature(image)

    def embed(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        places = ids == TOKENS.image
        assert places.sum() == (0 if features is None else len(features))
        embeds = ids.astype(np.float64)[None, :, None]
        if features is not None:
            embeds[0, places] = features
        return embeds

    def prefill_pieces(
        self, embeds: np.ndarray, positions: np.ndarray, cache: FakeCache, *, by_decoder: bool
    ) -> Iterator[None]:
        assert by_decoder or embeds.shape[1] >= LEAST
        if by_decoder or not self.layers:
            self.pieces += 1
            self._run(embeds, positions, cache, int(not by_decoder))
            yield
            return
        assert not self.expanded, "the weights of a layer are there once only"
        self.expanded += 1
        try:
            yield from self._layer_by_layer(embeds, positions, cache)
        finally:
            self.expanded -= 1

    def _layer_by_layer(self, embeds: np.ndarray, positions: np.ndarray, cache: FakeCache) -> Iterator[None]:
        start, count = cache.length, embeds.shape[1]
        states = self._states(embeds, positions, cache, 1)
        for layer in range(LAYERS):
            for first in range(0, count, LAYER_CHUNK):
                if layer or first:
                    yield
                self.pieces += 1
                self._maybe_fail()
                assert cache.length == start
                part = states[first : first + LAYER_CHUNK]
                cache.rows[:, :, :, start + first : start + first + len(part), 0] = part
                if layer == LAYERS - 1:
                    self.computed += len(part)
        cache.length = start + count

    def forward_each(self, embeds: np.ndarray, positions: np.ndarray, slots: FakeSlots) -> np.ndarray:
        assert embeds.shape[1] == 1
        rows = [
            self.forward(embeds[row : row + 1], positions[:, row : row + 1], cache)
            for row, cache in enumerate(slots.caches[: len(embeds)])
        ]
        self.together.append(len(rows))
        return np.concatenate(rows)

    def forward(
        self, embeds: np.ndarray, positions: np.ndarray, cache: FakeCache, keep: int = 1
    ) -> np.ndarray:
        states = self._run(embeds, positions, cache, 0)
        self.runs.append(len(states))
        scores = np.zeros((len(states), VOCAB), np.float32)
        for row, (state, token) in enumerate(zip(states, embeds[0, :, 0], strict=True)):
            scores[row, favourite(state, token)] = 1
        return scores[-keep:] if keep else scores

    def _run(self, embeds: np.ndarray, positions: np.ndarray, cache: FakeCache, graph: int) -> list[int]:
        self._maybe_fail()
        states = self._states(embeds, positions, cache, graph)
        cache.append(states)
        self.computed += len(states)
        return states

    def _states(self, embeds: np.ndarray, positions: np.ndarray, cache: FakeCache, graph: int) -> list[int]:
        assert positions.shape == (3, embeds.shape[1])
        state = int(cache.rows[0, 0, 0, cache.length - 1, 0]) if cache.length else 0
        states = []
        for token, position in zip(embeds[0, :, 0].tolist(), positions.T.tolist(), strict=True):
            state = next_state(state, token, position, graph)
            states.append(state)
        return states

    def _maybe_fail(self) -> None:
        if self.fail_after >= 0:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise KeyboardInterrupt


@dataclass
class Cold:
    """What an answer must be: rows of prompt and answer but its last token, and the sampled ids."""

    states: list[int]
    ids: list[int]


def cold(prompt: Prompt, budget: int, *, integer: bool = False, layers: bool = False) -> Cold:
    """Compute an answer without model or cache."""
    apart = len(prompt.ids) > FakeModel(integer, layers).prompt_from
    values = prompt.ids.astype(np.float64)
    if prompt.images:
        values[prompt.ids == TOKENS.image] = np.concatenate([feature(image)[:, 0] for image in prompt.images])
    states: list[int] = []
    state = 0
    for index, (value, position) in enumerate(zip(values.tolist(), prompt.positions.T.tolist(), strict=True)):
        graph = int(apart and index < len(values) - 1)
        state = next_state(state, value, position, graph)
        states.append(state)
    ids: list[int] = []
    value = values[-1]
    for count in range(budget):
        ids.append(favourite(state, value))
        if count < budget - 1:
            value = float(ids[-1])
            state = next_state(state, value, [prompt.next_position + count] * 3, 0)
            states.append(state)
    return Cold(states, ids)
