"""Sequences through the graphs of a bundle, without text: what is timed in a measurement of graphs.

In: a model, token ids. Out: nothing but the time it takes. Prompts go through the graphs as the engine sends
them: all but the last token in chunks without scores, then the last one. Knows no tokenizer, no template, no
reuse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.cache import KVCache
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.plan import PREFILL_CHUNK


class GraphSequence:
    """A model and a cache of its own."""

    def __init__(self, model: Model, capacity: int) -> None:
        """Reserve the cache.

        Args:
            model: of a bundle.
            capacity: tokens to hold.

        Raises:
            DeviceError: there is not enough memory.
        """
        self._model = model
        self.cache = model.new_cache(capacity)

    def reset(self) -> None:
        """Forget the sequence."""
        self.cache.clear()

    def feed(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        """Append text tokens and score the last of them.

        Raises:
            RequestError: there are none.
        """
        array = np.asarray(ids, np.int64)
        if array.ndim != 1 or not array.size:
            raise RequestError(f"ids have the shape {array.shape}, must be one token at least, in a row")
        before = len(array) - 1
        plan = self._model.plan
        chunk, by_decoder = plan.prefill_chunk, plan.by_decoder(before)
        for start in range(0, before, chunk):
            part = array[start : min(start + chunk, before)]
            self._model.prefill(
                self._model.embed(part), self._positions(len(part)), self.cache, by_decoder=by_decoder
            )
        self._model.forward(self._model.embed(array[before:]), self._positions(1), self.cache)

    def fill(self, count: int, random: np.random.Generator) -> None:
        """A cache of `count` tokens with random keys and values, which takes no compute."""
        fill(self.cache, count, random)

    def _positions(self, count: int) -> NDArray[np.int64]:
        start = self.cache.length
        return np.tile(np.arange(start, start + count, dtype=np.int64), (3, 1))


class GraphSequences:
    """Several sequences of one model, which are decoded together."""

    def __init__(self, model: Model, capacity: int, count: int) -> None:
        """Reserve the caches.

        Args:
            model: of a bundle.
            capacity: tokens of each sequence.
            count: of sequences.

        Raises:
            DeviceError: there is not enough memory.
        """
        self._model = model
        self._slots = model.new_slots(capacity, count)

    def fill(self, count: int, random: np.random.Generator) -> None:
        """Random keys and values of `count` tokens in each sequence."""
        for cache in self._slots.caches:
            fill(cache, count, random)

    def truncate(self, count: int) -> None:
        """Forget the tokens of each sequence from `count` on."""
        for cache in self._slots.caches:
            cache.truncate(min(count, cache.length))

    def feed(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        """Append a token to each of the first sequences and score it."""
        embeds = self._model.embed(np.asarray(ids, np.int64)).swapaxes(0, 1)
        places = [cache.length for cache in self._slots.caches[: len(ids)]]
        self._model.forward_each(embeds, np.tile(np.array(places, np.int64), (3, 1)), self._slots)


def fill(cache: KVCache, count: int, random: np.random.Generator) -> None:
    """Random keys and values of `count` tokens, whatever was there."""
    cache.clear()
    while (start := cache.length) < count:
        part = min(PREFILL_CHUNK, count - start)
        shape = (*cache.row_shape[:3], part, cache.row_shape[4])
        cache.write(start, random.standard_normal(shape, np.float32).astype(cache.dtype, copy=False))
