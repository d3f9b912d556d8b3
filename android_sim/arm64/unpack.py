"""Unpacks Debian packages and wheels, with nothing but the standard library.

In: a file whose digest was checked. Out: its files below a folder. Nothing is run and nothing is installed;
documentation is left out. Knows nothing of what the files are for.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from autoglm_edge.errors import SimulationError

Wanted = Callable[[str], bool]
_LEFT_OUT = ("usr/share/doc/", "usr/share/man/", "usr/share/lintian/", "usr/share/locale/")
_MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60
_MEMBER_LIMIT_BYTES = 1 << 30


def unpack_deb(package: Path, folder: Path, wanted: Wanted | None = None) -> None:
    """Unpack the files of a Debian package (deb(5): an ar archive that holds data.tar.xz).

    Args:
        package: the file.
        folder: where they go.
        wanted: which paths, without a leading slash; default all but documentation.

    Raises:
        SimulationError: the file is no package, or its files would leave the folder.
    """
    keep = wanted or (lambda path: not path.startswith(_LEFT_OUT))
    if not hasattr(tarfile, "data_filter"):
        raise SimulationError(
            "unpacking needs the safe tarfile of Python 3.11.4 or later; update Python, or run on a newer one"
        )
    try:
        with package.open("rb") as file, tarfile.open(fileobj=_data(file, package)) as archive:
            for member in archive:
                member.name = str(PurePosixPath(member.name.lstrip("/")))
                if member.name != "." and keep(member.name) and _is_plain(member):
                    _extract(archive, member, folder)
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise SimulationError(
            f"{package} cannot be unpacked into {folder} ({error}); check the disk, or delete it and try "
            "again"
        ) from error


def unpack_wheel(wheel: Path, folder: Path) -> None:
    """Unpack a wheel.

    Raises:
        SimulationError: the file is none, or its files would leave the folder.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("/") or ".." in PurePosixPath(name).parts:
                    raise SimulationError(
                        f"{wheel} holds {name!r}, which would leave its folder; do not use it"
                    )
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise SimulationError(
            f"{wheel} cannot be unpacked into {folder} ({error}); check the disk, or delete it and try again"
        ) from error


def _data(file: IO[bytes], package: Path) -> IO[bytes]:
    """The member that holds the files."""
    for name, size in _members(file, package):
        if name.startswith("data.tar"):
            content = file.read(size)
            if len(content) < size:
                raise SimulationError(f"{package} is cut short; delete it and try again")
            return io.BytesIO(content)
        file.seek(size + size % 2, os.SEEK_CUR)
    raise SimulationError(f"{package} has no data.tar, so it is no Debian package; delete it and try again")


def _members(file: IO[bytes], package: Path) -> Iterator[tuple[str, int]]:
    """Name and size of each member; the caller reads or skips its bytes."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise SimulationError(f"{package} is no Debian package; delete it and try again")
    while header := file.read(_HEADER_BYTES):
        size = header[48:58].strip()
        if len(header) < _HEADER_BYTES or not size.isdigit() or int(size) > _MEMBER_LIMIT_BYTES:
            raise SimulationError(f"{package} is cut short or damaged; delete it and try again")
        yield header[:16].decode("ascii", "replace").strip().rstrip("/"), int(size)


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Files, folders and links; a device or a pipe has no place here."""
    return member.isfile() or member.isdir() or member.issym() or member.islnk()


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """One member, kept inside the folder.

    Packages link to absolute places of the system that they are for. Below `folder` those begin at `folder`.
    """
    if member.issym() and member.linkname.startswith("/"):
        above = os.path.relpath("/", "/" + os.path.dirname(member.name))
        member.linkname = os.path.normpath(os.path.join(above, member.linkname.lstrip("/")))
    archive.extract(member, folder, set_attrs=True, filter="data")
