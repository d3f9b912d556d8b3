"""A recipe made by measurement: the options of `--recipe auto`.

In: the command line. Out: a size, and what to measure with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import click

from .choice import gathered
from .formats import FormatChoice

AUTO = "auto"
"""In the place of a recipe's name."""


@dataclass(frozen=True)
class AutoChoice:
    """What was said of the search.

    Attributes:
        budget_gb: most size of the bundle, in 10^9 bytes.
        reference: file of `autoglm record` to measure with.
        workspace: folder that keeps measurements.
    """

    budget_gb: float | None
    reference: Path | None
    workspace: Path | None

    def check(self, formats: FormatChoice, *, estimate: bool) -> None:
        """Refuse what `--recipe auto` lacks, what means nothing to it, and what means nothing without it.

        Args:
            formats: with the recipe as the user named it.
            estimate: whether nothing is to be written.

        Raises:
            click.UsageError: there is such a thing.
        """
        needed = {"--budget-gb": self.budget_gb, "--reference": self.reference}
        if formats.recipe != AUTO:
            own = {**needed, "--workspace": self.workspace}
            if given := [name for name, value in own.items() if value is not None]:
                raise click.UsageError(f"{given[0]} means something with --recipe {AUTO} only")
            return
        if self.budget_gb is not None and not math.isfinite(self.budget_gb):
            raise click.UsageError(f"--budget-gb is {self.budget_gb}, must be a finite number")
        if missing := [name for name, value in needed.items() if value is None]:
            raise click.UsageError(f"--recipe {AUTO} needs {missing[0]}")
        if estimate:
            raise click.UsageError(f"--recipe {AUTO} is made by measuring, so it cannot be estimated")
        if formats.calibration is not None and formats.refine != "gptq":
            raise click.UsageError(
                f"--calibration means something to --recipe {AUTO} with --refine gptq only"
            )
        for option, value in (("--prefill", formats.prefill), ("--kv", formats.kv)):
            if value == "int8":
                raise click.UsageError(
                    f"--recipe {AUTO} keeps a budget that {option} int8 is no part of; "
                    f"export the recipe that it writes with {option} int8"
                )


auto_options = gathered(
    AutoChoice,
    "auto",
    click.option(
        "--budget-gb",
        type=click.FloatRange(min=0, min_open=True),
        metavar="GB",
        help="For --recipe auto: most size of the bundle, in 10^9 bytes.",
    ),
    click.option(
        "--reference",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="For --recipe auto: what `autoglm record` wrote, to measure with.",
    ),
    click.option(
        "--workspace",
        metavar="DIR",
        type=click.Path(path_type=Path, file_okay=False),
        help="For --recipe auto: keeps measurements. [default: OUTPUT.auto]",
    ),
)
