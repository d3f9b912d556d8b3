"""Compressed memory to swap to, as phones have it: a zram device of our own.

In: a size. Out: a device that swaps, removed when it is closed. Needs root and a kernel with zram; where that
is missing, there is no swap, and the reason is said. Uses no program: the header that mkswap writes is one
page.

The system may swap pages of other processes to it too, if it runs out of memory meanwhile. How much the child
may swap is the control group's matter, not the device's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoglm_edge.errors import SimulationError

from .counters import PAGE_BYTES
from .journal import Journal

KIND = "zram"
ALGORITHMS = ("lz4", "lzo-rle", "lzo")
"""What phones take, best first; the first one offered here is used."""
LABEL = b"autoglm-sim"
_LABEL_AT, _LABEL_BYTES = 1052, 16
_SWAP_FLAG_PREFER, _PRIORITY = 0x8000, 0x7FFF


class Zram:
    """A device from `make` to `remove`."""

    def __init__(self, number: int, size_bytes: int, algorithm: str, journal: Journal, root: Path) -> None:
        """Take over a device; `make` is the way in."""
        self.number = number
        self.size_bytes = size_bytes
        self.algorithm = algorithm
        self._journal = journal
        self._root = root

    @classmethod
    def make(cls, size_bytes: int, journal: Journal, root: Path = Path("/")) -> Zram:
        """Add a device and swap to it.

        Raises:
            SimulationError: this is not possible here; nothing is left behind.
        """
        if reason := why_not(root):
            raise SimulationError(f"no compressed swap: {reason}")
        size_bytes -= size_bytes % PAGE_BYTES
        try:
            number = int((root / "sys/class/zram-control/hot_add").read_text())
        except (OSError, ValueError) as error:
            raise SimulationError(f"no compressed swap: the system adds no zram device ({error})") from error
        device = cls(number, size_bytes, "", journal, root)
        try:
            journal.add(KIND, number=number)
            device._set_up()
        except OSError as error:
            device.remove()
            raise SimulationError(
                f"no compressed swap: {device.path} cannot be set up ({error.strerror or error})"
            ) from error
        except BaseException:
            device.remove()
            raise
        return device

    @property
    def path(self) -> Path:
        """The device's file."""
        return self._root / f"dev/zram{self.number}"

    @property
    def folder(self) -> Path:
        """The device's settings."""
        return self._root / f"sys/block/zram{self.number}"

    def remove(self) -> None:
        """Stop swapping to it and remove it.

        Raises:
            SimulationError: it is in use; it stays in the journal.
        """
        _remove(self.number, self._root)
        self._journal.strike(KIND, number=self.number)

    def _set_up(self) -> None:
        offered = (self.folder / "comp_algorithm").read_text().replace("[", " ").replace("]", " ").split()
        self.algorithm = next((name for name in ALGORITHMS if name in offered), offered[0] if offered else "")
        (self.folder / "comp_algorithm").write_text(self.algorithm)
        (self.folder / "disksize").write_text(str(self.size_bytes))
        with self.path.open("r+b", buffering=0) as file:
            file.write(swap_header(self.size_bytes))
            os.fsync(file.fileno())
        _swap("swapon", self.path, _SWAP_FLAG_PREFER | _PRIORITY)


def why_not(root: Path = Path("/")) -> str:
    """Why no device can be added, a part of a sentence; "" if it seems possible."""
    control = root / "sys/class/zram-control/hot_add"
    if not control.exists():
        return "this kernel has no zram"
    if not os.access(control, os.R_OK):
        return "adding a zram device takes root"
    return ""


def swap_header(size_bytes: int) -> bytes:
    """The first page of swap space: version 1, no bad pages, our label."""
    page = bytearray(PAGE_BYTES)
    struct.pack_into("<III", page, 1024, 1, size_bytes // PAGE_BYTES - 1, 0)
    page[1036:1052] = uuid.uuid4().bytes
    page[_LABEL_AT : _LABEL_AT + _LABEL_BYTES] = LABEL.ljust(_LABEL_BYTES, b"\0")
    page[-10:] = b"SWAPSPACE2"
    return bytes(page)


def undo_zram(entry: Mapping[str, Any], root: Path = Path("/")) -> None:
    """Remove a device that a journal names, if it is still the one that a run set up.

    Raises:
        SimulationError: it is in use.
    """
    number = entry.get("number")
    if not isinstance(number, int) or isinstance(number, bool):
        return
    device, folder = root / f"dev/zram{number}", root / f"sys/block/zram{number}"
    if not folder.exists():
        return
    try:
        fresh = (folder / "disksize").read_text().strip() == "0"
        with device.open("rb", buffering=0) as file:
            file.seek(_LABEL_AT)
            ours = not fresh and file.read(_LABEL_BYTES).rstrip(b"\0") == LABEL
    except OSError as error:
        raise SimulationError(f"{device} cannot be read ({error.strerror or error})") from error
    if ours or fresh:  # one without a size was added and never set up
        _remove(number, root)


def _remove(number: int, root: Path) -> None:
    device, folder = root / f"dev/zram{number}", root / f"sys/block/zram{number}"
    if not folder.exists():
        return
    try:
        try:
            _swap("swapoff", device)
        except OSError as error:
            if error.errno != errno.EINVAL:  # it was no swap space yet
                raise
        (folder / "reset").write_text("1")
        (root / "sys/class/zram-control/hot_remove").write_text(str(number))
    except OSError as error:
        raise SimulationError(
            f"{device} cannot be removed ({error.strerror or error}); run swapoff {device} and write "
            f"{number} to /sys/class/zram-control/hot_remove"
        ) from error


def _swap(name: str, path: Path, *flags: int) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), name)
    if call(os.fsencode(path), *flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
