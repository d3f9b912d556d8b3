"""The child: opens the bundle with the real runtime, answers, compares, and says where it is.

    python -m autoglm_edge.android_sim.run.child JOB.json       or - for stdin

In: a job. Out: reports on the inherited pipe, and the exit status: 0 done, 1 an error that it names. It is
the runtime as an app would use it: one engine, one answer, cold. Knows nothing of limits.

The engine asks its cancel event before each picture and before each run of a graph; an event that is never
set, but notices that it is asked, thus sees the answer go on from pictures to prompt while that happens, so
that a child which is killed there was seen there. When the answer is complete its own times give the exact
borders.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from autoglm_edge.android_sim.child_result import ChildResult, ParityResult, PlanFacts
from autoglm_edge.errors import EdgeError, ParityError, SimulationError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine

from .job import LIMIT_BYTES, Job
from .reports import Reporter, says_memory

if TYPE_CHECKING:
    from autoglm_edge.parity.case import Case
    from autoglm_edge.parity.reference import Reference
    from autoglm_edge.runtime.answer import Timings, Usage

_PIECE_BYTES = 1 << 16


class Watcher(threading.Event):
    """A cancel event that is never set; asked at the start, before each picture, and before each run."""

    def __init__(self, images: int, reporter: Reporter) -> None:
        """Begin.

        Args:
            images: pictures of the prompt.
            reporter: told when the prompt begins to be read.
        """
        super().__init__()
        self._until_prompt = 1 + images
        self._reporter = reporter

    def is_set(self) -> bool:
        """False."""
        if self._until_prompt == 0:
            self._reporter.phase("prefill")
        self._until_prompt -= 1
        return False


def run_job(job: Job, reporter: Reporter) -> ChildResult:
    """Do a job.

    Raises:
        EdgeError: the bundle, the job or the reference is not usable, or there is not enough memory.
    """
    loading = reporter.phase("load")
    bundle = Bundle.open(job.bundle)
    with Engine(
        bundle,
        options=job.options,
        context=job.context,
        image_layout=job.image_layout,
        max_image_tokens=job.max_image_tokens,
    ) as engine:
        asked = reporter.phase("image") if job.image_count else reporter.phase("prefill")
        text, ids, usage, timings = _answer(engine, job, reporter)
        reporter.borders(_borders(asked, timings, bool(job.image_count)))
        parity = None
        if job.reference is not None:
            reporter.phase("score")
            parity = score(engine, job.reference, job.cases)
        plan = engine.plan
        result = ChildResult(
            prompt_tokens=usage.prompt_tokens,
            image_tokens=usage.image_tokens,
            tokens=usage.completion_tokens,
            text=text,
            token_ids=tuple(ids),
            load_s=asked - loading,
            image_s=timings.image_ms / 1e3,
            prefill_s=timings.prefill_ms / 1e3,
            decode_s=timings.decode_ms / 1e3,
            decoded_tokens=timings.decoded_tokens,
            weights_bytes=bundle.manifest.parts["decoder"].weight_bytes,
            plan=PlanFacts(
                plan.prefill,
                plan.prefill_reason,
                plan.weights,
                plan.weights_reason,
                plan.threads,
                plan.threads_reason,
            ),
            parity=parity,
        )
    reporter.phase("done")
    return result


def _answer(engine: Engine, job: Job, reporter: Reporter) -> tuple[str, list[int], Usage, Timings]:
    """Answer the job's messages; the phase "decode" begins with the first token."""
    watcher = Watcher(job.image_count, reporter) if job.image_count else None
    text, last = "", None
    ids: list[int] = []
    for delta in engine.chat(
        job.messages,
        max_tokens=job.max_tokens,
        temperature=job.temperature,
        seed=job.seed,
        cancel=watcher,
    ):
        if last is None:
            reporter.phase("decode")
        text, last = text + delta.text, delta
        ids += delta.token_ids
    if last is None or last.usage is None or last.timings is None:
        raise SimulationError(
            "the engine gave an answer without an end; report this with the bundle's manifest"
        )
    return text, ids, last.usage, last.timings


def _borders(asked: float, timings: Timings, with_images: bool) -> dict[str, float]:
    """Moments at which phases began, by the answer's own times."""
    images = asked + (timings.image_ms + timings.reuse_ms) / 1e3
    borders = {"decode": images + timings.prefill_ms / 1e3}
    return {"prefill": images, **borders} if with_images else borders


def score(engine: Engine, path: Path, names: tuple[str, ...]) -> ParityResult:
    """Compare an engine with a recorded reference, one case in memory at a time.

    Args:
        engine: inside its limits.
        path: of the reference.
        names: of its cases; empty for all.

    Raises:
        ParityError: no usable reference, or of another model, or without such cases.
        DependencyError: safetensors is not installed.
    """
    from PIL import __version__ as pillow

    from autoglm_edge.parity.comparison import Collector
    from autoglm_edge.parity.reference import Reference
    from autoglm_edge.parity.validate import check_inputs, observe

    reference = Reference.open(path)
    _check_same_model(engine, reference)
    eos = frozenset(engine.bundle.manifest.tokens.eos)

    def plain(ids: Any) -> str:
        return engine.tokenizer.decode(ids, skip_special=True)

    collector = Collector("inside the limits", plain, engine.tokenizer.decode, eos)
    same_pillow = reference.fingerprint.versions.get("pillow") == pillow
    faults: list[str] = []
    for case in _chosen(reference, names):
        pictures = case.pictures()
        prompt = engine.prompt(case.chat_messages(), max_tokens=max(1, len(case.answer)))
        found = check_inputs(case, prompt, same_pillow=same_pillow)
        faults += [f"{fault.case}: {fault.detail}" for fault in found]
        if not any(fault.fatal for fault in found):
            size = pictures[-1].size if pictures else None
            collector.add(case, observe(engine, case, prompt, pictures), size=size)
    found_all = collector.result()
    if found_all is None:
        raise ParityError(f"no case of {path} could be scored: {'; '.join(faults[:3])}")
    answer, lost = found_all.answer, found_all.actions.lost
    return ParityResult(
        cases=found_all.cases,
        positions=answer.top1.total,
        kl_mean=answer.kl.mean,
        kl_p99=answer.kl.p99,
        top1_agreement=answer.top1.value,
        same_answers=found_all.same_answers.hits,
        taps=lost.total,
        taps_lost=lost.hits,
        vision_cosine=found_all.vision_cosine if found_all.images else None,
        faults=tuple(faults),
    )


def _chosen(reference: Reference, names: tuple[str, ...]) -> Iterator[Case]:
    if missing := sorted(set(names) - set(reference.names)):
        raise ParityError(f"{reference.path} has no case {missing[0]!r}; it has {', '.join(reference.names)}")
    return (case for case in reference.cases() if not names or case.name in names)


def _check_same_model(engine: Engine, reference: Reference) -> None:
    """Refuse a reference whose figures would say nothing about this bundle."""
    source, recorded = engine.bundle.manifest.source, reference.fingerprint
    if source.config_sha256 != recorded.config_sha256:
        raise ParityError(
            f"{reference.path} was recorded from {recorded.model} (config "
            f"{recorded.config_sha256[:12]}), but {engine.bundle.path} was made from {source.model} (config "
            f"{source.config_sha256[:12]}); record a reference from the bundle's own checkpoint"
        )
    for name, ours, theirs in (
        ("image_layout", engine.image_layout, recorded.image_layout),
        ("max_image_tokens", engine.image.max_tokens, recorded.image.max_tokens),
    ):
        if ours != theirs:
            raise ParityError(
                f"{reference.path} was recorded with {name} {theirs!r}, but the job has {ours!r}; "
                "give it the former"
            )


def main(arguments: list[str]) -> int:
    """Read the job, do it, report."""
    reporter = Reporter()
    try:
        if len(arguments) != 1:
            raise SimulationError(f"{len(arguments)} arguments are given, must be one: a job's file, or -")
        reporter.result(run_job(Job.from_json(_read(arguments[0])), reporter))
    except (EdgeError, MemoryError) as error:
        message = str(error) or "there is not enough memory"
        reporter.error(message, memory=isinstance(error, MemoryError) or says_memory(message))
        sys.stderr.write(message + "\n")
        return 1
    return 0


def _read(name: str) -> bytes:
    """The file of a job, or stdin.

    Raises:
        SimulationError: it cannot be read, or is far too large.
    """
    try:
        if name == "-":
            data = _read_all(sys.stdin.buffer)
        else:
            with Path(name).open("rb") as file:
                data = _read_all(file)
    except OSError as error:
        raise SimulationError(f"the job {name} cannot be read ({error.strerror or error})") from error
    if len(data) > LIMIT_BYTES:
        raise SimulationError(f"the job {name} has more than {LIMIT_BYTES >> 20} MiB; give images as paths")
    return data


def _read_all(file: IO[bytes]) -> bytes:
    """All of it, up to a little above the limit; in pieces, since a reader reserves what it is asked for."""
    pieces, total = [], 0
    while total <= LIMIT_BYTES and (piece := file.read(_PIECE_BYTES)):
        pieces.append(piece)
        total += len(piece)
    return b"".join(pieces)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
