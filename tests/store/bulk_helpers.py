"""What several tests of the bulk verbs need: stores that fail, that are slow, that have bulk verbs of their own."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from s3loader import ReadResult
from s3loader.errors import (
    S3LoaderError,
)
from s3loader.store import MemoryBackend, ObjectStore, Pipeline, RetryPolicy
from s3loader.testing import Fault, FaultBackend, Moment, Seen
from s3loader.types import PutRequest, PutResult, ReadRequest

DRIVERS = ("pump", "threads", "auto")


def make(*faults: Fault, hook: Callable[[Seen, Moment], None] | None = None) -> tuple[ObjectStore, FaultBackend]:
    broken = FaultBackend(MemoryBackend(uuid.uuid4().hex), faults, hook=hook)
    return ObjectStore(broken.url, broken), broken


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 600
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def bulk_threads() -> int:
    return sum(thread.name.startswith(("s3loader-read", "s3loader-put")) for thread in threading.enumerate())


class Engine(MemoryBackend):
    """An engine with bulk verbs of its own; keys that begin with "!" fail there as often as `failures` says."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.failures: dict[str, list[BaseException]] = {}
        self.by_bulk = 0
        self.closed = 0

    @property
    def bulk(self) -> Engine:  # type: ignore[override]
        return self

    def read_outcomes(self, requests: Iterable[ReadRequest], **_: Any) -> Iterator[ReadResult | BaseException]:
        return self._outcomes(requests, self._read)

    def put_outcomes(self, requests: Iterable[PutRequest], **_: Any) -> Iterator[PutResult | BaseException]:
        return self._outcomes(requests, lambda r: self.put(r.key, r.data))

    def _read(self, request: ReadRequest) -> ReadResult:
        meta, data = self.get(request.key, request.start, request.end, if_match=request.if_match)
        return ReadResult(request, memoryview(data), meta.etag, meta.size)

    def _outcomes(self, requests: Iterable[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
        try:
            for request in requests:
                self.by_bulk += 1
                waiting = self.failures.get(request.key)
                if waiting:
                    yield waiting.pop(0)
                    continue
                try:
                    yield work(request)
                except S3LoaderError as error:
                    yield error
        finally:
            self.closed += 1


class Remote(MemoryBackend):
    """Memory that passes for a store far away."""

    @property
    def engine(self) -> str:
        return "remote"


def through(prefix: str = "", **retry: Any) -> tuple[ObjectStore, Engine]:
    engine = Engine(uuid.uuid4().hex)
    backend = Pipeline(engine, prefix=prefix, retry=RetryPolicy(sleep=lambda _: None, **retry))
    return ObjectStore(engine.url, backend), engine
