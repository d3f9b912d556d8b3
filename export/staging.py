"""The place where a bundle grows before it is put in its place in one step.

In: the output path. Out: a locked folder beside it, and a rename at the end. Knows nothing of what a bundle
holds.

    OUT                  absent, or a complete bundle; never anything in between
    OUT.partial/lock     held by the process that is exporting; freed when that process ends, however it ends
    OUT.partial/journal  what is finished
    OUT.partial/bundle/  the files; nobody is given this path, so an unfinished bundle is never loaded
    OUT.partial/old/     the bundle that is being replaced, between the two renames of `publish`
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from autoglm_edge.errors import ExportError
from autoglm_edge.files import try_lock
from autoglm_edge.runtime.manifest import MANIFEST_NAME

SUFFIX = ".partial"
MARGIN_BYTES = 16 << 20
"""Left free on top of what a bundle needs: the journal, and what a file system takes for itself."""


class Staging:
    """OUT.partial, locked. A context manager: leaving it frees the lock and keeps the files.

    Attributes:
        output: where the bundle will be.
        folder: OUT.partial.
        bundle: the folder that will become `output`.
        journal: the file that tells what is finished.
    """

    def __init__(self, output: Path) -> None:
        if not output.name:
            raise ExportError(f"{output} cannot be an output folder; name a folder that does not exist yet")
        self.output = output
        self.folder = output.with_name(output.name + SUFFIX)
        self.bundle = self.folder / "bundle"
        self.journal = self.folder / "journal"
        self._old = self.folder / "old"
        self._lock_path = self.folder / "lock"
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        self._take_lock()
        try:
            if self._old.is_dir():
                if _is_filled(self.output):
                    shutil.rmtree(self._old)  # a crash after the second rename of publish
                else:
                    os.rename(self._old, self.output)  # a crash between the two
            self.bundle.mkdir(exist_ok=True)
        except BaseException:
            self._free_lock()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._free_lock()

    @property
    def allocated_bytes(self) -> int:
        """Disk space that the files of an earlier attempt hold already."""
        return (
            sum(entry.stat().st_blocks * 512 for entry in self.bundle.iterdir())
            if self.bundle.is_dir()
            else 0
        )

    def discard(self) -> None:
        """Forget an earlier attempt."""
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.bundle)
        self.bundle.mkdir()

    def publish(self) -> None:
        """Put the finished bundle in place, replacing what is there, and tidy up.

        What is at `output` at any moment is the old bundle, nothing, or the new one.
        """
        sync_folder(self.bundle)
        if _is_filled(self.output):
            os.rename(self.output, self._old)
        os.rename(self.bundle, self.output)
        sync_folder(self.output.parent)
        self.tidy()

    def tidy(self) -> None:
        """Remove OUT.partial and all in it, when there is something at OUT.

        The lock goes last but for the folder, so that nobody finds the folder unlocked and half removed.
        """
        for path in (self._old, self.bundle):
            shutil.rmtree(path, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        self._lock_path.unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            return  # someone else has begun an export here in the meantime

    def _take_lock(self) -> None:
        while self._lock is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ExportError(
                    f"{self.folder} cannot be made, where the bundle would grow "
                    f"({error.strerror or error}); choose another output folder"
                ) from error
            try:
                handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # the other process tidied up between the two calls
            if not _is_ours(handle):
                os.close(handle)
                raise ExportError(
                    f"another process is exporting to {self.output} (it holds {self._lock_path}); "
                    "wait for it, or choose another output folder"
                )
            try:
                same = os.path.samestat(os.fstat(handle), os.stat(self._lock_path))
            except FileNotFoundError:
                same = False
            if same:
                self._lock = handle
            else:
                os.close(handle)  # a file that its owner has just removed; the next one counts

    def _free_lock(self) -> None:
        handle, self._lock = self._lock, None
        if handle is not None:
            os.close(handle)


def check_output(output: Path, *, force: bool, begun: bool = False) -> None:
    """Check that a bundle may be put at `output`.

    Args:
        output: where it would go.
        force: whether a bundle may be replaced.
        begun: whether an interrupted export waits to be continued, which the error then mentions.

    Raises:
        ExportError: something is there that must not be replaced, or not without `force`.
    """
    if output.is_symlink():  # a path in which all links were followed can only be a link in a circle
        raise ExportError(f"{output} is a link that leads nowhere; remove it, or name another output folder")
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"{output} is a file; name a folder that does not exist yet")
    present = {entry.name for entry in output.iterdir()}
    if not present:
        return
    strangers = sorted(present - bundle_names(output))
    if strangers:
        what = "is not a bundle" if MANIFEST_NAME not in present else "holds more than a bundle"
        raise ExportError(
            f"{output} exists and {what} (it has {strangers[0]!r}), so it is not replaced; "
            "choose another output folder, or move it away"
        )
    if not force:
        how = "--resume --force, which continues the interrupted export" if begun else "--force"
        raise ExportError(f"{output} exists; choose another output folder, or replace it with {how}")


def check_apart(output: Path, checkpoint: Path) -> None:
    """Refuse to write into the checkpoint.

    Raises:
        ExportError: the output is the checkpoint folder or lies in it.
    """
    source = Path(os.path.realpath(checkpoint))
    if output == source or source in output.parents:
        raise ExportError(
            f"the output {output} lies in the checkpoint folder {source}; choose one outside of it"
        )


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def bundle_names(folder: Path) -> set[str]:
    """Names that belong to the bundle in this folder, by its own account; none if it is no bundle."""
    try:
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
        if not str(document["created_by"]).startswith("autoglm-edge "):
            return set()
        return {MANIFEST_NAME, *(str(entry["path"]) for entry in document["files"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the closest one above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _is_ours(handle: int) -> bool:
    """Whether the lock could be taken; a file system without locks counts as taken by another."""
    try:
        return try_lock(handle)
    except OSError:
        return False


def write_file(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
