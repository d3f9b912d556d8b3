"""The 9B, whole: export a checkpoint of the real shape to INT4, load it, answer a prompt with a screenshot.

    python scripts/make_checkpoint.py --shape autoglm-9b -o /tmp/autoglm-9b
    python benchmarks/full_size.py /tmp/autoglm-9b -o /tmp/autoglm-9b-int4

The weights are random, so the answer means nothing; times, bytes and memory are those of the real model.
Beside the decode rate stands the machine's read bandwidth, measured in the same run: decoding reads every
weight once for each token. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

import onnxruntime

from autoglm_edge.measure.bandwidth import read_bandwidth
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.measure.memory import Watched, watch
from autoglm_edge.runtime.machine.topology import usable_cores

AUTOGLM = [sys.executable, "-m", "autoglm_edge"]


def main() -> int:
    """Run the steps that were asked for and print what they cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--precision", default="int4", choices=["int4", "int8", "fp16", "fp32"])
    parser.add_argument(
        "--max-image-tokens", type=int, default=592, help="image budget of the run (default 592)"
    )
    parser.add_argument("--screenshot", type=Path, help="default: the bundled one")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="keep the bundle")
    parser.add_argument("--reuse", action="store_true", help="skip the export if the bundle is there")
    arguments = parser.parse_args()

    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": this_machine().short,
        "precision": arguments.precision,
    }
    report["onnxruntime"] = onnxruntime.__version__
    if not (arguments.reuse and arguments.output.exists()):
        report["export"] = export(arguments)
    report["bundle_bytes"] = sum(path.stat().st_size for path in arguments.output.iterdir())
    report["read_bandwidth_gb_per_s"] = round(read_bandwidth(usable_cores()) / 1e9, 1)
    prepared = check(watch([*AUTOGLM, "prepare", str(arguments.output)]))
    report["prepare"] = {"seconds": round(prepared.seconds, 1), "peak": prepared.peak.to_json()}
    report["load"] = load(arguments)
    report["run"] = run(arguments)
    manifest = json.loads((arguments.output / "manifest.json").read_text())
    report["part_bytes"] = {name: part["weight_bytes"] for name, part in manifest["parts"].items()}
    per_token = report["part_bytes"]["decoder"] * report["run"]["timings"]["decode_tokens_per_s"] / 1e9
    report["decode_read_gb_per_s"] = round(per_token, 2)
    if not arguments.keep:
        shutil.rmtree(arguments.output)
    print_table(report)
    print(json.dumps(report, ensure_ascii=False))
    return 0


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Export in a process of its own."""
    command = [
        *[*AUTOGLM, "export", str(arguments.checkpoint), "-o", str(arguments.output)],
        *[f"--{arguments.precision}", "--force"],
    ]
    watched = check(watch(command))
    return {"seconds": round(watched.seconds, 1), "peak": watched.peak.to_json()}


LOAD = """
import json, sys, time
from autoglm_edge import load
started = time.perf_counter()
engine = load(sys.argv[1])
print(json.dumps({"seconds": round(time.perf_counter() - started, 2)}))
"""


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load decoder and embedding in a process of its own, with the files in the page cache if they fit."""
    watched = check(watch([sys.executable, "-c", LOAD, str(arguments.output)]))
    return {**json.loads(watched.stdout), "peak": watched.peak.to_json()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer one screenshot prompt in a process of its own; no drafts: random weights repeat themselves."""
    command = [
        *[*AUTOGLM, "run", str(arguments.output), "打开设置", "--json", "--no-lookup"],
        *["--max-tokens", str(arguments.tokens), "--max-image-tokens", str(arguments.max_image_tokens)],
    ]
    if arguments.screenshot:
        command += ["-i", str(arguments.screenshot)]
    else:
        from autoglm_edge.embedded import sample_screenshot

        command += ["-i", str(sample_screenshot())]
    watched = check(watch(command))
    answer = json.loads(watched.stdout.splitlines()[-1])
    kept = {name: answer[name] for name in ("usage", "timings", "image_size", "finish_reason")}
    return {**kept, "wall_seconds": round(watched.seconds, 1), "peak": watched.peak.to_json()}


def check(watched: Watched) -> Watched:
    """Stop the benchmark if the command failed."""
    if watched.returncode:
        raise SystemExit(f"the command ended with {watched.returncode}")
    return watched


def print_table(report: dict[str, Any]) -> None:
    """What a person wants to know."""
    run_report = report["run"]
    rows = [("bundle", f"{report['bundle_bytes'] / 1e9:.2f} GB")]
    if "export" in report:
        rows += [
            ("export", f"{report['export']['seconds']:.0f} s"),
            ("export, peak anonymous", f"{report['export']['peak']['anon_bytes'] / 1e6:.0f} MB"),
        ]
    rows += [
        ("preparing weights, once", f"{report['prepare']['seconds']:.0f} s"),
        ("load, files in the page cache", f"{report['load']['seconds']:.1f} s"),
        ("prompt tokens", str(run_report["usage"]["prompt_tokens"])),
        ("image encoding", f"{run_report['timings']['image_ms'] / 1e3:.1f} s"),
        ("time to first token", f"{run_report['timings']['ttft_ms'] / 1e3:.1f} s"),
        ("prefill", f"{run_report['timings']['prefill_tokens_per_s']:.1f} tokens/s"),
        ("decode", f"{run_report['timings']['decode_tokens_per_s']:.2f} tokens/s"),
        ("weights read by decode", f"{report['decode_read_gb_per_s']:.1f} GB/s"),
        ("read bandwidth of the machine", f"{report['read_bandwidth_gb_per_s']:.1f} GB/s"),
        ("run, peak anonymous", f"{run_report['peak']['anon_bytes'] / 1e9:.2f} GB"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    raise SystemExit(main())
