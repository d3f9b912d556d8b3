"""Saves a graph with its weights packed for this CPU's kernels, and proves that it computes the same.

In: the graph of a part. Out: a graph and a data file, written and on the disk. Knows nothing of where they
are kept, nor for how long.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError, DeviceError
from autoglm_edge.runtime.manifest import Manifest
from autoglm_edge.runtime.session import PROVIDERS, SessionOptions, open_session, session_settings

from .trial import trial

LEAST_BYTES = (1 << 10, 1 << 20)
"""Smaller tensors stay inside the graph. The first value keeps the least in memory. With the second every
tensor outside is so large that onnxruntime aligns it, and what it packs of it: where the first fails.
"""
ALIGNMENT = 64
"""Of packed weights in the file: kernels find their pieces by rounding addresses up to this."""
_PACKED_AT = re.compile(rb"MatMul\w*\+\d+\|(\d+);\d+")


def data_of(graph: Path) -> Path:
    """The data file that belongs to a saved graph."""
    return graph.with_name(f"{graph.name}.data")


def pack(source: Path, graph: Path, manifest: Manifest, part: str, options: SessionOptions) -> None:
    """Write `graph` and its data file, and try them.

    Args:
        source: graph of a part of a bundle.
        graph: the file to write, in a folder that holds no other.
        manifest: of the bundle.
        part: its name.
        options: threads; nothing written depends on them.

    Raises:
        DeviceError: what onnxruntime saves computes something else, or cannot be loaded.
        BundleError: onnxruntime refuses the source, or cannot write.
    """
    for least in LEAST_BYTES:
        wanted = _save(source, graph, least, manifest, part, options)
        if is_aligned(graph):
            break
    for file in (graph, data_of(graph)):
        _flush(file)
    if is_aligned(graph):
        try:
            found = trial(open_session(graph, options, optimize=False), manifest, part)
        except BundleError as error:
            raise DeviceError(f"no prepared weights for {part}: {error}") from error
        if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, wanted, strict=True)):
            return
    raise DeviceError(
        f"no prepared weights for {part}: as onnxruntime {ort.__version__} saves them they would compute "
        "something else; do without them"
    )


def is_aligned(graph: Path) -> bool:
    """Whether all packed weights of a saved graph lie where kernels will find their pieces."""
    return all(int(offset) % ALIGNMENT == 0 for offset in _PACKED_AT.findall(graph.read_bytes()))


def _save(
    source: Path, graph: Path, least_bytes: int, manifest: Manifest, part: str, options: SessionOptions
) -> list[NDArray[Any]]:
    """Save the graph packed; returns what it computes as it was loaded."""
    data = data_of(graph)
    for file in (graph, data):
        file.unlink(missing_ok=True)
    settings = session_settings(
        options,
        {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": data.name,
            "session.optimized_model_external_initializers_min_size_in_bytes": str(least_bytes),
        },
    )
    settings.optimized_model_filepath = str(graph)
    try:
        session = ort.InferenceSession(source, settings, providers=[PROVIDERS["cpu"]])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise BundleError(
            f"{source} cannot be packed by onnxruntime {ort.__version__} ({str(error).strip()[:200]}); "
            "check the disk, and the bundle with `autoglm info --verify`"
        ) from error
    if not data.exists():  # a part without large weights has none
        data.touch()
    return trial(session, manifest, part)


def _flush(path: Path) -> None:
    """Bring a file to the disk, so that a crash after a rename finds it whole."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
