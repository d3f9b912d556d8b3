"""`autoglm info`: what a bundle is, and whether it is intact.

In: a bundle folder. Out: a table or a document on stdout: the manifest's facts, what follows from them, and
how the bundle would run on this machine. A skin over `Bundle.open`, `Bundle.verify`, `plan_model` and what a
bench left; loads no graph of the bundle.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.errors import EdgeError

from .command import EdgeCommand, bundle_argument, check_is_bundle, examples, json_option
from .prepared_parts import describe, prepared_parts
from .progress import ProgressLine
from .quantities import format_bytes
from .terminal import harmless, print_json

if TYPE_CHECKING:
    from autoglm_edge.runtime.bundle import Bundle
    from autoglm_edge.runtime.manifest import ImageSpec, Manifest

SCREENS = ((720, 1600), (1080, 2400), (1440, 3200))
"""Usual screenshots, width and height, whose tokens are told."""
BUDGETS = (256, 512, 768, 1024, 1536, 2048, 3072)
"""Budgets of image tokens that are told, as far as a bundle's own is larger."""
BUDGET_SCREEN = (1080, 2400)
"""The screenshot that they are told for."""
CONTEXTS = (4096, 25480)
"""Context lengths whose cache is told; the second is the one that Open-AutoGLM's README serves with."""


@click.command(
    cls=EdgeCommand,
    epilog=examples("autoglm info pocket-int4", "autoglm info pocket-int4 --verify --json"),
)
@bundle_argument
@click.option(
    "--verify", is_flag=True, help="Read every file and compare its SHA-256; exit 1 if one differs."
)
@json_option
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
            {
                **_document(opened.manifest),
                **_costs(opened)[0],
                **_plan(opened)[0],
                "bundle": str(bundle),
                "verified": True if verify else None,
            }
        )


def image_tokens(manifest: Manifest) -> dict[str, int]:
    """Tokens that usual screenshots become, by "WIDTHxHEIGHT"."""
    return {f"{width}x{height}": _tokens((width, height), manifest.image) for width, height in SCREENS}


def budget_tokens(manifest: Manifest) -> dict[int, int]:
    """Tokens that a screenshot of BUDGET_SCREEN becomes, by --max-image-tokens; the bundle's own last."""
    own = manifest.image.max_tokens
    least = -(-manifest.image.min_pixels // manifest.image.pixels_per_token)
    budgets = [budget for budget in BUDGETS if least <= budget < own]
    tokens = {budget: _tokens(BUDGET_SCREEN, manifest.image.with_max_tokens(budget)) for budget in budgets}
    return tokens | {own: _tokens(BUDGET_SCREEN, manifest.image)}


def _tokens(screen: tuple[int, int], image: ImageSpec) -> int:
    from autoglm_edge.runtime.prompt.image import fit

    width, height = screen
    fitted_height, fitted_width = fit(height, width, image)
    side = image.patch_size * image.merge_size
    return (fitted_height // side) * (fitted_width // side)


def _costs(bundle: Bundle) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What pictures cost here, as a document and as rows."""
    from autoglm_edge.measure.costs import known_costs

    costs = known_costs(bundle)
    if costs is None:
        return {"image_costs": None}, [("image cost", "not measured on this machine; run `autoglm bench`")]
    when = f"measured here on {costs.date} by `autoglm bench`, {costs.threads} threads"
    rows = [("image cost" if not number else "", str(cost)) for number, cost in enumerate(costs.images)]
    return {"image_costs": costs.to_json()}, [*rows, ("", when)]


def _plan(bundle: Bundle) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """How the bundle would run here, as a document and as rows."""
    from autoglm_edge.runtime.plan import plan_model
    from autoglm_edge.runtime.session import SessionOptions

    parts = prepared_parts(bundle)
    rows = [(f"prepared {name}", describe(state)) for name, state in parts.items()]
    try:
        plan = plan_model(bundle, SessionOptions())
    except EdgeError as error:  # it cannot run here; what it is can be shown all the same
        return {"plan": None, "plan_error": str(error), "prepared": parts}, [("here", str(error)), *rows]
    here = [
        ("here", f"prompts by {plan.prefill} ({plan.prefill_reason})"),
        ("", f"weights {plan.weights} ({plan.weights_reason})"),
        ("", f"{plan.threads} threads ({plan.threads_reason})"),
    ]
    return {"plan": dataclasses.asdict(plan), "plan_error": None, "prepared": parts}, here + rows


def _document(manifest: Manifest) -> dict[str, Any]:
    """The manifest's facts, and what follows from them."""
    plain = dataclasses.asdict(manifest)
    plain["total_bytes"] = manifest.total_bytes
    plain["image_tokens"] = {"most": manifest.image.max_tokens, **image_tokens(manifest)}
    plain["image_budgets"] = {str(budget): tokens for budget, tokens in budget_tokens(manifest).items()}
    plain["kv_bytes"] = {str(tokens): manifest.kv_bytes_per_token * tokens for tokens in CONTEXTS}
    return plain


def _print_table(bundle: Bundle) -> None:
    manifest = bundle.manifest
    source, shape = manifest.source, manifest.geometry
    contexts = [tokens for tokens in CONTEXTS if tokens <= shape.context_length]
    revision = f" at {source.revision[:12]}" if source.revision else ""
    screens = ", ".join(f"{tokens:,} for {screen}" for screen, tokens in image_tokens(manifest).items())
    budgets = ", ".join(f"{budget:,} → {tokens:,}" for budget, tokens in budget_tokens(manifest).items())
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
        ("", f"{BUDGET_SCREEN[0]}x{BUDGET_SCREEN[1]} with --max-image-tokens: {budgets}"),
        ("kv cache", f"{manifest.kv_dtype}, {format_bytes(manifest.kv_bytes_per_token)} per token"),
        *(("", f"{format_bytes(manifest.kv_bytes_per_token * n)} for {n:,} tokens") for n in contexts),
        *(
            (name, f"{format_bytes(part.weight_bytes)} in {part.data}{', 8-bit integers' * part.integer}")
            for name, part in manifest.parts.items()
        ),
        ("in all", f"{format_bytes(manifest.total_bytes)} in {len(manifest.files) + 1} files"),
    ]
    rows += _costs(bundle)[1]
    rows += _plan(bundle)[1]
    rows += [(f"figure {name}", str(value)) for name, value in manifest.figures.items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(harmless(f"{name:{width}}  {value}"))
