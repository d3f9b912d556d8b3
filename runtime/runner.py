"""Runs prompts and sampled tokens through the graphs, and does not compute again what it has.

    prompt ─ keys ─ shared with the cache? saved? ─ pictures not yet encoded ─ prefill in chunks ─ scores
    sampled ids ─────────────────────────────────────────────────────────────── decoder ─────── scores

In: prompts, ids. Out: logits. The sequences in the KV cache are its own. Knows nothing of text, sampling or
stop strings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import RequestError

from .answer import Clock
from .batch.slots import Slots
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
    stable_length,
    text_keys,
)

SCORE_CHUNK = 64
"""Tokens per run when every position is scored: V floats each."""

SHARED_CHUNK = 128
"""Tokens per run of a prompt while others wait for their next token, which is a multiple of a block."""

Scores = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt on its way into the cache.

    Attributes:
        sequence: that it becomes; taken until it is released.
        scores: logits (t, V) of the scored tokens, in order; t is 0 where a piece of work gave none. It takes
            a break after each piece, in which other sequences may be run. Fewer rows if cancelled.
    """

    sequence: CachedSequence
    scores: Iterator[Scores]


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
        self._tokens = tokens
        self._model: Model | None = model
        self._slots: Slots | None = Slots(model.new_slots(context, count), store if prefix else None)
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
        """Read a prompt without a break; arguments as for `read`.

        Returns:
            Logits (t, V) of the scored tokens, in order; fewer rows if cancelled.
        """
        reading = self.read(prompt, scored_from, cancelled=cancelled, clock=clock, reuse=reuse)
        try:
            yield from (rows for rows in reading.scores if len(rows))
        finally:
            self.release(reading.sequence)

    def read(
        self,
        prompt: Prompt,
        scored_from: int,
        *,
        cancelled: Callable[[], bool],
        clock: Clock,
        reuse: bool = True,
        others: Callable[[], bool] = lambda: False,
    ) -> Reading:
        """Begin to bring a prompt into the cache and to score its end; there must be a free slot.

        Args:
            prompt: what to run; it fits the context.
            scored_from: first token that is scored, at most the last one. All before are prefilled.
            cancelled: checked before each picture and each run; what is done until then stays in the cache.
            clock: told of what is reused, encoded and prefilled.
            reuse: False computes every token, whatever is known.
            others: whether other sequences wait for their turn; pieces are short then.
        """
        clock.reuse_begins()
        digests = [image_digest(image) for image in prompt.images]
        graph, _ = self._prefill_graph(scored_from)
        keys = prompt_keys(prompt, self._tokens.image, digests, graph=graph, decoded_from=scored_from)
        sequence = self.slots.take(keys)
        scores = self._scores(prompt, scored_from, sequence, keys, digests, cancelled, clock, reuse, others)
        return Reading(sequence, scores)

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

    def _scores(
        self,
        prompt: Prompt,
        scored_from: int,
        sequence: CachedSequence,
        keys: Keys,
        digests: Sequence[bytes],
        cancelled: Callable[[], bool],
        clock: Clock,
        reuse: bool,
        others: Callable[[], bool],
    ) -> Iterator[Scores]:
        none = np.zeros((0, 0), np.float32)
        graph, least = self._prefill_graph(scored_from)
        start = 0
        if not cancelled():
            start = self.slots.begin(sequence, keys, scored_from - least, reuse=reuse and self.prefix)
            sequence.stable = min(stable_length(prompt.ids, self._tokens), scored_from)
        clock.reuse_done(start)
        features: list[NDArray[np.floating]] = []
        for image, digest, skipped in self._pictures(prompt, digests, start, clock):
            if cancelled():
                break
            found = self._features.get(digest)
            clock.image_done(cached=found is not None)
            if found is None:
                for encoded in self._encode(image, others):
                    if encoded is None:
                        yield none
                    else:
                        found = encoded
                assert found is not None
                self._features.put(digest, found)
            features.append(found[skipped:])
        clock.images_done()
        if cancelled():
            return
        shown = np.concatenate(features) if features else none
        begin = start
        while begin < scored_from:
            chunk = PREFILL_CHUNK if graph == DECODER else self.plan.prefill_chunk
            if graph != LAYERS and others():
                chunk = min(chunk, max(SHARED_CHUNK, least))
            end = next(_chunks(begin, scored_from, chunk, least))[1]
            embeds, positions = self._embed(prompt, shown, begin, end), prompt.positions[:, begin:end]
            sequence.announce(keys[begin:end])
            if cancelled():
                return
            for _ in self.model.prefill_pieces(
                embeds, positions, sequence.cache, by_decoder=graph == DECODER
            ):
                yield none
                if cancelled():
                    return
            yield none
            begin = end
        for begin, end in _chunks(scored_from, len(prompt.ids), SCORE_CHUNK):
            if cancelled():
                return
            embeds = self._embed(prompt, shown, begin, end)
            sequence.announce(keys[begin:end])
            positions = prompt.positions[:, begin:end]
            yield self.model.forward(embeds, positions, sequence.cache, end - begin)

    def _encode(
        self, image: PatchedImage, others: Callable[[], bool]
    ) -> Iterator[NDArray[np.floating] | None]:
        """Features of a picture; None as long as it takes and others can go on."""
        if not others():
            yield self.encode_image(image)
            return
        with ThreadPoolExecutor(1, "picture") as pool:
            work = pool.submit(self.encode_image, image)
            while others() and not work.done():
                yield None
            yield work.result()

    def _pictures(
        self, prompt: Prompt, digests: Sequence[bytes], start: int, clock: Clock
    ) -> Iterator[tuple[PatchedImage, bytes, int]]:
        """Pictures whose features the tokens from `start` on need, and how many of their rows they do not."""
        before = int((prompt.ids[:start] == self._tokens.image).sum())
        for image, digest in zip(prompt.images, digests, strict=True):
            if before >= image.tokens:  # its keys and values are there, nobody reads its features
                before -= image.tokens
                clock.image_done(cached=True)
                continue
            yield image, digest, before
            before = 0

    def _prefill_graph(self, tokens: int) -> tuple[int, int]:
        """The graph that prefills a prompt of so many tokens, and the fewest of a run that it takes.

        Which graph computes a token must not depend on what was known before it, or a warm answer would be
        another one than a cold one. So at least that many tokens are left to compute, and in each piece.
        """
        plan = self.plan
        if plan.by_decoder(tokens):
            return DECODER, 0
        return (LAYERS if plan.prefill == "layers" else PREFILL), PREFILL_FROM_TOKENS

    def _embed(
        self, prompt: Prompt, features: NDArray[np.floating], begin: int, end: int
    ) -> NDArray[np.floating]:
        """Hidden states (1, t, C) of a part of a prompt; features (n, C) of its last placeholders."""
        left = int((prompt.ids[begin:] == self._tokens.image).sum())
        count = int((prompt.ids[begin:end] == self._tokens.image).sum())
        own = features[len(features) - left :][:count] if count else None
        return self.model.embed(prompt.ids[begin:end], own)


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


def _chunks(start: int, stop: int, size: int, least: int = 0) -> Iterator[tuple[int, int]]:
    """Pieces of at most `size` tokens and, if there are so many in all, at least `least`."""
    while start < stop:
        end = min(start + size, stop)
        if 0 < stop - end < least:
            end = max((stop - least) // BLOCK_TOKENS * BLOCK_TOKENS, start + 1)
        yield start, end
        start = end
