"""Memory of NVIDIA GPUs, from the driver's own library; nothing where there is none.

In: nothing. Out: bytes in use and in all, per GPU. Needs no package.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

LIBRARY = "libnvidia-ml.so.1"
_DONE = 0


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def read_gpu_memory(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> list[tuple[float, float]]:
    """Bytes in use and in all, per GPU; empty without a driver."""
    library = _library(load)
    if library is None:
        return []
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _DONE:
        return []
    found = []
    for index in range(count.value):
        device, memory = ctypes.c_void_p(), _Memory()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != _DONE:
            continue
        if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == _DONE:
            found.append((float(memory.used), float(memory.total)))
    return found


@functools.cache
def _library(load: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL | None:
    try:
        library = load(LIBRARY)
    except OSError:
        return None
    return library if library.nvmlInit_v2() == _DONE else None
