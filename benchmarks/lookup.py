"""What drafting from prompt and history is worth on an agent's answers, with the times of a 9B.

    python benchmarks/lookup.py OUT-INT4 OUT-INT8

The recorded session of `agent_step.py` gives prompts and answers. The runtime's own loop decodes each answer
twice, with drafts and without; the sampler hands out the recorded tokens, so weights may be random: which
drafts are right depends on the text, and what a run of several tokens costs depends on the shape. The cache
is filled, not computed. How much real answers repeat is another matter; these were written by hand, in the
client's form.

Beside that stands what no drafter of this kind can pass: one that of all that ever followed the last two
tokens always picks what is right, and the number of tokens that pays most. A table goes to stdout; the last
line is one JSON document, which is also written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from agent_step import SESSION, conversations
from numpy.typing import NDArray

from autoglm_edge.measure.figures import rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.runtime.answer import Clock
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.generation import Drafter, Generation
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.plan import PREFILL_CHUNK
from autoglm_edge.runtime.prompt.build import prompt_ids
from autoglm_edge.runtime.prompt.messages import read_messages
from autoglm_edge.runtime.prompt.template import ChatTemplate
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer
from autoglm_edge.runtime.reuse.options import Lookup
from autoglm_edge.runtime.reuse.pace import BLOCK_COSTS, INTEGER_COSTS, MOST_TOKENS, Pace
from autoglm_edge.runtime.reuse.sequence import text_keys
from autoglm_edge.runtime.runner import Runner
from autoglm_edge.runtime.session import SessionOptions

HERE = Path(__file__).resolve().parent
IMAGE_TOKENS = 592


class Recorded:
    """A sampler that hands out known tokens."""

    def __init__(self, ids: Sequence[int]) -> None:
        """The answer."""
        self._ids = iter(ids)

    def sample(self, logits: NDArray[np.floating]) -> int:
        """The next one, whatever the scores."""
        return next(self._ids)


def texts(bundle: Bundle, session: dict[str, Any]) -> list[tuple[NDArray[np.int64], list[int]]]:
    """Prompt and answer of every step, as ids."""
    tokenizer, template = Tokenizer.from_folder(bundle.path), ChatTemplate.from_folder(bundle.path)
    spec, tokens = bundle.manifest.image, bundle.manifest.tokens
    image = spec.with_max_tokens(min(IMAGE_TOKENS, spec.max_tokens))
    found = []
    for messages, step in zip(conversations(session), session["steps"], strict=True):
        ids = prompt_ids(
            read_messages(messages),
            tokenizer=tokenizer,
            template=template,
            image=image,
            tokens=tokens,
            image_layout="plain",
        )
        answer = f"<think>{step['thinking']}</think><answer>{step['action']}"
        found.append((ids, [int(token) for token in tokenizer.encode(answer)]))
    return found


def fill(runner: Runner, ids: NDArray[np.int64], random: np.random.Generator) -> None:
    """A cache that holds a prompt, with random keys and values."""
    sequence = runner.sequence
    sequence.truncate(0)
    for start in range(0, len(ids), PREFILL_CHUNK):
        part = ids[start : start + PREFILL_CHUNK]
        shape = (*sequence.cache.row_shape[:3], len(part), sequence.cache.row_shape[4])
        sequence.announce(text_keys(part.tolist(), start))
        rows = random.standard_normal(shape, np.float32).astype(sequence.cache.dtype)
        sequence.cache.write(start, rows)


def decode(runner: Runner, ids: NDArray[np.int64], answer: list[int], pace: Pace, lookup: Lookup) -> Clock:
    """Decode an answer; the clock knows what it took."""
    clock = Clock()
    generation = Generation(
        runner.sequence,
        np.zeros(1, np.float32),
        len(ids),
        sampler=Recorded(answer),
        drafter=Drafter(ids, pace, lookup),
        budget=len(answer),
        clock=clock,
    )
    sampled = [generation.sample()]
    while not generation.done:
        if not generation.ready:
            run, started = generation.next_run(), time.perf_counter()
            rows = runner.feed(runner.sequence, run, generation.position)
            generation.ran(rows, 1e3 * (time.perf_counter() - started))
        sampled.append(generation.sample())
    if sampled != answer:
        raise SystemExit("the loop gave other tokens than the recorded ones")
    return clock


def bound(pairs: Sequence[tuple[NDArray[np.int64], list[int]]], cost: Callable[[int], float]) -> float:
    """How much faster answers would be if a drafter that looks up two tokens were never wrong.

    Args:
        pairs: prompts and answers.
        cost: time of a run of so many tokens.
    """
    plain = drafted = 0.0
    for prompt, answer in pairs:
        ids = [*(int(token) for token in prompt), *answer]
        followed = set(zip(ids, ids[1 : len(prompt)], ids[2 : len(prompt)], strict=False))
        place = len(prompt) + 1  # the first token comes with the prompt's scores
        while place < len(ids):
            right = 0
            while right < MOST_TOKENS - 1 and place + right < len(ids) - 1:
                if tuple(ids[place + right - 2 : place + right + 1]) not in followed:
                    break
                right += 1
            taken = max(range(right + 1), key=lambda tokens: (tokens + 1) / cost(tokens + 1))
            drafted += cost(taken + 1)
            place += taken + 1
            followed |= set(zip(ids[:place], ids[1:place], ids[2:place], strict=False))
        plain += cost(1) * (len(answer) - 1)
    return plain / drafted


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Every answer of the session, with and without drafts, in turns."""
    bundle = Bundle.open(folder)
    pairs = texts(bundle, json.loads(SESSION.read_text(encoding="utf-8")))
    longest = max(len(ids) + len(answer) for ids, answer in pairs) + 16
    runner = Runner(Model(bundle, SessionOptions("cpu", threads)), longest, bundle.manifest.tokens)
    integer = bundle.manifest.parts["decoder"].integer
    pace, random = Pace(INTEGER_COSTS if integer else BLOCK_COSTS), np.random.default_rng(0)
    fill(runner, pairs[0][0], random)
    decode(runner, *pairs[0], pace, False)  # first touches are nobody's time
    steps: list[dict[str, Any]] = []
    for number in range(rounds):
        for place, (ids, answer) in enumerate(pairs):
            row: dict[str, Any] = {"round": number, "step": place + 1, "tokens": len(answer)}
            for name, lookup in (("plain", False), ("drafted", "auto")):
                fill(runner, ids, random)
                started = time.perf_counter()
                clock = decode(runner, ids, answer, pace, lookup)
                row[f"{name}_s"] = time.perf_counter() - started
            row |= {"runs": clock.decoder_runs, "drafted": clock.drafted_tokens}
            row["accepted"] = clock.accepted_tokens
            steps.append(row)
            print(f"  {row['plain_s']:.2f} s without, {row['drafted_s']:.2f} s with drafts", file=sys.stderr)
    faster = [row["plain_s"] / row["drafted_s"] for row in steps]
    return {
        "bundle": folder.name,
        "recipe": str(bundle.manifest.recipe.get("name", "?")),
        "layers": bundle.manifest.geometry.layers,
        "faster": statistics.median(faster),
        "faster_in_all": sum(row["plain_s"] for row in steps) / sum(row["drafted_s"] for row in steps),
        "never_wrong": bound(pairs, pace.cost),
        "tokens_per_run": sum(row["tokens"] - 1 for row in steps) / sum(row["runs"] for row in steps),
        "steps": steps,
    }


FIGURES = {"faster": "faster, median step", "faster_in_all": "faster, all", "never_wrong": "never wrong"}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row per bundle; figures that no run has, as those of older documents, have no column."""
    figures = [name for name in FIGURES if any(name in run for run in runs)]
    head = (
        "bundle",
        "answer tokens",
        "tokens a run",
        "drafts accepted",
        *(FIGURES[name] for name in figures),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run in runs:
        count, drafted, accepted = (
            sum(step[name] for step in run["steps"]) for name in ("tokens", "drafted", "accepted")
        )
        cells = [
            *(f"{run['bundle']}, {run['layers']} layers", str(count), f"{run['tokens_per_run']:.2f}"),
            f"{accepted} of {drafted}",
            *(f"{run[name]:.2f} ×" if name in run else "" for name in figures),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="OUT")
    parser.add_argument("--rounds", type=int, default=1, help="through the session (default 1)")
    parser.add_argument("--threads", type=int, default=0, help="default one per core")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "lookup.json")
    options = parser.parse_args(arguments)
    runs = []
    for bundle in options.bundles:
        print(bundle.name, file=sys.stderr)
        runs.append(measure(bundle, options.threads, options.rounds))
    document = rounded({"date": date.today().isoformat(), "machine": this_machine().to_json(), "runs": runs})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, ensure_ascii=False, indent=1)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(table(document["runs"]))
    print(json.dumps(document, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
