"""`autoglm serve`: the OpenAI-compatible server in front of one bundle.

In: a bundle folder, an address, keys and limits. Out: a server until it is stopped; on stderr one line per
request. A skin over `autoglm_edge.server`, and over `autoglm_edge.cluster` with --replicas.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from autoglm_edge.errors import RequestError

from .command import EdgeCommand, bundle_argument, check_is_bundle, examples, needs_extra
from .hearing import open_recogniser
from .options.caches import CacheChoice, cache_options
from .options.engine import EngineChoice, engine_options
from .options.limits import LimitChoice, limit_options
from .options.network import NetworkChoice, network_options
from .options.speech import SpeechChoice, speech_options
from .progress import ProgressLine
from .terminal import harmless

if TYPE_CHECKING:
    from autoglm_edge.cluster.fleet import Place
    from autoglm_edge.server.work.answering import Answering

_OF_THE_FRONT = frozenset(
    {"host", "port", "api_keys", "api_key_file", "insecure", "origins"}
    | {"bundle", "replicas", "replica_socket", "replica_cpus", "no_access_log"}
)
"""Parameters that a replica does not get: it is asked by the front alone."""


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        "autoglm serve pocket-int4", "autoglm serve out --host 0.0.0.0 --api-key-file keys --context 8192"
    ),
)
@bundle_argument
@network_options
@limit_options
@engine_options
@cache_options
@speech_options
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
    network: NetworkChoice,
    limits: LimitChoice,
    engine: EngineChoice,
    caches: CacheChoice,
    speech: SpeechChoice,
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
    with needs_extra("server", "a server"):
        from autoglm_edge.server.run import bind, url_of
        from autoglm_edge.server.run import serve as run_server
        from autoglm_edge.server.service import Service
    from autoglm_edge.runtime.bundle import Bundle

    settings = network.settings(bundle, limits)
    if speech.speech_model is not None:
        recogniser = open_recogniser(speech.speech_model, speech.speech_device, engine.threads or 0)
        settings = replace(settings, listener=recogniser)
    reuse = caches.reuse()
    Bundle.open(bundle)  # what is wrong with the folder is said before an address is taken
    _set_up_log(quiet=no_access_log)

    def load() -> Answering:
        from autoglm_edge.server.work.answering import ServedEngine

        progress = ProgressLine()
        together = limits.max_concurrency
        opened = engine.opening(bundle, reuse, together).open(ServedEngine, progress)
        progress.close()
        _tell(
            f"Ready: up to {opened.context} tokens of prompt and answer, {together} at a time, "
            f"which take up to {opened.cache_bytes / 1e9:.1f} GB"
        )
        return opened

    if replica_socket is not None:
        from autoglm_edge.cluster.replica import serve_replica

        serve_replica(Service(replace(settings, hosts=None), load), replica_socket)
        return
    places = _places(replicas, engine)
    with bind(network.host, network.port) as listener:
        _tell(harmless(f"Serving {settings.names[0]} at {url_of(listener)}, loading"))
        if network.insecure and not settings.keys:
            _tell("Without a key: whoever reaches this address may ask")
        if places is None:
            run_server(Service(settings, load), listener, told=_tell)
            return
        from autoglm_edge.cluster.serve import serve_replicas

        command = _replica_command(click.get_current_context(), bundle)
        together = limits.max_concurrency
        serve_replicas(settings, command, places, listener, together=together, told=_tell)


def _tell(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def _places(replicas: int | None, engine: EngineChoice) -> list[Place] | None:
    """Where replicas run; None if this process is the server itself.

    Raises:
        click.UsageError: this machine has no room for so many.
    """
    if replicas is None or replicas == 1:
        return None
    from autoglm_edge.cluster.serve import places_of

    try:
        return places_of(replicas, cuda=engine.device == "cuda")
    except RequestError as error:
        raise click.UsageError(str(error)) from error


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


def _set_up_log(*, quiet: bool) -> None:
    """One line on stderr for what the server says; what its libraries warn of, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("autoglm_edge.server")
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.handlers, log.propagate = [handler], False
