"""An arm64 Linux to run the runtime in: an emulator, a Python, and wheels, in the user's cache folder.

In: nothing. Out: a `Root`. No administrator's rights, no chroot, nothing outside the cache folder.

    CACHE/arm64/archives/        what was fetched: packages, indices, wheels
    CACHE/arm64/qemu-VERSION/    the emulator's one file, from Debian trixie
    CACHE/arm64/python-KEY/      Python 3.11 and the libraries below it, from Debian bookworm
    CACHE/arm64/wheels-KEY/      the wheels, unpacked; KEY says which
    …/made.json                  in each, written last: what it was made of

A folder appears when it is complete. Debian's qemu 7.2 (bookworm) crashes when onnxruntime is imported, so
the emulator is trixie's. Knows nothing of bundles.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from autoglm_edge.errors import DeviceError, SimulationError
from autoglm_edge.files import try_lock
from autoglm_edge.runtime.machine.folders import cache_folder
from autoglm_edge.runtime.machine.prepared import Tell

from .debian import MIRROR, Found, find_packages
from .download import digest_of, download
from .unpack import unpack_deb, unpack_wheel
from .wheels import PYTHON, fetch_wheels, versions

MARKER_NAME = "made.json"
MIRROR_VARIABLE = "AUTOGLM_EDGE_DEBIAN"
"""Names another mirror of Debian's archive."""
PYTHON_SUITE = "bookworm"
PYTHON_PACKAGES = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "zlib1g",
    "libexpat1",
    "libssl3",
    "libffi8",
    "libbz2-1.0",
    "liblzma5",
    "libuuid1",
)
"""A Python that can import the runtime and its wheels, and the libraries that it links to."""
EMULATOR_SUITE = "trixie"
EMULATOR_PACKAGE = "qemu-user"
EMULATOR = "qemu-aarch64"
_WAIT_SECONDS = 0.5
_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


@dataclass(frozen=True)
class Root:
    """What is there to run ARM programs with.

    Attributes:
        emulator: the program.
        system: folder that stands for `/`.
        site: folder of the wheels.
        versions: of the wheels, by package.
        signature: what was found of the signature of Debian's index.
    """

    emulator: Path
    system: Path
    site: Path
    versions: dict[str, str]
    signature: str

    @property
    def python(self) -> Path:
        """The ARM interpreter."""
        return self.system / f"usr/bin/python{PYTHON}"


def arm64_folder() -> Path:
    """Where everything lies.

    Raises:
        SimulationError: this user has no cache folder.
    """
    try:
        return cache_folder() / "arm64"
    except DeviceError as error:
        raise SimulationError(str(error)) from error


def ensure_root(tell: Tell, onnxruntime: str | None = None) -> Root:
    """Fetch and unpack what is not there yet.

    Args:
        tell: told of the progress.
        onnxruntime: another version of that wheel than the one installed here.

    Raises:
        SimulationError: this system cannot run the emulator, or something cannot be fetched.
    """
    machine = _ARCHITECTURES.get(platform.machine().lower())
    if sys.platform != "linux" or machine is None:
        raise SimulationError(
            f"the ARM check needs Linux on x86-64 or ARM, this is {sys.platform} on {platform.machine()}; "
            "run it there, or in a virtual machine"
        )
    folder, wanted = arm64_folder(), versions(onnxruntime)
    archives = folder / "archives"
    mirror = (os.environ.get(MIRROR_VARIABLE) or MIRROR).rstrip("/")

    def find(names: tuple[str, ...], suite: str, architecture: str) -> Found:
        return find_packages(
            names, suite=suite, architecture=architecture, folder=archives, tell=tell, mirror=mirror
        )

    def emulator(place: Path) -> dict[str, str]:
        found = find((EMULATOR_PACKAGE,), EMULATOR_SUITE, machine)
        _unpack(found, mirror, archives, place, tell, lambda path: path == f"usr/bin/{EMULATOR}")
        return _origin(found)

    def system(place: Path) -> dict[str, str]:
        found = find(PYTHON_PACKAGES, PYTHON_SUITE, "arm64")
        _unpack(found, mirror, archives, place, tell, None)
        return _origin(found)

    def site(place: Path) -> dict[str, str]:
        origin = {}
        for wheel in fetch_wheels(wanted, archives, tell):
            tell.say(f"Unpacking {wheel.name}")
            unpack_wheel(wheel, place)
            origin[wheel.name] = digest_of(wheel)
            wheel.unlink(missing_ok=True)
        return origin

    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    with _locked(folder, tell):
        places = {
            "emulator": _made(folder / f"{EMULATOR}-{EMULATOR_SUITE}-{machine}", emulator),
            "system": _made(folder / f"python-{PYTHON_SUITE}-{_key(PYTHON_PACKAGES)}", system),
            "site": _made(folder / f"wheels-{key}", site),
        }
    root = Root(
        places["emulator"] / f"usr/bin/{EMULATOR}",
        places["system"],
        places["site"],
        wanted,
        _read_marker(places["system"]).get("signature", "unknown"),
    )
    for file in (root.emulator, root.python):
        if not file.is_file():
            raise SimulationError(f"{file} is missing; delete {folder} and try again")
    return root


def remove_root() -> int:
    """Delete everything.

    Returns:
        Bytes freed.

    Raises:
        SimulationError: something cannot be deleted.
    """
    folder = arm64_folder()
    if not folder.is_dir():
        return 0
    freed = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise SimulationError(f"{error.filename} cannot be deleted ({error.strerror})") from error
    return freed


def _unpack(
    found: Found,
    mirror: str,
    archives: Path,
    place: Path,
    tell: Tell,
    wanted: Callable[[str], bool] | None,
) -> None:
    """Fetch packages, then unpack them all."""
    total = sum(package.size_bytes for package in found.packages)
    done = 0
    for package in found.packages:
        download(
            f"{mirror}/{package.place}",
            archives / package.file_name,
            size_bytes=package.size_bytes,
            sha256=package.sha256,
            stage="Fetching",
            tell=_Sum(tell, done, total),
        )
        done += package.size_bytes
    for package in found.packages:
        unpack_deb(archives / package.file_name, place, wanted)
        (archives / package.file_name).unlink(missing_ok=True)


class _Sum:
    """Progress of one file as progress of all."""

    def __init__(self, tell: Tell, before_bytes: int, total_bytes: int) -> None:
        self._tell, self._before, self._total = tell, before_bytes, total_bytes

    def say(self, text: str) -> None:
        self._tell.say(text)

    def show(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        self._tell.show(stage, self._before + done_bytes, self._total)


def _origin(found: Found) -> dict[str, str]:
    return {"signature": found.signature} | {
        f"{package.name} {package.version}": package.sha256 for package in found.packages
    }


@contextmanager
def _locked(folder: Path, tell: Tell) -> Iterator[None]:
    """Hold a lock that ends with this process: two that fetch would write one file.

    Raises:
        SimulationError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (folder / "lock").open("ab")
    except OSError as error:
        raise SimulationError(
            f"{folder} cannot be written ({error.strerror}); set AUTOGLM_EDGE_CACHE to another folder"
        ) from error
    with file:  # closing it frees the lock
        if not try_lock(file.fileno()):
            tell.say(f"Another process is fetching what the ARM check needs; waiting for it ({file.name})")
            while not try_lock(file.fileno()):
                time.sleep(_WAIT_SECONDS)
        yield


def _made(folder: Path, make: Callable[[Path], dict[str, str]]) -> Path:
    """A folder that is complete, made first if it is not there.

    Raises:
        SimulationError: it cannot be made, or another user could have changed it.
    """
    if (folder / MARKER_NAME).is_file():
        _check_ours(folder)
        return folder
    growing = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        growing.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in folder.parent.glob(f"{folder.name}.part-*"):
            if owner_of(stale) in (None, os.getpid()):
                shutil.rmtree(stale, ignore_errors=True)
        growing.mkdir(mode=0o700)
        try:
            origin = make(growing)
            (growing / MARKER_NAME).write_text(json.dumps(origin, indent=2) + "\n")
            if folder.exists() and not (folder / MARKER_NAME).exists():
                shutil.rmtree(folder)
            growing.rename(folder)
        finally:
            shutil.rmtree(growing, ignore_errors=True)
    except OSError as error:
        raise SimulationError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}); free some space, or "
            "set AUTOGLM_EDGE_CACHE to another folder"
        ) from error
    return folder


def owner_of(path: Path) -> int | None:
    """The process whose number ends a name, if it is still there."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() and Path(f"/proc/{number}").exists() else None


def _check_ours(folder: Path) -> None:
    """What is run must be this user's own.

    Raises:
        SimulationError: another user could have written it.
    """
    for path in (folder, folder / MARKER_NAME):
        status = path.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022 or stat.S_ISLNK(status.st_mode):
            raise SimulationError(f"{path} can be written by another user; delete it and try again")


def _read_marker(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / MARKER_NAME).read_text())
    except (OSError, ValueError) as error:
        raise SimulationError(f"{folder / MARKER_NAME} cannot be read; delete {folder}") from error
    return content if isinstance(content, dict) else {}


def _key(names: tuple[str, ...]) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
