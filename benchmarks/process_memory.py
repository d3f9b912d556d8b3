"""Runs a command and watches its memory: anonymous, file-backed and shared, from /proc, ten times a second.

In: an argument list. Out: exit code, output, wall time and the peaks. Linux only; knows nothing of what the
command does.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIELDS = {"RssAnon": "anon_bytes", "RssFile": "file_bytes", "RssShmem": "shmem_bytes", "VmSwap": "swap_bytes"}


@dataclass
class Watched:
    """What a command did.

    Attributes:
        returncode: exit status.
        stdout: all of it.
        seconds: wall time.
        peak: largest value seen of each kind of memory, in bytes; processes are not added up.
    """

    returncode: int = -1
    stdout: str = ""
    seconds: float = 0.0
    peak: dict[str, int] = field(default_factory=dict)


def watch(command: Sequence[str], *, interval: float = 0.1) -> Watched:
    """Run `command` to its end; its stderr goes through."""
    result = Watched()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    sampler = threading.Thread(target=_sample, args=(process, result, interval), daemon=True)
    sampler.start()
    result.stdout, _ = process.communicate()
    result.seconds = time.perf_counter() - started
    result.returncode = process.returncode
    sampler.join()
    return result


def _sample(process: subprocess.Popen[str], result: Watched, interval: float) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            name, _, rest = line.partition(":")
            if name in FIELDS:
                value = 1024 * int(rest.split()[0])
                result.peak[FIELDS[name]] = max(result.peak.get(FIELDS[name], 0), value)
        time.sleep(interval)
