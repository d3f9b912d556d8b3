"""A bundle: a folder with manifest.json and the files that it lists.

In: a path. Out: the checked manifest, paths of files, and on request the proof that every byte is the one
that was exported. Knows nothing of what is inside the files.

`Bundle.open` reads the manifest and the sizes of all files, which takes milliseconds whatever the size, and
finds copies and downloads that were cut short. `Bundle.verify` reads and hashes everything, and finds flipped
bits. A bundle may come from a stranger: no path in it may lead out of the folder, by ".." or by a link.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from autoglm_edge.errors import BundleError

from .manifest import FORMAT_VERSION, MANIFEST_NAME, FileEntry, Manifest

MANIFEST_LIMIT_BYTES = 16 << 20
"""A manifest of some 20 files has 10 KiB; one that is larger than this is not read."""

HASH_CHUNK_BYTES = 8 << 20
PARTIAL_SUFFIX = ".partial"
CARD_NAME = "README.md"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Make one with `Bundle.open`.

    Attributes:
        path: the folder, absolute.
        manifest: what is in it.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle folder: read its manifest, check that every file is there and has its size.

        Raises:
            BundleError: the folder is missing, something else, unfinished, incomplete or damaged, or names a
                file outside itself.
        """
        folder = _folder(path)
        manifest = _read_manifest(folder)
        for entry in manifest.files:
            _check_file(folder, entry)
        return cls(folder, manifest)

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Args:
            name: as in the manifest, such as "decoder.onnx".

        Raises:
            BundleError: the manifest lists no such file.
        """
        if name not in self._entries:
            raise BundleError(
                f"{self.path} has no file {name!r} in its manifest; export the checkpoint again"
            )
        return self.path / name

    def verify(self, progress: Progress | None = None) -> None:
        """Read every file and compare its SHA-256 with the manifest's.

        Args:
            progress: called with the bytes read so far and the bytes to read in all; first with 0, then after
                each 8 MiB and at each file's end.

        Raises:
            BundleError: a file is not what was exported; the first one found is named.
        """
        total = self.manifest.total_bytes
        done = 0
        report = progress or (lambda done_bytes, total_bytes: None)
        report(done, total)
        buffer = memoryview(bytearray(HASH_CHUNK_BYTES))
        for entry in self.manifest.files:
            path = _check_file(self.path, entry)
            digest = hashlib.sha256()
            left = entry.size_bytes
            try:
                with path.open("rb", buffering=0) as file:
                    while left and (count := file.readinto(buffer[: min(left, HASH_CHUNK_BYTES)])):
                        digest.update(buffer[:count])
                        left -= count
                        done += count
                        report(done, total)
            except OSError as error:
                raise BundleError(
                    f"{entry.path!r} in {self.path} cannot be read: {error.strerror or error}"
                ) from error
            if left or digest.hexdigest() != entry.sha256:
                raise BundleError(
                    f"{entry.path!r} in {self.path} is damaged: its SHA-256 is {digest.hexdigest()}, but "
                    f"{MANIFEST_NAME} says {entry.sha256}; copy or export the bundle again"
                )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and digests of all files but the model card: equal for equal content.

        What depends on exactly these files (packed weights in a cache, measured figures) is kept under this
        name. It does not change when figures are written into the manifest or the card. Lower-case hex.
        """
        lines = sorted(f"{e.sha256}  {e.path}\n" for e in self.manifest.files if e.path != CARD_NAME)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}


def _folder(path: str | os.PathLike[str]) -> Path:
    """The folder as an absolute path without links, or the reason why it cannot be a bundle."""
    if not isinstance(path, (str, os.PathLike)):
        raise BundleError(f"the bundle is given as {type(path).__name__}, must be the path of a folder")
    given = os.fspath(path)
    try:
        folder = Path(given).resolve()
        mode = folder.stat().st_mode
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a link to itself is a RuntimeError up to Python 3.12
        if isinstance(error, FileNotFoundError):
            raise BundleError(f"there is no bundle at {given}; make one with `autoglm export`") from error
        raise BundleError(f"the bundle {given!r} cannot be opened: {error}") from error
    if not stat.S_ISDIR(mode):
        raise BundleError(
            f"{given} is a file, a bundle is a folder; give the folder that holds {MANIFEST_NAME}"
        )
    return folder


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    try:
        if not os.path.lexists(path):
            raise BundleError(_why_no_manifest(folder))
        size = _regular(folder, path, MANIFEST_NAME)
        if size > MANIFEST_LIMIT_BYTES:
            raise BundleError(
                f"{path} has {size} bytes, more than the {MANIFEST_LIMIT_BYTES} that a manifest may have; "
                "export the checkpoint again"
            )
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text ({error}); export the checkpoint again") from error
    try:
        _check_version(text, path)
        manifest = Manifest.from_json(text)
    except RecursionError as error:
        raise BundleError(
            f"{path} is nested too deeply to be a manifest; export the checkpoint again"
        ) from error
    if any(entry.path == MANIFEST_NAME for entry in manifest.files):
        raise BundleError(f"{path} lists itself among its files; export the checkpoint again")
    return manifest


def _check_version(text: str, path: Path) -> None:
    """Tell a manifest of another version from a damaged one, before its keys look wrong."""
    try:
        document: Any = json.loads(text)
    except ValueError:
        return  # Manifest.from_json says it better
    version = document.get("format_version") if isinstance(document, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version != FORMAT_VERSION:
        newer = "update autoglm-edge" if version > FORMAT_VERSION else "export the checkpoint again"
        raise BundleError(
            f"{path} has format version {version}, this release reads version {FORMAT_VERSION}; {newer}"
        )


def _why_no_manifest(folder: Path) -> str:
    """What a folder without a manifest probably is, and what to do."""
    for unfinished in (folder, folder.parent):
        if unfinished.name.endswith(PARTIAL_SUFFIX):
            output = unfinished.name.removesuffix(PARTIAL_SUFFIX)
            return (
                f"{folder} is an export that did not finish, not a bundle; repeat the export to {output} "
                f"with --resume, or delete {unfinished}"
            )
    names = {entry.name for entry in folder.iterdir()}
    weights = (".safetensors", ".safetensors.index.json")
    if any(name.endswith(weights) or name.startswith("pytorch_model") for name in names):
        return (
            f"{folder} is a checkpoint, not a bundle; run `autoglm export {folder} -o OUTPUT` and open OUTPUT"
        )
    if not names:
        return f"{folder} is empty, not a bundle; make one with `autoglm export`"
    return f"{folder} has no {MANIFEST_NAME}, so it is not a bundle; make one with `autoglm export`"


def _check_file(folder: Path, entry: FileEntry) -> Path:
    """The path of a file, after checking that it is a plain file in the folder and has the listed size."""
    path = folder / entry.path
    try:
        if not os.path.lexists(path):
            raise BundleError(
                f"{entry.path!r} is not in {folder}, but {MANIFEST_NAME} lists it; copy or export the bundle "
                "again"
            )
        size = _regular(folder, path, entry.path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BundleError(f"{entry.path!r} in {folder} cannot be read: {error}") from error
    if size != entry.size_bytes:
        raise BundleError(
            f"{entry.path!r} in {folder} has {size} bytes, but {MANIFEST_NAME} says {entry.size_bytes}; "
            "a copy or download was cut short, repeat it"
        )
    return path


def _regular(folder: Path, path: Path, name: str) -> int:
    """Size of a plain file in the folder; links are followed, but not out of the folder."""
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # up to Python 3.12
        raise BundleError(
            f"{name!r} in {folder} is a link to itself; copy or export the bundle again"
        ) from error
    if not real.is_relative_to(folder):
        raise BundleError(
            f"{name!r} in {folder} leads out of the bundle, to {real}; put the file itself into the folder"
        )
    status = real.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{name!r} in {folder} is not a plain file; copy or export the bundle again")
    return status.st_size
