"""`autoglm record`: answers of the original model, written down for `autoglm validate`.

In: a checkpoint. Out: a reference file. A skin over `parity.record.record`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .command import EdgeCommand, examples, json_option, needs_extra
from .options.engine import device_option, image_layout_option
from .progress import show_prompt
from .quantities import format_bytes
from .terminal import print_json

if TYPE_CHECKING:
    from autoglm_edge.parity.torch_model import Baseline


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        "autoglm record zai-org/AutoGLM-Phone-9B -o ref.safetensors --device cuda",
        "autoglm record AutoGLM-Phone-9B -o nf4.safetensors --like ref.safetensors --baseline bnb-nf4",
    ),
)
@click.argument("checkpoint", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Reference to write, .safetensors.",
)
@click.option(
    "--prompts",
    default="small",
    show_default=True,
    metavar="SET",
    help="small, full, or a JSON Lines file of your own prompts; see docs/parity.md.",
)
@click.option("--seed", type=int, help="Draw other pictures. [default: a fixed one]")
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of weights and activations.",
)
@click.option(
    "--baseline",
    type=click.Choice(["bnb-nf4", "bnb-int8"]),
    help="Let bitsandbytes quantize the weights: a baseline to compare with.",
)
@click.option(
    "--like",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Score this reference's answers again, for a floor or a baseline of it.",
)
@click.option(
    "--top-k", type=click.IntRange(min=1), default=64, show_default=True, help="Logits kept per position."
)
@click.option("--full-logits", is_flag=True, help="Keep all logits; exact, and large.")
@image_layout_option
@click.option(
    "--max-image-tokens", type=click.IntRange(min=1), metavar="N", help="Image budget, as at the export."
)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face name.")
@click.option("--force", is_flag=True, help="Replace the output.")
@json_option
def record(
    checkpoint: str | None,
    output: Path,
    prompts: str,
    seed: int | None,
    device: Literal["cpu", "cuda"],
    dtype: Literal["float32", "bfloat16"],
    baseline: Baseline | None,
    like: Path | None,
    top_k: int,
    full_logits: bool,
    image_layout: Literal["plain", "newline"],
    max_image_tokens: int | None,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Record what the original model answers, with torch.

    CHECKPOINT is a folder or a Hugging Face name; without it, the small embedded model `pocket` is taken.
    A fixed set of prompts is put to it, Chinese and English, with none, one and several pictures. The file
    holds the likeliest tokens of every position, the answers, vision features, and what it was made with;
    `autoglm validate` compares bundles with it.
    """
    with needs_extra("parity", "recording"):
        from autoglm_edge.parity import record as module
    if checkpoint is None:
        click.echo(
            "No CHECKPOINT given: taking pocket, the small model that comes with this package", err=True
        )
    options: dict[str, Any] = {} if seed is None else {"seed": seed}
    reference = module.record(
        checkpoint,
        output,
        prompts=prompts,
        device=device,
        dtype=dtype,
        baseline=baseline,
        like=like,
        top_k=top_k,
        full_logits=full_logits,
        image_layout=image_layout,
        max_image_tokens=max_image_tokens,
        revision=revision,
        force=force,
        progress=show_prompt,
        **options,
    )
    size_bytes = output.stat().st_size
    click.echo(
        f"{len(reference)} prompts, {reference.fingerprint.title}: {output}, {format_bytes(size_bytes)}"
    )
    if as_json:
        print_json(
            {
                "reference": str(output),
                "model": reference.fingerprint.model,
                "recorded": reference.fingerprint.title,
                "prompts": len(reference),
                "size_bytes": size_bytes,
                "sha256": reference.sha256,
            }
        )
