"""WAV files: a strict reader of RIFF chunks, without any library.

In: the bytes of a file. Out: a `Wave`, whose samples are read in blocks, as one channel. Knows nothing of
rates that a model wants, and nothing of other formats; what it does not read, ffmpeg may.

Encodings: PCM of 8 (unsigned), 16, 24 and 32 bits, floats of 32 and 64, plain or "extensible", 1 to 8
channels. Channels are averaged.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import RequestError

MAX_CHANNELS = 8
LEAST_RATE, MOST_RATE = 4000, 768_000
_MAX_CHUNKS = 1000
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_WIDTHS = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}
# What follows the format's number in the GUID of an extensible header.
_GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")


class ForeignWavError(RequestError):
    """A WAV file of an encoding that is not read here."""


@dataclass(frozen=True, eq=False)
class Wave:
    """Samples of a WAV file, as they lie in it.

    Attributes:
        rate: samples of one channel per second.
        channels: 1 to 8.
        bits: of a sample.
        is_float: whether samples are floats.
        data: frames, one after the other; a whole number of them.
    """

    rate: int
    channels: int
    bits: int
    is_float: bool
    data: memoryview

    @property
    def frames(self) -> int:
        """Samples of one channel."""
        return len(self.data) // (self.channels * self.bits // 8)

    @property
    def seconds(self) -> float:
        """Length."""
        return self.frames / self.rate

    def mono(self, start: int, stop: int) -> NDArray[np.float64]:
        """The mean of all channels.

        Args:
            start: first frame.
            stop: the one behind the last.

        Returns:
            (stop - start,) float64 within -1 and 1. Floats beyond are cut, as ffmpeg does it.

        Raises:
            RequestError: floats that are no numbers.
        """
        size = self.channels * self.bits // 8
        values = self._decode(self.data[start * size : stop * size])
        mixed: NDArray[np.float64] = values.reshape(-1, self.channels).mean(axis=1, dtype=np.float64)
        return mixed

    def _decode(self, data: memoryview) -> NDArray[np.float64]:
        if self.is_float:
            values = np.frombuffer(data, f"<f{self.bits // 8}").astype(np.float64)
            if not np.isfinite(values).all():
                raise RequestError("the WAV file holds floats that are no numbers; record it again")
            return values.clip(-1.0, 1.0)
        if self.bits == 8:
            return (np.frombuffer(data, np.uint8).astype(np.float64) - 128.0) / 128.0
        if self.bits == 24:
            wide = np.zeros((len(data) // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            return wide.view("<i4").reshape(-1) / 2.0**31
        return np.frombuffer(data, f"<i{self.bits // 8}") / 2.0 ** (self.bits - 1)


def is_wav(data: bytes | memoryview) -> bool:
    """Whether the bytes begin as a WAV file does."""
    head = bytes(data[:12])
    return head[:4] == b"RIFF" and head[8:] == b"WAVE"


def read_wav(data: bytes | memoryview) -> Wave:
    """The format and the samples of a WAV file; nothing is decoded yet.

    A data chunk that announces more than there is ends with the file: programs that write into a pipe do not
    know its size beforehand.

    Args:
        data: of the whole file.

    Raises:
        ForeignWavError: an encoding that is not read here.
        RequestError: not a WAV file, or damaged.
    """
    view = memoryview(data).cast("B")
    if not is_wav(view):
        raise RequestError("these bytes are no WAV file; one begins with RIFF, its size, and WAVE")
    layout: tuple[int, int, int, bool] | None = None
    place = 12
    for _ in range(_MAX_CHUNKS):
        if place + 8 > len(view):
            break
        name, size = bytes(view[place : place + 4]), struct.unpack_from("<I", view, place + 4)[0]
        body = view[place + 8 : place + 8 + size]
        if name == b"fmt ":
            layout = _read_format(bytes(body[:64]))
        elif name == b"data":
            if layout is None:
                raise RequestError("the WAV file has its samples before their format (fmt); it is damaged")
            rate, channels, bits, is_float = layout
            frame = channels * bits // 8
            return Wave(rate, channels, bits, is_float, body[: len(body) // frame * frame])
        place += 8 + size + size % 2
    missing = "samples (data)" if layout is not None else "format (fmt)"
    raise RequestError(f"the WAV file has no {missing}; it is damaged or was cut off")


def _read_format(chunk: bytes) -> tuple[int, int, int, bool]:
    """Rate, channels, bits, and whether samples are floats."""
    if len(chunk) < 16:
        raise RequestError(f"the WAV file's format has {len(chunk)} bytes, must have 16; it is damaged")
    kind, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == _EXTENSIBLE and len(chunk) >= 40:
        kind = struct.unpack_from("<H", chunk, 24)[0] if chunk[26:40] == _GUID_TAIL else kind
    if bits not in _WIDTHS.get(kind, ()):
        raise ForeignWavError(f"the WAV file is of the encoding {kind:#06x} with {bits} bits")
    if not 1 <= channels <= MAX_CHANNELS:
        raise RequestError(f"the WAV file has {channels} channels, must have 1 to {MAX_CHANNELS}")
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise RequestError(f"the WAV file has the rate {rate} Hz, must be {LEAST_RATE} to {MOST_RATE}")
    if frame != channels * bits // 8:
        raise RequestError(
            f"the WAV file says that a frame has {frame} bytes, but {channels} channels of {bits} bits have "
            f"{channels * bits // 8}; it is damaged"
        )
    return rate, channels, bits, kind == _FLOAT
