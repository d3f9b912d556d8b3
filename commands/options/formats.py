"""Which numbers a checkpoint becomes: precision or recipe, changes to it, the cache, the size of pictures.

In: the command line of `autoglm export`. Out: arguments of `export` and `estimate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .choice import gathered

if TYPE_CHECKING:
    from autoglm_edge.export.graphs.kv import KV
    from autoglm_edge.quantize.recipe import Activations, Prefill
    from autoglm_edge.quantize.rule import Refinement


@dataclass(frozen=True)
class FormatChoice:
    """What was said of formats; None leaves it to the recipe.

    Attributes:
        int4: whether this precision was named, as the three that follow.
        int8: see there.
        fp16: see there.
        fp32: see there.
        recipe: a name or a file in the place of a precision.
        block_size: weights that share a scale, in digits.
        symmetric: whether there are no zero points.
        refine: how integers are chosen.
        calibration: file of prompts that they are chosen for.
        prefill: whether layers are there in 8 bits once more.
        kv: number type of the cache.
        activations: number type between layers.
        accuracy_level: how matrices are multiplied, in digits.
        max_image_tokens: of a picture.
    """

    int4: bool
    int8: bool
    fp16: bool
    fp32: bool
    recipe: str | None
    block_size: str | None
    symmetric: bool | None
    refine: Refinement | None
    calibration: Path | None
    prefill: Prefill | None
    kv: KV
    activations: Activations | None
    accuracy_level: str | None
    max_image_tokens: int | None

    def check(self) -> None:
        """One precision at most, or a recipe.

        Raises:
            click.UsageError: there is more.
        """
        if len(self._named) > 1:
            raise click.UsageError(f"choose one of {', '.join('--' + name for name in self._named)}")
        if self._named and self.recipe is not None:
            raise click.UsageError(f"choose --{self._named[0]} or --recipe, not both")

    @property
    def precision(self) -> str:
        """Of the weights, where no recipe is named."""
        return self._named[0] if self._named else "int4"

    @property
    def _named(self) -> list[str]:
        return [name for name in ("int4", "int8", "fp16", "fp32") if getattr(self, name)]

    def changes(self) -> dict[str, Any]:
        """What is different from the recipe, by the names of `Recipe.with_`."""
        return {
            "block_size": int(self.block_size) if self.block_size else None,
            "symmetric": self.symmetric,
            "activations": self.activations,
            "accuracy_level": int(self.accuracy_level) if self.accuracy_level else None,
            "refine": self.refine,
            "prefill": self.prefill,
        }


format_options = gathered(
    FormatChoice,
    "formats",
    click.option("--int4", is_flag=True, help="Store the decoder in 4 bits and the rest in 8. The default."),
    click.option("--int8", is_flag=True, help="Store all large matrices in 8 bits."),
    click.option("--fp16", is_flag=True, help="Store everything as float16."),
    click.option("--fp32", is_flag=True, help="Store everything as float32."),
    click.option(
        "--recipe",
        metavar="NAME_OR_FILE",
        help="Take a named recipe, such as int4-mixed, or a TOML file instead; "
        "or make one by measurement: auto.",
    ),
    click.option("--block-size", type=click.Choice(["32", "64", "128"]), help="Weights that share a scale."),
    click.option("--symmetric/--asymmetric", default=None, help="Store no zero points, or one per block."),
    click.option(
        "--refine",
        type=click.Choice(["none", "search", "gptq"]),
        help="Choose integers one by one, with better scales, or for least error on prompts.",
    ),
    click.option(
        "--calibration",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Prompts for gptq, JSON Lines. [default: a set of its own]",
    ),
    click.option(
        "--prefill",
        type=click.Choice(["none", "int8"]),
        help="Add the decoder's layers in 8 bits once more, to read prompts faster.",
    ),
    click.option(
        "--kv",
        type=click.Choice(["float", "int8"]),
        default="float",
        show_default=True,
        help="Number type of the KV cache; int8 takes a quarter of float32.",
    ),
    click.option(
        "--activations", type=click.Choice(["float32", "float16"]), help="Number type between layers."
    ),
    click.option(
        "--accuracy-level", type=click.Choice(["0", "4"]), help="4 multiplies in 8-bit integers, 0 in floats."
    ),
    click.option(
        "--max-image-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Shrink larger images to N tokens.",
    ),
)
