"""Pictures become features, one at a time: at once, or in a thread beside all else.

In: pictures and their digests. Out: features (N, C), computed once as long as they are kept or asked for.
Knows nothing of prompts and of turns. Belongs to one thread, but for the encoding itself.

One at a time, because the activations of a picture are much larger than its features, and a second one would
only slow down the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .prompt.image import PatchedImage
from .reuse.features import FeatureCache

Features = NDArray[np.floating]
Encode = Callable[[PatchedImage], Features]


@dataclass(eq=False)
class Encoding:
    """A picture that is encoded beside, or waits for that.

    Attributes:
        digest: of the picture.
        work: gives the features (N, C) and the milliseconds that they took.
        askers: prompts that wait for it.
        taken: one of them has its features already.
    """

    digest: bytes
    work: Future[tuple[Features, float]]
    askers: int = 1
    taken: bool = False

    @property
    def done(self) -> bool:
        """Whether the features, or what went wrong, can be had at once."""
        return self.work.done()


class Pictures:
    """Features of pictures, by the digest of each."""

    def __init__(self, kept: FeatureCache | None = None) -> None:
        """Nothing is encoded yet.

        Args:
            kept: features of pictures encoded before; None keeps none.
        """
        self._kept = kept or FeatureCache(0)
        self._asked: dict[bytes, Encoding] = {}
        self._pool: ThreadPoolExecutor | None = None

    def known(self, digest: bytes) -> Features | None:
        """Features (N, C) that are kept, or None."""
        self._keep_abandoned()
        return self._kept.get(digest)

    def encode(self, image: PatchedImage, digest: bytes, encode: Encode) -> Features:
        """Features (N, C) of a picture, computed now."""
        features = encode(image)
        self._kept.put(digest, features)
        return features

    def ask(self, image: PatchedImage, digest: bytes, encode: Encode) -> Encoding:
        """Have a picture encoded beside, after those that were asked for before; to be taken or left.

        A picture that is on its way already is not encoded twice.
        """
        self._keep_abandoned()
        if digest in self._asked:
            self._asked[digest].askers += 1
            return self._asked[digest]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "picture")
        encoding = Encoding(digest, self._pool.submit(_timed, encode, image))
        self._asked[digest] = encoding
        return encoding

    def take(self, encoding: Encoding) -> tuple[Features, float | None]:
        """What came of it; waits if it is not done.

        Returns:
            Features (N, C), and the milliseconds of encoding, or None for all but the first who takes them.
        """
        self._forget(encoding)
        features, milliseconds = encoding.work.result()
        self._kept.put(encoding.digest, features)
        first, encoding.taken = not encoding.taken, True
        return features, milliseconds if first else None

    def leave(self, encoding: Encoding) -> None:
        """Do not wait for it any more; if nobody does, it is not begun. One that has begun goes on."""
        encoding.askers -= 1
        if not encoding.askers and encoding.work.cancel():
            self._forget(encoding)

    def wait(self, seconds: float) -> None:
        """Until a picture is done that somebody waits for, but not longer than that."""
        awaited = [encoding.work for encoding in self._asked.values() if encoding.askers]
        if awaited:
            wait(awaited, seconds, FIRST_COMPLETED)

    def close(self) -> None:
        """Begin no more; free what is kept."""
        self._kept = FeatureCache(0)
        self._asked.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _forget(self, encoding: Encoding) -> None:
        """Who asks for the picture from now on begins anew."""
        if self._asked.get(encoding.digest) is encoding:
            del self._asked[encoding.digest]

    def _keep_abandoned(self) -> None:
        """Those that were done after nobody waited for them any more: who asks again soon finds them."""
        for encoding in [*self._asked.values()]:
            if not encoding.askers and encoding.done:
                del self._asked[encoding.digest]
                if encoding.work.exception() is None:
                    self._kept.put(encoding.digest, encoding.work.result()[0])


def _timed(encode: Encode, image: PatchedImage) -> tuple[Features, float]:
    started = time.perf_counter()
    features = encode(image)
    return features, 1e3 * (time.perf_counter() - started)
