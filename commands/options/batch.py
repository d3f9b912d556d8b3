"""A file of requests in place of a single answer: the options of `autoglm run --batch`.

In: the command line. Out: a `BatchChoice` that makes sense.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

import click

from autoglm_edge.commands.command import spelled, written_parameters

from .choice import gathered

LOCAL_RAY = "local"
"""Of --ray without an address: a cluster of this machine alone, for as long as the run takes."""
DEFAULT_CONCURRENCY = 4
"""Answers of a batch at a time: the weights are read once for all of them."""


@dataclass(frozen=True)
class BatchChoice:
    """What only a batch takes.

    Attributes:
        batch: file of requests; None for a single answer.
        output: file of answers.
        ordered: whether it is put into the order of the requests.
        images_from: folder of pictures that are named by file.
        names: what requests may call the model.
        max_concurrency: answers that are given at a time; None is DEFAULT_CONCURRENCY.
        ray: address of a cluster; LOCAL_RAY begins one; None does without.
        workers: engines in the cluster; None is one per machine.
    """

    batch: Path | None
    output: Path | None
    ordered: bool
    images_from: Path | None
    names: tuple[str, ...]
    max_concurrency: int | None
    ray: str | None
    workers: int | None

    @property
    def concurrency(self) -> int:
        """Answers that are given at a time."""
        return self.max_concurrency or DEFAULT_CONCURRENCY

    def check(self, context: click.Context, singles: Collection[str]) -> None:
        """What was written must all be of a batch, or all of a single answer.

        Args:
            context: of the command.
            singles: parameters of single answers, by name; a batch takes none of them.

        Raises:
            click.UsageError: it is not, or the batch lacks something.
        """
        own = {field.name for field in fields(self)}
        for parameter in written_parameters(context):
            if self.batch is None and parameter.name in own:
                raise click.UsageError(
                    f"{spelled(parameter)} is for a file of requests; give one with --batch"
                )
            if self.batch is not None and parameter.name in singles:
                raise click.UsageError(
                    f"{spelled(parameter)} is for a single answer; in a batch each request says it itself"
                )
        if self.batch is None:
            return
        if self.output is None:
            raise click.UsageError("say with -o where the answers of --batch go")
        if self.workers is not None and self.ray is None:
            raise click.UsageError("--workers is for a cluster; say --ray, too")


batch_options = gathered(
    BatchChoice,
    "many",
    click.option(
        "--batch",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Answer the requests in FILE, one in each line.",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Where the answers of --batch go; the same command goes on with it.",
    ),
    click.option(
        "--ordered", is_flag=True, help="Put the answers of --batch into the order of its requests."
    ),
    click.option(
        "--images-from",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Requests of --batch may name pictures in DIR by their paths.",
    ),
    click.option(
        "--served-model-name",
        "names",
        multiple=True,
        metavar="NAME",
        help="What requests of --batch call the model; repeatable.",
    ),
    click.option(
        "--max-concurrency",
        type=click.IntRange(min=1, max=64),
        metavar="N",
        help="Answers of --batch that are given at a time. [default: 4]",
    ),
    click.option(
        "--ray",
        is_flag=False,
        flag_value=LOCAL_RAY,
        metavar="[ADDRESS]",
        help="Answer --batch in a Ray cluster; without ADDRESS in one of this machine.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Engines in the cluster. [default: one for each machine, or each GPU]",
    ),
)
