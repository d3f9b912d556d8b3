"""Scores of a given sequence: what the model would have said at each place, for whoever compares.

In: ids and pictures. Out: logits (t, V), in order. Knows nothing of answers: nothing is sampled, and nothing
that is known is reused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm_edge.errors import ContextLengthError, RequestError

from .answer import Clock
from .checks import is_whole
from .claim import Claim
from .generation import Cancel
from .manifest import ImageSpec, Manifest
from .prompt.build import Prompt, prompt_from_ids
from .reading import Scores
from .runner import Runner

Picture = Image.Image | bytes | str | Path


class Scorer:
    """Scores sequences with the graphs of an engine."""

    def __init__(
        self,
        runner: Runner,
        manifest: Manifest,
        image: ImageSpec,
        context: int,
        claim: Claim,
    ) -> None:
        """Nothing is run yet.

        Args:
            runner: of the engine.
            manifest: of the bundle.
            image: how pictures are taken.
            context: tokens that fit.
            claim: of the engine, which is taken as long as rows are computed.
        """
        self._runner = runner
        self._manifest = manifest
        self._image = image
        self._context = context
        self._claim = claim

    def chunks(
        self, input_ids: Sequence[int] | NDArray[np.int64], images: Sequence[Picture], start: int
    ) -> Iterator[Scores]:
        """Logits (t, V) of the tokens from `start` on, a few at a time; see `Engine.score_chunks`.

        Raises:
            RequestError: placeholders and images do not agree, an id is unknown, or `start` is no token.
            ContextLengthError: the sequence does not fit.
        """
        tokens, vocab = self._manifest.tokens, self._manifest.geometry.vocab
        prompt = prompt_from_ids(input_ids, images, image=self._image, tokens=tokens)
        if not 0 <= prompt.ids.min() <= prompt.ids.max() < vocab:
            raise RequestError(
                f"input_ids range from {prompt.ids.min()} to {prompt.ids.max()}, "
                f"the model knows 0 to {vocab - 1}"
            )
        if len(prompt.ids) > self._context:
            raise ContextLengthError(len(prompt.ids), 0, self._context)
        if not (is_whole(start) and 0 <= start < len(prompt.ids)):
            raise RequestError(f"start is {start!r}, must be one of the {len(prompt.ids)} tokens, from 0")
        return self._rows(prompt, int(start))

    def _rows(self, prompt: Prompt, start: int) -> Iterator[Scores]:
        with self._claim.take():
            yield from self._runner.run(
                prompt, start, cancelled=Cancel(None).is_set, clock=Clock(), reuse=False
            )
