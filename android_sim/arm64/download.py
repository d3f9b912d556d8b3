"""Fetches one file: checked by size and SHA-256, going on where an interrupted one stopped.

In: an address, what the file must be, and where it goes. Out: the file, whole. Knows nothing of what it is.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.machine.prepared import Tell

TIMEOUT_SECONDS = 60
ATTEMPTS = 4
"""Times that a connection may break; each goes on where the one before stopped."""
PIECE_BYTES = 1 << 18
_SCHEMES = ("https:", "http:", "file:")


def read_small(url: str, limit_bytes: int) -> bytes:
    """A small file, whole.

    Args:
        url: https, http or file.
        limit_bytes: most it may have.

    Raises:
        SimulationError: it cannot be had, or is larger.
    """
    try:
        with _open(url, 0) as answer:
            content = answer.read(limit_bytes + 1)
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, error) from error
    if len(content) > limit_bytes:
        raise SimulationError(f"{url} has more than {limit_bytes} bytes, so it is not what it should be")
    return content


def download(url: str, target: Path, *, size_bytes: int, sha256: str, stage: str, tell: Tell) -> None:
    """Fetch a file, unless it is there already.

    Args:
        url: https, http or file.
        target: where it goes; `target.part` grows first, and is gone on with if it is there.
        size_bytes: what it must have.
        sha256: what it must have, in hex.
        stage: shown with the progress.
        tell: told of the progress.

    Raises:
        SimulationError: the network or the disk refuses, or the file is not the one that was meant.
    """
    if target.is_file() and target.stat().st_size == size_bytes and digest_of(target) == sha256:
        return
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        begun_before = part.exists()
        _fill(url, part, size_bytes, stage, tell)
        if begun_before and digest_of(part) != sha256:  # it may have been begun with another version
            part.unlink()
            _fill(url, part, size_bytes, stage, tell)
        if (found := digest_of(part)) != sha256:
            part.unlink()
            raise SimulationError(
                f"{url} has the SHA-256 {found}, the index says {sha256}; try again later, or another mirror"
            )
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(
            error, (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)
        ):
            raise _unreachable(url, error) from error
        raise SimulationError(
            f"{target} cannot be written ({error.strerror or error}); "
            "free some space, or set AUTOGLM_EDGE_CACHE to another folder"
        ) from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(url: str, part: Path, size_bytes: int, stage: str, tell: Tell) -> None:
    """Bring `part` to its size."""
    broken: Exception | None = None
    for _ in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        if have > size_bytes:
            part.unlink()
            have = 0
        if have == size_bytes:
            return
        try:
            with _open(url, have) as answer, part.open("ab") as file:
                if have and getattr(answer, "status", None) != http.client.PARTIAL_CONTENT:
                    file.truncate(0)  # a server that knows no ranges begins anew
                    have = 0
                _copy(answer, file, have, size_bytes, stage, tell)
        except urllib.error.HTTPError:
            raise
        except (http.client.HTTPException, ConnectionError, TimeoutError, urllib.error.URLError) as error:
            broken = error
    if part.exists() and part.stat().st_size == size_bytes:
        return
    if broken is not None:
        raise broken
    raise http.client.HTTPException(f"it ends before its {size_bytes} bytes")


def _copy(answer: IO[bytes], file: IO[bytes], have: int, size_bytes: int, stage: str, tell: Tell) -> None:
    while piece := answer.read(PIECE_BYTES):
        file.write(piece)
        have += len(piece)
        tell.show(stage, min(have, size_bytes), size_bytes)
        if have > size_bytes:  # a mirror that never ends is not to fill the disk
            return


def _open(url: str, start: int) -> IO[bytes]:
    if not url.startswith(_SCHEMES):
        raise SimulationError(f"{url} is no address; it must begin with https://")
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    answer: IO[bytes] = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    return answer


def _unreachable(url: str, error: Exception) -> SimulationError:
    reason = getattr(error, "reason", None) or error
    return SimulationError(
        f"{url} cannot be fetched ({reason}); connect to the network, or name a mirror that you can reach"
    )
