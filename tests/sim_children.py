"""Children that do one thing to memory each, for runs inside limits; with the standard library alone.

python -I -S sim_children.py VERB ARGUMENT ...

anon MIB [SECONDS]      touch so much anonymous memory, and hold it
grow MIB SECONDS        the same, a MiB at a time, over so many seconds
shared MIB              the same, shared
file PATH PASSES        map a file and read it so many times
swap MIB                touch, then read all of it again
parent MIB              a child of its own touches it
shell MIB               a program of its own is killed for it, and it exits with that status
orphan SECONDS          leave a child in a session of its own behind, and exit
escape PATH ...         write -1 to files that limit it, move to groups above; print what went through
raise-limit             set RLIMIT_DATA higher
hang                    ignore SIGTERM, and never end
phases                  report phases, one of them late, and what is no report
result TEXT             report that text as its result
say TEXT STATUS         write to stderr, exit with a status
signal NUMBER           die by it
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

MIB = 1 << 20


def touch(size: int, pause: float = 0.0) -> mmap.mmap:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    noise = os.urandom(2048) + bytes(2048)  # half of a page can be compressed
    for offset in range(0, size, 4096):
        area[offset : offset + 4096] = noise
        if pause and offset % MIB == 0:
            time.sleep(pause)
    return area


def report(line: object) -> None:
    os.write(int(os.environ["AUTOGLM_SIM_REPORT"]), json.dumps(line).encode() + b"\n")


def anon(size: str, seconds: str = "0.3") -> None:
    area = touch(int(size) * MIB)
    time.sleep(float(seconds))
    area.close()


def grow(size: str, seconds: str) -> None:
    touch(int(size) * MIB, float(seconds) / int(size)).close()


def shared(size: str) -> None:
    area = mmap.mmap(-1, int(size) * MIB)
    for offset in range(0, len(area), 4096):
        area[offset] = 1
    time.sleep(0.3)


def file(path: str, passes: str) -> None:
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as area:
        report({"phase": "decode", "at": time.monotonic()})
        for _ in range(int(passes)):
            total = sum(area[offset] for offset in range(0, len(area), 4096))
        time.sleep(0.2)
        print(total)


def swap(size: str) -> None:
    area = touch(int(size) * MIB)
    total = sum(area[offset] for offset in range(0, len(area), 4096))
    time.sleep(0.3)
    print(total)


def parent(size: str) -> None:
    child = os.fork()
    if child == 0:
        anon(size)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status) != 0)


def shell(size: str) -> None:
    child = os.fork()
    if child == 0:
        anon(size)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


def orphan(seconds: str) -> None:
    if os.fork() == 0:
        os.setsid()
        time.sleep(float(seconds))
        os._exit(0)


def escape() -> None:
    """Lift the limits of the groups that were made for it, or leave them; plainly, then after a remount."""
    import ctypes

    places = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if "autoglm-sim-" not in path:
            continue  # only what was made for this child is touched
        for top in (*names.split(","), names, "unified", ""):
            group = Path("/sys/fs/cgroup") / top / path.lstrip("/")
            if group.is_dir():
                limits = ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes", "memory.max")
                places += [group / name for name in limits if (group / name).exists()]
                places.append(group.parent / "cgroup.procs")
    library = ctypes.CDLL(None)
    done = []
    for mode in ("plain", "remounted"):
        if mode == "remounted":
            for line in Path("/proc/self/mountinfo").read_text().splitlines():
                if " - cgroup" in line:
                    library.mount(None, line.split()[4].encode(), None, ctypes.c_ulong(32 | 4096), None)
        for place in places:
            value = {"cgroup.procs": str(os.getpid()), "memory.max": "max"}.get(place.name, "-1")
            try:
                place.write_text(value)
            except OSError:
                continue
            done.append(f"{mode}: {place}")
    sys.stderr.write(f"tried {len(places)}, done {done}\n")
    sys.exit(1 if done or not places else 0)


def raise_limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(10)


def phases() -> None:
    start = time.monotonic()
    report({"phase": "load", "at": start})
    time.sleep(0.15)
    report({"phase": "prefill", "at": time.monotonic()})
    os.write(
        int(os.environ["AUTOGLM_SIM_REPORT"]), b"no json\n[1]\n" + b'{"phase": "x", "at": "soon"}\n{"a": 1}\n'
    )
    time.sleep(0.15)
    report({"phase": "decode", "at": time.monotonic()})
    report({"borders": {"prefill": start + 0.1}})
    time.sleep(0.1)


def result(text: str) -> None:
    report({"result": json.loads(text)})


def say(text: str, status: str) -> None:
    sys.stderr.write(text + "\n")
    sys.exit(int(status))


def die(number: str) -> None:
    os.kill(os.getpid(), int(number))
    time.sleep(10)


VERBS = {
    "anon": anon,
    "grow": grow,
    "shared": shared,
    "file": file,
    "swap": swap,
    "parent": parent,
    "shell": shell,
    "orphan": orphan,
    "escape": escape,
    "raise-limit": raise_limit,
    "hang": hang,
    "phases": phases,
    "result": result,
    "say": say,
    "signal": die,
}

if __name__ == "__main__":
    VERBS[sys.argv[1]](*sys.argv[2:])
