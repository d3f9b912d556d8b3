"""`autoglm bench`: what a bundle costs on this machine, beside what the machine can do.

In: a bundle folder and sizes. Out: a table on stdout, and on request one JSON document. A skin over
`autoglm_edge.measure`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.errors import RequestError

from .command import EdgeCommand, bundle_argument, check_is_bundle, examples, json_option
from .options.engine import device_option, prompts_option, threads_option, weights_option
from .quantities import read_integers
from .terminal import harmless, print_json

if TYPE_CHECKING:
    from autoglm_edge.runtime.session import Device, Prefill, Weights


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        "autoglm bench pocket-int4 --quick", "autoglm bench out --prefill 512,1500 --images 592 --json"
    ),
)
@bundle_argument
@click.option(
    "--prefill",
    metavar="N,N",
    callback=read_integers,
    help="Lengths of prompts in tokens. [default: 128,512,1500]",
)
@click.option(
    "--decode-at",
    metavar="N,N",
    callback=read_integers,
    help="Tokens in the cache before a step. [default: 0,1024,4096]",
)
@click.option(
    "--images",
    metavar="N,N",
    callback=read_integers,
    help="Most tokens of the screenshot. [default: 256,592,1196]",
)
@click.option(
    "--together",
    metavar="N,N",
    callback=read_integers,
    help="Answers that are decoded in one run. [default: 2,4,8]",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Steps of a decode. [default: 16]")
@click.option(
    "--repeat", type=click.IntRange(min=1), metavar="N", help="Repetitions of everything. [default: 3]"
)
@click.option("--profile", is_flag=True, help="Tell also which operators take the time.")
@click.option("--quick", is_flag=True, help="The smallest of each, once; other options still count.")
@weights_option
@prompts_option
@threads_option
@device_option
@json_option
def bench(
    bundle: Path,
    prefill: tuple[int, ...] | None,
    decode_at: tuple[int, ...] | None,
    images: tuple[int, ...] | None,
    together: tuple[int, ...] | None,
    steps: int | None,
    repeat: int | None,
    profile: bool,
    quick: bool,
    weights: Weights,
    prompts: Prefill,
    threads: int | None,
    device: Device,
    as_json: bool,
) -> None:
    """Measure what the bundle in the folder OUT costs on this machine.

    Loading, prompts of several lengths, steps at several contexts and of several answers at once, a
    screenshot at several sizes, and the memory of each phase, beside the machine's own limits, which are
    measured in the same run. Token ids are random and the graphs are called directly: a conversation adds
    template, sampling and, where it can, reuse. Default sizes that the bundle does not allow are left out
    or made smaller, and said so; an empty list leaves a kind out. With --profile, the longest prompt, steps
    at the shortest and the longest context and the largest picture are traced as well. `autoglm info` shows
    what pictures cost afterwards.
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
        profiled=profile,
        say=lambda text: click.echo(text, err=True),
    )
    if device == "cpu" and threads is None and weights == prompts == "auto":
        keep_costs(report)  # of what `autoglm run` would do; `autoglm info` shows them
    click.echo(harmless(report.to_table()))
    if as_json:
        print_json(json.loads(report.to_json()))
