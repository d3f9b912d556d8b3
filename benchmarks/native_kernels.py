"""The compiled kernels beside onnxruntime's operators for the same work, by turns in one process.

    python benchmarks/native_kernels.py

Products of the 9B's shapes: ours from 4-bit blocks, expansion included; onnxruntime's of bytes, with weights
that were packed at load, with weights that come in with the run, and its kernel for 4-bit blocks. Attention
of the 9B's text side at two lengths and of its vision tower, in float32 by onnxruntime. Needs AMX, and the
package onnx to make graphs. A table goes to stdout; the last line is one JSON document, which is also written
to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autoglm_edge.measure.figures import Times, rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.runtime.layerwise.blocks import Blocks
from autoglm_edge.runtime.native.crew import Crew
from autoglm_edge.runtime.native.unit import Unit, best_unit, kernels
from autoglm_edge.runtime.session import SessionOptions, session_settings

HERE = Path(__file__).resolve().parent
PRODUCTS = {"query": (4096, 4096), "gate": (4096, 4544), "down": (13696, 4096)}
"""Depth and channels of matrices of a layer."""
TOKENS = (32, 128, 512, 1536)
ATTENTIONS = {
    "text, 512": (512, 32, 2, True),
    "text, 1,536": (1536, 32, 2, True),
    "picture of 2,304 patches": (2304, 12, 12, False),
}
"""Rows, heads, heads of keys, whether later keys are hidden."""
HEAD_DIM, BLOCK = 128, 64
_TYPES = {
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
}

Work = Callable[[], object]


def by_turns(work: Mapping[str, Work], rounds: int) -> dict[str, Times]:
    """Each once, then all of them in each round."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if number:
                found[name].append(time.perf_counter() - started)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def graph(
    node: Any, feeds: Mapping[str, NDArray[Any]], constants: Mapping[str, NDArray[Any]], threads: int
) -> Work:
    """A run of one operator on these arrays."""
    values = [
        helper.make_tensor_value_info(name, _TYPES[str(array.dtype)], array.shape)
        for name, array in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph([node], "one", values, outputs, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    settings = session_settings(SessionOptions("cpu", threads))
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda: session.run([node.output[0]], dict(feeds))


def products(depth: int, channels: int, tokens: int, threads: int, crew: Crew) -> dict[str, Work]:
    """The same product of bytes, four ways."""
    random = np.random.default_rng(depth + channels)
    count = depth // BLOCK
    blocks = Blocks(
        random.integers(0, 256, (channels, count, BLOCK // 2), dtype=np.uint8),
        random.uniform(0.5, 1.5, (channels, count)).astype(np.float32),
        random.integers(0, 256, (channels, -(-count // 2)), dtype=np.uint8),
        *(depth, 4),
    )
    left = random.integers(-127, 128, (-(-tokens // 32) * 32, depth), dtype=np.int8)
    row_scales, target = np.ones(tokens, np.float32), np.empty((tokens, channels), np.float32)
    given = (blocks.data, blocks.scales, blocks.zero_points, channels, depth, 4)

    def ours() -> None:
        crew.share(
            kernels.multiply,
            *(int(Unit.MATRICES), left, row_scales, tokens, None, target, channels, 0, given, None),
            scratch=True,
        )

    bytes_in = {"x": random.integers(0, 256, (tokens, depth), dtype=np.uint8)}
    weight = {"w": random.integers(-127, 128, (depth, channels), dtype=np.int8)}
    small = {
        "one": np.float32(1) * np.ones((), np.float32),
        "scales": np.ones(channels, np.float32),
        "middle": np.array(128, np.uint8),
    }
    whole = helper.make_node(
        "MatMulIntegerToFloat", ["x", "w", "one", "scales", "middle"], ["y"], domain="com.microsoft"
    )
    in_blocks = helper.make_node(
        "MatMulNBits",
        ["x", "data", "block_scales", "zeros"],
        ["y"],
        domain="com.microsoft",
        **{"K": depth, "N": channels, "bits": 4, "block_size": BLOCK, "accuracy_level": 4},
    )
    stored = {
        "data": blocks.data,
        "block_scales": blocks.scales.reshape(-1),
        "zeros": blocks.zero_points.reshape(-1),
    }
    floats = {"x": random.standard_normal((tokens, depth)).astype(np.float32)}
    return {
        "ours, 4-bit blocks": ours,
        "bytes, packed": graph(whole, bytes_in, weight | small, threads),
        "bytes, as they come": graph(whole, bytes_in | weight, small, threads),
        "MatMulNBits": graph(in_blocks, floats, stored, threads),
    }


def attentions(
    rows: int, heads: int, kv_heads: int, causal: bool, threads: int, crew: Crew
) -> dict[str, Work]:
    """The same attention, two ways; packing of keys included."""
    random = np.random.default_rng(rows)
    queries = random.standard_normal((rows, heads * HEAD_DIM)).astype(np.float32)
    keys, values = (random.standard_normal((kv_heads, rows, HEAD_DIM)).astype(np.float32) for _ in range(2))
    packed = np.empty((kv_heads, kernels.packed_size(rows, HEAD_DIM)), np.uint16)
    target = np.empty_like(queries)

    def pack(first: int, count: int) -> None:
        for head in range(first, first + count):
            kernels.pack_keys(keys[head], values[head], HEAD_DIM, rows, HEAD_DIM, packed[head])

    def ours() -> None:
        crew.rows("pack_keys", pack, kv_heads)
        crew.share(
            kernels.attend,
            *(int(Unit.MATRICES), causal, queries, heads * HEAD_DIM, rows, heads, kv_heads, HEAD_DIM, rows),
            *(HEAD_DIM**-0.5, packed, target),
        )

    def side_by_side(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(array.swapaxes(0, 1)).reshape(1, rows, -1)

    feeds = {"q": queries[None], "k": side_by_side(keys), "v": side_by_side(values)}
    if not causal:
        node = helper.make_node(
            "MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=heads
        )
        return {"ours": ours, "float32": graph(node, feeds, {}, threads)}
    empty = np.zeros((1, kv_heads, 0, HEAD_DIM), np.float32)
    feeds |= {"past_k": empty, "past_v": empty}
    lengths = {"last": np.array([rows - 1], np.int32), "total": np.array(rows, np.int32)}
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "last", "total"],
        ["y", "k_out", "v_out"],
        domain="com.microsoft",
        **{"num_heads": heads, "kv_num_heads": kv_heads},
    )
    return {"ours": ours, "float32": graph(node, feeds, lengths, threads)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=0, help="default one per core")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "native_kernels.json")
    options = parser.parse_args(arguments)
    if best_unit() != Unit.MATRICES:
        raise SystemExit("these kernels need AMX, which this machine, system or installation does not have")
    threads = SessionOptions("cpu", options.threads).thread_count
    rows = []
    with Crew(
        threads, kernels.room_bytes(max(TOKENS), max(depth for depth, _ in PRODUCTS.values()) // BLOCK)
    ) as crew:
        for name, (depth, channels) in PRODUCTS.items():
            for tokens in TOKENS:
                found = by_turns(products(depth, channels, tokens, threads, crew), options.rounds)
                operations = 2 * depth * channels * tokens
                rows.append({"work": f"{name}, {tokens:,} tokens", "operations": operations} | _json(found))
        for name, (count, heads, kv_heads, causal) in ATTENTIONS.items():
            found = by_turns(attentions(count, heads, kv_heads, causal, threads, crew), options.rounds)
            operations = 4 * heads * HEAD_DIM * (count * (count + 1) // 2 if causal else count * count)
            rows.append({"work": f"attention, {name}", "operations": operations} | _json(found))
    document = rounded(
        {
            "date": date.today().isoformat(),
            "machine": this_machine().to_json(),
            "threads": threads,
            "rounds": options.rounds,
            "rows": rows,
        }
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(markdown(document))
    print(json.dumps(document))
    return 0


def _json(found: Mapping[str, Times]) -> dict[str, Any]:
    return {"ways": {name: times.to_json() for name, times in found.items()}}


def markdown(document: Mapping[str, Any]) -> str:
    """A line per work: ours in operations per second, the others as multiples of our time."""
    lines = ["| work | ours, ms | 10¹² operations/s | others, × our time |", "|---|---:|---:|---|"]
    for row in document["rows"]:
        ours, *others = row["ways"].items()
        seconds = ours[1]["median_s"]
        told = ", ".join(f"{name} {times['median_s'] / seconds:.1f}" for name, times in others)
        lines.append(
            f"| {row['work']} | {1e3 * seconds:.1f} | {row['operations'] / seconds / 1e12:.2f} | {told} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
