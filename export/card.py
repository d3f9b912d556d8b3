"""README.md of a bundle: what it is, what is in it, how to run it, what it cannot do.

In: the same facts that go into the manifest. Out: Markdown with the front matter that model hubs read. It
holds no date, no path and no digest, so that the same export gives the same card; manifest.json has digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoglm_edge.quantize.channels import ChannelFormat
from autoglm_edge.quantize.recipe import Recipe
from autoglm_edge.runtime.manifest import Calibration, ImageSpec, Part

from .source.checkpoint import ModelConfig

CARD_NAME = "README.md"

_TEXT = """# {title}

{model} as ONNX graphs, made by {created_by} with the recipe `{recipe}`. It takes a screenshot of a phone
and a task, and answers with the next action.

## Run it

With the program installed that made it:

```bash
autoglm run path/to/this/folder --image screenshot.png "打开设置"
```

```python
import autoglm_edge as ag

messages = [
    {{
        "role": "user",
        "content": [{{"type": "image", "image": "screenshot.png"}}, {{"type": "text", "text": "打开设置"}}],
    }}
]
with ag.load("path/to/this/folder") as engine:
    for delta in engine.chat(messages):
        print(delta.text, end="")
```

`autoglm info path/to/this/folder --verify` checks every file against its SHA-256 in `manifest.json`.

## Recipe

Activations, scales and float weights are {activations}; accuracy level {level}. The first rule that matches
a tensor's name decides; norms, biases and whatever no rule matches stay float.

{rules}{prefill}{calibration}

## Files

{files}

Weights by part: {parts}.

## Memory

Besides the weights, each token in the context takes {kv_bytes:,} bytes of KV cache: {kv_4k} at 4,096
tokens, {kv_full} at the full {context:,}.{kv}

## Figures

{figures}

## Limits

- At most {image_tokens:,} tokens per image ({megapixels:.1f} megapixels); larger pictures are scaled down.
  Still images only, no video.
- Context: {context:,} tokens, image tokens included.
{quantized}- The model acts on a real phone when a client lets it. Keep a person in the loop where money or
  data is at stake.

## Licence

The weights are those of {model}, changed in format only. The licence of that model applies to them, not
the licence of the program that converted them; read it before you pass this folder on.
"""
_REFINED = {"none": "", "search": ", scales by search", "gptq": ", by GPTQ"}
_PREFILL = """

To read prompts with, the layers are there once more in `prefill.onnx`: what is stored in blocks above,
in 8 bits with a scale per channel."""
_QUANTIZED = """- Weights are rounded. Where an exact tap matters, compare with the original model first.
"""


def model_card(
    *,
    config: ModelConfig,
    model: str,
    recipe: Recipe,
    image: ImageSpec,
    created_by: str,
    kv_bytes_per_token: int,
    parts: Mapping[str, Part],
    sizes: Mapping[str, int],
    licence: str | None = None,
    figures: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    kv_calibration: Calibration | None = None,
) -> str:
    """Write the card.

    Args:
        config: of the checkpoint.
        model: hub id or folder name.
        recipe: as applied.
        image: with the image budget of the bundle.
        created_by: program and version.
        kv_bytes_per_token: of the cache.
        parts: of the manifest.
        sizes: bytes of every file but the manifest and the card itself.
        licence: identifier that the checkpoint's own card gives, if it gives one.
        figures: of the manifest, once measured.
        calibration: of the manifest.
        kv_calibration: of the manifest.
    """
    context = config.text.context_length
    pixels = image.max_pixels / image.temporal_patch_size
    body = _TEXT.format(
        title=f"{model.rsplit('/', 1)[-1]} {recipe.name}",
        model=model,
        created_by=created_by,
        recipe=recipe.name,
        activations=recipe.activations,
        level=recipe.accuracy_level,
        rules=_rules(recipe),
        prefill="" if recipe.prefill == "none" else _PREFILL,
        calibration="" if calibration is None else _calibrated(calibration),
        files=table(["file", "bytes"], [[f"`{name}`", f"{size:,}"] for name, size in sorted(sizes.items())]),
        parts=", ".join(f"{name} {readable(part.weight_bytes)}" for name, part in parts.items()),
        kv_bytes=kv_bytes_per_token,
        kv_4k=readable(4096 * kv_bytes_per_token),
        kv_full=readable(context * kv_bytes_per_token),
        kv="" if kv_calibration is None else _held_in_bytes(kv_calibration),
        context=context,
        figures=_figures(figures or {}),
        image_tokens=image.max_tokens,
        megapixels=pixels / 1e6,
        quantized=_QUANTIZED if is_quantized(recipe) else "",
    )
    return _front_matter(model, recipe, licence) + body


def _front_matter(model: str, recipe: Recipe, licence: str | None) -> str:
    lines = ["---"]
    if model.count("/") == 1 and not model.startswith(("/", ".")):
        lines.append(f"base_model: {model}")
        if is_quantized(recipe):
            lines.append("base_model_relation: quantized")
    lines += ["library_name: onnxruntime", "pipeline_tag: image-text-to-text"]
    if licence:
        lines.append(f"license: {licence}")
    return "\n".join([*lines, "---", "", ""])


def is_quantized(recipe: Recipe) -> bool:
    """Whether any rule makes integers of weights."""
    return any(rule.format is not None for rule in recipe.rules)


def _rules(recipe: Recipe) -> str:
    if not recipe.rules:
        return "No rules: every tensor is float."
    rows = []
    for rule in recipe.rules:
        form = rule.format
        stored = "float"
        if isinstance(form, ChannelFormat):
            stored = f"{form.bits} bits, a scale per channel{_groups(form)}{_REFINED[rule.refine]}"
        elif form is not None:
            kind = "symmetric" if form.symmetric else "with zero points"
            stored = f"{form.bits} bits, blocks of {form.block_size}, {kind}{_REFINED[rule.refine]}"
        rows.append([f"`{rule.pattern}`", rule.layers or "all", stored])
    return table(["tensors", "layers", "stored as"], rows)


def _groups(form: ChannelFormat) -> str:
    return f" and {form.groups} groups of columns" if form.groups > 1 else ""


def _calibrated(calibration: Calibration) -> str:
    return (
        f"\n\nGPTQ rounded for what the layers see on {calibration.prompts:,} prompts, "
        f"{calibration.tokens:,} tokens."
    )


def _held_in_bytes(calibration: Calibration) -> str:
    return (
        " The cache is in 8-bit integers, with\nscales per layer, head and channel that were measured on "
        f"{calibration.prompts:,} prompts, {calibration.tokens:,} tokens."
    )


def _figures(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "Parity with the original model has not been measured yet for these files, nor has memory."
    rows = [[name.replace("_", " "), str(value)] for name, value in sorted(figures.items())]
    return table(["figure", "value"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def readable(size_bytes: int) -> str:
    """A size for people: 1,234,567 is "1.2 MB"; decimal units, as on a disk's label."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
