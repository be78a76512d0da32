"""Read once per node: the processes of a node that restore the same checkpoint divide the reading among themselves.

What one has fetched it puts into a folder that all see (best in memory, ``/dev/shm``). Whoever is about to fetch a range claims
it; the others go on with something else and come back for it. Each begins at another place, so they rarely wait. A
process that dies lets go of its claims, and what it owed is fetched by another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from s3loader.fetch.claims import Claims
from s3loader.fetch.diskcache import DiskCache
from s3loader.types import Buffer

__all__ = ["NodeShare"]

Item = TypeVar("Item")


class NodeShare:
    """A folder shared by the processes of a node.

    Args:
        folder: Made if it does not exist.
        max_bytes: Most bytes kept in it.
        rank: Decides where this process begins.
    """

    def __init__(self, folder: str, max_bytes: int, rank: int) -> None:
        self._cache = DiskCache(folder, max_bytes)
        self._rank = rank

    def division(
        self,
        items: Sequence[Item],
        name: Callable[[Item], tuple[str, str, str, int, int]],
        deliver: Callable[[Item, Buffer], None],
    ) -> Division[Item]:
        """How this process goes through `items`.

        Args:
            items: What is needed here.
            name: Store, key, ETag and range of an item.
            deliver: Called with what another process has fetched.
        """
        start = int(len(items) * (self._rank * 0.618033988749895 % 1))
        return Division(self._cache, [*items[start:], *items[:start]], name, deliver)


class Division(Generic[Item]):
    """One pass through the items: take what is there, fetch what nobody fetches, wait for the rest."""

    def __init__(
        self,
        cache: DiskCache,
        items: list[Item],
        name: Callable[[Item], tuple[str, str, str, int, int]],
        deliver: Callable[[Item, Buffer], None],
    ) -> None:
        self._cache, self._items, self._name, self._deliver = cache, items, name, deliver
        self._claims = Claims(cache.folder)

    def mine(self) -> Iterator[Item]:
        """Items that this process must fetch, each to be handed to `fetched`; delivers the others meanwhile."""
        later: list[Item] = []
        for item in self._items:
            if self._take(item):
                continue
            path = self._path(item)
            if self._claims.take(path):
                if not self._take(item):  # it came between the look and the claim
                    yield item
                    continue
                self._claims.give(path)
            else:
                later.append(item)
        for item in later:
            if self._claims.wait(self._path(item), lambda: self._take(item) or None) is None:  # noqa: B023 - called now
                yield item

    def fetched(self, item: Item, data: Buffer) -> None:
        """Give the others what was fetched."""
        path = self._path(item)
        self._cache.put(path, data)
        self._claims.give(path)

    def close(self) -> None:
        """Let go of what was claimed and not fetched."""
        self._claims.close()

    def _path(self, item: Item) -> str:
        return self._cache.path(*self._name(item))

    def _take(self, item: Item) -> bool:
        data = self._cache.get(self._path(item))
        if data is not None:
            self._deliver(item, data)
        return data is not None
