"""`autoglm validate`: a bundle against the answers of the original model.

In: a bundle folder and a reference file. Out: figures and a verdict; exit status 1 if a limit is not kept. A
skin over `parity.validate.validate`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .command import EdgeCommand, bundle_argument, check_is_bundle, examples, json_option
from .options.engine import device_option, prompts_option, threads_option
from .progress import show_prompt
from .terminal import print_json

if TYPE_CHECKING:
    from autoglm_edge.runtime.session import Device, Prefill


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        "autoglm validate pocket-int4 --reference ref.safetensors --html parity.html",
        "autoglm validate out --reference ref.safetensors --floor bf16.safetensors --write",
    ),
)
@bundle_argument
@click.option(
    "--reference",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="What `autoglm record` wrote.",
)
@click.option(
    "--floor",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The same model in another dtype, recorded with --like; its loss is added to the limits.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Another quantization, recorded with --like, shown beside; repeatable.",
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as one page.")
@click.option("--write", is_flag=True, help="Write the figures into the bundle's manifest and card.")
@click.option(
    "--limits",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    help="Judge by these limits. [default: by the bundle's fewest bits]",
)
@threads_option
@device_option
@prompts_option
@click.option(
    "--max-image-tokens", type=click.IntRange(min=1), metavar="N", help="Image budget of the reference."
)
@json_option
def validate(
    bundle: Path,
    reference: Path,
    floor: Path | None,
    baselines: tuple[Path, ...],
    html: Path | None,
    write: bool,
    limits: str | None,
    threads: int | None,
    device: Device,
    prompts: Prefill,
    max_image_tokens: int | None,
    as_json: bool,
) -> None:
    """Compare the bundle in the folder OUT with a recorded reference.

    Every prompt goes through the normal engine: its inputs must be the recorded ones, the recorded answer is
    scored token by token, and the prompt is answered. Figures that do not keep the limits of the recipe end
    the command with status 1.
    """
    from autoglm_edge.errors import ParityError
    from autoglm_edge.parity.page import html_page
    from autoglm_edge.parity.stamp import write_figures
    from autoglm_edge.parity.validate import validate as compare

    check_is_bundle(bundle)
    report = compare(
        bundle,
        reference,
        floor=floor,
        baselines=baselines,
        device=device,
        threads=threads or 0,
        max_image_tokens=max_image_tokens,
        prefill=prompts,
        limits=limits,
        progress=show_prompt,
    )
    if html is not None:
        try:
            html.write_text(html_page(report), encoding="utf-8")
        except OSError as error:
            raise ParityError(f"{html} cannot be written: {error.strerror or error}") from error
    if write:
        write_figures(bundle, report)
    click.echo(report.to_table())
    if as_json:
        print_json(json.loads(report.to_json()))
    if not report.passed:
        raise click.exceptions.Exit(1)
