"""A shard uploaded while it is built, its first part last.

Parts of a multipart upload are put together by number, whatever the order they arrive in. Part 1 will
hold the internal manifest, whose length is known last: its other bytes wait in memory (one part),
all later parts go out as they fill up.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Final

from s3loader.errors import ObjectExistsError
from s3loader.shard.index import ShardIndex, index_key
from s3loader.shard.writer import BuiltShard
from s3loader.store.objectstore import ObjectStore
from s3loader.store.ordered import BoundedPool
from s3loader.store.parts import PartUpload, part_size_of
from s3loader.types import Buffer, PutMode, PutResult
from s3loader.units import MIB

__all__ = ["ShardUpload", "upload_pool"]

TAR_TYPE: Final = "application/x-tar"
INDEX_TYPE: Final = "application/octet-stream"
_MAX_BYTES: Final = 64 * MIB
_CONTENT_TYPES: Final = {None: TAR_TYPE, "gzip": "application/gzip", "zstd": "application/zstd"}


def upload_pool(max_in_flight: int) -> BoundedPool:
    """Where the uploads of a writer run: a bounded number at a time, and 64 MiB of them."""
    return BoundedPool(max_in_flight, "s3loader-exchange", max_bytes=_MAX_BYTES)


class ShardUpload:
    """Takes the body of one archive, then its head and tail; makes the archive and its index side-car.

    Args:
        store: Where to.
        key: Key of the archive.
        compression: Of the archive, for its content type.
        mode: ``"create"`` never replaces an archive.
        pool: Where parts are uploaded.
        part_size: Bytes of a part; doubled every 900 parts. Smaller archives are one put.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        pool: BoundedPool,
        compression: str | None = None,
        mode: PutMode = "overwrite",
        part_size: int | None = None,
    ) -> None:
        self.key = key
        self._content_type = _CONTENT_TYPES.get(compression, TAR_TYPE)
        self._store = store
        self._mode: PutMode = mode
        self._pool = pool
        self._part_size = part_size or store.options.part_size
        self._first = bytearray()
        self._part: bytearray | None = None
        self._upload = PartUpload(store.backend, key, content_type=self._content_type)
        self._last = 1
        """Number of the last part that was cut; 1 stays for the end."""
        self._sent: list[Future[int]] = []

    @property
    def held(self) -> int:
        """Bytes in memory now, those in the pool not counted."""
        return len(self._first) + (len(self._part) if self._part is not None else 0)

    def write(self, pieces: Iterable[Buffer]) -> None:
        """The next bytes of the body; waits while the pool is full.

        Raises:
            S3LoaderError: an earlier part could not be uploaded.
        """
        target = self._first if self._part is None else self._part
        for piece in pieces:
            target += piece
        if self._part is None:
            if len(self._first) < 2 * self._part_size:  # so that all parts but the last are large enough
                return
            self._upload.begin()
            self._part = self._first[self._part_size :]
            del self._first[self._part_size :]
        while len(self._part) >= (size := part_size_of(self._last + 1, self._part_size)):
            if len(self._part) < 2 * size:
                self._send(self._part)
                self._part = bytearray()
            else:
                self._send(self._part[:size])
                del self._part[:size]

    def _send(self, data: Buffer) -> None:
        self._last = number = self._last + 1
        self._upload.check_number(number + 1)
        self._sent.append(self._pool.submit(lambda: self._upload.store(number, data), len(data)))

    def finish(self, built: BuiltShard) -> tuple[PutResult, ShardIndex]:
        """Publish the archive, then its index. May run in the pool; after a failure call `abort`.

        Raises:
            ObjectExistsError: mode ``"create"`` and the key was taken meanwhile.
            S3LoaderError: something could not be uploaded.
        """
        result = self._publish(built)
        index = replace(built.index, etag=result.etag)
        self._store.put(index_key(self.key), index.to_bytes(), content_type=INDEX_TYPE)
        return result, index

    def _publish(self, built: BuiltShard) -> PutResult:
        if self._part is None:
            whole = b"".join((built.head, self._first, built.tail))
            return self._store.backend.put(self.key, whole, mode=self._mode, content_type=self._content_type)
        self._upload.store(1, b"".join((built.head, self._first)))
        for part in self._sent:
            part.result()
        self._upload.store(self._last + 1, b"".join((self._part, built.tail)))
        return self._upload.complete(built.index.archive_size, self._completion_mode())

    def _completion_mode(self) -> PutMode:
        """GCS and Azure complete no upload on a condition: their engine would put the archive, whole from memory.

        Other writers keep away from a name that is claimed; a look keeps us from what one without claims put there.
        """
        if self._mode == "overwrite" or not self._store.url.startswith(("gs://", "az://")):
            return self._mode
        if self._store.exists(self.key):
            raise ObjectExistsError("the key is taken", op="create", url=f"{self._store.url}/{self.key}")
        return "overwrite"

    def abort(self) -> None:
        """Drop what was uploaded of an archive that will not be finished."""
        self._upload.abort()
