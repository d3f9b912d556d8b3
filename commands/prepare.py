"""`autoglm prepare`: pack a bundle's weights for this machine once, so that loads take less time and memory.

In: a bundle folder. Out: prepared weights in the user's cache folder, or their state, or their removal. A
skin over `runtime.prepared`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .command import EdgeCommand, bundle_argument, check_is_bundle, examples, json_option
from .options.engine import threads_option
from .prepared_parts import describe, prepared_parts
from .progress import ProgressLine
from .quantities import format_bytes
from .terminal import harmless, print_json


@click.command(
    cls=EdgeCommand,
    epilog=examples("autoglm prepare pocket-int4", "autoglm prepare pocket-int4 --status --json"),
)
@bundle_argument
@click.option("--remove", is_flag=True, help="Delete what was prepared of this bundle.")
@click.option("--status", is_flag=True, help="Show what is prepared, and change nothing.")
@threads_option
@json_option
def prepare(bundle: Path, remove: bool, status: bool, threads: int | None, as_json: bool) -> None:
    """Pack the weights of the bundle in the folder OUT for this machine, once.

    Later loads map them from the user's cache folder, AUTOGLM_EDGE_CACHE if that is set, instead of copying
    them into memory. They take about twice the bundle's size there.
    """
    from autoglm_edge.runtime.bundle import Bundle
    from autoglm_edge.runtime.machine.prepared import prepare as prepare_part
    from autoglm_edge.runtime.machine.prepared import remove_prepared
    from autoglm_edge.runtime.plan import PREPARED_PARTS
    from autoglm_edge.runtime.session import SessionOptions

    if remove and status:
        raise click.UsageError("--remove and --status exclude each other")
    check_is_bundle(bundle)
    opened = Bundle.open(bundle)
    document: dict[str, Any] = {"bundle": str(bundle)}
    if remove:
        document["removed_bytes"] = freed = remove_prepared(opened)
        if not as_json:
            click.echo(f"Removed {format_bytes(freed)}")
    elif not status:
        started = time.monotonic()
        progress = ProgressLine()
        try:
            for part in PREPARED_PARTS:
                prepare_part(opened, part, SessionOptions(threads=threads or 0), progress)
        finally:
            progress.close()
        document["seconds"] = round(time.monotonic() - started, 3)
    document["parts"] = prepared_parts(opened)
    if as_json:
        print_json(document)
    elif not remove:
        for part, state in document["parts"].items():
            click.echo(harmless(f"{part:8}  {describe(state)}"))
