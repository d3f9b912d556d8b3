"""`autoglm run OUT --batch in.jsonl -o out.jsonl`: a file of requests is answered.

In: what the command line says. Out: the output file; progress on stderr. A skin over `autoglm_edge.offline`,
and over `autoglm_edge.cluster` with --ray.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from autoglm_edge.errors import RequestError

from .batch_progress import BatchProgress
from .options.batch import LOCAL_RAY, BatchChoice
from .progress import ProgressLine
from .terminal import print_json

if TYPE_CHECKING:
    from autoglm_edge.offline.batch import Work
    from autoglm_edge.offline.record import Answered
    from autoglm_edge.offline.source import Source
    from autoglm_edge.runtime.opening import Opening


def run_batch(choice: BatchChoice, opening: Opening, *, as_json: bool) -> None:
    """Answer a file.

    Args:
        choice: checked, with a file of requests.
        opening: opens an engine for it.
        as_json: whether counts are printed as a document, too.

    Raises:
        EdgeError: it cannot be used, or the engine fails.
        click.UsageError: an option is wrong.
    """
    from autoglm_edge.offline.batch import answer_file
    from autoglm_edge.offline.job import Rules
    from autoglm_edge.server.settings import model_names

    assert choice.batch is not None and choice.output is not None, "it was checked"
    try:
        rules = Rules(model_names(opening.bundle, choice.names), images_from=choice.images_from)
    except RequestError as error:
        raise click.UsageError(str(error)) from error
    progress = BatchProgress()
    work: Work
    if choice.ray is None:

        def work(source: Source, missing: Sequence[int]) -> Generator[Answered, None, None]:
            from autoglm_edge.offline.answers import answer_lines
            from autoglm_edge.server.work.answering import ServedEngine

            line = ProgressLine()
            engine = opening.open(ServedEngine, line)
            with engine:
                line.close()
                progress.start()
                yield from answer_lines(engine, rules, source.lines(missing))
    else:
        from autoglm_edge.cluster.batch import Cluster

        address = None if choice.ray == LOCAL_RAY else choice.ray
        work = Cluster(opening, rules, address=address, workers=choice.workers).answer_lines

    try:
        summary = answer_file(
            choice.batch, choice.output, opening, rules, work, progress, ordered=choice.ordered
        )
    except BaseException as error:
        progress.close()
        if progress.began_at is not None:
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended"
            click.echo(f"{what} at {progress.state}; the same command goes on", err=True)
        raise
    progress.close()
    rest = f", {summary.before} were answered before" if summary.before else ""
    errors = f", {summary.refused} of them with an error" if summary.refused else ""
    per_s = summary.tokens / summary.seconds if summary.seconds else 0.0
    rate = f" at {per_s:.1f} tokens/s" if per_s else ""
    click.echo(f"{summary.answered} requests answered{errors}{rate}{rest}", err=True)
    if as_json:
        print_json(asdict(summary) | {"output": str(choice.output)})
