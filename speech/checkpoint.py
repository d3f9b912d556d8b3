"""Where the checkpoint of a speech model is: a path, or a known name that may be fetched.

In: what the user wrote. Out: a file. Knows the names that openai-whisper has, and nothing of what is in a
file. Only `fetch` goes to the network, and only for a name.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from autoglm_edge.errors import CheckpointError, DependencyError, RequestError

HOST = "https://openaipublic.azureedge.net/main/whisper/models"
_PIECE = 1 << 20
_TIMEOUT_SECONDS = 30.0

Tell = Callable[[str, int, int], None]
"""Is told of a download: stage, bytes so far, bytes in all."""

# SHA-256 of each file, which is also where it lies (openai-whisper 20250625).
_LARGE_V3 = ("large-v3", "e5b1a55b89c1367dacf97e3e19bfd829a01529dbfdeefa8caeb59b3f1b81dadb")
_TURBO = ("large-v3-turbo", "aff26ae408abcba5fbf8813c21e62b0941638c5f6eebfb145be0c9839262a19a")
KNOWN: Mapping[str, tuple[str, str]] = {
    "tiny.en": ("tiny.en", "d3dd57d32accea0b295c96e26691aa14d8822fac7d9d27d5dc00b4ca2826dd03"),
    "tiny": ("tiny", "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9"),
    "base.en": ("base.en", "25a8566e1d0c1e2231d1c762132cd20e0f96a85d16145c3a00adf5d1ac670ead"),
    "base": ("base", "ed3a0b6b1c0edf879ad9b11b1af5a0e6ab5db9205f891f668f8b0e6c6326e34e"),
    "small.en": ("small.en", "f953ad0fd29cacd07d5a9eda5624af0f6bcf2258be67c92b79389873d91e0872"),
    "small": ("small", "9ecf779972d90ba49c06d968637d720dd632c55bbf19d441fb42bf17a411e794"),
    "medium.en": ("medium.en", "d7440d1dc186f76616474e0ff0b3b6b879abc9d1a4926b7adfa41db2d497ab4f"),
    "medium": ("medium", "345ae4da62f9b3d59415adc60127b97c714f32e89e936602e85993674d08dcb1"),
    "large-v1": ("large-v1", "e4b87e7e0bf463eb8e6956e646f1e277e901512310def2c24bf0e11bd3c28e9a"),
    "large-v2": ("large-v2", "81f7c96c852ee8fc832187b0132e569d6c3065a3252ed18e56effd0b6a73e524"),
    "large-v3": _LARGE_V3,
    "large": _LARGE_V3,
    "large-v3-turbo": _TURBO,
    "turbo": _TURBO,
}
"""File name and hash by the names that a user may write."""


@dataclass(frozen=True)
class SpeechCheckpoint:
    """A checkpoint of openai-whisper.

    Attributes:
        name: a known one, or of the file, without its ending.
        path: of the file.
        known: whether it is one of `KNOWN`.
    """

    name: str
    path: Path
    known: bool

    @property
    def is_there(self) -> bool:
        """Whether the file exists."""
        return self.path.is_file()


def check_installed() -> None:
    """Say early that the extra is missing; nothing is imported.

    Raises:
        DependencyError: it is.
    """
    for package in ("whisper", "torch"):
        if find_spec(package) is None:
            raise DependencyError(
                f"speech needs the package {'openai-whisper' if package == 'whisper' else package}, which is "
                'not installed; run pip install "autoglm-edge[speech]"'
            )


def find_checkpoint(name_or_path: str, folder: Path | None = None) -> SpeechCheckpoint:
    """The checkpoint that is meant. A known name wins over a file of that name; write ./base for the file.

    Args:
        name_or_path: one of `KNOWN`, or a path.
        folder: where files of known names are; default openai-whisper's own.

    Raises:
        CheckpointError: no known name, and there is no such file.
    """
    if name_or_path in KNOWN:
        file = KNOWN[name_or_path][0]
        return SpeechCheckpoint(name_or_path, (folder or cache_folder()) / f"{file}.pt", known=True)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        what = "is a folder, must be the file of a checkpoint (.pt)" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"the speech model {name_or_path!r} {what}; give such a file, or one of {', '.join(KNOWN)}"
        )
    return SpeechCheckpoint(path.stem, path, known=False)


def cache_folder() -> Path:
    """Where openai-whisper keeps what it fetched."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "whisper"


def fetch(checkpoint: SpeechCheckpoint, tell: Tell = lambda *_: None, *, host: str = HOST) -> None:
    """Download the file of a known name, unless it is there. It appears at once and whole, or not at all.

    Args:
        checkpoint: from `find_checkpoint`.
        tell: is told how far it is.
        host: where the files lie.

    Raises:
        RequestError: the checkpoint is a path.
        CheckpointError: it cannot be had, or is not what it should be.
    """
    if checkpoint.is_there:
        return
    if not checkpoint.known:
        raise RequestError(f"{checkpoint.path} is a path, and paths are not downloaded; use one of the names")
    file, digest = KNOWN[checkpoint.name]
    url = f"{host}/{digest}/{file}.pt"
    partial = checkpoint.path.with_suffix(f".{os.getpid()}.partial")
    try:
        checkpoint.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = _download(url, partial, tell)
            if found != digest:
                raise CheckpointError(
                    f"{url} gave a file with the SHA-256 {found[:12]}..., must be {digest[:12]}...; try again"
                )
            partial.replace(checkpoint.path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"the speech model {checkpoint.name} is not at {checkpoint.path} and cannot be downloaded from "
            f"{url} ({error}); put the file there, or give the path of one"
        ) from error


def _download(url: str, path: Path, tell: Tell) -> str:
    """Write a file and give its SHA-256."""
    digest, done = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as source, path.open("wb") as file:
        total = int(source.headers.get("Content-Length") or 0)
        while piece := source.read(_PIECE):
            file.write(piece)
            digest.update(piece)
            done += len(piece)
            tell("speech model", done, total)
    return digest.hexdigest()
