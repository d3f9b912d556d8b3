"""Prompts through a decoder of block-quantized weights on the compiled kernels, a layer at a time.

In: hidden states of a prompt, and a cache. Out: the cache, with keys and values of these tokens. What
`layerwise.layers` does with a graph and expanded weights, this does without either: 4-bit weights become
bytes inside a core's cache, so nothing but activations takes memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError, DeviceError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.cache import KVCache
from autoglm_edge.runtime.layerwise.index import read_index

from .crew import Crew
from .layer import Layer, rotary_angles
from .space import Space
from .trace import Trace
from .unit import Unit, kernels
from .weights import Weights, Widths, check_widths

WIDEST_HEAD = 256
"""Values of a head that the kernels have room for."""


class NativeLayers:
    """Runs prompts through a bundle's decoder, a layer at a time."""

    def __init__(
        self, bundle: Bundle, threads: int, unit: Unit = Unit.MATRICES, traces: Path | None = None
    ) -> None:
        """Read the index; weights are not touched.

        Args:
            bundle: one that `can_run_natively`.
            threads: of one kernel.
            unit: what multiplies.
            traces: a folder in which a trace of all kernels is left at the end, as in SessionOptions.

        Raises:
            BundleError: the bundle's parts do not fit together.
        """
        manifest = bundle.manifest
        index = read_index(bundle.file(manifest.parts["layer"].data), manifest.geometry.layers)
        if index.form is None:
            raise BundleError(
                f"{bundle.path} does not say what its layers compute; export the checkpoint again"
            )
        data = np.memmap(bundle.file(manifest.parts["decoder"].data), np.uint8, "r")
        self._weights = [Weights(layer, data) for layer in index.layers]
        shape = manifest.geometry
        widths = Widths(
            shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, self._weights[0].inner, index.form
        )
        check_widths(self._weights, widths)
        self._layer = Layer(widths, unit)
        self._threads = threads
        self._trace: Trace | None = None
        if traces is not None:
            self._trace = Trace(traces / f"native_{id(self)}.json")
            weakref.finalize(self, self._trace.write)

    def prefill(
        self, embeds: NDArray[np.float32], positions: NDArray[np.int64], cache: KVCache
    ) -> Iterator[None]:
        """Append T tokens to the cache.

        Args:
            embeds: (1, T, C).
            positions: (3, T).
            cache: holds the P tokens before; holds P + T when the iterator has ended, and P if it is closed
                before that.

        Returns:
            Iterator that takes a break between kernels that take long.

        Raises:
            DeviceError: there is not enough memory.
        """
        widths, past, tokens = self._layer.widths, cache.length, embeds.shape[1]
        angles = rotary_angles(positions, widths.form)
        room = kernels.room_bytes(tokens, max(weights.blocks for weights in self._weights))
        try:
            space = Space(widths, tokens, past + tokens)
        except MemoryError as error:
            raise DeviceError(
                f"there is not enough memory to read {tokens} tokens at once ({error}); close other "
                "programs, or load with prefill 'decoder'"
            ) from error
        space.stream[:] = embeds[0]
        buffers = cache.past
        run = nullcontext() if self._trace is None else self._trace.run()
        with run, Crew(self._threads, room, self._trace) as crew:
            for number, weights in enumerate(self._weights):
                if number:
                    yield
                own = (
                    buffers[f"past_key_values.{number}.key"].numpy()[0],
                    buffers[f"past_key_values.{number}.value"].numpy()[0],
                )
                yield from self._layer.run(weights, space, angles, own, past, crew)
        cache.length = past + tokens


def can_run_natively(bundle: Bundle) -> bool:
    """Whether the kernels compute what a bundle's layers do; a question of the bundle alone.

    Raises:
        BundleError: its index cannot be read.
    """
    manifest = bundle.manifest
    if "layer" not in manifest.parts or manifest.kv_dtype != "float32":
        return False
    index = read_index(bundle.file(manifest.parts["layer"].data), manifest.geometry.layers)
    return index.form is not None and manifest.geometry.head_dim <= WIDEST_HEAD
