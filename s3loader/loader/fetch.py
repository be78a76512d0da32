"""Pieces in, samples out, in order: the only place of the loader that reads sample bytes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from s3loader.loader.cut import Cut, Failed, cut
from s3loader.loader.pieces import Piece
from s3loader.loader.stats import LoaderStats
from s3loader.store.base import Driver
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.transfer.cached import CachedReads, close_iterator
from s3loader.transfer.diskcache import DiskCache
from s3loader.transfer.hedge import hedged
from s3loader.types import ReadRequest

__all__ = ["Fetcher"]


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
        self._cached: CachedReads | None = None

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
        pending: deque[tuple[Piece, int]] = deque()
        requests = self._requests(pieces, pending)
        if self._cache is not None:
            self._cached = CachedReads(self._cache, self._store.url, self._read, self._max_bytes)
        cached = self._cached
        results = self._read(requests) if cached is None else cached.run(requests)
        try:
            yield from self._deliver(results, pending)
        finally:
            close_iterator(results)

    def _requests(self, pieces: Iterable[Piece], pending: deque[tuple[Piece, int]]) -> Iterator[ReadRequest]:
        for piece in pieces:
            requests = piece.requests()
            pending.append((piece, len(requests)))
            yield from requests

    def _read(self, requests: Iterable[ReadRequest]) -> Iterator[Any]:
        return self._store.read_many(
            requests, max_bytes=self._max_bytes, concurrency=self._concurrency, driver=self._driver, errors="return"
        )

    def _disk_time(self) -> float:
        """Seconds that the disk of the cache took since the last call; they and the hits are noted."""
        if self._cached is None:
            return 0.0
        taken, self._cached.seconds = self._cached.seconds, 0.0
        self._stats.wait_cache += taken
        self._stats.cache_hits += self._cached.hits
        self._cached.hits = 0
        return taken

    def _deliver(self, results: Iterator[Any], pending: deque[tuple[Piece, int]]) -> Iterator[None]:
        bodies: list[Any] = []
        stats, clock = self._stats, time.perf_counter
        while True:
            begun, planned = clock(), stats.plan
            result = next(results, None)
            # What the planner took inside read_many is planning, and the disk is not the network.
            stats.wait_network += clock() - begun - (stats.plan - planned) - self._disk_time()
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
        if self._cached is not None:
            self._cached.discard(piece.requests())
        results = list(self._store.read_many(piece.requests(), driver=self._driver, errors="return"))
        if any(isinstance(result, ReadFailure) for result in results):
            return before
        return self._cut(piece, results)
