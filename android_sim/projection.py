"""How fast a device would decode: a roofline of memory and storage, as a range.

In: a `Device`, the bytes that a token reads, and what of them comes from storage. Out: a `Projection`, low
and high, in the first minutes and warm. Knows nothing of runs: a measured host speed is never scaled to one
of a phone, since caches, cores and memory differ in ways that no factor covers.

Decoding reads every weight of the decoder once per token, and the keys and values so far; the table of the
embedding is a row. So tokens/s is at most bandwidth / bytes, and engines reach a share of it. What must come
from storage is added: at best while memory is read, at worst after it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from autoglm_edge.errors import SimulationError

from .device import Device


@dataclass(frozen=True)
class Range:
    """A figure that is known to lie between two others."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise SimulationError(f"a range goes from {self.low} to {self.high}, must rise from 0 or more")

    def to_json(self) -> list[float]:
        """[low, high]."""
        return [self.low, self.high]

    def __str__(self) -> str:
        if self.high < 0.1:
            return f"{self.low:.2g} to {self.high:.2g}"
        return (
            f"{self.low:.2f} to {self.high:.2f}" if self.high < 10 else f"{self.low:.0f} to {self.high:.0f}"
        )


@dataclass(frozen=True)
class Projection:
    """Tokens per second of decoding on a device.

    Attributes:
        burst: in the first minutes.
        sustained: warm.
        bound: what it waits for.
        bytes_per_token: weights, keys and values.
        storage_bytes_per_token: what of them comes from storage.
        assumptions: what the range rests on, a sentence each.
    """

    burst: Range
    sustained: Range
    bound: Literal["memory", "storage"]
    bytes_per_token: float
    storage_bytes_per_token: float
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """By name, ranges as [low, high]."""
        document = asdict(self)
        return {**document, "burst": self.burst.to_json(), "sustained": self.sustained.to_json()}


def project(
    device: Device, *, weights_bytes: int, kv_bytes: float = 0, storage_bytes: float = 0
) -> Projection | None:
    """Project decoding.

    Args:
        device: its memory and storage.
        weights_bytes: of the decoder with its head, as stored.
        kv_bytes: keys and values that a token reads.
        storage_bytes: that a token reads again from storage.

    Returns:
        None if the profile does not tell the bandwidth of its memory, or that of its storage where it is
        needed.
    """
    peak, storage = device.bytes("dram_peak"), device.bytes("storage_read")
    if not peak or (storage_bytes and not storage) or weights_bytes <= 0:
        return None
    low, high = device.value("bw_low") or 1.0, device.value("bw_high") or 1.0
    cool, warm = device.value("thermal_high") or 1.0, device.value("thermal_low") or 1.0
    read = weights_bytes + kv_bytes
    fetch = storage_bytes / storage if storage_bytes else 0.0

    def rate(share: float, *, overlapped: bool) -> float:
        memory = read / (peak * share)
        return 1 / (max(memory, fetch) if overlapped else memory + fetch)

    return Projection(
        burst=Range(rate(low, overlapped=False), rate(high, overlapped=True)),
        sustained=Range(rate(low * warm, overlapped=False), rate(high * cool, overlapped=True)),
        bound="storage" if fetch > read / (peak * high) else "memory",
        bytes_per_token=read,
        storage_bytes_per_token=storage_bytes,
        assumptions=tuple(_assumptions(device, bool(storage_bytes))),
    )


def _assumptions(device: Device, storage: bool) -> list[str]:
    names = ["dram_peak", "bw_low", "bw_high", "thermal_low", "thermal_high"]
    names += ["storage_read"] if storage else []
    found = [(name, device.figures[name]) for name in names if name in device.figures]
    return [f"{name} {item.value:g} {item.unit} ({item.basis}: {item.source})" for name, item in found]
