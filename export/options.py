"""What may be chosen about an export, checked.

In: a recipe, and what a recipe does not say. Out: `ExportOptions`. Knows nothing of checkpoints; what depends
on one, such as the smallest image budget, is checked once it is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoglm_edge.errors import ExportError
from autoglm_edge.quantize.recipe import Recipe

from .graphs.kv import KV, KVS


@dataclass(frozen=True)
class ExportOptions:
    """What may be chosen about an export, beside its source and its place.

    Attributes:
        recipe: which tensor gets which format.
        max_image_tokens: most tokens per image; None keeps the checkpoint's budget.
        resume: go on with an interrupted export, and fail if there is none.
        force: start over, and replace a bundle that is there.
        calibration: prompts that weights are rounded for, where the recipe asks for it, and that the scales
            of an int8 cache are measured on; None takes those that come with the package.
        kv: what the KV cache holds: "float", the dtype of the activations, or "int8".
    """

    recipe: Recipe
    max_image_tokens: int | None = None
    resume: bool = False
    force: bool = False
    calibration: Path | None = None
    kv: KV = "float"

    def __post_init__(self) -> None:
        if self.kv not in KVS:
            raise ExportError(f"kv is {self.kv!r}, must be {' or '.join(KVS)}")
        if self.max_image_tokens is not None and self.max_image_tokens < 1:
            raise ExportError(f"max_image_tokens is {self.max_image_tokens}, must be at least 1")
        uses = self.kv == "int8" or any(rule.refine == "gptq" for rule in self.recipe.rules)
        if self.calibration is not None and not uses:
            raise ExportError(
                f"recipe {self.recipe.name} refines nothing by gptq, so the calibration set "
                f"{self.calibration} would have no effect; leave it out, or add --refine gptq or --kv int8"
            )
