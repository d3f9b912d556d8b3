"""`autoglm info`: what a bundle is, and whether it is intact.

In: a bundle folder. Out: a table or a document on stdout. A skin over `Bundle.open` and `Bundle.verify`.
"""

from __future__ import annotations

import dataclasses
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
    from autoglm_edge.runtime.manifest import Manifest

SCREENS = ((720, 1600), (1080, 2400), (1440, 3200))
"""Usual screenshots, width and height, whose tokens are told."""
CONTEXTS = (4096, 25480)
"""Context lengths whose cache is told; the second is the one that Open-AutoGLM's README serves with."""


@click.command(
    cls=EdgeCommand,
    epilog=examples("autoglm info pocket-int4", "autoglm info pocket-int4 --verify --json"),
)
@click.argument("bundle", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--verify", is_flag=True, help="Read every file and compare its SHA-256; exit 1 if one differs."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document as the last line.")
def info(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what the bundle in the folder OUT holds, and what it needs."""
    from autoglm_edge.runtime.bundle import Bundle

    check_is_bundle(bundle)
    opened = Bundle.open(bundle)
    if not as_json:
        _print_table(opened)
    if verify:
        progress = ProgressLine()
        try:
            opened.verify(lambda done, total: progress.show("Checking", done, total))
        finally:
            progress.close()
        if not as_json:
            click.echo(f"Every file is as the manifest says ({len(opened.manifest.files)} files)")
    if as_json:
        print_json(
            {**_document(opened.manifest), "bundle": str(bundle), "verified": True if verify else None}
        )


def image_tokens(manifest: Manifest) -> dict[str, int]:
    """Tokens that usual screenshots become, by "WIDTHxHEIGHT"."""
    from autoglm_edge.runtime.image import fit

    tokens = {}
    for width, height in SCREENS:
        fitted_height, fitted_width = fit(height, width, manifest.image)
        side = manifest.image.patch_size * manifest.image.merge_size
        tokens[f"{width}x{height}"] = (fitted_height // side) * (fitted_width // side)
    return tokens


def _document(manifest: Manifest) -> dict[str, Any]:
    """The manifest's facts, and what follows from them."""
    plain = dataclasses.asdict(manifest)
    plain["total_bytes"] = manifest.total_bytes
    plain["image_tokens"] = {"most": manifest.image.max_tokens, **image_tokens(manifest)}
    plain["kv_bytes"] = {str(tokens): manifest.kv_bytes_per_token * tokens for tokens in CONTEXTS}
    return plain


def _print_table(bundle: Bundle) -> None:
    manifest = bundle.manifest
    source, shape = manifest.source, manifest.geometry
    contexts = [tokens for tokens in CONTEXTS if tokens <= shape.context_length]
    revision = f" at {source.revision[:12]}" if source.revision else ""
    screens = ", ".join(f"{tokens:,} for {screen}" for screen, tokens in image_tokens(manifest).items())
    rows = [
        ("bundle", str(bundle.path)),
        ("made by", manifest.created_by),
        ("source", f"{source.model}{revision}, {source.parameters:,} weights"),
        ("recipe", f"{manifest.recipe.get('name', '?')}, activations {manifest.activations}"),
        ("layers", f"{shape.layers}, {shape.hidden} wide"),
        ("heads", f"{shape.heads} of {shape.head_dim}, {shape.kv_heads} of keys and values"),
        ("vocabulary", f"{shape.vocab:,} ids"),
        ("context", f"{shape.context_length:,} tokens at most"),
        ("image", f"{manifest.image.max_tokens:,} tokens at most; {screens}"),
        ("kv cache", f"{manifest.kv_dtype}, {format_bytes(manifest.kv_bytes_per_token)} per token"),
        *(("", f"{format_bytes(manifest.kv_bytes_per_token * n)} for {n:,} tokens") for n in contexts),
        *(
            (name, f"{format_bytes(part.weight_bytes)} in {part.data}")
            for name, part in manifest.parts.items()
        ),
        ("in all", f"{format_bytes(manifest.total_bytes)} in {len(manifest.files) + 1} files"),
    ]
    rows += [(f"figure {name}", str(value)) for name, value in manifest.figures.items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(harmless(f"{name:{width}}  {value}"))
