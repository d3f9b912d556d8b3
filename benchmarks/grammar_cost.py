"""What holding an answer to JSON costs per token, in microseconds, beside sampling without it.

    python benchmarks/grammar_cost.py OUT

OUT is a bundle or a checkpoint: only its tokenizer is used. Scores are drawn at random, with a document of
the schema far ahead in them, as a model that was asked for it writes; at every tenth token something that the
schema forbids is ahead of it. "free" and "held" see the same scores. A table goes to stdout; the last line is
one JSON document, which is also written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from autoglm_edge.measure.figures import rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.runtime.grammar import ANY_OBJECT, Grammar, Grammars
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer
from autoglm_edge.runtime.sampling import Sampler, SamplingParams

HERE = Path(__file__).resolve().parent
END = "</answer>"
NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
SCHEMAS: dict[str, Any] = {
    "any object": ANY_OBJECT,
    "an action": {
        "type": "object",
        "properties": {
            "action": {"enum": ["Tap", "Type", "Swipe", "Back"]},
            "element": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2},
            "text": {"type": "string"},
        },
        "required": ["action", "element", "text"],
        "additionalProperties": False,
    },
    "300 names": {
        "type": "object",
        "properties": {"action": {"type": "string"}, **{f"name{i}": {"type": "string"} for i in range(300)}},
        "required": ["action"],
    },
}
DOCUMENT = '{"action": "Type", "element": [512, 87], "text": "turn off the wifi, then open 设置"}'
OTHERS = {"300 names": '{"action": "Type", "name7": "turn off the wifi", "name250": "then open 设置"}'}
SETTINGS = {"greedy": SamplingParams(), "top-p": SamplingParams(temperature=0.8, top_p=0.9, seed=1)}


@dataclass(frozen=True)
class Cost:
    """Of one schema with one way of sampling.

    Attributes:
        schema: its name.
        sampling: its name.
        compile_ms: of the schema, once.
        free_us: per token, median, without a grammar.
        held_us: with it.
        held_p95_us: 95 of 100 tokens within.
    """

    schema: str
    sampling: str
    compile_ms: float
    free_us: float
    held_us: float
    held_p95_us: float


def rows(tokenizer: Tokenizer, ids: Sequence[int]) -> list[np.ndarray]:
    """Scores (V,) for each id of a document, which is the likeliest, or after a forbidden one the next."""
    rng = np.random.default_rng(0)
    forbidden = tokenizer.encode("<think>")[0]
    found = []
    for number, token in enumerate(ids):
        row = (rng.standard_normal(tokenizer.vocab_size) * 2).astype(np.float32)
        row[token] = 30
        if number % 10 == 9:
            row[forbidden] = 40
        found.append(row)
    return found


def times_us(tokenizer: Tokenizer, scores: Sequence[np.ndarray], params: SamplingParams) -> list[float]:
    """Of each token of an answer."""
    sampler = Sampler(params, vocab=tokenizer.vocab_size)
    found = []
    for row in scores:
        started = time.perf_counter()
        sampler.sample(row)
        found.append(1e6 * (time.perf_counter() - started))
    return found


def measure(tokenizer: Tokenizer, name: str, made: Grammar, compile_ms: float, repeat: int) -> list[Cost]:
    """One schema with each way of sampling."""
    ids = [*tokenizer.encode(OTHERS.get(name, DOCUMENT)), *tokenizer.encode(END)[:1]]
    scores = rows(tokenizer, ids)
    found = []
    for way, params in SETTINGS.items():
        held_params = SamplingParams(params.temperature, params.top_p, seed=params.seed, grammar=made)
        free = [us for _ in range(repeat) for us in times_us(tokenizer, scores, params)]
        held = [us for _ in range(repeat) for us in times_us(tokenizer, scores, held_params)]
        p95 = float(np.quantile(held, 0.95))
        found.append(Cost(name, way, compile_ms, float(np.median(free)), float(np.median(held)), p95))
    return found


def table(costs: Sequence[dict[str, Any]]) -> str:
    """A row per schema and way of sampling."""
    lines = [
        "| schema | sampling | compiled in, ms | free, µs | held, µs | p95, µs |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for cost in costs:
        figures = [f"{cost['compile_ms']:.1f}"]
        figures += [f"{cost[key]:.0f}" for key in ("free_us", "held_us", "held_p95_us")]
        lines.append(f"| {cost['schema']} | {cost['sampling']} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--repeat", type=int, default=5, help="answers of each kind (default 5)")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "grammar_cost.json")
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_folder(options.folder)
    grammars = Grammars(tokenizer, tokenizer.encode(END)[:1])
    started = time.perf_counter()
    grammars.compile(True)
    first_ms = 1e3 * (time.perf_counter() - started)
    costs: list[Cost] = []
    for name, schema in SCHEMAS.items():
        started = time.perf_counter()
        made = grammars.compile(schema)
        costs += measure(tokenizer, name, made, 1e3 * (time.perf_counter() - started), options.repeat)
    document = rounded(
        {
            "date": date.today().isoformat(),
            "machine": this_machine().to_json(),
            "vocab": tokenizer.vocab_size,
            "first_grammar_ms": first_ms,
            "costs": [asdict(cost) for cost in costs],
        }
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{tokenizer.vocab_size} tokens, first grammar after {first_ms:.0f} ms")
    print(table(document["costs"]))
    print(json.dumps(document, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
