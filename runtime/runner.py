"""Runs prompts and sampled tokens through the graphs, and does not compute again what it has.

    prompt ─ Reading (reading.py): what is known, pictures, prefill in pieces ─ scores
    sampled ids ─────────────────────────────────────────────────── decoder ─ scores

In: prompts, ids. Out: logits. The sequences in the KV cache are its own. Knows nothing of text, sampling or
stop strings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import RequestError

from .answer import Clock
from .batch.slots import Slots
from .bundle import Bundle
from .manifest import TokenSpec
from .model import Model
from .pictures import Pictures
from .plan import ModelPlan
from .prompt.build import Prompt
from .prompt.image import PatchedImage
from .reading import Reading, Scores
from .reuse.features import FeatureCache
from .reuse.options import ReuseOptions
from .reuse.prefix import PrefixStore
from .reuse.prefix_folder import BlockFolder
from .reuse.sequence import CachedSequence, text_keys


class Runner:
    """Graphs, cache and what may be reused, of one engine.

    Attributes:
        prefix: whether a prompt begins after the tokens that are already known.
        tokens: special ids.
        pictures: features of pictures, kept and on their way.
    """

    def __init__(
        self,
        model: Model,
        context: int,
        tokens: TokenSpec,
        *,
        count: int = 1,
        prefix: bool = True,
        store: Callable[[CachedSequence], PrefixStore] | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        """Reserve the cache.

        Args:
            model: of the bundle.
            context: tokens to hold.
            tokens: special ids.
            count: sequences that are held at a time.
            prefix: see the class.
            store: makes the store of saved prefixes, given the empty sequence; None saves none.
            features: of pictures encoded before; None keeps none.

        Raises:
            DeviceError: there is not enough memory.
        """
        self.prefix = prefix
        self.tokens = tokens
        self.pictures = Pictures(features)
        self._model: Model | None = model
        self._slots: Slots | None = Slots(model.new_slots(context, count), store if prefix else None)

    @property
    def model(self) -> Model:
        """The graphs.

        Raises:
            RequestError: the engine is closed.
        """
        if self._model is None:
            raise RequestError("this engine is closed; load the bundle again")
        return self._model

    @model.setter
    def model(self, model: Model) -> None:
        self._model = model

    @property
    def plan(self) -> ModelPlan:
        """How the graphs were opened."""
        return self.model.plan

    @property
    def slots(self) -> Slots:
        """What the cache holds.

        Raises:
            RequestError: the engine is closed.
        """
        if self._slots is None:
            raise RequestError("this engine is closed; load the bundle again")
        return self._slots

    @property
    def sequence(self) -> CachedSequence:
        """The sequence in the first slot, of which there may be one only.

        Raises:
            RequestError: the engine is closed.
        """
        return self.slots.sequences[0]

    def close(self) -> None:
        """Free graphs, cache and all that was kept in memory."""
        self._model = self._slots = None
        self.pictures.close()

    def run(
        self,
        prompt: Prompt,
        scored_from: int,
        *,
        cancelled: Callable[[], bool],
        clock: Clock,
        reuse: bool = True,
    ) -> Iterator[Scores]:
        """Read a prompt without a break; arguments as for `Reading`.

        Returns:
            Logits (t, V) of the scored tokens, in order; fewer rows if cancelled.
        """
        reading = Reading(self, prompt, scored_from, cancelled=cancelled, clock=clock, reuse=reuse)
        try:
            yield from (rows for rows in reading.pieces if len(rows))
        finally:
            reading.close()
            self.release(reading.sequence)

    def release(self, sequence: CachedSequence, *, persist: bool = False) -> None:
        """The answer in a sequence has ended; it may be worth to be kept beyond this process."""
        if self._slots is not None:
            self._slots.release(sequence)
            if persist:
                self._slots.persist(sequence)

    def feed(self, sequence: CachedSequence, ids: Sequence[int], position: int) -> Scores:
        """Append text tokens to a sequence.

        Args:
            sequence: which.
            ids: (n,), no placeholders of pictures.
            position: of the first, on all axes.

        Returns:
            Logits (n, V), a row per token.
        """
        array = np.array(ids, np.int64)
        positions = np.broadcast_to(position + np.arange(len(array)), (3, len(array)))
        model = self.model
        sequence.announce(text_keys(ids, position))
        return model.forward(model.embed(array), positions, sequence.cache, len(array))

    def feed_each(self, ids: Sequence[int], positions: Sequence[int]) -> Scores:
        """Append a text token to each active sequence, in the order of their slots.

        Args:
            ids: (n,), one per active sequence.
            positions: (n,), on all axes.

        Returns:
            Logits (n, V).
        """
        model, slots = self.model, self.slots
        for sequence, token, position in zip(slots.sequences[: slots.active], ids, positions, strict=True):
            sequence.announce(text_keys((token,), position))
        embeds = model.embed(np.array(ids, np.int64)).swapaxes(0, 1)
        places = np.broadcast_to(np.array(positions, np.int64), (3, len(positions)))
        return model.forward_each(embeds, places, slots.buffers)

    def encode_image(self, image: PatchedImage) -> NDArray[np.floating]:
        """Features (N, C) of a picture, from the graph."""
        return self.model.encode_image(image)


def make_runner(model: Model, bundle: Bundle, context: int, reuse: ReuseOptions, count: int = 1) -> Runner:
    """A runner of `count` sequences that keeps what the options say.

    Raises:
        DeviceError: there is not enough memory.
    """

    def make_store(sequence: CachedSequence) -> PrefixStore:
        cache = sequence.cache
        seed = {
            "bundle": bundle.fingerprint,
            "dtype": cache.dtype.str,
            "shape": list(cache.row_shape),
            "onnxruntime": ort.__version__,
        }
        folder = None
        if reuse.prefix_cache_dir is not None:
            folder = BlockFolder(
                reuse.prefix_cache_dir,
                reuse.prefix_disk_bytes,
                bundle=bundle.fingerprint,
                dtype=cache.dtype,
                row_shape=cache.row_shape,
            )
        digest = hashlib.sha256(json.dumps(seed).encode()).digest()
        return PrefixStore(digest, cache.row_bytes, reuse.prefix_cache_bytes, folder)

    # Rows of a GPU would have to be fetched over the bus as whole buffers; what is in the cache serves there.
    saves = model.options.device == "cpu" and (reuse.prefix_cache_bytes or reuse.prefix_cache_dir)
    return Runner(
        model,
        context,
        bundle.manifest.tokens,
        count=count,
        prefix=reuse.prefix,
        store=make_store if saves else None,
        features=FeatureCache(reuse.image_cache_bytes),
    )
