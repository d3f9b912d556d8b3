"""Where the time of a bundle goes: which operators take how much of a prompt, of a step, of a picture.

In: a bundle, and what is to be looked at. Out: `Profile`s. onnxruntime traces every run of every graph; what
of the time is not in a trace is Python's: expanding layers, filling and handing over arrays. Tracing costs a
little, so times of a profile are no speeds; shares are what it is for. Knows nothing of text.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autoglm_edge.errors import DeviceError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.prompt.image import patchify
from autoglm_edge.runtime.session import SessionOptions

from .graphs import GraphSequence
from .report import Profile
from .screen import screenshot

STEPS = 8
"""Decoded for a profile."""


Work = Callable[[Model], Callable[[], object]]
"""Makes ready in a model what is then run, and timed."""


def profile(
    bundle: Bundle,
    *,
    prompts: Iterable[int] = (),
    decode_at: Iterable[int] = (),
    images: Iterable[int] = (),
    options: SessionOptions | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Profile, ...]:
    """Trace a bundle; each kind of work in a model of its own, once before and once traced.

    Args:
        bundle: opened; it can do all of this.
        prompts: lengths in tokens.
        decode_at: tokens in the cache before the first of some steps.
        images: most tokens of a screenshot.
        options: device, threads and wishes.
        say: told what is traced next.

    Raises:
        BundleError: the bundle's graphs fail.
        DeviceError: there is not enough memory, or no folder for traces.
    """
    options, tell = options or SessionOptions(), say or (lambda text: None)
    wanted: list[tuple[str, Work]] = []
    wanted += [(f"prefill {length}", _prompt(length)) for length in prompts]
    wanted += [(f"decode at {context}", _steps(context)) for context in decode_at]
    wanted += [(f"image of at most {budget}", _image(budget)) for budget in images]
    found = []
    for name, work in wanted:
        tell(f"profile of {name}")
        found.append(_profile(bundle, options, name, work))
    return tuple(found)


def _profile(bundle: Bundle, options: SessionOptions, name: str, work: Work) -> Profile:
    try:
        with tempfile.TemporaryDirectory(prefix="autoglm-traces-") as folder:
            model = Model(bundle, replace(options, traces=Path(folder)))
            run = work(model)
            run()  # first touches are nobody's time
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
            del model, run
            gc.collect()  # a trace is written when its session goes
            operators: Counter[str] = Counter()
            for trace in Path(folder).iterdir():
                operators.update(read_trace(trace.read_bytes()))
    except OSError as error:
        raise DeviceError(
            f"traces cannot be written or read ({error}); set TMPDIR to a folder with room"
        ) from error
    return Profile(name, seconds, dict(operators.most_common()))


def read_trace(content: bytes) -> Counter[str]:
    """Seconds by operator in the second half of the runs of a session.

    Args:
        content: of a trace of onnxruntime: events with a start and a duration in microseconds; "model_run" is
            a run, and what ends in "_kernel_time" an operator's part of it.
    """
    events = [event for event in json.loads(content) if event.get("ph") == "X"]
    runs = sorted((event for event in events if event["name"] == "model_run"), key=_start)
    counted = runs[len(runs) // 2 :]
    found: Counter[str] = Counter()
    if counted:
        first = _start(counted[0])
        for event in events:
            if event["name"].endswith("_kernel_time") and _start(event) >= first:
                found[event["args"]["op_name"]] += event["dur"] / 1e6
    return found


def _start(event: Mapping[str, Any]) -> int:
    start: int = event["ts"]
    return start


def _prompt(length: int) -> Work:
    def prepare(model: Model) -> Callable[[], object]:
        sequence = GraphSequence(model, length)

        def run() -> None:
            sequence.reset()
            sequence.feed(np.zeros(length, np.int64))

        return run

    return prepare


def _steps(context: int) -> Work:
    def prepare(model: Model) -> Callable[[], object]:
        sequence = GraphSequence(model, context + STEPS)
        sequence.fill(context, np.random.default_rng(0))

        def run() -> None:
            sequence.cache.truncate(context)
            for _ in range(STEPS):
                sequence.feed([0])

        return run

    return prepare


def _image(budget: int) -> Work:
    def prepare(model: Model) -> Callable[[], object]:
        image = patchify(screenshot(), model.bundle.manifest.image.with_max_tokens(budget))
        return lambda: model.encode_image(image)

    return prepare
