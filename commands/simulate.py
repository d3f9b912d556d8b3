"""`autoglm simulate`: whether a bundle lives on a device, how well, and whether it is still right there.

In: bundles, a device, a question. Out: lines on stdout, one JSON document, a picture, a page; exit status 1
if an app would be killed there or would read its weights again and again. A skin over
`autoglm_edge.android_sim`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.errors import SimulationError

from .command import EdgeCommand, check_is_bundle, examples, json_option, spelled, written_parameters
from .device_list import print_devices
from .options.engine import prompts_option, weights_option
from .options.question import QuestionChoice, question_options
from .progress import ProgressLine
from .terminal import harmless, print_json

if TYPE_CHECKING:
    from autoglm_edge.android_sim.budget import AppState
    from autoglm_edge.android_sim.limits.enforcement import Wish
    from autoglm_edge.android_sim.planned import Planned
    from autoglm_edge.android_sim.simulate import Ask
    from autoglm_edge.android_sim.simulation import Simulation
    from autoglm_edge.runtime.session import Prefill, Weights

_OF_ARM = (
    *("bundles", "arm64", "arm64_cpu", "as_json"),
    *("prompt", "images", "no_image", "max_tokens", "context"),
)
"""Parameters that --arm64 takes; the others are of a run inside limits."""


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        "autoglm simulate pocket-int4 --device sd8g3-16 --plot timeline.png",
        "autoglm simulate out --device phone-12 --state service --plan",
    ),
)
@click.argument("bundles", metavar="OUT...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--device", "device", metavar="ID_OR_FILE", help="A built-in profile, or a TOML file. [default: phone-8]"
)
@click.option("--all", "every", is_flag=True, help="Every built-in profile, one after the other.")
@click.option("--list-devices", is_flag=True, help="Print the built-in profiles and stop.")
@click.option(
    "--state",
    type=click.Choice(["visible", "service"]),
    default="visible",
    show_default=True,
    help="Of the app: in the foreground, or a service without a window.",
)
@click.option("--plan", "plan_only", is_flag=True, help="Foretell from the bundle alone; run nothing.")
@question_options
@click.option(
    "--enforcement",
    type=click.Choice(["auto", "cgroup_v2", "cgroup_v1", "rlimit_data", "watchdog", "none"]),
    default="auto",
    show_default=True,
    help="What holds the run to its limits.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=1e6),
    default=900.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop the run after so long.",
)
@click.option("--throttle", is_flag=True, help="Also slow down processor and storage to the device's.")
@weights_option
@prompts_option
@click.option("--no-prepare", is_flag=True, help="Pack weights inside the limits, not before.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write the timeline as PNG.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write one offline page.")
@json_option
@click.option(
    "--arm64", is_flag=True, help="Check the numerics on emulated ARM instead; fetches some 145 MB, once."
)
@click.option("--arm64-cpu", multiple=True, metavar="NAME", help="Only this CPU; repeatable.")
@click.pass_context
def simulate(
    ctx: click.Context,
    bundles: tuple[Path, ...],
    device: str | None,
    every: bool,
    list_devices: bool,
    state: AppState,
    plan_only: bool,
    question: QuestionChoice,
    enforcement: Wish,
    timeout: float,
    throttle: bool,
    weights: Weights,
    prompts: Prefill,
    no_prepare: bool,
    plot: Path | None,
    html: Path | None,
    as_json: bool,
    arm64: bool,
    arm64_cpu: tuple[str, ...],
) -> None:
    """Run the bundle in the folder OUT as an app on a device, inside its limits.

    The real runtime runs in a child process that may have what the device gives an app. What comes out:
    whether it lives, at which moment it was killed otherwise, its memory by phase, what it reads again from
    storage, what the low memory killer and Google Play would say, whether the output is still right
    (--reference), and how fast the device may decode, as a range. Speeds of a device are projected, never
    measured. With several folders, or --all, a table of devices and bundles comes last.

    Exit status 1: an app would be killed there, or would read its weights again and again.
    """
    if list_devices:
        print_devices(as_json=as_json)
        return
    _check_usage(bundles, device, every, plan_only, question, plot, html, arm64, arm64_cpu)
    if arm64:
        _refuse_others(ctx)
    for bundle in bundles:
        check_is_bundle(bundle)
    if arm64:
        _check_arm(ctx, bundles[0], arm64_cpu, question.ask(weights, prompts), as_json)
        return
    from autoglm_edge.android_sim.device import find_device
    from autoglm_edge.android_sim.device import list_devices as built_in
    from autoglm_edge.android_sim.simulate import DEFAULT_DEVICE, plan
    from autoglm_edge.android_sim.simulate import simulate as run

    devices = built_in() if every else (find_device(device or DEFAULT_DEVICE),)
    ask = question.ask(weights, prompts)
    found: list[Simulation | Planned] = []
    progress = ProgressLine()
    try:
        for profile in devices:
            for bundle in bundles:
                item: Simulation | Planned
                if plan_only:
                    own = question.is_own  # else a step of a phone agent is foretold
                    item = plan(bundle, profile, state=state, ask=ask, asked=own, prepare=not no_prepare)
                else:
                    item = run(
                        bundle,
                        profile,
                        state=state,
                        ask=ask,
                        enforcement=enforcement,
                        timeout=timeout,
                        prepare=not no_prepare,
                        throttle=throttle,
                        tell=progress,
                    )
                found.append(item)
                if len(devices) * len(bundles) == 1:
                    click.echo(harmless(item.to_table()))
    finally:
        progress.close()
    _write(found, plot, html)
    if len(found) > 1:
        from autoglm_edge.android_sim.report.matrix import Matrix

        click.echo(harmless(Matrix.of(found).to_table()))
    if as_json:
        documents = [item.to_dict() for item in found]
        print_json(documents[0] if len(documents) == 1 else {"runs": documents})
    if not all(item.lives for item in found):
        ctx.exit(1)


def _check_usage(
    bundles: tuple[Path, ...],
    device: str | None,
    every: bool,
    plan_only: bool,
    question: QuestionChoice,
    plot: Path | None,
    html: Path | None,
    arm64: bool,
    arm64_cpu: tuple[str, ...],
) -> None:
    """Options that do not go together.

    Raises:
        click.UsageError: the first of them.
    """
    if not bundles:
        raise click.UsageError("name the folder of a bundle, or use --list-devices")
    compared = question.reference is not None
    wrong = (
        (every and device is not None, "--all and --device exclude each other"),
        (bool(question.images) and question.no_image, "--image and --no-image exclude each other"),
        (plan_only and plot is not None, "--plan runs nothing, so there is no timeline for --plot"),
        (plan_only and html is not None, "--plan runs nothing, so there is no page for --html"),
        (compared and plan_only, "--plan runs nothing, so nothing is compared with --reference"),
        (bool(question.cases) and not compared, "--case names a prompt of --reference, which is missing"),
        (
            plot is not None and (every or len(bundles) > 1),
            "--plot draws one run; name one bundle and device",
        ),
        (arm64 and len(bundles) > 1, "--arm64 checks one bundle"),
        (bool(arm64_cpu) and not arm64, "--arm64-cpu is for --arm64"),
    )
    for is_wrong, sentence in wrong:
        if is_wrong:
            raise click.UsageError(sentence)


def _refuse_others(ctx: click.Context) -> None:
    """Options that were given and would have no effect beside --arm64.

    Raises:
        click.UsageError: the first of them.
    """
    for option in written_parameters(ctx):
        if option.name not in _OF_ARM:
            raise click.UsageError(f"--arm64 is a check of its own; leave {spelled(option)} out")


def _write(found: Sequence[Any], plot: Path | None, html: Path | None) -> None:
    """The picture and the page."""
    if plot is not None:
        from autoglm_edge.android_sim.report.timeline import draw_png

        item = found[0]
        draw_png(item.trace, item.budget, item.verdict, item.title, plot)
    if html is not None:
        from autoglm_edge.android_sim.report.page import html_page

        try:
            html.write_text(html_page(found), encoding="utf-8")
        except OSError as error:
            raise SimulationError(
                f"the page {html} cannot be written ({error.strerror or error}); name another place"
            ) from error


def _check_arm(
    ctx: click.Context,
    bundle: Path,
    cpus: tuple[str, ...],
    ask: Ask,
    as_json: bool,
) -> None:
    """The numerics on emulated ARM CPUs."""
    from autoglm_edge.android_sim.arm64.check import Question, check_arm64
    from autoglm_edge.android_sim.arm64.qemu import CPUS

    question = Question(ask.prompt, ask.images, ask.max_tokens, ask.context)
    progress = ProgressLine()
    try:
        report = check_arm64(bundle, cpus or tuple(CPUS), progress, question=question)
    finally:
        progress.close()
    click.echo(harmless(report.to_table()))
    if as_json:
        print_json(json.loads(report.to_json()))
    if not report.passed:
        ctx.exit(1)
