"""Runs prompts and sampled tokens through the graphs, and does not compute again what it has.

    prompt ─ keys ─ shared with the cache? saved? ─ pictures not yet encoded ─ prefill in chunks ─ scores
    sampled ids ─────────────────────────────────────────────────────────────── decoder ─────── scores

In: prompts, ids. Out: logits. The one sequence in the KV cache is its own. Knows nothing of text, sampling or
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
from .bundle import Bundle
from .manifest import TokenSpec
from .model import Model
from .plan import PREFILL_CHUNK, PREFILL_FROM_TOKENS, ModelPlan
from .prompt.build import Prompt
from .prompt.image import PatchedImage
from .reuse.features import FeatureCache
from .reuse.options import ReuseOptions
from .reuse.prefix import BLOCK_TOKENS, PrefixStore
from .reuse.prefix_folder import BlockFolder
from .reuse.sequence import (
    DECODER,
    LAYERS,
    PREFILL,
    CachedSequence,
    Keys,
    image_digest,
    prompt_keys,
    shared_length,
    text_keys,
)

SCORE_CHUNK = 64
"""Tokens per run when every position is scored: V floats each."""

Scores = NDArray[np.float32]


class Runner:
    """Graphs, cache and what may be reused, of one engine.

    Attributes:
        prefix: whether a prompt begins after the tokens that are already known.
    """

    def __init__(
        self,
        model: Model,
        context: int,
        tokens: TokenSpec,
        *,
        prefix: bool = True,
        store: Callable[[CachedSequence], PrefixStore] | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        """Reserve the cache.

        Args:
            model: of the bundle.
            context: tokens to hold.
            tokens: special ids.
            prefix: see the class.
            store: makes the store of saved prefixes, given the empty sequence; None saves none.
            features: of pictures encoded before; None keeps none.

        Raises:
            DeviceError: there is not enough memory.
        """
        self.prefix = prefix
        self._tokens = tokens
        self._model: Model | None = model
        self._sequence: CachedSequence | None = CachedSequence(model.new_cache(context))
        self._store = store(self._sequence) if store is not None and prefix else None
        self._features = features or FeatureCache(0)

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
    def sequence(self) -> CachedSequence:
        """What the cache holds.

        Raises:
            RequestError: the engine is closed.
        """
        if self._sequence is None:
            raise RequestError("this engine is closed; load the bundle again")
        return self._sequence

    def close(self) -> None:
        """Free graphs, cache and all that was kept in memory."""
        self._model = self._sequence = self._store = None
        self._features = FeatureCache(0)

    def run(
        self,
        prompt: Prompt,
        scored_from: int,
        *,
        cancelled: Callable[[], bool],
        clock: Clock,
        reuse: bool = True,
    ) -> Iterator[Scores]:
        """Bring a prompt into the cache and score its end.

        Args:
            prompt: what to run; it fits the context.
            scored_from: first token that is scored, at most the last one. All before are prefilled.
            cancelled: checked before each picture and each run; what is done until then stays in the cache.
            clock: told of what is reused, encoded and prefilled.
            reuse: False computes every token, whatever is known.

        Returns:
            Logits (t, V) of the scored tokens, in order; fewer rows if cancelled.
        """
        if cancelled():
            clock.images_done()
            return
        clock.reuse_begins()
        digests = [image_digest(image) for image in prompt.images]
        graph, least = self._prefill_graph(scored_from)
        keys = prompt_keys(prompt, self._tokens.image, digests, graph=graph, decoded_from=scored_from)
        start = self._begin(keys, scored_from - least, reuse=reuse and self.prefix)
        self.sequence.stable = min(stable_length(prompt.ids, self._tokens), scored_from)
        clock.reuse_done(start)
        features = self._encode(prompt, digests, start, cancelled, clock)
        clock.images_done()
        if features is None:
            return
        chunk = PREFILL_CHUNK if graph == DECODER else self.plan.prefill_chunk
        for begin, end in _chunks(start, scored_from, chunk, least):
            if cancelled():
                return
            embeds, positions = self._embed(prompt, features, begin, end), prompt.positions[:, begin:end]
            self.sequence.announce(keys[begin:end])
            cache = self.sequence.cache
            if not self.model.prefill(
                embeds, positions, cache, by_decoder=graph == DECODER, cancelled=cancelled
            ):
                return
        for begin, end in _chunks(scored_from, len(prompt.ids), SCORE_CHUNK):
            if cancelled():
                return
            embeds = self._embed(prompt, features, begin, end)
            self.sequence.announce(keys[begin:end])
            positions = prompt.positions[:, begin:end]
            yield self.model.forward(embeds, positions, self.sequence.cache, end - begin)

    def feed(self, ids: Sequence[int], position: int) -> Scores:
        """Append text tokens to the sequence.

        Args:
            ids: (n,), no placeholders of pictures.
            position: of the first, on all axes.

        Returns:
            Logits (n, V), a row per token.
        """
        array = np.array(ids, np.int64)
        positions = np.broadcast_to(position + np.arange(len(array)), (3, len(array)))
        self.sequence.announce(text_keys(ids, position))
        model = self.model
        return model.forward(model.embed(array), positions, self.sequence.cache, len(array))

    def take_back(self, count: int) -> None:
        """Forget the last tokens of the sequence."""
        self.sequence.truncate(self.sequence.cache.length - count)

    def persist(self) -> None:
        """Write what later prompts will probably share to the folder, if there is one."""
        if self._store is not None and self._store.on_disk:
            self._save(self._store, in_memory=False)

    def encode_image(self, image: PatchedImage) -> NDArray[np.floating]:
        """Features (N, C) of a picture, from the graph."""
        return self.model.encode_image(image)

    def _prefill_graph(self, tokens: int) -> tuple[int, int]:
        """The graph that prefills a prompt of so many tokens, and the fewest of a run that it takes.

        Which graph computes a token must not depend on what was known before it, or a warm answer would be
        another one than a cold one. So at least that many tokens are left to compute, and in each piece.
        """
        plan = self.plan
        if plan.by_decoder(tokens):
            return DECODER, 0
        return (LAYERS if plan.prefill == "layers" else PREFILL), PREFILL_FROM_TOKENS

    def _begin(self, keys: Keys, limit: int, *, reuse: bool) -> int:
        """Leave in the cache what the sequence begins with, at most `limit` tokens; returns how many.

        Whole blocks: kernels take rows in tiles, and a row that is left over at the end rounds otherwise.
        Taken up on the grid of tiles, a prompt is computed as in a cold run.
        """
        sequence, store = self.sequence, self._store
        shared = min(shared_length(sequence.keys, keys), limit) if reuse else 0
        shared -= shared % BLOCK_TOKENS
        # The cache is the only copy of the last prompt until something else is about to take its place.
        if store is not None and shared < sequence.stable:
            self._save(store)
        sequence.truncate(shared)
        if store is None or not reuse:
            return shared
        chain = store.find(keys, limit)
        if chain and chain[-1].stop > shared:
            for block, rows in store.load(chain, shared):
                sequence.announce(keys[block.start : block.stop])
                sequence.cache.write(block.start, rows)
        return sequence.cache.length

    def _save(self, store: PrefixStore, *, in_memory: bool = True) -> None:
        sequence = self.sequence
        store.save(sequence.keys, sequence.stable, sequence.cache.read, in_memory=in_memory)

    def _encode(
        self,
        prompt: Prompt,
        digests: Sequence[bytes],
        start: int,
        cancelled: Callable[[], bool],
        clock: Clock,
    ) -> NDArray[np.floating] | None:
        """Features (n, C) of the placeholders from token `start` on; None when cancelled."""
        before = int((prompt.ids[:start] == self._tokens.image).sum())
        found: list[NDArray[np.floating]] = []
        for image, digest in zip(prompt.images, digests, strict=True):
            if before >= image.tokens:  # its keys and values are there, nobody reads its features
                before -= image.tokens
                clock.image_done(cached=True)
                continue
            if cancelled():
                return None
            features = self._features.get(digest)
            clock.image_done(cached=features is not None)
            if features is None:
                features = self.encode_image(image)
                self._features.put(digest, features)
            found.append(features[before:])
            before = 0
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def _embed(
        self, prompt: Prompt, features: NDArray[np.floating], begin: int, end: int
    ) -> NDArray[np.floating]:
        """Hidden states (1, t, C) of a part of a prompt; features (n, C) of its last placeholders."""
        left = int((prompt.ids[begin:] == self._tokens.image).sum())
        count = int((prompt.ids[begin:end] == self._tokens.image).sum())
        own = features[len(features) - left :][:count] if count else None
        return self.model.embed(prompt.ids[begin:end], own)


def make_runner(model: Model, bundle: Bundle, context: int, reuse: ReuseOptions) -> Runner:
    """A runner that keeps what the options say.

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
        prefix=reuse.prefix,
        store=make_store if saves else None,
        features=FeatureCache(reuse.image_cache_bytes),
    )


def stable_length(ids: NDArray[np.int64], tokens: TokenSpec) -> int:
    """How many tokens of a prompt the next one of the same conversation will probably share.

    A phone agent takes the picture out of a turn when that is past, so all before the pictures of the last
    turn stays. A turn begins with a token that also ends an answer; without a picture in it all stays.
    """
    ends = np.flatnonzero(np.isin(ids, tokens.eos))
    turn = int(ends[-1]) if ends.size else 0
    places = np.flatnonzero(ids[turn:] == tokens.image)
    if not places.size:
        return len(ids)
    place = turn + int(places[0])
    return place - 1 if place and ids[place - 1] == tokens.image_start else place


def _chunks(start: int, stop: int, size: int, least: int = 0) -> Iterator[tuple[int, int]]:
    """Pieces of at most `size` tokens and, if there are so many in all, at least `least`."""
    while start < stop:
        end = min(start + size, stop)
        if 0 < stop - end < least:
            end = max((stop - least) // BLOCK_TOKENS * BLOCK_TOKENS, start + 1)
        yield start, end
        start = end
