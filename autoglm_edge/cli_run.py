"""`autoglm run`: one answer, or a conversation, from a bundle.

In: a bundle folder, text and pictures. Out: the answer as it is made, on stdout; then its action, counts and
times. A skin over `Engine.chat`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from autoglm_edge.cli_answer import (
    DEFAULT_MAX_TOKENS,
    Answer,
    Conversation,
    counts_of,
    give_answer,
    load_images,
    print_summary,
)
from autoglm_edge.cli_batch import DEFAULT_CONCURRENCY, batch_options, read_batch_options, run_batch
from autoglm_edge.cli_chat import hold_chat
from autoglm_edge.cli_common import (
    EdgeCommand,
    ProgressLine,
    as_unicode,
    check_is_bundle,
    examples,
    print_json,
    read_stdin,
)
from autoglm_edge.cli_engine import EngineChoice, engine_options, read_reuse
from autoglm_edge.cli_speech import DEFAULT_MODEL, audio_options, check_audio, hear_file, open_recogniser
from autoglm_edge.errors import EdgeError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image


def _sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that Engine.chat takes, by the same names."""
    options = (
        click.option(
            "--max-tokens",
            type=click.IntRange(min=1),
            metavar="N",
            help=f"Stop after N tokens. [default: {DEFAULT_MAX_TOKENS}, or what the context has left]",
        ),
        click.option("--temperature", type=float, help="0 takes the likeliest token. [default: 0]"),
        click.option("--top-p", type=float, help="Draw among the likeliest that reach this probability."),
        click.option("--top-k", type=int, help="Draw among so many of the likeliest tokens."),
        click.option(
            "--min-p", type=float, help="Draw among tokens this fraction as likely as the likeliest."
        ),
        click.option("--repetition-penalty", type=float, help="Above 1: avoid what prompt and answer have."),
        click.option("--frequency-penalty", type=float, help="Subtract this per occurrence in the answer."),
        click.option("--presence-penalty", type=float, help="Subtract this from what the answer has."),
        click.option("--seed", type=int, help="Draw the same tokens again."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; repeatable."),
        click.option(
            "--json-schema",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Hold the answer to the JSON Schema in FILE.",
        ),
        click.option("--json-object", is_flag=True, help="Hold the answer to JSON: any object."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        'autoglm run pocket-int4 "Open the settings" -i screen.png --draw tap.png',
        "autoglm run pocket-int4 --chat",
        "autoglm run pocket-int4 --batch requests.jsonl -o answers.jsonl",
    ),
)
@click.argument("bundle", metavar="OUT", type=click.Path(path_type=Path))
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document as the last line.")
@_sampling_options
@batch_options
@engine_options
@click.option(
    "--prefix-cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep in DIR what prompts begin with, so that the next start need not compute it.",
)
@click.option("--no-lookup", is_flag=True, help="Do not draft the answer from what came before.")
@click.option("--no-reuse", is_flag=True, help="Compute every prompt and picture of a conversation anew.")
def run(
    bundle: Path,
    text: str | None,
    images: tuple[Path, ...],
    audio: Path | None,
    speech_model: str | None,
    speech_device: Literal["cpu", "cuda"],
    system: str | None,
    chat: bool,
    draw: Path | None,
    as_json: bool,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    frequency_penalty: float | None,
    presence_penalty: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    json_schema: Path | None,
    json_object: bool,
    batch: Path | None,
    output: Path | None,
    ordered: bool,
    images_from: Path | None,
    names: tuple[str, ...],
    max_concurrency: int | None,
    ray: str | None,
    workers: int | None,
    engine: EngineChoice,
    prefix_cache: Path | None,
    no_lookup: bool,
    no_reuse: bool,
) -> None:
    """Answer TEXT from the bundle in the folder OUT.

    TEXT is what the user says; - reads it from standard input, --audio hears it in a recording. The answer
    is printed as it is made. An action in it, such as a tap, is read by the rules of the Open-AutoGLM phone
    agent: points are 0 to 999 of the screen's width and height. With --batch, a whole file of requests is
    answered instead.
    """
    singles: dict[str, object] = {
        "TEXT": text,
        "--image": images,
        "--audio": audio,
        "--speech-model": speech_model,
        "--system": system,
        "--chat": chat,
        "--draw": draw,
        "--max-tokens": max_tokens,
        "--temperature": temperature,
        "--top-p": top_p,
        "--top-k": top_k,
        "--min-p": min_p,
        "--repetition-penalty": repetition_penalty,
        "--frequency-penalty": frequency_penalty,
        "--presence-penalty": presence_penalty,
        "--seed": seed,
        "--stop": stop,
        "--json-schema": json_schema,
        "--json-object": json_object,
    }
    many = read_batch_options(
        batch,
        output,
        ordered=ordered,
        images_from=images_from,
        names=names,
        max_concurrency=max_concurrency,
        ray=ray,
        workers=workers,
        others=singles,
    )
    reuse = read_reuse(prefix_cache, {}, lookup=not no_lookup, reuse=not no_reuse, flag="--prefix-cache")
    if many is not None:
        check_is_bundle(bundle)
        opening = engine.opening(bundle, reuse, max_concurrency or DEFAULT_CONCURRENCY)
        run_batch(many, opening, as_json=as_json)
        return
    check_audio(audio, speech_model, chat=chat)
    _check_usage(text, images, audio, chat=chat, draw=draw, as_json=as_json)
    text = None if text is None else as_unicode(text)
    stop = tuple(as_unicode(item) for item in stop)
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "seed": seed,
    }
    given = {name: value for name, value in sampling.items() if value is not None}
    _check_sampling(given, stop)
    held = _read_schema(json_schema, json_object)
    options: dict[str, Any] = {**given, "stop": stop}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if text == "-" and not chat:
        text = read_stdin()
    conversation = Conversation(_read_system(system))
    conversation.reset()
    check_is_bundle(bundle)
    conversation.images = load_images(images)
    screen = conversation.images[-1] if conversation.images else None
    heard: str | None = None
    if audio is not None:  # before the bundle is opened: the two need not be in memory together
        heard = hear_file(
            audio, open_recogniser(speech_model or DEFAULT_MODEL, speech_device, engine.threads or 0)
        )
        text = f"{text}\n{heard}" if text and text.strip() else heard

    from autoglm_edge.runtime.engine import Engine

    progress = ProgressLine()
    with engine.opening(bundle, reuse).open(Engine, progress) as opened:
        progress.close()
        if held is not None:
            options["grammar"] = opened.grammar(held)
        if chat:
            hold_chat(opened, conversation, text, options)
            return
        conversation.ask(text or "")
        answer = give_answer(opened, conversation.messages, options, cancel=None)
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


def _check_sampling(values: dict[str, Any], stop: Sequence[str]) -> None:
    """Refuse values out of range as wrong usage, before a bundle is loaded."""
    from autoglm_edge.runtime.sampling import SamplingParams
    from autoglm_edge.runtime.stops import StopText

    try:
        SamplingParams(**values)
        StopText(stop)
    except RequestError as error:
        raise click.UsageError(str(error)) from error


def _read_schema(file: Path | None, json_object: bool) -> dict[str, Any] | bool | None:
    """What answers are held to; None leaves them free.

    Raises:
        click.UsageError: the file cannot be read, or holds no schema that is taken.
    """
    if file is None:
        return {"type": "object"} if json_object else None
    if json_object:
        raise click.UsageError("--json-schema says more than --json-object; leave one of them out")

    from autoglm_edge.runtime.grammar import read_schema

    try:
        schema: dict[str, Any] | bool = json.loads(file.read_text(encoding="utf-8"))
        read_schema(schema)
    except OSError as error:
        raise click.UsageError(f"--json-schema {file}: it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--json-schema {file}: it is not JSON in UTF-8 ({error})") from error
    except RequestError as error:
        raise click.UsageError(f"--json-schema {file}: {error}") from error
    return schema


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
