"""Sounds and listeners for tests: WAV files in every encoding, speech by espeak-ng, a listener from a script.

`tests/command.wav` is what espeak-ng 1.51 says for "open the settings", at 16 kHz:
    espeak-ng -w said.wav "open the settings" && ffmpeg -i said.wav -ar 16000 -bitexact tests/command.wav
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoglm_edge.speech.sound import Sound
from autoglm_edge.speech.transcript import HearingOptions, Segment, Transcript, Word

COMMAND = Path(__file__).parent / "command.wav"
COMMAND_TEXT = "open the settings"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="there is no espeak-ng here")
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="there is no ffmpeg here")

_EXTENSIBLE_TAIL = bytes.fromhex("000000001000800000aa00389b71")


def wav(
    samples: Any,
    rate: int = 16000,
    bits: int = 16,
    *,
    is_float: bool = False,
    extensible: bool = False,
    before: bytes = b"",
    announced: int | None = None,
) -> bytes:
    """A WAV file.

    Args:
        samples: (N,) or (N, channels) within -1 and 1.
        rate: per second.
        bits: of a sample.
        is_float: whether samples are floats.
        extensible: whether the format is told in the long form.
        before: chunks between format and samples.
        announced: size of the data chunk as its header has it, if not the true one.
    """
    values = np.asarray(samples, np.float64)
    values = values.reshape(len(values), -1)
    data = encoded(values, bits, is_float=is_float)
    kind = 3 if is_float else 1
    channels = values.shape[1]
    frame = channels * bits // 8
    layout = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * frame, frame, bits)
    if extensible:
        layout += struct.pack("<HHIH", 22, bits, 0, kind) + _EXTENSIBLE_TAIL
    body = b"fmt " + struct.pack("<I", len(layout)) + layout + before
    body += b"data" + struct.pack("<I", len(data) if announced is None else announced) + data
    return b"RIFF" + struct.pack("<I", (4 + len(body)) % 2**32) + b"WAVE" + body


def encoded(values: np.ndarray[Any, Any], bits: int, *, is_float: bool) -> bytes:
    """Samples as the bytes of a file."""
    if is_float:
        return values.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return (np.round(values * 127) + 128).astype(np.uint8).tobytes()
    whole = np.round(values * (2 ** (bits - 1) - 1)).astype("<i8").reshape(-1, 1)
    return whole.view(np.uint8)[:, : bits // 8].tobytes()


def tone(seconds: float = 1.0, rate: int = 16000, hz: Sequence[float] = (440.0, 1000.0)) -> Any:
    """(N,) float64: a sum of sines, half as loud as can be."""
    time = np.arange(int(seconds * rate)) / rate
    return np.sum([np.sin(2 * np.pi * pitch * time + pitch) for pitch in hz], axis=0) / (2 * len(hz))


def say(text: str, *, speed: int = 160, pitch: int = 50) -> bytes:
    """A WAV file in which espeak-ng says a text; from a pipe, so it announces more than there is."""
    command = ["espeak-ng", "-s", str(speed), "-p", str(pitch), "--stdout", text]
    return subprocess.run(command, capture_output=True, check=True).stdout


def convert(data: bytes, *options: str) -> bytes:
    """The same sound in another format, by ffmpeg."""
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", "pipe:0", *options, "pipe:1"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def transcript(text: str = COMMAND_TEXT, seconds: float = 1.3, language: str = "en") -> Transcript:
    """What a listener may say: one segment, its words of equal length."""
    pieces = text.split()
    each = 1.2 / max(1, len(pieces))
    words = tuple(
        Word(f" {piece}", round(index * each, 2), round((index + 1) * each, 2))
        for index, piece in enumerate(pieces)
    )
    segment = Segment(0, 0.0, 1.2, f" {text}", (1, 2, 3), 0.0, -0.25, 1.1, 0.01, words)
    return Transcript(text, language, (segment,), seconds)


class ScriptedListener:
    """The interface of `Listener`: says what the script says.

    Attributes:
        script: texts of the next sounds, the last one for ever.
        gate: every sound waits for it; open unless a test closes it.
        begun: options of the sounds that were begun, and their seconds.
        cancelled: how many were.
        error: raised if it is set.
    """

    name = "tiny"

    def __init__(self, *script: str) -> None:
        self.script = list(script) or [COMMAND_TEXT]
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[tuple[HearingOptions, float]] = []
        self.cancelled = 0
        self.error: BaseException | None = None
        self.answer: Callable[[Sound], Transcript] | None = None

    def transcribe(
        self, sound: Sound, options: HearingOptions, cancel: threading.Event | None = None
    ) -> Transcript | None:
        self.begun.append((options, sound.seconds))
        while not self.gate.wait(0.005):
            if cancel is not None and cancel.is_set():
                self.cancelled += 1
                return None
        if self.error is not None:
            raise self.error
        if self.answer is not None:
            return self.answer(sound)
        text = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return transcript(text, sound.seconds, options.language or "en")
