"""Bytes against fidelity: the pocket model in every recipe, with speed and memory of a run.

    python benchmarks/pareto.py [--screens 1000] [--workspace FOLDER] [-o FOLDER]

Fidelity is measured against torch in fp32 on newly drawn screens (scripts/pocket_measure.py: references are
recorded once, every recipe is exported and validated; a workspace is kept, and shared with
scripts/pocket_parity.py). bfloat16 and two quantizations by bitsandbytes stand beside the recipes. Speed and
memory come from a process of its own per recipe, in rounds through all recipes, so that what else the machine
does meets all of them alike; medians are taken. So small a model is bound by the overhead of a step, not by
the bytes it reads: the speeds say that no recipe is slow, and nothing about large models.

Prints a table, writes results/pareto.json and docs/parity/pareto.svg and pareto.md, and prints the JSON
document as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from pocket_measure import Variant, Workspace, measure_all

from autoglm_edge.embedded import pocket_path
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.measure.memory import watch
from autoglm_edge.parity.scatter import SideScale, Spot, frontier, scatter
from autoglm_edge.parity.svg import COLOURS

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "parity"
ROUNDS = 3
TOKENS = 200
LOWEST_KL = 1e-7
"""End of the plot's axis: less is rounding of fp32."""

LLAMA_CPP = (
    (0.001355, "Q8_0"),
    (0.005452, "Q6_K"),
    (0.031273, "Q4_K_M"),
    (0.071940, "Q4_0"),
    (0.101913, "Q3_K_M"),
    (0.445132, "Q2_K"),
)
"""Mean KL of Llama 3 8B on Wikitext-2 without importance matrix: scoreboard in llama.cpp's
tools/perplexity/README.md (revision f364eb6f)."""

CONTROLS = ("int3", "int2")
BASELINES = ("rtn-b32",)
SLOW = ("int8-weights",)
"""Computes with float activations, which is slow; it shows what the weights alone cost."""

PROBE = """
import json, sys
from autoglm_edge import load
from autoglm_edge.embedded import sample_screenshot
messages = [{"role": "user", "content": [
    {"type": "image", "image": str(sample_screenshot())}, {"type": "text", "text": "Open Settings"}]}]
found = []
with load(sys.argv[1], threads=1) as engine:
    never = {token: -100.0 for token in engine.bundle.manifest.tokens.eos}
    for _ in range(4):
        for delta in engine.chat(messages, max_tokens=int(sys.argv[2]), logit_bias=never, stop=None):
            pass
        found.append(delta.timings.decode_tokens_per_s)
print(json.dumps(sorted(found[1:])[1]))
"""
"""Three answers after one to warm up; the median of their decode rates."""

NOTHING = "import autoglm_edge.runtime.engine, time; time.sleep(0.5)"
"""A process that has loaded the engine's code and no model."""


@dataclass(frozen=True)
class Row:
    """One recipe or baseline.

    Attributes:
        name: of it.
        note: what it is.
        weight_bytes: stored.
        kl: mean over the answers, in nats.
        kl_error: standard error of it.
        kl_p99: 99th percentile.
        top1: hits and total of positions with the same likeliest token.
        taps: hits and total of taps in the box.
        taps_interval: 95 % of the share.
        same: answers that are the same, and their total.
        passed: the limits of its recipe; None for baselines.
        tokens_per_s: of decode, or None.
        anon_bytes: peak of anonymous memory, or None.
    """

    name: str
    note: str
    weight_bytes: int
    kl: float
    kl_error: float
    kl_p99: float
    top1: tuple[int, int]
    taps: tuple[int, int]
    taps_interval: tuple[float, float]
    same: tuple[int, int]
    passed: bool | None = None
    tokens_per_s: float | None = None
    anon_bytes: int | None = None


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--screens", type=int, default=1000, help="newly drawn (default: 1000)")
    parser.add_argument("--workspace", type=Path, help="folder to keep measurements in and to go on from")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("-o", "--output", type=Path, help="one folder for everything written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.workspace or Path(temporary)
        workspace = Workspace.open(folder, arguments.screens, arguments.jobs)
        document = run(workspace)
    results, docs = arguments.output or RESULTS, arguments.output or DOCS
    for folder in (results, docs):
        folder.mkdir(parents=True, exist_ok=True)
    rows = [row_of(item) for item in document["rows"]]
    (results / "pareto.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (docs / "pareto.svg").write_text(draw(rows), encoding="utf-8")
    (docs / "pareto.md").write_text(page(document, rows), encoding="utf-8")
    print(table(rows))
    print(json.dumps(document))


def run(workspace: Workspace) -> dict[str, Any]:
    """All figures as JSON values."""
    chosen, documents = measure_all(workspace)
    empty, probes = probe([(item, workspace.bundle(item)) for item in chosen])
    rows = [{**figures(documents[item.name], "candidate"), **probes[item.name]} for item in chosen]
    rows += baseline_rows(documents["fp32"])
    return {
        "benchmark": "pareto",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/pareto.py --screens {workspace.screens}",
        "machine": this_machine().short,
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "reference": documents["fp32"]["fingerprint"],
        "screens": workspace.screens,
        "answer_positions": documents["fp32"]["candidate"]["answer"]["kl"]["count"],
        "empty_process_anon_bytes": empty,
        "refused_baselines": workspace.refused(),
        "llama_cpp_kl": {name: value for value, name in LLAMA_CPP},
        "rows": rows,
    }


def figures(document: dict[str, Any], key: str) -> dict[str, Any]:
    """The row of a report's candidate."""
    found = comparison_figures(document[key])
    return {
        "name": document["variant"],
        "note": document["note"],
        "weight_bytes": document["weight_bytes"],
        "total_bytes": document["bundle"]["total_bytes"],
        "passed": document["passed"],
        **found,
    }


def comparison_figures(comparison: dict[str, Any]) -> dict[str, Any]:
    """Fidelity of one candidate."""
    answer, actions = comparison["answer"], comparison["actions"]
    return {
        "kl": answer["kl"]["mean"],
        "kl_error": answer["kl_error"],
        "kl_p99": answer["kl"]["p99"],
        "top1": [answer["top1"]["hits"], answer["top1"]["total"]],
        "taps": [actions["candidate_hits"]["hits"], actions["candidate_hits"]["total"]],
        "taps_interval": [actions["candidate_hits"]["low"], actions["candidate_hits"]["high"]],
        "same": [comparison["same_answers"]["hits"], comparison["same_answers"]["total"]],
    }


def baseline_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of what was recorded along the reference."""
    names = {"bnb-nf4": "bitsandbytes, 4 bits", "bnb-int8": "bitsandbytes, 8 bits"}
    rows = [("bf16", "torch, everything in bfloat16", document["floor"])]
    for item in document["baselines"]:
        kind = next(name for name in names if name in item["title"])
        rows.append((kind, names[kind], item))
    return [
        {
            "name": name,
            "note": note,
            "weight_bytes": torch_bytes(name),
            "passed": None,
            **comparison_figures(item),
        }
        for name, note, item in rows
    ]


def torch_bytes(kind: str) -> int:
    """Bytes of the weights as torch or bitsandbytes keeps them, everything else in bfloat16.

    bitsandbytes quantizes the linear layers but the head: 8 bits and a float per row, or 4 bits and a float
    per 64 weights.
    """
    from safetensors import safe_open

    total = 0
    with safe_open(pocket_path() / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            count = math.prod(shape)
            linear = len(shape) == 2 and ("proj" in name or "qkv" in name) and "patch_embed" not in name
            if kind == "bf16" or not linear:
                total += 2 * count
            elif kind == "bnb-int8":
                total += count + 4 * shape[0]
            else:
                total += count // 2 + 4 * math.ceil(count / 64)
    return total


def probe(bundles: Sequence[tuple[Variant, Path]]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Anonymous memory of a process without a model; and decode rate and peak memory by recipe."""
    empty = check(watch([sys.executable, "-c", NOTHING], interval=0.02)).peak.anon_bytes
    speeds: dict[str, list[float]] = {item.name: [] for item, _ in bundles}
    peaks: dict[str, list[int]] = {item.name: [] for item, _ in bundles}
    for number in range(ROUNDS):
        print(f"speed and memory, round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        for item, bundle in bundles:
            watched = check(watch([sys.executable, "-c", PROBE, str(bundle), str(TOKENS)], interval=0.02))
            speeds[item.name].append(json.loads(watched.stdout.splitlines()[-1]))
            peaks[item.name].append(watched.peak.anon_bytes)
    return empty, {
        name: {
            "tokens_per_s": round(statistics.median(values), 1),
            "anon_bytes": int(statistics.median(peaks[name])),
        }
        for name, values in speeds.items()
    }


def check(watched: Any) -> Any:
    """Stop if the process failed."""
    if watched.returncode:
        raise SystemExit(f"the probe ended with {watched.returncode}")
    return watched


def row_of(item: dict[str, Any]) -> Row:
    """A row from its JSON values."""
    pairs = {name: tuple(item[name]) for name in ("top1", "taps", "taps_interval", "same")}
    plain = (
        "name",
        "note",
        "weight_bytes",
        "kl",
        "kl_error",
        "kl_p99",
        "passed",
        "tokens_per_s",
        "anon_bytes",
    )
    return Row(**{name: item.get(name) for name in plain}, **pairs)


def table(rows: Sequence[Row]) -> str:
    """For a terminal and for Markdown; ratios are to fp32."""
    first = next(row for row in rows if row.name == "fp32")
    head = [
        *["", "weights", "mean KL", "± s.e.", "p99 KL", "same token", "taps in box", "95 %", "same answers"],
        *["decode", "peak memory", "limits"],
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
    for row in sorted(rows, key=lambda item: (item.tokens_per_s is None, -item.weight_bytes, item.kl)):
        low, high = row.taps_interval
        lines.append(
            [
                row.name,
                f"{row.weight_bytes / 1e6:.2f} MB",
                f"{row.kl:.2e}",
                f"{row.kl_error:.0e}",
                f"{row.kl_p99:.1e}",
                f"{percent(row.top1, 3)}",
                f"{percent(row.taps, 2)}",
                f"{100 * low:.1f} to {100 * high:.1f}",
                f"{percent(row.same, 1)}",
                ratio(row.tokens_per_s, first.tokens_per_s),
                "-" if row.anon_bytes is None else f"{row.anon_bytes / 1e6:.0f} MB",
                "-" if row.passed is None else "passed" if row.passed else "failed",
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def page(document: dict[str, Any], rows: Sequence[Row]) -> str:
    """The text of docs/parity/pareto.md."""
    empty = document["empty_process_anon_bytes"] / 1e6
    refused = "".join(f"\n{kind}: {text}\n" for kind, text in document["refused_baselines"].items())
    return (
        "# Bytes against fidelity\n\n"
        f"Made on {document['date']} by `{document['command']}` on {document['machine']}, Python "
        f"{document['python']}, onnxruntime {document['onnxruntime']}.\n"
        f"{document['screens']} newly drawn screens, {document['answer_positions']:,} positions in answers; "
        "what the figures mean is in [parity.md](../parity.md).\n\n"
        "![Mean KL divergence against bytes of the weights](pareto.svg)\n\n"
        "Bars: 95 %. Blue: recipes; the band joins those that none beats in both. Orange: what other "
        "exporters make. Violet: controls that must fail. Rings: for comparison, not for use. Triangles: "
        f"below the axis.\n\n{table(rows)}\n\n"
        "Bytes are those of the weights, scales and zero points; 2- and 3-bit integers lie in fields of 4 "
        "bits. bfloat16 and bitsandbytes: as torch keeps them, what is not quantized in bfloat16. Decode: "
        "one thread, as a ratio to fp32 in the same run; so small a model is bound by the overhead of a "
        "step. Peak memory is anonymous; a process that has loaded the engine and no model has "
        f"{empty:.0f} MB.\n{refused}\n" + "\n".join(f"- `{row.name}`: {row.note}" for row in rows) + "\n"
    )


def percent(share: tuple[int, int], digits: int) -> str:
    """A share of hits."""
    return f"{100 * share[0] / share[1]:.{digits}f} %" if share[1] else "-"


def ratio(value: float | None, first: float | None) -> str:
    """A rate relative to another."""
    return "-" if value is None or not first else f"{value / first:.2f} x"


def draw(rows: Sequence[Row]) -> str:
    """The plot."""
    spots = [
        Spot(
            row.name,
            row.weight_bytes / 1e6,
            max(row.kl, 1e-30),
            1.96 * row.kl_error,
            colour(row),
            hollow=row.tokens_per_s is None or row.name in SLOW,
        )
        for row in rows
    ]
    own = [spot for spot in spots if spot.colour == COLOURS[0] and not spot.hollow]
    title = (
        "for orientation: mean KL of",
        "llama.cpp's formats, Llama 3 8B,",
        "Wikitext-2 (prose, not answers)",
    )
    note = ("llama.cpp, tools/perplexity/", "README.md, scoreboard without", "importance matrix")
    return scatter(
        spots,
        x_label="bytes of the weights, MB",
        y_label="mean KL divergence from fp32 in answers, nats (95 %)",
        lowest=LOWEST_KL,
        edge=[spot for spot in frontier(own) if spot.y >= LOWEST_KL],
        side=SideScale(title, LLAMA_CPP, note),
    )


def colour(row: Row) -> str:
    """Blue for our recipes, orange for the baseline to beat, violet for controls, grey for torch's."""
    if row.tokens_per_s is None:
        return "#6b7280"
    if row.name in CONTROLS:
        return COLOURS[4]
    return COLOURS[2] if row.name in BASELINES else COLOURS[0]


if __name__ == "__main__":
    main()
