"""A Whisper model that hears: loaded when the first sound comes, one sound at a time.

In: a checkpoint, then sounds. Out: transcripts. The only module that imports whisper and torch, and not
before they are needed. Knows nothing of files of sound and of HTTP.

A sound is heard in windows of 30 seconds, each a run of the encoder and up to 224 runs of the decoder, some
of them again at higher temperatures. Who cancels waits for one of these runs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, Literal

from autoglm_edge.errors import CheckpointError, DependencyError, DeviceError, RequestError

from .checkpoint import SpeechCheckpoint
from .sound import Sound
from .transcript import HearingOptions, Segment, Transcript, Word

LADDER = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Temperatures that are tried one after the other, as openai-whisper does it."""
VOCABULARIES = (51864, 51865, 51866)
"""Sizes that Whisper's tokenizers have: English, 99 languages, 100 languages."""
FRAMES = 1500
"""Positions of the encoder: a window of 30 seconds."""
_SPARE_RUNS = 20
_RUNS_PER_SECOND = 2
_SEED = 0


class _CancelledError(Exception):
    """Nobody waits for this transcript any more."""


class Recogniser:
    """A speech model. For several threads, which wait for each other.

    Attributes:
        checkpoint: what is loaded when it is needed.
    """

    def __init__(
        self, checkpoint: SpeechCheckpoint, *, device: Literal["cpu", "cuda"] = "cpu", threads: int = 0
    ) -> None:
        """Prepare; nothing is loaded.

        Args:
            checkpoint: its file is there.
            device: where to compute.
            threads: of the CPU; 0 leaves it to torch. They are the same for the whole process.
        """
        self.checkpoint = checkpoint
        self._device = device
        self._threads = threads
        self._lock = threading.Lock()
        self._model: Any = None
        self._cancel: threading.Event | None = None
        self._runs_left = 0

    @property
    def name(self) -> str:
        """Of the model."""
        return self.checkpoint.name

    @property
    def is_loaded(self) -> bool:
        """Whether a sound has come."""
        return self._model is not None

    def transcribe(
        self, sound: Sound, options: HearingOptions, cancel: threading.Event | None = None
    ) -> Transcript | None:
        """What is said in a sound. The same sound and options give the same text.

        Args:
            sound: of any length; its spectrogram is in memory as a whole.
            options: how to listen.
            cancel: ends it within one run of a graph when it is set.

        Returns:
            The transcript; None if it was cancelled.

        Raises:
            RequestError: the model does not know the language, or goes round in circles.
            CheckpointError: the model cannot be loaded.
            DependencyError: openai-whisper is not installed.
            DeviceError: the device is not there, or out of memory.
        """
        with self._lock:
            if cancel is not None and cancel.is_set():
                return None
            model = self._load()
            self._check_language(model, options.language)
            self._cancel = cancel
            self._runs_left = _SPARE_RUNS + math.ceil(sound.seconds * _RUNS_PER_SECOND)
            try:
                found = self._run(model, sound, options)
            except _CancelledError:
                return None
            finally:
                self._cancel = None
        return _transcript_of(found, sound.seconds)

    def _run(self, model: Any, sound: Sound, options: HearingOptions) -> Mapping[str, Any]:
        import torch

        on_gpu = self._device == "cuda"
        try:
            # Some temperatures draw lots; with the same ones a sound is always heard in the same way.
            with torch.random.fork_rng():
                torch.manual_seed(_SEED)
                found: Mapping[str, Any] = model.transcribe(
                    sound.samples,
                    language=options.language,
                    # tiktoken refuses what looks like one of its special tokens; a space makes it letters.
                    initial_prompt=options.prompt.replace("<|", "< |") or None,
                    temperature=options.temperature or LADDER,
                    word_timestamps=options.words,
                    fp16=on_gpu,
                )
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceError(
                f"the GPU has no memory left for the speech model {self.name}; hear on the CPU"
            ) from error
        return found

    def _check_language(self, model: Any, language: str | None) -> None:
        if language is None:
            return
        if not model.is_multilingual and language != "en":
            raise RequestError(
                f"language is {language!r}, but the speech model {self.name} hears English only"
            )
        if language == "yue" and model.num_languages < 100:
            raise RequestError(f"language is 'yue', which the speech model {self.name} does not know; use zh")

    def _load(self) -> Any:
        if self._model is not None:
            return self._model
        try:
            import torch
            import whisper  # type: ignore[import-untyped]  # it ships no types
        except ModuleNotFoundError as error:
            raise DependencyError(
                f"speech needs the package {error.name}, which is not installed; "
                'run pip install "autoglm-edge[speech]"'
            ) from error
        if self._device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("the speech model is to run on a GPU, and torch sees none; use the CPU")
        if self._threads:
            torch.set_num_threads(self._threads)
        path, name = self.checkpoint.path, self.checkpoint.name
        try:
            # By its path: by its name whisper would go to the network if the file has changed.
            model = whisper.load_model(str(path), device=self._device)
            if self.checkpoint.known:
                model.set_alignment_heads(whisper._ALIGNMENT_HEADS[name])
        # A damaged or foreign file sets off errors of many types: pickle's, zip's, torch's, missing keys.
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path} is no checkpoint of openai-whisper ({type(error).__name__}: {said})"
            ) from error
        _check_dimensions(model.dims, str(path))
        model.eval()
        model.encoder.register_forward_pre_hook(self._before_encoder)
        model.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        self._model = model
        return model

    def _before_encoder(self, *_: Any) -> None:
        self._runs_left -= 1

    def _before_decoder(self, module: Any, inputs: Any, options: Mapping[str, Any]) -> None:
        if options.get("kv_cache") is None:
            return  # a single run, in which whisper looks for times, and after which it must clean up
        if self._cancel is not None and self._cancel.is_set():
            raise _CancelledError
        if self._runs_left < 0:
            raise RequestError(
                f"the speech model {self.name} gets nowhere in this sound; cut it, or no times of words"
            )


def _check_dimensions(dims: Any, where: str) -> None:
    """What openai-whisper takes for granted, and would fail at later or read nonsense from."""
    checks = (
        ("n_vocab", VOCABULARIES),
        ("n_audio_ctx", (FRAMES,)),
        ("n_mels", (80, 128)),
    )
    for name, allowed in checks:
        value = getattr(dims, name)
        if value not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise CheckpointError(f"{where} has {name} {value}, must be {wanted}; it is no Whisper model")


def _transcript_of(found: Mapping[str, Any], seconds: float) -> Transcript:
    segments = tuple(map(_segment_of, found["segments"]))
    return Transcript(str(found["text"]).strip(), str(found["language"]), segments, seconds)


def _segment_of(found: Mapping[str, Any]) -> Segment:
    words = tuple(
        Word(str(word["word"]), round(float(word["start"]), 3), round(float(word["end"]), 3))
        for word in found.get("words", ())
    )
    return Segment(
        seek=int(found["seek"]),
        start=round(float(found["start"]), 3),
        end=round(float(found["end"]), 3),
        text=str(found["text"]),
        tokens=tuple(map(int, found["tokens"])),
        temperature=float(found["temperature"]),
        avg_logprob=_finite(found["avg_logprob"]),
        compression_ratio=float(found["compression_ratio"]),
        no_speech_prob=_finite(found["no_speech_prob"]),
        words=words,
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
