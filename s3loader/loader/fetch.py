"""Pieces in, samples out, in order: the only place of the loader that reads sample bytes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Final

from s3loader.loader.cut import Cut, Failed, cut
from s3loader.loader.pieces import Piece
from s3loader.loader.stats import LoaderStats
from s3loader.store.base import Driver, ReadResult
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.transfer.diskcache import DiskCache
from s3loader.transfer.hedge import hedged
from s3loader.types import ReadRequest

__all__ = ["Fetcher"]

_GROUP: Final = 64
"""Pieces looked up in the cache together."""


class Fetcher:
    """Runs pieces against a store with at most `max_bytes` fetched and not yet taken.

    A range whose checksum does not fit is fetched once more, by itself; then its bad samples fail.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        grouped: bool,
        verify: bool,
        max_bytes: int,
        driver: Driver,
        concurrency: int | None,
        stats: LoaderStats,
        cache: DiskCache | None = None,
        hedge_after: float | None = None,
    ) -> None:
        self._store = store
        self._cache = cache
        self._hedge_after = hedge_after
        self._grouped = grouped
        self._verify = verify
        self._max_bytes = max_bytes
        self._driver: Driver = driver
        self._concurrency = concurrency
        self._stats = stats

    def run(self, pieces: Iterable[Piece]) -> Generator[None, None, None]:
        """Fetch and deliver; yields once after each piece whose samples are in their place.

        `pieces` is drawn ahead of delivery, as far as the byte budget reaches.
        """
        if self._hedge_after is None:
            yield from self._run(pieces)
            return
        plain = self._store
        self._store, reads = hedged(plain, self._hedge_after)
        try:
            yield from self._run(pieces)
        finally:
            self._store = plain
            self._stats.hedged += reads.hedged
            reads.close()

    def _run(self, pieces: Iterable[Piece]) -> Generator[None, None, None]:
        if self._cache is not None:
            yield from self._through_cache(self._cache, iter(pieces))
            return
        pending: deque[tuple[Piece, int]] = deque()
        results = self._read(self._requests(pieces, pending))
        try:
            yield from self._deliver(results, pending)
        finally:
            _close(results)

    def _requests(self, pieces: Iterable[Piece], pending: deque[tuple[Piece, int]]) -> Iterator[ReadRequest]:
        for piece in pieces:
            requests = piece.requests()
            pending.append((piece, len(requests)))
            yield from requests

    def _read(self, requests: Iterable[ReadRequest]) -> Iterator[Any]:
        return self._store.read_many(
            requests, max_bytes=self._max_bytes, concurrency=self._concurrency, driver=self._driver, errors="return"
        )

    def _deliver(self, results: Iterator[Any], pending: deque[tuple[Piece, int]]) -> Iterator[None]:
        bodies: list[Any] = []
        stats, clock = self._stats, time.perf_counter
        while True:
            begun, planned = clock(), stats.plan
            result = next(results, None)
            # What the planner took inside read_many is planning, not waiting.
            stats.wait_network += clock() - begun - (stats.plan - planned)
            while pending and pending[0][1] == len(bodies):  # pieces that need nothing, or nothing more
                self._finish(pending.popleft()[0], bodies)
                bodies = []
                yield
            if result is None:
                return
            bodies.append(result)
            del result
            if pending and pending[0][1] == len(bodies):
                self._finish(pending.popleft()[0], bodies)
                bodies = []
                yield

    def _through_cache(self, cache: DiskCache, pieces: Iterator[Piece]) -> Generator[None, None, None]:
        """As `_deliver`, a budget's worth of pieces at a time: what is not kept on disk is fetched, then kept."""
        while group := self._take(pieces):
            found: list[tuple[Piece, list[tuple[ReadRequest, str, Any]]]] = []
            for piece in group:
                rows = []
                for request in piece.requests():
                    path = self._path(cache, request)
                    rows.append((request, path, cache.get(path) if path else None))
                found.append((piece, rows))
            missing = [request for _, rows in found for request, _, data in rows if data is None]
            results = self._read(missing)
            try:
                for piece, rows in found:
                    self._finish(piece, [self._kept_or_next(cache, row, results) for row in rows])
                    yield
            finally:
                _close(results)

    def _take(self, pieces: Iterator[Piece]) -> list[Piece]:
        group, size = [], 0
        for piece in pieces:
            group.append(piece)
            size += max(1, piece.end - piece.start)
            if size >= self._max_bytes // 2 or len(group) >= _GROUP:
                break
        return group

    def _path(self, cache: DiskCache, request: ReadRequest) -> str:
        if request.if_match is None or request.end is None:
            return ""  # what cannot be named for certain is not kept
        return cache.path(self._store.url, request.key, request.if_match, request.start, request.end)

    def _kept_or_next(self, cache: DiskCache, row: tuple[ReadRequest, str, Any], results: Iterator[Any]) -> Any:
        request, path, data = row
        if data is not None:
            self._stats.cache_hits += 1
            return ReadResult(request, data, request.if_match or "", -1)
        begun = time.perf_counter()
        result = next(results)
        self._stats.wait_network += time.perf_counter() - begun
        if path and not isinstance(result, ReadFailure) and len(result.data) == (request.end or 0) - request.start:
            cache.put(path, result.data)
        return result

    def _finish(self, piece: Piece, results: Sequence[Any]) -> None:
        begun = time.perf_counter()
        found = self._cut(piece, results)
        if found.doubtful:
            found = self._again(piece, found)
        piece.target.put(piece.at, found.source, found.starts, found.ends)
        self._stats.cut += time.perf_counter() - begun

    def _cut(self, piece: Piece, results: Sequence[Any]) -> Cut:
        if piece.error is not None:
            return Cut.failed(piece.error, len(piece.numbers))
        self._stats.requests += len(results)
        bodies = [Failed(result.error) if isinstance(result, ReadFailure) else result.data for result in results]
        self._stats.bytes_fetched += sum(len(body) for body in bodies if not isinstance(body, Failed))
        return cut(piece, bodies, grouped=self._grouped, verify=self._verify)

    def _again(self, piece: Piece, before: Cut) -> Cut:
        """Fetch `piece` once more; what is wrong both times is wrong."""
        self._stats.refetched += 1
        for request in piece.requests():
            if self._cache is not None and (path := self._path(self._cache, request)):
                self._cache.discard(path)
        results = list(self._store.read_many(piece.requests(), driver=self._driver, errors="return"))
        if any(isinstance(result, ReadFailure) for result in results):
            return before
        return self._cut(piece, results)


def _close(results: Iterator[Any]) -> None:
    close = getattr(results, "close", None)
    if close is not None:  # an abandoned iteration must not leave threads behind
        close()
