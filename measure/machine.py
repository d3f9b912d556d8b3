"""What a figure was measured on: processor, cores, memory, system, versions.

In: nothing. Out: `Machine`. Names no user, host or path.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from autoglm_edge.runtime.machine.integers import cpu_flags
from autoglm_edge.runtime.machine.topology import usable_cores

_UNITS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
"""Flags of /proc/cpuinfo that decide which kernels run."""


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        processor: its name.
        cores: that this process may use.
        units: instruction sets that matter for matrix products, as far as the system tells.
        memory_bytes: installed; None is not known.
        system: name and release.
        python: version.
        onnxruntime: version.
    """

    processor: str
    cores: int
    units: tuple[str, ...]
    memory_bytes: int | None
    system: str
    python: str
    onnxruntime: str

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {**asdict(self), "units": list(self.units)}

    @property
    def short(self) -> str:
        """Processor and cores."""
        return f"{self.processor}, {self.cores} cores"

    def __str__(self) -> str:
        units = f", {' '.join(self.units)}" if self.units else ""
        memory = f", {self.memory_bytes / 1e9:.0f} GB" if self.memory_bytes else ""
        return f"{self.short}{units}{memory}, onnxruntime {self.onnxruntime}"


def this_machine() -> Machine:
    """The machine that this runs on."""
    flags = cpu_flags() or frozenset()
    return Machine(
        processor=_processor() or platform.processor() or platform.machine() or "unknown",
        cores=usable_cores(),
        units=tuple(unit for unit in _UNITS if unit in flags),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        onnxruntime=ort.__version__,
    )


def _processor() -> str:
    """The name that Linux has for the first CPU; "" where it tells none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    named = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in named if name.strip() == "model name"), "")


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
