"""The entries of a manifest being written: in order, though their uploads end in any order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

from s3loader.errors import InvalidManifestError, S3LoaderError
from s3loader.exchange.append import append_lines
from s3loader.exchange.commit import new_spool, publish_file, publish_once, put_part, settled_mode
from s3loader.exchange.delete import UploadedKeys
from s3loader.exchange.lines import EMPTY_MANIFEST, serialize_entry
from s3loader.exchange.types import ManifestEntry, ManifestRefEntry, ManifestWriterConfig
from s3loader.store.objectstore import ObjectStore
from s3loader.store.ordered import BoundedPool
from s3loader.types import PutResult

__all__ = ["EntryStream"]

_LONGEST_QUEUE: Final = 10_000
"""Entries that may wait behind one whose upload has not ended."""


class EntryStream:
    """Takes entries, or futures of entries, and turns them into parts (append) or one manifest (overwrite, create).

    Lines go to a temporary file once there are many, full parts are uploaded in `pool`.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest_key: str,
        config: ManifestWriterConfig,
        pool: BoundedPool,
        uploaded: UploadedKeys,
        on_entry: Callable[[], None] | None,
    ) -> None:
        self._store = store
        self._key = manifest_key
        self._config = config
        self._pool = pool
        self._uploaded = uploaded
        self._on_entry = on_entry
        self._queue: deque[bytes | Future[Any]] = deque()
        self._spool = new_spool()
        self.part_entries = 0
        """Entries in the current part."""
        self.part_bytes = 0
        self.parts: list[Future[str]] = []
        """Keys of the parts sent."""
        self.entries = 0
        """Entries that are final."""
        self.objects = 0
        """Those of them that were uploads of objects."""
        self.bytes = 0
        """Bytes of uploaded objects and archives."""

    def add(self, item: ManifestEntry | Future[Any]) -> None:
        """The next entry."""
        if isinstance(item, Future):
            self._queue.append(item)
        elif self._queue:
            self._queue.append(_line(item))
        else:
            self._store_line(_line(item))
            return
        self.drain(wait=len(self._queue) > _LONGEST_QUEUE)

    def drain(self, *, wait: bool = False) -> None:
        """Move entries whose uploads are done, in order, to the current part; with `wait` all of them."""
        while self._queue:
            item = self._queue[0]
            if isinstance(item, Future):
                if not wait and not item.done():
                    return
                entry = item.result()
                self.objects += entry["kind"] == "file"
                self.bytes += entry["size_bytes"]
                item = _line(entry)
            self._queue.popleft()
            self._store_line(item)

    def _store_line(self, line: bytes) -> None:
        self._spool.write(line)
        self.part_entries += 1
        self.part_bytes += len(line)
        self.entries += 1
        full = self.part_entries >= self._config.part_max_entries or self.part_bytes >= self._config.part_max_bytes
        if full and self._config.mode == "append_parts":
            self._send_part()
        if self._on_entry is not None:
            self._on_entry()

    def _send_part(self) -> Future[str]:
        spool, size = self._spool, self.part_bytes
        self._spool = new_spool()
        self.part_entries = self.part_bytes = 0

        def upload() -> str:
            with spool:
                key = put_part(self._store, self._key, spool)
            self._uploaded.note("manifest", key)
            return key

        future = self._pool.submit(upload, size)
        self.parts.append(future)
        return future

    def flush_part(self) -> str | None:
        """Upload the entries so far as a part; its key, or None without entries."""
        self.drain(wait=True)
        return self._send_part().result() if self.part_entries else None

    def publish(self) -> PutResult | None:
        """Wait for everything, then write the manifest; None where nothing had to be written or an append's lost
        answer was settled by reading back."""
        self.drain(wait=True)
        if self._config.mode != "append_parts":
            if not self.part_entries:
                self._spool.write(EMPTY_MANIFEST)
            if self._config.mode == "create":
                return publish_once(self._store, self._key, self._spool)
            mode = settled_mode(self._store, self._key, self._config.publish)
            return publish_file(self._store, self._key, self._spool, mode)
        if self.part_entries:
            self._send_part()
        refs: list[ManifestRefEntry] = [{"kind": "manifest_ref", "key": future.result()} for future in self.parts]
        if not refs:
            return None
        try:
            return append_lines(self._store, self._key, [serialize_entry(ref) for ref in refs])
        except InvalidManifestError:  # the root has none of them
            self._drop_parts()
            raise

    def _drop_parts(self) -> None:
        """Remove what was sent for nothing; parts that cannot be removed stay noted."""
        try:
            left = self._store.delete_many(future.result() for future in self.parts)
        except S3LoaderError:
            return
        if not left:
            self._uploaded.forget("manifest")

    def close(self) -> None:
        """Drop the temporary file."""
        self._spool.close()


def _line(entry: ManifestEntry) -> bytes:
    return f"{serialize_entry(entry)}\n".encode("ascii")
