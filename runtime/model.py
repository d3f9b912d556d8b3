"""The three graphs of a bundle as functions on arrays.

In: patches, token ids, hidden states. Out: image features, hidden states, logits. Knows the graph contract of
docs/bundle.md; knows nothing of prompts, text or sampling.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .bundle import Bundle
from .cache import KVCache
from .image import PatchedImage
from .session import SessionOptions, open_session, run_in_place


class Model:
    """Sessions of a bundle; the vision tower is loaded when the first image comes."""

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        self.bundle = bundle
        self.options = options
        self.dtype = np.dtype(bundle.manifest.activations)
        self._embedding = self._open("embedding")
        self._decoder = self._open("decoder")
        # Activations of a long prefill or of a picture are given back after the run, not kept for the next.
        self._shrink = ort.RunOptions()
        if options.device == "cpu":
            self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def new_cache(self, capacity: int) -> KVCache:
        """Buffers for one sequence of up to `capacity` tokens."""
        return KVCache(self.bundle.manifest, capacity, self.options.device)

    def encode_image(self, image: PatchedImage) -> NDArray[np.floating]:
        """Patches of one image -> (N, C) features."""
        feeds = {"pixel_values": image.pixel_values, "image_grid_thw": np.array([image.grid], np.int64)}
        features: NDArray[np.floating] = self._vision.run(None, feeds, self._shrink)[0]
        return features

    def embed(
        self, ids: NDArray[np.int64], features: NDArray[np.floating] | None = None
    ) -> NDArray[np.floating]:
        """(T,) ids and (N, C) features of their image placeholders -> (1, T, C)."""
        if features is None:
            features = np.zeros((0, self.bundle.manifest.geometry.hidden), self.dtype)
        embeds: NDArray[np.floating] = self._embedding.run(
            None, {"input_ids": ids[None], "image_features": features.astype(self.dtype, copy=False)}
        )[0]
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
        arrays = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, cache.length + tokens), np.int64),
            "position_ids": positions[:, None],
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in arrays.items()
        }
        shape = [1, min(keep, tokens) or tokens, self.bundle.manifest.geometry.vocab]
        logits = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cpu", 0)
        run_in_place(
            self._decoder,
            feeds | cache.past,
            {"logits": logits} | cache.present,
            self._shrink if tokens > 1 else None,
        )
        cache.length += tokens
        scores: NDArray[np.float32] = logits.numpy()[0]
        return scores

    @cached_property
    def _vision(self) -> ort.InferenceSession:
        return self._open("vision")

    def _open(self, part: str) -> ort.InferenceSession:
        return open_session(self.bundle.file(self.bundle.manifest.parts[part].graph), self.options)
