"""A queue that takes turns: one client's many requests do not keep another's single one waiting.

In: items, each with the name of its client. Out: items, client by client, in the order of each client's own.
Knows nothing of threads and of what the items are.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First come, first served within a client; clients take turns. Not for several threads at once."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def push(self, client: str, item: Item) -> None:
        """Put an item behind those of its client; a new client comes last."""
        self._waiting.setdefault(client, deque()).append(item)

    def pop(self) -> Item | None:
        """The next item; its client goes to the end of the row. None if nothing waits."""
        if not self._waiting:
            return None
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[client] = items
        return item

    def remove(self, item: Item) -> bool:
        """Take an item out; False if it does not wait."""
        for client, items in self._waiting.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._waiting[client]
                return True
        return False

    def clear(self) -> list[Item]:
        """Take everything out."""
        items = [item for waiting in self._waiting.values() for item in waiting]
        self._waiting.clear()
        return items
