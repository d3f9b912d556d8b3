"""KV cache of one sequence: buffers of fixed length, allocated once, written in place by the decoder.

In: shapes from the manifest. Out: the values that are bound to the decoder as past and present alike. Knows
nothing of tokens. Memory is touched as the sequence grows, so a long context costs address space, not RAM,
until it is used.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from .manifest import Manifest
from .session import Device, run_errors


class KVCache:
    """Keys and values of all layers, (1, K, capacity, D) each.

    Attributes:
        capacity: tokens it can hold.
        length: tokens it holds.
    """

    def __init__(self, manifest: Manifest, capacity: int, device: Device = "cpu") -> None:
        """Reserve the buffers.

        Raises:
            DeviceError: there is not enough memory.
        """
        geometry = manifest.geometry
        self.capacity = capacity
        self.length = 0
        shape = [1, geometry.kv_heads, capacity, geometry.head_dim]
        dtype = np.dtype(manifest.kv_dtype)
        with run_errors(f"a context of {capacity} tokens"):
            self._values = {
                f"{layer}.{kind}": ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0)
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
