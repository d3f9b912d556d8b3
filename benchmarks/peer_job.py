"""One engine, one model, one process: loads it, feeds it tokens, and prints what that took as one JSON line.

In: a job, as JSON, in the first argument. Out: seconds per load, prefill and step, peaks of memory. Every
engine of `compare.py` is measured by this one loop, so what is timed is the same for all: a prefill starts
with an empty cache and ends when the scores of the last token are there; a step is one token. Knows no
engine. Runs on the standard library alone, because each engine brings an interpreter of its own.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SAMPLED = {
    "RssAnon": "anon_bytes",
    "RssFile": "file_bytes",
    "VmHWM": "peak_rss_bytes",
    "VmSwap": "swap_bytes",
}


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        model: file or folder that the engine loads.
        threads: of one operator.
        geometry: hidden, layers, heads, kv_heads, head_dim, intermediate, vocab.
        prefill: lengths of prompts.
        decode_at: tokens in the cache before the first timed step.
        decode_steps: timed steps.
        repeat: times each prefill is run.
        prompts: what reads them, for engines that have several ways: `autoglm run --prompts`.
    """

    model: str
    threads: int
    geometry: dict[str, int]
    prefill: tuple[int, ...] = (512,)
    decode_at: int = 64
    decode_steps: int = 16
    repeat: int = 1
    prompts: str = "auto"

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `compare.py` wrote."""
        document = json.loads(text)
        return cls(**{**document, "prefill": tuple(document["prefill"])})

    @property
    def longest(self) -> int:
        """Tokens that the cache must hold."""
        return max([*self.prefill, self.decode_at + self.decode_steps, WARM_TOKENS]) + 8


class Peer(Protocol):
    """An engine with one sequence."""

    facts: dict[str, Any]
    """What the report says of it: version, bytes of its weights, notes."""

    def reset(self) -> None:
        """Forget the sequence."""

    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens and score the last one; returns when the scores are there."""


WARM_TOKENS = 384
"""Fed before anything is timed, so that graphs that open late are open and weights were touched once: enough
of them to go the way of long prompts, where an engine has one."""


def measure(job: Job, load: Callable[[Job], Peer]) -> dict[str, Any]:
    """Load, prefill, decode."""
    started = time.perf_counter()
    peer = load(job)
    report: dict[str, Any] = {"load_s": time.perf_counter() - started, **peer.facts}
    ids = random.Random(0)

    def some(count: int) -> list[int]:
        return [ids.randrange(1000, job.geometry["vocab"] - 1000) for _ in range(count)]

    peer.reset()
    peer.feed(some(WARM_TOKENS))
    peer.feed(some(1))
    report["prefill_s"] = {}
    for length in job.prefill:
        report["prefill_s"][str(length)] = [_prefill(peer, some(length)) for _ in range(job.repeat)]
    peer.reset()
    if job.decode_at:
        peer.feed(some(job.decode_at))
    report["step_s"] = [_timed(peer, some(1)) for _ in range(job.decode_steps)]
    report["memory"] = memory()
    return report


def _prefill(peer: Peer, ids: list[int]) -> float:
    peer.reset()
    return _timed(peer, ids)


def _timed(peer: Peer, ids: list[int]) -> float:
    started = time.perf_counter()
    peer.feed(ids)
    return time.perf_counter() - started


def memory() -> dict[str, int]:
    """Bytes of this process now, and its largest resident size; empty where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {SAMPLED[name]: 1024 * int(rest.split()[0]) for name, _, rest in pairs if name in SAMPLED}


def main(load: Callable[[Job], Peer]) -> int:
    """Run the job of the command line; a failure is one line of JSON, too."""
    job = Job.from_json(sys.argv[1])
    try:
        report = measure(job, load)
    except Exception as error:  # whatever an engine throws is what the report says of it
        report = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
    print(json.dumps(report), flush=True)
    return 1 if "error" in report else 0


def median(values: Sequence[float]) -> float:
    """The middle one; nan of none."""
    return statistics.median(values) if values else float("nan")
