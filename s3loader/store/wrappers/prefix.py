"""A folder of a store as a store: ``s3://bucket/runs`` over the backend of ``s3://bucket``."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from s3loader.store.base import Backend
from s3loader.store.wrappers.wrapper import Wrapper
from s3loader.types import Buffer, CommonPrefix, DeleteFailure, ObjectMeta, PartResult, PutMode, PutResult

__all__ = ["PrefixBackend", "prefix_of"]


class PrefixBackend(Wrapper):
    """Puts `prefix` in front of every key that goes in and takes it off every key that comes out."""

    LETS_BULK_PAST = True

    def __init__(self, inner: Backend, prefix: str) -> None:
        super().__init__(inner)
        self.prefix = prefix

    @property
    def url(self) -> str:
        """See `Backend.url`."""
        return f"{self.inner.url}/{self.prefix}".rstrip("/")

    def _meta(self, meta: ObjectMeta, key: str) -> ObjectMeta:
        return ObjectMeta(key, meta.size, meta.etag, meta.last_modified, meta.content_type, meta.version_id, meta.metadata)

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """See `Backend.get`."""
        meta, data = self.inner.get(self.prefix + key, start, end, if_match=if_match, version_id=version_id)
        return self._meta(meta, key), data

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """See `Backend.read_into`."""
        return self._meta(self.inner.read_into(self.prefix + key, start, buffer, if_match=if_match), key)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """See `Backend.head`."""
        return self._meta(self.inner.head(self.prefix + key, version_id=version_id), key)

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
        result = self.inner.put(self.prefix + key, data, mode=mode, content_type=content_type, metadata=metadata)
        return replace(result, key=key)

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """See `Backend.list`."""
        cut = len(self.prefix)
        after = self.prefix + start_after if start_after else ""
        for entry in self.inner.list(self.prefix + prefix, delimiter=delimiter, start_after=after):
            key = entry.key[cut:]
            if isinstance(entry, CommonPrefix):
                yield CommonPrefix(key)
            elif key:  # the marker object some tools write for the folder itself has no name in it
                yield self._meta(entry, key)

    def delete(self, key: str) -> None:
        """See `Backend.delete`."""
        self.inner.delete(self.prefix + key)

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """See `Backend.delete_many`."""
        cut = len(self.prefix)
        failures = self.inner.delete_many([self.prefix + key for key in keys])
        return [DeleteFailure(failure.key[cut:], failure.error) for failure in failures]

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """See `Backend.copy`."""
        return replace(self.inner.copy(self.prefix + source, self.prefix + target, mode=mode), key=target)

    def create_multipart(self, key: str, *, content_type: str | None = None, metadata: Mapping[str, str] | None = None) -> str:
        """See `Backend.create_multipart`."""
        return self.inner.create_multipart(self.prefix + key, content_type=content_type, metadata=metadata)

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """See `Backend.upload_part`."""
        return self.inner.upload_part(self.prefix + key, upload_id, number, data)

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """See `Backend.complete_multipart`."""
        return replace(self.inner.complete_multipart(self.prefix + key, upload_id, parts, mode=mode), key=key)

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """See `Backend.abort_multipart`."""
        self.inner.abort_multipart(self.prefix + key, upload_id)

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """See `Backend.list_multipart`."""
        cut = len(self.prefix)
        for key, upload_id, initiated in self.inner.list_multipart(self.prefix + prefix):
            yield key[cut:], upload_id, initiated

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """See `Backend.list_parts`."""
        return self.inner.list_parts(self.prefix + key, upload_id)


def prefix_of(backend: Backend) -> str:
    """What all the wrappers together put in front of a key before it reaches the engine."""
    prefix = ""
    while isinstance(backend, Wrapper):
        if isinstance(backend, PrefixBackend):
            prefix = backend.prefix + prefix
        backend = backend.inner
    return prefix
