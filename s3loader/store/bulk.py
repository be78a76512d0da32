"""Many reads or writes at once over any backend: results in order, a bounded number of bytes in hand.

A backend with a bulk way of its own (`Backend.bulk`) drives everything. Others are driven by threads. `BulkVerbs` are these as
methods of `ObjectStore`, with their types distinguished by `errors`; `BulkPipeline` is the policy of a `Pipeline` around the
bulk verbs of an engine.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, overload

from s3loader.arguments import whole_number
from s3loader.errors import ConfigError, ObjectChangedError, RangeError, S3LoaderError
from s3loader.options import at_least, one_of
from s3loader.store.arguments import (
    check_attributes,
    check_several,
    checked_attributes,
    checked_key,
    checked_mode,
    readable,
    said,
    writable,
)
from s3loader.store.backend import Backend, BulkBackend, Driver, ReadResult
from s3loader.store.buffers import shared_pool
from s3loader.store.client_errors import passed_over
from s3loader.store.options import MOST_CONNECTIONS, MOST_THREADS, StoreOptions
from s3loader.store.ordered import Budget, Slot, run_ordered
from s3loader.store.retry import RateLimit, after_failure, may_retry
from s3loader.types import ObjectMeta, PutRequest, PutResult, ReadRequest
from s3loader.units import KIB, MIB, parse_size

__all__ = [
    "BulkKeywords",
    "BulkOptions",
    "BulkPipeline",
    "BulkVerbs",
    "OnError",
    "PutFailure",
    "ReadFailure",
    "empty_read",
    "put_many",
    "read_many",
    "read_one",
]

OnError: TypeAlias = Literal["raise", "return"]


class BulkOptions(TypedDict):
    """How a bulk call is made: bytes in flight, requests at a time, and who turns the sockets."""

    max_bytes: int
    concurrency: int
    driver: Driver
    errors: OnError


_FIRST: Final = 4 * MIB
"""Bytes asked for first where an object's size is unknown: most objects fit, the rest is a second request."""
_SLOW: Final = 0.001
_SLOW_BYTE: Final = 2e-9
"""Seconds, and seconds per byte, above which a file came from a slow disk or the network."""
_PATIENCE: Final = 4
"""Slow reads after which threads take over."""


class ReadFailure(NamedTuple):
    """In place of a `ReadResult`: this request failed."""

    request: ReadRequest
    error: S3LoaderError


class PutFailure(NamedTuple):
    """In place of a `PutResult`: this request failed."""

    request: PutRequest
    error: S3LoaderError


def read_many(
    backend: Backend, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver, errors: OnError
) -> Iterator[ReadResult | ReadFailure]:
    """Many reads, several at a time, answers in the order of `requests`."""
    source = map(_checked_read, requests)
    bulk = getattr(backend, "bulk", None)
    if bulk is None:
        yield from _read_here_or_there(backend, source, max_bytes, concurrency, driver, errors)
        return
    yield from _by_bulk(
        source,
        lambda batch: bulk.read_outcomes(batch, max_bytes=max_bytes, concurrency=concurrency, driver=driver),
        ReadFailure,
        errors,
    )


def _read_here_or_there(
    backend: Backend, source: Iterator[ReadRequest], max_bytes: int, concurrency: int, driver: Driver, errors: OnError
) -> Iterator[ReadResult | ReadFailure]:
    """In this thread while that is faster (memory, files in the page cache), else by threads."""
    if _here(driver, backend, concurrency):
        patience = _PATIENCE if driver == "auto" and concurrency > 1 else math.inf
        for request in source:
            start = time.perf_counter()
            try:
                result = _gated(request, lambda: read_one(backend, request))  # noqa: B023 - called now
            except S3LoaderError as error:
                if errors == "raise":
                    raise
                yield ReadFailure(request, error)
                continue
            if time.perf_counter() - start > _SLOW + len(result.data) * _SLOW_BYTE:
                patience -= 1
            yield result
            if patience <= 0:
                break
    first = max(64 * KIB, min(_FIRST, max_bytes // concurrency))
    slots = run_ordered(
        source,
        lambda slot, budget: _gated(slot.item, lambda: _read_slot(backend, slot, budget)),
        lambda request: _cost_of(request, first),
        max_bytes=max_bytes,
        concurrency=concurrency,
        name="s3loader-read",
    )
    yield from _outcomes(slots, ReadFailure, errors)


def put_many(
    backend: Backend, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver, errors: OnError
) -> Iterator[PutResult | PutFailure]:
    """Many puts, several at a time, answers in the order of `requests`."""
    source = map(_checked_put, requests)
    bulk = getattr(backend, "bulk", None)
    if bulk is None:
        yield from _put_by_threads(backend, source, max_bytes, concurrency, driver, errors)
        return
    # Conditional puts need their write id and its settling (see `lost_reply`), so they go one by one.
    for plain, run in itertools.groupby(source, key=lambda request: request.mode == "overwrite"):
        if plain:
            yield from _by_bulk(
                run,
                lambda batch: bulk.put_outcomes(batch, max_bytes=max_bytes, concurrency=concurrency, driver=driver),
                PutFailure,
                errors,
            )
        else:
            yield from _put_by_threads(backend, run, max_bytes, concurrency, driver, errors)


def _by_bulk(
    source: Iterator[Any],
    run: Callable[[Iterator[Any]], Iterator[Any]],
    failure: Callable[[Any, S3LoaderError], Any],
    errors: OnError,
) -> Iterator[Any]:
    """The results of a bulk verb; an error is raised, or given as a failure of its request."""
    pending: deque[Any] = deque()
    kept = errors == "return"

    def feed() -> Iterator[Any]:
        for request in source:
            pending.append(request)
            yield request

    outcomes = run(feed() if kept else source)
    try:
        for outcome in outcomes:
            request = pending.popleft() if kept else None
            if not isinstance(outcome, BaseException):
                yield outcome
            elif kept and isinstance(outcome, S3LoaderError):
                yield failure(request, outcome)
            else:
                raise outcome
    finally:
        close = getattr(outcomes, "close", None)
        if close is not None:
            close()


def _put_by_threads(
    backend: Backend,
    source: Iterable[PutRequest],
    max_bytes: int,
    concurrency: int,
    driver: Driver,
    errors: OnError,
) -> Iterator[Any]:
    if driver == "pump" or concurrency == 1 or (driver == "auto" and backend.engine == "memory"):
        for request in source:
            try:
                result = _put_one(backend, request)
            except S3LoaderError as error:
                if errors == "raise":
                    raise
                yield PutFailure(request, error)
            else:
                yield result
        return
    slots = run_ordered(
        source,
        lambda slot, budget: _put_one(backend, slot.item),
        lambda request: len(request.data),
        max_bytes=max_bytes,
        concurrency=concurrency,
        name="s3loader-put",
    )
    yield from _outcomes(slots, PutFailure, errors)


def _outcomes(slots: Iterator[Slot[Any]], failure: Callable[[Any, S3LoaderError], Any], errors: OnError) -> Iterator[Any]:
    try:
        for slot in slots:
            if slot.error is None:
                yield slot.result
            elif errors == "return" and isinstance(slot.error, S3LoaderError):
                yield failure(slot.item, slot.error)
            else:
                raise slot.error
    finally:
        slots.close()  # type: ignore[attr-defined]  # a generator: its threads end now, not when it is collected


def driver_of(backend: Backend, driver: Driver, concurrency: int) -> Literal["pump", "threads"]:
    """What `read_many` of plain requests begins with where it is asked for `driver`."""
    if getattr(backend, "bulk", None) is not None:
        return "threads" if driver == "threads" else "pump"
    return "pump" if _here(driver, backend, concurrency) else "threads"


def _here(driver: Driver, engine: Backend, concurrency: int) -> bool:
    """Whether threads would cost more than they save, as far as known beforehand."""
    return driver == "pump" or concurrency == 1 or (driver == "auto" and engine.engine in ("memory", "file"))


# one request


def _checked_read(request: ReadRequest) -> ReadRequest:
    if not isinstance(request, ReadRequest):
        raise ConfigError(f"not a ReadRequest: {request!r}", hint="wrap it: ReadRequest(key, start, end); get_many takes keys")
    checked_key(request.key)
    start, end = request.start, request.end
    whole = (type(start) is int or whole_number(start) is not None) and (
        end is None or type(end) is int or whole_number(end) is not None
    )
    if not whole or start < 0 or (end is not None and end < start):
        raise ConfigError(
            f"bad byte range [{request.start}, {request.end})",
            url=request.key,
            hint="0 <= start <= end; end=None reads to the end of the object",
        )
    if request.into is not None:
        writable(request.into)
    return request


def _checked_put(request: PutRequest) -> PutRequest:
    if not isinstance(request, PutRequest):
        raise ConfigError(f"not a PutRequest: {request!r}", hint="wrap it: PutRequest(key, data)")
    checked_key(request.key)
    checked_mode(request.mode)
    readable(request.data)
    if request.metadata:
        check_attributes(None, request.metadata, headers=True)
    if request.attributes:
        checked_attributes(request.attributes, None)
    return request


def read_one(backend: Backend, request: ReadRequest) -> ReadResult:
    """One read by the single verbs of `backend`."""
    if request.into is not None and len(request.into):
        meta = backend.read_into(request.key, request.start, request.into, if_match=request.if_match)
        return ReadResult(request, request.into, meta.etag, meta.size)
    end = request.start if request.into is not None else request.end
    if end == request.start:  # HTTP cannot ask for nothing
        meta = empty_read(backend, request.key, request.start, request.if_match)
        return ReadResult(request, memoryview(b""), meta.etag, meta.size)
    meta, data = backend.get(request.key, request.start, end, if_match=request.if_match)
    return ReadResult(request, memoryview(data), meta.etag, meta.size)


def empty_read(backend: Backend, key: str, start: int, if_match: str | None) -> ObjectMeta:
    """No bytes from `start`, with the errors of a read."""
    meta = backend.head(key)
    url = f"{backend.url}/{key}"
    if if_match is not None and meta.etag != if_match:
        raise ObjectChangedError("its ETag is not the one asked for", op="get", url=url)
    if start > meta.size:
        raise RangeError(f"it has {meta.size} bytes, asked for byte {start}", op="get", url=url)
    return meta


def _cost_of(request: ReadRequest, first: int) -> int:
    if request.into is not None:
        return len(request.into)
    return first if request.end is None else request.end - request.start


def _put_one(backend: Backend, request: PutRequest) -> PutResult:
    about = {"content_type": request.content_type, "metadata": request.metadata, **said(request.attributes)}
    return backend.put(request.key, request.data, mode=request.mode, **about)


def _gated(request: ReadRequest, read: Callable[[], ReadResult]) -> ReadResult:
    """`read()`, if the gate of `request` lets it pass.

    Raises:
        ClosedError: it does not.
    """
    gate = request.gate
    if gate is None:
        return read()
    if not gate.begin():
        raise passed_over(request.key)
    data = None
    try:
        result = read()
        data = result.data
        return result
    finally:
        gate.end(data)


def _read_slot(backend: Backend, slot: Slot[ReadRequest], budget: Budget) -> ReadResult:
    request = slot.item
    if request.into is not None or request.end is not None:
        return read_one(backend, request)
    try:
        meta, data = backend.get(request.key, request.start, request.start + slot.cost, if_match=request.if_match)
    except RangeError:  # it is empty there, which is no error when all the rest was asked for
        meta, data = backend.get(request.key, request.start, None, if_match=request.if_match)
    have, total = len(data), max(0, meta.size - request.start)
    budget.correct(slot, total)
    if have >= total:
        return ReadResult(request, memoryview(data), meta.etag, meta.size)
    whole = shared_pool().lease(total)[:total]
    whole[:have] = data
    del data
    rest = backend.read_into(request.key, request.start + have, whole[have:], if_match=meta.etag or request.if_match)
    if rest.size != meta.size or rest.etag != meta.etag:
        raise ObjectChangedError("it was replaced while it was read", op="get", url=f"{backend.url}/{request.key}")
    return ReadResult(request, whole, meta.etag, meta.size)


# -- the verbs of `ObjectStore` --------------------------------------------------------------------


class BulkKeywords(TypedDict, total=False):
    """How a bulk call is made."""

    max_bytes: int | str
    """Most bytes fetched or being fetched and not yet taken, or taken from the requests and not yet written (one request may
    be larger); default 128 MiB."""
    concurrency: int | None
    """Requests at a time; default `StoreOptions.concurrency`."""
    driver: Driver
    """Who turns the sockets: ``"pump"``, the calling thread itself (epoll, no handoff); ``"threads"``, background threads, for
    reads beside a busy main thread; default ``"auto"``: the pump, but threads for large reads into the caller's memory."""


class BulkVerbs(ABC):
    """`read_many`, `get_many` and `put_many` over a backend."""

    options: StoreOptions

    @property
    @abstractmethod
    def backend(self) -> Backend:
        """The outermost backend."""

    @overload
    def read_many(
        self, requests: Iterable[ReadRequest], *, errors: Literal["raise"] = ..., **options: Unpack[BulkKeywords]
    ) -> Iterator[ReadResult]: ...
    @overload
    def read_many(
        self, requests: Iterable[ReadRequest], *, errors: Literal["return"], **options: Unpack[BulkKeywords]
    ) -> Iterator[ReadResult | ReadFailure]: ...
    def read_many(
        self, requests: Iterable[ReadRequest], *, errors: OnError = "raise", **options: Unpack[BulkKeywords]
    ) -> Iterator[Any]:
        """Many reads, several at a time, answers in the order of `requests`.

        Args:
            requests: Taken as they are needed, in the calling thread.
            options: The fields of `BulkKeywords`: `max_bytes` in flight, `concurrency`, `driver`.
            errors: ``"raise"`` raises an error at the position of its request and ends; ``"return"``
                gives a `ReadFailure` there and goes on.

        Yields:
            `ReadResult`; its `data` stays valid as long as a view of it lives.
        """
        check_several(requests, "ReadRequest")
        return read_many(self.backend, requests, **self._bulk_options(errors, **options))

    @overload
    def get_many(
        self, keys: Iterable[str], *, errors: Literal["raise"] = ..., **options: Unpack[BulkKeywords]
    ) -> Iterator[ReadResult]: ...
    @overload
    def get_many(
        self, keys: Iterable[str], *, errors: Literal["return"], **options: Unpack[BulkKeywords]
    ) -> Iterator[ReadResult | ReadFailure]: ...
    def get_many(self, keys: Iterable[str], *, errors: OnError = "raise", **options: Unpack[BulkKeywords]) -> Iterator[Any]:
        """Many whole objects; as `read_many` with one request per key."""
        check_several(keys, "key")
        return read_many(self.backend, map(ReadRequest, keys), **self._bulk_options(errors, **options))

    @overload
    def put_many(
        self, requests: Iterable[PutRequest], *, errors: Literal["raise"] = ..., **options: Unpack[BulkKeywords]
    ) -> Iterator[PutResult]: ...
    @overload
    def put_many(
        self, requests: Iterable[PutRequest], *, errors: Literal["return"], **options: Unpack[BulkKeywords]
    ) -> Iterator[PutResult | PutFailure]: ...
    def put_many(
        self, requests: Iterable[PutRequest], *, errors: OnError = "raise", **options: Unpack[BulkKeywords]
    ) -> Iterator[Any]:
        """Many writes, several at a time, results in the order of `requests`. Runs as the iterator is consumed.

        Args and errors as in `read_many`, with `PutFailure`.
        """
        check_several(requests, "PutRequest")
        return put_many(self.backend, requests, **self._bulk_options(errors, **options))

    def _bulk_options(
        self,
        errors: OnError,
        max_bytes: int | str = "128MiB",
        concurrency: int | None = None,
        driver: Driver = "auto",
    ) -> BulkOptions:
        if concurrency is None:
            found = getattr(self.backend, "bulk", None)
            concurrency = self.options.concurrency or (MOST_THREADS if found is None else MOST_CONNECTIONS)
        at_least("concurrency", concurrency, hint="leave it out for that of StoreOptions")
        one_of("driver", driver, Driver)
        one_of("errors", errors, OnError, '"return" gives a failure in its place and goes on')
        return {"max_bytes": parse_size(max_bytes, "max_bytes"), "concurrency": concurrency, "driver": driver, "errors": errors}


# -- with policy around it --------------------------------------------------------------------------


class BulkPipeline:
    """An engine's bulk verbs with the policy of a `Pipeline` around them.

    Args:
        engine: The bulk verbs.
        pipeline: What a request that failed takes its second try through.
        inner: The backend that the pipeline is around.
        prefix, limit: Of the pipeline.
    """

    def __init__(self, engine: BulkBackend, pipeline: Backend, inner: Backend, prefix: str, limit: RateLimit | None) -> None:
        self._engine = engine
        self._pipeline = pipeline
        self._inner = inner
        self._prefix = prefix
        self._limit = limit

    def read_outcomes(
        self, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver
    ) -> Iterator[ReadResult | BaseException]:
        """Results in the order of `requests`; an error takes the place of its result, and the rest follows."""
        prefix = self._prefix

        def outward(r: ReadRequest) -> ReadRequest:
            return ReadRequest(prefix + r.key, r.start, r.end, r.if_match, r.into, r.tag, r.gate)

        return self._outcomes(
            requests,
            partial(self._engine.read_outcomes, max_bytes=max_bytes, concurrency=concurrency, driver=driver),
            outward if prefix else None,
            lambda request, result: ReadResult(request, *result[1:]),
            self._read_again,
        )

    def put_outcomes(
        self, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver
    ) -> Iterator[PutResult | BaseException]:
        """Results in the order of `requests`; an error takes the place of its result, and the rest follows."""
        prefix = self._prefix

        def outward(r: PutRequest) -> PutRequest:
            return PutRequest(prefix + r.key, r.data, r.mode, r.content_type, r.tag, r.metadata, r.attributes)

        return self._outcomes(
            requests,
            partial(self._engine.put_outcomes, max_bytes=max_bytes, concurrency=concurrency, driver=driver),
            outward if prefix else None,
            lambda request, result: PutResult(request.key, result.etag, result.size, result.version_id),
            lambda r: self._pipeline.put(
                r.key, r.data, mode=r.mode, content_type=r.content_type, metadata=r.metadata, attributes=r.attributes
            ),
        )

    def _read_again(self, request: ReadRequest) -> ReadResult:
        return read_one(self._pipeline, request)

    def _outcomes(
        self,
        source: Iterable[Any],
        run: Callable[[Iterator[Any]], Iterator[Any]],
        outward: Callable[[Any], Any] | None,
        inward: Callable[[Any, Any], Any],
        again: Callable[[Any], Any],
    ) -> Iterator[Any]:
        """Drive `source` through the engine.

        Args:
            source: The requests.
            run: The engine's bulk verb.
            outward: Puts the prefix in front of a request's key; None where there is none.
            inward: The caller's own request into the result.
            again: One request over the pipeline.
        """
        pending: deque[Any] = deque()
        source_error: list[Exception] = []
        limit, url, engine = self._limit, self._inner.url, self._inner.engine

        def feed() -> Iterator[Any]:
            try:
                for request in source:
                    if limit is not None:
                        limit.wait(url, engine)
                    pending.append(request)
                    yield request if outward is None else outward(request)
            except Exception as error:  # noqa: BLE001 - the caller's own, raised at its place
                source_error.append(error)

        outcomes = run(feed())
        try:
            for outcome in outcomes:
                request = pending.popleft()
                if isinstance(outcome, BaseException):
                    yield self._second_attempt(request, outcome, again)
                else:
                    yield outcome if outward is None else inward(request, outcome)
        finally:
            close = getattr(outcomes, "close", None)
            if close is not None:
                close()
        if source_error:
            raise source_error[0]

    def _second_attempt(self, request: Any, error: BaseException, again: Callable[[Any], Any]) -> Any:
        """What becomes of a request that the engine failed at."""
        if not isinstance(error, S3LoaderError) or not may_retry(error):
            return error
        try:
            with after_failure(error):
                return again(request)
        except S3LoaderError as final:
            return final
