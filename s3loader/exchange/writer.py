"""`ManifestWriter`: a manifest, its shards and its objects, written as the data comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from copy import deepcopy
from functools import wraps
from types import TracebackType
from typing import IO, Any, Final, Unpack, cast

from s3loader.arguments import checked
from s3loader.errors import ConfigError, WriterClosedError, WriterStateError
from s3loader.exchange.delete import UploadedKeys, empty_report, remove_written
from s3loader.exchange.entry_stream import EntryStream
from s3loader.exchange.keys import infer_id_from_key
from s3loader.exchange.lines import check_entry, file_entry, serialize_entry
from s3loader.exchange.objects import ExchangeBase
from s3loader.exchange.pack import Source, check_source, checked_item
from s3loader.exchange.shard_stream import ShardStream
from s3loader.exchange.types import (
    DeleteReport,
    FileEntry,
    ManifestEntry,
    ManifestRefEntry,
    ManifestWriterConfig,
    ShardEntry,
    ShardItem,
    WriterKeywords,
    WriterProgress,
)
from s3loader.shard.upload import upload_pool
from s3loader.store.arguments import checked_key, open_source
from s3loader.store.objectstore import ObjectStore
from s3loader.types import PutResult

__all__ = ["ManifestWriter", "PendingEntry"]

_READ_AT_ONCE: Final = 8 << 20


@checked
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
            compare-and-swap; ``"overwrite"`` writes one manifest at `close` (also an empty one); ``"create"`` does that exactly
            once: it fails if another manifest is there, and succeeds if the same lines are, as after a lost answer.
        part_max_entries: Append mode: most entries of a part (50,000) ...
        part_max_bytes: ... and most bytes of it (50 MiB).
        shard_size: When shards are full; needed for `add_sample` and `add_to_shard`.
        shard_prefix: Folder of the shards; default ``shards`` beside the manifest.
        shard_format: ``"tar"``.
        shard_compression: None (the default), ``"gzip"``, ``"zstd"`` (keeps random access), ``"bz2"`` or ``"xz"``.
        internal_manifest_path: Name of the first member of each shard; default ``__manifest__.jsonl``.
        group: ``"webdataset"``: shards for WebDataset, Hugging Face datasets, Energon and other readers that follow its rule:
            that member is called ``__manifest__``, which they leave out, and a sample whose members do not stand together is
            refused. None (the default): any members.
        publish_on_error: Publish what there is when left by an exception; default: no.
        publish: Overwrite mode: how the manifest is put: ``"overwrite"`` (the default), ``"create"`` or ``Update(etag)``.
        max_in_flight: Uploads at a time; default 8.
        progress: Called with a `WriterProgress` in the caller's thread, as entries become final.
    """

    published: PutResult | None
    """What `close` wrote; None before, without entries in append mode, or where reading back settled a lost answer."""

    def __init__(
        self,
        store: ExchangeBase | ObjectStore,
        manifest_key: str,
        **options: Unpack[WriterKeywords],
    ) -> None:
        self.config = ManifestWriterConfig(**options)
        checked_key(manifest_key)
        self.manifest_key = manifest_key
        self.published = None
        self._store = store if isinstance(store, ObjectStore) else store.objects
        self._infer_id = infer_id_from_key if isinstance(store, ObjectStore) else store.infer_id
        self._pool = upload_pool(self.config.max_in_flight)
        self._uploaded = UploadedKeys()
        progress = self.config.progress
        report = None if progress is None else lambda: progress(self.totals())
        self._entries = EntryStream(self._store, manifest_key, self.config, self._pool, self._uploaded, report)
        self._shards = ShardStream(self._store, manifest_key, self.config, self._pool, self._uploaded, self._entries.add)
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
        known = file_entry(key, name, meta, content_type, None, None)
        serialize_entry(known)
        body: Any = data
        if isinstance(data, (bytearray, memoryview)):
            body = bytes(data)
        elif not isinstance(data, bytes):
            if isinstance(data, (str, os.PathLike)):
                with open_source(data) as file:
                    return self._put_file(key, file, name, meta, content_type)
            return self._put_file(key, data, name, meta, content_type)
        known = {**known, "meta": deepcopy(meta), "size_bytes": len(body)}  # the caller may change what it gave

        def upload() -> FileEntry:
            self._uploaded.note("object", key)
            result = self._store.put(key, body, content_type=content_type)
            return cast("FileEntry", {**known, "etag": result.etag})

        future = self._pool.submit(upload, len(body))
        self._entries.add(future)
        return cast("FileEntry", PendingEntry(known, cast("Future[dict[str, Any]]", future)))

    def _put_file(self, key: str, file: IO[bytes], id: str | None, meta: Any, content_type: str | None) -> FileEntry:
        """A file may change or vanish when the call is over: small ones are read, large ones uploaded, before it is."""
        head = file.read(_READ_AT_ONCE + 1)
        if len(head) <= _READ_AT_ONCE:
            while more := file.read(_READ_AT_ONCE):  # a pipe gives less than asked for
                head += more
            return self.put_object(key, head, id=id, meta=meta, content_type=content_type)
        self._uploaded.note("object", key)
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
        """Add one member to the growing shard. When that is full it is closed before the next sample begins.

        Its entry takes that place in the manifest. Members of one sample follow one another; `add_sample` adds them at once.

        Args:
            member_path: Name in the archive: relative, without ``..``.
            source: Bytes, the path of a local file, or a binary file; read before this returns.
            id: Goes into the member's entry.
            meta: Goes into the member's entry.
            size_bytes: Needed for a file that cannot tell its length.
            content_type: Goes into `meta` (a copy).

        Raises:
            WriterStateError: the writer has no `shard_size`.
            ConfigError: an unsafe path, a source that is none, or of another length than it said; or the rest of the sample is
                in a shard that was closed by `flush_shard` (with ``group="webdataset"`` also: elsewhere in this one).
            InvalidManifestError: `id` or `meta` is not JSON.
            SourceNotFoundError: there is no such local file.
        """
        self._check()
        if content_type is not None:
            meta = {**(meta or {}), "content_type": content_type}
        self._shards.add(member_path, source, id, meta, size_bytes)

    def add_sample(
        self, key: str, values: Mapping[str, Source], *, id: str | None = None, meta: dict[str, Any] | None = None
    ) -> None:
        """Add one sample, all its members or none: ``add_sample("train/000001", {"jpg": image, "cls": b"3"})``.

        A shard that has no room for it is closed first.

        Args:
            key: What its members are called before their extension; relative, without a dot in the last part.
            values: Content by extension: bytes, the path of a local file, or a binary file; read before this returns.
            id: Goes into the entry of each member.
            meta: Goes into the entry of each member.

        Raises:
            WriterStateError: the writer has no `shard_size`.
            ConfigError: no key or extension of a sample, a source that is none, or members of this key are in the shard
                already.
            InvalidManifestError: `id` or `meta` is not JSON.
            SourceNotFoundError: there is no such local file.
        """
        self._check()
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"the members of a sample are a mapping, not {type(values).__name__}", hint='{"jpg": image, "cls": b"3"}'
            )
        self._shards.add_sample(key, values, id, meta)

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
        """Upload the entries so far as a part; its key, or None without entries, and in the modes that write no parts."""
        self._check()
        if self.config.mode != "append_parts":
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
            ConflictError: other writers won every race for 600 s (append), or replaced the manifest at the same time on a
                store without conditional writes.
            ObjectExistsError: another manifest is there (``mode="create"``, ``publish="create"``).
            ObjectChangedError: the manifest is another one by now (``publish=Update(etag)``).
            OutcomeUnknownError: an answer was lost, and reading back did not tell.
            InvalidManifestError: the manifest to append to cannot be parsed; it is left as it is.
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
        self._uploaded.close()

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
        if len(self._uploaded):
            error.add_note(
                f"s3loader: {self.manifest_key} was not published; written before the error: {self._uploaded.summary()};"
                " writer.abandon() removes them"
            )

    def abandon(self) -> DeleteReport:
        """Delete everything this writer uploaded: objects, archives with their indexes, parts.

        For a writer that was left by an exception; one that is open is closed first, without publishing. After a
        successful `close` there is nothing to abandon.
        """
        if self.published is not None or (self._closed and not len(self._uploaded)):
            return empty_report()
        if not self._closed:
            self._give_up(WriterStateError("abandoned"))
        report = remove_written(self._store, self._uploaded)
        if not report["errors"]:
            self._uploaded.clear()
        return report


def _waiting(method: Callable[..., Any]) -> Any:
    """A method of dict that waits for the upload first."""

    @wraps(method)
    def waits(self: PendingEntry, *args: Any, **options: Any) -> Any:
        self._wait()
        return method(self, *args, **options)

    return waits


class _NotYet:
    """Stands for what only the store knows; it cannot be taken for a value by what reads a dict past its methods."""

    def __repr__(self) -> str:
        return "<not known before the upload has ended>"

    def __reduce__(self) -> Any:
        raise WriterStateError("an entry was copied past its methods, while its upload was under way", hint="copy dict(entry)")


class PendingEntry(dict[str, Any]):
    """A manifest entry, complete for whoever looks at it: looking waits for the upload.

    So that a writer that doesn't look at its entries uploads in parallel, and one that does gets exact
    ETags. If the upload failed, looking raises its error. Encoders written in C may ask a dict for its size, or for its
    items, past its methods: what is known before the upload is there from the beginning.

    Args:
        known: The entry without its ETag.
        future: The whole entry, with the same keys.
    """

    def __init__(self, known: Mapping[str, Any], future: Future[dict[str, Any]]) -> None:
        super().__init__(known, etag=_NotYet())
        self._future: Future[dict[str, Any]] | None = future

    def _wait(self) -> None:
        future = self._future
        if future is not None:
            try:
                entry = future.result()
            except CancelledError:
                raise WriterStateError(
                    "the upload was dropped: its writer was left by an exception", hint="write it again with a new writer"
                ) from None
            super().update(deepcopy(entry))  # the writer goes on to use its own
            self._future = None

    __contains__ = _waiting(dict.__contains__)
    __delitem__ = _waiting(dict.__delitem__)
    __eq__ = _waiting(dict.__eq__)
    __getitem__ = _waiting(dict.__getitem__)
    __ior__ = _waiting(dict.__ior__)
    __iter__ = _waiting(dict.__iter__)
    __len__ = _waiting(dict.__len__)
    __ne__ = _waiting(dict.__ne__)
    __or__ = _waiting(dict.__or__)
    __repr__ = _waiting(dict.__repr__)
    __reversed__ = _waiting(dict.__reversed__)
    __ror__ = _waiting(dict.__ror__)
    __setitem__ = _waiting(dict.__setitem__)
    clear = _waiting(dict.clear)
    copy = _waiting(dict.copy)
    get = _waiting(dict.get)
    items = _waiting(dict.items)
    keys = _waiting(dict.keys)
    pop = _waiting(dict.pop)
    popitem = _waiting(dict.popitem)
    setdefault = _waiting(dict.setdefault)
    update = _waiting(dict.update)
    values = _waiting(dict.values)
    __hash__ = None

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)
