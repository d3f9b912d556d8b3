"""Drafts of an answer by looking up how the same few tokens went on before (prompt lookup).

In: the ids of a prompt and, one by one, of its answer. Out: ids that may come next, each with the chance that
it does. Knows nothing of graphs, and not whether a draft was right.

An agent's answer repeats much of its prompt: names of apps, the form of an action, what an earlier step said.
The index counts what followed every run of 2, 3 and 4 ids. Where the last ids stood before, what followed
them most is drafted, then what followed most after that, and so on. (Saxena 2023, "Prompt lookup decoding",
copies from one place instead.) The chance is that of a model of such counts: longer runs count more the more
often they were seen with the fewer ids after them (interpolation as of Witten and Bell 1991).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

LONGEST, SHORTEST = 4, 2
"""Ids that are looked up together."""
_DOUBT = 2.0
"""How much a run of ids is distrusted, per id that was seen after it."""
_LEAST_CHANCE = 0.02
"""A draft ends where it is as unlikely as that to be right so far."""


@dataclass(frozen=True)
class Draft:
    """What may come next.

    Attributes:
        ids: in order; empty if nothing like the last ids came before.
        chances: of each id to be right if all before it are, 0 to 1.
    """

    ids: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    def cut(self, length: int) -> Draft:
        """The first `length` ids."""
        return Draft(self.ids[:length], self.chances[:length])


class NGramIndex:
    """How often every id followed every run of 2, 3 and 4 ids."""

    def __init__(self, ids: Iterable[int] = (), *, never: Container[int] = ()) -> None:
        """Begin with the ids of a prompt.

        Args:
            ids: of the prompt.
            never: ids at which a draft ends, such as placeholders of pictures.
        """
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], dict[int, int]] = {}
        self._never = never
        for token in ids:
            self.push(token)

    def __len__(self) -> int:
        return len(self._ids)

    def push(self, token: int) -> None:
        """Append an id, and count it after the runs that it follows."""
        ids = self._ids
        for size in range(SHORTEST, min(LONGEST, len(ids)) + 1):
            after = self._next.setdefault(tuple(ids[-size:]), {})
            after[token] = after.get(token, 0) + 1
        ids.append(token)

    def draft(self, most: int) -> Draft:
        """Up to `most` ids that may come next."""
        last = self._ids[-LONGEST:]
        ids: list[int] = []
        chances: list[float] = []
        together = 1.0
        while len(ids) < most:
            found = self._likeliest(last)
            if found is None or found[0] in self._never:
                break
            together *= found[1]
            if together < _LEAST_CHANCE:
                break
            ids.append(found[0])
            chances.append(found[1])
            last = [*last, found[0]][-LONGEST:]
        return Draft(tuple(ids), tuple(chances))

    def _likeliest(self, last: Sequence[int]) -> tuple[int, float] | None:
        """What most probably follows these ids, and its chance."""
        chances: dict[int, float] = {}
        for size in range(SHORTEST, len(last) + 1):
            after = self._next.get(tuple(last[-size:]))
            if after is None:
                break
            total = sum(after.values())
            trust = total / (total + _DOUBT * len(after))
            for token in chances:
                chances[token] *= 1 - trust
            for token, count in after.items():
                chances[token] = chances.get(token, 0.0) + trust * count / total
        if not chances:
            return None
        token = max(chances, key=chances.__getitem__)
        return token, chances[token]
