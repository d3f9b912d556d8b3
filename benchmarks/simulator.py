"""Runs bundles on simulated devices, compares each run with its forecast, and rewrites docs/android_sim.md.

    python benchmarks/simulator.py OUT-int4 OUT-int8                        phones of 4, 6, 8, 12 and 16 GB
    python benchmarks/simulator.py OUT-int4 --device rpi5-8 --state service
    python benchmarks/simulator.py --tables                                 measure nothing, rewrite the page
    python benchmarks/simulator.py --devices-only                           the table of profiles alone

In: bundles and devices. Out: benchmarks/results/simulator.json, a timeline per run under docs/plots/ (with
--plots), and three tables between markers of the page: what lives where, the forecast beside what was
measured, and the profiles with the basis of their figures. A run that fails stands there as such. Prints the
matrix; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from report_tables import insert

from autoglm_edge.android_sim.device import Device, list_devices
from autoglm_edge.android_sim.report.matrix import Matrix
from autoglm_edge.android_sim.report.timeline import draw_png
from autoglm_edge.android_sim.report.words import size
from autoglm_edge.android_sim.simulate import Ask, simulate
from autoglm_edge.android_sim.simulation import Simulation
from autoglm_edge.android_sim.verdict import LABELS
from autoglm_edge.embedded import sample_screenshot
from autoglm_edge.measure.machine import this_machine

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "simulator.json"
PAGE = ROOT / "docs" / "android_sim.md"
PHONES = ("phone-4", "phone-6", "phone-8", "phone-12", "phone-16")
MISSING = "not measured"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, then write the page."""
    options = _parse(arguments)
    parts = {"devices": devices_table(list_devices())}
    if not options.devices_only:
        if not options.tables:
            document = measure(options)
            options.result.parent.mkdir(parents=True, exist_ok=True)
            options.result.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
        document = json.loads(options.result.read_text(encoding="utf-8")) if options.result.exists() else {}
        parts |= {"matrix": matrix_table(document), "forecast": forecast_table(document)}
    if options.page.exists():
        text = options.page.read_text(encoding="utf-8")
        options.page.write_text(insert(text, parts), encoding="utf-8")
    if not options.tables and not options.devices_only:
        print(json.dumps(document, ensure_ascii=False))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every bundle on every device in every state, one after the other."""
    ask = Ask(
        prompt=options.prompt,
        images=() if options.no_image else (options.image or sample_screenshot(),),
        max_tokens=options.max_tokens,
        max_image_tokens=options.max_image_tokens,
        context=options.context,
        reference=options.reference,
    )
    found: list[Simulation] = []
    for device in options.device or PHONES:
        for state in options.state or ("visible",):
            for bundle in options.bundles:
                print(f"== {bundle} on {device}, {state}", file=sys.stderr)
                item = simulate(
                    bundle,
                    device,
                    state=state,
                    ask=ask,
                    enforcement=options.enforcement,
                    timeout=options.timeout,
                )
                found.append(item)
                print(f"   {item.verdict.name}: {item.verdict.reason}", file=sys.stderr)
                if options.plots is not None:
                    options.plots.mkdir(parents=True, exist_ok=True)
                    name = f"sim-{item.subject.name}-{item.device.id}-{state}.png"
                    draw_png(item.trace, item.budget, item.verdict, item.title, options.plots / name)
    print(Matrix.of(found).to_table())
    return {
        "date": date.today().isoformat(),
        "machine": this_machine().to_json(),
        "question": {
            "max_tokens": options.max_tokens,
            "context": options.context,
            "max_image_tokens": options.max_image_tokens,
            "picture": not options.no_image,
        },
        "matrix": Matrix.of(found).to_markdown(),
        "runs": [item.to_dict() for item in found],
    }


def matrix_table(document: dict[str, Any]) -> str:
    """What lives where."""
    if not document:
        return MISSING
    return f"{_made(document)}\n\n{document['matrix']}"


def forecast_table(document: dict[str, Any]) -> str:
    """Each run's forecast beside it: peaks of anonymous memory by phase."""
    if not document:
        return MISSING
    rows = [
        "| bundle | device | foretold | measured | peak foretold | peak measured | error | errors by phase |",
        "|---|---|---|---|---|---|---|---|",
    ]
    errors = []
    for run in document["runs"]:
        by_phase = {item["phase"]: item for item in run["forecast_errors"] if item["what"] == "anonymous"}
        peak = by_phase.pop("peak", None)
        phases = ", ".join(f"{name} {100 * item['error']:+.0f} %" for name, item in by_phase.items())
        errors += [abs(peak["error"])] if peak else []
        foretold = run["forecast"]["expected"] if run["forecast"] else "?"
        cells = [
            run["bundle"],
            f"{run['device']}, {run['state']}",
            {"killed": "killed", **LABELS}.get(foretold, foretold),
            LABELS[run["verdict"]],
            size(run["forecast"]["peak_bytes"]) if run["forecast"] else "",
            size(run["peak_anon_swap_bytes"]),
            f"{100 * peak['error']:+.0f} %" if peak else "killed before its peak",
            phases or "none",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    right = sum(_same(run) for run in document["runs"])
    summary = f"The verdict was foretold in {right} of {len(document['runs'])} runs"
    if errors:
        mean, worst = sum(errors) / len(errors), max(errors)
        summary += f"; the peak was {100 * mean:.0f} % off on average, {100 * worst:.0f} % at most"
    return "\n".join(rows) + f"\n\n{summary}."


def _same(run: dict[str, Any]) -> bool:
    """Whether forecast and run agree: killed or not, thrashing or not."""
    foretold, verdict = (run["forecast"] or {}).get("expected", ""), run["verdict"]
    if foretold == "killed":
        return verdict in ("killed_oom", "killed_limiter", "alloc_failed")
    return bool(foretold == verdict)


def devices_table(devices: Sequence[Device]) -> str:
    """The built-in profiles: what an app has, and where that comes from."""
    rows = [
        "| id | cores | app visible / service | memory | storage | basis of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for item in devices:
        limits = " / ".join(size(item.bytes(name)) for name in ("mem_visible", "mem_service"))
        memory, storage = item.figures["dram_peak"], item.figures["storage_read"]
        cells = [
            item.id,
            item.cores,
            limits,
            f"{memory.value:g} GB/s ({memory.basis})",
            f"{item.storage}, {storage.value:g} MB/s ({storage.basis})",
            item.figures["mem_visible"].basis,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _made(document: dict[str, Any]) -> str:
    machine, question = document["machine"], document["question"]
    picture = "a screenshot, " if question["picture"] else ""
    return (
        f"{document['date']}, {machine['processor']}, {machine['cores']} cores, onnxruntime "
        f"{machine['onnxruntime']}; {picture}a short prompt, {question['max_tokens']} tokens of an answer."
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--device", action="append", help=f"id or TOML file (default {', '.join(PHONES)})")
    parser.add_argument("--state", action="append", choices=["visible", "service"])
    parser.add_argument("--prompt", default="打开设置")
    parser.add_argument("--image", type=Path, help="default: the screenshot of the package")
    parser.add_argument("--no-image", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--max-image-tokens", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--enforcement", default="auto")
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--plots", type=Path, help="write a timeline of every run here")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--tables", action="store_true", help="measure nothing, rewrite the page")
    parser.add_argument("--devices-only", action="store_true", help="rewrite the table of profiles alone")
    options = parser.parse_args(arguments)
    if not options.bundles and not (options.tables or options.devices_only):
        parser.error("name bundles, or rewrite the --tables alone")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
