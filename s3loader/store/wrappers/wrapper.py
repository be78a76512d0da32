"""The base of backends that stand around another backend."""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias, TypeVar

from s3loader.store.base import Backend
from s3loader.types import Buffer, CommonPrefix, DeleteFailure, ObjectMeta, PartResult, PutMode, PutResult

__all__ = ["Delegate", "Interceptor", "Op", "Wrapper", "innermost"]

T = TypeVar("T")

Op: TypeAlias = Literal[
    "get", "read", "head", "put", "list", "delete", "delete many", "copy",
    "create upload", "upload part", "complete upload", "abort upload", "list uploads", "list parts",
]  # fmt: skip
"""A verb of `Backend`, as errors name it; `read` is `read_into`."""


class Delegate:
    """Hands every verb to `inner`; a subclass overrides what it does itself."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        """See `Backend.url`."""
        return self.inner.url

    @property
    def engine(self) -> str:
        """See `Backend.engine`."""
        return self.inner.engine

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """See `Backend.get`."""
        return self.inner.get(key, start, end, if_match=if_match, version_id=version_id)

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """See `Backend.read_into`."""
        return self.inner.read_into(key, start, buffer, if_match=if_match)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """See `Backend.head`."""
        return self.inner.head(key, version_id=version_id)

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
        return self.inner.put(key, data, mode=mode, content_type=content_type, metadata=metadata)

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """See `Backend.list`."""
        return self.inner.list(prefix, delimiter=delimiter, start_after=start_after)

    def delete(self, key: str) -> None:
        """See `Backend.delete`."""
        self.inner.delete(key)

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """See `Backend.delete_many`."""
        return self.inner.delete_many(keys)

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """See `Backend.copy`."""
        return self.inner.copy(source, target, mode=mode)

    def create_multipart(self, key: str, *, content_type: str | None = None, metadata: Mapping[str, str] | None = None) -> str:
        """See `Backend.create_multipart`."""
        return self.inner.create_multipart(key, content_type=content_type, metadata=metadata)

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """See `Backend.upload_part`."""
        return self.inner.upload_part(key, upload_id, number, data)

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """See `Backend.complete_multipart`."""
        return self.inner.complete_multipart(key, upload_id, parts, mode=mode)

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """See `Backend.abort_multipart`."""
        self.inner.abort_multipart(key, upload_id)

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """See `Backend.list_multipart`."""
        return self.inner.list_multipart(prefix)

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """See `Backend.list_parts`."""
        return self.inner.list_parts(key, upload_id)

    def close(self) -> None:
        """See `Backend.close`."""
        self.inner.close()


class Wrapper(Delegate):
    """Stands around `inner`, whose engine it is of: see `innermost`."""

    LETS_BULK_PAST: ClassVar[bool] = False
    """Whether an engine's own bulk verbs may go around this wrapper (`store.bulk` then does what it would)."""


class Interceptor(Wrapper, ABC):
    """A wrapper that does the same around every verb."""

    @abstractmethod
    def around(self, op: Op, key: str, size: int, run: Callable[[], T]) -> T:
        """Do the request, by `run`.

        Args:
            op: Which verb.
            key: Of the object; the source of a copy, the prefix of a listing, the first of many.
            size: Bytes that go up, or are asked for by `read_into`; 0 where it does not say.
            run: The verb of the inner backend, its arguments bound.
        """

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """See `Backend.get`."""
        return self.around("get", key, 0, lambda: self.inner.get(key, start, end, if_match=if_match, version_id=version_id))

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """See `Backend.read_into`."""
        return self.around("read", key, len(buffer), lambda: self.inner.read_into(key, start, buffer, if_match=if_match))

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """See `Backend.head`."""
        return self.around("head", key, 0, lambda: self.inner.head(key, version_id=version_id))

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
        return self.around(
            "put",
            key,
            len(data),
            lambda: self.inner.put(key, data, mode=mode, content_type=content_type, metadata=metadata),
        )

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """See `Backend.list`. Only its beginning lies inside `around`."""
        return self.around("list", prefix, 0, lambda: self.inner.list(prefix, delimiter=delimiter, start_after=start_after))

    def delete(self, key: str) -> None:
        """See `Backend.delete`."""
        self.around("delete", key, 0, lambda: self.inner.delete(key))

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """See `Backend.delete_many`."""
        return self.around("delete many", keys[0] if keys else "", 0, lambda: self.inner.delete_many(keys))

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """See `Backend.copy`."""
        return self.around("copy", source, 0, lambda: self.inner.copy(source, target, mode=mode))

    def create_multipart(self, key: str, *, content_type: str | None = None, metadata: Mapping[str, str] | None = None) -> str:
        """See `Backend.create_multipart`."""
        return self.around(
            "create upload", key, 0, lambda: self.inner.create_multipart(key, content_type=content_type, metadata=metadata)
        )

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """See `Backend.upload_part`."""
        return self.around("upload part", key, len(data), lambda: self.inner.upload_part(key, upload_id, number, data))

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """See `Backend.complete_multipart`."""
        return self.around("complete upload", key, 0, lambda: self.inner.complete_multipart(key, upload_id, parts, mode=mode))

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """See `Backend.abort_multipart`."""
        self.around("abort upload", key, 0, lambda: self.inner.abort_multipart(key, upload_id))

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """See `Backend.list_multipart`. Read to its end inside `around`: there are few."""
        return self.around("list uploads", prefix, 0, lambda: iter([*self.inner.list_multipart(prefix)]))

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """See `Backend.list_parts`. Read to its end inside `around`."""
        return self.around("list parts", key, 0, lambda: iter([*self.inner.list_parts(key, upload_id)]))


def innermost(backend: Backend) -> Backend:
    """The engine under all wrappers."""
    while isinstance(backend, Wrapper):
        backend = backend.inner
    return backend
