"""A prompt on its way into the cache, piece by piece.

    keys ─ shared with a slot? saved? ─ pictures not yet encoded ─ pieces of the prompt ─ scores of its end

In: a prompt. Out: logits of its last tokens; between the pieces other sequences may be run, and other prompts
be read. Knows nothing of sampling, and not who has the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .answer import Clock
from .batch.slots import Slots
from .manifest import TokenSpec
from .model import Model
from .pictures import Encoding, Features, Pictures
from .plan import PREFILL_CHUNK, PREFILL_FROM_TOKENS, ModelPlan
from .prompt.build import Prompt
from .prompt.image import PatchedImage
from .reuse.prefix import BLOCK_TOKENS
from .reuse.sequence import DECODER, LAYERS, NATIVE, PREFILL, image_digest, prompt_keys, stable_length

SCORE_CHUNK = 64
"""Tokens per run when every position is scored: V floats each."""

SHARED_CHUNK = 128
"""Tokens per run of a prompt while others wait for their turn, which is a multiple of a block."""

Scores = NDArray[np.float32]
_NONE = np.zeros((0, 0), np.float32)


class Ground(Protocol):
    """What prompts are read with; `runner.Runner` is that."""

    prefix: bool
    tokens: TokenSpec
    pictures: Pictures

    @property
    def model(self) -> Model:
        """The graphs."""

    @property
    def plan(self) -> ModelPlan:
        """How they were opened."""

    @property
    def slots(self) -> Slots:
        """What the cache holds."""

    def encode_image(self, image: PatchedImage) -> NDArray[np.floating[Any]]:
        """Features (N, C) of a picture."""


class Reading:
    """A prompt that is read into a slot of the cache; there must be a free one.

    Attributes:
        sequence: that it becomes; taken until the runner releases it.
        pieces: does a piece of work at each step and gives logits (t, V) of the scored tokens, in order; t is
            0 for a piece that gave none. Fewer rows if cancelled. The first step is not much work: it finds
            what is known, and has the first picture encoded beside, if that is wanted.
        picture: that it waits for; until that is done, a step does nothing.
        inside: it is in the middle of being read layer by layer, and holds what there is once only.
    """

    def __init__(
        self,
        runner: Ground,
        prompt: Prompt,
        scored_from: int,
        *,
        cancelled: Callable[[], bool],
        clock: Clock,
        reuse: bool = True,
        others: Callable[[], bool] = lambda: False,
        beside: bool = False,
    ) -> None:
        """Take a slot.

        Args:
            runner: graphs, cache and pictures.
            prompt: what to run; it fits the context.
            scored_from: first token that is scored, at most the last one. All before are prefilled.
            cancelled: checked before each picture and each run; what is done until then stays in the cache.
            clock: told of what is reused, encoded and prefilled.
            reuse: False computes every token, whatever is known.
            others: whether others wait for their turn; pieces are short then.
            beside: pictures are encoded in another thread.

        Raises:
            RequestError: the engine is closed.
        """
        clock.reuse_begins()
        self._runner = runner
        self._prompt = prompt
        self._scored_from = scored_from
        self._cancelled = cancelled
        self._clock = clock
        self._reuse = reuse and runner.prefix
        self._others = others
        self._beside = beside
        self._digests = [image_digest(image) for image in prompt.images]
        self._graph, self._least = _prefill_graph(runner.plan, scored_from)
        self._layered = self._graph != DECODER and runner.plan.takes_breaks
        self._keys = prompt_keys(
            prompt, runner.tokens.image, self._digests, graph=self._graph, decoded_from=scored_from
        )
        self._begun = False
        self.sequence = runner.slots.take(self._keys)
        self.picture: Encoding | None = None
        self.inside = False
        self.pieces = self._read()

    @property
    def left(self) -> int:
        """Tokens that are still to be run, or found."""
        return len(self._prompt.ids) - (self.sequence.cache.length if self._begun else 0)

    @property
    def layered(self) -> bool:
        """Whether its next piece is read layer by layer."""
        return self._layered and self.left > len(self._prompt.ids) - self._scored_from

    def close(self) -> None:
        """Read no further; what is in the cache stays, and the slot is taken as before."""
        self.pieces.close()
        if self.picture is not None:
            self._runner.pictures.leave(self.picture)
            self.picture = None

    def _read(self) -> Generator[Scores, None, None]:
        self._begin()
        if not self._beside:
            yield _NONE
        features: list[Features] = []
        yield from self._encode(features)
        if self._beside:  # up to here it took no turn
            yield _NONE
        self._clock.images_done()
        if self._cancelled():
            return
        shown = features[0] if len(features) == 1 else np.concatenate(features) if features else _NONE
        while self.sequence.cache.length < self._scored_from:
            self._look_around()
            begin, end = self._next_piece()
            if begin < end:
                yield from self._prefill(shown, begin, end)
            if self._cancelled():
                return
            if end < self._scored_from:  # else the scores come with it: a token's run, not worth a turn
                yield _NONE
        for begin in range(self._scored_from, len(self._prompt.ids), SCORE_CHUNK):
            if self._cancelled():
                return
            end = min(begin + SCORE_CHUNK, len(self._prompt.ids))
            embeds = self._embed(shown, begin, end)
            self.sequence.announce(self._keys[begin:end])
            positions = self._prompt.positions[:, begin:end]
            yield self._runner.model.forward(embeds, positions, self.sequence.cache, end - begin)

    def _begin(self) -> None:
        """Leave in the slot what is known of the prompt."""
        start = 0
        if not self._cancelled():
            slots, limit = self._runner.slots, self._scored_from - self._least
            start = slots.begin(self.sequence, self._keys, limit, reuse=self._reuse)
            self.sequence.stable = min(
                stable_length(self._prompt.ids, self._runner.tokens), self._scored_from
            )
            self._begun = True
        self._clock.reuse_done(start)

    def _encode(self, features: list[Features]) -> Iterator[Scores]:
        """Bring the features of all pictures that tokens still to be run need."""
        pictures, encode = self._runner.pictures, self._runner.encode_image
        placeholders = self._prompt.ids == self._runner.tokens.image
        end = 0
        for image, digest in zip(self._prompt.images, self._digests, strict=True):
            if self._cancelled():
                return
            begin, end = end, end + image.tokens
            there = self._known(placeholders)
            found = pictures.known(digest) if there < end else None
            if self._beside and there < end and found is None:
                self._look_around()  # meanwhile another prompt may have got beyond this picture
                there = self._known(placeholders)
            if there >= end:  # its keys and values are there, nobody reads its features
                self._clock.image_done(cached=True)
                continue
            if found is not None:
                self._clock.image_done(cached=True)
            elif not self._beside:
                found = pictures.encode(image, digest, encode)
                self._clock.image_done(cached=False)
            else:
                self.picture = pictures.ask(image, digest, encode)
                while not self.picture.done:
                    yield _NONE
                    if self._cancelled():
                        return
                found = self._take(self.picture)
            features.append(found[max(0, there - begin) :])

    def _known(self, marked: NDArray[np.bool_]) -> int:
        """How many of the marked tokens (T,) are in the cache."""
        return int(marked[: self.sequence.cache.length].sum())

    def _take(self, picture: Encoding) -> Features:
        self.picture = None
        found, milliseconds = self._runner.pictures.take(picture)
        self._clock.image_done(cached=milliseconds is None)
        self._clock.encoded_beside(milliseconds or 0.0)
        return found

    def _look_around(self) -> None:
        """Take over what another slot has by now of this prompt."""
        if self._reuse:
            self._clock.reuse_begins()
            limit = self._scored_from - self._least
            self._clock.reuse_done(self._runner.slots.adopt(self.sequence, self._keys, limit))

    def _next_piece(self) -> tuple[int, int]:
        """Its first token and the one after its last."""
        begin, stop = self.sequence.cache.length, self._scored_from
        size = PREFILL_CHUNK if self._graph == DECODER else self._runner.plan.prefill_chunk
        if not self._layered and self._others():
            size = min(size, max(SHARED_CHUNK, self._least))
        end = min(begin + size, stop)
        if 0 < stop - end < self._least:  # so few that are left over would be run by another graph
            end = (stop - self._least) // BLOCK_TOKENS * BLOCK_TOKENS
        return begin, end if end > begin else stop

    def _prefill(self, features: Features, begin: int, end: int) -> Iterator[Scores]:
        """Run the tokens from `begin` to `end`; layer by layer it takes breaks."""
        embeds, positions = self._embed(features, begin, end), self._prompt.positions[:, begin:end]
        self.sequence.announce(self._keys[begin:end])
        if self._cancelled():
            return
        model, slots = self._runner.model, self._runner.slots
        if self._layered:
            slots.hold(self.sequence)
            self.inside = True
        try:
            work = model.prefill_pieces(
                embeds, positions, self.sequence.cache, by_decoder=self._graph == DECODER
            )
            for _ in work:
                if self.inside:
                    yield _NONE
                if self._cancelled():
                    return
        finally:
            if self.inside:
                self.inside = False
                slots.let_go(self.sequence)

    def _embed(self, features: Features, begin: int, end: int) -> NDArray[np.floating]:
        """Hidden states (1, t, C) of a part of the prompt; features (n, C) of its last placeholders."""
        ids, token = self._prompt.ids, self._runner.tokens.image
        left = int((ids[begin:] == token).sum())
        count = int((ids[begin:end] == token).sum())
        own = features[len(features) - left :][:count] if count else None
        return self._runner.model.embed(ids[begin:end], own)


def _prefill_graph(plan: ModelPlan, tokens: int) -> tuple[int, int]:
    """The graph that prefills a prompt of so many tokens, and the fewest of a run that it takes.

    Which graph computes a token must not depend on what was known before it, or a warm answer would be
    another one than a cold one. So at least that many tokens are left to compute, and in each piece.
    """
    if plan.by_decoder(tokens):
        return DECODER, 0
    return {"layers": LAYERS, "native": NATIVE}.get(plan.prefill, PREFILL), PREFILL_FROM_TOKENS
