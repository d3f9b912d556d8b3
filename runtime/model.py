"""The graphs of a bundle as functions on arrays.

In: patches, token ids, hidden states. Out: image features, hidden states, logits. Knows the graph contract of
docs/bundle.md, and opens each graph as `runtime.plan` says; knows nothing of prompts, text or sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError, DeviceError

from .bundle import Bundle
from .cache import KVCache, KVSlots
from .contract import check_values, declared
from .layerwise.layers import Layers
from .machine.integers import WIDENED
from .machine.limits import anonymous_bytes, trim_memory
from .machine.prepared import LogTell, Tell, discard_prepared, prepare, prepared_root, prepared_state
from .native.layers import NativeLayers
from .plan import PREFILL_FROM_TOKENS, PREPARED_PARTS, ModelPlan, is_integer, plan_model
from .prompt.image import PatchedImage
from .session import MAPPED, SPINNING, Binding, SessionOptions, open_session, run_errors, shrinking_run

__all__ = ["Model", "ModelPlan"]

COPIED = 0.3
"""Anonymous memory, as a part of the weights, from which prepared weights count as not mapped."""
_SEEN_BYTES = 50_000_000
"""Least weights whose place is seen in the memory of the process, beside all else that a session takes."""


SPIN_FROM_BYTES = 1_000_000_000
"""Least weights of a decoder whose threads stay awake during a run. A step of it is hundreds of operators, a
millisecond each, and waking a thread for each adds up; smaller ones share the machine better asleep."""


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
        self._slot_bindings: WeakKeyDictionary[KVSlots, dict[int, Binding]] = WeakKeyDictionary()
        self._prefill_bindings: WeakKeyDictionary[KVCache, Binding] = WeakKeyDictionary()
        # Activations of a long prefill or of a picture are given back after the run, not kept for the next.
        self._shrink = shrinking_run() if options.device == "cpu" else ort.RunOptions()

    def new_cache(self, capacity: int) -> KVCache:
        """Buffers for one sequence of up to `capacity` tokens.

        Raises:
            DeviceError: there is not enough memory.
        """
        return KVCache(self.bundle.manifest, capacity, self.options.device)

    def new_slots(self, capacity: int, count: int) -> KVSlots:
        """Buffers for `count` sequences of up to `capacity` tokens each.

        Raises:
            DeviceError: there is not enough memory.
        """
        return KVSlots(self.bundle.manifest, capacity, count, self.options.device)

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

    def forward_each(
        self, embeds: NDArray[np.floating], positions: NDArray[np.int64], slots: KVSlots
    ) -> NDArray[np.float32]:
        """Append a token to each of the first n sequences, in one run where the device can, and score it.

        Args:
            embeds: (n, 1, C).
            positions: (3, n).
            slots: their caches; each grows by one.

        Returns:
            (n, V) float32.

        Raises:
            BundleError: the graph fails.
            DeviceError: there is not enough memory.
        """
        count = len(embeds)
        caches = slots.caches[:count]
        if count == 1 or not slots.joined:
            rows = [
                self.forward(embeds[row : row + 1], positions[:, row : row + 1], cache)
                for row, cache in enumerate(caches)
            ]
            return np.concatenate(rows)
        lengths = np.array([cache.length for cache in caches])
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            # A shorter sequence ends with what is masked: its row tells where its token goes.
            "attention_mask": (np.arange(lengths.max() + 1) <= lengths[:, None]).astype(np.int64),
            "position_ids": np.ascontiguousarray(positions[:, :, None]),
            "num_logits_to_keep": np.array(1, np.int64),
        }
        logits = np.empty((count, 1, self.bundle.manifest.geometry.vocab), np.float32)
        bindings = self._slot_bindings.setdefault(slots, {})
        if count not in bindings:
            bindings[count] = Binding(self._decoder, slots.past(count), slots.present(count))
        bindings[count].run(feeds, {"logits": logits})
        for cache in caches:
            cache.length += 1
        scores: NDArray[np.float32] = logits[:, 0]
        return scores

    def prefill(
        self,
        embeds: NDArray[np.floating],
        positions: NDArray[np.int64],
        cache: KVCache,
        *,
        by_decoder: bool = False,
    ) -> None:
        """Append T tokens to the cache without scores; see `prefill_pieces`."""
        for _ in self.prefill_pieces(embeds, positions, cache, by_decoder=by_decoder):
            pass

    def prefill_pieces(
        self,
        embeds: NDArray[np.floating],
        positions: NDArray[np.int64],
        cache: KVCache,
        *,
        by_decoder: bool = False,
    ) -> Iterator[None]:
        """Append T tokens to the cache without scores; as the plan says, if they are enough for it.

        Args:
            embeds: (1, T, C); `plan.prefill_chunk` is a good T.
            positions: (3, T).
            cache: holds the P tokens before; holds P + T when the iterator has ended, and P if it is closed
                before that.
            by_decoder: by the decoder, whatever the plan says.

        Returns:
            Iterator that takes a break between runs of a graph, where there are several. The model may run
            other sequences meanwhile.

        Raises:
            BundleError: the prefill graph cannot be loaded, or a graph fails.
            DeviceError: there is not enough memory.
        """
        tokens = embeds.shape[1]
        if by_decoder or self.plan.prefill == "decoder" or tokens < PREFILL_FROM_TOKENS:
            self.forward(embeds, positions, cache, keep=1)
        elif self.plan.prefill == "layers":
            yield from self._layers.prefill(embeds, positions, cache)
        elif self.plan.prefill == "native":
            yield from self._native.prefill(embeds, positions, cache)
        else:
            feeds = _feeds(embeds, positions, cache)
            _bound(self._prefill_bindings, self._prefill, cache).run(feeds, {}, self._shrink)
            cache.length += tokens

    @cached_property
    def _vision(self) -> ort.InferenceSession:
        return self._open("vision")

    @cached_property
    def _layers(self) -> Layers:
        return Layers(self.bundle, self.options)

    @cached_property
    def _native(self) -> NativeLayers:
        return NativeLayers(self.bundle, self.options.thread_count, traces=self.options.traces)

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
        inputs, outputs = declared(self.bundle.manifest, part)
        given = [*session.get_inputs(), *session.get_overridable_initializers()]
        check_values(f"{graph}: input", given, inputs)
        check_values(f"{graph}: output", session.get_outputs(), outputs)
        return session

    def _entries(self, part: str) -> dict[str, str]:
        """Session entries of a part that is opened from its bundle."""
        if self.options.device != "cpu":
            return {}
        if part == "vision" and self.plan.widened:
            return WIDENED
        if part == "decoder":
            return (MAPPED if self.plan.weights == "mapped" else {}) | self._waiting(part)
        integer = part == "prefill" or is_integer(self.bundle.manifest, part)
        return MAPPED if integer and self.options.weights != "packed" else {}

    def _waiting(self, part: str) -> dict[str, str]:
        """Session entries that say how the threads of a part wait for each other."""
        large = self.bundle.manifest.parts[part].weight_bytes >= SPIN_FROM_BYTES
        return SPINNING if part == "decoder" and large and self.options.device == "cpu" else {}

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
                session = open_session(state.graph, self.options, entries=self._waiting(part), optimize=False)
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
