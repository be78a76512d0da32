"""Hedged reads: where an answer takes unusually long, ask once more and take what comes first.

Dean and Barroso, "The Tail at Scale", CACM 2013.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, cast

from s3loader.errors import ClosedError, S3LoaderError
from s3loader.store.backend import Backend
from s3loader.store.objectstore import ObjectStore
from s3loader.store.options import MOST_THREADS
from s3loader.types import Buffer, ObjectMeta

__all__ = ["HedgedReads", "hedged"]


class HedgedReads:
    """The reading verbs of a `Backend`, each tried a second time after `delay` seconds without an answer."""

    def __init__(self, inner: Backend, delay: float, concurrency: int) -> None:
        self._inner = inner
        self._delay = delay
        self._pool = ThreadPoolExecutor(2 * concurrency, "s3loader-hedge")
        self.hedged = 0
        """Reads that were asked for twice."""

    @property
    def url(self) -> str:
        """Root without a trailing slash: ``s3://bucket``, ``file:///data``, ``memory://name``."""
        return self._inner.url

    @property
    def engine(self) -> str:
        """``direct``, ``obstore``, ``boto3``, ``file``, ``memory``; for events and `explain`."""
        return self._inner.engine

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` (to the end of the object where `end` is None or beyond it)."""
        return cast(
            "tuple[ObjectMeta, Buffer]",
            self._first(lambda: self._inner.get(key, start, end, if_match=if_match, version_id=version_id)),
        )

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` (1-D, format ``B``, writable) with ``len(buffer)`` bytes from `start`. Two answers must not fill one
        buffer, so this one is not hedged."""
        return self._inner.read_into(key, start, buffer, if_match=if_match)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object, without its bytes."""
        return self._inner.head(key, version_id=version_id)

    def close(self) -> None:
        """Ends the threads; the backend stays open."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _first(self, call: Callable[[], Any]) -> Any:
        """The first success of one or two calls; the first error where there is none."""
        first = self._submit(call)
        done, _ = wait([first], timeout=self._delay)
        if done:
            return first.result()
        self.hedged += 1
        pending = {first, self._submit(call)}
        failure: S3LoaderError | None = None
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    return future.result()
                except S3LoaderError as error:
                    failure = failure or error
        assert failure is not None
        raise failure

    def _submit(self, call: Callable[[], Any]) -> Future[Any]:
        try:
            return self._pool.submit(call)
        except RuntimeError as error:  # the pool was shut down while a reader was at work
            raise ClosedError("the reads were abandoned") from error


def hedged(store: ObjectStore, delay: float) -> tuple[ObjectStore, HedgedReads]:
    """A view of `store` whose reads are hedged, and what counts and ends them. Its bulk reads go through threads."""
    reads = HedgedReads(store.backend, delay, store.options.concurrency or MOST_THREADS)
    return ObjectStore(store.url, cast("Backend", reads), options=store.options), reads
