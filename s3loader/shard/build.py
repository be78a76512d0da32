"""Indexes for archives that came without one: WebDataset and other foreign tars."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal, TypeAlias

from s3loader.arguments import checked
from s3loader.checksum import crc32c
from s3loader.errors import ConfigError, ObjectNotFoundError, S3LoaderError, ShardReadError
from s3loader.options import one_of
from s3loader.shard import foreign
from s3loader.shard.compression import LARGEST_FRAME, FrameTable, infer_archive_format, read_seek_table
from s3loader.shard.index import INTERNAL_MANIFEST, ShardIndex, index_key, is_foreign, read_counts, second_index_key
from s3loader.shard.index_builder import IndexBuilder
from s3loader.shard.parquet import index_parquet, is_parquet
from s3loader.shard.samples import LeftOut, torn_samples
from s3loader.shard.source import RangeSource, StreamSource, TarSource, get_from_start, sniff_compression
from s3loader.shard.tar import TarMember, walk
from s3loader.shard.tfrecord import compressed_records, index_tfrecord, is_tfrecord, no_random_records
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import open_store
from s3loader.store.ordered import map_ordered
from s3loader.types import Location, ObjectMeta, ObjectURL

__all__ = ["BuiltIndex", "OnTorn", "build_index", "index_archive", "located", "no_random_access", "torn_between", "torn_error"]

OnTorn: TypeAlias = Literal["error", "split"]
"""What members of one key that lie apart mean: an error, or several samples."""

_PIECE: Final = 1 << 20
_SHOWN_TORN: Final = 4


def index_archive(
    store: ObjectStore,
    key: str,
    *,
    etag: str | None = None,
    internal_manifest_path: str = INTERNAL_MANIFEST,
    checksums: bool = True,
    allow_missing_end: bool = False,
    allow_trailing: bool = False,
    random_access: bool = False,
    on_torn: OnTorn = "split",
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
        allow_trailing: Leave out what follows the end of the archive; otherwise it is refused.
        random_access: Refuse an archive whose members cannot be read one by one, before it is read.
        on_torn: ``"error"`` refuses an archive in which members of one key lie apart, or a member stands twice;
            ``"split"`` takes each stretch of them for a sample.

    Raises:
        ObjectNotFoundError: there is no such archive.
        ShardReadError: it is damaged, truncated, sparse, multi-volume, or no tar; or what `random_access` and `on_torn` refuse.
        ObjectChangedError: it was replaced while it was read.
    """
    url = f"{store.url}/{key}"
    meta, head = get_from_start(store, key, 0, 512, etag=etag)
    if not meta.size:
        raise ShardReadError("the archive is empty", op="index", url=url, hint="write it again; not one byte of it arrived")
    if is_parquet(head):
        return index_parquet(store, key, etag=meta.etag or None)
    if is_tfrecord(head):
        return index_tfrecord(store, key, etag=meta.etag or None)
    if (compressed := compressed_records(head)) is not None:
        raise no_random_records(compressed, url)
    try:
        compression = sniff_compression(head)
        table = _seek_table(store, key, meta) if compression == "zstd" else None
    except ShardReadError as error:
        raise located(error, "index", url) from error
    if random_access and compression is not None and table is None:
        raise no_random_access(compression, url)
    pin = meta.etag or None
    source: TarSource
    if compression is None and not checksums:
        source = RangeSource(store, key, etag=pin)
    else:
        source = StreamSource(store, key, compression, etag=pin, most=None if table is None else sum(table.plain))
    rows = IndexBuilder(internal_manifest_path)
    try:
        for member in walk(source.read, allow_missing_end=allow_missing_end, allow_trailing=allow_trailing):
            rows.add(member, _content_crc(source, member) if checksums or compression is not None else None)
    except ShardReadError as error:
        raise located(error, "index", url) from error
    index = rows.index(meta.size, meta.etag, compression, table)
    if on_torn == "error" and index.grouping.torn:
        raise torn_error(index, url)
    return index


def located(error: ShardReadError, op: str, url: str) -> ShardReadError:
    """The same error with its place."""
    return ShardReadError(error.message, op=op, url=url, hint=error.hint, **error.details)


def no_random_access(compression: str, url: str) -> ShardReadError:
    """What to raise where samples are wanted of an archive that can only be read from its beginning."""
    if compression == "zstd":
        what = "zstd without a seek table: it"
    else:
        what = f"compressed with {compression}: it"
    return ShardReadError(
        f"the shard is {what} cannot be read at random, only from its beginning",
        op="read",
        url=url,
        hint="decompress it (a plain .tar is read at random), or pack its members again with shard_compression=None or"
        ' "zstd"; S3ExchangeStore.get_shard(key).iter_objects() reads it in order as it is',
    )


def torn_between(key: str, root: str, ending: tuple[str, str], starting: tuple[str, str]) -> ShardReadError:
    """What to raise where sample `key` lies in two shards: (shard, member) at the end of one and at the start of the other."""
    return ShardReadError(
        f"sample {key!r} is torn: {ending[1]!r} ends {ending[0]}, {starting[1]!r} begins {starting[0]}",
        op="index",
        url=f"{root}/{ending[0]}",
        hint="write the shards again with ManifestWriter.add_sample, which closes none within a sample;"
        ' on_torn="split" reads each of the two as a sample',
        key=key,
        members=(ending[1], starting[1]),
    )


def torn_error(index: ShardIndex, url: str) -> ShardReadError:
    """What to raise for an archive in which samples are torn: names the first, with both places."""
    names = index.names()
    torn = list(islice(torn_samples(names), _SHOWN_TORN + 1))
    first = torn[0]

    def place(member: int) -> str:
        return f"{names[member]!r} (member {member}, byte {int(index.offsets[member])})"

    said = "stands there twice" if first.twice else "is torn"
    what = f"member {names[first.second]!r}" if first.twice else f"sample {first.key!r}"
    others = ", ".join(repr(one.key) for one in torn[1:_SHOWN_TORN])
    more = f"; so {'is' if index.grouping.torn == 2 else 'are'} {index.grouping.torn - 1} more: {others}" if others else ""
    return ShardReadError(
        f"{what} {said}: {place(first.first)} and {place(first.second)}{more}",
        op="index",
        url=url,
        hint='members of one sample stand together: pack them with ManifestWriter.add_sample; on_torn="split" reads each'
        " stretch of neighbours as a sample",
        key=first.key,
        members=(names[first.first], names[first.second]),
    )


def _content_crc(source: TarSource, member: TarMember) -> int:
    crc = 0
    end = member.offset + member.size
    for low in range(member.offset, end, _PIECE):
        piece = source.read(low, min(_PIECE, end - low))
        if len(piece) < min(_PIECE, end - low):
            raise ShardReadError(f"tar: the archive is cut off in member {member.name!r}", member=member.name)
        crc = crc32c(piece, crc)
    return crc


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
        return None if table is None or max(table.plain, default=0) > LARGEST_FRAME else table


Action: TypeAlias = Literal["built", "kept", "failed", "missing", "outdated"]


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """What became of one archive in `build_index`."""

    url: str
    action: Action
    """``kept``: an index of this very version of the archive was there already. ``missing`` and ``outdated`` only of a dry run:
    there is none, or one of another version, or without the checksums that are asked for."""
    members: int = 0
    samples: int = 0
    error: Exception | None = None
    torn: int = 0
    """Samples that begin with a key that was there before."""
    not_files: Mapping[str, LeftOut] = field(default_factory=dict)
    """What is neither a file nor a link to one, and so not in the index, by kind."""
    not_in_samples: Mapping[str, LeftOut] = field(default_factory=dict)
    """Members that belong to no sample (hidden, without extension, ``__metadata__``), by reason."""


@checked
def build_index(
    urls: Location | Iterable[Location],
    *,
    workers: int = 4,
    force: bool = False,
    checksums: bool = True,
    internal_manifest_path: str = INTERNAL_MANIFEST,
    allow_missing_end: bool = False,
    allow_trailing: bool = False,
    random_access: bool = False,
    on_torn: OnTorn = "error",
    errors: Literal["raise", "return"] = "raise",
    progress: Callable[[BuiltIndex], None] | None = None,
    store: ObjectStore | None = None,
    dry_run: bool = False,
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
        allow_trailing: Leave out what follows the end of an archive.
        random_access: Refuse archives whose members cannot be read one by one, before they are read.
        on_torn: ``"error"``: an archive in which members of one key lie apart, or a member stands twice, fails and gets
            no index. ``"split"``: each stretch of neighbours is a sample.
        errors: ``"raise"`` the first error when all are done, or ``"return"`` them in the results.
        progress: Called after each archive, from worker threads, one at a time.
        store: The store the URLs are in, if they are keys of one at hand.
        dry_run: Only look which indexes are missing or outdated; write nothing.

    Returns:
        One result per archive, in order.

    Raises:
        ConfigError: nothing to index.
        S3LoaderError: the first archive that failed (after all others were done).
    """
    check_on_torn(on_torn)
    jobs = list(_archives([urls] if isinstance(urls, (str, os.PathLike, ObjectURL)) else urls, store))
    if not jobs:
        raise ConfigError("no archives to index", hint="name .tar files, or a folder that holds some, with a slash at its end")
    options = _Options(internal_manifest_path, checksums, allow_missing_end, allow_trailing, random_access, on_torn)
    lock = threading.Lock()

    def run(job: tuple[ObjectStore, str]) -> BuiltIndex:
        try:
            result = _build(*job, force, options, dry_run)
        except S3LoaderError as error:
            result = BuiltIndex(_url(*job), "failed", error=error)
        if progress is not None:
            with lock:
                progress(result)
        return result

    results = list(map_ordered(run, jobs, concurrency=min(workers, len(jobs)), name="s3loader-index"))
    for result in results:
        if result.error is not None and errors == "raise":
            raise result.error
    return results


def _url(store: ObjectStore, key: str) -> str:
    return f"{store.url}/{key}"


def _archives(urls: Iterable[Location], store: ObjectStore | None) -> Iterator[tuple[ObjectStore, str]]:
    stores: dict[ObjectURL, ObjectStore] = {}
    for url in urls:
        if store is not None:
            root, key = store, str(url)
        else:
            root, key = _open_parent(url, stores)
        if key and not key.endswith("/"):
            yield root, key
            continue
        for entry in root.list(key):
            try:
                infer_archive_format(entry.key)
            except ConfigError:
                continue
            yield root, entry.key


def _open_parent(url: Location, stores: dict[ObjectURL, ObjectStore]) -> tuple[ObjectStore, str]:
    """The folder of `url` as a store, and the name in it; a URL that ends in a slash is a folder itself."""
    target = ObjectURL.parse(url)
    folder, name = (target, "") if isinstance(url, str) and url.endswith("/") else target.split()
    if folder not in stores:
        stores[folder] = open_store(folder)
    return stores[folder], name


def check_on_torn(on_torn: str) -> None:
    """Whether this is an `OnTorn`.

    Raises:
        ConfigError: it is not.
    """
    one_of("on_torn", on_torn, OnTorn)


@dataclass(frozen=True, slots=True)
class _Options:
    """Of one index, as `index_archive` takes them."""

    internal_manifest_path: str
    checksums: bool
    allow_missing_end: bool
    allow_trailing: bool
    random_access: bool
    on_torn: OnTorn


def _build(store: ObjectStore, key: str, force: bool, options: _Options, dry_run: bool) -> BuiltIndex:
    target = index_key(key)
    meta = store.head(key)
    there = False
    for candidate in (index_key(key), second_index_key(key)):
        try:
            data = store.get(candidate)
        except ObjectNotFoundError:
            continue
        if is_foreign(data):
            target = second_index_key(key)
            continue
        kept = None if force else _current(data, meta, options.checksums)
        if kept is None:
            there = True
            continue
        if kept.known_grouping is None and not dry_run:  # of an earlier version, which counted samples otherwise
            store.put(candidate, kept.to_bytes(), content_type="application/octet-stream")
        return _report(store, key, "kept", kept, options)
    if dry_run:
        return BuiltIndex(_url(store, key), "outdated" if there else "missing")
    members = None if options.checksums else foreign.members_from_side_car(store, key, meta)
    if members is not None:
        rows = IndexBuilder(options.internal_manifest_path)
        for member in members:
            rows.add(member, None)
        index = rows.index(meta.size, meta.etag)
    else:
        index = index_archive(
            store,
            key,
            internal_manifest_path=options.internal_manifest_path,
            checksums=options.checksums,
            allow_missing_end=options.allow_missing_end,
            allow_trailing=options.allow_trailing,
            random_access=options.random_access,
        )
    built = _report(store, key, "built", index, options)
    store.put(target, index.to_bytes(), content_type="application/octet-stream")
    return built


def _report(store: ObjectStore, key: str, action: Literal["built", "kept"], index: ShardIndex, options: _Options) -> BuiltIndex:
    grouping = index.grouping
    if options.on_torn == "error" and grouping.torn:
        raise torn_error(index, _url(store, key))
    left_out = grouping.left_out or {}
    return BuiltIndex(
        _url(store, key), action, len(index), index.samples, None, grouping.torn, dict(index.not_files), dict(left_out)
    )


def _current(data: bytes, meta: ObjectMeta, checksums: bool) -> ShardIndex | None:
    """The index in `data`, if it is of this version of the archive and says all that is wanted."""
    try:
        counts = read_counts(data)
        if counts.archive_etag != meta.etag or counts.archive_size != meta.size:
            return None
        index = ShardIndex.from_bytes(data)
    except ShardReadError:
        return None
    if checksums and index.crc32c is None:
        return None
    if index.known_grouping is None and index.internal_manifest is None:
        return None  # made by an earlier version by reading a foreign archive, without its links
    return index
