"""What outlier channels cost: the pocket model with injected ones, quantized as the presets do.

    python benchmarks/outliers.py [--workspace FOLDER] [-o FOLDER]

scripts/outlier_channels.py makes one channel of 32 larger by 10 and by 100, at every input of a matrix that a
norm or the up matrix scales, and the weights that read it as much smaller, so that the model computes the
same. It is exported with balanced channels, as presets do, and without. The divergence is measured on newly
drawn screens against the original in torch, with 8-bit activations (accuracy level 4) and float ones (1).
Prints a table, writes results/outliers.json and docs/parity/outliers.md, and prints the JSON document as the
last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from outlier_channels import inject, read_tensors, write_checkpoint
from pocket_measure import THREADS, Workspace, markdown

from autoglm_edge.embedded import pocket_path
from autoglm_edge.export.pipeline import export
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.parity.reference import Reference
from autoglm_edge.parity.validate import validate
from autoglm_edge.quantize.recipe import PRESETS, Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "parity"
SCALES = (1, 10, 100)
QUANTIZED = (("int8", 4), ("int8", 1), ("int4", 4), ("int4", 1))
KINDS = (("fp32", None, False), *((*kind, balanced) for balanced in (False, True) for kind in QUANTIZED))
"""Preset, accuracy level, and whether channels are balanced."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, help="folder of benchmarks/pareto.py, for its reference")
    parser.add_argument("--screens", type=int, default=1000, help="of that folder (default: 1000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("-o", "--output", type=Path, help="one folder for everything written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workspace = Workspace.open(
            arguments.workspace or folder / "workspace", arguments.screens, arguments.jobs
        )
        reference = workspace.prepare_sensitivity()
        screens = len(Reference.open(reference))
        tasks = []
        for scale in SCALES:
            tensors = inject(read_tensors(pocket_path()), scale)
            checkpoint = write_checkpoint(tensors, pocket_path(), folder / f"{scale}")
            for precision, level, balanced in KINDS:
                name = f"{precision}/{level or 0}/{scale}/{'balanced' if balanced else 'plain'}"
                recipe = replace(PRESETS[precision].with_(accuracy_level=level), balance=balanced)
                target = folder / name.replace("/", "-")
                tasks.append((name, partial(measure, checkpoint, target, reference, recipe)))
        found = {name: float(value) for name, value in workspace.run(tasks).items()}
    document = {
        "benchmark": "outliers",
        "date": date.today().isoformat(),
        "command": "python benchmarks/outliers.py",
        "machine": this_machine().short,
        "onnxruntime": onnxruntime.__version__,
        "screens": screens,
        "mean_kl": found,
    }
    results, docs = arguments.output or RESULTS, arguments.output or DOCS
    (results / "outliers.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (docs / "outliers.md").write_text(page(document), encoding="utf-8")
    print(table(found))
    print(json.dumps(document))


def measure(checkpoint: Path, target: Path, reference: Path, recipe: Recipe) -> str:
    """Mean KL of one bundle."""
    export(checkpoint, target, recipe=recipe)
    report = validate(target, reference, threads=THREADS, limits="int4")
    if report.candidate is None:
        raise SystemExit(f"{target.name} could not be compared: {report.faults[0].detail}")
    return repr(report.candidate.answer.kl.mean)


def page(document: dict[str, Any]) -> str:
    """The text of docs/parity/outliers.md."""
    return (
        "# What outlier channels cost\n\n"
        f"Made on {document['date']} by `{document['command']}` on {document['machine']}, onnxruntime "
        f"{document['onnxruntime']}; what it means is in [parity.md](../parity.md#outlier-channels).\n"
        f"Mean KL in answers of the pocket model from the original in torch, on {document['screens']} newly "
        "drawn screens. One channel of 32 at the input of every matrix behind a norm or the up matrix is s "
        "times as large, and what reads it s times as small. The presets balance channels; *not balanced* is "
        f"the same preset with `balance = false`.\n\n{table(document['mean_kl'])}\n"
    )


def table(found: dict[str, Any]) -> str:
    """A row per recipe, a column per scale."""
    head = ["", *(f"s = {scale}" for scale in SCALES)]
    rows = [head]
    for precision, level, balanced in KINDS:
        activations = {None: "", 4: ", 8-bit activations", 1: ", float activations"}[level]
        kind = "balanced" if balanced else "plain"
        how = "" if balanced or level is None else ", not balanced"
        cells = [f"{found[f'{precision}/{level or 0}/{scale}/{kind}']:.2e}" for scale in SCALES]
        rows.append([precision + activations + how, *cells])
    return markdown(rows)


if __name__ == "__main__":
    main()
