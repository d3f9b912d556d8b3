"""What an engine may reuse between answers and within one: the options, checked.

In: values of a caller. Out: `ReuseOptions`. Knows nothing of how anything is kept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal

from autoglm_edge.errors import RequestError

Lookup = bool | Literal["auto"]


@dataclass(frozen=True)
class ReuseOptions:
    """What is kept, where, and how much of it.

    Attributes:
        prefix: begin a prompt after the tokens that it shares with the sequence in the KV cache, or with one
            that was saved.
        prefix_cache_bytes: memory for saved keys and values; 0 saves none, and only the sequence in the KV
            cache itself is shared. A 9B model has 82 kB per token.
        prefix_cache_dir: folder in which they are saved, too, so that a restart finds them; None for none.
        prefix_disk_bytes: bytes of that folder; what was not used for longest goes first.
        image_cache_bytes: memory for features of encoded pictures; 0 keeps none. A 1080 x 2400 screenshot of
            a 9B model has 55 MB.
        lookup: drafts of the answer from prompt and answer: "auto" as long as they pay, True whenever there
            is one, False never.

    Raises:
        RequestError: a value has the wrong type or range.
    """

    prefix: bool = True
    prefix_cache_bytes: int = 512_000_000
    prefix_cache_dir: Path | None = None
    prefix_disk_bytes: int = 4_000_000_000
    image_cache_bytes: int = 128_000_000
    lookup: Lookup = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, bool):
            raise RequestError(f"prefix is {self.prefix!r}, must be True or False")
        for name in ("prefix_cache_bytes", "prefix_disk_bytes", "image_cache_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
                raise RequestError(f"{name} is {value!r}, must be a number of bytes, 0 for none")
        if not (isinstance(self.lookup, bool) or self.lookup == "auto"):
            raise RequestError(f'lookup is {self.lookup!r}, must be "auto", True or False')
        folder = self.prefix_cache_dir
        if folder is None:
            return
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise RequestError(f"prefix_cache_dir is {folder!r}, must be the path of a folder")
        if not self.prefix:
            raise RequestError("prefix_cache_dir is given, but prefix is False; leave one of them out")
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise RequestError(f"prefix_cache_dir is {path}, which is a file; name a folder")
        object.__setattr__(self, "prefix_cache_dir", path)

    @classmethod
    def off(cls) -> ReuseOptions:
        """Nothing is reused: every answer is computed as the first one is."""
        return cls(prefix=False, prefix_cache_bytes=0, image_cache_bytes=0, lookup=False)
