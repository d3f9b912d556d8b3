"""`autoglm serve`: the OpenAI-compatible server in front of one bundle.

In: a bundle folder, an address, keys and limits. Out: a server until it is stopped; on stderr one line per
request. A skin over `autoglm_edge.server`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click
from click.core import ParameterSource

from autoglm_edge.cli_common import (
    EdgeCommand,
    ProgressLine,
    check_is_bundle,
    examples,
    harmless,
    needs_extra,
)
from autoglm_edge.cli_engine import EngineChoice, engine_options, read_reuse
from autoglm_edge.cli_speech import open_recogniser, speech_device_option, speech_model_option
from autoglm_edge.errors import RequestError

if TYPE_CHECKING:
    from autoglm_edge.server.settings import Settings
    from autoglm_edge.server.work.answering import Answering

KEY_VARIABLE = "AUTOGLM_API_KEY"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(\d{1,15})\s*([kmgt]?)b?", re.IGNORECASE)


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes, as a number or with a unit: 500000, 500kB, 2GB.

    Raises:
        click.BadParameter: something else.
    """
    if value is None:
        return None
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise click.BadParameter(f"{value!r} is no number of bytes such as 500MB")
    return int(found[1]) * _UNITS[found[2].lower()]


def _network_options(command: Callable[..., None]) -> Callable[..., None]:
    """Who is served, and from where."""
    options = (
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
        click.option(
            "--port",
            type=click.IntRange(0, 65535),
            default=8000,
            show_default=True,
            help="0 takes a free one.",
        ),
        click.option(
            "--served-model-name",
            "names",
            multiple=True,
            metavar="NAME",
            help="What requests call the model; repeatable. [default: OUT's own name and autoglm-phone-9b]",
        ),
        click.option(
            "--api-key",
            "api_keys",
            multiple=True,
            metavar="KEY",
            envvar=KEY_VARIABLE,
            show_envvar=True,
            help="Ask for this key; repeatable. Other users of the machine see command lines: better a file.",
        ),
        click.option(
            "--api-key-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Ask for one of the keys in this file, one in each line.",
        ),
        click.option("--insecure", is_flag=True, help="Serve a network without a key."),
        click.option(
            "--allow-origin",
            "origins",
            multiple=True,
            metavar="URL",
            help="Web pages from there may read answers; repeatable. [default: none]",
        ),
        click.option(
            "--allow-image-urls",
            "image_hosts",
            multiple=True,
            metavar="HOST",
            help="Fetch pictures from this host; repeatable. [default: data URIs only]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """How much is taken; the defaults are those of `Limits`."""
    options = (
        click.option(
            "--max-concurrency",
            type=click.IntRange(1, 64),
            default=4,
            show_default=True,
            metavar="N",
            help="Answers that are given at a time; each keeps a context of its own in memory.",
        ),
        click.option(
            "--max-queue",
            type=click.IntRange(min=1),
            metavar="N",
            help="Requests that may wait; more get status 429. [default: 32]",
        ),
        click.option(
            "--max-body-bytes", callback=_size, metavar="SIZE", help="Of one request. [default: 32MB]"
        ),
        click.option(
            "--max-messages", type=click.IntRange(min=1), metavar="N", help="Of one request. [default: 1000]"
        ),
        click.option(
            "--max-images", type=click.IntRange(min=1), metavar="N", help="Of one request. [default: 10]"
        ),
        click.option(
            "--max-image-pixels",
            type=click.IntRange(min=1),
            metavar="N",
            help="Of one picture, before it is shrunk. [default: 16000000]",
        ),
        click.option(
            "--max-audio-seconds",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="Of all sounds of one request. [default: 300]",
        ),
        click.option(
            "--grace",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="What an answer under way may still take after a signal. [default: 30]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _cache_options(command: Callable[..., None]) -> Callable[..., None]:
    """What is kept between answers."""
    options = (
        click.option(
            "--cache-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help="Keep there what prompts begin with, so that a restart finds it.",
        ),
        click.option(
            "--cache-bytes",
            callback=_size,
            metavar="SIZE",
            help="Memory for what prompts begin with. [default: 512MB]",
        ),
        click.option(
            "--cache-dir-bytes", callback=_size, metavar="SIZE", help="Bytes of --cache-dir. [default: 4GB]"
        ),
        click.option(
            "--image-cache-bytes",
            callback=_size,
            metavar="SIZE",
            help="Memory for pictures that were encoded. [default: 128MB]",
        ),
        click.option("--no-lookup", is_flag=True, help="Do not draft answers from what came before."),
        click.option("--no-reuse", is_flag=True, help="Compute every prompt and picture anew."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        "autoglm serve pocket-int4", "autoglm serve out --host 0.0.0.0 --api-key-file keys --context 8192"
    ),
)
@click.argument("bundle", metavar="OUT", type=click.Path(path_type=Path))
@_network_options
@_limit_options
@engine_options
@_cache_options
@speech_model_option("none, and sounds are refused")
@speech_device_option
@click.option(
    "--replicas",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Engines behind the one address: a GPU each, or cores of their own. [default: 1]",
)
@click.option("--replica-socket", type=click.Path(path_type=Path), hidden=True)
@click.option("--replica-cpus", hidden=True)
@click.option("--no-access-log", is_flag=True, help="Do not write a line for each request.")
def serve(
    bundle: Path,
    host: str,
    port: int,
    names: tuple[str, ...],
    api_keys: tuple[str, ...],
    api_key_file: Path | None,
    insecure: bool,
    origins: tuple[str, ...],
    image_hosts: tuple[str, ...],
    max_concurrency: int,
    max_queue: int | None,
    max_body_bytes: int | None,
    max_messages: int | None,
    max_images: int | None,
    max_image_pixels: int | None,
    max_audio_seconds: float | None,
    grace: float | None,
    engine: EngineChoice,
    cache_dir: Path | None,
    cache_bytes: int | None,
    cache_dir_bytes: int | None,
    image_cache_bytes: int | None,
    no_lookup: bool,
    no_reuse: bool,
    speech_model: str | None,
    speech_device: Literal["cpu", "cuda"],
    replicas: int | None,
    replica_socket: Path | None,
    replica_cpus: str | None,
    no_access_log: bool,
) -> None:
    """Answer requests over HTTP from the bundle in the folder OUT, as OpenAI's API does.

    Without --host only this machine is served. Several answers are given at a time, other requests wait for
    their turn; what prompts have in common is computed once. Ctrl-C ends it: no more requests are taken, and
    the answers under way may end.
    """
    if replica_cpus is not None and hasattr(os, "sched_setaffinity"):  # before any thread begins
        os.sched_setaffinity(0, map(int, replica_cpus.split(",")))
    check_is_bundle(bundle)
    with needs_extra("server", ("fastapi", "starlette", "uvicorn"), "a server"):
        from autoglm_edge.server.run import bind, url_of
        from autoglm_edge.server.run import serve as run_server
        from autoglm_edge.server.service import Service
    from autoglm_edge.runtime.bundle import Bundle

    limits = {
        "queue": max_queue,
        "body_bytes": max_body_bytes,
        "messages": max_messages,
        "images": max_images,
        "image_pixels": max_image_pixels,
        "audio_seconds": max_audio_seconds,
    }
    settings = _settings(
        bundle,
        host,
        names,
        [*api_keys],
        api_key_file,
        insecure=insecure,
        origins=origins,
        image_hosts=image_hosts,
        limits={name: value for name, value in limits.items() if value is not None},
        grace=grace,
    )
    if speech_model is not None:
        recogniser = open_recogniser(speech_model, speech_device, engine.threads or 0)
        settings = replace(settings, listener=recogniser)
    sizes = {
        "prefix_cache_bytes": cache_bytes,
        "prefix_disk_bytes": cache_dir_bytes,
        "image_cache_bytes": image_cache_bytes,
    }
    reuse = read_reuse(
        cache_dir,
        {name: value for name, value in sizes.items() if value is not None},
        lookup=not no_lookup,
        reuse=not no_reuse,
        flag="--cache-dir",
    )
    Bundle.open(bundle)  # what is wrong with the folder is said before an address is taken
    _set_up_log(quiet=no_access_log)

    def load() -> Answering:
        from autoglm_edge.server.work.answering import ServedEngine

        progress = ProgressLine()
        opened = engine.opening(bundle, reuse, max_concurrency).open(ServedEngine, progress)
        progress.close()
        click.echo(
            f"Ready: up to {opened.context} tokens of prompt and answer, {max_concurrency} at a time, "
            f"which take up to {opened.cache_bytes / 1e9:.1f} GB",
            err=True,
        )
        return opened

    if replica_socket is not None:
        from autoglm_edge.cluster.replica import serve_replica

        serve_replica(Service(replace(settings, hosts=None), load), replica_socket)
        return
    if replicas is not None and replicas > 1:
        from autoglm_edge.cluster.serve import places_of, serve_replicas

        try:
            places = places_of(replicas, cuda=engine.device == "cuda")
        except RequestError as error:
            raise click.UsageError(str(error)) from error
        command = _replica_command(click.get_current_context(), bundle)
        with bind(host, port) as front:
            click.echo(harmless(f"Serving {settings.names[0]} at {url_of(front)}, loading"), err=True)
            if insecure and not settings.keys:
                click.echo("Without a key: whoever reaches this address may ask", err=True)
            serve_replicas(
                settings,
                command,
                places,
                front,
                together=max_concurrency,
                told=lambda text: click.echo(text, err=True),
            )
        return

    with bind(host, port) as listener:
        click.echo(harmless(f"Serving {settings.names[0]} at {url_of(listener)}, loading"), err=True)
        if insecure and not settings.keys:
            click.echo("Without a key: whoever reaches this address may ask", err=True)
        run_server(Service(settings, load), listener, told=lambda text: click.echo(text, err=True))


_OF_THE_FRONT = frozenset(
    {"host", "port", "api_keys", "api_key_file", "insecure", "origins"}
    | {"bundle", "replicas", "replica_socket", "replica_cpus", "no_access_log"}
)
"""Parameters that a replica does not get: it is asked by the front alone."""


def _replica_command(context: click.Context, bundle: Path) -> list[str]:
    """What starts one replica with the options of this command."""
    command = [sys.executable, "-m", "autoglm_edge", "serve", str(bundle), "--no-access-log"]
    for option in context.command.params:
        name = option.name or ""
        value = context.params.get(name)
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if name in _OF_THE_FRONT or not given or value is None or value is False:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            command += [option.opts[0]] if item is True else [option.opts[0], str(item)]
    return command


def _settings(
    bundle: Path,
    host: str,
    names: tuple[str, ...],
    keys: list[str],
    key_file: Path | None,
    *,
    insecure: bool,
    origins: tuple[str, ...],
    image_hosts: tuple[str, ...],
    limits: Mapping[str, float],
    grace: float | None,
) -> Settings:
    """What the options say.

    Raises:
        click.UsageError: they contradict each other, or would serve a network without a key.
    """
    from autoglm_edge.server.asking.fetch import ImageFetcher
    from autoglm_edge.server.gate.access import LOCAL_NAMES, Keys, check_exposure, is_loopback, read_key_file
    from autoglm_edge.server.limits import Limits
    from autoglm_edge.server.settings import Settings, model_names

    try:
        found = Keys([*keys, *(read_key_file(key_file) if key_file is not None else ())])
        check_exposure(host, found, insecure=insecure)
        checked = Limits(**cast("Any", limits))
        given: dict[str, Any] = {"grace_s": grace} if grace is not None else {}
        return Settings(
            names=model_names(bundle, names),
            keys=found,
            limits=checked,
            # A key, or a network that the user opened, makes the name that a page goes by unimportant.
            hosts=LOCAL_NAMES | {host.lower()} if is_loopback(host) and not found else None,
            origins=origins,
            fetch=ImageFetcher(image_hosts, checked.image_bytes) if image_hosts else None,
            **given,
        )
    except RequestError as error:
        raise click.UsageError(str(error)) from error


def _set_up_log(*, quiet: bool) -> None:
    """One line on stderr for what the server says; what its libraries warn of, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("autoglm_edge.server")
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.handlers, log.propagate = [handler], False
