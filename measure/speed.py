"""What a bundle costs on this machine: loading, prefill, decode, pictures, and memory in each.

In: a bundle and a plan. Out: a `BenchReport`. Calls the graphs through `Model` (`embed`, `prefill`,
`forward`, `encode_image`) with random token ids in the engine's chunks: figures are those of graphs and
cache, without template, sampling or reuse, which a conversation has on top. Before a decode the cache is
filled with random rows and not computed, so that a context of 4,096 tokens costs no minutes. Knows nothing of
text.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.limits import trim_memory
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.plan import plan_model
from autoglm_edge.runtime.prompt.image import patchify
from autoglm_edge.runtime.session import SessionOptions

from .bandwidth import Limits, measure_limits
from .figures import Times, repeat
from .graphs import GraphSequence, GraphSequences
from .machine import this_machine
from .memory import BETWEEN, Memory, MemorySampler
from .plan import TOGETHER_AT, BenchPlan
from .profile import profile
from .report import BenchReport, Decode, Encode, Prefill, Profile, Together
from .screen import screenshot

WARM_TOKENS = 384
"""Of the first prompt, which is not timed: enough of them to go the way of long prompts, whose graph is
opened and whose weights are touched for the first time then."""

Say = Callable[[str], None]


def bench(
    bundle: Bundle,
    plan: BenchPlan,
    *,
    options: SessionOptions | None = None,
    limits: Limits | None = None,
    left_out: tuple[str, ...] = (),
    profiled: bool = False,
    say: Say | None = None,
) -> BenchReport:
    """Measure a bundle; it must be able to do all of the plan (`BenchPlan.misfits`).

    Args:
        bundle: opened.
        plan: sizes and repetitions.
        options: device and threads.
        limits: of this machine, if they are known; else they are measured first.
        left_out: goes into the report.
        profiled: whether to tell by operator, too, where the time goes: of the longest prompt, of steps at
            the shortest and the longest context, and of the largest picture.
        say: told what is measured next.

    Raises:
        RequestError: a size of the plan does not fit the bundle.
        BundleError: the bundle's graphs fail.
        DeviceError: the device is not there, or there is not enough memory.
    """
    if problems := plan.misfits(bundle.manifest):
        raise RequestError(f"this bundle cannot be measured so: {problems[0]}; name smaller sizes")
    options, tell = options or SessionOptions(), say or (lambda text: None)
    if limits is None:
        tell("measuring the machine's limits")
        limits = measure_limits(options.thread_count)
    with MemorySampler() as memory:
        prepare = None
        if plan_model(bundle, options).prepare:
            tell("preparing weights for this machine, once")
            with memory.phase("prepare"):
                prepare = repeat(partial(Model, bundle, options), 1)
            gc.collect()  # what was only there to prepare must not count as what loading takes
            trim_memory()
        tell("loading")
        with memory.phase("load"):
            started = time.perf_counter()
            model = Model(bundle, options)
            loads = [time.perf_counter() - started]
        run = _Run(model, plan, limits, memory)
        prefill = tuple(run.prefill(length, tell) for length in plan.prefill)
        decode = tuple(run.decode(context, tell) for context in plan.decode_at)
        together = run.together(tell)
        load_vision, images = run.images(tell)
        with memory.phase("steady"):
            choices = dataclasses.asdict(model.plan)
        del run, model
        for _ in range(plan.repeat - 1):
            tell("loading again")
            started = time.perf_counter()
            Model(bundle, options)
            loads.append(time.perf_counter() - started)
    profiles: tuple[Profile, ...] = ()
    if profiled:
        profiles = profile(
            bundle,
            prompts=sorted(plan.prefill)[-1:],
            decode_at=sorted({*sorted(plan.decode_at)[:1], *sorted(plan.decode_at)[-1:]}),
            images=sorted(plan.images)[-1:],
            options=options,
            say=tell,
        )
    manifest = bundle.manifest
    return BenchReport(
        bundle=bundle.path.name,
        fingerprint=bundle.fingerprint,
        recipe=str(manifest.recipe.get("name", "?")),
        date=date.today().isoformat(),
        machine=this_machine(),
        threads=options.thread_count,
        choices=choices,
        part_bytes={name: part.weight_bytes for name, part in manifest.parts.items()},
        limits=limits,
        prepare=prepare,
        load=Times(tuple(loads)),
        load_vision=load_vision,
        prefill=prefill,
        decode=decode,
        together=together,
        images=images,
        memory=_phases(memory.peaks),
        left_out=left_out,
        profiles=profiles,
    )


class _Run:
    """The measurements of one loaded model."""

    def __init__(self, model: Model, plan: BenchPlan, limits: Limits, memory: MemorySampler) -> None:
        self._model = model
        self._sequence = GraphSequence(model, plan.longest)
        self._plan = plan
        self._limits = limits
        self._memory = memory
        self._manifest = model.bundle.manifest
        self._weights = layer_weights(model.bundle)
        self._on_cpu = model.options.device == "cpu"  # the limits are the CPU's
        self._random = np.random.default_rng(0)
        with memory.phase("first prompt"):  # graphs that open late, first touches of weights: nobody's time
            self._prompt(self._ids(min(WARM_TOKENS, plan.longest)))

    def prefill(self, length: int, tell: Say) -> Prefill:
        """A prompt of so many tokens."""
        tell(f"prefill of {length} tokens")
        ids = self._ids(length)
        with self._memory.phase(f"prefill {length}"):
            times = repeat(lambda: self._prompt(ids), self._plan.repeat)
        share = None
        if self._weights is not None and self._on_cpu:
            share = 2 * self._weights * length / times.median_s / self._limits.int8_ops_per_s
        return Prefill(length, times, share)

    def decode(self, context: int, tell: Say) -> Decode:
        """Steps after so many tokens."""
        tell(f"decode at {context} tokens")
        self._sequence.fill(context, self._random)
        seconds: list[float] = []
        with self._memory.phase(f"decode at {context}"):
            for _ in range(self._plan.repeat):
                self._sequence.cache.truncate(context)
                seconds += repeat(lambda: self._sequence.feed(self._ids(1)), self._plan.steps).seconds
        times = Times(tuple(seconds))
        share = None
        if self._on_cpu:
            read = self._manifest.parts["decoder"].weight_bytes / times.median_s
            share = read / self._limits.read_bytes_per_s
        return Decode(context, self._plan.steps, times, share)

    def together(self, tell: Say) -> tuple[Together, ...]:
        """Steps of several answers."""
        if not self._plan.together:
            return ()
        most, steps = max(self._plan.together), self._plan.steps
        sequences = GraphSequences(self._model, TOGETHER_AT + steps, most)
        sequences.fill(TOGETHER_AT, self._random)
        rows = []
        for count in self._plan.together:
            tell(f"{count} answers together")
            seconds: list[float] = []
            with self._memory.phase(f"{count} answers"):
                for _ in range(self._plan.repeat):
                    sequences.truncate(TOGETHER_AT)
                    seconds += repeat(partial(sequences.feed, self._ids(count)), steps).seconds
            rows.append(Together(count, TOGETHER_AT, Times(tuple(seconds))))
        return tuple(rows)

    def images(self, tell: Say) -> tuple[Times | None, tuple[Encode, ...]]:
        """A screenshot at each budget; before it, what loading the tower takes."""
        if not self._plan.images:
            return None, ()
        screen, spec, model = screenshot(), self._manifest.image, self._model
        tell("loading the vision tower")
        # The tower is loaded with the first picture: the smallest one, once with loading and once without.
        smallest = patchify(screen, spec.with_max_tokens(min(self._plan.images)))
        with self._memory.phase("load vision"):
            first = repeat(lambda: model.encode_image(smallest), 1).median_s
        again = repeat(lambda: model.encode_image(smallest), 1).median_s
        rows = []
        for budget in self._plan.images:
            tell(f"a picture of at most {budget} tokens")
            bounded = spec.with_max_tokens(budget)
            image = patchify(screen, bounded)
            patching = repeat(partial(patchify, screen, bounded), self._plan.repeat)
            with self._memory.phase(f"image of {image.tokens}"):
                times = repeat(partial(model.encode_image, image), self._plan.repeat)
            rows.append(Encode(budget, image.tokens, len(image.patches), times, patching))
        return Times((max(0.0, first - again),)), tuple(rows)

    def _ids(self, count: int) -> NDArray[np.int64]:
        """Random tokens below the special ones."""
        tokens = self._manifest.tokens
        return self._random.integers(
            0, max(1, min(tokens.image, self._manifest.geometry.vocab)), count, np.int64
        )

    def _prompt(self, ids: NDArray[np.int64]) -> None:
        self._sequence.reset()
        self._sequence.feed(ids)


def layer_weights(bundle: Bundle) -> int | None:
    """Weights of the matrices of all decoder layers, the head not counted; None if config.json does not tell.

    The manifest says all but the width of the MLP, which the runtime does not need.
    """
    shape = bundle.manifest.geometry
    try:
        config: Any = json.loads(bundle.file("config.json").read_text(encoding="utf-8"))
        inner = config.get("text_config", config).get("intermediate_size")
    except (OSError, ValueError, AttributeError):
        return None
    if not isinstance(inner, int) or isinstance(inner, bool) or inner < 1:
        return None
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * inner)


def _phases(peaks: dict[str, Memory]) -> dict[str, Memory]:
    return {name: peaks[name] for name in peaks if name != BETWEEN}
