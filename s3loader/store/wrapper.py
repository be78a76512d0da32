"""The base of backends that stand around another backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from s3loader.store.base import Backend
from s3loader.types import Buffer, CommonPrefix, DeleteFailure, ObjectMeta, PartResult, PutMode, PutResult

__all__ = ["Wrapper", "innermost"]


class Wrapper:
    """Hands every verb to `inner`; a subclass overrides what it changes."""

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

    def delete_many(self, keys: Sequence[str]) -> list[DeleteFailure]:
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

    def close(self) -> None:
        """See `Backend.close`."""
        self.inner.close()


def innermost(backend: Backend) -> Backend:
    """The engine under all wrappers."""
    while isinstance(backend, Wrapper):
        backend = backend.inner
    return backend
