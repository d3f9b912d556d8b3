"""What the graphs of a bundle must declare: names, dtypes and shapes of docs/bundle.md.

In: a manifest, and what a session says of its inputs and outputs. Out: nothing, or the first difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoglm_edge.errors import BundleError

from .manifest import Manifest

Value = tuple[str, tuple[int | None, ...]]
"""What a graph must declare of an input or output: its dtype and shape, None for an axis that varies."""


def declared(manifest: Manifest, part: str) -> tuple[dict[str, Value], dict[str, Value]]:
    """Inputs and outputs of a graph as docs/bundle.md has them."""
    shape, activations = manifest.geometry, manifest.activations
    embeds: Value = (activations, (None, None, shape.hidden))
    features: Value = (activations, (None, shape.hidden))
    if part == "embedding":
        return {"input_ids": ("int64", (None, None)), "image_features": features}, {"inputs_embeds": embeds}
    if part == "vision":
        patches: Value = ("float32", (None, manifest.image.patch_dim))
        return {"pixel_values": patches, "image_grid_thw": ("int64", (1, 3))}, {"image_features": features}
    cached: Value = (manifest.kv_dtype, (None, shape.kv_heads, None, shape.head_dim))
    names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
    inputs: dict[str, Value] = {
        "inputs_embeds": embeds,
        "attention_mask": ("int64", (None, None)),
        "position_ids": ("int64", (3, None, None)),
    }
    outputs: dict[str, Value] = {}
    if part == "decoder":
        inputs["num_logits_to_keep"] = ("int64", ())
        outputs["logits"] = ("float32", (None, None, shape.vocab))
    inputs |= {f"past_key_values.{name}": cached for name in names}
    outputs |= {f"present.{name}": cached for name in names}
    return inputs, outputs


_ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "int64": "tensor(int64)",
}


def check_values(where: str, given: Sequence[Any], wanted: Mapping[str, Value]) -> None:
    """Compare what a session declares with the contract.

    Raises:
        BundleError: they differ; the first difference is named.
    """
    found = {value.name: value for value in given}
    for name, (dtype, shape) in wanted.items():
        value = found.pop(name, None)
        if value is None:
            raise BundleError(f"{where} {name} is missing; {AGAIN}")
        if value.type != _ONNX_TYPES[dtype]:
            raise BundleError(f"{where} {name} is a {value.type}, but the manifest says {dtype}; {AGAIN}")
        axes = list(value.shape)
        fits = len(axes) == len(shape) and all(
            not isinstance(axis, int) or size is None or axis == size
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            expected = [axis if size is None else size for axis, size in zip(axes, shape, strict=False)]
            raise BundleError(f"{where} {name} has the shape {axes}, but must have {expected}; {AGAIN}")
    if found:
        raise BundleError(f"{where} {next(iter(found))} is unknown to this release; {AGAIN}")


AGAIN = "graph and manifest are not of one export; export the checkpoint again"
