"""Read once per node: the processes of a node that restore the same checkpoint divide the reading among themselves.

What one has fetched it puts into a folder that all see (best in memory, ``/dev/shm``). Whoever is about to fetch a range locks
its name; the others go on with something else and come back for it. Each begins at another place, so they rarely wait. A
process that dies lets go of its locks, and what it owed is fetched by another.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, TypeVar

from s3loader.fetch.diskcache import DiskCache
from s3loader.types import Buffer

__all__ = ["NodeShare"]

Item = TypeVar("Item")
_PAUSE: Final = 0.005
_PATIENCE: Final = 60.0
"""Seconds after which a process no longer waits for another's fetch."""


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
        self._held: dict[str, int] = {}

    def mine(self) -> Iterator[Item]:
        """Items that this process must fetch, each to be handed to `fetched`; delivers the others meanwhile."""
        later: list[Item] = []
        for item in self._items:
            if self._take(item):
                continue
            if self._lock(item):
                if not self._take(item):  # it came between the look and the lock
                    yield item
                    continue
                self._unlock(item)
            else:
                later.append(item)
        for item in later:
            if not self._await(item):
                yield item

    def fetched(self, item: Item, data: Buffer) -> None:
        """Give the others what was fetched."""
        self._cache.put(self._path(item), data)
        self._unlock(item)

    def close(self) -> None:
        """Let go of what was locked and not fetched."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def _path(self, item: Item) -> str:
        return self._cache.path(*self._name(item))

    def _take(self, item: Item) -> bool:
        data = self._cache.get(self._path(item))
        if data is not None:
            self._deliver(item, data)
        return data is not None

    def _lock(self, item: Item) -> bool:
        path = self._path(item)
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd = os.open(path + ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                return False
            self._held[path] = fd
        return True  # also where the folder cannot be used: then everybody fetches

    def _unlock(self, item: Item) -> None:
        path = self._path(item)
        fd = self._held.pop(path, None)
        if fd is not None:
            with contextlib.suppress(OSError):
                os.remove(path + ".lock")
            os.close(fd)

    def _await(self, item: Item) -> bool:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if self._take(item):
                return True
            if self._lock(item):
                there = self._take(item)
                if there:
                    self._unlock(item)
                return there
            time.sleep(_PAUSE)
        return False
