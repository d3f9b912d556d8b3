"""What hears: of a server, and of a single answer, whose question may be a file.

In: the command line. Out: which model, where, and what it hears.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .choice import Decorator, gathered

if TYPE_CHECKING:
    from autoglm_edge.runtime.session import Device

DEFAULT_MODEL = "base"
"""Of `autoglm run --audio`; a server hears nothing unless it is told what with."""


def _model_option(default: str) -> Decorator:
    return click.option(
        "--speech-model",
        metavar="NAME_OR_FILE",
        help="Whisper model that hears: a name such as base, which is downloaded if it is not there, or the "
        f"file of a checkpoint, which never is. [default: {default}]",
    )


_device_option = click.option(
    "--speech-device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to hear.",
)


@dataclass(frozen=True)
class SpeechChoice:
    """What a server hears with.

    Attributes:
        speech_model: name or file; None hears nothing.
        speech_device: where to compute.
    """

    speech_model: str | None
    speech_device: Device


speech_options = gathered(
    SpeechChoice, "speech", _model_option("none, and sounds are refused"), _device_option
)


@dataclass(frozen=True)
class AudioChoice:
    """A file that is heard in place of TEXT, and what hears it.

    Attributes:
        audio: the file; None if nothing is to be heard.
        speech_model: name or file; None takes DEFAULT_MODEL; see `model`.
        speech_device: where to compute.
    """

    audio: Path | None
    speech_model: str | None
    speech_device: Device

    @property
    def model(self) -> str:
        """Name or file of what hears."""
        return self.speech_model or DEFAULT_MODEL

    def check(self, *, chat: bool) -> None:
        """Combinations that make no sense, before anything is loaded.

        Raises:
            click.UsageError: there is one.
        """
        if self.audio is None and self.speech_model is not None:
            raise click.UsageError("--speech-model hears a file; name one with --audio, or leave it out")
        if self.audio is not None and chat:
            raise click.UsageError("--audio is for a single answer, it cannot go with --chat")


audio_options = gathered(
    AudioChoice,
    "audio",
    click.option(
        "-a",
        "--audio",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Hear in FILE what the user says; TEXT, if given, stands before it.",
    ),
    _model_option(DEFAULT_MODEL),
    _device_option,
)
