"""What the KV cache holds, told by a row of integers per token.

Rows are equal if and only if, after equal tokens, keys and values would be computed in the same way.

In: prompts and sampled ids. Out: key rows (T, 7) int64, and how many leading tokens of a prompt the cache has
already. Knows nothing of graphs or of what is saved elsewhere.

A row is the token id, its time, height and width position, 128 bits of the SHA-256 of the picture that it
belongs to (0 for text), and the graph that computes it: an integer prefill graph rounds its weights otherwise
than the decoder does, so a token of an answer does not stand for the same token of a prompt there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.runtime.cache import KVCache
from autoglm_edge.runtime.manifest import TokenSpec
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.prompt.image import PatchedImage

Keys = NDArray[np.int64]
COLUMNS = 7
DECODER, PREFILL, LAYERS, NATIVE = 0, 1, 2, 3
"""What computes keys and values."""


def image_digest(image: PatchedImage) -> bytes:
    """SHA-256 of all that the vision graph gets of a picture: its bytes, their meaning, the grid."""
    digest = hashlib.sha256(repr((image.grid, image.frames, image.patches.shape)).encode())
    digest.update(np.ascontiguousarray(image.values).data)
    digest.update(np.ascontiguousarray(image.patches).data)
    return digest.digest()


def prompt_keys(
    prompt: Prompt, image_token: int, digests: Sequence[bytes], *, graph: int, decoded_from: int
) -> Keys:
    """Key rows (T, 7) of a prompt.

    Args:
        prompt: ids, pictures and positions.
        image_token: id of the placeholder.
        digests: of the pictures, from `image_digest`.
        graph: that computes the tokens before `decoded_from`; the rest is the decoder's.
        decoded_from: in tokens.
    """
    keys = np.zeros((len(prompt.ids), COLUMNS), np.int64)
    keys[:, 0] = prompt.ids
    keys[:, 1:4] = prompt.positions.T
    if digests:
        halves = np.array([np.frombuffer(digest[:16], np.int64) for digest in digests])
        counts = [image.tokens for image in prompt.images]
        keys[prompt.ids == image_token, 4:6] = np.repeat(halves, counts, axis=0)
    keys[:decoded_from, 6] = graph
    return keys


def text_keys(ids: Sequence[int], position: int) -> Keys:
    """Key rows (n, 7) of sampled or drafted tokens, which the decoder computes.

    Args:
        ids: of text.
        position: of the first, on all axes.
    """
    keys = np.zeros((len(ids), COLUMNS), np.int64)
    keys[:, 0] = ids
    keys[:, 1:4] = (position + np.arange(len(ids)))[:, None]
    return keys


def shared_length(first: Keys, second: Keys) -> int:
    """How many leading rows are equal."""
    length = min(len(first), len(second))
    differ = (first[:length] != second[:length]).any(axis=1)
    return int(differ.argmax()) if differ.any() else length


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


class CachedSequence:
    """Keys of the tokens in a KV cache, as many as the cache says it holds.

    Keys are told before a run and count from when it has appended: a run that fails or is interrupted leaves
    both as they were, because it writes behind the last token only.

    Attributes:
        cache: the buffers.
        stable: leading tokens that later prompts will probably share; at most what the cache holds.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._keys = np.empty((cache.capacity, COLUMNS), np.int64)
        self._stable = 0

    @property
    def keys(self) -> Keys:
        """(S, 7) of the tokens held; a view."""
        return self._keys[: self.cache.length]

    @property
    def stable(self) -> int:
        """See the class."""
        return min(self._stable, self.cache.length)

    @stable.setter
    def stable(self, length: int) -> None:
        self._stable = length

    def announce(self, keys: Keys) -> None:
        """Say what the next run, or the next `write`, appends."""
        start = self.cache.length
        self._keys[start : start + len(keys)] = keys

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.cache.truncate(length)

    def take_back(self, count: int) -> None:
        """Forget the last tokens."""
        self.cache.truncate(self.cache.length - count)
