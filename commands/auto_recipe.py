"""A recipe made by measurement, for `autoglm export --recipe auto`.

In: a checkpoint, a size, a reference. Out: a `Recipe`. A skin over `autoglm_edge.autorecipe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options.auto import AutoChoice
from .options.formats import FormatChoice
from .progress import ProgressLine, show_event

if TYPE_CHECKING:
    from autoglm_edge.quantize.recipe import Recipe


def measured_recipe(
    auto: AutoChoice,
    formats: FormatChoice,
    model: str | None,
    revision: str | None,
    place: Path,
    progress: ProgressLine,
) -> Recipe:
    """Measure and choose. Changes of formats are made to the lowest level, other changes to all.

    Args:
        auto: checked.
        formats: changes, and what calibrates them.
        model: checkpoint folder or hub id; None is the embedded model.
        revision: of a hub id.
        place: of the bundle to come; measurements are kept beside it.
        progress: is told what is measured.

    Raises:
        EdgeError: nothing can be measured, or nothing fits the size.
    """
    from autoglm_edge.autorecipe.search import DEFAULT_LEVELS, AutoOptions, auto_recipe
    from autoglm_edge.quantize.recipe import Recipe
    from autoglm_edge.quantize.recipe_reading import resolve

    assert auto.budget_gb is not None and auto.reference is not None, "it was checked"
    workspace = auto.workspace or Path(f"{place}.auto")
    changes = formats.changes()
    everywhere = {key: changes[key] for key in ("activations", "accuracy_level")}
    defaults: Sequence[Recipe | str] = DEFAULT_LEVELS
    named = [level if isinstance(level, Recipe) else resolve(level) for level in defaults]
    levels = (*(level.with_(**everywhere) for level in named[:-1]), named[-1].with_(**changes))
    chosen = AutoOptions(
        max_image_tokens=formats.max_image_tokens,
        revision=revision,
        levels=levels,
        calibration=formats.calibration,
    )
    recipe = auto_recipe(
        model,
        auto.reference,
        round(auto.budget_gb * 1e9),
        workspace=workspace,
        progress=lambda event: show_event(progress, event),
        options=chosen,
    )
    progress.say(f"Chose {recipe.name}; levels and measurements are in {workspace}, for another budget")
    return recipe
