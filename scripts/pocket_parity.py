#!/usr/bin/env python3
"""Measure the pocket model in all recipes against torch, and write the reports under docs/parity/.

In: nothing but the package's own checkpoint. Out: docs/parity/RECIPE.html for every recipe, tables in
docs/parity/pocket.md and their figures in pocket.json. References are recorded anew, in fp32 and, along that,
in bf16 (the floor) and as bitsandbytes quantizes (baselines). A workspace is kept and shared with
benchmarks/pareto.py; an interrupted run goes on there.

    scripts/pocket_parity.py --workspace /tmp/pocket
    scripts/pocket_parity.py --screens 60 -o /tmp/parity
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pocket_measure import Variant, Workspace, markdown, measure_all

from autoglm_edge.parity.report import number

DOCS = Path(__file__).resolve().parent.parent / "docs" / "parity"
PER_CASE = {"images", "greedy", "outcomes", "worst", "curve", "groups"}
"""What a report says of single prompts and positions; it stays out of pocket.json."""

Document = Mapping[str, Any]


def main() -> None:
    """Record, export, validate, write."""
    parser = argparse.ArgumentParser(description="Measure the pocket model in all recipes against torch.")
    parser.add_argument("--screens", type=int, default=1000, help="newly drawn (default: 1000)")
    parser.add_argument("--workspace", type=Path, help="folder to keep measurements in and to go on from")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("-o", "--output", type=Path, default=DOCS, help="folder (default: docs/parity)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.workspace or Path(temporary)
        workspace = Workspace.open(folder, arguments.screens, arguments.jobs)
        chosen, documents = measure_all(workspace)
        for stale in arguments.output.glob("*.html"):
            stale.unlink()
        for item in chosen:
            shutil.copy(workspace.page(item), arguments.output / f"{item.name}.html")
        text = page(chosen, documents, workspace)
    summary = {name: without_cases(document) for name, document in documents.items()}
    (arguments.output / "pocket.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (arguments.output / "pocket.md").write_text(text, encoding="utf-8")
    print(text)


def without_cases(value: Any) -> Any:
    """JSON values without what is said of single prompts, of the machine's paths, and twice."""
    if isinstance(value, dict):
        dropped = PER_CASE | {"path", "reference", "floor", "baselines"} if "variant" in value else PER_CASE
        return {key: without_cases(item) for key, item in value.items() if key not in dropped | {"path"}}
    return value if not isinstance(value, float) else float(f"{value:.5g}")


def page(chosen: Sequence[Variant], documents: Mapping[str, Document], workspace: Workspace) -> str:
    """The text of pocket.md."""
    first = documents["fp32"]
    mark = first["fingerprint"]
    versions = ", ".join(f"{name} {version}" for name, version in mark["versions"].items())
    columns: list[tuple[str, Document | None, Document]] = [
        (f"[{item.name}]({item.name}.html)", documents[item.name], documents[item.name]["candidate"])
        for item in chosen
    ]
    columns.append(("torch, bf16 (floor)", None, first["floor"]))
    columns += [(item["title"], None, item) for item in first["baselines"]]
    refused = "".join(
        f"\n{kind} could not be recorded: {text}\n" for kind, text in workspace.refused().items()
    )
    return (
        "# The pocket model in all recipes\n\n"
        f"Made on {date.today().isoformat()} by `python scripts/pocket_parity.py --screens "
        f"{workspace.screens}`; what the figures mean is in [parity.md](../parity.md).\n"
        f"{workspace.screens} newly drawn screens, one question each, "
        f"{first['candidate']['answer']['kl']['count']:,} positions in answers; {versions}; "
        f"{platform.machine()}, Python {platform.python_version()}. Names link to pages with plots.\n"
        f"{refused}\n"
        + "\n".join(f"- `{item.name}`: {item.note}" for item in chosen)
        + "\n\n## Divergence in answers\n\n"
        + markdown(divergence_rows(columns))
        + "\n\n## Answers and actions\n\n"
        + markdown(action_rows(columns))
        + "\n\n## Limits that were not kept\n\n"
        + "\n".join(broken(documents))
        + "\n"
    )


def divergence_rows(columns: Sequence[tuple[str, Document | None, Document]]) -> Iterator[list[str]]:
    """Head and rows of the first table."""
    yield [
        *["", "weights", "mean KL", "± s.e.", "p90", "p99", "highest", "same likeliest token"],
        *["perplexity", "RMS Δp", "vision cosine"],
    ]
    for name, document, item in columns:
        answer, kl = item["answer"], item["answer"]["kl"]
        size = "" if document is None else f"{document['weight_bytes'] / 1e6:.2f} MB"
        change = answer["perplexity"]
        yield [
            *[name, size, number(kl["mean"]), f"{answer['kl_error']:.1g}", number(kl["p90"])],
            *[number(kl["p99"]), number(kl["highest"]), share(answer["top1"], 3)],
            f"{change['change']:+.1e} ± {change['standard_error']:.0e}",
            f"{100 * answer['rms_delta_p']:.2g} %",
            f"{item['vision_cosine']:.6f}",
        ]


def action_rows(columns: Sequence[tuple[str, Document | None, Document]]) -> Iterator[list[str]]:
    """Head and rows of the second table."""
    yield [
        *["", "limits", "same answer", "same kind of action", "same arguments", "click moved, mean / most"],
        *["taps in the box", "95 %", "taps lost"],
    ]
    for name, document, item in columns:
        actions = item["actions"]
        hits, lost = actions["candidate_hits"], actions["lost"]
        verdict = "" if document is None else "passed" if document["passed"] else "failed"
        yield [
            *[name, verdict, share(item["same_answers"], 1), share(actions["kinds"], 2)],
            share(actions["arguments"], 2),
            f"{number(actions['distance']['mean'])} / {number(actions['distance']['highest'])}",
            *[share(hits, 2), f"{100 * hits['low']:.1f} to {100 * hits['high']:.1f}"],
            f"{lost['hits']} of {lost['total']}",
        ]


def broken(documents: Mapping[str, Document]) -> Iterator[str]:
    """A line for every recipe that failed."""
    found = False
    for name, document in documents.items():
        items = [
            f"{item['name']} {number(item['value'])} "
            f"({'≤' if item['at_most'] else '≥'} {number(item['limit'])})"
            for item in document["criteria"]
            if not item["kept"]
        ]
        if items:
            found = True
            yield f"- `{name}`, by the limits of {document['limits']}: {'; '.join(items)}"
    if not found:
        yield "None."


def share(value: Mapping[str, Any], digits: int) -> str:
    """Percent, or what is there instead of one."""
    return f"{100 * value['share']:.{digits}f} %" if value["total"] else "-"


if __name__ == "__main__":
    main()
