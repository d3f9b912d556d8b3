"""`autoglm prepare`: pack a bundle's weights for this machine once, so that loads take less time and memory.

In: a bundle folder. Out: prepared weights in the user's cache folder, or their state, or their removal. A
skin over `runtime.prepared`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.cli_common import (
    EdgeCommand,
    ProgressLine,
    check_is_bundle,
    examples,
    format_bytes,
    harmless,
    print_json,
)

if TYPE_CHECKING:
    from autoglm_edge.runtime.bundle import Bundle


@click.command(
    cls=EdgeCommand,
    epilog=examples("autoglm prepare pocket-int4", "autoglm prepare pocket-int4 --status --json"),
)
@click.argument("bundle", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--remove", is_flag=True, help="Delete what was prepared of this bundle.")
@click.option("--status", is_flag=True, help="Show what is prepared, and change nothing.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads. [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document as the last line.")
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


def prepared_parts(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """State of each part that can be prepared, by name."""
    from autoglm_edge.runtime.machine.prepared import prepared_state
    from autoglm_edge.runtime.plan import PREPARED_PARTS

    parts = {}
    for part in PREPARED_PARTS:
        state = prepared_state(bundle, part)
        parts[part] = {
            "ready": state.ready,
            "reason": state.reason,
            "bytes": state.bytes,
            "folder": str(state.graph.parent),
        }
    return parts


def describe(state: dict[str, Any]) -> str:
    """A state as `prepared_parts` gives it, in words."""
    if state["ready"]:
        return f"prepared, {format_bytes(state['bytes'])} in {state['folder']}"
    return str(state["reason"])
