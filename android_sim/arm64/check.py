"""Is the runtime right on the instruction set of phones? One bundle, asked here and on emulated ARM CPUs.

In: a bundle, a question, CPUs. Out: an `Arm64Report`. Everything is fetched first if it is not there.

Each CPU is asked with every way the bundle has of reading a prompt, and once more without KleidiAI, Arm's own
kernels. The answer of this machine is then scored everywhere, so that logits are compared at the same places.
Knows nothing of memory and speed: an emulator says nothing of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.prepared import LogTell, Tell

from .qemu import CPUS, Cpu, find_cpu, laid_out, run_guest
from .report import Arm64Report, ArmRun, PreparedArm, compare_logits, lead, tolerance_of
from .root import Root, arm64_folder, ensure_root

PROMPT = "打开设置"
MAX_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        text: of the user.
        images: their files.
        max_tokens: of the answer.
        context: tokens that the engine holds; default the engine's.
    """

    text: str = PROMPT
    images: tuple[Path, ...] = ()
    max_tokens: int = MAX_TOKENS
    context: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= 4096:
            raise SimulationError(f"max_tokens is {self.max_tokens}, must be 1 to 4096 for an emulated run")
        for image in self.images:
            if not image.is_file():
                raise SimulationError(f"{image} is no file; name a picture")


@dataclass(frozen=True)
class _Run:
    """One way of asking."""

    name: str
    prefill: str
    kleidiai: bool = True
    weights: str = "packed"


def check_arm64(
    bundle: Path,
    cpus: Sequence[str] = tuple(CPUS),
    tell: Tell | None = None,
    *,
    question: Question | None = None,
    onnxruntime: str | None = None,
    threads: int = 1,
) -> Arm64Report:
    """Ask a bundle here and on ARM.

    Args:
        bundle: its folder.
        cpus: names from `qemu.CPUS`.
        tell: told of what takes long; default the log.
        question: what is asked; default a short one without a picture.
        onnxruntime: version on the ARM side; default the one here.
        threads: of one operator, on both sides.

    Raises:
        BundleError: the folder is not a complete bundle.
        SimulationError: this system cannot emulate, something cannot be fetched, or the runtime fails there.
    """
    chosen = [find_cpu(name) for name in cpus]
    if not chosen:
        raise SimulationError(f"no CPU is named; choose from {', '.join(CPUS)}")
    opened = Bundle.open(bundle)
    tell = tell or LogTell()
    asked = question or Question()
    started = time.monotonic()
    root = ensure_root(tell, onnxruntime)
    fetched = time.monotonic()
    runs = _runs(opened)
    with _scratch() as (folder, app):
        session = _Session(opened, asked, threads, folder, app, tell)
        tell.say("Asking on this machine")
        here = session.ask([run for run in runs if run.kleidiai], None, None, None)
        teacher = {run.name: here[_native(run, runs)]["tokens"] for run in runs}
        results: list[ArmRun] = []
        for cpu in chosen:
            fitting = [run for run in runs if run.kleidiai or cpu.dot_products]
            tell.say(f"Asking on an emulated {cpu.name} ({cpu.stands_for})")
            there = session.ask(fitting, root, cpu, teacher)
            results += [_compared(session, cpu, run, _native(run, runs), here, there) for run in fitting]
    first = here[runs[0].name]
    return Arm64Report(
        bundle=str(bundle),
        fingerprint=opened.fingerprint,
        onnxruntime=root.versions["onnxruntime"],
        onnxruntime_here=first["onnxruntime"],
        machine=first["machine"],
        prompt_tokens=len(first["prompt_ids"]),
        images=len(asked.images),
        text=first["text"],
        runs=tuple(results),
        signature=root.signature,
        fetch_s=round(fetched - started, 1),
        total_s=round(time.monotonic() - started, 1),
    )


def prepare_arm64(
    bundle: Path,
    folder: Path,
    cpu: str = "cortex-a76",
    tell: Tell | None = None,
    *,
    onnxruntime: str | None = None,
    threads: int = 1,
) -> PreparedArm:
    """Write a bundle's weights as an ARM CPU's kernels want them, with the runtime's own `prepare`.

    They are made under emulation, and then loaded and asked there: the answer must be the one of weights that
    were packed at the load.

    Args:
        bundle: its folder.
        folder: gets `prepared/KEY/` for each part, as in the cache folder of a machine with that CPU.
        cpu: a name from `qemu.CPUS`.
        tell: told of what takes long; default the log.
        onnxruntime: version to prepare for; default the one here.
        threads: of one operator.

    Raises:
        BundleError: the folder is not a complete bundle.
        SimulationError: as `check_arm64`, or prepared weights answer otherwise.
    """
    target = find_cpu(cpu)
    opened = Bundle.open(bundle)
    tell = tell or LogTell()
    root = ensure_root(tell, onnxruntime)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SimulationError(f"{folder} cannot be made ({error.strerror}); name another folder") from error
    runs = [_Run("packed", "decoder"), _Run("prepared", "decoder", weights="prepared")]
    with _scratch() as (scratch, app):
        session = _Session(opened, Question(max_tokens=8), threads, scratch, app, tell)
        tell.say(f"Preparing weights on an emulated {cpu}")
        done = session.ask(runs, root, target, None, prepare=True, cache=folder.absolute())
        same = np.array_equal(session.logits("packed", target), session.logits("prepared", target))
    if done["prepared"]["weights"] != "prepared":
        raise SimulationError(
            f"the weights prepared for {cpu} are not used when they are loaded; do not ship {folder}"
        )
    if not same or done["packed"]["tokens"] != done["prepared"]["tokens"]:
        raise SimulationError(
            f"the weights prepared for {cpu} answer otherwise than those packed at the load"
        )
    places = [Path(graph).parent for graph in done["packed"]["prepared"]]
    return PreparedArm(
        cpu=cpu,
        onnxruntime=root.versions["onnxruntime"],
        folders=tuple(str(place) for place in places),
        bytes=sum(file.stat().st_size for place in places for file in place.iterdir()),
    )


class _Session:
    """Jobs of one check: where they lie, and what came of them."""

    def __init__(
        self, bundle: Bundle, question: Question, threads: int, folder: Path, app: Path, tell: Tell
    ) -> None:
        self.bundle, self._question, self._threads = bundle, question, threads
        self._folder, self._app, self._tell = folder, app, tell

    def ask(
        self,
        runs: Sequence[_Run],
        root: Root | None,
        cpu: Cpu | None,
        teacher: Mapping[str, Sequence[int]] | None,
        *,
        prepare: bool = False,
        cache: Path | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Ask one machine; what each run says, by its name."""
        folder = self._place(cpu)
        folder.mkdir()
        job = folder / "job.json"
        document = {
            "bundle": str(self.bundle.path.absolute()),
            "folder": str(folder),
            "prompt": self._question.text,
            "images": [str(image.absolute()) for image in self._question.images],
            "max_tokens": self._question.max_tokens,
            "context": self._question.context,
            "threads": self._threads,
            "runs": [vars(run) for run in runs],
            "teacher": teacher,
            "prepare": prepare,
        }
        job.write_text(json.dumps(document), encoding="utf-8")
        said: dict[str, dict[str, Any]] = {}
        start: dict[str, Any] = {"prepared": []}

        def hear(step: Mapping[str, Any]) -> None:
            if step["step"] == "start":
                start.update(step)
            elif step["step"] == "prepared":
                start["prepared"].append(step["graph"])
                self._tell.say(f"  {step['part']} prepared in {step['seconds']:.0f} s")
            elif step["step"] == "run":
                said[step["name"]] = {**start, **step}
                seconds = sum(step[key] for key in ("load_s", "image_s", "chat_s", "score_s"))
                self._tell.say(f"  {step['name']}: {len(step['tokens'])} tokens in {seconds:.0f} s")

        run_guest(job, self._app, hear, root=root, cpu=cpu, cache=cache or folder)
        if missing := [run.name for run in runs if run.name not in said]:
            raise SimulationError(f"the guest ended without a word on {missing[0]}; run it again")
        return said

    def logits(self, name: str, cpu: Cpu | None) -> NDArray[np.float32]:
        """(n, V) of a run."""
        rows: NDArray[np.float32] = np.load(self._place(cpu) / f"{name}.logits.npy")
        return rows

    def features(self, name: str, cpu: Cpu | None) -> NDArray[np.float32] | None:
        """(N, C) of the first picture, None without one."""
        path = self._place(cpu) / f"{name}.features.npy"
        return np.load(path) if path.exists() else None

    def _place(self, cpu: Cpu | None) -> Path:
        return self._folder / (cpu.name if cpu else "here")


def _compared(
    session: _Session,
    cpu: Cpu,
    run: _Run,
    native: str,
    here: Mapping[str, Mapping[str, Any]],
    there: Mapping[str, Mapping[str, Any]],
) -> ArmRun:
    """One run on ARM beside the same one here."""
    first, second = here[native], there[run.name]
    logits = session.logits(native, None)
    distance = compare_logits(logits, session.logits(run.name, cpu))
    ours, theirs = session.features(native, None), session.features(run.name, cpu)
    return ArmRun(
        cpu=cpu.name,
        prefill=run.prefill,
        kleidiai=run.kleidiai and cpu.dot_products,
        same_prompt=first["prompt_ids"] == second["prompt_ids"],
        tokens=tuple(second["tokens"]),
        tokens_here=tuple(first["tokens"]),
        logits=distance,
        lead=lead(logits, first["tokens"], second["tokens"], session.bundle.manifest.tokens.eos),
        features_rms=None if ours is None or theirs is None else _relative_rms(ours, theirs),
        tolerance=tolerance_of(
            session.bundle.manifest,
            prefill=run.prefill,
            pictures=ours is not None,
            kleidiai=run.kleidiai and cpu.dot_products,
        ),
        seconds=round(sum(second[key] for key in ("load_s", "image_s", "chat_s", "score_s")), 1),
    )


def _relative_rms(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    if first.shape != second.shape:
        return float("inf")
    wide = first.astype(np.float64)
    return float(np.sqrt(np.mean((second - wide) ** 2)) / max(np.sqrt(np.mean(wide**2)), 1e-30))


def _runs(bundle: Bundle) -> list[_Run]:
    """The ways of reading a prompt that a bundle has; the decoder once more without KleidiAI."""
    parts = bundle.manifest.parts
    ways = [_Run("decoder", "decoder")]
    ways += [
        _Run(name, name) for name, part in (("integer", "prefill"), ("layers", "layer")) if part in parts
    ]
    return [*ways, replace(ways[0], name="decoder-plain", kleidiai=False)]


def _native(run: _Run, runs: Sequence[_Run]) -> str:
    """Name of the run here that a run there is compared with: KleidiAI means nothing to x86."""
    return next(other.name for other in runs if other.prefill == run.prefill and other.kleidiai)


@contextmanager
def _scratch() -> Iterator[tuple[Path, Path]]:
    """A folder for jobs, and the runtime laid out for the guest; both are gone afterwards."""
    with laid_out(arm64_folder()) as app:
        folder = app.with_name("jobs")
        try:
            folder.mkdir()
        except OSError as error:
            raise SimulationError(f"{folder} cannot be made ({error.strerror}); free some space") from error
        yield folder, app
