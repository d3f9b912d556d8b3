"""What the machine can do: read bandwidth of its memory, and peaks of matrix products in fp32 and int8.

In: a number of threads. Out: `Limits`. The best of a few runs, because a limit is what is possible; figures
of a bundle stand beside it as ratios, and only those survive a shared machine. Products run in onnxruntime,
as those of a bundle do. bfloat16 has no kernel in onnxruntime on a CPU, so its peak is not measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import DeviceError, RequestError
from autoglm_edge.runtime.session import SessionOptions

from .machine import this_machine
from .tiny_graph import one_node

BUFFER_BYTES = 1 << 30
"""Far more than any cache; on a machine with less than 8 GiB an eighth of its memory."""
ROWS, SIDE = 512, 4096
"""A chunk of a prompt times a matrix of the 9B's width."""
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """Of this machine, with so many threads.

    Attributes:
        threads: that were used.
        read_bytes_per_s: memory that is in no cache.
        fp32_ops_per_s: multiplications and additions of a matrix product, two for each weight and row.
        int8_ops_per_s: the same, u8 times s8, weights packed.
    """

    threads: int
    read_bytes_per_s: float
    fp32_ops_per_s: float
    int8_ops_per_s: float

    def __post_init__(self) -> None:
        if self.threads < 1 or min(self.read_bytes_per_s, self.fp32_ops_per_s, self.int8_ops_per_s) <= 0:
            raise RequestError(f"limits are {asdict(self)}, must all be above 0")

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


def measure_limits(
    threads: int = 0,
    *,
    buffer_bytes: int | None = None,
    rows: int = ROWS,
    side: int = SIDE,
    repeats: int = REPEATS,
) -> Limits:
    """Measure all of them; some seconds.

    Args:
        threads: 0 takes one per core that this process may use.
        buffer_bytes: memory to read; far more than the caches hold. None is BUFFER_BYTES or less.
        rows: of the left side of the products.
        side: rows and columns of the weight.
        repeats: runs of each; the best one counts.

    Raises:
        DeviceError: there is not enough memory.
    """
    count = SessionOptions("cpu", threads).thread_count
    return Limits(
        threads=count,
        read_bytes_per_s=read_bandwidth(count, buffer_bytes, repeats),
        fp32_ops_per_s=_product(_fp32_graph(side), np.float32, rows, side, count, repeats),
        int8_ops_per_s=_product(_int8_graph(side), np.uint8, rows, side, count, repeats),
    )


def read_bandwidth(threads: int, buffer_bytes: int | None = None, repeats: int = REPEATS) -> float:
    """Best rate, in bytes per second, at which all threads together read memory that is in no cache.

    Raises:
        DeviceError: there is not enough memory for the buffer.
    """
    if buffer_bytes is None:
        buffer_bytes = min(BUFFER_BYTES, (this_machine().memory_bytes or 8 * BUFFER_BYTES) // 8)
    try:
        buffer = np.ones(max(threads, buffer_bytes // 8))
    except MemoryError as error:
        raise DeviceError(
            f"there is not enough memory for a buffer of {buffer_bytes} bytes; close other programs"
        ) from error
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        return buffer.nbytes / _best(lambda: list(pool.map(np.max, parts)), repeats)


def _fp32_graph(side: int) -> bytes:
    weight = np.random.default_rng(0).standard_normal((side, side), np.float32)
    return one_node(
        "MatMul", {"x": ("float32", ["M", side])}, ["x", "w"], {"w": weight}, ("float32", ["M", side])
    )


def _int8_graph(side: int) -> bytes:
    """The product that bundles in integer form consist of."""
    random = np.random.default_rng(0)
    constants: dict[str, NDArray[Any]] = {
        "w": random.integers(-127, 128, (side, side), np.int8),
        "one": np.array(1.0, np.float32),
        "scales": random.uniform(0.001, 0.002, side).astype(np.float32),
        "middle": np.array(128, np.uint8),
    }
    order = ["x", "w", "one", "scales", "middle"]
    inputs: dict[str, tuple[str, list[int | str]]] = {"x": ("uint8", ["M", side])}
    return one_node(
        "MatMulIntegerToFloat", inputs, order, constants, ("float32", ["M", side]), domain="com.microsoft"
    )


def _product(graph: bytes, dtype: type, rows: int, side: int, threads: int, repeats: int) -> float:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    try:
        session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
        random = np.random.default_rng(1)
        feeds: dict[str, NDArray[Any]] = {"x": random.integers(1, 255, (rows, side)).astype(dtype)}
        session.run(None, feeds)
        seconds = _best(lambda: session.run(None, feeds), repeats)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DeviceError(
            f"onnxruntime {ort.__version__} cannot run the product that measures this machine: {error}"
        ) from error
    return 2 * rows * side * side / seconds


def _best(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(max(1, repeats)):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)
