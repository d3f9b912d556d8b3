"""The sequences in the slots of a cache: first those that grow together, then those that are kept.

In: keys of a prompt. Out: the slot it goes into, with all that is known of it. Knows nothing of graphs and
answers.

A run takes the first rows of the buffers, so the sequences that are decoded stand there; one that begins or
ends changes places with a neighbour. That copies its rows, which is little beside reading all weights once.
Prompts are read in the other slots. One of them may be held in the middle of a piece of work, with rows that
its cache does not count yet: it stands in the last slot, which nobody else can need as long as it is read.
"""

from __future__ import annotations

from collections.abc import Callable

from autoglm_edge.runtime.cache import KVSlots
from autoglm_edge.runtime.reuse.prefix import BLOCK_TOKENS, PrefixStore
from autoglm_edge.runtime.reuse.sequence import CachedSequence, Keys, shared_length


class Slots:
    """Who is where.

    Attributes:
        buffers: of all slots.
        sequences: of all slots, in their order.
        active: how many of them, from the first on, are decoded.
    """

    def __init__(
        self, buffers: KVSlots, store: Callable[[CachedSequence], PrefixStore] | None = None
    ) -> None:
        """All of them empty.

        Args:
            buffers: of all slots.
            store: makes the store of saved prefixes, given an empty sequence; None saves none.
        """
        self.buffers = buffers
        self.sequences = [CachedSequence(cache) for cache in buffers.caches]
        self._store = None if store is None else store(self.sequences[0])
        self.active = 0
        self._reading: list[CachedSequence] = []
        self._held: CachedSequence | None = None
        self._used: list[CachedSequence] = []  # the last one was used last

    @property
    def free(self) -> int:
        """Slots that a prompt could be read into."""
        return len(self.sequences) - self.active - len(self._reading)

    def take(self, keys: Keys) -> CachedSequence:
        """The slot for a prompt: taken until it is released.

        The sequence that the prompt goes on with; else an empty one; else the one that was used longest ago.
        A prompt that shares only a part of what later prompts probably share does not take a sequence away
        from them as long as there is another one: rows can be copied.

        Args:
            keys: (T, 7) of the prompt.
        """
        free = [sequence for sequence in self.sequences[self.active :] if sequence not in self._reading]

        def order(sequence: CachedSequence) -> tuple[int, bool, int]:
            shared = shared_length(sequence.keys, keys)
            goes_on = shared if shared >= sequence.stable else 0
            age = self._used.index(sequence) if sequence in self._used else -1
            return goes_on, not len(sequence.keys), -age

        chosen = max(free, key=order)
        self._reading.append(chosen)
        return chosen

    def begin(self, sequence: CachedSequence, keys: Keys, limit: int, *, reuse: bool) -> int:
        """Leave in a sequence what a prompt begins with, at most `limit` tokens; returns how many.

        They are there already, or in another slot, or saved. Whole blocks: kernels take rows in tiles, and a
        row that is left over at the end rounds otherwise. Taken up on the grid of tiles, a prompt is computed
        as in a cold run.
        """
        store = self._store
        shared = _in_blocks(min(shared_length(sequence.keys, keys), limit)) if reuse else 0
        # The cache is the only copy of the last prompt until something else is about to take its place.
        if store is not None and shared < sequence.stable:
            store.save(sequence.keys, sequence.stable, sequence.cache.read)
        sequence.truncate(shared)
        if not reuse:
            return shared
        self.adopt(sequence, keys, limit)
        chain = store.find(keys, limit) if store is not None else ()
        if store is not None and chain and chain[-1].stop > sequence.cache.length:
            for block, rows in store.load(chain, sequence.cache.length):
                sequence.announce(keys[block.start : block.stop])
                sequence.cache.write(block.start, rows)
        return sequence.cache.length

    def adopt(self, sequence: CachedSequence, keys: Keys, limit: int) -> int:
        """Copy what another slot has by now of a prompt, beyond what its own has; returns how many tokens.

        Args:
            sequence: holds the beginning of the prompt and nothing else.
            keys: (T, 7) of the prompt.
            limit: tokens that it may have then at most; whole blocks are taken, as in `begin`.
        """
        other, length = self._nearest(keys)
        start, length = sequence.cache.length, _in_blocks(min(length, limit))
        if length <= start:
            return 0
        sequence.announce(keys[start:length])
        sequence.cache.copy_from(other.cache, start, length)
        return length - start

    def hold(self, sequence: CachedSequence) -> None:
        """A sequence that is being read stays in its slot until `let_go`; there is one such at a time."""
        assert self._held is None and sequence in self._reading
        self._move(sequence, len(self.sequences) - 1)
        self._held = sequence

    def let_go(self, sequence: CachedSequence) -> None:
        """A sequence that was held may change its slot again."""
        assert self._held is sequence
        self._held = None

    def activate(self, sequence: CachedSequence) -> None:
        """Its prompt is read: it is decoded with the others from now on."""
        self._reading.remove(sequence)
        self._move(sequence, self.active)
        self.active += 1

    def release(self, sequence: CachedSequence) -> None:
        """Its answer has ended; what it holds is kept until the slot is needed."""
        if sequence in self._reading:
            self._reading.remove(sequence)
        else:
            self._move(sequence, self.active - 1)
            self.active -= 1
        if sequence in self._used:
            self._used.remove(sequence)
        self._used.append(sequence)

    def persist(self, sequence: CachedSequence) -> None:
        """Write what later prompts will probably share to the folder, if there is one."""
        if self._store is not None and self._store.on_disk:
            self._store.save(sequence.keys, sequence.stable, sequence.cache.read, in_memory=False)

    def _nearest(self, keys: Keys) -> tuple[CachedSequence, int]:
        """The sequence that shares most with a prompt, and how many tokens; active ones are among them."""
        counts = [shared_length(sequence.keys, keys) for sequence in self.sequences]
        best = max(range(len(counts)), key=counts.__getitem__)
        return self.sequences[best], counts[best]

    def _move(self, sequence: CachedSequence, place: int) -> None:
        """Bring a sequence to a place, and the one there to where it was."""
        now = self.sequences.index(sequence)
        if now == place:
            return
        other = self.sequences[place]
        assert self._held is not sequence and self._held is not other
        self.buffers.swap(now, place)
        self.sequences[now], self.sequences[place] = other, sequence
        sequence.cache, other.cache = self.buffers.caches[place], self.buffers.caches[now]


def _in_blocks(tokens: int) -> int:
    """So many tokens, or a few less: a whole number of blocks."""
    return max(0, tokens) // BLOCK_TOKENS * BLOCK_TOKENS
