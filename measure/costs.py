"""What pictures cost on this machine, kept from the last bench of a bundle for `autoglm info` to show.

    CACHE/bench/FINGERPRINT.json       {"date", "processor", "threads", "images": [{"budget", "tokens", ...}]}

In: a bench report, or a bundle. Out: `ImageCosts`. The file is only shown, never relied on: one that cannot
be read, or was measured on another processor, counts as not there. Measures nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoglm_edge.errors import DeviceError
from autoglm_edge.files import replace_file
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.folders import cache_folder

from .machine import this_machine
from .report import BenchReport


@dataclass(frozen=True)
class ImageCost:
    """A screenshot at one budget.

    Attributes:
        budget: most tokens that were allowed.
        tokens: that it became.
        encode_s: seconds of turning it into features, its pixels included.
        prefill_s: seconds that its tokens take of a prompt, by the rate of the longest prompt measured; None
            if no prompt was measured.
    """

    budget: int
    tokens: int
    encode_s: float
    prefill_s: float | None

    def __str__(self) -> str:
        prompt = "" if self.prefill_s is None else f" + {_seconds(self.prefill_s)} of prompt"
        return f"{self.budget:,} → {self.tokens:,} tokens: {_seconds(self.encode_s)}{prompt}"


@dataclass(frozen=True)
class ImageCosts:
    """Costs by budget.

    Attributes:
        date: of the bench, ISO.
        processor: it ran on.
        threads: of an operator.
        images: by rising budget.
    """

    date: str
    processor: str
    threads: int
    images: tuple[ImageCost, ...]

    @classmethod
    def of(cls, report: BenchReport) -> ImageCosts:
        """Those that a bench found."""
        longest = max(report.prefill, key=lambda row: row.tokens, default=None)
        images = [
            ImageCost(
                row.budget,
                row.tokens,
                row.times.median_s + row.patchify.median_s,
                None if longest is None else row.tokens / longest.tokens_per_s,
            )
            for row in sorted(report.images, key=lambda row: row.budget)
        ]
        return cls(report.date, report.machine.processor, report.threads, tuple(images))

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


def keep_costs(report: BenchReport) -> Path | None:
    """Keep what a bench found, in the place of what was kept before; returns the file.

    None if it measured no picture, or the cache folder cannot be written: the bench is not less for it.
    """
    costs = ImageCosts.of(report)
    if not costs.images:
        return None
    try:
        path = _path(report.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(costs.to_json()).encode())
    except (OSError, DeviceError):
        return None
    return path


def known_costs(bundle: Bundle) -> ImageCosts | None:
    """What the last bench of this bundle on this processor found; None if there is none."""
    try:
        document = json.loads(_path(bundle.fingerprint).read_text(encoding="utf-8"))
        images = tuple(_read(item) for item in document["images"])
        costs = ImageCosts(
            str(document["date"]), str(document["processor"]), int(document["threads"]), images
        )
    except (OSError, DeviceError, ValueError, KeyError, TypeError):
        return None
    return costs if costs.images and costs.processor == this_machine().processor else None


def _read(item: dict[str, Any]) -> ImageCost:
    prefill = item["prefill_s"]
    return ImageCost(
        int(item["budget"]),
        int(item["tokens"]),
        float(item["encode_s"]),
        None if prefill is None else float(prefill),
    )


def _path(fingerprint: str) -> Path:
    return cache_folder() / "bench" / f"{fingerprint}.json"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1e3 * value:.0f} ms"
