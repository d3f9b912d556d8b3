"""Runs the guest on an emulated ARM CPU, or on this one.

In: a root, a CPU, a job. Out: what the guest says, line by line. Knows nothing of what the job is for.

qemu's user mode translates instructions and passes system calls on: it shows which numbers a CPU computes.
It shows nothing of speed, of memory bandwidth, nor of the weak order of memory accesses between threads.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import autoglm_edge.errors as errors
import autoglm_edge.runtime as runtime
from autoglm_edge.errors import SimulationError

from .root import Root, owner_of

GUEST = "autoglm_edge.android_sim.arm64.guest"
TIMEOUT_SECONDS = 4 * 3600.0
TAIL_BYTES = 1 << 16
Say = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Cpu:
    """An instruction set, by a CPU that has it.

    Attributes:
        name: as qemu knows it.
        dot_products: it multiplies bytes four at a time (FEAT_DotProd), so onnxruntime computes in integers.
        stands_for: devices with it.
    """

    name: str
    dot_products: bool
    stands_for: str


CPUS = {
    cpu.name: cpu
    for cpu in (
        Cpu("cortex-a72", False, "Armv8.0: phones until 2018, Raspberry Pi 4"),
        Cpu("cortex-a76", True, "Armv8.2 with dot products: phones from 2019, Raspberry Pi 5, RK3588"),
        Cpu("cortex-a710", True, "Armv9 with i8mm, bf16, SVE2: phones from 2022"),
    )
}


def find_cpu(name: str) -> Cpu:
    """A CPU by name.

    Raises:
        SimulationError: there is none.
    """
    if name not in CPUS:
        raise SimulationError(f"{name!r} is none of the ARM CPUs; choose from {', '.join(CPUS)}")
    return CPUS[name]


@contextmanager
def laid_out(parent: Path) -> Iterator[Path]:
    """A folder with what the guest imports of this package, as it is now, for the time of a check.

    The folder around it is the check's own, too, and is deleted with it.

    Raises:
        SimulationError: it cannot be written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in parent.glob("check-*"):
            if owner_of(stale) is None:  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix="check-", suffix=f"-{os.getpid()}", dir=parent))
    except OSError as error:
        raise SimulationError(
            f"{parent} cannot be written ({error.strerror}); set AUTOGLM_EDGE_CACHE to another folder"
        ) from error
    try:
        name, *inner = GUEST.split(".")
        package = folder / "app" / name
        guest = package.joinpath(*inner).with_suffix(".py")
        guest.parent.mkdir(parents=True)
        source = Path(errors.__file__)
        for module in (source.with_name("__init__.py"), source):
            shutil.copy(module, package)
        for place in ("__init__.py", "arm64/__init__.py"):
            (package / "android_sim" / place).touch()
        shutil.copy(Path(__file__).with_name("guest.py"), guest)
        shutil.copytree(
            Path(str(runtime.__file__)).parent,
            package / "runtime",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        yield folder / "app"
    except OSError as error:
        raise SimulationError(f"{folder} cannot be written ({error}); free some space") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_guest(job: Path, app: Path, say: Say, *, root: Root | None, cpu: Cpu | None, cache: Path) -> None:
    """Do a job.

    Args:
        job: its file.
        app: from `laid_out`.
        say: told of each step as it is done.
        root: what to run it with; None runs it on this machine, with this Python.
        cpu: with a root, the CPU.
        cache: the guest's cache folder.

    Raises:
        SimulationError: the guest says that it cannot, dies, or takes longer than TIMEOUT_SECONDS.
    """
    where = f"on an emulated {cpu.name}" if cpu else "on this machine"
    environment = {
        "PYTHONPATH": str(app) if root is None else f"{app}:{root.site}",
        "AUTOGLM_EDGE_CACHE": str(cache),
        "LC_ALL": "C.UTF-8",
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(app),  # libraries leave files there; this one is deleted
    }
    if root is None or cpu is None:
        # -P: the folder of this process is none of the guest's business.
        command = [sys.executable, "-P", "-m", GUEST, str(job)]
    else:
        command = [str(root.emulator), "-cpu", cpu.name, "-L", str(root.system)]
        command += [str(root.python), "-P", "-m", GUEST, str(job)]
    _follow(command, environment, app, where, say)


def _follow(command: Sequence[str], environment: dict[str, str], folder: Path, where: str, say: Say) -> None:
    error, words = "", tempfile.TemporaryFile()  # noqa: SIM115  # closed below, with the process
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
        )
    except OSError as fault:
        words.close()
        raise SimulationError(
            f"{command[0]} cannot be started ({fault.strerror}); delete it and try again"
        ) from (fault)
    timer = threading.Timer(TIMEOUT_SECONDS, process.kill)
    timer.daemon = True
    try:
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            try:
                step = json.loads(line)
            except ValueError:
                continue  # what some library prints
            if not isinstance(step, dict):
                continue
            error = str(step.get("error", error))
            if "step" in step:
                say(step)
        code = process.wait()
        words.seek(max(0, words.seek(0, os.SEEK_END) - TAIL_BYTES))
        last = next(
            (line for line in reversed(words.read().decode(errors="replace").splitlines()) if line), ""
        )
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        words.close()
    if code != 0:
        raise SimulationError(f"the runtime fails {where}: {error or _died(code, last)}")


def _died(code: int, last: str) -> str:
    """How a process ended that did not say why."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"{how}, last words: {last[:300] or 'none'}"
