"""Recipes made by measurement: which tensors get how many bits, for the least divergence within a size.

In: a checkpoint, a reference recorded from it, a budget in bytes. Out: a recipe with layer numbers, and the
measurements behind it.

    high, low ── exported once each, into the workspace
        │  for every group of tensors: graphs that read this group from low, the rest from high ─► divergence
        ▼
    quantize/allocation.py ─► recipe ─► its own divergence, beside the sum that the groups predict

The formats to choose from are those of two or more recipes. Their data files stay as they are: a mixture of
them is three small graphs, whose initializers point into one or the other (auto_bench.py). These modules,
auto*.py, are the only ones of parity/ that make bundles; how a tensor is quantized and how a divergence is
measured is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from autoglm_edge.embedded import POCKET_NAME, pocket_path
from autoglm_edge.errors import ParityError, QuantError, RequestError
from autoglm_edge.export.calibrate.preparation import image_budget
from autoglm_edge.export.contents import created_by
from autoglm_edge.export.pipeline import export
from autoglm_edge.export.progress import Progress, ProgressEvent, silent
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.parity.record import weights_sha256
from autoglm_edge.parity.reference import Reference
from autoglm_edge.quantize.allocation import Candidate, Group, allocate
from autoglm_edge.quantize.recipe import Recipe
from autoglm_edge.quantize.recipe_reading import resolve
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.session import Device, SessionOptions

from .bench import Bench
from .choice import AutoChoice, Contender, Sensitivity
from .levels import HIGH, Levels, Palette
from .measurements import Journal
from .recipe_file import write_recipe
from .sensitivity import GROUPINGS, Grouping, TensorGroup, group_tensors

__all__ = [
    "AutoChoice",
    "AutoOptions",
    "Contender",
    "Sensitivity",
    "auto_recipe",
    "choose_recipe",
    "write_recipe",
]

DEFAULT_LEVELS = (HIGH, "int4-all")
"""Everything at 8 bits, and everything at 4: what each tensor can have, from many bytes to few."""

JOURNAL_NAME = "measurements.json"


@dataclass(frozen=True)
class AutoOptions:
    """How to measure, and what to choose from.

    Attributes:
        per: how finely tensors are grouped; see `sensitivity.group_tensors`.
        prompts: only the first so many of the reference; None for all.
        device: where to measure.
        threads: of the engine; 0 for one per core.
        max_image_tokens: as at the export to come; the reference must have been recorded with the same.
        revision: of a hub id.
        levels: presets, files or recipes, highest first; each must treat all tensors of a group alike.
        calibration: file of prompts for levels that are refined with data; None takes the package's own.
    """

    per: Grouping = "matrix"
    prompts: int | None = None
    device: Device = "cpu"
    threads: int = 0
    max_image_tokens: int | None = None
    revision: str | None = None
    levels: tuple[str | Path | Recipe, ...] = DEFAULT_LEVELS
    calibration: str | Path | None = None

    def __post_init__(self) -> None:
        if self.per not in GROUPINGS:
            raise RequestError(f"the grouping is {self.per!r}, must be one of {', '.join(GROUPINGS)}")
        if self.prompts is not None and self.prompts < 1:
            raise RequestError(f"prompts is {self.prompts}, must be at least 1")

    def recipes(self) -> list[Recipe]:
        """The levels.

        Raises:
            QuantError: there is no such recipe.
        """
        return [level if isinstance(level, Recipe) else resolve(level) for level in self.levels]


def auto_recipe(
    model: str | Path | None,
    reference: str | Path,
    budget_bytes: int,
    *,
    workspace: str | Path,
    progress: Progress | None = None,
    options: AutoOptions | None = None,
) -> Recipe:
    """The recipe with the least divergence within a budget; see `choose_recipe`, which tells more of it.

    The recipe is also written into the workspace, as a TOML file with the measurements as comments.
    """
    choice = choose_recipe(
        model, reference, budget_bytes, workspace=workspace, progress=progress, options=options
    )
    path = Path(workspace).expanduser() / f"{choice.recipe.name}.toml"
    write_recipe(path, choice.recipe, choice.lines())
    return choice.recipe


def choose_recipe(
    model: str | Path | None,
    reference: str | Path,
    budget_bytes: int,
    *,
    workspace: str | Path,
    progress: Progress | None = None,
    options: AutoOptions | None = None,
) -> AutoChoice:
    """Measure every group of tensors, choose formats within a budget, and measure the choice.

    Args:
        model: folder of a checkpoint, a hub id, or "pocket"; None is the embedded model.
        reference: file of `autoglm record`, of the same checkpoint.
        budget_bytes: most bytes of the whole bundle, small files included.
        workspace: folder for an export of each level and the journal; absent, empty, or of an earlier run
            with the same model, reference, levels and device, which is gone on with. Another budget costs
            only what was not measured yet.
        progress: called with events of the exports, and with the stage "measure" before each measurement.
        options: how to measure, and what to choose from.

    Raises:
        QuantError: the budget is below the smallest bundle, or not below that of the highest level; or the
            levels do not go together.
        ParityError: the reference is damaged, or of another checkpoint, or has no pictures; or the workspace
            is of another kind.
        CheckpointError: there is no usable checkpoint.
        ExportError: an export fails.
        RequestError: an option is out of range.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
        raise RequestError(f"the budget is {budget_bytes!r}, must be a whole number of bytes")
    chosen = options or AutoOptions()
    tell = progress or silent
    session = SessionOptions(chosen.device, chosen.threads)
    recorded = Reference.open(reference)
    _check_pictures(recorded, chosen.prompts)
    tell(ProgressEvent("checkpoint", str(model or POCKET_NAME), 0, 0))
    checkpoint = Checkpoint.open(pocket_path() if model is None else model, chosen.revision)
    weights = _check_reference(recorded, checkpoint, chosen.max_image_tokens)
    palette = Palette(
        checkpoint,
        chosen.recipes(),
        max_image_tokens=chosen.max_image_tokens,
        calibration=chosen.calibration,
    )
    groups = group_tensors(palette.tensors, chosen.per)
    palette.check_groups(groups)
    _check_budget(palette, groups, budget_bytes)
    identity = {
        "created_by": created_by(),
        "onnxruntime": ort.__version__,
        "device": chosen.device,
        "model": checkpoint.config.source,
        "config_sha256": checkpoint.config.config_sha256,
        "weights_sha256": weights,
        "max_image_tokens": chosen.max_image_tokens,
        "levels": [level.to_json() for level in palette.levels],
        "calibration": [job.calibration.sha256 if job.calibration else None for job in palette.jobs],
        "reference_sha256": recorded.sha256,
        "prompts": min(len(recorded), chosen.prompts or len(recorded)),
    }

    def export_level(recipe: Recipe, path: Path) -> Bundle:
        settings = palette.options(recipe)
        return export(
            checkpoint.path,
            path,
            recipe=recipe,
            max_image_tokens=settings.max_image_tokens,
            calibration=settings.calibration,
            progress=tell,
        )

    folder = Path(workspace).expanduser().resolve()
    with Journal(folder / JOURNAL_NAME, identity) as journal:
        bench = Bench(folder, palette, recorded, journal, chosen.prompts, session, tell)
        bench.export_levels(export_level)
        return _choose(bench, groups, budget_bytes)


def _choose(bench: Bench, groups: Sequence[TensorGroup], budget_bytes: int) -> AutoChoice:
    palette = bench.palette
    lower = range(1, len(palette.levels))
    count = len(groups) * len(lower) + 2
    base = bench.measure({}, f"1 of {count}: everything as {palette.levels[0].name}", check=True)
    table: dict[tuple[str, int], tuple[float, float]] = {}
    for group in groups:
        for level in lower:
            label = f"{len(table) + 2} of {count}: {group.name} as {palette.levels[level].name}"
            table[group.name, level] = bench.measure(dict.fromkeys(group.tensors, level), label).added(base)
    # Where fewer bits seem to help, that is chance: such a choice is taken to cost nothing.
    costs = {key: max(0.0, added) for key, (added, _) in table.items()}
    name = recipe_name(budget_bytes)
    chosen = _allocate(palette, groups, costs, budget_bytes, name)
    recipe = palette.recipe(name, groups, chosen)
    levels: Levels = {tensor: chosen[group.name] for group in groups for tensor in group.tensors}
    best = Contender(
        "allocated", palette.total_bytes(recipe), bench.measure(levels, f"{count} of {count}: the choice").kl
    )
    contenders = [best]
    for preset, levels in palette.presets():
        size = palette.total_bytes(preset)
        if size > budget_bytes:
            continue
        contender = Contender(preset.name, size, bench.measure(levels, f"for comparison: {preset.name}").kl)
        contenders.append(contender)
        if contender.kl < best.kl:
            best, recipe = contender, preset
    return AutoChoice(
        recipe,
        budget_bytes,
        best.total_bytes,
        base.kl,
        base.kl + math.fsum(costs.get((group.name, chosen[group.name]), 0.0) for group in groups),
        contenders[0].kl,
        best.kl,
        tuple(level.name for level in palette.levels),
        tuple(
            Sensitivity(
                group.name,
                palette.levels[level].name,
                palette.size_bytes(group, 0) - palette.size_bytes(group, level),
                *table[group.name, level],
            )
            for group in groups
            for level in lower
        ),
        tuple(contenders),
        f"{bench.reference.path.name} ({bench.reference.sha256[:12]}), {len(base.counts)} prompts, "
        f"{sum(base.counts)} positions",
    )


def _allocate(
    palette: Palette,
    groups: Sequence[TensorGroup],
    costs: Mapping[tuple[str, int], float],
    budget_bytes: int,
    name: str,
) -> dict[str, int]:
    """Level of every group by name, so that the bundle keeps the budget to the byte.

    What lies in the bundle beside the groups is the same for every choice but for a few bytes (the recipe in
    the manifest, padding at the end of a file); if these do not fit, the groups get so many less.
    """
    options = [
        Group(
            group.name,
            tuple(
                Candidate(str(level), palette.size_bytes(group, level), costs.get((group.name, level), 0.0))
                for level in range(len(palette.levels))
            ),
        )
        for group in groups
    ]
    smallest = palette.smallest(groups)
    least = sum(option.least_bytes for option in options)
    allowed = budget_bytes - palette.total_bytes(palette.recipe(name, groups, smallest)) + least
    while True:
        found = allocate(options, allowed)
        chosen = {group: int(candidate.name) for group, candidate in found.choices.items()}
        excess = palette.total_bytes(palette.recipe(name, groups, chosen)) - budget_bytes
        if excess <= 0:
            return chosen
        if found.size_bytes == least:  # larger by its rules alone; this one was seen to fit
            return smallest
        allowed = found.size_bytes - 1


def recipe_name(budget_bytes: int) -> str:
    """Name of a budget's recipe: "auto-6.5GB", or "auto-4.2MB" for small models."""
    if budget_bytes >= 10**9:
        return f"auto-{budget_bytes / 1e9:.6g}GB"
    return f"auto-{budget_bytes / 1e6:.6g}MB"


def _check_budget(palette: Palette, groups: Sequence[TensorGroup], budget_bytes: int) -> None:
    """Say at once that a budget cannot be kept, or leaves nothing to choose."""

    def total(chosen: Mapping[str, int], named_for: int) -> int:
        return palette.total_bytes(palette.recipe(recipe_name(named_for), groups, chosen))

    smallest = palette.smallest(groups)
    least, most = total(smallest, budget_bytes), total({group.name: 0 for group in groups}, budget_bytes)
    high = palette.levels[0].name
    if budget_bytes < least:
        least = total(smallest, least)  # the name of the recipe takes bytes, too
        raise QuantError(
            f"a budget of {budget_bytes:,} bytes cannot be kept: the smallest bundle of "
            f"{' and '.join(level.name for level in palette.levels)} has {least:,}; allow at least that"
        )
    if budget_bytes >= most:
        raise QuantError(
            f"a budget of {budget_bytes:,} bytes leaves nothing to choose: {high} has {most:,}; take that "
            "recipe"
        )


def _check_pictures(reference: Reference, prompts: int | None) -> None:
    if not any(entry["grids"] for entry in reference.entries[:prompts]):
        raise ParityError(
            f"{reference.path} has no picture{' in its first prompts' if prompts else ''}, so it tells "
            "nothing about the vision tower; record prompts with pictures"
        )


def _check_reference(reference: Reference, checkpoint: Checkpoint, max_image_tokens: int | None) -> str:
    """Refuse a reference of another checkpoint; returns the digest of the weights."""
    wanted, config = reference.fingerprint, checkpoint.config
    files = checkpoint.side_files()
    weights = weights_sha256(checkpoint.path)
    image = image_budget(config, max_image_tokens)
    same = {
        "config.json": wanted.config_sha256 == config.config_sha256,
        "vocabulary": wanted.vocab == config.text.vocab,
        "tokenizer": wanted.tokenizer_sha256 == hashlib.sha256(files["tokenizer.json"]).hexdigest(),
        "chat template": wanted.template_sha256 == hashlib.sha256(files["chat_template.jinja"]).hexdigest(),
        "weights": wanted.weights_sha256 == weights,
    }
    for what, equal in same.items():
        if not equal:
            raise ParityError(
                f"{reference.path} was recorded from {wanted.model} with another {what} than "
                f"{checkpoint.path} has; record it again from this checkpoint"
            )
    if wanted.image != image:
        raise ParityError(
            f"{reference.path} was recorded with up to {wanted.image.max_tokens} tokens per image "
            f"(max_pixels {wanted.image.max_pixels}), the bundle would take up to {image.max_tokens} "
            f"(max_pixels {image.max_pixels}) or prepare images otherwise; record it with the same "
            "--max-image-tokens"
        )
    return weights
