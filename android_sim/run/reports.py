"""What a child says while it runs: lines of JSON on a pipe that it inherits. Both ends.

    {"phase": NAME, "at": SECONDS}              a phase begins; seconds of the system's monotonic clock
    {"borders": {NAME: SECONDS, ...}}           phases that were reported began at these moments, exactly
    {"result": {...}}                           as `ChildResult.to_json` gives it
    {"error": SENTENCE, "memory": BOOL}         why it gives up, and whether it was refused memory
    {"launch": {...}} or {"launch_error": ...}  from `launch.py`, before the command begins

In: such lines, from a child that may be broken. Out: what they say. A line that is none of these is counted
and left out; nothing that a child writes stops the runner.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from autoglm_edge.android_sim.child_result import ChildResult
from autoglm_edge.android_sim.trace import Phase
from autoglm_edge.errors import SimulationError

REPORT_VARIABLE = "AUTOGLM_SIM_REPORT"
"""Environment variable with the number of the pipe's descriptor."""
LIMIT_BYTES = 16 << 20
"""What a child may say in all."""
MOST_PHASES = 1000
MEMORY_SIGNS = (
    "allocate memory",
    "bad_alloc",
    "out of memory",
    "not enough memory",
    "MemoryError",
    "Resource temporarily unavailable",
    "can't start new thread",
)
"""How programs say that they were refused memory; a thread that cannot have its stack is the last two."""


class Reporter:
    """The child's end."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Find the pipe; without one, nothing is said."""
        text = os.environ.get(REPORT_VARIABLE, "")
        self._descriptor = int(text) if descriptor is None and text.isdigit() else descriptor

    def phase(self, name: str) -> float:
        """A phase begins now; returns the moment."""
        now = time.monotonic()
        self._say({"phase": name, "at": now})
        return now

    def borders(self, moments: Mapping[str, float]) -> None:
        """Phases began at these moments of the monotonic clock."""
        self._say({"borders": dict(moments)})

    def result(self, result: ChildResult) -> None:
        """All is done."""
        self._say({"result": result.to_json()})

    def error(self, message: str, *, memory: bool) -> None:
        """It cannot go on."""
        self._say({"error": message, "memory": memory})

    def _say(self, line: Mapping[str, Any]) -> None:
        if self._descriptor is None:
            return
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]


class Reports:
    """The runner's end.

    Attributes:
        launch: what `launch.py` said before the command; None until then.
        launch_error: why the command never began; "" if it did.
        result: None until the child is through.
        error: the child's sentence; "" if it gave none.
        memory: it was refused memory.
        faults: lines that were no reports.
    """

    def __init__(self, started: float) -> None:
        """Begin.

        Args:
            started: moment of the monotonic clock that is second 0.
        """
        self.launch: dict[str, Any] | None = None
        self.launch_error = ""
        self.result: ChildResult | None = None
        self.error = ""
        self.memory = False
        self.faults = 0
        self._started = started
        self._rest = b""
        self._read = 0
        self._begins: list[tuple[str, float]] = [("start", 0.0)]

    def feed(self, data: bytes) -> None:
        """Take what came through the pipe."""
        self._read += len(data)
        if self._read > LIMIT_BYTES:
            self.faults += 1
            self._rest = b""
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError, SimulationError) as error:
                self.faults += 1
                if isinstance(error, SimulationError) and not self.error:
                    self.error = str(error)

    def phases(self, seconds: float, *, completed: bool) -> tuple[Phase, ...]:
        """The phases so far, without gaps.

        Args:
            seconds: when the child ended.
            completed: whether it did all that it was asked to, so that its last phase has an end.
        """
        begins = sorted(((name, min(at, seconds)) for name, at in self._begins), key=lambda item: item[1])
        ends: list[float | None] = [at for _, at in begins[1:]]
        ends.append(seconds if completed else None)
        return tuple(Phase(name, at, end) for (name, at), end in zip(begins, ends, strict=True))

    def _take(self, line: Any) -> None:
        if not isinstance(line, dict):
            raise ValueError("no report")
        if "phase" in line:
            name = str(line["phase"])[:64]
            if name and len(self._begins) < MOST_PHASES:
                self._begins.append((name, self._moment(line["at"])))
        elif "borders" in line:
            exact = {str(name): self._moment(at) for name, at in dict(line["borders"]).items()}
            self._begins = [(name, exact.get(name, at)) for name, at in self._begins]
        elif "result" in line:
            self.result = ChildResult.from_json(line["result"])
        elif "error" in line:
            self.error, self.memory = str(line["error"])[:2000], line.get("memory") is True
        elif "launch" in line:
            self.launch = dict(line["launch"])
        elif "launch_error" in line:
            self.launch_error = str(line["launch_error"])
        else:
            raise ValueError("no report")

    def _moment(self, at: Any) -> float:
        moment = float(at) - self._started
        if not math.isfinite(moment) or moment < 0:
            raise ValueError("a moment before the start")
        return moment


def says_memory(text: str) -> bool:
    """Whether a program's last words say that it was refused memory."""
    return any(sign in text for sign in MEMORY_SIGNS)
