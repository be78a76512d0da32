"""Many reads or writes at once over any backend: results in order, a bounded number of bytes in hand.

An engine with a bulk way of its own (`OutcomeBackend`) drives everything; a request it fails at,
and that may be tried again, goes through the wrappers like any single request. Other engines are
driven by threads.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, runtime_checkable

from s3loader.errors import ConfigError, ObjectChangedError, RangeError, S3LoaderError
from s3loader.store.arguments import checked_key, checked_mode, readable, writable
from s3loader.store.base import Backend, Driver, ReadResult
from s3loader.store.buffers import shared_pool
from s3loader.store.ordered import Budget, Slot, run_ordered
from s3loader.store.threads import after_failure
from s3loader.store.wrappers.limit import pace_of
from s3loader.store.wrappers.prefix import prefix_of
from s3loader.store.wrappers.retry import may_retry
from s3loader.store.wrappers.wrapper import Wrapper
from s3loader.types import ObjectMeta, PutRequest, PutResult, ReadRequest
from s3loader.units import KIB, MIB

__all__ = ["BulkOptions", "OnError", "OutcomeBackend", "PutFailure", "ReadFailure", "empty_read", "put_many", "read_many"]

OnError: TypeAlias = Literal["raise", "return"]


class BulkOptions(TypedDict):
    """How a bulk call is made; see `ObjectStore.read_many`."""

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


@runtime_checkable
class OutcomeBackend(Protocol):
    """A backend with bulk verbs of its own in which an error takes the place of its answer."""

    def read_outcomes(
        self, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver
    ) -> Iterator[ReadResult | BaseException]:
        """As `BulkBackend.read_many`, but never raising for a single request."""
        ...

    def put_outcomes(
        self, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver
    ) -> Iterator[PutResult | BaseException]:
        """As `BulkBackend.put_many`, but never raising for a single request."""
        ...


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
    """See `ObjectStore.read_many`."""
    source = map(_checked_read, requests)
    engine = _bulk_engine(backend)
    if engine is not None:
        yield from _through_engine(
            source,
            lambda batch: engine.read_outcomes(batch, max_bytes=max_bytes, concurrency=concurrency, driver=driver),
            lambda request: _read_one(backend, request),
            _outward_read(prefix_of(backend)),
            lambda request, result: ReadResult(request, *result[1:]),
            ReadFailure,
            pace_of(backend),
            errors,
        )
    else:
        yield from _read_here_or_there(backend, source, max_bytes, concurrency, driver, errors)


def _read_here_or_there(
    backend: Backend, source: Iterator[ReadRequest], max_bytes: int, concurrency: int, driver: Driver, errors: OnError
) -> Iterator[ReadResult | ReadFailure]:
    """In this thread while that is faster (memory, files in the page cache), else by threads."""
    if _here(driver, backend, concurrency):
        patience = _PATIENCE if driver == "auto" and concurrency > 1 else math.inf
        for request in source:
            start = time.perf_counter()
            try:
                result = _read_one(backend, request)
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
        lambda slot, budget: _read_slot(backend, slot, budget),
        lambda request: _cost_of(request, first),
        max_bytes=max_bytes,
        concurrency=concurrency,
        name="s3loader-read",
    )
    yield from _outcomes(slots, ReadFailure, errors)


def put_many(
    backend: Backend, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver, errors: OnError
) -> Iterator[PutResult | PutFailure]:
    """See `ObjectStore.put_many`."""
    source = map(_checked_put, requests)
    engine = _bulk_engine(backend)
    if engine is None:
        yield from _put_by_threads(backend, source, max_bytes, concurrency, driver, errors)
        return
    prefix = prefix_of(backend)
    # Conditional puts need their write id and its settling (see `retry`), so they go the general way.
    for plain, run in itertools.groupby(source, key=lambda request: request.mode == "overwrite"):
        if not plain:
            yield from _put_by_threads(backend, run, max_bytes, concurrency, driver, errors)
            continue
        yield from _through_engine(
            run,
            lambda batch: engine.put_outcomes(batch, max_bytes=max_bytes, concurrency=concurrency, driver=driver),
            lambda request: _put_one(backend, request),
            _outward_put(prefix),
            lambda request, result: PutResult(request.key, result.etag, result.size, result.version_id),
            PutFailure,
            pace_of(backend),
            errors,
        )


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


def _through_engine(
    source: Iterator[Any],
    run: Callable[[Iterator[Any]], Iterator[Any]],
    single: Callable[[Any], Any],
    outward: Callable[[Any], Any] | None,
    inward: Callable[[Any, Any], Any],
    failure: Callable[[Any, S3LoaderError], Any],
    pace: Callable[[], None] | None,
    errors: OnError,
) -> Iterator[Any]:
    """Drive `source` through a bulk engine.

    Args:
        run: The engine's bulk verb.
        single: One request through the wrappers.
        outward: Puts the prefix in front of a request's key; None where there is none.
        inward: The caller's own request into the result.
        pace: Waits until the next request may be sent.
    """
    pending: deque[Any] = deque()
    source_error: list[Exception] = []

    def feed() -> Iterator[Any]:
        try:
            for request in source:
                if pace is not None:
                    pace()
                pending.append(request)
                yield request if outward is None else outward(request)
        except Exception as error:  # noqa: BLE001 - the caller's own, raised at its place
            source_error.append(error)

    outcomes = run(feed())
    try:
        for outcome in outcomes:
            request = pending.popleft()
            if isinstance(outcome, BaseException):
                yield _second_try(request, outcome, single, failure, errors)
            else:
                yield outcome if outward is None else inward(request, outcome)
    finally:
        close = getattr(outcomes, "close", None)
        if close is not None:
            close()
    if source_error:
        raise source_error[0]


def _second_try(request: Any, error: BaseException, single: Callable[[Any], Any], failure: Any, errors: OnError) -> Any:
    """What becomes of a request that the engine failed at."""
    try:
        if not isinstance(error, S3LoaderError) or not may_retry(error):
            raise error
        with after_failure(error):
            return single(request)
    except S3LoaderError as final:
        if errors == "raise":
            raise
        return failure(request, final)


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


def _bulk_engine(backend: Backend) -> OutcomeBackend | None:
    while isinstance(backend, Wrapper):
        if not backend.LETS_BULK_PAST:
            return None
        backend = backend.inner
    return backend if isinstance(backend, OutcomeBackend) else None


def _here(driver: Driver, engine: Backend, concurrency: int) -> bool:
    """Whether threads would cost more than they save, as far as known beforehand."""
    return driver == "pump" or concurrency == 1 or (driver == "auto" and engine.engine in ("memory", "file"))


# one request


def _checked_read(request: ReadRequest) -> ReadRequest:
    if not isinstance(request, ReadRequest):
        raise ConfigError(f"not a ReadRequest: {request!r}", hint="wrap it: ReadRequest(key, start, end); get_many takes keys")
    checked_key(request.key)
    if request.start < 0 or (request.end is not None and request.end < request.start):
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
    return request


def _outward_read(prefix: str) -> Callable[[ReadRequest], ReadRequest] | None:
    if not prefix:
        return None
    return lambda r: ReadRequest(prefix + r.key, r.start, r.end, r.if_match, r.into, r.tag)


def _outward_put(prefix: str) -> Callable[[PutRequest], PutRequest] | None:
    if not prefix:
        return None
    return lambda r: PutRequest(prefix + r.key, r.data, r.mode, r.content_type, r.tag)


def _cost_of(request: ReadRequest, first: int) -> int:
    if request.into is not None:
        return len(request.into)
    return first if request.end is None else request.end - request.start


def _put_one(backend: Backend, request: PutRequest) -> PutResult:
    return backend.put(request.key, request.data, mode=request.mode, content_type=request.content_type)


def _read_one(backend: Backend, request: ReadRequest) -> ReadResult:
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


def _read_slot(backend: Backend, slot: Slot[ReadRequest], budget: Budget) -> ReadResult:
    request = slot.item
    if request.into is not None or request.end is not None:
        return _read_one(backend, request)
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
