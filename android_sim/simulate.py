"""A bundle on a simulated device: foretell, prepare, run inside the limits, judge, project.

    bundle, device, question ─ forecast ─ run (runner.py, in a child) ─ verdict ─ projection ─ Simulation

In: a bundle's folder, a device, a question. Out: a `Simulation`; or a `Planned`, without a run. Knows nothing
of how limits are set up, nor of how reports are shown.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from autoglm_edge.errors import SimulationError
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.prepared import LogTell, Tell
from autoglm_edge.runtime.machine.topology import usable_cores
from autoglm_edge.runtime.prompt.build import prompt_ids
from autoglm_edge.runtime.prompt.image import load_image
from autoglm_edge.runtime.prompt.messages import read_messages
from autoglm_edge.runtime.prompt.template import ChatTemplate
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer
from autoglm_edge.runtime.session import Prefill, SessionOptions, Weights

from .budget import AppState, Budget
from .device import Device, find_device, list_devices
from .forecast import Forecast, foretell, usual_question
from .limits.enforcement import Wish, choose_enforcement
from .need import Question
from .planned import Planned
from .projection import Projection, project
from .run.job import Job
from .run.runner import RunOptions, run_inside
from .simulation import Simulation, Subject
from .trace import Trace
from .verdict import Verdict, classify

PROMPT = "打开设置"
MAX_TOKENS = 32
TIMEOUT_S = 900.0
STEADY_TOKENS = 8
"""Fewest decoded tokens from which a run is taken to have settled."""
DEFAULT_DEVICE = "phone-8"


@dataclass(frozen=True)
class Ask:
    """What is asked of the bundle, and how it is opened.

    Attributes:
        prompt: text of the user.
        images: files of pictures, before the text.
        system: system prompt; "" for none.
        max_tokens: of the answer.
        context: tokens that the engine holds; None for its default.
        max_image_tokens: of a picture; None for the bundle's.
        weights: as in SessionOptions.
        prefill: as in SessionOptions.
        reference: file of `autoglm record` to compare the output with, inside the limits.
        cases: names of its prompts; empty for all.
    """

    prompt: str = PROMPT
    images: tuple[Path, ...] = ()
    system: str = ""
    max_tokens: int = MAX_TOKENS
    context: int | None = None
    max_image_tokens: int | None = None
    weights: Weights = "auto"
    prefill: Prefill = "auto"
    reference: Path | None = None
    cases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path in (*self.images, *([self.reference] if self.reference else [])):
            if not Path(path).is_file():
                raise SimulationError(f"{path} is no file; name a picture or a reference that is there")

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """OpenAI-style, pictures as paths."""
        parts: list[dict[str, Any]] = [
            {"type": "image", "image": str(Path(path).absolute())} for path in self.images
        ]
        parts.append({"type": "text", "text": self.prompt})
        first = [{"role": "system", "content": self.system}] if self.system else []
        return (*first, {"role": "user", "content": parts})

    def question(self, bundle: Bundle) -> Question:
        """The size of it on a bundle: the prompt is put together as the engine does, nothing is run.

        Raises:
            RequestError: the prompt or a picture cannot be used.
        """
        manifest = bundle.manifest
        image = manifest.image
        if self.max_image_tokens is not None and self.max_image_tokens < image.max_tokens:
            image = image.with_max_tokens(self.max_image_tokens)
        ids = prompt_ids(
            read_messages(self.messages),
            tokenizer=Tokenizer.from_folder(bundle.path),
            template=ChatTemplate.from_folder(bundle.path),
            image=image,
            tokens=manifest.tokens,
        )
        pixels = 0
        for path in self.images:
            width, height = load_image(Path(path)).size
            pixels = max(pixels, width * height)
        pictures = int((ids == manifest.tokens.image).sum())
        return Question(len(ids), pictures, self.max_tokens, pixels)


def simulate(
    bundle: str | Path,
    device: str | Path | Device = DEFAULT_DEVICE,
    *,
    state: AppState = "visible",
    ask: Ask | None = None,
    enforcement: Wish = "auto",
    timeout: float = TIMEOUT_S,
    prepare: bool = True,
    throttle: bool = False,
    tell: Tell | None = None,
    cancel: threading.Event | None = None,
) -> Simulation:
    """Run a bundle inside the limits of a device.

    Args:
        bundle: folder.
        device: id of a profile, a TOML file, or a profile.
        state: of the app.
        ask: what is asked; default a short prompt without a picture.
        enforcement: what holds the run; "auto" is the best that this host offers.
        timeout: seconds after which the run is stopped.
        prepare: make prepared weights outside the limits first, where the runtime wants them: an app ships
            them or makes them once. Without, the runtime packs inside the limits.
        throttle: hold processor and storage to the device's thermal curve and reading speed, where this host
            allows it: the run then takes as long as it does on a hot phone with such storage.
        tell: told of what takes long.
        cancel: stops the run when it is set.

    Raises:
        BundleError: the folder is no usable bundle.
        SimulationError: there is no such device, or the limits cannot be set up here.
        RequestError: prompt or options cannot be used with this bundle.
        DeviceError: this CPU would compute the bundle wrongly, or prepared weights have no room.
    """
    opened, asked, say = Bundle.open(bundle), ask or Ask(), tell or LogTell()
    profile = device if isinstance(device, Device) else find_device(device)
    budget = Budget.of(profile, state)
    question = asked.question(opened)
    threads = min(budget.threads, usable_cores())
    options = SessionOptions("cpu", threads, asked.weights, asked.prefill)
    forecast = foretell(opened, budget, question=question, options=options, prepared=prepare)
    job = Job(
        bundle=opened.path,
        messages=asked.messages,
        context=asked.context,
        max_tokens=asked.max_tokens,
        max_image_tokens=asked.max_image_tokens,
        threads=threads,
        weights=asked.weights,
        prefill=asked.prefill,
        reference=asked.reference,
        cases=asked.cases,
    )
    made = job.prepare_outside(say) if prepare else []
    say.say(f"Running {opened.path.name} on {profile.name}, {state}, {budget.limit_bytes / 1e9:.2f} GB")
    settings = RunOptions(timeout_s=timeout, throttle_cpu=throttle, throttle_storage=throttle)
    trace = run_inside(job, budget, choose_enforcement(enforcement, budget), settings, stop=cancel)
    verdict = classify(trace, budget)
    return Simulation(
        subject=Subject.of(opened),
        device=profile,
        budget=budget,
        trace=trace,
        verdict=verdict,
        forecast=forecast,
        errors=forecast.errors(trace),
        projection=_projection(profile, opened, question, forecast, verdict),
        machine=this_machine(),
        prepared=prepare,
        date=date.today().isoformat(),
        notes=tuple(_notes(trace, forecast, budget, threads, made)),
    )


def plan(
    bundle: str | Path,
    device: str | Path | Device = DEFAULT_DEVICE,
    *,
    state: AppState = "visible",
    ask: Ask | None = None,
    asked: bool = True,
    prepare: bool = True,
) -> Planned:
    """Foretell without running anything.

    Args:
        bundle: folder.
        device: id of a profile, a TOML file, or a profile.
        state: of the app.
        ask: what is asked, and how the bundle is opened; default a step of a phone agent: system prompt, one
            screenshot, a short answer.
        asked: False takes only the options of `ask`, and the size of a step of a phone agent.
        prepare: whether prepared weights are there, as in `simulate`.

    Raises:
        BundleError: the folder is no usable bundle.
        SimulationError: there is no such device, or the question is longer than the model's context.
        RequestError: prompt or options cannot be used with this bundle.
        DeviceError: this CPU would compute the bundle wrongly.
    """
    opened = Bundle.open(bundle)
    profile = device if isinstance(device, Device) else find_device(device)
    budget = Budget.of(profile, state)
    wishes = ask or Ask()
    options = SessionOptions("cpu", min(budget.threads, usable_cores()), wishes.weights, wishes.prefill)
    question = wishes.question(opened) if ask and asked else usual_question(opened, wishes.context)
    forecast = foretell(opened, budget, question=question, options=options, prepared=prepare)
    return Planned(
        Subject.of(opened),
        profile,
        budget,
        forecast,
        _projection(profile, opened, forecast.question, forecast, None),
    )


def simulate_all(
    bundles: Sequence[str | Path],
    devices: Sequence[str | Path | Device] = (),
    *,
    run: Callable[[str | Path, Device], Simulation | Planned],
) -> Iterator[Simulation | Planned]:
    """Every bundle on every device, one after the other.

    Args:
        bundles: folders.
        devices: default all built-in profiles.
        run: what to do with each, `simulate` or `plan` with the options that are wanted.

    Raises:
        What `run` raises.
    """
    profiles = [item if isinstance(item, Device) else find_device(item) for item in devices]
    for profile in profiles or list_devices():
        for bundle in bundles:
            yield run(bundle, profile)


def _projection(
    device: Device, bundle: Bundle, question: Question, forecast: Forecast, verdict: Verdict | None
) -> Projection | None:
    """Decoding on the device; None where it would not come so far.

    What a run read again on this host is an upper bound, since its disk may read ahead far more than a
    phone's: no more than all of the swept weights is taken.
    """
    name = forecast.expected if verdict is None else verdict.name
    if not name.startswith("fits"):
        return None
    swept, storage = forecast.need.swept("decode"), float(forecast.reread_bytes_per_token)
    if verdict is not None:
        measured = verdict.refault_bytes_per_token or 0.0
        storage = (min(measured, swept) if swept else measured) if name == "fits_thrash" else 0.0
    manifest = bundle.manifest
    return project(
        device,
        weights_bytes=manifest.parts["decoder"].weight_bytes,
        kv_bytes=manifest.kv_bytes_per_token * question.tokens,
        storage_bytes=storage,
    )


def _notes(
    trace: Trace, forecast: Forecast, budget: Budget, threads: int, made: Sequence[str]
) -> Iterator[str]:
    """What must be known with a run."""
    if made:
        yield f"weights of {' and '.join(made)} were prepared outside the limits first, once"
    if threads < budget.threads:
        yield f"{threads} threads, the device has {budget.threads} cores for this"
    if trace.peak_held().phase == "score":
        yield "the peak is in scoring the reference, which an app does not do"
    result = trace.result
    if result is not None and result.decoded_tokens < STEADY_TOKENS:
        yield (
            f"{result.decoded_tokens} tokens were decoded: memory may not have settled, what was read again "
            "per token may be less in a longer answer"
        )
    if result is not None and result.plan.weights != forecast.plan.weights:
        yield (
            f"the forecast took weights to be {forecast.plan.weights}, the run had them "
            f"{result.plan.weights} ({result.plan.weights_reason})"
        )
