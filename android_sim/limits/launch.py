"""The last steps before the child: join its groups, take its limits, give up the means to lift them.

In: one argument, a JSON object as `Entry.command` writes it. Out: the command in this very process, and one
line on the report pipe. Run by path as `python -I -S launch.py SPEC`, so that nothing else is loaded before
the limits hold: memory is charged to the group that first touches it. Uses the standard library alone.

Whoever may move processes between groups can leave a limit behind, and root always may. So the trees of
groups are made read-only in a mount namespace of the child's own, and the capabilities to undo that are
dropped; an ordinary user does the same in a user namespace, where the system allows it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

JOINED = "app"
KEPT = "keep"
FAILED = 125
"""Status of a child that never became the command."""

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MOUNT_FLAGS = {
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAP_SETPCAP, _LAST_CAP = 8, 63
_KEPT_CAPS = (0, 1, 2, 3)
"""chown, dac_override, dac_read_search, fowner: root still reads and writes everybody's files."""
_CAPABILITY_VERSION = 0x20080522


def main(argument: str) -> int:
    """Become the command. Returns only if that fails."""
    spec = json.loads(argument)
    report = int(spec["report"])
    try:
        group = None
        if spec["scope"] is not None:
            group = enter_scope(_own_v2_group(), spec["scope"], int(spec["keep"]))
        for folder in spec["groups"]:
            _write(Path(folder) / "cgroup.procs", str(os.getpid()))
        if spec["data_limit_bytes"] is not None:
            _limit_data(int(spec["data_limit_bytes"]))
    except (OSError, ValueError) as error:
        _say(report, {"launch_error": f"the child cannot enter its limits ({error})"})
        return FAILED
    open_door = seal(spec["mounts"]) if spec["sealed"] else ""
    _say(report, {"launch": {"open_door": open_door, "group": None if group is None else str(group)}})
    # The child dies with its runner. After the changes of credentials, which would clear it.
    if sys.platform.startswith("linux"):
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(spec["parent"]):
        return FAILED
    try:
        os.execvp(spec["command"][0], spec["command"])
    except (OSError, ValueError) as error:
        _say(report, {"launch_error": f"{spec['command'][0]} cannot be run ({error})"})
    return FAILED


def seal(mounts: list[list[str]]) -> str:
    """Take away the means to lift a limit.

    Args:
        mounts: trees of groups, each with its mount options.

    Returns:
        Why the child could still lift it, a part of a sentence; "" if it cannot.
    """
    try:
        _unshare(mounts)
        for path, options in mounts:
            flags = sum(_MOUNT_FLAGS.get(name, 0) for name in options.split(","))
            _mount(None, path, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)
        _drop_capabilities()
        if _prctl(_PR_SET_NO_NEW_PRIVS, 1) != 0:
            return "no_new_privs is refused"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _unshare(mounts: list[list[str]]) -> None:
    """Give this process mounts of its own, which only root may; others as the root of a user namespace."""
    if not mounts:
        return
    if _library().unshare(_CLONE_NEWNS) != 0:
        user, group = os.getuid(), os.getgid()
        _checked(_library().unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
        _write(Path("/proc/self/setgroups"), "deny")
        _write(Path("/proc/self/uid_map"), f"{user} {user} 1")
        _write(Path("/proc/self/gid_map"), f"{group} {group} 1")
    _mount(None, "/", _MS_REC | _MS_PRIVATE)


def _drop_capabilities() -> None:
    """Keep only those that reach files; the rest neither now nor after an exec."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Sets(ctypes.Structure):
        _fields_ = (
            ("effective", ctypes.c_uint32),
            ("permitted", ctypes.c_uint32),
            ("inheritable", ctypes.c_uint32),
        )

    header, sets = Header(_CAPABILITY_VERSION, 0), (Sets * 2)()
    _checked(_library().capget(ctypes.byref(header), sets))
    if sets[0].permitted & 1 << _CAP_SETPCAP:
        for capability in range(_LAST_CAP + 1):
            if capability not in _KEPT_CAPS and _prctl(_PR_CAPBSET_DROP, capability) != 0:
                break  # beyond the last one that this kernel knows
    kept = sum(1 << capability for capability in _KEPT_CAPS)
    low, high = sets[0].permitted & kept, 0
    for index, mask in enumerate((low, high)):
        sets[index].effective = sets[index].permitted = mask
        sets[index].inheritable = 0
    _checked(_library().capset(ctypes.byref(header), sets))


def enter_scope(own: Path, limits: dict[str, str], keep: int, controllers: str = "+memory") -> Path:
    """Make groups in a delegated scope, and join the limited one.

    The scope is removed by the system when its last process ends, and the counters with it. So a second
    process stays in it until the pipe `keep` is closed.

    Args:
        own: folder of the scope, in which this process is alone.
        limits: files of the limited group, and what they are set to.
        keep: descriptor of the pipe.
        controllers: handed on to the limited group.

    Returns:
        Folder of the limited group.

    Raises:
        OSError: the system refuses.
    """
    for name in (JOINED, KEPT):
        (own / name).mkdir()
    if os.fork() == 0:
        try:
            os.setsid()
            _write(own / KEPT / "cgroup.procs", str(os.getpid()))
            os.closerange(0, keep)
            os.closerange(keep + 1, 1024)
            os.read(keep, 1)
        finally:
            os._exit(0)
    _write(own / JOINED / "cgroup.procs", str(os.getpid()))
    _wait_until_empty(own)
    if controllers:
        _write(own / "cgroup.subtree_control", controllers)
    for name, value in limits.items():
        _write(own / JOINED / name, value)
    return own / JOINED


def _wait_until_empty(group: Path) -> None:
    """A group hands controllers on when no process is left in it; the second one leaves by itself."""
    import time

    for _ in range(1000):
        if not (group / "cgroup.procs").read_text().split():
            return
        time.sleep(0.005)


def _own_v2_group() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return Path("/sys/fs/cgroup") / line[3:].lstrip("/")
    raise OSError("this system has no unified tree of groups")


def _limit_data(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n")


def _say(descriptor: int, line: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(line).encode() + b"\n")


def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str | None, target: str, flags: int) -> None:
    names = (None if source is None else source.encode(), target.encode(), None)
    _checked(_library().mount(*names, ctypes.c_ulong(flags), None))


def _prctl(option: int, value: int) -> int:
    return int(_library().prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
