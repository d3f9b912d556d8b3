"""`autoglm run`: one answer, a conversation, or a file of answers, from a bundle.

In: a bundle folder, text and pictures. Out: the answer as it is made, on stdout; then its action, counts and
times. A skin over `Engine.chat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.errors import EdgeError

from .answer import Answer, counts_of, give_answer, print_summary
from .batch import run_batch
from .chat import hold_chat
from .command import EdgeCommand, bundle_argument, check_is_bundle, examples, json_option
from .conversation import Conversation, load_images
from .hearing import hear_file, open_recogniser
from .options.batch import BatchChoice, batch_options
from .options.caches import PrefixChoice, prefix_options
from .options.engine import EngineChoice, engine_options
from .options.sampling import SamplingChoice, sampling_options
from .options.speech import AudioChoice, audio_options
from .progress import ProgressLine
from .terminal import as_unicode, print_json, read_stdin

if TYPE_CHECKING:
    from PIL.Image import Image

_OF_ONE_ANSWER = frozenset(
    {"text", "images", "audio", "speech_model", "system", "chat", "draw"}
    | {field.name for field in fields(SamplingChoice)}
)
"""Parameters that a batch does not take: each of its requests says it itself."""


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        'autoglm run pocket-int4 "Open the settings" -i screen.png --draw tap.png',
        "autoglm run pocket-int4 --chat",
        "autoglm run pocket-int4 --batch requests.jsonl -o answers.jsonl",
    ),
)
@bundle_argument
@click.argument("text", required=False)
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(path_type=Path), help="Picture; repeatable."
)
@audio_options
@click.option("--system", metavar="TEXT_OR_@FILE", help="System prompt, or @ and the file that holds it.")
@click.option("--chat", is_flag=True, help="Hold a conversation; type /help in it.")
@click.option(
    "--draw", type=click.Path(path_type=Path), help="Write the last picture with the action marked."
)
@json_option
@sampling_options
@batch_options
@engine_options
@prefix_options
def run(
    bundle: Path,
    text: str | None,
    images: tuple[Path, ...],
    audio: AudioChoice,
    system: str | None,
    chat: bool,
    draw: Path | None,
    as_json: bool,
    sampling: SamplingChoice,
    many: BatchChoice,
    engine: EngineChoice,
    caches: PrefixChoice,
) -> None:
    """Answer TEXT from the bundle in the folder OUT.

    TEXT is what the user says; - reads it from standard input, --audio hears it in a recording. The answer
    is printed as it is made. An action in it, such as a tap, is read by the rules of the Open-AutoGLM phone
    agent: points are 0 to 999 of the screen's width and height. With --batch, a whole file of requests is
    answered instead.
    """
    many.check(click.get_current_context(), _OF_ONE_ANSWER)
    reuse = caches.reuse()
    if many.batch is not None:
        check_is_bundle(bundle)
        run_batch(many, engine.opening(bundle, reuse, many.concurrency), as_json=as_json)
        return
    audio.check(chat=chat)
    _check_usage(text, images, audio.audio, chat=chat, draw=draw, as_json=as_json)
    text = None if text is None else as_unicode(text)
    arguments = sampling.arguments()
    schema = sampling.schema()
    if text == "-" and not chat:
        text = read_stdin()
    conversation = Conversation(_read_system(system))
    conversation.reset()
    check_is_bundle(bundle)
    conversation.images = load_images(images)
    screen = conversation.images[-1] if conversation.images else None
    heard: str | None = None
    if audio.audio is not None:  # before the bundle is opened: the two need not be in memory together
        recogniser = open_recogniser(audio.model, audio.speech_device, engine.threads or 0)
        heard = hear_file(audio.audio, recogniser)
        text = f"{text}\n{heard}" if text and text.strip() else heard

    from autoglm_edge.runtime.engine import Engine

    progress = ProgressLine()
    with engine.opening(bundle, reuse).open(Engine, progress) as opened:
        progress.close()
        if schema is not None:
            arguments["grammar"] = opened.grammar(schema)
        if chat:
            hold_chat(opened, conversation, text, arguments)
            return
        conversation.ask(text or "")
        answer = give_answer(opened, conversation.messages, arguments, cancel=None)
    _report(answer, screen, bundle, draw, as_json, heard)


def _check_usage(
    text: str | None,
    images: Sequence[Path],
    audio: Path | None,
    *,
    chat: bool,
    draw: Path | None,
    as_json: bool,
) -> None:
    """Combinations that make no sense, before anything is loaded.

    Raises:
        click.UsageError: there is one.
    """
    if chat:
        for name, given in (("--draw", draw is not None), ("--json", as_json), ("-", text == "-")):
            if given:
                raise click.UsageError(f"{name} is for a single answer, it cannot go with --chat")
        return
    if text is None and audio is None:
        raise click.UsageError("say what to answer: TEXT, or - for standard input, or --audio, or --chat")
    if text is not None and not text.strip() and not images and audio is None:
        raise click.UsageError("TEXT is empty")
    if draw is not None:
        if not images:
            raise click.UsageError("--draw needs a picture to draw on; give one with --image")
        from PIL import Image

        Image.init()
        if Image.registered_extensions().get(draw.suffix.lower()) not in Image.SAVE:
            raise click.UsageError(f"--draw {draw} does not end in a picture format such as .png")
        if not draw.resolve().parent.is_dir():
            raise click.UsageError(f"--draw {draw}: the folder {draw.parent} does not exist")
        if draw.resolve() in [image.resolve() for image in images]:
            raise click.UsageError(f"--draw {draw} would overwrite a picture of --image; name another file")


def _read_system(system: str | None) -> str | None:
    """The text itself, or of the file after @."""
    if system is None or not system.startswith("@"):
        return None if system is None else as_unicode(system)
    try:
        return Path(system[1:]).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise click.UsageError(f"--system {system}: the file cannot be read ({reason})") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"--system {system}: the file is not UTF-8 text (byte {error.start})"
        ) from error


def _report(
    answer: Answer,
    screen: Image | None,
    bundle: Path,
    draw: Path | None,
    as_json: bool,
    heard: str | None,
) -> None:
    """Picture, document or summary of an answer.

    Raises:
        EdgeError: a picture was asked for and there is no action, or it cannot be written.
    """
    from autoglm_edge.runtime.actions import parse_action, parse_thinking

    action = parse_action(answer.text)
    size = screen.size if screen is not None else None
    problem: str | None = None
    if draw is not None and action is None:
        problem = f"the answer holds no action, so nothing was written to {draw}"
    elif draw is not None and action is not None and screen is not None:
        from autoglm_edge.runtime.draw import draw_action

        try:
            draw_action(screen, action).save(draw)
        except (OSError, ValueError) as error:
            problem = f"the picture {draw} cannot be written ({error})"
    if as_json:
        document = {
            "text": answer.text,
            "thinking": parse_thinking(answer.text),
            "action": action.to_json(size) if action else None,
            **({"heard": heard} if heard is not None else {}),
            **counts_of(answer.last),
            "bundle": str(bundle),
            "image_size": list(size) if size else None,
            "drawing": str(draw) if draw is not None and problem is None else None,
        }
        print_json(document)
    else:
        if action is not None and size is not None and (marks := _pixels(action.to_json(size))):
            click.echo(f"{action.kind} at {marks} of {size[0]}x{size[1]} pixels", err=True)
        print_summary(answer.last)
    if problem:
        raise EdgeError(problem)


def _pixels(document: dict[str, Any]) -> str:
    return " to ".join(f"{x},{y}" for name, (x, y) in _pixel_items(document))


def _pixel_items(document: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, value in document.items():
        if name.endswith("_pixels"):
            yield name, (value[0], value[1])
