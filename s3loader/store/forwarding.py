"""The base of backends that stand around another backend."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from s3loader.store.arguments import said
from s3loader.store.backend import Backend, BulkBackend, Op
from s3loader.types import Buffer, CommonPrefix, DeleteFailure, ObjectMeta, PartResult, PutMode, PutResult

__all__ = ["ForwardingBackend"]

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
