"""A long prompt, layer by layer: each layer's weights are expanded to 8 bits once and serve all tokens.

In: hidden states of a whole prompt, and a cache. Out: the cache, with keys and values of these tokens. Knows
the graph of one layer (docs/bundle.md, "The layer"); knows nothing of prompts and scores.

The decoder's 4-bit kernel does not use the integer units that CPUs have for long prompts. 8-bit integers do,
but stored beside the 4-bit ones they take twice the disk again. Made from them a layer at a time they take
204 MB for the 9B model, while the prompt runs, and the time of expanding, which is the same for 100 tokens
and for 10,000: hence layer by layer and not, as elsewhere, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.cache import KVCache
from autoglm_edge.runtime.session import Binding, SessionOptions, open_session, shrinking_run

from .expansion import expand
from .index import AGAIN, LayerWeights, cut_array, read_index

CHUNK = 512
"""Tokens per run: more of them leave the CPU's cache, and take longer each."""

_STREAM = ("x", "attention_mask", "position_ids", "past.key", "past.value")
_RESULTS = ("y", "present.key", "present.value")


class Layers:
    """Runs prompts through a bundle's decoder, a layer at a time."""

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        """Read the index and open the graph; weights are not touched.

        Raises:
            BundleError: the bundle's parts do not fit together.
        """
        parts = bundle.manifest.parts
        self._index = read_index(bundle.file(parts["layer"].data), bundle.manifest.geometry.layers).layers
        graph = bundle.file(parts["layer"].graph)
        self._session = open_session(graph, options)
        given = {value.name: value.shape for value in self._session.get_inputs()}
        wanted = self._index[0].shapes
        wrong = {name for name in wanted if list(wanted[name]) != given.get(name)}
        wrong |= given.keys() ^ {*wanted, *_STREAM}
        wrong |= {value.name for value in self._session.get_outputs()} ^ {*_RESULTS}
        if wrong:
            raise BundleError(f"{graph} and its index disagree about {min(wrong)}; {AGAIN}")
        self._data = np.memmap(bundle.file(parts["decoder"].data), np.uint8, "r")
        for layer in self._index:  # so that an index that leads astray is found now
            for matrix in layer.matrices:
                matrix.read(self._data)
            for vector in layer.vectors:
                cut_array(self._data, vector.offset, (vector.length,), np.float32, vector.name)
        self._threads = options.thread_count
        self._shrink = shrinking_run()

    def prefill(
        self,
        embeds: NDArray[np.float32],
        positions: NDArray[np.int64],
        cache: KVCache,
    ) -> Iterator[None]:
        """Append T tokens to the cache.

        Args:
            embeds: (1, T, C).
            positions: (3, T).
            cache: holds the P tokens before; holds P + T when the iterator has ended, and P if it is closed
                before that.

        Returns:
            Iterator that takes a break between runs of the graph.

        Raises:
            BundleError: the graph fails.
            DeviceError: there is not enough memory.
        """
        start, tokens = cache.length, embeds.shape[1]
        stream = np.array(embeds, np.float32)
        grown = np.empty_like(stream)
        shapes = self._index[0].shapes
        weights: dict[str, NDArray[Any]] = {
            name: np.empty(shape, np.float32 if len(shape) == 1 else np.int8)
            for name, shape in shapes.items()
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
        places = np.ascontiguousarray(positions[:, None])
        with ThreadPoolExecutor(self._threads, "expand") as pool:
            for number, layer in enumerate(self._index):
                if number:
                    yield
                self._load(layer, weights, pool)
                binding = Binding(
                    self._session,
                    {**values, **_renamed(cache.past, f"past_key_values.{number}.", "past.")},
                    _renamed(cache.present, f"present.{number}.", "present."),
                )
                for first in range(0, tokens, CHUNK):
                    if first:
                        yield
                    part = slice(first, min(first + CHUNK, tokens))
                    feeds = {
                        "x": stream[:, part],
                        "attention_mask": np.ones((1, start + part.stop), np.int64),
                        "position_ids": np.ascontiguousarray(places[:, :, part]),
                    }
                    # Memory that is given back is touched anew by the next run, which takes longer than most
                    # operators: so at the end only.
                    last = number == len(self._index) - 1 and part.stop == tokens
                    binding.run(feeds, {"y": grown[:, part]}, self._shrink if last else None)
                stream, grown = grown, stream
        cache.length = start + tokens

    def _load(self, layer: LayerWeights, weights: dict[str, NDArray[Any]], pool: ThreadPoolExecutor) -> None:
        for matrix in layer.matrices:
            expand(
                matrix.read(self._data), weights[matrix.weight], weights[matrix.scales], pool, self._threads
            )
        for vector in layer.vectors:
            weights[vector.name][:] = cut_array(
                self._data, vector.offset, (vector.length,), np.float32, vector.name
            )


def _renamed(values: dict[str, ort.OrtValue], prefix: str, instead: str) -> dict[str, ort.OrtValue]:
    """Those values whose names begin so, under new names."""
    return {
        instead + name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }
