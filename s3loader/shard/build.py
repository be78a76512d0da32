"""Indexes for archives that came without one: WebDataset and other foreign tars."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from s3loader.checksum import crc32c
from s3loader.errors import ConfigError, ObjectNotFoundError, S3LoaderError, ShardReadError
from s3loader.shard import foreign
from s3loader.shard.compression import MAX_FRAME, FrameTable, infer_archive_format, read_seek_table
from s3loader.shard.index import (
    INTERNAL_MANIFEST,
    MemberRange,
    ShardIndex,
    index_key,
    is_foreign,
    read_counts,
    sample_key,
    second_index_key,
)
from s3loader.shard.source import RangeSource, StreamSource, TarSource, get_from_start, sniff_compression
from s3loader.shard.tar import TarMember, walk
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import open_store
from s3loader.types import ObjectMeta, ObjectURL

__all__ = ["BuiltIndex", "build_index", "index_archive"]

_PIECE: Final = 1 << 20


def index_archive(
    store: ObjectStore,
    key: str,
    *,
    etag: str | None = None,
    internal_manifest_path: str = INTERNAL_MANIFEST,
    checksums: bool = True,
    allow_missing_end: bool = False,
) -> ShardIndex:
    """The index of an archive, made by reading it.

    Args:
        store: Where the archive is.
        key: Its key; the compression is found from the content, not the name.
        etag: Only this version of it.
        internal_manifest_path: Members of this name are not samples.
        checksums: Read all contents and note their CRC32C; otherwise only headers are fetched where the
            archive is a plain tar.
        allow_missing_end: Accept an archive without the zero blocks that end one (it may be truncated).

    Raises:
        ObjectNotFoundError: there is no such archive.
        ShardReadError: it is damaged, truncated, sparse, multi-volume, or no tar.
        ObjectChangedError: it was replaced while it was read.
    """
    meta, head = get_from_start(store, key, 0, 512, etag=etag)
    compression = sniff_compression(head)
    pin = meta.etag or None
    source: TarSource
    if compression is None and not checksums:
        source = RangeSource(store, key, etag=pin)
    else:
        source = StreamSource(store, key, compression, etag=pin)
    rows = _Rows(internal_manifest_path)
    try:
        for member in walk(source.read, allow_missing_end=allow_missing_end):
            rows.add(member, _content_crc(source, member) if checksums or compression is not None else None)
        table = _seek_table(store, key, meta) if compression == "zstd" else None
    except ShardReadError as error:
        raise ShardReadError(error.message, op="index", url=f"{store.url}/{key}", **error.details) from error
    return rows.index(meta, compression, table)


def _content_crc(source: TarSource, member: TarMember) -> int:
    crc = 0
    end = member.offset + member.size
    for low in range(member.offset, end, _PIECE):
        piece = source.read(low, min(_PIECE, end - low))
        if len(piece) < min(_PIECE, end - low):
            raise ShardReadError(f"tar: the archive is cut off in member {member.name!r}", member=member.name)
        crc = crc32c(piece, crc)
    return crc


class _Rows:
    """Collects members into the columns of an index."""

    def __init__(self, internal_manifest_path: str) -> None:
        self._internal_path = internal_manifest_path
        self._internal: MemberRange | None = None
        self._offsets = array("Q")
        self._sizes = array("Q")
        self._crcs = array("I")
        self._groups = array("I")
        self._names = bytearray()
        self._ends = array("Q")
        self._sample = ""
        self._unread = False

    def add(self, member: TarMember, crc: int | None) -> None:
        if member.kind != "file":
            return
        if member.name == self._internal_path:
            self._internal = self._internal or MemberRange(member.offset, member.size, crc)
            return
        self._unread = self._unread or crc is None
        self._offsets.append(member.offset)
        self._sizes.append(member.size)
        self._crcs.append(crc or 0)
        sample = sample_key(member.name)
        self._groups.append(self._groups[-1] + (sample != self._sample) if self._groups else 0)
        self._sample = sample
        self._names += member.name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._names))

    def index(self, meta: ObjectMeta, compression: str | None, table: FrameTable | None) -> ShardIndex:
        frames = frames_tar = None
        if table is not None:
            frames = _boundaries(table.packed)
            frames_tar = _boundaries(table.plain)
        return ShardIndex(
            offsets=np.array(self._offsets, dtype=np.uint64),
            sizes=np.array(self._sizes, dtype=np.uint64),
            crc32c=None if self._unread else np.array(self._crcs, dtype=np.uint32),
            groups=np.array(self._groups, dtype=np.uint32),
            names_blob=bytes(self._names),
            name_ends=np.array(self._ends, dtype=np.uint64),
            archive_size=meta.size,
            etag=meta.etag,
            compression=compression,
            internal_manifest=self._internal,
            frames=frames,
            frames_tar=frames_tar,
        )


def _boundaries(sizes: array[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.uint64))]).astype(np.uint64)


def _seek_table(store: ObjectStore, key: str, meta: ObjectMeta) -> FrameTable | None:
    """The archive's seek table, if it has one whose frames fit into memory."""
    size = min(meta.size, 64 << 10)
    while True:
        _, tail = store.backend.get(key, meta.size - size, meta.size, if_match=meta.etag or None)
        try:
            table = read_seek_table(tail, meta.size)
        except ValueError as error:
            if isinstance(error, ShardReadError):
                raise
            size = int(error.args[0])
            continue
        return None if table is None or max(table.plain, default=0) > 8 * MAX_FRAME else table


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """What became of one archive in `build_index`."""

    url: str
    action: Literal["built", "kept", "failed"]
    """``kept``: an index of this very version of the archive was there already."""
    members: int = 0
    samples: int = 0
    error: Exception | None = None


def build_index(
    urls: str | Iterable[str],
    *,
    workers: int = 4,
    force: bool = False,
    checksums: bool = True,
    internal_manifest_path: str = INTERNAL_MANIFEST,
    allow_missing_end: bool = False,
    errors: Literal["raise", "return"] = "raise",
    progress: Callable[[BuiltIndex], None] | None = None,
    store: ObjectStore | None = None,
) -> list[BuiltIndex]:
    """Write an index beside each archive, several at a time. Run it again to go on where it stopped.

    An archive whose index is of its present ETag is left alone (one HEAD and a few KiB), so a second run costs
    next to nothing and one after a crash does the rest. Where another tool keeps its own file under
    ``<archive>.idx`` (Energon), ours goes to ``<archive>.s3loader.idx``.

    Args:
        urls: Archives (``s3://bucket/a.tar``), or folders and prefixes ending in ``/``, all archives below which are meant.
        workers: Archives read at a time.
        force: Build even where a current index exists.
        checksums: Read every byte and note CRC32C values. Without, only headers are fetched from plain tars, and
            reads cannot be verified. An index without checksums is rebuilt when they are asked for.
        internal_manifest_path: Members of this name are not samples.
        allow_missing_end: Accept archives without end-of-archive blocks.
        errors: ``"raise"`` the first error when all are done, or ``"return"`` them in the results.
        progress: Called after each archive, from worker threads, one at a time.
        store: The store the URLs are in, if they are keys of one at hand.

    Returns:
        One result per archive, in order.

    Raises:
        ConfigError: nothing to index.
        S3LoaderError: the first archive that failed (after all others were done).
    """
    jobs = list(_archives([urls] if isinstance(urls, str) else urls, store))
    if not jobs:
        raise ConfigError("no archives to index", hint="name .tar files, or a folder that holds some, with a slash at its end")
    lock = threading.Lock()

    def run(job: tuple[ObjectStore, str]) -> BuiltIndex:
        try:
            result = _build(*job, force, checksums, internal_manifest_path, allow_missing_end)
        except S3LoaderError as error:
            result = BuiltIndex(_url(*job), "failed", error=error)
        if progress is not None:
            with lock:
                progress(result)
        return result

    with ThreadPoolExecutor(max(1, min(workers, len(jobs))), "s3loader-index") as pool:
        results = list(pool.map(run, jobs))
    for result in results:
        if result.error is not None and errors == "raise":
            raise result.error
    return results


def _url(store: ObjectStore, key: str) -> str:
    return f"{store.url}/{key}"


def _archives(urls: Iterable[str], store: ObjectStore | None) -> Iterator[tuple[ObjectStore, str]]:
    stores: dict[str, ObjectStore] = {}
    for url in urls:
        if store is not None:
            root, key = store, url
        else:
            root, key = _open_parent(str(url), stores)
        if key and not key.endswith("/"):
            yield root, key
            continue
        for entry in root.list(key):
            try:
                infer_archive_format(entry.key)
            except ConfigError:
                continue
            yield root, entry.key


def _open_parent(url: str, stores: dict[str, ObjectStore]) -> tuple[ObjectStore, str]:
    """The folder of `url` as a store, and the name in it; a URL that ends in a slash is a folder itself."""
    folder = url.endswith("/")
    target = ObjectURL.parse(url)
    base, _, name = (target.base, "", "") if folder else str(target).rpartition("/")
    if base not in stores:
        stores[base] = open_store(base)
    return stores[base], name


def _build(store: ObjectStore, key: str, force: bool, checksums: bool, internal: str, allow_missing_end: bool) -> BuiltIndex:
    target = index_key(key)
    meta = store.head(key)
    for candidate in (index_key(key), second_index_key(key)):
        try:
            data = store.get(candidate)
        except ObjectNotFoundError:
            continue
        if is_foreign(data):
            target = second_index_key(key)
            continue
        kept = None if force else _current(data, meta, checksums)
        if kept is not None:
            return BuiltIndex(_url(store, key), "kept", *kept)
    index = None if checksums else foreign.index_from_side_car(store, key, meta, internal)
    if index is None:
        index = index_archive(
            store, key, internal_manifest_path=internal, checksums=checksums, allow_missing_end=allow_missing_end
        )
    store.put(target, index.to_bytes(), content_type="application/octet-stream")
    return BuiltIndex(_url(store, key), "built", len(index), index.samples)


def _current(data: bytes, meta: ObjectMeta, checksums: bool) -> tuple[int, int] | None:
    try:
        counts = read_counts(data)
        if counts.archive_etag != meta.etag or counts.archive_size != meta.size:
            return None
        if checksums and ShardIndex.from_bytes(data).crc32c is None:
            return None
    except ShardReadError:
        return None
    return counts.members, counts.samples
