"""One quantized product on emulated ARM CPUs: how far from exact, and from this machine?

    python benchmarks/arm64_products.py --json benchmarks/results/arm64_products.json

A matrix of 512 x 1024 normal weights is quantized in 4 and 8 bits, with blocks of 32, 64 and 128, with zero
points and without, and multiplied with 16 rows and with one (MatMulNBits, accuracy level 4), here and on each
CPU, with KleidiAI and without. "Exact" is the product of the quantized matrix in float64. Prints a table of
relative root mean squares. Fetches some 140 MB at the first time; needs the extra [export].
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from autoglm_edge.android_sim.arm64.qemu import CPUS
from autoglm_edge.android_sim.arm64.root import ensure_root
from autoglm_edge.commands.progress import ProgressLine

OUTPUTS, INPUTS, ROWS = 512, 1024, 16
FORMATS = tuple(itertools.product((4, 8), (32, 64, 128), (False, True)))
RUN = """
import json, sys
import numpy as np
import onnxruntime as ort
folder, tag = sys.argv[1:]
rows = np.load(folder + "/rows.npy")
for name in json.load(open(folder + "/names.json")):
    for kleidiai in (True, False):
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        if not kleidiai:
            settings.add_session_config_entry("mlas.disable_kleidiai", "1")
        session = ort.InferenceSession(f"{folder}/{name}.onnx", settings, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"A": part})[0] for part in (rows, rows[:1])]
        np.save(f"{folder}/{name}-{tag}-{kleidiai}.npy", np.concatenate(found))
"""


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    root = ensure_root(ProgressLine())
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    rows = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exact = {}
        for bits, block, symmetric in FORMATS:
            key = f"{bits}-{block}-{'symmetric' if symmetric else 'zero points'}"
            matrix = _write(folder / f"{key}.onnx", weights, bits, block, symmetric)
            exact[key] = np.concatenate([rows, rows[:1]]).astype(np.float64) @ matrix.T
        np.save(folder / "rows.npy", rows)
        (folder / "names.json").write_text(json.dumps(list(exact)))
        (folder / "run.py").write_text(RUN)
        job = [str(folder / "run.py"), str(folder)]
        subprocess.run([sys.executable, *job, "here"], check=True)
        for cpu in CPUS:
            emulated = [str(root.emulator), "-cpu", cpu, "-L", str(root.system), str(root.python)]
            environment = {"PYTHONPATH": str(root.site), "HOME": name, "PATH": os.environ["PATH"]}
            subprocess.run([*emulated, *job, cpu], check=True, env=environment)
        document = {
            "onnxruntime": {"here": onnxruntime.__version__, "arm": root.versions["onnxruntime"]},
            "rows": [_measured(folder, key, value) for key, value in exact.items()],
        }
    _print(document["rows"])
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _write(path: Path, weights: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    """A model of one product; returns its matrix (OUTPUTS, INPUTS) in float64."""
    blocks = weights.reshape(OUTPUTS, -1, block)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scales = np.abs(blocks).max(axis=2) / (middle - 1)
        zeros = np.full(scales.shape, middle)
    else:
        scales = (blocks.max(axis=2) - blocks.min(axis=2)) / top
        zeros = np.clip(np.round(-blocks.min(axis=2) / scales), 0, top)
    scales = scales.astype(np.float32)
    q = np.clip(np.round(blocks / scales[..., None]) + zeros[..., None], 0, top).astype(np.uint8)

    def packed(values: np.ndarray) -> np.ndarray:
        return values if bits == 8 else values[..., 0::2] | values[..., 1::2] << 4

    tensors = [numpy_helper.from_array(packed(q), "B"), numpy_helper.from_array(scales, "scales")]
    if not symmetric:
        tensors.append(numpy_helper.from_array(packed(zeros.astype(np.uint8)), "zeros"))
    names = ["A", *(tensor.name for tensor in tensors)]
    node = helper.make_node(
        "MatMulNBits",
        names,
        ["Y"],
        domain="com.microsoft",
        K=INPUTS,
        N=OUTPUTS,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "AY"]
    graph = helper.make_graph([node], "product", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return ((q.astype(np.float64) - zeros[..., None]) * scales[..., None]).reshape(OUTPUTS, INPUTS)


def _measured(folder: Path, key: str, exact: np.ndarray) -> dict[str, object]:
    """Distances of one format."""
    bits, block, kind = key.split("-")
    here = np.load(folder / f"{key}-here-True.npy")
    row: dict[str, object] = {"bits": int(bits), "block": int(block), "kind": kind, "here": _rms(here, exact)}
    for cpu in CPUS:
        for kleidiai in (True, False):
            found = np.load(folder / f"{key}-{cpu}-{kleidiai}.npy")
            row[f"{cpu}{'' if kleidiai else ' without KleidiAI'}"] = {
                "exact": _rms(found, exact),
                "here": _rms(found, here),
            }
    return row


def _rms(values: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((values - wanted) ** 2) / np.mean(np.asarray(wanted, np.float64) ** 2)))


def _print(rows: list[dict[str, object]]) -> None:
    """A table in Markdown."""
    columns = [name for name in rows[0] if name not in ("bits", "block", "kind", "here")]
    print(
        "| bits | block | | here, from exact | "
        + " | ".join(f"{name}: exact, here" for name in columns)
        + " |"
    )
    print("|---" * (4 + len(columns)) + "|")
    for row in rows:
        cells = []
        for name in columns:
            pair = row[name]
            assert isinstance(pair, dict)
            cells.append(f"{pair['exact']:.0e}, {pair['here']:.0e}")
        print(f"| {row['bits']} | {row['block']} | {row['kind']} | {row['here']:.1e} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
