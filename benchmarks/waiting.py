"""What threads that stay awake during a run are worth: steps of one bundle, by turns, with and without.

    python benchmarks/waiting.py OUT

Two models of the same bundle are open at once; their weights are the same pages of a file, so run
`autoglm prepare OUT` first. A table goes to stdout; the last line is one JSON document, which is also written
to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np

from autoglm_edge.measure.figures import Times, rounded
from autoglm_edge.measure.graphs import GraphSequence
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.runtime import model as model_module
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions

HERE = Path(__file__).resolve().parent
FROM_BYTES = {"asleep": 1 << 62, "awake": 0}
"""Least weights of a decoder whose threads stay awake."""


def measure(folder: Path, threads: int, context: int, steps: int, rounds: int) -> dict[str, Times]:
    """Steps after so many tokens; the first of each round, which finds cold caches, is not counted."""
    bundle, random = Bundle.open(folder), np.random.default_rng(0)
    sequences = {}
    for name, least in FROM_BYTES.items():
        model_module.SPIN_FROM_BYTES = least
        sequences[name] = GraphSequence(Model(bundle, SessionOptions("cpu", threads)), context + steps + 1)
        sequences[name].fill(context, random)
    found: dict[str, list[float]] = {name: [] for name in sequences}
    for _ in range(rounds):
        for name, sequence in sequences.items():
            sequence.cache.truncate(context)
            for step in range(steps + 1):
                started = time.perf_counter()
                sequence.feed([5])
                if step:
                    found[name].append(time.perf_counter() - started)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="OUT")
    parser.add_argument("--threads", type=int, default=0, help="default one per core")
    parser.add_argument("--context", type=int, default=64, help="tokens before the first step (default 64)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "waiting.json")
    options = parser.parse_args(arguments)
    found = measure(options.bundle, options.threads, options.context, options.steps, options.rounds)
    document = rounded(
        {
            "date": date.today().isoformat(),
            "machine": this_machine().to_json(),
            "bundle": options.bundle.name,
            "context": options.context,
            "step": {name: times.to_json() for name, times in found.items()},
            "faster": found["asleep"].median_s / found["awake"].median_s,
        }
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print("| threads between operators | median | least |\n|---|---|---|")
    for name, times in found.items():
        print(f"| {name} | {1e3 * times.median_s:.1f} ms | {1e3 * min(times.seconds):.1f} ms |")
    print(json.dumps(document, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
