"""`autoglm bench`: what a bundle costs on this machine, beside what the machine can do.

In: a bundle folder and sizes. Out: a table on stdout, and on request one JSON document. A skin over
`autoglm_edge.measure`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import click

from autoglm_edge.cli_common import (
    EdgeCommand,
    check_is_bundle,
    device_option,
    examples,
    harmless,
    print_json,
    prompts_option,
    weights_option,
)
from autoglm_edge.errors import RequestError


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Integers with commas between them; an empty text is an empty list.

    Raises:
        click.BadParameter: something else.
    """
    if value is None:
        return None
    try:
        return tuple(int(item) for item in value.split(",")) if value.strip() else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of integers such as 128,512") from error


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        "autoglm bench pocket-int4 --quick", "autoglm bench out --prefill 512,1500 --images 592 --json"
    ),
)
@click.argument("bundle", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--prefill", metavar="N,N", callback=_sizes, help="Lengths of prompts in tokens. [default: 128,512,1500]"
)
@click.option(
    "--decode-at",
    metavar="N,N",
    callback=_sizes,
    help="Tokens in the cache before a step. [default: 0,1024,4096]",
)
@click.option(
    "--images", metavar="N,N", callback=_sizes, help="Most tokens of the screenshot. [default: 256,592,1196]"
)
@click.option(
    "--together",
    metavar="N,N",
    callback=_sizes,
    help="Answers that are decoded in one run. [default: 2,4,8]",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Steps of a decode. [default: 16]")
@click.option(
    "--repeat", type=click.IntRange(min=1), metavar="N", help="Repetitions of everything. [default: 3]"
)
@click.option("--quick", is_flag=True, help="The smallest of each, once; other options still count.")
@weights_option
@prompts_option
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads. [default: one per core]")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document as the last line.")
def bench(
    bundle: Path,
    prefill: tuple[int, ...] | None,
    decode_at: tuple[int, ...] | None,
    images: tuple[int, ...] | None,
    together: tuple[int, ...] | None,
    steps: int | None,
    repeat: int | None,
    quick: bool,
    weights: Literal["auto", "packed", "prepared", "mapped"],
    prompts: Literal["auto", "integer", "layers", "decoder"],
    threads: int | None,
    device: Literal["cpu", "cuda"],
    as_json: bool,
) -> None:
    """Measure what the bundle in the folder OUT costs on this machine.

    Loading, prompts of several lengths, steps at several contexts and of several answers at once, a
    screenshot at several sizes, and the memory of each phase, beside the machine's own limits, which are
    measured in the same run. Token ids are random and the graphs are called directly: a conversation adds
    template, sampling and, where it can, reuse. Default sizes that the bundle does not allow are left out
    or made smaller, and said so; an empty list leaves a kind out. `autoglm info` shows what pictures cost
    afterwards.
    """
    from autoglm_edge.measure.costs import keep_costs
    from autoglm_edge.measure.plan import BenchPlan
    from autoglm_edge.measure.speed import bench as measure
    from autoglm_edge.runtime.bundle import Bundle
    from autoglm_edge.runtime.session import SessionOptions

    check_is_bundle(bundle)
    opened = Bundle.open(bundle)
    sizes = {"prefill": prefill, "decode_at": decode_at, "images": images, "together": together}
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    given |= {name: value for name, value in (("steps", steps), ("repeat", repeat)) if value is not None}
    try:
        plan = dataclasses.replace(BenchPlan.quick() if quick else BenchPlan(), **given)
    except RequestError as error:
        raise click.UsageError(str(error)) from error
    asked = plan.misfits(opened.manifest)
    fitting = plan.fitting(opened.manifest)
    for name in given:
        if getattr(fitting, name) != getattr(plan, name):
            raise RequestError(f"this bundle cannot be measured so: {asked[0]}; name smaller sizes")
    report = measure(
        opened,
        fitting,
        options=SessionOptions(device, threads or 0, weights=weights, prefill=prompts),
        left_out=tuple(asked),
        say=lambda text: click.echo(text, err=True),
    )
    if device == "cpu" and threads is None and weights == prompts == "auto":
        keep_costs(report)  # of what `autoglm run` would do; `autoglm info` shows them
    click.echo(harmless(report.to_table()))
    if as_json:
        print_json(json.loads(report.to_json()))
