"""What a KV cache of 8-bit integers loses: the pocket model's answers, scored against a float reference.

    autoglm record pocket -o ref.safetensors --prompts screens.jsonl        # needs torch, once
    python benchmarks/kv_loss.py ref.safetensors [--screens 100]

Each recipe is exported with a cache of floats and with one of integers, and both score the recorded answers
behind prompts that they have read themselves. Beside the divergence stands how many of the stored values were
cut, that is, were larger than the scales have room for. With --margins, the fp32 bundle's scales are measured
anew with other room, on other numbers of tokens, and with one scale for all channels of a layer. Prints a
Markdown table; the last line is the JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from autoglm_edge.embedded import pocket_path
from autoglm_edge.export.calibrate.calibration_set import built_in_set, read_calibration
from autoglm_edge.export.calibrate.kv_scales import KV_TOKENS, MARGIN, TOP, find_scales, is_scale
from autoglm_edge.export.pipeline import export
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.measure.figures import rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.parity.comparison import Figures
from autoglm_edge.parity.reference import Case, Reference
from autoglm_edge.parity.rows import Differences, compare
from autoglm_edge.parity.scoring import score_case
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import Prefill

PRECISIONS = ("fp32", "fp16", "int8", "int4")
MARGINS = (1.0, 1.25, 1.5, 2.0)
TOKENS = (1024, 8192)

Row = dict[str, Any]


def main() -> None:
    """Export, score, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path)
    parser.add_argument("--screens", type=int, default=100, help="the first so many (default 100)")
    parser.add_argument("--margins", action="store_true")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "results" / "kv_loss.json"
    )
    arguments = parser.parse_args()
    reference = Reference.open(arguments.reference)
    cases = list(itertools.islice(reference.cases(), arguments.screens))
    layout = reference.fingerprint.image_layout
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for precision in PRECISIONS:
            for kv in ("float", "int8"):
                folder = Path(temporary) / f"{precision}-{kv}"
                export(pocket_path(), folder, precision=precision, kv=kv)  # type: ignore[arg-type]
                rows.append({"recipe": precision, "kv": kv, **score(folder, cases, layout)})
        print_table(rows)
        others = variations(Path(temporary) / "fp32-int8", cases, layout) if arguments.margins else []
    if others:
        print()
        print_table(others)
    document = {
        "date": str(date.today()),
        "machine": this_machine().to_json(),
        "screens": len(cases),
        "margin": MARGIN,
        "tokens": KV_TOKENS,
        "rows": rows,
        "variations": others,
    }
    text = json.dumps(rounded(document, 4))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def score(folder: Path, cases: Sequence[Case], layout: Any, prefill: Prefill = "auto") -> Row:
    """Divergence over the answers, and the share of cached values that were cut."""
    found, cut, count = [], 0, 0
    options: dict[str, Any] = {"image_layout": layout, "reuse": ReuseOptions.off()}
    with Engine.load(folder, threads=1, prefill=prefill, **options) as engine:
        for case in cases:
            wanted = case.in_answer
            rows = score_case(engine, case, case.pictures(), wanted)
            found.append(compare(case.rows.part(wanted), rows))
            cache = engine._runner.sequence.cache
            if cache.dtype == np.int8:
                held = np.abs(cache.read(0, cache.length).astype(np.int16))
                cut, count = cut + int((held >= TOP).sum()), count + held.size
    figures = Figures.of(Differences.join(found))
    return {
        "positions": figures.kl.count,
        "kl": figures.kl.mean,
        "kl_error": figures.kl_error,
        "p99": figures.kl.p99,
        "highest": figures.kl.highest,
        "same_likeliest": figures.top1.value,
        "cut": cut / count if count else 0.0,
    }


def variations(bundle: Path, cases: Sequence[Case], layout: Any) -> list[Row]:
    """Other scales in the same bundle."""
    rows = []
    chosen = [(margin, KV_TOKENS, "channel") for margin in MARGINS]
    chosen += [(MARGIN, tokens, "channel") for tokens in TOKENS]
    chosen += [(margin, KV_TOKENS, "layer") for margin in (1.0, MARGIN)]
    for margin, tokens, per in chosen:
        checkpoint = Checkpoint.open(pocket_path())
        samples = read_calibration(built_in_set(), checkpoint, checkpoint.config, max_tokens=tokens)
        scales = find_scales(checkpoint.tensors, checkpoint.config, samples, margin=margin)
        if per == "layer":
            scales = {name: np.full_like(values, values.max()) for name, values in scales.items()}
        folder = bundle.with_name("changed")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle, folder)
        put(folder, scales)
        name = f"room {margin:g}, {tokens:,} tokens, a scale per {per}"
        rows.append({"recipe": name, "kv": "int8", **score(folder, cases, layout)})
    return rows


def put(folder: Path, scales: dict[str, NDArray[np.float32]]) -> None:
    """Write scales into the decoder's data file."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    with (folder / "decoder.onnx.data").open("r+b") as file:
        for item in graph.initializer:
            if is_scale(item.name):
                place = {entry.key: entry.value for entry in item.external_data}
                file.seek(int(place["offset"]))
                file.write(scales[item.name].astype("<f4").tobytes())


def print_table(rows: list[Row]) -> None:
    """One line for each."""
    print("| | cache | mean KL | ± s.e. | p99 | highest | same likeliest token | values cut |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = [f"{row[name]:.2g}" for name in ("kl", "kl_error", "p99", "highest")]
        cells += [f"{100 * row['same_likeliest']:.2f} %", f"{row['cut']:.1g}"]
        print(f"| {row['recipe']} | {row['kv']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
