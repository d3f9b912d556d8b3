"""Where a bundle's weights are while it runs, and what that costs: load, memory, prefill, decode.

    autoglm prepare OUT
    python benchmarks/weights_memory.py OUT --json weights.json

Each way ("packed", "prepared", and "mapped" where the decoder is in 8-bit integers) is a process of its own,
so that no memory of one is counted for another. The prompt is random ids, the times are medians; beside them
stands the machine's read bandwidth, measured in the same run. Prints a Markdown table; the last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from autoglm_edge.errors import EdgeError
from autoglm_edge.measure.bandwidth import read_bandwidth
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.measure.memory import MemorySampler, read_memory
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.topology import usable_cores
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions

WAYS = ("packed", "prepared", "mapped")


def main() -> int:
    """Measure each way in a child process, or one way in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prefill", default="auto", choices=["auto", "integer", "decoder"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--tokens", type=int, default=16, help="decoded tokens (default 16)")
    parser.add_argument("--json", type=Path, help="write the document here, too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments)))
        return 0
    rows = []
    for way in arguments.ways:
        command = [sys.executable, __file__, str(arguments.bundle), "--here", "--ways", way]
        command += ["--prefill", arguments.prefill, "--prompt", str(arguments.prompt)]
        done = subprocess.run(
            [*command, "--tokens", str(arguments.tokens)], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    report = {
        "date": date.today().isoformat(),
        "machine": this_machine().short,
        "read_bandwidth_gb_per_s": round(read_bandwidth(usable_cores()) / 1e9, 1),
        "prompt_tokens": arguments.prompt,
        "rows": rows,
    }
    print_table(rows)
    text = json.dumps(report)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load one way, prefill twice, decode."""
    way = arguments.ways[0]
    options = SessionOptions(weights=way, prefill=arguments.prefill)
    with MemorySampler() as memory:
        started = time.perf_counter()
        try:
            with memory.phase("load"):
                model = Model(Bundle.open(arguments.bundle), options)
        except EdgeError as error:
            return {"way": way, "refused": str(error)}
        load_s = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_SELF)
        loaded = read_memory()
        cache = model.new_cache(arguments.prompt + arguments.tokens)
        prompt = model.embed(np.random.default_rng(0).integers(0, 1000, arguments.prompt))
        prefill_s = []
        with memory.phase("prefill"):
            for _ in range(2):  # the first reads the weights in
                cache.clear()
                started = time.perf_counter()
                model.prefill(prompt, _positions(0, arguments.prompt), cache)
                prefill_s.append(time.perf_counter() - started)
        decode_s = []
        with memory.phase("decode"):
            for _ in range(arguments.tokens):
                started = time.perf_counter()
                model.forward(model.embed(np.array([5])), _positions(cache.length, 1), cache)
                decode_s.append(time.perf_counter() - started)
    return {
        "way": way,
        "plan": asdict(model.plan),
        "load_s": round(load_s, 2),
        "load_cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "loaded": loaded.to_json(),
        "peaks": {name: peak.to_json() for name, peak in memory.peaks.items()},
        "prefill_tokens_per_s": [round(arguments.prompt / seconds, 1) for seconds in prefill_s],
        "decode_ms": round(1000 * float(np.median(decode_s[1:])), 1),
    }


def _positions(start: int, count: int) -> np.ndarray:
    return np.arange(start, start + count)[None].repeat(3, 0)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The ways side by side; memory in GB."""
    print(
        "| weights | load s | CPU s | anonymous | peak of it while loading | in decoding: anonymous, mapped "
        "| prefill tokens/s | decode ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "refused" in row:
            print(f"| {row['way']} | {row['refused']} |")
            continue
        peaks = row["peaks"]
        cells = [
            row["way"]
            if row["way"] == row["plan"]["weights"]
            else f"{row['way']} → {row['plan']['weights']}",
            row["load_s"],
            row["load_cpu_s"],
            _gb(row["loaded"]["anon_bytes"]),
            _gb(peaks["load"]["anon_bytes"]),
            f"{_gb(peaks['decode']['anon_bytes'])}, {_gb(peaks['decode']['file_bytes'])}",
            row["prefill_tokens_per_s"][-1],
            row["decode_ms"],
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


def _gb(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f}"


if __name__ == "__main__":
    sys.exit(main())
