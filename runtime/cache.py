"""KV cache: buffers of fixed length, allocated once, written in place by the decoder.

In: shapes from the manifest. Out: the values that are bound to the decoder as past and present alike, and
rows of all layers as one array, to be kept elsewhere and put back. Knows nothing of tokens. Memory is touched
as a sequence grows, so a long context costs address space, not RAM, until it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    def __init__(
        self,
        manifest: Manifest,
        capacity: int,
        device: Device = "cpu",
        *,
        buffers: Mapping[str, ort.OrtValue] | None = None,
        whole: Mapping[str, ort.OrtValue] | None = None,
    ) -> None:
        """Reserve the buffers.

        Args:
            manifest: of the bundle.
            capacity: tokens to hold.
            device: where they lie.
            buffers: these, (1, K, capacity, D) by "LAYER.key" and "LAYER.value", instead of new ones.
            whole: of which these are parts; a part does not keep the whole alive.

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
        self._values = dict(buffers or _reserve(manifest, 1, capacity, device))
        self._whole = whole

    @property
    def past(self) -> dict[str, ort.OrtValue]:
        """Buffers by the decoder's input names."""
        return _past(self._values)

    @property
    def present(self) -> dict[str, ort.OrtValue]:
        """The same buffers by the decoder's output names, so that a run appends in place."""
        return _present(self._values)

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

    def copy_from(self, other: KVCache, start: int, stop: int) -> None:
        """Take rows of tokens `start` to `stop` from a cache of the same bundle; what was after is forgotten.

        Raises:
            RequestError: as `read` and `write`.
        """
        if not self._on_host:
            return self.write(start, other.read(start, stop))
        if not 0 <= start <= stop <= other.length or start > self.length or stop > self.capacity:
            raise RequestError(
                f"tokens {start} to {stop} of a cache of {other.length} cannot be put into one of "
                f"{self.length} with room for {self.capacity}"
            )
        for name, value in self._values.items():
            value.numpy()[0, :, start:stop] = other._values[name].numpy()[0, :, start:stop]
        self.length = stop
        return None


class KVSlots:
    """Caches of several sequences, side by side in one set of buffers, so that one run can go on with many.

    Attributes:
        caches: one per slot, in the order of the rows.
        joined: whether a run can take several; on a GPU each has buffers of its own.
    """

    def __init__(self, manifest: Manifest, capacity: int, count: int, device: Device = "cpu") -> None:
        """Reserve the buffers.

        Args:
            manifest: of the bundle.
            capacity: tokens of each sequence.
            count: of sequences.
            device: where they lie.

        Raises:
            DeviceError: there is not enough memory.
        """
        self.joined = device == "cpu"
        if not self.joined:
            self.caches = tuple(KVCache(manifest, capacity, device) for _ in range(count))
            return
        self._values = _reserve(manifest, count, capacity, device)
        self.caches = tuple(
            KVCache(
                manifest,
                capacity,
                buffers={name: _view(value, slot, slot + 1) for name, value in self._values.items()},
                whole=self._values,
            )
            for slot in range(count)
        )

    def past(self, count: int) -> dict[str, ort.OrtValue]:
        """Buffers (count, K, capacity, D) of the first slots by the decoder's input names."""
        return _past({name: _view(value, 0, count) for name, value in self._values.items()})

    def present(self, count: int) -> dict[str, ort.OrtValue]:
        """The same buffers by the decoder's output names."""
        return _present({name: _view(value, 0, count) for name, value in self._values.items()})

    def swap(self, first: int, second: int) -> None:
        """Exchange the rows of two slots; what was in the one cache is in the other afterwards."""
        one, two = self.caches[first], self.caches[second]
        if self.joined:
            for value in self._values.values():
                rows = value.numpy()
                back = rows[second, :, : two.length].copy()
                rows[second, :, : one.length] = rows[first, :, : one.length]
                rows[first, :, : two.length] = back
            one.length, two.length = two.length, one.length
        else:
            self.caches = tuple(
                two if slot == first else one if slot == second else cache
                for slot, cache in enumerate(self.caches)
            )


def _reserve(manifest: Manifest, count: int, capacity: int, device: Device) -> dict[str, ort.OrtValue]:
    geometry = manifest.geometry
    shape = [count, geometry.kv_heads, capacity, geometry.head_dim]
    sequences = f"{count} times " if count > 1 else ""
    with run_errors(f"a context of {sequences}{capacity} tokens"):
        return {
            f"{layer}.{kind}": ort.OrtValue.ortvalue_from_shape_and_type(
                shape, np.dtype(manifest.kv_dtype), device, 0
            )
            for layer in range(geometry.layers)
            for kind in ("key", "value")
        }


def _view(value: ort.OrtValue, start: int, stop: int) -> ort.OrtValue:
    """Rows of a buffer on the host, in place."""
    return ort.OrtValue.ortvalue_from_numpy(value.numpy()[start:stop])


def _past(values: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
    return {f"past_key_values.{name}": value for name, value in values.items()}


def _present(values: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
    return {f"present.{name}": value for name, value in values.items()}
