"""What a way of reading prompts costs: the pocket model's answers in INT4, against a float reference.

    autoglm record pocket -o ref.safetensors --prompts screens.jsonl        # needs torch, once
    python benchmarks/native_loss.py ref.safetensors [--screens 100]

One bundle, whose prompts are read by the decoder, layer by layer by graphs, and on the compiled kernels,
which needs AMX. Prints a Markdown table; the last line is the JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, get_args

from kv_loss import score

from autoglm_edge.embedded import pocket_path
from autoglm_edge.export.pipeline import export
from autoglm_edge.measure.figures import rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.parity.reference import Reference
from autoglm_edge.runtime.native.unit import Unit, best_unit
from autoglm_edge.runtime.session import Prefill


def main() -> None:
    """Export, score, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path)
    parser.add_argument("--screens", type=int, default=100, help="the first so many (default 100)")
    output = Path(__file__).parent / "results" / "native_loss.json"
    parser.add_argument("-o", "--output", type=Path, default=output)
    arguments = parser.parse_args()
    if best_unit() != Unit.MATRICES:
        raise SystemExit("the compiled kernels need AMX, which this machine or installation does not have")
    reference = Reference.open(arguments.reference)
    cases = list(itertools.islice(reference.cases(), arguments.screens))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "int4"
        export(pocket_path(), folder, precision="int4")
        for prefill in get_args(Prefill):
            if prefill in ("decoder", "layers", "native"):
                found = score(folder, cases, reference.fingerprint.image_layout, prefill)
                rows.append({"prompts": prefill, **found})
    document = {
        "date": str(date.today()),
        "machine": this_machine().to_json(),
        "screens": len(cases),
        "rows": rows,
    }
    print(markdown(document))
    text = json.dumps(rounded(document, 4))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def markdown(document: Mapping[str, Any]) -> str:
    """A line per way."""
    lines = ["| prompts read by | mean KL, nats | ± s.e. | highest | same likeliest token |"]
    lines.append("|---|---:|---:|---:|---:|")
    lines += [
        f"| {row['prompts']} | {row['kl']:.2e} | {row['kl_error']:.0e} | {row['highest']:.1e} "
        f"| {row['same_likeliest']:.2%} |"
        for row in document["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
