"""Counters for Prometheus: requests, tokens, times, the queue, memory.

In: what happens. Out: the text format 0.0.4. Counts are of this process since its start. Labels have few
values, all of them ours: nothing that a client writes becomes one.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from autoglm_edge.measure.memory import read_memory
from autoglm_edge.runtime.answer import Delta

from .gpu_memory import read_gpu_memory

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "autoglm_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_RATES = (0.5, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)

_COUNTERS = {
    "prompt_tokens_total": "Tokens of prompts, pictures included.",
    "cached_tokens_total": "Tokens of prompts that were not computed again.",
    "image_tokens_total": "Tokens of pictures.",
    "completion_tokens_total": "Tokens sampled.",
    "drafted_tokens_total": "Tokens run before they were sampled.",
    "accepted_tokens_total": "Those of them that were sampled then.",
    "encoded_images_total": "Pictures that went through the vision graph.",
    "cached_images_total": "Pictures that did not have to.",
    "prefix_hits_total": "Answers whose prompt began with what was known.",
    "prefill_seconds_total": "Time spent on prompts.",
    "decode_seconds_total": "Time spent on answers, their first token not counted.",
    "image_seconds_total": "Time spent on pictures.",
    "transcripts_total": "Sounds heard to their end.",
    "sound_seconds_total": "Length of these sounds.",
    "hearing_seconds_total": "Time spent on them.",
}
_HISTOGRAMS = {
    "ttft_seconds": ("From the beginning of the work to the first token.", _SECONDS),
    "queue_seconds": ("In the queue.", _SECONDS),
    "request_seconds": ("From the first byte of a request to the last of its response.", _SECONDS),
    "decode_tokens_per_second": ("Tokens per second of an answer, the first one not counted.", _RATES),
}


class _Histogram:
    """Counts of values up to bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """All counters of a server; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._answers: Counter[str] = Counter()
        self._counters: dict[str, float] = dict.fromkeys(_COUNTERS, 0.0)
        self._histograms = {name: _Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}

    def request(self, route: str, status: int, seconds: float) -> None:
        """A response is complete."""
        with self._lock:
            self._requests[route, status] += 1
            self._histograms["request_seconds"].add(seconds)

    def waited(self, seconds: float) -> None:
        """A request begins after so long in the queue."""
        with self._lock:
            self._histograms["queue_seconds"].add(seconds)

    def answered(self, delta: Delta) -> None:
        """An answer has ended with this delta."""
        usage, timings = delta.usage, delta.timings
        with self._lock:
            self._answers[delta.finish_reason or "cancelled"] += 1
            if usage is not None:
                self._counters["prompt_tokens_total"] += usage.prompt_tokens
                self._counters["cached_tokens_total"] += usage.cached_tokens
                self._counters["image_tokens_total"] += usage.image_tokens
                self._counters["completion_tokens_total"] += usage.completion_tokens
                self._counters["prefix_hits_total"] += usage.cached_tokens > 0
            if timings is not None:
                for name in ("drafted_tokens", "accepted_tokens", "encoded_images", "cached_images"):
                    self._counters[f"{name}_total"] += getattr(timings, name)
                for name in ("prefill", "decode", "image"):
                    self._counters[f"{name}_seconds_total"] += getattr(timings, f"{name}_ms") / 1e3
                if usage is not None and usage.completion_tokens:
                    self._histograms["ttft_seconds"].add(timings.ttft_ms / 1e3)
                if timings.decoded_tokens:
                    self._histograms["decode_tokens_per_second"].add(timings.decode_tokens_per_s)

    def heard(self, sound_s: float, work_s: float) -> None:
        """A sound was heard to its end."""
        with self._lock:
            self._counters["transcripts_total"] += 1
            self._counters["sound_seconds_total"] += sound_s
            self._counters["hearing_seconds_total"] += work_s

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Everything, in Prometheus' format.

        Args:
            gauges: help and value by name, of what the server is doing just now.
        """
        with self._lock:
            lines = list(self._counted())
        for name, (about, value) in {**gauges, **_memory()}.items():
            lines += [*_head(name, about, "gauge"), f"{_PREFIX}{name} {_number(value)}"]
        lines += _gpu_lines(read_gpu_memory())
        return "\n".join(lines) + "\n"

    def _counted(self) -> Iterable[str]:
        yield from _head("requests_total", "Responses by route and status.", "counter")
        for (route, status), count in sorted(self._requests.items()):
            yield f'{_PREFIX}requests_total{{route="{route}",status="{status}"}} {count}'
        yield from _head("answers_total", "Answers by how they ended.", "counter")
        for reason, count in sorted(self._answers.items()):
            yield f'{_PREFIX}answers_total{{finish="{reason}"}} {count}'
        for name, about in _COUNTERS.items():
            yield from _head(name, about, "counter")
            yield f"{_PREFIX}{name} {_number(self._counters[name])}"
        for name, (about, _) in _HISTOGRAMS.items():
            yield from _head(name, about, "histogram")
            yield from self._histograms[name].lines(f"{_PREFIX}{name}")


def _memory() -> dict[str, tuple[str, float]]:
    """What the system tells; what it does not tell is left out."""
    memory = read_memory()
    known = {
        "memory_resident_bytes": ("Resident memory.", memory.rss_bytes),
        "memory_anonymous_bytes": ("Resident and anonymous memory (RssAnon).", memory.anon_bytes),
        "memory_swap_bytes": ("Anonymous memory that was swapped out (VmSwap).", memory.swap_bytes),
    }
    return {name: (about, float(value)) for name, (about, value) in known.items() if value is not None}


def _gpu_lines(memory: Sequence[tuple[float, float]]) -> Iterable[str]:
    if not memory:
        return
    for position, kind in enumerate(("used", "total")):
        name = f"gpu_memory_{kind}_bytes"
        yield from _head(name, f"Memory of the GPU: {kind}, by whatever process.", "gauge")
        for index, values in enumerate(memory):
            yield f'{_PREFIX}{name}{{gpu="{index}"}} {_number(values[position])}'


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6f}"


def _head(name: str, about: str, kind: str) -> tuple[str, str]:
    return f"# HELP {_PREFIX}{name} {about}", f"# TYPE {_PREFIX}{name} {kind}"
