"""Speech on the command line: a model that is there before it is needed, and a file that is heard.

In: what the options say. Out: a `Recogniser`, or the text of a file. A skin over `autoglm_edge.speech`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoglm_edge.errors import RequestError

from .progress import ProgressLine
from .terminal import harmless

if TYPE_CHECKING:
    from autoglm_edge.runtime.session import Device
    from autoglm_edge.speech.recogniser import Recogniser

MOST_SECONDS = 3600.0
"""Of a file of the user's own."""


def open_recogniser(name_or_file: str, device: Device, threads: int) -> Recogniser:
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
