"""What one app may have on a device: the figures of a profile that a run is held to.

In: a `Device` and the state of the app, or plain figures. Out: a `Budget` in bytes, seconds and threads. It
is the device's side alone: whether this host can give swap, throttle a disk or limit anything at all is
decided where a limit is set up, and said in the trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from autoglm_edge.errors import SimulationError

if TYPE_CHECKING:
    from .device import Device

AppState = Literal["visible", "service"]
"""In the foreground, or a service without a window; Android gives the second far less memory."""
STATES: tuple[AppState, ...] = ("visible", "service")


@dataclass(frozen=True)
class Budget:
    """What an app may have.

    Attributes:
        device: id of the profile.
        state: of the app.
        limit_bytes: anonymous + shared + resident file pages together (`memory.high`, `limit_in_bytes`).
        swap_bytes: compressed memory that the device would lend on top; 0 where it has none.
        kill_delay_s: from crossing `kill_bytes` to the kill: 30 on Android 17, 0 where lmkd or the kernel
            kills.
        psi_some_ms_per_s: stall of some task, per second, from which a device looks for something to kill.
        thrashing_percent: refaults as a share of the file pages from which it does so, too.
        mem_total_bytes: what the kernel of the device calls MemTotal.
        threads: for inference on its fast cores.
        readahead_bytes: of its storage.
        storage_bytes_per_s: sequential reads.
        thermal_burst_s: seconds at full speed.
        thermal_sustained: share of full speed that stays, 0 to 1.
        android: whether Android's own rules (limiter, low memory killer, Play) apply.

    Raises:
        SimulationError: a figure that cannot be.
    """

    device: str
    state: AppState
    limit_bytes: int
    swap_bytes: int = 0
    kill_delay_s: float = 0.0
    psi_some_ms_per_s: int = 70
    thrashing_percent: int = 100
    mem_total_bytes: int = 0
    threads: int = 1
    readahead_bytes: int = 128 << 10
    storage_bytes_per_s: float = 1e9
    thermal_burst_s: float = math.inf
    thermal_sustained: float = 1.0
    android: bool = True

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise SimulationError(f"the state is {self.state!r}, must be one of {', '.join(STATES)}")
        if self.limit_bytes < 1 << 20:
            raise SimulationError(
                f"the limit of {self.device} is {self.limit_bytes} bytes, must be 1 MiB at least; give the "
                "memory of an app in MiB"
            )
        if self.swap_bytes < 0 or self.mem_total_bytes < 0 or self.readahead_bytes < 0:
            raise SimulationError(f"swap, memory and read-ahead of {self.device} must not be negative")
        if not 0 <= self.kill_delay_s < math.inf:
            raise SimulationError(f"the kill delay is {self.kill_delay_s} s, must be 0 or more")
        if not 0 < self.psi_some_ms_per_s <= 1000 or self.thrashing_percent <= 0:
            raise SimulationError(
                f"the pressure limits of {self.device} are {self.psi_some_ms_per_s} ms per s and "
                f"{self.thrashing_percent} %, must be above 0, the first at most 1000"
            )
        if self.threads < 1:
            raise SimulationError(f"{self.threads} threads are not possible; give 1 or more")
        if not self.storage_bytes_per_s > 0:
            raise SimulationError(
                f"storage of {self.device} reads {self.storage_bytes_per_s} bytes per second, must be above 0"
            )
        if not self.thermal_burst_s >= 0 or not 0 < self.thermal_sustained <= 1:
            raise SimulationError(
                f"{self.device} runs {self.thermal_burst_s} s at full speed, then at "
                f"{self.thermal_sustained} of it; the first must be 0 or more, the second between 0 and 1"
            )

    @classmethod
    def of(cls, device: Device, state: AppState = "visible") -> Budget:
        """What an app in this state has on a device.

        The sustained speed is the middle of the profile's range.

        Raises:
            SimulationError: there is no such state.
        """
        if state not in STATES:
            raise SimulationError(f"the state is {state!r}, must be one of {', '.join(STATES)}")
        low, high = device.value("thermal_low"), device.value("thermal_high")
        burst = device.value("thermal_burst")
        return cls(
            device=device.id,
            state=state,
            limit_bytes=device.bytes(f"mem_{state}"),
            swap_bytes=device.bytes(f"swap_{state}"),
            kill_delay_s=device.value("kill_delay") or 0.0,
            psi_some_ms_per_s=round(device.value("lmk_psi_some") or 70),
            thrashing_percent=round(device.value("lmk_thrashing") or 100),
            mem_total_bytes=device.bytes("mem_total"),
            threads=device.threads,
            readahead_bytes=device.bytes("readahead", 128 << 10),
            storage_bytes_per_s=float(device.bytes("storage_read", 10**9)),
            thermal_burst_s=math.inf if burst is None else burst,
            thermal_sustained=1.0 if low is None or high is None else (low + high) / 2,
            android=device.kind == "phone",
        )

    @property
    def kill_bytes(self) -> int:
        """Anonymous + shared + swapped bytes above which Android 17 kills."""
        return self.limit_bytes + self.swap_bytes

    def cpu_share(self, at_s: float) -> float:
        """Share of full speed that the heat leaves at a moment.

        Full speed for `thermal_burst_s`, then an exponential fall to `thermal_sustained` whose time constant
        is the burst again: a body that took so long to warm up takes as long to settle.

        Args:
            at_s: seconds of load so far.

        Returns:
            Between `thermal_sustained` and 1.
        """
        if at_s <= self.thermal_burst_s:
            return 1.0
        settled = 1.0 if self.thermal_burst_s == 0 else -math.expm1(1 - at_s / self.thermal_burst_s)
        return 1.0 - (1.0 - self.thermal_sustained) * settled
