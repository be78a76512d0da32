"""`ManifestWriter`: a manifest, its shards and its objects, written as the data comes."""

from __future__ import annotations

import os
from concurrent.futures import Future
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, Unpack, cast

from s3loader.exchange.entry_stream import EntryStream
from s3loader.exchange.errors import WriterClosedError, WriterStateError
from s3loader.exchange.journal import Journal
from s3loader.exchange.keys import infer_id_from_key
from s3loader.exchange.lines import check_entry, file_entry, serialize_entry
from s3loader.exchange.packer import Source, check_source, checked_item
from s3loader.exchange.pending import PendingEntry
from s3loader.exchange.removal import empty_report, remove_written
from s3loader.exchange.shard_stream import ShardStream
from s3loader.exchange.types import (
    DeleteReport,
    FileEntry,
    ManifestEntry,
    ManifestRefEntry,
    ShardEntry,
    ShardItem,
)
from s3loader.exchange.writer_config import ManifestWriterConfig, WriterKeywords, WriterProgress
from s3loader.shard.pool import UploadPool
from s3loader.store.arguments import checked_key, open_source
from s3loader.store.objectstore import ObjectStore
from s3loader.types import PutResult

if TYPE_CHECKING:
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["ManifestWriter"]

_READ_AT_ONCE: Final = 8 << 20


class ManifestWriter:
    """Writes one manifest; use as a context manager.

    Leaving it without an exception publishes the manifest; with one nothing is published (unless
    `publish_on_error`), the exception carries a note of what was uploaded, and `abandon` removes that.
    Uploads run in the background, up to `max_in_flight` at a time and 64 MiB; a failure is raised by the
    next call and by `close`, and then nothing is published. Entries keep the order of the calls.
    Memory stays bounded whatever the number of entries. One thread at a time.

    Args:
        store: An `S3ExchangeStore` or an `ObjectStore`.
        manifest_key: Key of the manifest (the root, in append mode).
        mode: ``"append_parts"`` (the default) writes parts beside the manifest and adds references to them to it, by
            compare-and-swap; ``"overwrite"`` writes one manifest at `close` (also an empty one).
        part_max_entries: Append mode: a part is full at so many entries (50,000) ...
        part_max_bytes: ... or so many bytes (50 MiB).
        shard_size: When shards are full; needed for `add_to_shard`.
        shard_prefix: Folder of the shards; default ``shards`` beside the manifest.
        shard_format: ``"tar"``.
        shard_compression: None (the default), ``"gzip"``, ``"zstd"`` (keeps random access), ``"bz2"`` or ``"xz"``.
        internal_manifest_path: Name of the first member of each shard; default `INTERNAL_MANIFEST`.
        publish_on_error: Publish what there is when left by an exception; default: no.
        publish: Overwrite mode: how the manifest is put: ``"overwrite"`` (the default), ``"create"`` or ``Update(etag)``.
        max_in_flight: Uploads at a time; default 8.
        progress: Called with a `WriterProgress` in the caller's thread, as entries become final.
    """

    published: PutResult | None
    """What `close` wrote; None before, without entries in append mode, or where reading back settled a lost answer."""

    def __init__(
        self,
        store: S3ExchangeStore | ObjectStore,
        manifest_key: str,
        **options: Unpack[WriterKeywords],
    ) -> None:
        self.config = ManifestWriterConfig(**options)
        checked_key(manifest_key)
        self.manifest_key = manifest_key
        self.published = None
        self._store = store if isinstance(store, ObjectStore) else store.objects
        self._infer_id = infer_id_from_key if isinstance(store, ObjectStore) else store.infer_id
        self._pool = UploadPool(self.config.max_in_flight)
        self._journal = Journal()
        progress = self.config.progress
        report = None if progress is None else lambda: progress(self.totals())
        self._entries = EntryStream(self._store, manifest_key, self.config, self._pool, self._journal, report)
        self._shards = ShardStream(self._store, manifest_key, self.config, self._pool, self._journal)
        self._closed = False
        self._pid = os.getpid()

    # entries

    def add_entry(self, entry: ManifestEntry) -> None:
        """Add an entry verbatim.

        Raises:
            InvalidManifestError: no reader would accept it.
        """
        self._check()
        check_entry(entry)
        self._entries.add(entry)

    def add_file(
        self,
        key: str,
        *,
        id: str | None = None,
        meta: dict[str, Any] | None = None,
        content_type: str | None = None,
        size_bytes: int | None = None,
        etag: str | None = None,
    ) -> FileEntry:
        """Add an object that exists already; asks nothing of the store."""
        entry = file_entry(key, id, meta, content_type, size_bytes, etag)
        self.add_entry(entry)
        return entry

    def add_manifest(self, key: str) -> ManifestRefEntry:
        """Add a reference to another manifest."""
        entry: ManifestRefEntry = {"kind": "manifest_ref", "key": key}
        self.add_entry(entry)
        return entry

    def put_object(
        self,
        key: str,
        data: Source,
        *,
        id: str | None = None,
        meta: dict[str, Any] | None = None,
        content_type: str | None = None,
    ) -> FileEntry:
        """Upload an object and add it; `data` is bytes, the path of a local file, or a binary file.

        The data is taken before this returns; the upload may go on. The entry returned is complete: looking
        into it waits for the upload.

        Raises:
            ConfigError: `data` is none of these, or cannot be read (SourceNotFoundError: there is no such file).
            InvalidManifestError: `id` or `meta` is not JSON; nothing was uploaded.
        """
        self._check()
        checked_key(key)
        check_source(data)
        name = self._infer_id(key) if id is None else id
        serialize_entry(file_entry(key, name, meta, content_type, None, None))
        body: Any = data
        if isinstance(data, (bytearray, memoryview)):
            body = bytes(data)
        elif not isinstance(data, bytes):
            if isinstance(data, (str, os.PathLike)):
                with open_source(data) as file:
                    return self._put_file(key, file, name, meta, content_type)
            return self._put_file(key, data, name, meta, content_type)
        meta = None if meta is None else {**meta}

        def upload() -> FileEntry:
            self._journal.note("object", key)
            result = self._store.put(key, body, content_type=content_type)
            return file_entry(key, name, meta, content_type, len(body), result.etag)

        future = self._pool.submit(upload, len(body))
        self._entries.add(future)
        return cast("FileEntry", PendingEntry(cast("Future[dict[str, Any]]", future)))

    def _put_file(self, key: str, file: IO[bytes], id: str | None, meta: Any, content_type: str | None) -> FileEntry:
        """A file may change or vanish when the call is over: small ones are read, large ones uploaded, before it is."""
        head = file.read(_READ_AT_ONCE + 1)
        if len(head) <= _READ_AT_ONCE:
            while more := file.read(_READ_AT_ONCE):  # a pipe gives less than asked for
                head += more
            return self.put_object(key, head, id=id, meta=meta, content_type=content_type)
        self._journal.note("object", key)
        with self._store.multipart(key, content_type=content_type) as upload:
            upload.write(head)
            while chunk := file.read(_READ_AT_ONCE):
                upload.write(chunk)
            size = upload.tell()
            result = upload.close()
        entry = file_entry(key, id, meta, content_type, size, result.etag)
        self._entries.objects += 1
        self._entries.bytes += size
        self._entries.add(entry)
        return entry

    # shards

    def add_shard_item(self, item: ShardItem) -> None:
        """Add one member to the growing shard, from a `ShardItem`."""
        checked_item(item)
        self.add_to_shard(
            item["member_path"],
            item["source"],
            id=item.get("id"),
            meta=item.get("meta"),
            size_bytes=item.get("size_bytes"),
        )

    def add_to_shard(
        self,
        member_path: str,
        source: Source,
        *,
        id: str | None = None,
        meta: dict[str, Any] | None = None,
        size_bytes: int | None = None,
        content_type: str | None = None,
    ) -> None:
        """Add one member to the growing shard; when that is full its entry takes this place in the manifest.

        Args:
            member_path: Name in the archive: relative, without ``..``.
            source: Bytes, the path of a local file, or a binary file; read before this returns.
            id: Goes into the member's entry.
            meta: Goes into the member's entry.
            size_bytes: Needed for a file that cannot tell its length.
            content_type: Goes into `meta` (a copy).

        Raises:
            WriterStateError: the writer has no `shard_size`.
            ConfigError: an unsafe path, a source that is none, or of another length than it said.
            InvalidManifestError: `id` or `meta` is not JSON.
            SourceNotFoundError: there is no such local file.
        """
        self._check()
        if content_type is not None:
            meta = {**(meta or {}), "content_type": content_type}
        full = self._shards.add(member_path, source, id, meta, size_bytes)
        if full is not None:
            self._entries.add(full)

    def flush_shard(self) -> ShardEntry | None:
        """Publish the growing shard now; its entry, or None where nothing waits."""
        self._check()
        future = self._shards.end()
        if future is None:
            return None
        self._entries.add(future)
        return future.result()

    # the manifest

    def _url(self) -> str:
        return f"{self._store.url}/{self.manifest_key}"

    def _check(self) -> None:
        if self._closed:
            raise WriterClosedError("ManifestWriter is closed", op="write", url=self._url())
        self._pool.check()

    def flush_part(self) -> str | None:
        """Upload the entries so far as a part; its key, or None in overwrite mode or without entries."""
        self._check()
        if self.config.mode == "overwrite":
            return None
        return self._entries.flush_part()

    # the end

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or left by an exception."""
        return self._closed

    def stats(self) -> dict[str, Any]:
        """What is in the buffers now (not totals), once all entries so far are final; waits for their uploads."""
        if not self._closed:
            self._check()
            self._entries.drain(wait=True)
        return {
            "part_entries": self._entries.part_entries,
            "part_bytes": self._entries.part_bytes,
            "parts_uploaded": len(self._entries.parts),
            "shard_entries": self._shards.members,
            "shard_bytes": self._shards.content_bytes,
            "shards_created": self._shards.count,
            "is_closed": self._closed,
        }

    def totals(self) -> WriterProgress:
        """Everything written so far."""
        entries = self._entries
        return WriterProgress(entries.entries, entries.objects, self._shards.count, len(entries.parts), entries.bytes)

    def close(self) -> None:
        """Finish shard and part, wait for all uploads, publish the manifest.

        Raises:
            WriterClosedError: it was closed before.
            ConflictError, ObjectExistsError, ObjectChangedError, OutcomeUnknownError: see `append_lines` and
                `publish_manifest`.
            S3LoaderError: an upload failed; nothing is published.
        """
        if self._closed:
            raise WriterClosedError("ManifestWriter is already closed", op="close", url=self._url())
        try:
            self._pool.check()
            last = self._shards.end()
            if last is not None:
                self._entries.add(last)
            self.published = self._entries.publish()
        except BaseException as error:
            self._give_up(error)
            raise
        self._closed = True
        self._pool.stop()
        self._entries.close()
        self._journal.close()

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            if not self._closed:
                self.close()
            return
        if self._closed:
            return
        if self.config.publish_on_error and isinstance(error, Exception):
            try:
                self.close()
            except Exception as second:  # noqa: BLE001 - the caller's own exception goes first, this one becomes its note
                error.add_note(f"s3loader: the manifest could not be published either: {second}")
            return
        self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """Stop, drop what is half uploaded, and tell `error` what stays behind."""
        self._closed = True
        if self._pid != os.getpid():
            return  # the parent's writer, which goes on there
        self._pool.stop()
        self._entries.close()
        for key, second in self._shards.drop():
            error.add_note(f"s3loader: {key} could not be cleaned up: {second}")
        if len(self._journal):
            error.add_note(
                f"s3loader: {self.manifest_key} was not published; written before the error: {self._journal.summary()};"
                " writer.abandon() removes them"
            )

    def abandon(self) -> DeleteReport:
        """Delete everything this writer uploaded: objects, archives with their indexes, parts.

        For a writer that was left by an exception; one that is open is closed first, without publishing. After a
        successful `close` there is nothing to abandon.
        """
        if self.published is not None or (self._closed and not len(self._journal)):
            return empty_report()
        if not self._closed:
            self._give_up(WriterStateError("abandoned"))
        report = remove_written(self._store, self._journal)
        if not report["errors"]:
            self._journal.clear()
        return report
