"""Speech on the command line: options, a model that is there before it is needed, a file that is heard.

In: what the user wrote. Out: a `Recogniser`, or the text of a file. Shared by `autoglm run` and
`autoglm serve`; a skin over `autoglm_edge.speech`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from autoglm_edge.cli_common import ProgressLine, harmless
from autoglm_edge.errors import RequestError

if TYPE_CHECKING:
    from autoglm_edge.speech.recogniser import Recogniser

DEFAULT_MODEL = "base"
"""Of `autoglm run --audio`; a server hears nothing unless it is told what with."""
MOST_SECONDS = 3600.0
"""Of a file of the user's own."""

speech_device_option = click.option(
    "--speech-device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to hear.",
)


def audio_options(command: Callable[..., None]) -> Callable[..., None]:
    """A file that is heard in place of TEXT, and what hears it; for a command that gives one answer."""
    options = (
        click.option(
            "-a",
            "--audio",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Hear in FILE what the user says; TEXT, if given, stands before it.",
        ),
        speech_model_option(DEFAULT_MODEL),
        speech_device_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def speech_model_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option --speech-model.

    Args:
        default: what the help says of leaving it out.
    """
    return click.option(
        "--speech-model",
        metavar="NAME_OR_FILE",
        help="Whisper model that hears: a name such as base, which is downloaded if it is not there, or the "
        f"file of a checkpoint, which never is. [default: {default}]",
    )


def open_recogniser(name_or_file: str, device: Literal["cpu", "cuda"], threads: int) -> Recogniser:
    """A speech model whose file is there; it is loaded when it is needed.

    Args:
        name_or_file: as the user wrote it.
        device: where to compute.
        threads: of the CPU; 0 leaves it to torch.

    Raises:
        DependencyError: the extra is not installed.
        CheckpointError: there is no such file, or it cannot be downloaded.
    """
    from autoglm_edge.speech.checkpoint import check_installed, fetch, find_checkpoint
    from autoglm_edge.speech.recogniser import Recogniser

    check_installed()
    checkpoint = find_checkpoint(name_or_file)
    if not checkpoint.is_there:
        progress = ProgressLine()
        progress.say(harmless(f"The speech model {checkpoint.name} is downloaded to {checkpoint.path}"))
        try:
            fetch(checkpoint, progress.show)
        finally:
            progress.close()
    return Recogniser(checkpoint, device=device, threads=threads)


def check_audio(audio: Path | None, speech_model: str | None, *, chat: bool) -> None:
    """Combinations that make no sense, before anything is loaded.

    Raises:
        click.UsageError: there is one.
    """
    if audio is None and speech_model is not None:
        raise click.UsageError("--speech-model hears a file; name one with --audio, or leave it out")
    if audio is not None and chat:
        raise click.UsageError("--audio is for a single answer, it cannot go with --chat")


def hear_file(path: Path, recogniser: Recogniser) -> str:
    """What is said in a file; also shown on stderr.

    Args:
        path: of the user's own.
        recogniser: hears.

    Raises:
        RequestError: it cannot be read, or nothing is said in it.
        EdgeError: the model cannot hear it.
    """
    from autoglm_edge.speech.sound import read_sound
    from autoglm_edge.speech.transcript import HearingOptions, plain

    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"--audio {path}: the file cannot be read ({error.strerror or error})") from error
    try:
        sound = read_sound(data, max_seconds=MOST_SECONDS)
    except RequestError as error:
        raise RequestError(f"--audio {path}: {error}") from error
    heard = recogniser.transcribe(sound, HearingOptions())
    if heard is None or not heard.text:
        raise RequestError(f"--audio {path}: nothing was heard in {sound.seconds:.1f} seconds; speak louder")
    click.echo(harmless(f"Heard ({heard.language}): {heard.text}"), err=True)
    return plain(heard.text)
