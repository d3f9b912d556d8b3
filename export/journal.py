"""Remembers across a crash which weights are on disk: an append-only file of JSON lines.

In: names of finished weights. Out: the same names, after a restart. Knows nothing of what the names mean.

The first line holds the fingerprint of the plan, as finished weights are worth nothing to another plan. A
line counts once it ends in a newline; a torn last line is what a crash leaves, and is dropped.

    {"journal": 1, "fingerprint": "9c1e...", "about": "AutoGLM-Phone-9B as int4"}
    {"part": "decoder", "finished": ["lm_head.weight_data"]}
    {"manifest_sha256": "51ab..."}
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoglm_edge.errors import ExportError

VERSION = 1


@dataclass(frozen=True)
class Entries:
    """What a journal says.

    Attributes:
        fingerprint: of the plan that was being carried out.
        about: for people: model and recipe.
        finished: per part, the first piece name of each weight that is on disk.
        manifest_sha256: digest of the manifest, once the bundle was complete and about to be put in place.
        size_bytes: length of the lines that count.
    """

    fingerprint: str
    about: str
    finished: dict[str, set[str]] = field(default_factory=dict)
    manifest_sha256: str | None = None
    size_bytes: int = 0

    @property
    def count(self) -> int:
        """Weights that are on disk."""
        return sum(len(names) for names in self.finished.values())


def read_journal(path: Path) -> Entries | None:
    """Read a journal; None if there is none, or not even its first line was completed.

    Raises:
        ExportError: the file is there, but is no journal of this release.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
    lines = content.split(b"\n")[:-1]
    if not lines:
        return None
    try:
        return _parse(lines)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(
            f"{path} is no export journal of this release ({type(error).__name__}); start over with --force"
        ) from error


def _parse(lines: Sequence[bytes]) -> Entries:
    header: dict[str, Any] = json.loads(lines[0])
    if header["journal"] != VERSION:
        raise ValueError(header["journal"])
    finished: dict[str, set[str]] = {}
    manifest_sha256 = None
    for line in lines[1:]:
        document: dict[str, Any] = json.loads(line)
        if "manifest_sha256" in document:
            manifest_sha256 = str(document["manifest_sha256"])
        else:
            finished.setdefault(document["part"], set()).update(document["finished"])
    size = sum(len(line) + 1 for line in lines)
    return Entries(str(header["fingerprint"]), str(header["about"]), finished, manifest_sha256, size)


class Journal:
    """The journal of a running export, open for appending. A context manager."""

    def __init__(self, path: Path, fingerprint: str, about: str, entries: Entries | None = None) -> None:
        """Begin a journal, or go on with the one that `entries` was read from."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        self._handle = os.open(path, flags, 0o644)
        try:
            os.ftruncate(self._handle, entries.size_bytes if entries else 0)
            if entries is None:
                self._append({"journal": VERSION, "fingerprint": fingerprint, "about": about})
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._handle)

    def record(self, part: str, names: Sequence[str]) -> None:
        """Note weights whose bytes are on disk."""
        self._append({"part": part, "finished": list(names)})

    def record_manifest(self, sha256: str) -> None:
        """Note that the bundle is complete and has this manifest."""
        self._append({"manifest_sha256": sha256})

    def _append(self, document: dict[str, Any]) -> None:
        line = (json.dumps(document) + "\n").encode()
        while line:
            line = line[os.write(self._handle, line) :]
        os.fsync(self._handle)
