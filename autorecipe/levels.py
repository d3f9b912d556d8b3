"""The levels of a checkpoint, and recipes that mix them.

In: a checkpoint, and recipes that each store all tensors of a kind alike. Out: what each tensor takes at each
level, recipes that give every tensor the format of one of them, and the size of their bundles to the byte.
Writes nothing, and knows nothing of divergences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoglm_edge.errors import QuantError
from autoglm_edge.export.calibrate.preparation import prepare
from autoglm_edge.export.contents import Job, build_manifest, small_files
from autoglm_edge.export.graphs.plan import ALIGNMENT, Weight, by_matrix
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.export.source.shapes import EMBEDDING, HEAD, expected_tensors
from autoglm_edge.quantize.recipe import INT4, INT8, PRESETS, Recipe
from autoglm_edge.quantize.rule import Rule

from .sensitivity import TensorGroup

HIGH = replace(
    PRESETS["int4"],
    name="int4-at-8",
    rules=tuple(
        replace(rule, format=INT8 if rule.format == INT4 else rule.format) for rule in PRESETS["int4"].rules
    ),
)
"""The preset int4 with 8 bits in the decoder's layers, in blocks as its 4 are; the rest is as int4 has it."""

Levels = Mapping[str, int]
"""Number of the level that a tensor is stored as, by the name that recipes know it by."""


@dataclass(frozen=True)
class Placed:
    """Where one tensor lies in the data files of a level.

    Attributes:
        part: name of the part that holds it.
        weights: with their places; one, or slices of its rows.
    """

    part: str
    weights: tuple[Weight, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored as integers."""
        return any(weight.action == "quantize" for weight in self.weights)

    @property
    def size_bytes(self) -> int:
        """In the data file, padding included."""
        pieces = (piece for weight in self.weights for piece in weight.pieces)
        return sum(-(-piece.size_bytes // ALIGNMENT) * ALIGNMENT for piece in pieces)


class Palette:
    """The levels of one checkpoint: what each tensor takes there, and recipes that mix them.

    Attributes:
        checkpoint: to be exported.
        levels: recipes with layer numbers, highest first.
        jobs: the export of each level.
        tensors: names of the tensors that a level quantizes, as recipes know them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        levels: Sequence[Recipe],
        *,
        max_image_tokens: int | None = None,
        calibration: str | Path | None = None,
    ) -> None:
        """Plan an export of each level.

        Args:
            checkpoint: to be exported.
            levels: highest first.
            max_image_tokens: of the exports.
            calibration: of exports that refine with data.

        Raises:
            QuantError: fewer than two levels, two of one name, or levels that compute in different ways.
            ExportError: the image budget or the calibration set does not fit.
        """
        names = [level.name for level in levels]
        if len(levels) < 2 or len(set(names)) < len(names):
            raise QuantError(
                f"the levels are {', '.join(names) or 'none'}; name two or more different recipes"
            )
        ways = {_manner(level) for level in levels}
        if len(ways) > 1:
            raise QuantError(
                f"the levels {', '.join(names)} differ in activations, accuracy_level or balance, which a "
                "bundle has but one of; make them equal"
            )
        config = checkpoint.config
        self.checkpoint = checkpoint
        self.levels = tuple(
            level.for_layers(decoder=config.text.layers, vision=config.vision.depth) for level in levels
        )
        self._max_image_tokens = max_image_tokens
        self._calibration = calibration
        self._totals: dict[Recipe, int] = {}
        self.jobs = tuple(self.job(level) for level in self.levels)
        self._placed = [
            {
                name: Placed(plan.name, own)
                for plan in job.plans
                for name, own in by_matrix(plan.weights).items()
            }
            for job in self.jobs
        ]
        self.tensors = tuple(
            name for name in self._placed[0] if any(placed[name].is_quantized for placed in self._placed)
        )

    def options(self, recipe: Recipe) -> ExportOptions:
        """Of an export of a recipe; a calibration set is named only where it has an effect."""
        config = self.checkpoint.config
        recipe = recipe.for_layers(decoder=config.text.layers, vision=config.vision.depth)
        matrices = [name for name in (*expected_tensors(config), HEAD) if name != EMBEDDING]
        used = any(recipe.refinement_for(name) == "gptq" for name in matrices)
        path = Path(self._calibration).expanduser() if self._calibration is not None and used else None
        return ExportOptions(recipe, self._max_image_tokens, calibration=path)

    def job(self, recipe: Recipe) -> Job:
        """The export of a recipe, with every decision made."""
        return prepare(self.checkpoint, self.options(recipe))

    def placed(self, tensor: str, level: int) -> Placed:
        """Where a tensor lies in the data files of a level."""
        return self._placed[level][tensor]

    def size_bytes(self, group: TensorGroup, level: int) -> int:
        """Of a group in a data file, padding included."""
        return sum(self._placed[level][name].size_bytes for name in group.tensors)

    def total_bytes(self, recipe: Recipe) -> int:
        """Of the whole bundle that a recipe gives, to the byte."""
        if recipe not in self._totals:
            job = self.job(recipe)
            sizes = {name: len(content) for name, content in small_files(job).items()}
            sizes.update({plan.data_file: plan.data_bytes for plan in job.plans})
            unknown = "0" * 64  # digests differ in value, not in length
            manifest = build_manifest(job, {name: (size, unknown) for name, size in sizes.items()})
            self._totals[recipe] = sum(sizes.values()) + len(manifest.to_json().encode())
        return self._totals[recipe]

    def smallest(self, groups: Sequence[TensorGroup]) -> dict[str, int]:
        """The level at which a group takes the fewest bytes, by its name; the highest such."""
        smallest = {}
        for group in groups:
            sizes = [self.size_bytes(group, level) for level in range(len(self.levels))]
            smallest[group.name] = sizes.index(min(sizes))
        return smallest

    def check_groups(self, groups: Sequence[TensorGroup]) -> None:
        """Refuse a level that stores tensors of one group in different ways.

        Raises:
            QuantError: there is one.
        """
        for group in groups:
            for level in self.levels:
                if len({_way(level, name) for name in group.tensors}) > 1:
                    raise QuantError(
                        f"recipe {level.name} stores the tensors of {group.name} in different ways, so it is "
                        "no level to choose for them; take one like int8, which treats all layers alike"
                    )

    def recipe(self, name: str, groups: Sequence[TensorGroup], chosen: Mapping[str, int]) -> Recipe:
        """Rules with layer numbers.

        Args:
            name: of the recipe.
            groups: all.
            chosen: number of the level, by name of the group.
        """
        layers: dict[tuple[str, int], list[int]] = {}
        likes: dict[tuple[str, int], Rule | None] = {}
        for group in groups:
            level = chosen[group.name]
            for pattern in group.patterns:
                own = layers.setdefault((pattern, level), [])
                own += [] if group.layer is None else [group.layer]
                likes[pattern, level] = self.levels[level].rule_for(group.tensors[0])
        rules = (
            _rule_like(like, pattern, _spans(layers[pattern, level]))
            for (pattern, level), like in likes.items()
        )
        return replace(self.levels[0], name=name, rules=tuple(rules))

    def mixture(self, levels: Levels) -> Recipe:
        """A rule for each tensor, for graphs alone: how the integers come about is left out.

        Args:
            levels: of tensors; those that it leaves out are at the highest.
        """
        rules = (
            _rule_like(self.levels[levels.get(name, 0)].rule_for(name), name, None) for name in self.tensors
        )
        plain = tuple(replace(rule, refine="none") for rule in rules)
        return replace(self.levels[0], name="mixture", rules=plain)

    def presets(self) -> Iterator[tuple[Recipe, Levels]]:
        """Presets that mix the formats of the levels, refined like these, and the level of each tensor."""
        config = self.checkpoint.config
        first = self.levels[0]
        refinements = {rule.format: rule.refine for level in self.levels for rule in level.rules}
        for preset in PRESETS.values():
            if _manner(preset) != _manner(first):
                continue
            recipe = preset.for_layers(decoder=config.text.layers, vision=config.vision.depth)
            found = {name: self._level_like(recipe, name) for name in self.tensors}
            levels = {name: level for name, level in found.items() if level is not None}
            if len(levels) == len(found) and len(set(levels.values())) > 1:
                rules = tuple(
                    replace(rule, refine=refinements.get(rule.format, "none")) for rule in recipe.rules
                )
                name = recipe.name if rules == recipe.rules else f"{recipe.name}-refined"
                yield replace(recipe, name=name, rules=rules), levels

    def _level_like(self, recipe: Recipe, tensor: str) -> int | None:
        """The lowest level that stores a tensor in the format that a recipe gives it."""
        formats = [level.format_for(tensor) for level in self.levels]
        wanted = recipe.format_for(tensor)
        return max((number for number, form in enumerate(formats) if form == wanted), default=None)


def _way(recipe: Recipe, tensor: str) -> Rule:
    """How a tensor is stored, as a rule that is equal for equal ways."""
    return _rule_like(recipe.rule_for(tensor), "*", None)


def _rule_like(like: Rule | None, pattern: str, layers: str | None) -> Rule:
    return Rule(pattern, None, layers) if like is None else replace(like, pattern=pattern, layers=layers)


def _spans(layers: Sequence[int]) -> str | None:
    """[0, 1, 2, 7] to "0-2,7"; None for no number."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans) or None


def _manner(recipe: Recipe) -> tuple[str, int, bool]:
    """What all tensors of a bundle have in common."""
    return recipe.activations, recipe.accuracy_level, recipe.balance
