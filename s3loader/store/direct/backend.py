"""`DirectBackend`: the hot path of S3 on our own sockets, everything else by a general engine."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Final

from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.store.base import Backend, Driver, ReadResult
from s3loader.store.buffers import BufferPool, shared_pool
from s3loader.store.client_errors import no_descriptor
from s3loader.store.direct.connection import Connections, perform
from s3loader.store.direct.jobs import Job, Scratch, Setting
from s3loader.store.direct.pump import Pump
from s3loader.store.direct.reads import ReadJob
from s3loader.store.direct.signer import Signer
from s3loader.store.direct.threads import Threads
from s3loader.store.direct.writes import PartJob, PutJob
from s3loader.store.options import StoreOptions
from s3loader.store.wrappers.wrapper import Delegate, innermost
from s3loader.types import (
    Buffer,
    ObjectMeta,
    PartResult,
    PutMode,
    PutRequest,
    PutResult,
    ReadRequest,
)

__all__ = ["DirectBackend"]


_LARGE_PUT: Final = 512 << 10
"""From this size on a thread that blocks in `sendmsg` costs half of what a socket costs that takes a little at a time
(1 MiB: 0.19 against 0.28 CPU-s/GB, 8 MiB: 0.12 against 0.24; `make bench-get`, write cases)."""
_LARGE_READ: Final = 4 << 20
"""From this size on, into the caller's memory, threads that receive 16 MiB in one call keep both cores busy, where the pump
comes back for every piece: 5.0 against 4.3 GB/s (`make bench-ckpt`). Not over TLS, see `DirectBackend.read_many`."""


class DirectBackend(Delegate):
    """GET, PUT (overwrite) and UploadPart over plain HTTP/1.1; implements `Backend` and `BulkBackend`.

    Whatever it does not do, and every request whose answer is not exactly what was asked for, goes
    to `general`, which makes the errors; but an answer that asks for patience (429, 5xx) is an error at
    once, so that nobody asks again before the retries have waited. Safe to use from several threads and
    after fork.

    Args:
        endpoint: The bucket.
        credentials: Where the keys come from.
        general: An engine for the same bucket; `inner` from then on.
        options: Timeouts.
        buffers: Where bodies are received; default the process's shared pool.
    """

    emits_events = True
    """It emits the events of its own requests; `general` is to be wrapped in what emits the others."""

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: CredentialsSource,
        general: Backend,
        options: StoreOptions | None = None,
        *,
        buffers: BufferPool | None = None,
    ) -> None:
        super().__init__(general)
        self._options = options or StoreOptions()
        self._always = {"x-amz-request-payer": "requester"} if self._options.requester_pays else {}
        self._credentials = credentials
        self._signer: Signer | None = None
        self._connections = Connections(endpoint, self._options.connect_timeout, self._options.read_timeout)
        self._setting = Setting(endpoint, self._current_signer, buffers or shared_pool(), general)
        self._scratches = threading.local()

    @property
    def engine(self) -> str:
        """``direct``."""
        return "direct"

    def _current_signer(self) -> Signer:
        keys = self._credentials()
        signer = self._signer
        if signer is None or signer.credentials is not keys:
            endpoint = self._setting.endpoint
            signer = self._signer = Signer(keys, endpoint.region, endpoint.host_header, always=self._always)
        return signer

    # one at a time

    def _perform(self, job: Job) -> Any:
        scratch = getattr(self._scratches, "scratch", None)
        if scratch is None:
            scratch = self._scratches.scratch = Scratch()
        perform(job, self._connections, scratch)
        if job.error is not None:
            raise job.error
        return job.result

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """See `Backend.get`."""
        if version_id is not None:
            return self.inner.get(key, start, end, if_match=if_match, version_id=version_id)
        job = ReadJob(self._setting, ReadRequest(key, start, end, if_match))
        result: ReadResult = self._perform(job)
        return job.meta(), result.data

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """See `Backend.read_into`."""
        job = ReadJob(self._setting, ReadRequest(key, start, None, if_match, buffer))
        self._perform(job)
        return job.meta()

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        """See `Backend.put`."""
        if mode != "overwrite" or metadata:
            return self.inner.put(key, data, mode=mode, content_type=content_type, metadata=metadata)
        result: PutResult = self._perform(PutJob(self._setting, PutRequest(key, data, mode, content_type)))
        return result

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """See `Backend.upload_part`."""
        result: PartResult = self._perform(PartJob(self._setting, key, upload_id, number, data))
        return result

    # many at once

    def read_many(
        self, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver = "auto"
    ) -> Iterator[ReadResult]:
        """See `BulkBackend.read_many`. ``"auto"`` is the pump, but threads for large reads into the caller's memory.

        Over TLS, ``"threads"`` hands all to the general engine's sockets where that is obstore:
        `ssl` asks for the GIL every 16 KiB, Rust does not.
        """
        return _raising(self.read_outcomes(requests, max_bytes=max_bytes, concurrency=concurrency, driver=driver))

    def read_outcomes(
        self, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver = "auto"
    ) -> Iterator[ReadResult | BaseException]:
        """As `read_many`, but an error takes the place of its answer, and the rest follows."""
        setting = self._setting
        waiting = iter(requests)
        first = next(waiting, None)
        if first is None:
            return
        large = first.into is not None and first.into.nbytes >= _LARGE_READ
        if driver == "auto" and large and not setting.endpoint.tls:
            driver = "threads"
        jobs: Iterator[Job] = (ReadJob(setting, request) for request in chain((first,), waiting))
        if driver == "threads" and setting.endpoint.tls and innermost(self.inner).engine == "obstore":
            jobs = map(_general_only, jobs)
        yield from self._run(jobs, max_bytes, concurrency, driver)

    def put_many(
        self, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver = "auto"
    ) -> Iterator[PutResult]:
        """See `BulkBackend.put_many`."""
        return _raising(self.put_outcomes(requests, max_bytes=max_bytes, concurrency=concurrency, driver=driver))

    def put_outcomes(
        self, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver = "auto"
    ) -> Iterator[PutResult | BaseException]:
        """As `put_many`, but an error takes the place of its result, and the rest follows."""
        waiting = iter(requests)
        first = next(waiting, None)
        if first is None:
            return
        if driver == "auto" and memoryview(first.data).nbytes >= _LARGE_PUT:
            driver = "threads"
        jobs = (PutJob(self._setting, request) for request in chain((first,), waiting))
        yield from self._run(jobs, max_bytes, concurrency, driver)

    def _run(self, jobs: Iterator[Job], max_bytes: int, concurrency: int, driver: Driver) -> Iterator[Any]:
        kind = Threads if driver == "threads" else Pump
        try:
            done = kind(jobs, self._connections, max_bytes=max_bytes, concurrency=concurrency).run()
        except OSError as error:
            raise no_descriptor("run many requests at", self.url) from error
        try:
            for job in done:
                yield job.result if job.error is None else job.error
        finally:
            done.close()  # now, not when it is collected

    def close(self) -> None:
        """See `Backend.close`."""
        self._connections.close()
        super().close()

    def __reduce__(self) -> tuple[Any, ...]:
        return DirectBackend, (self._setting.endpoint, self._credentials, self.inner, self._options)


def _raising(outcomes: Iterator[Any]) -> Iterator[Any]:
    try:
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        outcomes.close()  # type: ignore[attr-defined]  # a generator: its connections are let go now


def _general_only(job: Job) -> Job:
    job.direct = False
    return job
