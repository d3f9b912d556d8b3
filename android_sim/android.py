"""What Android itself says about an app's memory: limiter sets, Play's thresholds, the low memory killer.

In: MemTotal of a device and bytes of an app. Out: the set or band that applies, and where the app stands. The
numbers, with their sources, are in android.toml. Knows nothing of devices and runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .budget import AppState
from .device import android_rules

Risk = Literal["low", "elevated", "high", "unknown"]


@dataclass(frozen=True)
class LimiterSet:
    """A published set of Android 17's Memory Limiter.

    Attributes:
        name: of the set.
        limit_bytes: `memory.high` in the state that was asked for.
        swap_bytes: `memory.swap.max` in that state.
        source: who published it.
    """

    name: str
    limit_bytes: int
    swap_bytes: int
    source: str

    @property
    def kill_bytes(self) -> int:
        """Anonymous + shared + swapped bytes above which it kills."""
        return self.limit_bytes + self.swap_bytes


@dataclass(frozen=True)
class PlayBand:
    """Google Play's threshold for a device, and where an app stands.

    Attributes:
        name: the band's label.
        threshold_bytes: of the 90th percentile; None where the band has none.
        p90_bytes: of the app, anonymous + swapped.
        source: who published it.
    """

    name: str
    threshold_bytes: int | None
    p90_bytes: int
    source: str

    @property
    def kept(self) -> bool:
        """Whether the app is within it."""
        return self.threshold_bytes is None or self.p90_bytes <= self.threshold_bytes


def limiter_set(mem_total_bytes: int, state: AppState) -> LimiterSet | None:
    """The set that applies to a device, if it had the published ones; None below the smallest."""
    entry = _last(android_rules()["limiter_sets"], mem_total_bytes)
    if entry is None:
        return None
    return LimiterSet(
        entry["name"], entry[f"mem_{state}"] << 20, entry[f"swap_{state}"] << 20, entry["source"]
    )


def play_band(mem_total_bytes: int, state: AppState, p90_bytes: int) -> PlayBand | None:
    """Play's band of a device; None if its memory is not known."""
    entry = _last(android_rules()["play_bands"], mem_total_bytes) if mem_total_bytes else None
    if entry is None:
        return None
    limit = entry.get(f"{state}_gb")
    return PlayBand(entry["name"], None if limit is None else round(limit * 1e9), p90_bytes, entry["source"])


def lmkd_risk(anonymous_bytes: int, mem_total_bytes: int) -> Risk:
    """How likely the low memory killer takes an app of this size in the foreground; an estimate."""
    if not mem_total_bytes:
        return "unknown"
    share, rule = anonymous_bytes / mem_total_bytes, android_rules()["lmkd_risk"]
    if share > rule["high_from"]:
        return "high"
    return "elevated" if share >= rule["elevated_from"] else "low"


def _last(entries: Sequence[Mapping[str, Any]], mem_total_bytes: int) -> Mapping[str, Any] | None:
    """The entry with the largest least MemTotal that is reached."""
    fitting = [entry for entry in entries if entry["least_mem_total"] << 20 <= mem_total_bytes]
    return max(fitting, key=lambda entry: int(entry["least_mem_total"]), default=None)
