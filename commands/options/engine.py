"""How a bundle is opened: the options that say it, and what they say together.

In: the command line. Out: an `EngineChoice`, which makes an `Opening`. Options that a command takes without
the others are here, too. A skin over `SessionOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .choice import gathered

if TYPE_CHECKING:
    from autoglm_edge.runtime.opening import Opening
    from autoglm_edge.runtime.prompt.template import ImageLayout
    from autoglm_edge.runtime.reuse.options import ReuseOptions
    from autoglm_edge.runtime.session import Device, Prefill, Weights

device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)
image_layout_option = click.option(
    "--image-layout",
    type=click.Choice(["plain", "newline"]),
    default="plain",
    show_default=True,
    help="What stands between picture and text; vLLM's string format has a newline.",
)
prompts_option = click.option(
    "--prompts",
    type=click.Choice(["auto", "native", "integer", "layers", "decoder"]),
    default="auto",
    show_default=True,
    help="What reads prompts.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads. [default: one per core]"
)
weights_option = click.option(
    "--weights",
    type=click.Choice(["auto", "packed", "prepared", "mapped"]),
    default="auto",
    show_default=True,
    help="Where the decoder's weights are while it runs.",
)


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
    device: Device
    weights: Weights
    prompts: Prefill
    no_prepare: bool
    image_layout: ImageLayout
    max_image_tokens: int | None

    def opening(self, bundle: Path, reuse: ReuseOptions, concurrency: int = 1) -> Opening:
        """What opens the engine of a bundle so.

        Args:
            bundle: its folder.
            reuse: what is kept between answers.
            concurrency: answers that are given at a time.
        """
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


engine_options = gathered(
    EngineChoice,
    "engine",
    click.option(
        "--context",
        "--max-model-len",
        "context",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens that prompt and answer may have together. [default: 25480, or the model's own]",
    ),
    threads_option,
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
