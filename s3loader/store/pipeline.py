"""The one path of every request, single or bulk: prefix, rate limit, events and retries around an engine, as data.

    ObjectStore -> Pipeline -> engine

A request that an engine's own bulk verbs fail at, and that may be tried again, takes the same path as any single one.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from s3loader import events
from s3loader.errors import S3LoaderError, TruncatedError, UnsupportedOperationError
from s3loader.ranges import first_byte
from s3loader.store.arguments import said
from s3loader.store.backend import Backend, BulkBackend, Op
from s3loader.store.bulk import BulkPipeline
from s3loader.store.lost_reply import WRITE_ID, LostReply
from s3loader.store.retry import Attempts, RateLimit, RetryPolicy, may_retry, take_failure
from s3loader.store.told import NAMES, Request, take_first_byte
from s3loader.types import (
    Buffer,
    CommonPrefix,
    DeleteFailure,
    NetworkState,
    ObjectMeta,
    PartResult,
    PutMode,
    PutResult,
)

__all__ = [
    "Pipeline",
    "below",
    "innermost",
]

T = TypeVar("T")


class Pipeline:
    """An engine with policy around it; a `Backend` itself.

    Args:
        inner: The engine, or any backend.
        prefix: Put in front of every key that goes in and taken off every key that comes out; ends with ``/``.
        retry: How often and how long requests are repeated.
        limit: Requests per second; None: no bound.
        observed: Whether it emits an event for each attempt; not around an engine that emits its own.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        prefix: str = "",
        retry: RetryPolicy | None = None,
        limit: RateLimit | None = None,
        observed: bool | None = None,
    ) -> None:
        self.inner = inner
        self.prefix = prefix
        self.retry = retry or RetryPolicy()
        self.limit = limit
        self.observed = not getattr(inner, "emits_events", False) if observed is None else observed
        self.url = f"{inner.url}/{prefix}".rstrip("/") if prefix else inner.url
        self._upload_writes: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.inner, self.prefix, self.retry, self.limit, self.observed)

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self.inner.engine

    @property
    def emits_events(self) -> bool:
        """Whoever stands around it need not emit any."""
        return True

    # -- one attempt, and many --------------------------------------------------------------------

    def _call(
        self,
        op: Op,
        key: str,
        size: int,
        run: Callable[[], T],
        settle: Callable[[S3LoaderError, bool], T | None] | None = None,
        objects: int = 1,
        offset: int | None = None,
    ) -> T:
        """Run `run` as often as it may help.

        Args:
            op: Which verb.
            key: Full key of the object; the source of a copy, the prefix of a listing, the first of many.
            size: Bytes that go up, or are asked for by `read_into`; 0 where it does not say.
            run: The verb of the inner backend, its arguments bound.
            settle: Is asked about each failure, and told whether it is the last: what it returns is
                the result after all (None: it is a failure), what it raises ends the matter.
            objects: How many objects it concerns, for the event.
            offset: Of a read: its first byte, for the event.
        """
        attempts: Attempts | None = None
        earlier = take_failure()
        try:
            while True:
                try:
                    if earlier is not None:
                        failure, earlier = earlier, None
                        raise failure
                    if self.limit is not None:
                        self.limit.wait(self.inner.url, self.inner.engine)
                    if not self.observed or not events.active():
                        return run()
                    return self._observe(op, key, size, run, objects, offset)
                except S3LoaderError as error:
                    if attempts is None:
                        attempts = Attempts(self.retry, f"{self.inner.url}/{key}", self.inner.engine)
                    last = attempts.is_last(error)
                    if settle is not None and (settled := settle(error, last)) is not None:
                        return settled
                    if last:
                        raise
                    attempts.wait(error)
        finally:
            if attempts is not None:
                attempts.end()

    def _observe(self, op: Op, key: str, size: int, run: Callable[[], T], objects: int, offset: int | None) -> T:
        take_first_byte()  # of another verb, which nobody told of
        request = Request(NAMES[op], f"{self.inner.url}/{key}", self.inner.engine, offset)
        failed: S3LoaderError | None = None
        try:
            result: Any = run()
        except S3LoaderError as error:
            request.end(error=error, objects=objects)
            raise
        if op == "get":
            size = len(result[1])
        elif op == "delete many" and result and isinstance(result[0].error, S3LoaderError):
            failed = result[0].error
        request.first_byte, request.status = take_first_byte()
        request.end(size, failed, objects)
        return cast("T", result)

    def _meta(self, meta: ObjectMeta, key: str) -> ObjectMeta:
        return meta.renamed(key) if self.prefix else meta

    # -- the verbs --------------------------------------------------------------------------------

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes of an object. A body of another length than the object's size says is not believed."""
        full = self.prefix + key

        def run() -> tuple[ObjectMeta, Buffer]:
            meta, data = self.inner.get(full, start, end, if_match=if_match, version_id=version_id)
            expected = (meta.size if end is None or end > meta.size else end) - first_byte(start, meta.size)
            if len(data) != expected and expected > 0:
                raise TruncatedError(f"{len(data)} bytes came, not {expected}", op="get", url=f"{self.url}/{key}")
            return meta, data

        meta, data = self._call("get", full, 0, run, offset=start if start >= 0 else None)
        return self._meta(meta, key), data

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` with bytes of an object."""
        full = self.prefix + key
        run = partial(self.inner.read_into, full, start, buffer, if_match=if_match)
        return self._meta(self._call("read", full, len(buffer), run, offset=start), key)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object."""
        full = self.prefix + key
        return self._meta(self._call("head", full, 0, partial(self.inner.head, full, version_id=version_id)), key)

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> PutResult:
        """Write one object. A conditional put carries a `WRITE_ID`, and is settled by it where its answer was lost."""
        settle = None
        if mode != "overwrite":
            metadata, write_id = _with_write_id(metadata)
            settle = LostReply(self, "put", key, write_id, mode)
        full = self.prefix + key
        run = partial(self.inner.put, full, data, mode=mode, content_type=content_type, metadata=metadata, **said(attributes))
        result = self._call("put", full, len(data), run, settle)
        return result if result.key == key else replace(result, key=key)

    def tags(self, key: str, *, version_id: str | None = None) -> Mapping[str, str]:
        """Tags of an object."""
        full = self.prefix + key
        ask = getattr(self.inner, "tags", None)
        if ask is None:
            raise UnsupportedOperationError("this backend has no tags", op="tags", url=f"{self.url}/{key}")
        found: Mapping[str, str] = self._call("tags", full, 0, partial(ask, full, version_id=version_id))
        return found

    def delete(self, key: str) -> None:
        """Delete; a key that does not exist is no error."""
        full = self.prefix + key
        self._call("delete", full, 0, partial(self.inner.delete, full))

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside the root."""
        settle = LostReply(self, "copy", target, None, mode) if mode != "overwrite" else None
        run = partial(self.inner.copy, self.prefix + source, self.prefix + target, mode=mode)
        return replace(self._call("copy", self.prefix + source, 0, run, settle), key=target)

    def create_multipart(
        self,
        key: str,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin an upload. The object will carry a `WRITE_ID`."""
        metadata, write_id = _with_write_id(metadata)
        full = self.prefix + key
        run = partial(self.inner.create_multipart, full, content_type=content_type, metadata=metadata, **said(attributes))
        upload_id = self._call("create upload", full, 0, run)
        self._upload_writes[upload_id] = write_id
        return upload_id

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload one part."""
        full = self.prefix + key
        run = partial(self.inner.upload_part, full, upload_id, number, data)
        return self._call("upload part", full, len(data), run)

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """Make the object from its parts. An upload that is gone after a lost answer may have been completed."""
        settle = LostReply(self, "complete upload", key, self._upload_writes.get(upload_id), mode)
        full = self.prefix + key
        run = partial(self.inner.complete_multipart, full, upload_id, parts, mode=mode)
        result = self._call("complete upload", full, 0, run, settle)
        self._upload_writes.pop(upload_id, None)
        return replace(result, key=key)

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the parts."""
        self._upload_writes.pop(upload_id, None)
        full = self.prefix + key
        self._call("abort upload", full, 0, partial(self.inner.abort_multipart, full, upload_id))

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """Open uploads; read to their end at once, for there are few."""
        full, cut = self.prefix + prefix, len(self.prefix)
        found = self._call("list uploads", full, 0, lambda: [*self.inner.list_multipart(full)])
        return iter([(key[cut:], upload_id, initiated) for key, upload_id, initiated in found])

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """Parts of an open upload; read to their end at once."""
        full = self.prefix + key
        return iter(self._call("list parts", full, 0, lambda: [*self.inner.list_parts(full, upload_id)]))

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """Delete all. Keys that failed for a passing reason are tried again. The event counts the keys."""
        cut = len(self.prefix)
        left = [self.prefix + key for key in keys]
        first = left[0] if left else ""
        attempts = Attempts(self.retry, f"{self.inner.url}/{first}", self.inner.engine)
        failures: builtins.list[DeleteFailure] = []
        try:
            while True:
                now = self._call("delete many", first, 0, partial(self.inner.delete_many, left), None, len(left))
                passing = [f for f in now if isinstance(f.error, S3LoaderError) and may_retry(f.error)]
                failures += [f for f in now if f not in passing]
                if not passing:
                    break
                error = passing[0].error
                assert isinstance(error, S3LoaderError)
                if attempts.is_last(error):
                    failures += passing
                    break
                left = [failure.key for failure in passing]
                attempts.wait(error)
        finally:
            attempts.end()
        return [DeleteFailure(failure.key[cut:], failure.error) for failure in failures]

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries in order. After a failure it goes on behind the last entry given."""
        full, cut = self.prefix + prefix, len(self.prefix)
        after = self.prefix + start_after if start_after else ""
        last = ""
        attempts = Attempts(self.retry, f"{self.inner.url}/{full}", self.inner.engine)
        try:
            while True:
                try:
                    if self.limit is not None:
                        self.limit.wait(self.inner.url, self.inner.engine)
                    entries = self.inner.list(full, delimiter=delimiter, start_after=last or after)
                    for entry in self._counted(entries, full) if self.observed and events.active() else entries:
                        if entry.key == last:  # a common prefix appears again while keys in it are left
                            continue
                        last = entry.key
                        if attempts.number > 1:
                            attempts.end()
                            attempts = Attempts(self.retry, f"{self.inner.url}/{full}", self.inner.engine)
                        key = last[cut:]
                        if isinstance(entry, CommonPrefix):
                            yield CommonPrefix(key)
                        elif key:  # the marker object some tools write for the folder itself has no name in it
                            yield self._meta(entry, key)
                    return
                except S3LoaderError as error:
                    if attempts.is_last(error):
                        raise
                    attempts.wait(error)
        finally:
            attempts.end()

    def _counted(self, entries: Iterator[Any], prefix: str) -> Iterator[Any]:
        """The event comes at the end and counts the entries; the consumer's time is not in it."""
        request = Request("LIST", f"{self.inner.url}/{prefix}", self.inner.engine)
        waited = first = 0.0
        count = 0
        failed: S3LoaderError | None = None
        try:
            while True:
                asked = events.now()
                try:
                    entry = next(entries)
                except StopIteration:
                    return
                finally:
                    waited += events.now() - asked
                first = first or waited
                count += 1
                yield entry
        except S3LoaderError as error:
            failed = error
            raise
        finally:
            if count:
                request.start = events.now() - waited
                request.first_byte = request.start + first
            request.end(0, failed, count)

    def put_with_checksum(self, key: str, data: Buffer, checksum: str) -> PutResult:
        """Put, telling the server that the CRC32C of `data` is `checksum` (base64), right or wrong. For probing.

        Raises:
            UnsupportedOperationError: the engine chooses the checksum itself.
        """
        put = getattr(innermost(self.inner), "put_with_checksum", None)
        if put is None:
            raise UnsupportedOperationError("the engine chooses the checksum itself", op="put", url=f"{self.url}/{key}")
        result: PutResult = put(self.prefix + key, data, checksum)
        return result

    def network(self) -> NetworkState | None:
        """What the engine has measured of its endpoint; None: it does not measure."""
        measured = getattr(innermost(self.inner), "network", None)
        return None if measured is None else measured()

    def open_ahead(self, count: int, *, reads: bool = False) -> None:
        """Begin to open `count` connections, where the engine has any. `reads`: for as many reads at once."""
        ahead = getattr(innermost(self.inner), "open_ahead", None)
        if ahead is not None:
            ahead(count, reads=reads)

    @property
    def PUT_LIMIT(self) -> int | None:  # noqa: N802 - a constant of every engine
        """Most bytes of one put; None: nobody knows."""
        return getattr(innermost(self.inner), "PUT_LIMIT", None)

    # -- many at once -----------------------------------------------------------------------------

    @property
    def bulk(self) -> BulkBackend | None:
        """The engine's own way to run many requests, with this policy around it; None: it has none."""
        engine = getattr(self.inner, "bulk", None)
        return None if engine is None else BulkPipeline(engine, self, self.inner, self.prefix, self.limit)

    def close(self) -> None:
        """Let go of connections and threads."""
        self.inner.close()


def below(backend: Backend, prefix: str) -> Backend:
    """`backend` with all keys below `prefix` (which ends with ``/``), by the same path of requests."""
    if isinstance(backend, Pipeline):
        whole = backend.prefix + prefix
        return Pipeline(backend.inner, prefix=whole, retry=backend.retry, limit=backend.limit, observed=backend.observed)
    return Pipeline(backend, prefix=prefix, retry=RetryPolicy(max_attempts=1), observed=False)


def innermost(backend: Backend) -> Backend:
    """The engine below whatever stands around it."""
    while (inner := getattr(backend, "inner", None)) is not None:
        backend = inner
    return backend


def _with_write_id(metadata: Mapping[str, str] | None) -> tuple[dict[str, str], str]:
    carried = dict(metadata or {})
    return carried, carried.setdefault(WRITE_ID, os.urandom(16).hex())


def _rebuild(inner: Backend, prefix: str, retry: RetryPolicy, limit: RateLimit | None, observed: bool) -> Pipeline:
    return Pipeline(inner, prefix=prefix, retry=retry, limit=limit, observed=observed)
