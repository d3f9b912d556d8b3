"""What was heard, and what may be asked of whoever hears.

In: values of a model or of a caller. Out: `Transcript` and `HearingOptions`, checked. Knows no model and no
sound.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Protocol

from autoglm_edge.errors import RequestError

from .languages import LANGUAGES
from .sound import Sound

MOST_PROMPT = 2000
"""Characters of a prompt; a model takes in 223 tokens of it, the last ones."""


@dataclass(frozen=True)
class Word:
    """A word and when it was said.

    Attributes:
        text: with the space before it, if there is one.
        start: seconds.
        end: seconds.
    """

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech.

    Attributes:
        seek: hundredths of a second at which the window began that it was heard in.
        start: seconds.
        end: seconds.
        text: what was heard.
        tokens: ids of it, times included.
        temperature: that it was sampled with.
        avg_logprob: mean logarithm of the tokens' probabilities; None if the model gave no number.
        compression_ratio: of its text; text that goes round in circles has a high one.
        no_speech_prob: that there was no speech; None if the model gave no number.
        words: with their times, if they were asked for.
    """

    seek: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float | None
    compression_ratio: float
    no_speech_prob: float | None
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """What was heard in a sound.

    Attributes:
        text: all of it, without white space around it; empty where nobody speaks.
        language: code, asked for or detected.
        segments: in order.
        seconds: length of the sound.
    """

    text: str
    language: str
    segments: tuple[Segment, ...]
    seconds: float


@dataclass(frozen=True)
class HearingOptions:
    """How to listen.

    Attributes:
        language: code such as "en"; None detects it in the first 30 seconds.
        prompt: a text in whose style and words the transcript goes on; may be empty.
        temperature: 0 takes the likeliest token, and tries higher ones up to 1 where that gives no sense.
        words: whether words get times; takes another run for each window.
    """

    language: str | None = None
    prompt: str = ""
    temperature: float = 0.0
    words: bool = False

    def __post_init__(self) -> None:
        if self.language is not None and self.language not in LANGUAGES:
            raise RequestError(f"language is {self.language[:40]!r}, must be a code such as en, zh or de")
        if len(self.prompt) > MOST_PROMPT:
            raise RequestError(f"prompt has {len(self.prompt)} characters, must have at most {MOST_PROMPT}")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"prompt holds a lone surrogate at character {error.start}") from error
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 1.0):
            raise RequestError(f"temperature is {self.temperature}, must be from 0 to 1")


class Listener(Protocol):
    """Whoever hears; one sound at a time."""

    @property
    def name(self) -> str:
        """Of the model."""

    def transcribe(
        self, sound: Sound, options: HearingOptions, cancel: threading.Event | None = None
    ) -> Transcript | None:
        """What is said in a sound; None if it was cancelled."""


def plain(text: str) -> str:
    """A text as part of a prompt: what would be read as a token of the prompt's structure is taken apart.

    Speech has no brackets, but a model may write some, and `<|user|>` in a user's turn would end it. A space
    behind an opening bracket makes it letters.
    """
    return text.replace("<", "< ").replace("[", "[ ")
