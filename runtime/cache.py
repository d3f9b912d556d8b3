"""KV cache of one sequence: buffers of fixed length, allocated once, written in place by the decoder.

In: shapes from the manifest. Out: the values that are bound to the decoder as past and present alike, and
rows of all layers as one array, to be kept elsewhere and put back. Knows nothing of tokens. Memory is touched
as the sequence grows, so a long context costs address space, not RAM, until it is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import RequestError

from .manifest import Manifest
from .session import Device, run_errors


class KVCache:
    """Keys and values of all layers, (1, K, capacity, D) each.

    Attributes:
        capacity: tokens it can hold.
        length: tokens it holds.
        dtype: of keys and values.
        row_shape: shape of `read(start, stop)` with n = stop - start in the place of 0: (L, 2, K, 0, D).
        row_bytes: bytes of one token, all layers.
    """

    def __init__(self, manifest: Manifest, capacity: int, device: Device = "cpu") -> None:
        """Reserve the buffers.

        Raises:
            DeviceError: there is not enough memory.
        """
        geometry = manifest.geometry
        self.capacity = capacity
        self.length = 0
        self.dtype = np.dtype(manifest.kv_dtype)
        self.row_shape = (geometry.layers, 2, geometry.kv_heads, 0, geometry.head_dim)
        self.row_bytes = self.dtype.itemsize * geometry.layers * 2 * geometry.kv_heads * geometry.head_dim
        self._on_host = device == "cpu"
        shape = [1, geometry.kv_heads, capacity, geometry.head_dim]
        with run_errors(f"a context of {capacity} tokens"):
            self._values = {
                f"{layer}.{kind}": ort.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype, device, 0)
                for layer in range(geometry.layers)
                for kind in ("key", "value")
            }

    @property
    def past(self) -> dict[str, ort.OrtValue]:
        """Buffers by the decoder's input names."""
        return {f"past_key_values.{name}": value for name, value in self._values.items()}

    @property
    def present(self) -> dict[str, ort.OrtValue]:
        """The same buffers by the decoder's output names, so that a run appends in place."""
        return {f"present.{name}": value for name, value in self._values.items()}

    def clear(self) -> None:
        """Forget the sequence; the memory stays."""
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on; the memory stays.

        Raises:
            RequestError: the cache does not hold so many.
        """
        if not 0 <= length <= self.length:
            raise RequestError(f"the cache holds {self.length} tokens, cannot be cut to {length}")
        self.length = length

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Copy the rows of tokens `start` to `stop`.

        Returns:
            (L, 2, K, stop - start, D), contiguous, in the cache's dtype; keys before values.

        Raises:
            RequestError: the cache does not hold these tokens.
        """
        if not 0 <= start <= stop <= self.length:
            raise RequestError(f"the cache holds {self.length} tokens, cannot give {start} to {stop}")
        rows = np.empty((*self.row_shape[:3], stop - start, self.row_shape[4]), self.dtype)
        for index, value in enumerate(self._values.values()):
            rows[index // 2, index % 2] = value.numpy()[0, :, start:stop]
        return rows

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Put rows back as tokens `start` and following; what was there and after is forgotten.

        Args:
            start: at most `length`.
            rows: (L, 2, K, n, D) in the cache's dtype, as `read` gave them.

        Raises:
            RequestError: there would be a hole before them, they do not fit, or are of another cache.
        """
        count = rows.shape[3] if rows.ndim == 5 else 0
        shape = (*self.row_shape[:3], count, self.row_shape[4])
        if rows.shape != shape or rows.dtype != self.dtype:
            raise RequestError(
                f"rows are {rows.dtype} of shape {rows.shape}, but this cache takes {self.dtype} of shape "
                f"{(*self.row_shape[:3], 'n', self.row_shape[4])}"
            )
        if not 0 <= start <= self.length or start + count > self.capacity:
            raise RequestError(
                f"{count} tokens cannot be put at {start}: the cache holds {self.length} and has room for "
                f"{self.capacity}"
            )
        for index, value in enumerate(self._values.values()):
            buffer = value.numpy()  # on the host the buffer itself, else a copy of it
            buffer[0, :, start : start + count] = rows[index // 2, index % 2]
            if not self._on_host:
                value.update_inplace(buffer)
        self.length = start + count
