"""What `export` and `estimate` are asked: their arguments, written down once.

In: what a caller names. Out: an `ExportRequest`, which turns it into checked options, a place and a
checkpoint. Knows nothing of what is done with them.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from autoglm_edge.embedded import POCKET_NAME, pocket_path
from autoglm_edge.errors import CheckpointError, ExportError
from autoglm_edge.quantize.recipe import Activations, Prefill, Recipe
from autoglm_edge.quantize.recipe_reading import resolve
from autoglm_edge.quantize.rule import Refinement

from .graphs.kv import KV
from .options import ExportOptions
from .progress import Progress, ProgressEvent, silent
from .source.checkpoint import Checkpoint

P = ParamSpec("P")
Request = TypeVar("Request")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of `pipeline.export`, where each is explained."""

    model: str | Path | None
    output: str | Path
    _: KW_ONLY
    precision: str = "int4"
    block_size: int | None = None
    symmetric: bool | None = None
    recipe: str | Path | Recipe | None = None
    max_image_tokens: int | None = None
    revision: str | None = None
    activations: Activations | None = None
    accuracy_level: int | None = None
    refine: Refinement | None = None
    prefill: Prefill | None = None
    calibration: str | Path | None = None
    kv: KV = "float"
    resume: bool = False
    force: bool = False
    progress: Progress | None = None

    @property
    def tell(self) -> Progress:
        """What progress is told to."""
        return self.progress or silent

    def options(self) -> ExportOptions:
        """The choices, checked; a recipe goes before a precision.

        Raises:
            QuantError: unknown precision or recipe, or a value that does not fit it.
            ExportError: a value out of range.
        """
        named = self.precision if self.recipe is None else self.recipe
        base = named if isinstance(named, Recipe) else resolve(named)
        return ExportOptions(
            base.with_(
                block_size=self.block_size,
                symmetric=self.symmetric,
                activations=self.activations,
                accuracy_level=self.accuracy_level,
                refine=self.refine,
                prefill=self.prefill,
            ),
            max_image_tokens=self.max_image_tokens,
            resume=self.resume,
            force=self.force,
            calibration=None if self.calibration is None else Path(self.calibration).expanduser(),
            kv=self.kv,
        )

    def place(self) -> Path:
        """The output with all links followed.

        Raises:
            ExportError: no name, or one that no file can have.
        """
        name = str(self.output)
        try:
            if name.strip() and "\0" not in name:
                return Path(os.path.realpath(Path(name).expanduser()))
        except RuntimeError as error:  # ~user of an unknown user
            raise ExportError(f"{name!r} cannot be an output folder ({error})") from error
        raise ExportError(f"the output is {name!r}; name a folder that does not exist yet")

    def open_checkpoint(self) -> Checkpoint:
        """Open what is to be exported; None is the embedded model, even beside a folder of its name.

        Raises:
            CheckpointError: there is no usable checkpoint, or the embedded one has no such revision.
        """
        if self.model is None and self.revision is not None:
            raise CheckpointError(
                f"the embedded model has no revision {self.revision!r}; name the model that has it"
            )
        self.tell(ProgressEvent("checkpoint", str(POCKET_NAME if self.model is None else self.model), 0, 0))
        return Checkpoint.open(pocket_path() if self.model is None else self.model, self.revision)


def called_with(
    request: Callable[P, Request],
) -> Callable[[Callable[[Request], Result]], Callable[P, Result]]:
    """Make a function of a request one that is called with the request's own arguments.

    So several functions have the same typed arguments, and their list stands in one place.

    Args:
        request: the dataclass.
    """

    def change(work: Callable[[Request], Result]) -> Callable[P, Result]:
        @functools.wraps(work)
        def called(*args: P.args, **kwargs: P.kwargs) -> Result:
            return work(request(*args, **kwargs))

        shown = inspect.signature(request)
        shown = shown.replace(return_annotation=inspect.signature(work).return_annotation)
        called.__signature__ = shown  # type: ignore[attr-defined]
        return called

    return change
