"""Sounds in other formats than WAV, through the ffmpeg program.

In: the bytes of a file. Out: samples. Knows nothing of formats but which readers ffmpeg may use.

The file may come from a stranger, and ffmpeg is a large program, so it gets little: the bytes on its standard
input, no protocol but that one (no file and no address is opened, whatever a playlist says), only readers of
sound files, one thread, and limits of time, memory, output and files. It sees no variable of the environment
but where programs are.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import DependencyError, RequestError

SECONDS = 30.0
"""That a file may take."""
_MEMORY_BYTES = 2_000_000_000
_READERS = "aac,aiff,amr,au,caf,flac,matroska,mov,mp3,ogg,wav,w64"
_PIECE = 1 << 16


def has_ffmpeg() -> bool:
    """Whether the program is there."""
    return shutil.which("ffmpeg") is not None


def decode(data: bytes | memoryview, *, rate: int, max_seconds: float) -> NDArray[np.float32]:
    """The first sound track of a file, all channels mixed into one.

    Args:
        data: of the whole file.
        rate: samples per second that are wanted.
        max_seconds: after which nothing more is decoded.

    Returns:
        (N,) float32, at most one second more than `max_seconds`.

    Raises:
        DependencyError: there is no ffmpeg.
        RequestError: it cannot read the file, or takes too long.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise DependencyError(
            "sound in other formats than WAV needs the program ffmpeg, which is not installed; install it, "
            "or send a WAV file (PCM)"
        )
    most = int((max_seconds + 1.0) * rate) * 4
    process = subprocess.Popen(
        _command(program, data, rate, max_seconds + 1.0, most),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        start_new_session=True,
    )
    with process:
        samples, complaint, in_time = _converse(process, data, most)
    if not in_time:
        raise RequestError(f"the sound could not be decoded within {SECONDS:g} seconds; send a shorter one")
    if process.returncode != 0 and not samples:
        raise RequestError(
            f"the sound cannot be decoded{_reason(complaint)}; send WAV, MP3, FLAC, Ogg, M4A or WebM"
        )
    return np.frombuffer(samples, "<f4", count=len(samples) // 4)


def _command(program: str, data: bytes | memoryview, rate: int, seconds: float, most: int) -> list[str]:
    # An MP4 file may have its table of contents at the end: ffmpeg must go back, so what it has read is kept
    # in a temporary file of its own, which has no name once it is open.
    is_mp4 = bytes(data[4:8]) == b"ftyp"
    source = ["-read_ahead_limit", "-1", "-i", "cache:pipe:0"] if is_mp4 else ["-i", "pipe:0"]
    protocols = "cache,pipe" if is_mp4 else "pipe"
    return [
        program,
        *("-nostdin", "-hide_banner", "-loglevel", "error", "-threads", "1"),
        *("-protocol_whitelist", protocols, "-format_whitelist", _READERS),
        *source,
        *("-map", "0:a:0", "-vn", "-sn", "-dn", "-map_metadata", "-1"),
        *("-t", f"{seconds:.3f}", "-fs", str(most)),
        # Without this bound two equal channels become one that is 1.4 times as loud, and may be cut.
        *("-af", "aresample=rematrix_maxval=1.0"),
        *("-ac", "1", "-ar", str(rate), "-f", "f32le", "pipe:1"),
    ]


def _converse(
    process: subprocess.Popen[bytes], data: bytes | memoryview, most: int
) -> tuple[bytes, bytes, bool]:
    """Write the file, read samples; what was said, and whether there was time enough."""
    _limit(process.pid, len(data))
    into, out, said = process.stdin, process.stdout, process.stderr
    assert into is not None and out is not None and said is not None, "all three are pipes"
    complaint = bytearray()
    ended = threading.Event()

    def feed() -> None:
        with contextlib.suppress(OSError), into:  # it stops reading when it has seen enough
            into.write(data)

    def listen() -> None:
        while piece := said.read(_PIECE):
            complaint.extend(piece[: max(0, 4096 - len(complaint))])

    def watch() -> None:
        if not ended.wait(SECONDS):
            process.kill()

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=feed), threading.Thread(target=listen), watcher]
    for thread in threads:
        thread.start()
    samples = bytearray()
    try:
        while piece := out.read(_PIECE):
            samples += piece
            if len(samples) > most:
                break
    finally:
        in_time = watcher.is_alive()
        if len(samples) > most:
            process.kill()
        ended.set()
        out.close()
        for thread in threads:
            thread.join()
        process.wait()
    return bytes(samples[:most]), bytes(complaint), in_time


def _limit(process: int, size: int) -> None:
    """What the child may take of the machine; where the system offers that."""
    if sys.platform != "linux":
        return
    import resource

    limits = (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, int(SECONDS) + 1),
        (resource.RLIMIT_FSIZE, size + 1_000_000),
        (resource.RLIMIT_CORE, 0),
    )
    for name, most in limits:
        with contextlib.suppress(OSError, ValueError):  # it may have ended, or be limited further already
            resource.prlimit(process, name, (most, most))


def _reason(complaint: bytes) -> str:
    """The last thing that ffmpeg said, if it is something to be read."""
    lines = complaint.decode("ascii", "replace").strip().splitlines()
    said = (
        re.sub(r"^\[[^\]]*\] ", "", lines[-1]).removeprefix("cache:").removeprefix("pipe:0: ")
        if lines
        else ""
    )
    clean = "".join(letter for letter in said if letter.isprintable() and letter.isascii())[:120].strip()
    return f" ({clean})" if clean else ""
