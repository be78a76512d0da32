"""The seam every engine implements: primitive object verbs on one bucket (or folder).

`Backend` is the whole of that surface; `ForwardingBackend` is the base of what stands around a backend. `Pipeline` puts
retries, rate limit, events and a prefix around an engine; `ObjectStore` is the public face over it. A store of one's own, a
router, hedging or a cache are backends like any other.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from s3loader.store.arguments import said
from s3loader.types import (
    Buffer,
    CommonPrefix,
    DeleteFailure,
    ObjectMeta,
    PartResult,
    PutMode,
    PutRequest,
    PutResult,
    ReadRequest,
)

__all__ = ["Backend", "BulkBackend", "Driver", "ForwardingBackend", "Op", "ReadResult", "key_bytes", "roll_up"]

Driver: TypeAlias = Literal["auto", "pump", "threads"]
"""Who turns the wheels of a bulk read: ``"pump"`` = the calling thread itself (epoll, no
handoff); ``"threads"`` = background threads, for prefetch beside a busy main thread."""


Op: TypeAlias = Literal[
    "get", "read", "head", "put", "list", "delete", "delete many", "copy",
    "create upload", "upload part", "complete upload", "abort upload", "list uploads", "list parts", "tags",
]  # fmt: skip
"""A verb of `Backend`, as errors name it; `read` is `read_into`."""


class ReadResult(NamedTuple):
    """One answer of a bulk read."""

    request: ReadRequest
    data: memoryview
    """The bytes read. Lent: its buffer is used again when the last view of it is gone, so keep
    a view (or a slice, or an array over it) as long as you need the bytes. For a request with
    `into`, that very memory."""
    etag: str
    size: int
    """Size of the whole object in bytes."""


class Backend(Protocol):
    """Primitive verbs on one root. Keys are relative to it, and literal: ``a//b`` is not ``a/b``.

    Every method raises the tree of `s3loader.errors` only, with `op` and `url` set, is safe to
    call from several threads, and after a fork of the process that used it.
    """

    @property
    def url(self) -> str:
        """Root without a trailing slash: ``s3://bucket``, ``file:///data``, ``memory://name``."""
        ...

    @property
    def engine(self) -> str:
        """``direct``, ``obstore``, ``boto3``, ``file``, ``memory``; for events and `explain`."""
        ...

    @property
    def bulk(self) -> BulkBackend | None:
        """Its own way to run many requests; None: threads run its single verbs."""
        ...

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` (to the end of the object where `end` is None or beyond it).

        Where `start` is negative and `end` None: the last ``-start`` bytes, all of an object that has fewer.

        Raises:
            RangeError: `start` is beyond the object (or at its end, for a non-empty range).
            ObjectChangedError: the object's ETag is not `if_match`; checked on the answer even
                where the server ignores the condition.
            TruncatedError: the body ended early (after retries).
            UnsupportedOperationError: the store gives no bytes from the end, without being told where they begin.
        """
        ...

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` (1-D, format ``B``, writable) with ``len(buffer)`` bytes from `start`.

        Raises:
            RangeError: the object has fewer bytes there.
        """
        ...

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object, without its bytes."""
        ...

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
        """Write one object atomically: readers see the old one or the new one, whole.

        Args:
            attributes: What else describes it, by the names in `s3loader.types.SETTABLE`; given only where there is something.

        Raises:
            UnsupportedOperationError: the store cannot keep one of these.
        """
        ...

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries whose key starts with `prefix` (a string prefix, not a folder), in order of
        their UTF-8 bytes; with a delimiter, deeper keys are rolled up into `CommonPrefix`."""
        ...

    def delete(self, key: str) -> None:
        """Delete; a key that does not exist is no error."""
        ...

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """Delete all; never raises for a single key, returns what failed."""
        ...

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside this root, on the server's side where it can."""
        ...

    def create_multipart(
        self,
        key: str,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin a multipart upload; returns its upload id. What describes the object is given here, as to `put`."""
        ...

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload part `number` (1-based; all parts but the last at least 5 MiB on S3)."""
        ...

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """Make the object from its parts. A 200 answer that holds an error is an error."""
        ...

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the parts; an upload that is gone is no error."""
        ...

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """Open multipart uploads: ``(key, upload_id, initiated seconds since the epoch)``."""
        ...

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """Parts that an open upload has, by number, as `complete_multipart` takes them.

        `PartResult.checksum` is there where the store tells it; what an ETag says of the bytes is the store's affair.

        Raises:
            ObjectNotFoundError: there is no such upload (any more).
            UnsupportedOperationError: the store does not tell.
        """
        ...

    def tags(self, key: str, *, version_id: str | None = None) -> Mapping[str, str]:
        """Tags of the object.

        Raises:
            UnsupportedOperationError: the store has none.
        """
        ...

    def close(self) -> None:
        """Let go of connections and threads; closing twice is fine."""
        ...


class BulkBackend(Protocol):
    """An engine's own way to run many requests."""

    def read_outcomes(
        self, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver
    ) -> Iterator[ReadResult | BaseException]:
        """Results in the order of `requests`, at most `max_bytes` fetched but not yet taken. An error takes the place of its
        result, and the rest follows."""
        ...

    def put_outcomes(
        self, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver
    ) -> Iterator[PutResult | BaseException]:
        """Results in the order of `requests`, at most `max_bytes` of data pending. An error takes the place of its result, and
        the rest follows. All are plain overwrites."""
        ...


# -- listings --------------------------------------------------------------------------------------


def key_bytes(key: str) -> bytes:
    """The bytes that order `key` in a listing."""
    return key.encode("utf-8", "surrogateescape")


def roll_up(metas: Iterable[ObjectMeta], prefix: str, delimiter: str, start_after: str) -> Iterator[ObjectMeta | CommonPrefix]:
    """Entries of a listing from all objects under `prefix` in key order.

    A key that has the delimiter after the prefix is given once per common prefix instead.
    `start_after` drops keys up to and including it before they are rolled up, so a common
    prefix appears as long as one of its keys is left.
    """
    after = key_bytes(start_after)
    last = ""
    for meta in metas:
        if start_after and key_bytes(meta.key) <= after:
            continue
        at = meta.key.find(delimiter, len(prefix)) if delimiter else -1
        if at < 0:
            yield meta
            continue
        common = meta.key[: at + len(delimiter)]
        if common != last:
            last = common
            yield CommonPrefix(common)


T = TypeVar("T")


class ForwardingBackend:
    """Hands every verb to `inner`, by way of `around`; a subclass overrides what it does otherwise.

    Bulk reads and writes pass here one by one: the engine's own bulk verbs are not used through it.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        """Root without a trailing slash."""
        return self.inner.url

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self.inner.engine

    @property
    def emits_events(self) -> bool:
        """Whether the engine emits its own events."""
        return getattr(self.inner, "emits_events", False)

    @property
    def bulk(self) -> BulkBackend | None:
        """None: threads run the single verbs."""
        return None

    def around(self, op: Op, key: str, size: int, run: Callable[[], T]) -> T:
        """Do the request, by `run`.

        Args:
            op: Which verb.
            key: Of the object; the source of a copy, the prefix of a listing, the first of many.
            size: Bytes that go up, or are asked for by `read_into`; 0 where it does not say.
            run: The verb of the inner backend, its arguments bound.
        """
        return run()

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes of an object."""
        return self.around("get", key, 0, lambda: self.inner.get(key, start, end, if_match=if_match, version_id=version_id))

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill a buffer with bytes of an object."""
        return self.around("read", key, len(buffer), lambda: self.inner.read_into(key, start, buffer, if_match=if_match))

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object."""
        return self.around("head", key, 0, lambda: self.inner.head(key, version_id=version_id))

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
        """Write one object."""
        return self.around(
            "put",
            key,
            len(data),
            lambda: self.inner.put(key, data, mode=mode, content_type=content_type, metadata=metadata, **said(attributes)),
        )

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries of a listing. Only its beginning lies inside `around`."""
        return self.around("list", prefix, 0, lambda: self.inner.list(prefix, delimiter=delimiter, start_after=start_after))

    def delete(self, key: str) -> None:
        """Delete one object."""
        self.around("delete", key, 0, lambda: self.inner.delete(key))

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """Delete several."""
        return self.around("delete many", keys[0] if keys else "", 0, lambda: self.inner.delete_many(keys))

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside the root."""
        return self.around("copy", source, 0, lambda: self.inner.copy(source, target, mode=mode))

    def create_multipart(
        self,
        key: str,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin an upload."""
        return self.around(
            "create upload",
            key,
            0,
            lambda: self.inner.create_multipart(key, content_type=content_type, metadata=metadata, **said(attributes)),
        )

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload one part."""
        return self.around("upload part", key, len(data), lambda: self.inner.upload_part(key, upload_id, number, data))

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """Make the object from its parts."""
        return self.around("complete upload", key, 0, lambda: self.inner.complete_multipart(key, upload_id, parts, mode=mode))

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the parts."""
        self.around("abort upload", key, 0, lambda: self.inner.abort_multipart(key, upload_id))

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """Open uploads; read to their end inside `around`."""
        return self.around("list uploads", prefix, 0, lambda: iter([*self.inner.list_multipart(prefix)]))

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """Parts of an open upload; read to their end inside `around`."""
        return self.around("list parts", key, 0, lambda: iter([*self.inner.list_parts(key, upload_id)]))

    def tags(self, key: str, *, version_id: str | None = None) -> Mapping[str, str]:
        """Tags of one object."""
        return self.around("tags", key, 0, lambda: self.inner.tags(key, version_id=version_id))

    def close(self) -> None:
        """Let go of connections and threads."""
        self.inner.close()
