"""What runs inside the emulated machine, and outside for comparison: the engine, asked and scored.

In: the path of a job, JSON. Out: files in the job's folder, and a line of JSON per step on stdout. Imports
the runtime and nothing else of this package, since nothing else is inside. Knows nothing of emulators.

    python -m autoglm_edge.android_sim.arm64.guest JOB.json

    {"bundle": path, "folder": path, "prompt": text, "images": [path], "max_tokens": n, "context": n or null,
     "threads": n, "runs": [{"name": text, "prefill": text, "kleidiai": bool, "weights": text}],
     "teacher": {run name: [id]} or null, "prepare": bool}

For each run: NAME.logits.npy, float32 (n, V), the scores before each token of the answer and after the last;
with pictures NAME.features.npy, float32 (N, C) of the first. The answer scored is the teacher's, or its own.
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from autoglm_edge.errors import EdgeError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.machine.prepared import LogTell, prepare
from autoglm_edge.runtime.plan import PREPARED_PARTS
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import SessionOptions

_PLAIN_SETTINGS = ort.SessionOptions


class _WithoutKleidi(ort.SessionOptions):  # type: ignore[misc]  # onnxruntime ships no types
    """Settings of a session that leaves Arm's KleidiAI kernels out; means nothing on other machines.

    The runtime has no such option: on a device, KleidiAI is what one gets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_session_config_entry("mlas.disable_kleidiai", "1")


def main() -> None:
    """Do the job named on the command line; the last line of stdout has "error" if it cannot be done."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _say(step="start", machine=platform.machine(), onnxruntime=ort.__version__, numpy=np.__version__)
    try:
        if job["prepare"]:
            _prepare(job)
        for run in job["runs"]:
            _run(job, run)
    except EdgeError as error:
        _say(error=str(error))
        sys.exit(1)


def _prepare(job: dict[str, Any]) -> None:
    bundle = Bundle.open(job["bundle"])
    for part in PREPARED_PARTS:
        started = time.monotonic()
        graph = prepare(bundle, part, SessionOptions(threads=job["threads"]), LogTell())
        _say(step="prepared", part=part, graph=str(graph), seconds=time.monotonic() - started)


def _run(job: dict[str, Any], run: dict[str, Any]) -> None:
    """Load, answer, score."""
    name, folder = run["name"], Path(job["folder"])
    ort.SessionOptions = _PLAIN_SETTINGS if run["kleidiai"] else _WithoutKleidi
    clock = [time.monotonic()]
    with Engine.load(
        job["bundle"],
        threads=job["threads"],
        context=job["context"],
        weights=run["weights"],
        prefill=run["prefill"],
        prepare=False,
        reuse=ReuseOptions(prefix=False, lookup=False),
    ) as engine:
        content: list[dict[str, Any]] = [{"type": "image", "image": path} for path in job["images"]]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": job["prompt"]}]}]
        prompt = engine.prompt(messages, max_tokens=job["max_tokens"])
        clock.append(time.monotonic())
        if prompt.images:
            np.save(folder / f"{name}.features.npy", engine.encode_image(prompt.images[0]))
        clock.append(time.monotonic())
        tokens, text = [], ""
        for delta in engine.chat(messages, max_tokens=job["max_tokens"]):
            tokens += [int(token) for token in delta.token_ids]
            text += delta.text
        clock.append(time.monotonic())
        answer = tokens if job["teacher"] is None else job["teacher"][name]
        ids = np.concatenate([prompt.ids, np.asarray(answer, np.int64)])
        rows = list(engine.score_chunks(ids, job["images"], start=len(prompt.ids) - 1))
        np.save(folder / f"{name}.logits.npy", np.concatenate(rows))
        clock.append(time.monotonic())
        plan = engine.plan
    load, image, chat, score = (round(b - a, 3) for a, b in itertools.pairwise(clock))
    _say(
        step="run",
        name=name,
        prompt_ids=[int(token) for token in prompt.ids],
        tokens=tokens,
        text=text,
        prefill=plan.prefill,
        weights=plan.weights,
        load_s=load,
        image_s=image,
        chat_s=chat,
        score_s=score,
    )


def _say(**words: object) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    main()
