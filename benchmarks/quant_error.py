"""Weight error of the block formats, speed of quantizing, and time of the kernel that reads them.

    python benchmarks/quant_error.py [--rows 4096] [--columns 4096] [--repeat 5]

Weights are drawn from a normal distribution and from Student's t with 5 degrees of freedom, whose tails are
as heavy as trained weights can be. The error is relative, ||back - w|| / ||w||, of plain rounding and of
search. The speed is million weights per second of CPU time on one thread, of float32 rows that are in memory,
hence without reading and writing files. The kernel is onnxruntime's MatMulNBits at accuracy level 4 on one
thread, in milliseconds of CPU time for 1 and for 128 rows of activations. Times are the best of the
repetitions. A table goes to stdout, and as its last line one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from autoglm_edge.quantize import BlockFormat, Quantized, dequantize_rows, quantize_rows, search_rows

FORMATS = [
    BlockFormat(2, 64, False),
    BlockFormat(3, 64, False),
    *(BlockFormat(bits, size, sym) for bits in (4, 8) for size in (32, 64, 128) for sym in (False, True)),
]


def draw(rows: int, columns: int) -> dict[str, NDArray[np.float32]]:
    """Weights (rows, columns) by the name of their distribution."""
    source = np.random.default_rng(0)
    return {
        "normal": source.standard_normal((rows, columns)).astype(np.float32),
        "student_t5": source.standard_t(5, (rows, columns)).astype(np.float32),
    }


def relative_error(weights: NDArray[np.float32], quantized: Quantized, fmt: BlockFormat) -> float:
    """||back - w|| / ||w||."""
    back = dequantize_rows(quantized, fmt, weights.shape[1])
    return float(np.linalg.norm(back - weights) / np.linalg.norm(weights))


def speed(
    quantize: Callable[[NDArray[np.float32], BlockFormat], Quantized],
    weights: NDArray[np.float32],
    fmt: BlockFormat,
    repeat: int,
) -> float:
    """Million weights per second of CPU time, the best of `repeat` runs."""
    seconds = []
    for _ in range(repeat):
        start = time.thread_time()
        quantize(weights, fmt)
        seconds.append(time.thread_time() - start)
    return weights.size / min(seconds) / 1e6


def kernel(weights: NDArray[np.float32], fmt: BlockFormat) -> ort.InferenceSession:
    """A session with one MatMulNBits: x (m, K) to y (m, N)."""
    count, columns = weights.shape
    quantized = quantize_rows(weights, fmt)
    arrays: dict[str, NDArray[Any]] = {"data": quantized.data, "scales": quantized.scales}
    if quantized.zero_points is not None:
        arrays["zero_points"] = quantized.zero_points
    sizes = {
        "K": columns,
        "N": count,
        "bits": fmt.field_bits,
        "block_size": fmt.block_size,
        "accuracy_level": 4,
    }
    node = helper.make_node("MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", **sizes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    graph = helper.make_graph(
        [node],
        "kernel",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", count])],
        [helper.make_tensor(n, kinds[n], a.shape, a.tobytes(), raw=True) for n, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def kernel_ms(session: ort.InferenceSession, rows: int, repeat: int) -> float:
    """Milliseconds of CPU time of one run, the best of several."""
    x = np.random.default_rng(1).standard_normal((rows, session.get_inputs()[0].shape[1])).astype(np.float32)
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        session.run(None, {"x": x})
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds)


def cpu_name() -> str:
    """Model name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Weight error and speed of the block formats.")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    weights = draw(options.rows, options.columns)
    normal, heavy = weights["normal"], weights["student_t5"]
    results = []
    heads = ["bits", "block", "zero points", "bits per weight", "normal", "t5", "t5, float16 scales"]
    heads += ["normal, search", "t5, search", "M weights/s", "search, M weights/s", "1 row", "128 rows"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for fmt in FORMATS:
        session = kernel(normal, fmt)
        row = {
            "bits": fmt.bits,
            "block_size": fmt.block_size,
            "symmetric": fmt.symmetric,
            "bits_per_weight": 8 * fmt.size_bytes(1, options.columns) / options.columns,
            "normal": relative_error(normal, quantize_rows(normal, fmt), fmt),
            "student_t5": relative_error(heavy, quantize_rows(heavy, fmt), fmt),
            "student_t5_float16_scales": relative_error(
                heavy, quantize_rows(heavy, fmt, scale_dtype="float16"), fmt
            ),
            "normal_search": relative_error(normal, search_rows(normal, fmt), fmt),
            "student_t5_search": relative_error(heavy, search_rows(heavy, fmt), fmt),
            "million_weights_per_s": speed(quantize_rows, normal, fmt, options.repeat),
            "search_million_weights_per_s": speed(search_rows, normal, fmt, options.repeat),
            "kernel_1_row_ms": kernel_ms(session, 1, 20 * options.repeat),
            "kernel_128_rows_ms": kernel_ms(session, 128, options.repeat),
        }
        results.append(row)
        keys = ("normal", "student_t5", "student_t5_float16_scales", "normal_search", "student_t5_search")
        errors = " | ".join(f"{row[key]:.5f}" for key in keys)
        print(
            f"| {fmt.bits} | {fmt.block_size} | {'no' if fmt.symmetric else 'yes'} "
            f"| {row['bits_per_weight']:.3f} | {errors} | {row['million_weights_per_s']:.0f} "
            f"| {row['search_million_weights_per_s']:.0f} "
            f"| {row['kernel_1_row_ms']:.2f} ms | {row['kernel_128_rows_ms']:.0f} ms |"
        )
    about = {
        "benchmark": "quant_error",
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "numpy": np.__version__,
        "onnxruntime": ort.__version__,
        "rows": options.rows,
        "columns": options.columns,
    }
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()
