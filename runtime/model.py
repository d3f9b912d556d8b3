"""The three graphs of a bundle as functions on arrays.

In: patches, token ids, hidden states. Out: image features, hidden states, logits. Knows the graph contract of
docs/bundle.md; knows nothing of prompts, text or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError

from .bundle import Bundle
from .cache import KVCache
from .image import PatchedImage
from .manifest import Manifest
from .session import Binding, SessionOptions, open_session, run_errors


class Model:
    """Sessions of a bundle; the vision tower is loaded when the first image comes."""

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        """Open embedding and decoder.

        Raises:
            BundleError: a graph cannot be loaded, or is not what the manifest says.
            DeviceError: the device's libraries cannot be loaded.
        """
        self.bundle = bundle
        self.options = options
        self.dtype = np.dtype(bundle.manifest.activations)
        self._embedding = self._open("embedding")
        self._decoder = self._open("decoder")
        self._bindings: WeakKeyDictionary[KVCache, Binding] = WeakKeyDictionary()
        # Activations of a long prefill or of a picture are given back after the run, not kept for the next.
        self._shrink = ort.RunOptions()
        if options.device == "cpu":
            self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def new_cache(self, capacity: int) -> KVCache:
        """Buffers for one sequence of up to `capacity` tokens.

        Raises:
            DeviceError: there is not enough memory.
        """
        return KVCache(self.bundle.manifest, capacity, self.options.device)

    def encode_image(self, image: PatchedImage) -> NDArray[np.floating]:
        """Patches of one image -> (N, C) features."""
        session = self._vision
        feeds = {"pixel_values": image.pixel_values, "image_grid_thw": np.array([image.grid], np.int64)}
        with run_errors("the vision tower"):
            features: NDArray[np.floating] = session.run(None, feeds, self._shrink)[0]
        return features

    def embed(
        self, ids: NDArray[np.int64], features: NDArray[np.floating] | None = None
    ) -> NDArray[np.floating]:
        """(T,) ids and (N, C) features of their image placeholders -> (1, T, C)."""
        if features is None:
            features = np.zeros((0, self.bundle.manifest.geometry.hidden), self.dtype)
        feeds = {"input_ids": ids[None], "image_features": features.astype(self.dtype, copy=False)}
        with run_errors("the embedding"):
            embeds: NDArray[np.floating] = self._embedding.run(None, feeds)[0]
        return embeds

    def forward(
        self, embeds: NDArray[np.floating], positions: NDArray[np.int64], cache: KVCache, keep: int = 1
    ) -> NDArray[np.float32]:
        """Append T tokens to the cache and score the last of them.

        Args:
            embeds: (1, T, C).
            positions: (3, T).
            cache: holds the P tokens before; holds P + T afterwards.
            keep: how many of the last positions to score; 0 means all T.

        Returns:
            (n, V) float32.
        """
        tokens = embeds.shape[1]
        assert cache.length + tokens <= cache.capacity, "the engine checks the context before it computes"
        feeds = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "attention_mask": np.ones((1, cache.length + tokens), np.int64),
            "position_ids": np.ascontiguousarray(positions[:, None]),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        shape = (1, min(keep, tokens) or tokens, self.bundle.manifest.geometry.vocab)
        logits = np.empty(shape, np.float32)
        binding = self._bindings.get(cache)
        if binding is None:
            binding = self._bindings[cache] = Binding(self._decoder, cache.past, cache.present)
        binding.run(feeds, {"logits": logits}, self._shrink if tokens > 1 else None)
        cache.length += tokens
        scores: NDArray[np.float32] = logits[0]
        return scores

    @cached_property
    def _vision(self) -> ort.InferenceSession:
        return self._open("vision")

    def _open(self, part: str) -> ort.InferenceSession:
        graph = self.bundle.file(self.bundle.manifest.parts[part].graph)
        session = open_session(graph, self.options)
        inputs, outputs = _contract(self.bundle.manifest, part)
        given = [*session.get_inputs(), *session.get_overridable_initializers()]
        _check_values(f"{graph}: input", given, inputs)
        _check_values(f"{graph}: output", session.get_outputs(), outputs)
        return session


_Value = tuple[str, tuple[int | None, ...]]
"""What a graph must declare of an input or output: its dtype and shape, None for an axis that varies."""


def _contract(manifest: Manifest, part: str) -> tuple[dict[str, _Value], dict[str, _Value]]:
    """Inputs and outputs of a graph as docs/bundle.md has them."""
    shape, activations = manifest.geometry, manifest.activations
    embeds: _Value = (activations, (None, None, shape.hidden))
    features: _Value = (activations, (None, shape.hidden))
    if part == "embedding":
        return {"input_ids": ("int64", (None, None)), "image_features": features}, {"inputs_embeds": embeds}
    if part == "vision":
        patches: _Value = ("float32", (None, manifest.image.patch_dim))
        return {"pixel_values": patches, "image_grid_thw": ("int64", (1, 3))}, {"image_features": features}
    cached: _Value = (manifest.kv_dtype, (None, shape.kv_heads, None, shape.head_dim))
    names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
    inputs: dict[str, _Value] = {
        "inputs_embeds": embeds,
        "attention_mask": ("int64", (None, None)),
        "position_ids": ("int64", (3, None, None)),
        "num_logits_to_keep": ("int64", ()),
    }
    outputs: dict[str, _Value] = {"logits": ("float32", (None, None, shape.vocab))}
    inputs |= {f"past_key_values.{name}": cached for name in names}
    outputs |= {f"present.{name}": cached for name in names}
    return inputs, outputs


_ONNX_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int64": "tensor(int64)"}


def _check_values(where: str, given: Sequence[Any], wanted: Mapping[str, _Value]) -> None:
    """Compare what a session declares with the contract.

    Raises:
        BundleError: they differ; the first difference is named.
    """
    found = {value.name: value for value in given}
    for name, (dtype, shape) in wanted.items():
        value = found.pop(name, None)
        if value is None:
            raise BundleError(f"{where} {name} is missing; {_AGAIN}")
        if value.type != _ONNX_TYPES[dtype]:
            raise BundleError(f"{where} {name} is a {value.type}, but the manifest says {dtype}; {_AGAIN}")
        axes = list(value.shape)
        fits = len(axes) == len(shape) and all(
            not isinstance(axis, int) or size is None or axis == size
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            expected = [axis if size is None else size for axis, size in zip(axes, shape, strict=False)]
            raise BundleError(f"{where} {name} has the shape {axes}, but must have {expected}; {_AGAIN}")
    if found:
        raise BundleError(f"{where} {next(iter(found))} is unknown to this release; {_AGAIN}")


_AGAIN = "graph and manifest are not of one export; export the checkpoint again"
