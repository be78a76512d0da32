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
    ) -> None:
        self._store = store
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
        pending: deque[tuple[Piece, int]] = deque()
        results = self._read(self._requests(pieces, pending))
        try:
            yield from self._deliver(results, pending)
        finally:
            close = getattr(results, "close", None)
            if close is not None:  # an abandoned iteration must not leave threads behind
                close()

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
        results = list(self._store.read_many(piece.requests(), driver=self._driver, errors="return"))
        if any(isinstance(result, ReadFailure) for result in results):
            return before
        return self._cut(piece, results)
