"""What a bench found: a document and a table.

In: times, limits, memory. Out: `BenchReport`, which gives JSON and lines for people. Measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .bandwidth import Limits
from .figures import Times, columns, rounded
from .machine import Machine
from .memory import Memory


@dataclass(frozen=True)
class Prefill:
    """A prompt of one length, from an empty cache to the scores of its last token.

    Attributes:
        tokens: its length.
        times: of the repetitions.
        of_int8_peak: operations of the layers' matrices per second, by the machine's int8 peak; None where
            the bundle does not tell how many there are.
    """

    tokens: int
    times: Times
    of_int8_peak: float | None

    @property
    def tokens_per_s(self) -> float:
        """By the median."""
        return self.tokens / self.times.median_s

    def to_json(self) -> dict[str, Any]:
        """Figures by name."""
        return {
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "of_int8_peak": self.of_int8_peak,
            **self.times.to_json(),
        }


@dataclass(frozen=True)
class Decode:
    """Steps of one token from a filled cache.

    Attributes:
        context: tokens in the cache before the first step.
        steps: of a repetition.
        times: of all steps of all repetitions.
        of_bandwidth: the decoder's weight bytes per second, by the machine's read bandwidth; None where the
            decoder does not run on the CPU.
    """

    context: int
    steps: int
    times: Times
    of_bandwidth: float | None

    @property
    def tokens_per_s(self) -> float:
        """By the median."""
        return 1 / self.times.median_s

    def to_json(self) -> dict[str, Any]:
        """Figures by name."""
        return {
            "context": self.context,
            "steps": self.steps,
            "tokens_per_s": self.tokens_per_s,
            "of_bandwidth": self.of_bandwidth,
            **self.times.to_json(),
        }


@dataclass(frozen=True)
class Together:
    """A step of several answers by one run of the decoder.

    Attributes:
        answers: rows of the run.
        context: tokens that each has behind it, at first.
        times: of all steps of all repetitions.
    """

    answers: int
    context: int
    times: Times

    @property
    def tokens_per_s(self) -> float:
        """Of all answers, by the median."""
        return self.answers / self.times.median_s

    def to_json(self) -> dict[str, Any]:
        """Figures by name."""
        return {
            "answers": self.answers,
            "context": self.context,
            "tokens_per_s": self.tokens_per_s,
            **self.times.to_json(),
        }


@dataclass(frozen=True)
class Encode:
    """One screenshot through the vision tower.

    Attributes:
        budget: most tokens that were allowed.
        tokens: that it became.
        patches: rows that the tower saw.
        times: of the graph; turning pixels into patches is not in it.
        patchify: of that.
    """

    budget: int
    tokens: int
    patches: int
    times: Times
    patchify: Times

    def to_json(self) -> dict[str, Any]:
        """Figures by name."""
        return {
            "budget": self.budget,
            "tokens": self.tokens,
            "patches": self.patches,
            "tokens_per_s": self.tokens / self.times.median_s,
            "patchify_s": self.patchify.median_s,
            **self.times.to_json(),
        }


@dataclass(frozen=True)
class Profile:
    """Where the time of one kind of work went.

    Attributes:
        name: of the work.
        seconds: that it took, traced.
        operators: seconds by operator, the longest first; together less than `seconds`.
    """

    name: str
    seconds: float
    operators: Mapping[str, float]

    @property
    def outside_s(self) -> float:
        """Seconds in no operator."""
        return max(0.0, self.seconds - sum(self.operators.values()))

    @property
    def shares(self) -> dict[str, float]:
        """Parts of the time by operator, and of what is in none under "outside"."""
        if not self.seconds:
            return {}
        found = {name: seconds / self.seconds for name, seconds in self.operators.items()}
        return {**found, "outside": self.outside_s / self.seconds}

    def to_json(self) -> dict[str, Any]:
        """Figures by name."""
        return {"name": self.name, "seconds": self.seconds, "shares": self.shares}


@dataclass(frozen=True)
class BenchReport:
    """All of a bench.

    Attributes:
        bundle: name of the folder.
        fingerprint: of the bundle's content.
        recipe: its name.
        date: ISO.
        machine: what it ran on.
        threads: of an operator.
        choices: what the runtime chose, and why; empty where it does not say.
        part_bytes: weights by part.
        limits: of the machine, in the same minute.
        prepare: the first load, which also prepared weights for this machine; None if they were there, or are
            not used.
        load: decoder and embedding.
        load_vision: the vision tower, when the first picture comes; None without pictures.
        prefill: by length.
        decode: by context.
        together: by the number of answers.
        images: by budget.
        memory: peaks by phase; "steady" is what is held after all of it.
        left_out: what was asked for by default and cannot be done by this bundle.
        profiles: where the time goes, by operator, if that was asked for.
    """

    bundle: str
    fingerprint: str
    recipe: str
    date: str
    machine: Machine
    threads: int
    choices: Mapping[str, Any]
    part_bytes: Mapping[str, int]
    limits: Limits
    prepare: Times | None
    load: Times
    load_vision: Times | None
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    together: tuple[Together, ...]
    images: tuple[Encode, ...]
    memory: Mapping[str, Memory]
    left_out: tuple[str, ...] = ()
    profiles: tuple[Profile, ...] = ()

    def to_json(self) -> str:
        """One document on one line."""
        document = {
            "bundle": self.bundle,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe,
            "date": self.date,
            "machine": self.machine.to_json(),
            "threads": self.threads,
            "choices": dict(self.choices),
            "part_bytes": dict(self.part_bytes),
            "limits": self.limits.to_json(),
            "prepare": None if self.prepare is None else self.prepare.to_json(),
            "load": self.load.to_json(),
            "load_vision": None if self.load_vision is None else self.load_vision.to_json(),
            "prefill": [row.to_json() for row in self.prefill],
            "decode": [row.to_json() for row in self.decode],
            "together": [row.to_json() for row in self.together],
            "images": [row.to_json() for row in self.images],
            "memory": {name: value.to_json() for name, value in self.memory.items()},
            "left_out": list(self.left_out),
            "profiles": [one.to_json() for one in self.profiles],
        }
        return json.dumps(rounded(document), ensure_ascii=False)

    def to_table(self) -> str:
        """Lines for people."""
        rows = [
            ("", "median", "mean", "spread", "per second", "of the limit"),
            ("load", *_times(self.load), "", ""),
        ]
        if self.prepare is not None:
            rows.append(("prepare, once", *_times(self.prepare), "", ""))
        if self.load_vision is not None:
            rows.append(("load vision", *_times(self.load_vision), "", ""))
        for prompt in self.prefill:
            share = "" if prompt.of_int8_peak is None else f"{prompt.of_int8_peak:.0%} of int8 peak"
            rows.append(
                (
                    f"prefill {prompt.tokens}",
                    *_times(prompt.times),
                    f"{prompt.tokens_per_s:.1f} tokens",
                    share,
                )
            )
        for step in self.decode:
            share = "" if step.of_bandwidth is None else f"{step.of_bandwidth:.0%} of bandwidth"
            rows.append(
                (f"decode at {step.context}", *_times(step.times), f"{step.tokens_per_s:.2f} tokens", share)
            )
        for several in self.together:
            name = f"{several.answers} answers at {several.context}"
            rows.append((name, *_times(several.times), f"{several.tokens_per_s:.2f} tokens", ""))
        for image in self.images:
            rate = f"{image.tokens / image.times.median_s:.1f} tokens"
            rows.append((f"image of {image.tokens}", *_times(image.times), rate, ""))
        lines = columns(rows)
        limits = self.limits
        lines += [
            "",
            f"machine   {self.machine}",
            f"limits    read {limits.read_bytes_per_s / 1e9:.1f} GB/s, "
            f"int8 {limits.int8_ops_per_s / 1e12:.2f} TOPS, "
            f"fp32 {limits.fp32_ops_per_s / 1e12:.2f} TFLOPS, {limits.threads} threads",
            *(f"chosen    {line}" for line in _choices(self.choices)),
            "",
        ]
        memory: list[tuple[str, ...]] = [("peak memory", "anonymous", "mapped from files", "swapped")]
        for name, value in self.memory.items():
            memory.append((name, *map(_gigabytes, (value.anon_bytes, value.file_bytes, value.swap_bytes))))
        lines += columns(memory)
        if self.profiles:
            lines += ["", "where the time goes"]
            lines += columns([(one.name, _largest(one.shares)) for one in self.profiles])
        lines += [f"left out  {reason}" for reason in self.left_out]
        return "\n".join(lines)


def _choices(choices: Mapping[str, Any]) -> list[str]:
    """A line per choice; its reason, which stands under NAME_reason, behind it."""
    lines = []
    for name, value in choices.items():
        if not name.endswith("_reason"):
            reason = choices.get(f"{name}_reason")
            lines.append(f"{name}: {value}" + (f" ({reason})" if reason else ""))
    return lines


def _largest(shares: Mapping[str, float]) -> str:
    """Those that can be seen, the largest first."""
    seen = sorted(((share, name) for name, share in shares.items() if share >= 0.01), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in seen)


def _times(times: Times) -> tuple[str, str, str]:
    return _seconds(times.median_s), _seconds(times.mean_s), f"{times.spread:.0%}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _gigabytes(value: int | None) -> str:
    if value is None:
        return "not available"
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
