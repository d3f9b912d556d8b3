"""The devices that a bundle can be simulated on, as a table or a document.

In: the built-in profiles. Out: lines on stdout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .terminal import print_json

if TYPE_CHECKING:
    from autoglm_edge.android_sim.device import Device


def print_devices(*, as_json: bool) -> None:
    """Print what an app may have on each, and with `as_json` every figure with its source."""
    from autoglm_edge.android_sim.device import list_devices
    from autoglm_edge.measure.figures import columns

    devices = list_devices()
    rows = [("id", "name", "app, visible", "app, service", "memory GB/s", "storage MB/s")]
    rows += [
        (
            item.id,
            item.name,
            _gigabytes(item, "mem_visible"),
            _gigabytes(item, "mem_service"),
            f"{item.value('dram_peak') or 0:g}",
            f"{item.value('storage_read') or 0:g}",
        )
        for item in devices
    ]
    click.echo("\n".join(columns([(f"{row[0]:<14}{row[1]}", *row[2:]) for row in rows])))
    click.echo("\nEach figure with its unit, basis and source: --list-devices --json")
    if as_json:
        print_json({"devices": [item.to_json() for item in devices]})


def _gigabytes(device: Device, name: str) -> str:
    figure = device.figures[name]
    return f"{figure.bytes / 1e9:.2f} GB {figure.basis}"
