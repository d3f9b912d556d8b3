"""The pocket model against torch in many recipes: what pocket_parity.py and benchmarks/pareto.py share.

In: a folder and a number of screens. Out: in the folder, recorded references, bundles, and for every recipe
its report, also as a page. What is there is not made again, so the two scripts can share a folder, and an
interrupted run goes on; a folder that was made from other weights or other screens is refused. A report is
judged anew by the limits of today; other changes of the code are not noticed: take a new folder after one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pocket_prompts

from autoglm_edge.autorecipe.search import AutoOptions, auto_recipe
from autoglm_edge.embedded import pocket_path
from autoglm_edge.errors import ParityError
from autoglm_edge.export.pipeline import export
from autoglm_edge.parity.limits import limits_for
from autoglm_edge.parity.page import html_page
from autoglm_edge.parity.record import record
from autoglm_edge.parity.report import Report
from autoglm_edge.parity.validate import judge, validate
from autoglm_edge.quantize import BlockFormat, Recipe
from autoglm_edge.quantize.recipe import PRESETS, Rule
from autoglm_edge.runtime.session import Prefill

Kind = Literal["bfloat16", "bnb-int8", "bnb-nf4"]
REFERENCES: tuple[Kind, ...] = ("bfloat16", "bnb-int8", "bnb-nf4")
"""Recorded along the fp32 reference; the first is the floor, the others are baselines."""
SEED = "parity"
SENSITIVITY_SEED = "sensitivity"
"""Screens by which a recipe is chosen are not the screens by which it is judged."""
SENSITIVITY_SCREENS = 100
SCALE = 1
"""Pixels per dp of the screens: larger pictures end as the same patches, and take longer to read."""
THREADS = 1
"""Of an engine; more of them do not make so small a model faster."""

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
DECODER, VISION = "model.language_model.layers.*", "model.visual.*"


@dataclass(frozen=True)
class Variant:
    """A recipe to measure.

    Attributes:
        name: of files and in tables.
        recipe: with its refinements.
        note: what it is, in a few words.
        prefill: what reads prompts.
    """

    name: str
    recipe: Recipe
    note: str
    prefill: Prefill = "auto"


def rtn_block_32() -> Recipe:
    """What other exporters make of it: 4 bits, blocks of 32, zero points, round to nearest, everywhere.

    The embedding, which most of them leave in floats, has the 8 bits of our own recipes, so that nothing but
    the matrices is compared.
    """
    int4, int8 = BlockFormat(4, 32, False), BlockFormat(8, 128, True)
    rules = (Rule(DECODER, int4), Rule(HEAD, int4), Rule(EMBEDDING, int8), Rule(VISION, int4))
    return Recipe("rtn-b32", "float32", 4, rules)


def variants() -> list[Variant]:
    """Every recipe that is measured, but for the one that is chosen by measurement."""
    presets = {
        "fp32": "as the checkpoint",
        "fp16": "half precision",
        "int8": "8 bits, 8-bit activations",
        "int8-blocks": "8 bits in blocks",
        "int4": "the default",
        "int4-mixed": "the default, outer layers at 8 bits",
        "int4-all": "4 bits everywhere",
        "int3": "control, must fail",
        "int2": "control, must fail",
    }
    found = [Variant(name, PRESETS[name], note) for name, note in presets.items()]
    floats = PRESETS["int8-blocks"].with_(accuracy_level=1)
    found.insert(3, _variant("int8-weights", floats, "8 bits, float activations"))
    beside = PRESETS["int4"].with_(prefill="int8")
    found.append(
        Variant("int4-prefill", replace(beside, name="int4-prefill"), "8 bits read prompts", "integer")
    )
    layers = replace(PRESETS["int4"], name="int4-layers")
    found.append(Variant("int4-layers", layers, "4 bits, expanded to 8, read prompts", "layers"))
    baseline = rtn_block_32()
    found.append(Variant("rtn-b32", baseline, "the baseline to beat"))
    for refine, words in (("none", "round to nearest"), ("search", "searched"), ("gptq", "calibrated")):
        int4 = PRESETS["int4"].with_(refine=refine)
        if int4 != PRESETS["int4"]:
            found.append(_variant(f"int4-{refine}", int4, f"the default, {words}"))
        if refine != "none":
            found.append(_variant(f"b32-{refine}", baseline.with_(refine=refine), f"rtn-b32, {words}"))
    return found


def _variant(name: str, recipe: Recipe, note: str) -> Variant:
    return Variant(name, replace(recipe, name=name), note)


@dataclass(frozen=True)
class Measured:
    """What is kept of a measurement.

    Attributes:
        recipe: that was exported.
        weight_bytes: of all parts.
        report: as it was judged then.
    """

    recipe: Recipe
    weight_bytes: int
    report: Report


@dataclass(frozen=True)
class Workspace:
    """A folder of measurements.

    Attributes:
        folder: it.
        screens: newly drawn ones, by which is judged.
        jobs: processes at work.
    """

    folder: Path
    screens: int
    jobs: int

    @classmethod
    def open(cls, folder: Path, screens: int, jobs: int) -> Workspace:
        """Make or continue a folder.

        Raises:
            SystemExit: it holds measurements of other weights or of another number of screens.
        """
        folder.mkdir(parents=True, exist_ok=True)
        key = {"weights_sha256": _sha256(pocket_path() / "model.safetensors"), "screens": screens}
        mark = folder / "workspace.json"
        if mark.exists() and json.loads(mark.read_text()) != key:
            raise SystemExit(f"{folder} holds measurements of other weights or screens; name another folder")
        mark.write_text(json.dumps(key), encoding="utf-8")
        return cls(folder, screens, jobs)

    def reference(self, kind: str = "fp32") -> Path:
        """The file of a reference."""
        return self.folder / f"{kind}.safetensors"

    @property
    def baselines(self) -> list[Path]:
        """References by bitsandbytes, as far as it could make them."""
        return [self.reference(kind) for kind in REFERENCES[1:] if self.reference(kind).exists()]

    def bundle(self, variant: Variant) -> Path:
        """The folder of a bundle."""
        return self.folder / "bundles" / variant.name

    def page(self, variant: Variant) -> Path:
        """The file of a report's page."""
        return self.folder / "reports" / f"{variant.name}.html"

    def report(self, variant: Variant) -> Path:
        """The file of a report, a pickle: only this folder's owner writes and reads it."""
        return self.folder / "reports" / f"{variant.name}.pickle"

    def refused(self) -> dict[str, str]:
        """What bitsandbytes said where it could not quantize this model."""
        return {
            kind: path.read_text(encoding="utf-8")
            for kind in REFERENCES
            if (path := self.folder / f"{kind}.refused").exists()
        }

    def prepare(self) -> None:
        """Draw the screens and record the references."""
        prompts = _draw(self.folder / "screens.jsonl", SEED, self.screens)
        if not self.reference().exists():
            self.run([("reference fp32", partial(_record, self.reference(), str(prompts)))])
        self.run(
            [
                (f"reference {kind}", partial(_record_along, self.reference(kind), self.reference(), kind))
                for kind in REFERENCES
                if not self.reference(kind).exists() and kind not in self.refused()
            ]
        )

    def prepare_sensitivity(self) -> Path:
        """A reference on other screens, by which a recipe can be chosen."""
        prompts = _draw(self.folder / "sensitivity.jsonl", SENSITIVITY_SEED, SENSITIVITY_SCREENS)
        if not self.reference("sensitivity").exists():
            self.run([("reference for auto", partial(_record, self.reference("sensitivity"), str(prompts)))])
        return self.reference("sensitivity")

    def measure(self, chosen: Sequence[Variant]) -> dict[str, dict[str, Any]]:
        """Export and validate; pages, and the reports by name as JSON values.

        Figures are kept, verdicts are not: they are by the limits of today.
        """
        for name in ("reports", "bundles"):
            (self.folder / name).mkdir(exist_ok=True)
        missing = [item for item in chosen if not self._is_measured(item)]
        self.run([(item.name, partial(_measure, self, item)) for item in missing])
        return {item.name: self._judged(item) for item in chosen}

    def _is_measured(self, variant: Variant) -> bool:
        path = self.report(variant)
        return path.exists() and _read(path).recipe == variant.recipe

    def _judged(self, variant: Variant) -> dict[str, Any]:
        """Judge a report, write its page, and give it as JSON values."""
        measured = _read(self.report(variant))
        report, limits = measured.report, limits_for(variant.recipe.to_json())
        criteria = judge(report.candidate, report.floor, report.faults, limits, report.cases)
        report = replace(report, limits=limits.name, criteria=tuple(criteria))
        _write(self.page(variant), html_page(report))
        document: dict[str, Any] = json.loads(report.to_json(indent=None))
        return {
            "variant": variant.name,
            "note": variant.note,
            "recipe": variant.recipe.to_json(),
            "weight_bytes": measured.weight_bytes,
            **document,
        }

    def run(self, tasks: Sequence[tuple[str, Callable[[], str]]]) -> dict[str, str]:
        """Do tasks in processes of their own, one thread each; say and return what came of them."""
        found: dict[str, str] = {}
        if not tasks:
            return found
        os.environ["OMP_NUM_THREADS"] = str(THREADS)  # torch's; inherited by the processes
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(self.jobs, len(tasks)), mp_context=context) as pool:
            started = time.monotonic()
            futures: dict[Future[str], str] = {pool.submit(task): name for name, task in tasks}
            for future in as_completed(futures):
                name = futures[future]
                found[name] = future.result()
                line = f"{name}: {found[name]}, {time.monotonic() - started:.0f} s"
                print(line, file=sys.stderr, flush=True)
        return found


def measure_all(workspace: Workspace) -> tuple[list[Variant], dict[str, dict[str, Any]]]:
    """Everything: references, all recipes, and one that measurement chooses within the default's size.

    Returns:
        What was measured, in order, and the reports by name.
    """
    workspace.prepare()
    chosen = variants()
    documents = workspace.measure(chosen)
    recipe = auto_recipe(
        "pocket",
        workspace.prepare_sensitivity(),
        documents["int4"]["bundle"]["total_bytes"],
        workspace=workspace.folder / "auto",
        options=AutoOptions(threads=THREADS),
    )
    automatic = [
        _variant("auto", recipe, "bits by measurement, as large as the default"),
        _variant("auto-gptq", recipe.with_(refine="gptq"), "the same, its 4-bit matrices calibrated"),
    ]
    return [*chosen, *automatic], documents | workspace.measure(automatic)


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _draw(path: Path, seed: str, count: int) -> Path:
    if not path.exists():
        lines = [
            json.dumps(prompt, ensure_ascii=False) for prompt in pocket_prompts.prompts(seed, count, SCALE)
        ]
        _write(path, "\n".join(lines) + "\n")
    return path


def _record(target: Path, prompts: str) -> str:
    part = target.with_suffix(".partial.safetensors")
    record("pocket", part, prompts=prompts, force=True)
    part.replace(target)
    return "recorded"


def _record_along(target: Path, first: Path, kind: Kind) -> str:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every product otherwise
    part = target.with_suffix(".partial.safetensors")
    try:
        if kind == "bfloat16":
            record("pocket", part, like=first, dtype=kind, force=True)
        else:
            record("pocket", part, like=first, baseline=kind, force=True)
    except ParityError as error:
        if kind == "bfloat16":
            raise
        _write(target.with_suffix(".refused"), str(error))
        return f"not possible: {error}"
    part.replace(target)
    return "recorded"


def _measure(workspace: Workspace, variant: Variant) -> str:
    bundle = workspace.bundle(variant)
    opened = export("pocket", bundle, recipe=variant.recipe, force=True)
    report = validate(
        bundle,
        workspace.reference(),
        floor=workspace.reference("bfloat16"),
        baselines=workspace.baselines,
        threads=THREADS,
        prefill=variant.prefill,
    )
    weights = sum(part.weight_bytes for part in opened.manifest.parts.values())
    target = workspace.report(variant)
    part = target.with_suffix(".partial")
    part.write_bytes(pickle.dumps(Measured(variant.recipe, weights, report)))
    part.replace(target)
    return "done" if report.candidate is None else f"KL {report.candidate.answer.kl.mean:.2e}"


def _read(path: Path) -> Measured:
    found = pickle.loads(path.read_bytes())
    if not isinstance(found, Measured):
        raise SystemExit(f"{path} is none of these measurements; name another folder")
    return found


def _write(path: Path, text: str) -> None:
    """Put a file in place in one step, so that an interrupted run leaves no half of one."""
    part = path.with_name(path.name + ".partial")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
