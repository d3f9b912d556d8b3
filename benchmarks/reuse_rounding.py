"""How far scores depend on the way a prompt was cut into runs: the pocket model, all presets.

    python benchmarks/reuse_rounding.py [-o results/reuse_rounding.json]

The prompt of the embedded screenshot is prefilled in one piece, then in pieces of whole blocks (as after
reuse) and of odd lengths (as nothing in the engine does); then tokens are run one by one, and several at a
time (as drafts are verified). Prints a table of the largest differences of logits; the last line is the JSON
document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from autoglm_edge.embedded import pocket_path, sample_screenshot
from autoglm_edge.export.pipeline import export
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.runtime import reading
from autoglm_edge.runtime.answer import Clock
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.reuse.options import ReuseOptions

PRESETS = ("fp32", "int8", "int8-blocks", "int4")
BLOCKS, ODD, RUNS = (16, 48, 80), (17, 33, 37), (2, 3, 4, 5, 8, 16)
WHOLE = 512
FED = 48


def prefilled(engine: Engine, chunk: int) -> np.ndarray:
    """Logits (V,) after the prompt, prefilled in pieces of that length."""
    text = "You operate a phone. Think, then act. " * 8
    content = [{"type": "image", "image": Image.open(sample_screenshot())}, {"type": "text", "text": "Go on"}]
    prompt = engine.prompt([{"role": "system", "content": text}, {"role": "user", "content": content}])
    reading.PREFILL_CHUNK = chunk
    run = engine._runner.run(prompt, len(prompt.ids) - 1, cancelled=lambda: False, clock=Clock(), reuse=False)
    (rows,) = run
    return np.asarray(rows[-1])


def fed(engine: Engine, count: int) -> np.ndarray:
    """Logits (FED, V) of tokens after the prompt, so many in a run."""
    prefilled(engine, WHOLE)
    ids = np.random.default_rng(0).integers(100, 400, FED).tolist()
    runner = engine._runner
    position = int(runner.sequence.keys[-1, 1]) + 1
    rows = [
        runner.feed(runner.sequence, ids[start : start + count], position + start)
        for start in range(0, FED, count)
    ]
    return np.concatenate(rows)


def measure(precision: str, folder: Path) -> dict[str, Any]:
    """Largest differences of one preset."""
    export(pocket_path(), folder, precision=precision)
    with Engine.load(folder, threads=1, reuse=ReuseOptions.off()) as engine:
        whole, single = prefilled(engine, WHOLE), fed(engine, 1)

        def worst(chunks: tuple[int, ...]) -> float:
            return max(float(np.abs(prefilled(engine, chunk) - whole).max()) for chunk in chunks)

        return {
            "preset": precision,
            "range": float(whole.max() - whole.min()),
            "blocks": worst(BLOCKS),
            "odd": worst(ODD),
            "runs": max(float(np.abs(fed(engine, count) - single).max()) for count in RUNS),
        }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "results" / "reuse_rounding.json"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = [measure(precision, Path(temporary) / precision) for precision in PRESETS]
    print("| preset | range of logits | pieces of whole blocks | odd pieces | several tokens a run |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        values = (f"{row[name]:.2g}" for name in ("blocks", "odd", "runs"))
        print(f"| {row['preset']} | {row['range']:.0f} | {' | '.join(values)} |")
    document = {"date": str(date.today()), "machine": this_machine().to_json(), "presets": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
