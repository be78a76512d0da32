"""Bulk reads through a disk cache: what is kept is read from there, the rest in one stream from the store."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any

from s3loader.errors import CacheFullError
from s3loader.fetch.claims import Claims
from s3loader.fetch.diskcache import DiskCache
from s3loader.store.backend import ReadResult
from s3loader.store.bulk import ReadFailure
from s3loader.types import ReadRequest

__all__ = ["CachedReads", "close_iterator"]


class _Row:
    """A request whose turn comes; as its `ReadGate` it sees to it that no two processes make it at once."""

    def __init__(self, reads: CachedReads, request: ReadRequest, path: str, *, kept: bool) -> None:
        self.request = request
        self.path = path
        """Of its entry; empty where what is read cannot be named for certain, so that it is not kept."""
        self.kept = kept
        self.elsewhere = False
        """Another process has it, or is about to."""
        self.error: CacheFullError | None = None
        self._reads = reads
        self._kept = False
        self._mutex = threading.Lock()

    def begin(self) -> bool:
        """As `ReadGate.begin`."""
        self.elsewhere = not self._reads.claim(self.path)
        return not self.elsewhere

    def end(self, data: memoryview | None) -> None:
        """As `ReadGate.end`."""
        try:
            if data is not None:
                self.keep(data)
        finally:
            self._reads.release(self.path)

    def keep(self, data: memoryview) -> None:
        """Keep the answer, once: by the thread that has fetched it, or else at its turn; `error` tells why not."""
        with self._mutex:
            if self._kept:
                return
            self._kept = True
            try:
                self._reads.put(self, data)
            except CacheFullError as error:
                self.error = error


class CachedReads:
    """Results of requests, in order. While some come from the disk, those that are missing are on their way.

    The store's bulk read draws requests ahead; the ones that are kept are only noted then, and read when it is their turn,
    so they take no memory before. A request that another process of the node makes at the same moment is not made here: at
    its turn that process's bytes are read from the disk. Whoever makes a request puts the answer there as soon as it has come,
    whatever becomes of the one who asked.

    Args:
        cache: Where ranges are kept.
        url: Of the store, as part of an entry's name.
        read: The bulk read: requests in, results in order out.
        max_bytes: Kept ranges that are passed over in search of missing ones.
        share: Requests go on while nobody waits for them, so that other processes may wait for their answers.
    """

    def __init__(
        self,
        cache: DiskCache,
        url: str,
        read: Callable[[Iterable[ReadRequest]], Iterator[Any]],
        max_bytes: int,
        *,
        share: bool = True,
    ) -> None:
        self.hits = 0
        self.shared = 0
        """Of the hits, those that another process has fetched while they were wanted here."""
        self.seconds = 0.0
        """Time spent on the disk."""
        self._cache = cache
        self._claims = Claims(cache.folder) if share else None
        self._url = url
        self._read = read
        self._max_bytes = max_bytes
        self._waiting: deque[_Row] = deque()
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
                    self._passed -= _size(row.request)
                    yield self._from_disk(row)
                    continue
                else:
                    assert results is not None
                    result, early = next(results) if early is None else early, None
                    self._owed -= 1
                    if row.elsewhere:
                        result = self._from_disk(row)
                    else:
                        self._keep(row, result)
                    yield result
                    del result
                if self._drained and not self._owed:
                    close_iterator(results)
                    results = None
        finally:
            close_iterator(results)
            if self._claims is not None:
                self._claims.close()

    def _missing(self, source: Iterator[ReadRequest]) -> Iterator[ReadRequest]:
        """The next requests that are not kept, until too much that is kept waits before them."""
        self._drained = False
        while self._passed < self._max_bytes:
            request = next(source, None)
            if request is None:
                break
            path = self.path(request)
            row = _Row(self, request, path, kept=bool(path) and self._cache.has(path))
            self._waiting.append(row)
            if row.kept:
                self._passed += _size(request)
            else:
                self._owed += 1
                gated = self._claims is not None and path and self._cache.takes(_size(request))
                yield replace(request, gate=row) if gated else request
        self._drained = True

    # -- with other processes ----------------------------------------------------------------

    def claim(self, path: str) -> bool:
        """Whether what belongs at `path` is to be fetched here: it is not there, and nobody else fetches it."""
        if self._claims is None:
            return True
        if not self._claims.take(path):
            return False
        if self._cache.has(path):  # it came between the look and the claim
            self._claims.give(path)
            return False
        return True

    def release(self, path: str) -> None:
        """Let others fetch it."""
        if self._claims is not None:
            self._claims.give(path)

    def _from_disk(self, row: _Row) -> Any:
        """The answer that is kept, or will be soon, or else the store's."""
        data = self._kept(row.path)
        if data is None and self._claims is not None:  # evicted meanwhile, damaged, or not there yet
            data = self._claims.wait(row.path, lambda: self._kept(row.path))
        if data is not None:
            self.hits += 1
            self.shared += row.elsewhere
            return ReadResult(row.request, data, row.request.if_match or "", -1)
        results = self._read([row.request])
        try:
            result = next(results)
            self._keep(row, result)
        finally:
            close_iterator(results)
            self.release(row.path)
        return result

    # -- the disk ----------------------------------------------------------------------------

    def _kept(self, path: str) -> memoryview | None:
        if not self._cache.has(path):
            return None
        begun = time.perf_counter()
        data = self._cache.get(path)
        self.seconds += time.perf_counter() - begun
        return data

    def _keep(self, row: _Row, result: Any) -> None:
        """At its turn."""
        if not isinstance(result, ReadFailure):
            begun = time.perf_counter()
            row.keep(result.data)
            self.seconds += time.perf_counter() - begun
        if row.error is not None:
            raise row.error

    def put(self, row: _Row, data: memoryview) -> None:
        """Keep the answer to a request, where it is whole.

        Raises:
            CacheFullError: as of `run`.
        """
        if row.path and len(data) == _size(row.request):
            self._cache.put(row.path, data)


def _size(request: ReadRequest) -> int:
    return (request.end or 0) - request.start


def close_iterator(results: Iterator[Any] | None) -> None:
    """End an iteration that may be abandoned: it must not leave threads behind."""
    close = getattr(results, "close", None)
    if close is not None:
        close()
