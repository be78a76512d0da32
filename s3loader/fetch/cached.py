"""Bulk reads through a disk cache: what is kept is read from there, the rest in one stream from the store."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

from s3loader.fetch.diskcache import DiskCache
from s3loader.store.backend import ReadResult
from s3loader.store.bulk import ReadFailure
from s3loader.types import ReadRequest

__all__ = ["CachedReads", "close_iterator"]


class _Waiting(NamedTuple):
    request: ReadRequest
    path: str
    """Of its entry; empty where what is read cannot be named for certain, so that it is not kept."""
    kept: bool


class CachedReads:
    """Results of requests, in order. While some come from the disk, those that are missing are on their way.

    The store's bulk read draws requests ahead; the ones that are kept are only noted then, and read when it is their turn,
    so they take no memory before.

    Args:
        cache: Where ranges are kept.
        url: Of the store, as part of an entry's name.
        read: The bulk read: requests in, results in order out.
        max_bytes: Kept ranges that are passed over in search of missing ones.
    """

    def __init__(
        self, cache: DiskCache, url: str, read: Callable[[Iterable[ReadRequest]], Iterator[Any]], max_bytes: int
    ) -> None:
        self.hits = 0
        self.seconds = 0.0
        """Time spent on the disk."""
        self._cache = cache
        self._url = url
        self._read = read
        self._max_bytes = max_bytes
        self._waiting: deque[_Waiting] = deque()
        self._passed = 0
        self._owed = 0
        self._drained = False

    def discard(self, requests: Iterable[ReadRequest]) -> None:
        """Keep the answers to these no longer."""
        for path in filter(None, map(self.path, requests)):
            self._cache.discard(path)

    def path(self, request: ReadRequest) -> str:
        """Where the cache keeps the answer to `request`; empty where it does not."""
        if request.if_match is None or request.end is None:
            return ""
        return self._cache.path(self._url, request.key, request.if_match, request.start, request.end)

    def run(self, requests: Iterable[ReadRequest]) -> Generator[Any, None, None]:
        """A `ReadResult` or `ReadFailure` for each request, in order.

        Raises:
            CacheFullError: the disk of the cache is full or fails, and ``on_full="raise"``.
        """
        source, waiting = iter(requests), self._waiting
        results: Iterator[Any] | None = None
        early: Any = None
        try:
            while True:
                if results is None:
                    missing = self._missing(source)
                    first = next(missing, None)
                    if first is not None:
                        results = self._read(itertools.chain((first,), missing))
                elif not waiting:  # asking for the next result draws more requests
                    early = next(results, None)
                if not waiting:
                    if results is None:
                        return
                elif (row := waiting.popleft()).kept:
                    yield self._from_disk(row)
                    continue
                else:
                    assert results is not None
                    result, early = next(results) if early is None else early, None
                    self._owed -= 1
                    self._keep(row, result)
                    yield result
                    del result
                if self._drained and not self._owed:
                    close_iterator(results)
                    results = None
        finally:
            close_iterator(results)

    def _missing(self, source: Iterator[ReadRequest]) -> Iterator[ReadRequest]:
        """The next requests that are not kept, until too much that is kept waits before them."""
        self._drained = False
        while self._passed < self._max_bytes:
            request = next(source, None)
            if request is None:
                break
            path = self.path(request)
            kept = bool(path) and self._cache.has(path)
            self._waiting.append(_Waiting(request, path, kept))
            if kept:
                self._passed += _size(request)
            else:
                self._owed += 1
                yield request
        self._drained = True

    def _from_disk(self, row: _Waiting) -> Any:
        self._passed -= _size(row.request)
        begun = time.perf_counter()
        data = self._cache.get(row.path)
        self.seconds += time.perf_counter() - begun
        if data is not None:
            self.hits += 1
            return ReadResult(row.request, data, row.request.if_match or "", -1)
        results = self._read([row.request])  # it was evicted meanwhile, or is damaged
        try:
            result = next(results)
        finally:
            close_iterator(results)
        self._keep(row, result)
        return result

    def _keep(self, row: _Waiting, result: Any) -> None:
        if row.path and not isinstance(result, ReadFailure) and len(result.data) == _size(row.request):
            begun = time.perf_counter()
            self._cache.put(row.path, result.data)
            self.seconds += time.perf_counter() - begun


def _size(request: ReadRequest) -> int:
    return (request.end or 0) - request.start


def close_iterator(results: Iterator[Any] | None) -> None:
    """End an iteration that may be abandoned: it must not leave threads behind."""
    close = getattr(results, "close", None)
    if close is not None:
        close()
