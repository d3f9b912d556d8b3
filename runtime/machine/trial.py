"""One run of a part on made-up inputs: what two ways of opening it must agree on, bit for bit.

In: a session, the manifest, the part's name. Out: what the graph computes. Knows the inputs that
docs/bundle.md describes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.runtime.manifest import Manifest

_TOKENS = 3


def trial(session: ort.InferenceSession, manifest: Manifest, part: str) -> list[NDArray[Any]]:
    """Outputs of the decoder for three tokens, or of the vision tower for four merge blocks."""
    outputs: list[NDArray[Any]] = session.run(None, _feeds(manifest, part))
    return outputs


def _feeds(manifest: Manifest, part: str) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(5)
    if part == "vision":
        side = 2 * manifest.image.merge_size
        patches = rng.standard_normal((side * side, manifest.image.patch_dim)).astype(np.float32)
        return {"pixel_values": patches, "image_grid_thw": np.array([[1, side, side]])}
    shape = manifest.geometry
    embeds = rng.standard_normal((1, _TOKENS, shape.hidden))
    past = np.zeros((1, shape.kv_heads, 0, shape.head_dim), manifest.kv_dtype)
    return {
        "inputs_embeds": embeds.astype(manifest.activations),
        "attention_mask": np.ones((1, _TOKENS), np.int64),
        "position_ids": np.arange(_TOKENS)[None, None].repeat(3, 0),
        "num_logits_to_keep": np.array(0),
        **{
            f"past_key_values.{layer}.{kind}": past
            for layer in range(shape.layers)
            for kind in ("key", "value")
        },
    }
