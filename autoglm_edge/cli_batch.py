"""`autoglm run OUT --batch in.jsonl -o out.jsonl`: the options of it, and how it is told how far it is.

In: what the command line says. Out: the output file; progress on stderr. A skin over `autoglm_edge.offline`,
and over `autoglm_edge.cluster` with --ray.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoglm_edge.cli_common import ProgressLine, harmless, print_json
from autoglm_edge.errors import RequestError

if TYPE_CHECKING:
    from autoglm_edge.offline.batch import Work
    from autoglm_edge.offline.record import Answered
    from autoglm_edge.offline.source import Source
    from autoglm_edge.runtime.opening import Opening

LOCAL_RAY = "local"
"""Of --ray without an address: a cluster of this machine alone, for as long as the run takes."""
DEFAULT_CONCURRENCY = 4
"""Answers of a batch at a time: the weights are read once for all of them."""
_BAR_CELLS = 28
_LINE_SECONDS = 10.0
_REDRAW_SECONDS = 0.2


@dataclass(frozen=True)
class BatchOptions:
    """What only a batch takes.

    Attributes:
        asked: file of requests.
        answers: output file.
        ordered: whether it is put into the order of the requests.
        images_from: folder of pictures that are named by file.
        names: what requests may call the model.
        ray: address of a cluster; LOCAL_RAY begins one; None does without.
        workers: engines in the cluster; None is one per machine.
    """

    asked: Path
    answers: Path
    ordered: bool
    images_from: Path | None
    names: tuple[str, ...]
    ray: str | None
    workers: int | None


def batch_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a batch, for `autoglm run`."""
    options = (
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
    for option in reversed(options):
        command = option(command)
    return command


def read_batch_options(
    batch: Path | None,
    output: Path | None,
    *,
    ordered: bool,
    images_from: Path | None,
    names: tuple[str, ...],
    max_concurrency: int | None,
    ray: str | None,
    workers: int | None,
    others: Mapping[str, object],
) -> BatchOptions | None:
    """What the options say of a batch; None if there is none.

    Args:
        batch: of its name, as all up to `workers`.
        output: see there.
        ordered: see there.
        images_from: see there.
        names: see there.
        max_concurrency: see there.
        ray: see there.
        workers: see there.
        others: options of single answers, by name; a batch takes none of them.

    Raises:
        click.UsageError: they contradict each other.
    """
    own: dict[str, object] = {
        "--output": output,
        "--ordered": ordered,
        "--images-from": images_from,
        "--served-model-name": names,
        "--max-concurrency": max_concurrency,
        "--ray": ray,
        "--workers": workers,
    }
    if batch is None:
        for name, given in own.items():
            if _is_given(given):
                raise click.UsageError(f"{name} is for a file of requests; give one with --batch")
        return None
    for name, value in others.items():
        if _is_given(value):
            raise click.UsageError(f"{name} is for a single answer; in a batch each request says it itself")
    if output is None:
        raise click.UsageError("say with -o where the answers of --batch go")
    if workers is not None and ray is None:
        raise click.UsageError("--workers is for a cluster; say --ray, too")
    return BatchOptions(batch, output, ordered, images_from, names, ray, workers)


def _is_given(value: object) -> bool:
    """Whether an option was written: 0 is a value, too."""
    return value is not None and value is not False and value != ()


def run_batch(options: BatchOptions, opening: Opening, *, as_json: bool) -> None:
    """Answer a file.

    Raises:
        EdgeError: it cannot be used, or the engine fails.
        click.UsageError: an option is wrong.
    """
    from autoglm_edge.offline.batch import answer_file
    from autoglm_edge.offline.job import Rules
    from autoglm_edge.server.settings import model_names

    try:
        rules = Rules(model_names(opening.bundle, options.names), images_from=options.images_from)
    except RequestError as error:
        raise click.UsageError(str(error)) from error
    progress = BatchProgress()
    work: Work
    if options.ray is None:

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

        address = None if options.ray == LOCAL_RAY else options.ray
        work = Cluster(opening, rules, address=address, workers=options.workers).answer_lines

    try:
        summary = answer_file(
            options.asked, options.answers, opening, rules, work, progress, ordered=options.ordered
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
        print_json(asdict(summary) | {"output": str(options.answers)})


class BatchProgress:
    """How far a batch is: a bar on a terminal, else a line every ten seconds.

    Attributes:
        began_at: when the first line was worked on; None before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is shown yet."""
        self.began_at: float | None = None
        self._now = clock
        self._terminal = sys.stderr.isatty()
        self._shown = -1e9
        self._open_line = False
        self._total = self._before = self._done = self._tokens = self._errors = 0

    @property
    def state(self) -> str:
        """How many of how many."""
        return f"{self._before + self._done} of {self._total} requests"

    def began(self, requests: int, before: int, repaired_bytes: int) -> None:
        """See `Watch`."""
        self._total, self._before = requests, before
        if repaired_bytes:
            click.echo(f"a torn last line of {repaired_bytes} bytes was cut off", err=True)
        if before:
            click.echo(f"going on: {self.state} are answered", err=True)
        self.start()

    def start(self) -> None:
        """The engine is loaded: rates count from here."""
        self.began_at = self._now()

    def answered(self, item: Answered) -> None:
        """See `Watch`."""
        self._done += 1
        self._tokens += item.tokens
        self._errors += item.status != 200
        now = self._now()
        if now - self._shown < (_REDRAW_SECONDS if self._terminal else _LINE_SECONDS):
            return
        self._shown = now
        text = harmless(self.text(now))
        if self._terminal:
            share = (self._before + self._done) / max(1, self._total)
            bar = f"{'█' * int(share * _BAR_CELLS):·<{_BAR_CELLS}}"
            click.echo(f"\r\x1b[K{bar} {text}", err=True, nl=False)
            self._open_line = True
        else:
            click.echo(text, err=True)

    def text(self, now: float) -> str:
        """Counts, tokens per second and the time that is left, as far as they can be said."""
        seconds = now - (now if self.began_at is None else self.began_at)
        errors = f", {self._errors} with an error" if self._errors else ""
        rate = f", {self._tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
        missing = self._total - self._before - self._done
        if not missing or not self._done or seconds <= 0:
            return f"{self.state}{errors}{rate}"
        left = round(seconds / self._done * missing)
        hours, minutes = divmod(left // 60, 60)
        return f"{self.state}{errors}{rate}, {hours}:{minutes:02}:{left % 60:02} left"

    def close(self) -> None:
        """End an unfinished line."""
        if self._open_line:
            click.echo("", err=True)
            self._open_line = False
