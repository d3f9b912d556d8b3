"""How a bundle is opened, as options that several commands share, and as one value of what they say.

In: the command line. Out: an `EngineChoice`, and what is kept between answers. A skin over `SessionOptions`
and `ReuseOptions`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from autoglm_edge.cli_common import device_option, image_layout_option, prompts_option, weights_option
from autoglm_edge.errors import RequestError

if TYPE_CHECKING:
    from autoglm_edge.runtime.opening import Opening
    from autoglm_edge.runtime.reuse.options import ReuseOptions


@dataclass(frozen=True)
class EngineChoice:
    """What was said of the engine; None leaves it to the engine.

    Attributes:
        context: tokens that prompt and answer may have together.
        threads: of an operator.
        device: that runs the graphs.
        weights: where they are, as in SessionOptions.
        prompts: what reads them, as `prefill` in SessionOptions.
        no_prepare: whether weights are left as they are.
        image_layout: what stands between picture and text.
        max_image_tokens: of a picture.
    """

    context: int | None
    threads: int | None
    device: Literal["cpu", "cuda"]
    weights: Literal["auto", "packed", "prepared", "mapped"]
    prompts: Literal["auto", "integer", "layers", "decoder"]
    no_prepare: bool
    image_layout: Literal["plain", "newline"]
    max_image_tokens: int | None

    def opening(self, bundle: Path, reuse: ReuseOptions, concurrency: int = 1) -> Opening:
        """What opens the engine of a bundle so."""
        from autoglm_edge.runtime.opening import Opening
        from autoglm_edge.runtime.session import SessionOptions

        return Opening(
            bundle,
            SessionOptions(self.device, self.threads or 0, self.weights, self.prompts, not self.no_prepare),
            context=self.context,
            image_layout=self.image_layout,
            max_image_tokens=self.max_image_tokens,
            reuse=reuse,
            concurrency=concurrency,
        )


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of `EngineChoice`; the command gets them as its argument `engine`."""

    @functools.wraps(command)
    def gathered(**values: Any) -> None:
        own = {field.name: values.pop(field.name) for field in fields(EngineChoice)}
        command(engine=EngineChoice(**own), **values)

    options = (
        click.option(
            "--context",
            "--max-model-len",
            "context",
            type=click.IntRange(min=1),
            metavar="N",
            help="Tokens that prompt and answer may have together. [default: 25480, or the model's own]",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), metavar="N", help="Threads. [default: one per core]"
        ),
        device_option,
        weights_option,
        prompts_option,
        click.option("--no-prepare", is_flag=True, help="Do not prepare the weights of a large bundle."),
        image_layout_option,
        click.option(
            "--max-image-tokens",
            type=click.IntRange(min=1),
            metavar="N",
            help="Shrink larger pictures to N tokens.",
        ),
    )
    found: Callable[..., None] = gathered
    for option in reversed(options):
        found = option(found)
    return found


def read_reuse(
    folder: Path | None, sizes: Mapping[str, Any], *, lookup: bool, reuse: bool, flag: str
) -> ReuseOptions:
    """What the engine may keep.

    Args:
        folder: for what prompts begin with; None keeps it in memory alone.
        sizes: fields of ReuseOptions in bytes.
        lookup: whether answers are drafted.
        reuse: whether anything is kept.
        flag: that names the folder.

    Raises:
        click.UsageError: options contradict each other.
    """
    from autoglm_edge.runtime.reuse.options import ReuseOptions

    drafts: Literal["auto", False] = "auto" if lookup else False
    if not reuse and (folder is not None or sizes):
        given = flag if folder is not None else "the options of the caches"
        raise click.UsageError(f"--no-reuse keeps nothing; leave it out, or {given}")
    if folder is None and "prefix_disk_bytes" in sizes:
        raise click.UsageError(f"{flag}-bytes is for a folder; name one with {flag}")
    try:
        if not reuse:
            return replace(ReuseOptions.off(), lookup=drafts)
        return ReuseOptions(prefix_cache_dir=folder, lookup=drafts, **sizes)
    except RequestError as error:
        raise click.UsageError(str(error)) from error
