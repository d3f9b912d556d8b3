"""Features of encoded pictures by content, bounded in bytes, the least recently used gone first.

In: digests of pictures and their features (N, C). Out: the same features. Knows nothing of prompts or graphs.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray


class FeatureCache:
    """Features by the digest of their picture."""

    def __init__(self, limit_bytes: int) -> None:
        """Begin empty.

        Args:
            limit_bytes: of all features together; 0 keeps none.
        """
        self._limit = limit_bytes
        self._features: OrderedDict[bytes, NDArray[np.floating]] = OrderedDict()
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all features held."""
        return self._used

    def get(self, digest: bytes) -> NDArray[np.floating] | None:
        """Features (N, C) of a picture, or None; they become the most recently used."""
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: NDArray[np.floating]) -> None:
        """Keep features, in the place of others; what is larger than the limit is not kept."""
        if features.nbytes > self._limit or digest in self._features:
            return
        while self._used + features.nbytes > self._limit:
            _, old = self._features.popitem(last=False)
            self._used -= old.nbytes
        self._features[digest] = features
        self._used += features.nbytes
