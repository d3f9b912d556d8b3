"""Files that several processes share, or that a crash must not halve: a lock, and a replacement in one step.

In: paths, bytes. Out: files. What is wrong comes as OSError; whoever asks knows what to say of it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, so that whoever reads it sees the old one or the new one, also after a loss of power.

    Raises:
        OSError: it cannot be written; the old one is as it was, and nothing is left beside it.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process, if no other one has; closing it, or the process's end, frees it.

    Raises:
        OSError: this file system has no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
