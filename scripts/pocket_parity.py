#!/usr/bin/env python3
"""Measure the pocket model in all preset recipes against torch, and write the reports under docs/parity/.

In: nothing but the package's own checkpoint. Out: docs/parity/RECIPE.html for every recipe, and a table with
a JSON document in docs/parity/pocket.md and pocket.json. References are recorded anew, in fp32 and, along
that, in bf16 (the floor) and, if asked for, as bitsandbytes quantizes (baselines).

    scripts/pocket_parity.py
    scripts/pocket_parity.py --count 60 --baselines -o /tmp/parity
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Literal

import pocket_prompts

from autoglm_edge.export.pipeline import export
from autoglm_edge.parity.page import html_page
from autoglm_edge.parity.record import record
from autoglm_edge.parity.report import Report, figure_rows
from autoglm_edge.parity.validate import validate

RECIPES = ("fp32", "fp16", "int8", "int4", "int4-mixed", "int4-all")
BASELINES: tuple[Literal["bnb-nf4", "bnb-int8"], ...] = ("bnb-nf4", "bnb-int8")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "parity"


def main() -> None:
    """Record, export, validate, write."""
    parser = argparse.ArgumentParser(description="Measure the pocket model in all recipes against torch.")
    parser.add_argument("--count", type=int, default=200, help="screens (default: 200)")
    parser.add_argument("-o", "--output", type=Path, default=DOCS, help="folder (default: docs/parity)")
    parser.add_argument("--baselines", action="store_true", help="record bitsandbytes, too")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        reports = measure(Path(name), arguments.count, BASELINES if arguments.baselines else ())
    for recipe, report in reports.items():
        (arguments.output / f"{recipe}.html").write_text(html_page(report), encoding="utf-8")
    (arguments.output / "pocket.md").write_text(page(reports, arguments.count), encoding="utf-8")
    document = {
        recipe: {"total_bytes": report.bundle.total_bytes, **report.figures()}
        for recipe, report in reports.items()
    }
    (arguments.output / "pocket.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(page(reports, arguments.count))
    print(json.dumps(document))


def measure(folder: Path, count: int, kinds: Sequence[Literal["bnb-nf4", "bnb-int8"]]) -> dict[str, Report]:
    """A report per recipe."""
    prompts = folder / "pocket.jsonl"
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in pocket_prompts.prompts("parity", count)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    reference, floor = folder / "fp32.safetensors", folder / "bf16.safetensors"
    record("pocket", reference, prompts=str(prompts))
    record("pocket", floor, like=reference, dtype="bfloat16")
    baselines = []
    for baseline in kinds:
        baselines.append(folder / f"{baseline}.safetensors")
        record("pocket", baselines[-1], like=reference, baseline=baseline)
    reports = {}
    for recipe in RECIPES:
        export("pocket", folder / recipe, precision=recipe)
        reports[recipe] = validate(folder / recipe, reference, floor=floor, baselines=baselines)
        print(f"{recipe}: {'passed' if reports[recipe].passed else 'failed'}", flush=True)
    return reports


def page(reports: dict[str, Report], count: int) -> str:
    """The table of all recipes, one column each, the floor and the baselines at the end."""
    first = next(iter(reports.values()))
    own = [(recipe, report.candidate) for recipe, report in reports.items() if report.candidate is not None]
    others = [(item.title, item) for item in first.columns[1:]]
    columns = [*own, *others]
    rows = figure_rows([item for _, item in columns])
    sizes = [
        f"{reports[name].bundle.total_bytes / 1e6:.1f} MB" if name in reports else "" for name, _ in columns
    ]
    verdicts = [
        ("passed" if reports[name].passed else "failed") if name in reports else "" for name, _ in columns
    ]
    table = [["", *(name for name, _ in columns)], ["---"] * (len(columns) + 1)]
    table += [["bundle", *sizes], ["limits", *verdicts], *([row[0].strip(), *row[1:]] for row in rows)]
    versions = ", ".join(f"{name} {version}" for name, version in first.fingerprint.versions.items())
    links = ", ".join(f"[{recipe}]({recipe}.html)" for recipe in reports)
    return (
        "# The pocket model in all recipes\n\n"
        f"Made on {date.today().isoformat()} by `python scripts/pocket_parity.py --count {count}`; "
        "what the figures mean is in [parity.md](../parity.md).\n"
        f"{count} newly drawn screens, one question each; {versions}; {platform.machine()}, Python "
        f"{platform.python_version()}.\n\nPages with plots: {links}.\n\n"
        + "\n".join("| " + " | ".join(row) + " |" for row in table)
        + "\n"
    )


if __name__ == "__main__":
    main()
