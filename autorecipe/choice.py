"""What a recipe made by measurement rests on.

In: figures of `auto.choose_recipe`. Out: the same in lines for people, which also stand as comments in the
recipe's file. Knows nothing of how they were measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoglm_edge.quantize.recipe import Recipe


@dataclass(frozen=True)
class Sensitivity:
    """What it does to store one group at one lower level.

    Attributes:
        group: of tensors.
        level: name of the recipe that it is stored as there.
        saved_bytes: less than at the highest level.
        added_kl: mean divergence over answers, less that of everything at the highest level.
        error: standard error of added_kl.
    """

    group: str
    level: str
    saved_bytes: int
    added_kl: float
    error: float


@dataclass(frozen=True)
class Contender:
    """A recipe within the budget that was measured whole.

    Attributes:
        name: "allocated", or of the preset.
        total_bytes: of its bundle.
        kl: mean divergence over answers.
    """

    name: str
    total_bytes: int
    kl: float


@dataclass(frozen=True)
class AutoChoice:
    """A recipe and how it was found.

    Attributes:
        recipe: with layer numbers.
        budget_bytes: that it keeps.
        total_bytes: of the bundle, all files.
        high_kl: divergence with everything at the highest level.
        predicted_kl: of the allocation: high_kl and what the chosen groups add, one by one.
        allocated_kl: of the allocation, as measured.
        measured_kl: of the recipe; lower than allocated_kl if a preset was better.
        levels: names of the recipes that the formats come from, highest first.
        sensitivities: of every group at every lower level.
        contenders: what was measured whole: the allocation, and presets within the budget made of the same
            formats; the recipe is the best of them.
        reference: path, digest, prompts and positions of what it was measured on.
    """

    recipe: Recipe
    budget_bytes: int
    total_bytes: int
    high_kl: float
    predicted_kl: float
    allocated_kl: float
    measured_kl: float
    levels: tuple[str, ...]
    sensitivities: tuple[Sensitivity, ...]
    contenders: tuple[Contender, ...]
    reference: str

    def lines(self) -> list[str]:
        """For people: the outcome, and a table of the groups, the most sensitive per byte first."""
        high = self.levels[0]
        lines = [
            f"{self.total_bytes:,} bytes of a budget of {self.budget_bytes:,}",
            f"measured on {self.reference}",
            f"mean KL in answers with everything as {high}: {self.high_kl:.3g}",
            f"allocated: KL {self.predicted_kl:.3g} predicted, {self.allocated_kl:.3g} measured",
            *(f"{item.name}: {item.total_bytes:,} bytes, KL {item.kl:.3g}" for item in self.contenders),
            f"taken: {self.recipe.name}, KL {self.measured_kl:.3g}",
            "",
            f"{'group':<24} {'as':<12} {'adds to KL':>11} {'±':>9} {'saves bytes':>14}",
        ]
        order = sorted(self.sensitivities, key=lambda item: -item.added_kl / max(item.saved_bytes, 1))
        lines += [
            f"{item.group:<24} {item.level:<12} {item.added_kl:>+11.2e} {item.error:>9.1e} "
            f"{item.saved_bytes:>14,}"
            for item in order
        ]
        return lines
