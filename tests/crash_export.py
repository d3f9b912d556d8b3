"""Kills exports at chosen system calls or moments, and says what was left. Run by test_resume.py.

Each attempt is a fork of this process, which has everything imported, so that an attempt takes a tenth of
a second. In the child the calls that change the disk are counted, and at the chosen one the process gets
SIGKILL; a write is cut in half first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoglm_edge.errors import EdgeError
from autoglm_edge.export.pipeline import export
from autoglm_edge.export.weights import writer
from autoglm_edge.runtime.bundle import Bundle

WRITES = ("pwrite", "write")
CALLS = (*WRITES, "fsync", "rename", "unlink", "rmdir", "mkdir", "ftruncate")
REFUSED = 3


class Counter:
    """Counts calls that change the disk; kills the process at one of them."""

    def __init__(self, deadly: int) -> None:
        self.deadly = deadly
        self.names: list[str] = []
        self.lock = threading.Lock()

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        writer._fdatasync = self._wrap("fdatasync", writer._fdatasync)

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            with self.lock:
                self.names.append(name)
                if len(self.names) == self.deadly:
                    if name in WRITES:
                        handle, data, *rest = args
                        call(handle, data[: len(data) // 2], *rest)
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **keywords)

        return counted


def attempt(work: Callable[[], None]) -> int:
    """Run in a fork; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except EdgeError as error:
            print(error, file=sys.stderr)
            os._exit(REFUSED)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(folder: Path) -> str:
    files = sorted(folder.iterdir())
    return "\n".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)


def whole_or_absent(output: Path) -> str:
    """'absent', or the digest of a bundle that verifies; raises for all else, and if OUT.partial loads."""
    try:
        Bundle.open(output.with_name(output.name + ".partial"))
    except EdgeError:
        pass
    else:
        raise AssertionError("the partial folder opens as a bundle")
    if not output.exists():
        return "absent"
    Bundle.open(output).verify()
    return digest(output)


def count_calls(checkpoint: Path, folder: Path, force: bool) -> list[str]:
    """Names of the calls of an undisturbed export."""
    report = folder / "calls.json"

    def work() -> None:
        counter = Counter(deadly=-1)
        counter.install()
        export(checkpoint, folder / "out", force=force)
        report.write_text(json.dumps(counter.names))

    assert wait(attempt(work)) == 0
    names: list[str] = json.loads(report.read_text())
    return names


def points(names: list[str], most: int) -> list[int]:
    """Calls to die at: all that are not plain writes of weights if there is room, and a share of those."""
    rare = [number for number, name in enumerate(names, 1) if name != "pwrite"]
    common = [number for number, name in enumerate(names, 1) if name == "pwrite"]
    chosen = rare[-most * 3 // 4 :] + common[:: max(1, len(common) * 4 // most)]
    return sorted(set(chosen))


def crash(checkpoint: Path, folder: Path, *, force: bool, most: int) -> dict[str, Any]:
    """Die at many calls, each time in a fresh place, and go on."""
    export(checkpoint, folder / "new")
    new = digest(folder / "new")
    old = "absent"
    if force:
        export(checkpoint, folder / "old", precision="int8")
        old = digest(folder / "old")
        shutil.copytree(folder / "old", folder / "out")
    names = count_calls(checkpoint, folder, force)
    shutil.rmtree(folder / "out")
    died = 0
    for deadly in points(names, most):
        output = folder / f"out{deadly}"
        if force:
            shutil.copytree(folder / "old", output)

        def work(deadly: int = deadly, output: Path = output) -> None:
            Counter(deadly).install()
            export(checkpoint, output, force=force)

        died += wait(attempt(work)) == -signal.SIGKILL
        found = whole_or_absent(output)
        assert found in ("absent", old, new), f"call {deadly} left neither the old bundle nor the new one"
        aside = output.with_name(output.name + ".partial") / "old"
        if force and found == "absent":
            assert digest(aside) == old, f"call {deadly} lost the old bundle"
        code = wait(attempt(lambda output=output: export(checkpoint, output, force=force)))  # type: ignore[misc]
        assert code == 0 or (code == REFUSED and found == new), f"going on after call {deadly} gave {code}"
        assert whole_or_absent(output) == new, f"call {deadly} changed the bundle"
        left = [path.name for path in folder.glob(f"{output.name}.partial")]
        assert not left, f"call {deadly} left {left}"
        shutil.rmtree(output)
    return {"calls": len(names), "died": died}


def harass(checkpoint: Path, folder: Path, *, rounds: int, seed: int) -> dict[str, Any]:
    """Kill one export again and again at random moments, going on each time."""
    started = time.monotonic()
    export(checkpoint, folder / "new")
    usual = time.monotonic() - started
    chance = random.Random(seed)
    died = finished = 0
    for _ in range(rounds):
        child = attempt(lambda: export(checkpoint, folder / "out") and None)
        time.sleep(chance.uniform(0, 1.2 * usual))
        os.kill(child, signal.SIGKILL)
        died += wait(child) == -signal.SIGKILL
        if whole_or_absent(folder / "out") != "absent":
            finished += 1
            assert digest(folder / "out") == digest(folder / "new")
            shutil.rmtree(folder / "out")
            shutil.rmtree(folder / "out.partial", ignore_errors=True)
    export(checkpoint, folder / "out")
    assert digest(folder / "out") == digest(folder / "new")
    return {"died": died, "finished": finished}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("crash", "replace", "harass"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    writer.SYNC_BYTES = 50_000  # several flushes and journal lines, although the model is tiny
    if chosen.mode == "harass":
        result = harass(chosen.checkpoint, chosen.folder, rounds=chosen.most, seed=chosen.seed)
    else:
        result = crash(chosen.checkpoint, chosen.folder, force=chosen.mode == "replace", most=chosen.most)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
