"""Seconds per step of a phone agent: a recorded session, replayed through the engine at any bundle.

    python benchmarks/agent_step.py OUT-INT4 OUT-INT8 --budgets 256,592,1196

A step sends the whole conversation: a long constant system prompt, the instruction, what was answered so far,
and one new screenshot; the pictures of older turns are taken out, as the client does. Its time is split into
reuse, image, prefill and decode. "warm" is an engine that keeps what it has between steps, "cold" one that
computes all of every step. Answers of random weights mean nothing: each step decodes a fixed number of
tokens, with end tokens out of reach, and the history holds the recorded answers. Texts have about as many
tokens in a real model as here. A table goes to stdout; the last line is one JSON document, which is also
written to benchmarks/results/, and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from agent_plot import plot
from numpy.typing import NDArray

from autoglm_edge.measure.figures import rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.measure.memory import MemorySampler
from autoglm_edge.measure.screen import screenshot
from autoglm_edge.runtime.answer import Delta
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.reuse.options import ReuseOptions

HERE = Path(__file__).resolve().parent
SESSION = HERE / "agent_session.json"
FREQUENCY_PENALTY = 0.2
"""What the client sends."""


@dataclass(frozen=True)
class Step:
    """One answer.

    Attributes:
        number: from 1.
        prompt_tokens: of the whole conversation.
        image_tokens: of its one picture.
        shared_tokens: beginning of the prompt that is the beginning of the prompt before, too.
        reused_tokens: of the prompt that were in the cache.
        reuse_s: finding them.
        image_s: reading and encoding the picture.
        prefill_s: the rest of the prompt.
        decode_s: the answer.
        total_s: wall time of the step.
        answer_tokens: that were decoded.
    """

    number: int
    prompt_tokens: int
    image_tokens: int
    shared_tokens: int
    reused_tokens: int
    reuse_s: float
    image_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    answer_tokens: int


def conversations(session: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The messages of each step, the last turn with a picture of its own."""
    history: list[dict[str, Any]] = [{"role": "system", "content": "\n".join(session["system"])}]
    for number, step in enumerate(session["steps"]):
        info = json.dumps({"current_app": step["app"]}, ensure_ascii=False)
        words = f"{session['task']}\n\n{info}" if number == 0 else f"** Screen Info **\n\n{info}"
        text = {"type": "text", "text": words}
        picture = {"type": "image", "image": screenshot(seed=number)}
        yield [*history, {"role": "user", "content": [picture, text]}]
        answer = f"<think>{step['thinking']}</think><answer>{step['action']}</answer>"
        history += [{"role": "user", "content": [text]}, {"role": "assistant", "content": answer}]


def replay(engine: Engine, session: dict[str, Any], numbers: Sequence[int], tokens: int) -> list[Step]:
    """Answer the steps of these numbers, in order."""
    tokens_of = engine.bundle.manifest.tokens
    bias = {token: -100.0 for token in tokens_of.eos}
    found: list[Step] = []
    before = np.zeros(0, np.int64)
    for number, messages in enumerate(conversations(session), 1):
        if number not in numbers:
            continue
        ids = engine.tokenize(messages)
        shared = shared_length(before, ids, tokens_of.image)
        before = ids
        started = time.perf_counter()
        *_, last = engine.chat(
            messages, max_tokens=tokens, logit_bias=bias, frequency_penalty=FREQUENCY_PENALTY
        )
        found.append(_step(number, shared, last, time.perf_counter() - started))
        print(f"  step {number}: {found[-1].total_s:.2f} s", file=sys.stderr)
    return found


def shared_length(before: NDArray[np.int64], ids: NDArray[np.int64], image: int) -> int:
    """Tokens that two prompts begin with alike, up to the first picture: pictures differ."""
    count = min(len(before), len(ids))
    unlike = np.flatnonzero((before[:count] != ids[:count]) | (ids[:count] == image))
    return int(unlike[0]) if unlike.size else count


def _step(number: int, shared: int, last: Delta, seconds: float) -> Step:
    usage, timings = last.usage, last.timings
    if usage is None or timings is None:
        raise SystemExit("the engine gave no counts with the end of its answer")
    return Step(
        number=number,
        prompt_tokens=usage.prompt_tokens,
        image_tokens=usage.image_tokens,
        shared_tokens=shared,
        reused_tokens=timings.reused_tokens,
        reuse_s=timings.reuse_ms / 1e3,
        image_s=timings.image_ms / 1e3,
        prefill_s=timings.prefill_ms / 1e3,
        decode_s=timings.decode_ms / 1e3,
        total_s=seconds,
        answer_tokens=usage.completion_tokens,
    )


def measure(bundle: Path, budget: int, warm: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One engine through the session."""
    session = json.loads(options.session.read_text(encoding="utf-8"))
    count = min(options.steps, len(session["steps"]))
    numbers = range(1, count + 1) if warm else range(count - options.cold_steps + 1, count + 1)
    reuse = ReuseOptions() if warm else ReuseOptions.off()
    with (
        MemorySampler() as memory,
        Engine.load(bundle, threads=options.threads, max_image_tokens=budget, reuse=reuse) as engine,
    ):
        recipe = str(engine.bundle.manifest.recipe.get("name", "?"))
        steps = replay(engine, session, numbers, options.tokens)
    return {
        "bundle": bundle.name,
        "recipe": recipe,
        "budget": budget,
        "warm": warm,
        "steps": [asdict(step) for step in steps],
        "peak": memory.peak.to_json(),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row per step: where its time went."""
    counts, times = ("step", "prompt", "shared", "reused"), ("reuse", "image", "prefill", "decode", "step, s")
    head = ("bundle", "image tokens", "", *counts, *times)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run in runs:
        for step in run["steps"]:
            cells = [
                *(run["bundle"], str(step["image_tokens"]), "warm" if run["warm"] else "cold"),
                *(str(step[name]) for name in ("number", "prompt_tokens", "shared_tokens", "reused_tokens")),
                *(f"{step[f'{name}_s']:.2f}" for name in ("reuse", "image", "prefill", "decode")),
                f"**{step['total_s']:.2f}**",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay, print, write."""
    options = _parse(arguments)
    runs = []
    for bundle in options.bundles:
        for budget in options.budgets:
            for warm in (True, False):
                if not warm and not options.cold_steps:
                    continue
                print(f"{bundle.name}, {budget} image tokens, {'warm' if warm else 'cold'}", file=sys.stderr)
                runs.append(measure(bundle, budget, warm, options))
    document = rounded(
        {
            "date": date.today().isoformat(),
            "machine": this_machine().to_json(),
            "threads": options.threads or this_machine().cores,
            "answer_tokens": options.tokens,
            "runs": runs,
        }
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, ensure_ascii=False, indent=1)
    options.output.write_text(text + "\n", encoding="utf-8")
    options.output.with_suffix(".svg").write_text(plot(document) + "\n", encoding="utf-8")
    print(table(document["runs"]))
    print(json.dumps(document, ensure_ascii=False))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="OUT")
    parser.add_argument("--budgets", type=_sizes, default=(256, 592, 1196), help="default 256,592,1196")
    parser.add_argument("--session", type=Path, default=SESSION)
    parser.add_argument("--steps", type=int, default=4, help="of the session, from the first (default 4)")
    parser.add_argument(
        "--cold-steps", type=int, default=1, help="last steps that are measured cold, too (default 1)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default 64)")
    parser.add_argument("--threads", type=int, default=0, help="default one per core")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "agent_step.json")
    return parser.parse_args(arguments)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
