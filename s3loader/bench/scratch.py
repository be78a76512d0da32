"""A place of one's own in a store, emptied at the end whatever happens; and a bound on time and bytes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from s3loader import events
from s3loader.bench.report import BenchReport
from s3loader.errors import BucketNotFoundError, S3LoaderError
from s3loader.store import ObjectStore, open_store
from s3loader.store.open import StoreKeywords
from s3loader.types import Location, ObjectURL

__all__ = ["Bound", "Watch", "opened", "scratch"]


def opened(url: Location, place: StoreKeywords) -> ObjectStore:
    """The store at `url`.

    Raises:
        BucketNotFoundError: it is a local folder that is not there: opening it would make it, and hide a typing mistake.
    """
    where = ObjectURL.parse(url)
    if where.scheme == "file" and not os.path.isdir(where.key):
        raise BucketNotFoundError("there is no such folder", op="measure", url=str(where), hint="make it, or check the path")
    return open_store(url, **place)


@contextlib.contextmanager
def scratch(store: ObjectStore, report: BenchReport) -> Iterator[str]:
    """A prefix that nobody has, for keys of `store`; at the end, all below it is deleted, and nothing else.

    What cannot be deleted is said in the report's notes.
    """
    prefix = f"s3loader-bench-{uuid.uuid4().hex}/"
    try:
        yield prefix
    finally:
        try:
            keys = [entry.key for entry in store.list(prefix)]
            failures = list(store.delete_many(keys))
            report.deleted += len(keys) - len(failures)
            problem = str(failures[0].error) if failures else ""
        except S3LoaderError as error:
            problem = error.message
        if problem:
            report.notes.append(f"{store.url}/{prefix} could not be cleaned up: {problem}; s3loader rm -r deletes it")
        where = ObjectURL.parse(store.url)
        if where.scheme == "file":
            _remove_folders(os.path.join(where.key, prefix.rstrip("/")))


def _remove_folders(folder: str) -> None:
    """Empty ones, of the prefix only."""
    for at, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(at)


class Bound:
    """So much time and so many bytes; counted by all threads."""

    def __init__(self, seconds: float, size: int) -> None:
        self.end = time.perf_counter() + seconds
        self.left = size
        self._lock = threading.Lock()
        self._begun = False

    def take(self, size: int) -> bool:
        """Whether a request of `size` bytes may begin; the first one always."""
        with self._lock:
            if self._begun and (self.left < size or time.perf_counter() >= self.end):
                return False
            self._begun = True
            self.left -= size
            return True

    def spend(self, size: int) -> None:
        """Count bytes that were moved already."""
        with self._lock:
            self.left -= size

    @property
    def over(self) -> bool:
        """Whether time or bytes are used up."""
        return self.left <= 0 or time.perf_counter() >= self.end


class Watch:
    """What the requests of a store do meanwhile: first bytes, and requests that were sent again."""

    def __init__(self, store: ObjectStore, ops: frozenset[str]) -> None:
        self._url = store.url
        self._ops = ops
        self.first_bytes: list[float] = []
        self.repeated = 0

    def __enter__(self) -> Watch:
        self._end = events.subscribe(self._hook)
        return self

    def __exit__(self, *error: Any) -> None:
        self._end()

    def _hook(self, event: events.OpEvent) -> None:
        if event.op not in self._ops or not event.url.startswith(self._url):
            return
        if event.attempt > 1:
            self.repeated += 1
        if event.error is None and event.first_byte is not None:
            self.first_bytes.append(event.first_byte - event.start)
