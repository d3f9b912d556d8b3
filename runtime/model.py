"""The graphs of a bundle as functions on arrays.

In: patches, token ids, hidden states. Out: image features, hidden states, logits. Knows the graph contract of
docs/bundle.md, and opens each graph as `runtime.plan` says; knows nothing of prompts, text or sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError, DeviceError

from .bundle import Bundle
from .cache import KVCache
from .layerwise.layers import Layers
from .machine.integers import WIDENED
from .machine.limits import anonymous_bytes, trim_memory
from .machine.prepared import LogTell, Tell, discard_prepared, prepare, prepared_root, prepared_state
from .manifest import Manifest
from .plan import PREFILL_FROM_TOKENS, PREPARED_PARTS, ModelPlan, is_integer, plan_model
from .prompt.image import PatchedImage
from .session import MAPPED, Binding, SessionOptions, open_session, run_errors, shrinking_run

__all__ = ["Model", "ModelPlan"]

COPIED = 0.3
"""Anonymous memory, as a part of the weights, from which prepared weights count as not mapped."""
_SEEN_BYTES = 50_000_000
"""Least weights whose place is seen in the memory of the process, beside all else that a session takes."""


class Model:
    """Sessions of a bundle; vision and prefill graph are loaded when they are first needed.

    Attributes:
        bundle: what is run.
        options: device, threads and wishes.
        plan: what was chosen, and why; what was found while loading is in it.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions, tell: Tell | None = None) -> None:
        """Open embedding and decoder.

        Args:
            bundle: opened bundle.
            options: device, threads and wishes.
            tell: told when weights are prepared, or cannot be; default the log.

        Raises:
            BundleError: a graph cannot be loaded, or is not what the manifest says.
            DeviceError: the device's libraries cannot be loaded, or this CPU would compute wrongly.
            RequestError: the options ask for what this bundle or device does not have.
        """
        self.bundle = bundle
        self.options = options
        self.dtype = np.dtype(bundle.manifest.activations)
        self._tell = tell or LogTell()
        self.plan: ModelPlan = plan_model(bundle, options)
        if self.plan.prepare:
            self._prepare()
        self._embedding = self._open("embedding")
        self._decoder = self._open("decoder")
        self._bindings: WeakKeyDictionary[KVCache, Binding] = WeakKeyDictionary()
        self._prefill_bindings: WeakKeyDictionary[KVCache, Binding] = WeakKeyDictionary()
        # Activations of a long prefill or of a picture are given back after the run, not kept for the next.
        self._shrink = shrinking_run() if options.device == "cpu" else ort.RunOptions()

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
        feeds = _feeds(embeds, positions, cache) | {"num_logits_to_keep": np.array(keep, np.int64)}
        shape = (1, min(keep, tokens) or tokens, self.bundle.manifest.geometry.vocab)
        logits = np.empty(shape, np.float32)
        binding = _bound(self._bindings, self._decoder, cache)
        binding.run(feeds, {"logits": logits}, self._shrink if tokens > 1 else None)
        cache.length += tokens
        scores: NDArray[np.float32] = logits[0]
        return scores

    def prefill(
        self,
        embeds: NDArray[np.floating],
        positions: NDArray[np.int64],
        cache: KVCache,
        *,
        by_decoder: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Append T tokens to the cache without scores; as the plan says, if they are enough for it.

        Args:
            embeds: (1, T, C); `plan.prefill_chunk` is a good T.
            positions: (3, T).
            cache: holds the P tokens before; holds P + T afterwards, or P if cancelled.
            by_decoder: by the decoder, whatever the plan says.
            cancelled: asked between runs of a graph, where there are several.

        Returns:
            False if it was cancelled.

        Raises:
            BundleError: the prefill graph cannot be loaded, or a graph fails.
            DeviceError: there is not enough memory.
        """
        tokens = embeds.shape[1]
        if by_decoder or self.plan.prefill == "decoder" or tokens < PREFILL_FROM_TOKENS:
            self.forward(embeds, positions, cache, keep=1)
            return True
        feeds = _feeds(embeds, positions, cache)
        if self.plan.prefill == "layers":
            return self._layers.prefill(embeds, positions, cache, cancelled)
        _bound(self._prefill_bindings, self._prefill, cache).run(feeds, {}, self._shrink)
        cache.length += tokens
        return True

    @cached_property
    def _vision(self) -> ort.InferenceSession:
        return self._open("vision")

    @cached_property
    def _layers(self) -> Layers:
        return Layers(self.bundle, self.options)

    @cached_property
    def _prefill(self) -> ort.InferenceSession:
        return self._open("prefill")

    def _prepare(self) -> None:
        """Make prepared weights; where that fails, say so and do without them."""
        parts = self.bundle.manifest.parts
        size = sum(parts[part].weight_bytes for part in PREPARED_PARTS)
        try:
            self._tell.say(
                f"Preparing {size / 1e9:.1f} GB of weights for this machine, once, in {prepared_root()} "
                "(remove them with `autoglm prepare --remove`)"
            )
            for part in PREPARED_PARTS:
                prepare(self.bundle, part, self.options, self._tell)
        except (DeviceError, BundleError) as error:
            self._tell.say(str(error))
            if not prepared_state(self.bundle, "decoder").ready:
                self._do_without(str(error))

    def _do_without(self, reason: str) -> None:
        """Plan for weights that are not prepared."""
        weights: Literal["mapped", "packed"] = (
            "mapped" if is_integer(self.bundle.manifest, "decoder") else "packed"
        )
        self.plan = dataclasses.replace(self.plan, weights=weights, weights_reason=reason, prepare=False)

    def _open(self, part: str) -> ort.InferenceSession:
        session = self._open_prepared(part) if part in PREPARED_PARTS else None
        graph = self.bundle.file(self.bundle.manifest.parts[part].graph)
        if session is None:
            session = open_session(graph, self.options, entries=self._entries(part))
        inputs, outputs = _contract(self.bundle.manifest, part)
        given = [*session.get_inputs(), *session.get_overridable_initializers()]
        _check_values(f"{graph}: input", given, inputs)
        _check_values(f"{graph}: output", session.get_outputs(), outputs)
        return session

    def _entries(self, part: str) -> dict[str, str]:
        """Session entries that say where the weights of a part go."""
        if self.options.device != "cpu":
            return {}
        if part == "vision" and self.plan.widened:
            return WIDENED
        if part == "decoder":
            return MAPPED if self.plan.weights == "mapped" else {}
        integer = part == "prefill" or is_integer(self.bundle.manifest, part)
        return MAPPED if integer and self.options.weights != "packed" else {}

    def _open_prepared(self, part: str) -> ort.InferenceSession | None:
        """A part from prepared weights, if the plan has them; None if they are not there after all."""
        if self.plan.weights != "prepared" or (part == "vision" and self.plan.widened):
            return None
        state = prepared_state(self.bundle, part)
        reason = state.reason
        if state.ready:
            trim_memory()
            before = anonymous_bytes()
            try:
                session = open_session(state.graph, self.options, optimize=False)
            except BundleError as error:
                discard_prepared(self.bundle, part)
                reason = f"the prepared ones are damaged and were deleted ({error})"
            else:
                self._check_mapped(part, before)
                return session
        if part == "decoder":
            self._tell.say(f"{part} is loaded without prepared weights: {reason}")
            self._do_without(reason)
        return None

    def _check_mapped(self, part: str, before: int | None) -> None:
        """Compare the growth of anonymous memory with the weights, and correct the plan."""
        trim_memory()  # copies that were packed, compared and freed
        after, size = anonymous_bytes(), self.bundle.manifest.parts[part].weight_bytes
        if part != "decoder" or before is None or after is None:
            return
        copied = max(0, after - before)
        if size >= _SEEN_BYTES and copied > COPIED * size:
            reason = f"the prepared weights were not taken: {copied / 1e9:.1f} GB of memory grew in loading"
            self._tell.say(f"{part}: {reason}")
            self.plan = dataclasses.replace(self.plan, weights="packed", weights_reason=reason, prepare=False)
        else:
            reason = f"mapped, {copied / 1e9:.2f} GB of memory grew in loading {size / 1e9:.2f} GB"
            self.plan = dataclasses.replace(self.plan, weights_reason=reason, prepare=False)


def _feeds(
    embeds: NDArray[np.floating], positions: NDArray[np.int64], cache: KVCache
) -> dict[str, NDArray[Any]]:
    """What decoder and prefill graph are given of the tokens that follow those in the cache."""
    tokens = embeds.shape[1]
    assert cache.length + tokens <= cache.capacity, "the engine checks the context before it computes"
    return {
        "inputs_embeds": np.ascontiguousarray(embeds),
        "attention_mask": np.ones((1, cache.length + tokens), np.int64),
        "position_ids": np.ascontiguousarray(positions[:, None]),
    }


def _bound(
    bindings: WeakKeyDictionary[KVCache, Binding], session: ort.InferenceSession, cache: KVCache
) -> Binding:
    """The binding of a session to a cache, made at its first use."""
    if cache not in bindings:
        bindings[cache] = Binding(session, cache.past, cache.present)
    return bindings[cache]


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
    }
    outputs: dict[str, _Value] = {}
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
