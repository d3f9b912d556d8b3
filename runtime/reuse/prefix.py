"""Saved keys and values of the beginnings of prompts, bounded in bytes, the least recently used gone first.

In: key rows of a prompt (sequence.py) and a function that reads rows of the KV cache. Out: the blocks that a
new prompt can begin with, and their rows. Knows nothing of graphs, text or the KV cache itself.

A sequence is cut into blocks of 16 tokens; what is left at its end is not kept. A block's name is the SHA-256
of the name of the block before it and of its own keys, so equal beginnings have equal names and are stored
once, and a block found by name needs no comparison. The first name stands on a seed that holds everything
else on which rows depend: bundle, dtype, geometry, release of onnxruntime. To use a chain touches it from its
end, hence a block never outlives the one before it by much: the ends go first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from .prefix_folder import BlockFolder
from .sequence import Keys

BLOCK_TOKENS = 16
"""Also the grid on which a prompt is taken up again, see runner.py."""
Rows = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """Tokens `start` to `stop` of a sequence.

    Attributes:
        name: SHA-256, 32 bytes.
        start: first token.
        stop: one after the last token.
    """

    name: bytes
    start: int
    stop: int


def cut(seed: bytes, keys: Keys, stop: int) -> Iterator[Block]:
    """The whole blocks of the first `stop` tokens, in order."""
    name = seed
    for end in range(BLOCK_TOKENS, stop + 1, BLOCK_TOKENS):
        start = end - BLOCK_TOKENS
        name = hashlib.sha256(name + keys[start:end].tobytes()).digest()
        yield Block(name, start, end)


class PrefixStore:
    """Blocks by name, in memory and, if there is a folder, on disk."""

    def __init__(
        self, seed: bytes, row_bytes: int, limit_bytes: int, folder: BlockFolder | None = None
    ) -> None:
        """Begin empty; what the folder holds is there at once.

        Args:
            seed: SHA-256 of what rows depend on beside their keys.
            row_bytes: of one token.
            limit_bytes: of all rows in memory together.
            folder: where blocks are written and looked for, too.
        """
        self._seed = seed
        self._row_bytes = row_bytes
        self._limit = limit_bytes
        self._folder = folder
        self._rows: OrderedDict[bytes, Rows] = OrderedDict()
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all rows in memory."""
        return self._used

    @property
    def on_disk(self) -> bool:
        """Whether blocks are written to a folder."""
        return self._folder is not None

    def find(self, keys: Keys, limit: int) -> list[Block]:
        """The longest stored chain that begins like the sequence.

        Args:
            keys: of the sequence.
            limit: tokens that the chain may have.

        Returns:
            Blocks from token 0 on without a gap; none if the first is not there.
        """
        chain: list[Block] = []
        for block in cut(self._seed, keys, limit):
            if not self._has(block):
                break
            chain.append(block)
        return chain

    def load(self, chain: Sequence[Block], start: int) -> Iterator[tuple[Block, Rows]]:
        """Rows of the blocks that reach beyond token `start`; ends early where one turns out to be damaged.

        Args:
            chain: from `find`.
            start: tokens that the caller has.
        """
        loaded = 0
        for block in chain:
            loaded += 1
            if block.stop <= start:
                continue
            rows = self._rows.get(block.name)
            if rows is None and self._folder is not None:
                rows = self._folder.read(block.name, BLOCK_TOKENS)
            if rows is None:
                loaded -= 1
                break
            yield block, rows
        self._touch(chain[:loaded])

    def save(
        self, keys: Keys, stop: int, read: Callable[[int, int], Rows], *, in_memory: bool = True
    ) -> None:
        """Keep the whole blocks of the first `stop` tokens, or as many of them as the limit allows.

        Args:
            keys: of the sequence.
            stop: in tokens.
            read: (start, stop) to a copy of those rows, (L, 2, K, n, D).
            in_memory: False writes to the folder only.
        """
        chain = list(cut(self._seed, keys, stop))
        limit = self._limit if in_memory else 0
        keep = {block.name for block in chain if block.stop * self._row_bytes <= limit}
        self._touch(chain)  # first, so that what makes room for the end of a chain is not its beginning
        for files, block in enumerate(chain, 1):
            folder = self._folder
            if folder is not None and (folder.has(block.name) or not folder.takes(files, block.stop)):
                folder = None
            to_memory = block.name in keep and block.name not in self._rows
            if folder is None and not to_memory:
                continue
            rows = self._rows.get(block.name)
            if rows is None:
                rows = read(block.start, block.stop)
            if folder is not None:
                folder.write(block.name, rows)
            if to_memory:
                self._keep(block.name, rows, keep)
        self._touch(chain)

    def _has(self, block: Block) -> bool:
        return block.name in self._rows or (self._folder is not None and self._folder.has(block.name))

    def _keep(self, name: bytes, rows: Rows, keep: set[bytes]) -> None:
        """Put a block into memory, in the place of others but those named in `keep`."""
        if self._used + rows.nbytes > self._limit:
            for other in [name for name in self._rows if name not in keep]:
                self._used -= self._rows.pop(other).nbytes
                if self._used + rows.nbytes <= self._limit:
                    break
        if self._used + rows.nbytes <= self._limit:
            self._rows[name] = rows
            self._used += rows.nbytes

    def _touch(self, chain: Sequence[Block]) -> None:
        """Make a chain the most recently used, its first block before all."""
        for block in reversed(chain):
            if block.name in self._rows:
                self._rows.move_to_end(block.name)
        if self._folder is not None:
            self._folder.touch([block.name for block in reversed(chain)])
