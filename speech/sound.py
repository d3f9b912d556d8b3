"""A sound: what a speech model is given, however it came.

In: the bytes of a file. Out: `Sound`, one channel at 16 kHz. Knows which reader is for which file; knows
nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import RequestError

from .ffmpeg import decode
from .resample import resample
from .wav import ForeignWavError, is_wav, read_wav

RATE = 16_000
"""Samples per second: what Whisper hears."""
LEAST_SECONDS = 0.1
FORMATS = (
    "wav",
    "mp3",
    "flac",
    "ogg",
    "opus",
    "oga",
    "m4a",
    "mp4",
    "webm",
    "aac",
    "aiff",
    "amr",
    "caf",
    "mpga",
)


@dataclass(frozen=True, eq=False)
class Sound:
    """Something to listen to.

    Attributes:
        samples: (N,) float32 at 16 kHz, finite, within -1 and 1.
    """

    samples: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.samples.ndim != 1 or self.samples.dtype != np.float32:
            raise RequestError(
                f"samples are {self.samples.dtype} of the shape {self.samples.shape}, must be float32 (N,)"
            )
        if self.seconds < LEAST_SECONDS:
            raise RequestError(
                f"the sound has {self.seconds:.3f} seconds, must have at least {LEAST_SECONDS}"
            )

    @property
    def seconds(self) -> float:
        """Length."""
        return self.samples.size / RATE


def read_sound(data: bytes | memoryview, *, max_seconds: float) -> Sound:
    """Decode a file: PCM in WAV here, all else through ffmpeg.

    Args:
        data: of the whole file.
        max_seconds: longer sounds are refused; of WAV files before anything is decoded.

    Raises:
        DependencyError: ffmpeg is needed and not there.
        RequestError: the file cannot be read, holds no sound, or is too long.
    """
    if not len(data):
        raise RequestError("the sound has no bytes; send the content of a file")
    if is_wav(data):
        try:
            wave = read_wav(data)
        except ForeignWavError:
            return _through_ffmpeg(data, max_seconds)
        _check_length(wave.seconds, max_seconds)
        samples = resample(wave.mono, wave.frames, wave.rate, RATE)
        # A filter swings over a little where a sound is at its limits.
        return Sound(samples.clip(-1.0, 1.0))
    return _through_ffmpeg(data, max_seconds)


def _through_ffmpeg(data: bytes | memoryview, max_seconds: float) -> Sound:
    samples = decode(data, rate=RATE, max_seconds=max_seconds)
    _check_length(samples.size / RATE, max_seconds)
    return Sound(np.nan_to_num(samples, nan=0.0).clip(-1.0, 1.0))


def _check_length(seconds: float, most: float) -> None:
    if seconds > most:
        raise RequestError(f"the sound has more than {most:g} seconds; send a shorter one")
