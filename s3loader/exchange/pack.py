"""Items to pack: one shard with its internal manifest (items in, a manifest entry out), items cut into shards, archives made
without a store."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, TypeAlias, cast

from s3loader.arguments import checked
from s3loader.errors import ConfigError
from s3loader.exchange.keys import virtual_key
from s3loader.exchange.lines import encode_manifest, json_string, json_value, serialize_entry
from s3loader.exchange.types import FileEntry, ShardEntry, ShardItem, ShardSizePolicy
from s3loader.shard.compression import normalize_compression
from s3loader.shard.index import INTERNAL_MANIFEST
from s3loader.shard.samples import left_out_reason, sample_key
from s3loader.shard.tar import check_member_path, end_of_archive, member_header, padding
from s3loader.shard.upload import ShardUpload, upload_pool
from s3loader.shard.writer import ShardBuilder
from s3loader.store.arguments import at_source, check_several, checked_key, open_source, readable
from s3loader.store.objectstore import ObjectStore
from s3loader.store.ordered import BoundedPool
from s3loader.types import Buffer, PutMode

__all__ = [
    "Extent",
    "ShardPacker",
    "Source",
    "check_source",
    "checked_item",
    "create_archive",
    "create_shards",
    "loaded",
    "pack_shard",
    "source_size",
    "tar_size",
]

Source: TypeAlias = Buffer | str | os.PathLike[str] | IO[bytes]
"""Bytes, the path of a local file (`str` too), or a binary file."""

_CHUNK: Final = 4 << 20


def check_source(source: Any) -> None:
    """Whether this is a `Source`.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(source, (bytes, bytearray, memoryview, str, os.PathLike)) and not hasattr(source, "read"):
        raise ConfigError(
            f"a source cannot be {type(source).__name__}",
            hint="pass bytes, the path of a local file (str or pathlib.Path), or a binary file open for reading",
        )


def checked_item(item: Any) -> ShardItem:
    """`item`, if it can be packed.

    Raises:
        ConfigError: it is no mapping, or its path or source is missing or none.
    """
    hint = 'an item is {"member_path": "a/b.jpg", "source": bytes, path or binary file}'
    if not isinstance(item, Mapping):
        raise ConfigError(f"a shard item cannot be {type(item).__name__}", hint=hint)
    missing = [name for name in ("member_path", "source") if name not in item]
    if missing:
        raise ConfigError(
            f"a shard item without {' and '.join(missing)}: it has {', '.join(map(repr, item)) or 'nothing'}", hint=hint
        )
    check_source(item["source"])
    return cast("ShardItem", item)


def source_size(source: Source, size: int | None = None) -> int:
    """Length of a source in bytes.

    Raises:
        ConfigError: no `Source`, or a binary file that can't tell, and no `size` given.
        SourceNotFoundError: there is no such local file.
    """
    if type(source) is bytes:
        return len(source)
    check_source(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return memoryview(source).nbytes
    if isinstance(source, (str, os.PathLike)):
        return at_source(source, lambda: Path(source).stat().st_size)
    if size is not None:
        return size
    try:
        here = source.tell()
        end = source.seek(0, os.SEEK_END)
        source.seek(here)
    except (AttributeError, OSError, ValueError) as error:
        raise ConfigError(
            "size_bytes required for BinaryIO/file-like sources", hint="give size_bytes, or read it into bytes first"
        ) from error
    return end - here


class Extent(NamedTuple):
    """What members take in a shard."""

    members: int
    body: int
    """Bytes with headers and padding."""
    lines: int
    """Bytes in the internal manifest."""


def tar_size(body: int, manifest: int, internal_path: str = INTERNAL_MANIFEST) -> int:
    """Bytes of a tar whose members take `body` bytes with their headers, and its internal manifest `manifest` bytes."""
    head = len(member_header(internal_path, manifest)) + manifest + padding(manifest)
    return head + body + len(end_of_archive(head + body))


def loaded(path: str, source: Source, size: int) -> Source:
    """The bytes of a small source, so that nothing can go wrong with it any more; a large one as it is.

    Raises:
        ConfigError: it is not `size` bytes long.
        SourceNotFoundError: there is no such local file.
    """
    if size > _CHUNK or isinstance(source, (bytes, bytearray, memoryview)):
        return source
    if isinstance(source, (str, os.PathLike)):
        with open_source(source) as file:
            return _exactly(path, file, size)
    return _exactly(path, source, size)


class ShardPacker:
    """Packs items into the archive `key` as they come; the upload runs along in `pool`.

    Contents are never all in memory, whatever the size; names and the internal manifest are (about 200
    bytes a member).
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        pool: BoundedPool,
        archive_format: str = "tar",
        compression: str | None = None,
        internal_manifest_path: str = INTERNAL_MANIFEST,
        mode: PutMode = "overwrite",
    ) -> None:
        checked_key(key)
        if archive_format != "tar":
            raise ConfigError(
                f"Unsupported archive format: {archive_format}", hint='use "tar"; compression is an argument of its own'
            )
        self.key = key
        self.content_bytes = 0
        """Bytes of content added so far."""
        self._said_compression = compression
        self._internal_path = internal_manifest_path
        self._builder = ShardBuilder(
            compression=normalize_compression(compression), internal_manifest_path=internal_manifest_path
        )
        self._upload = ShardUpload(store, key, pool=pool, compression=self._builder.compression, mode=mode)
        self._lines = bytearray()
        self._before = '{"kind":"file","key":' + json_string(virtual_key(key, ""))[:-1]
        self._broken = False

    def __len__(self) -> int:
        return len(self._builder)

    @property
    def held(self) -> int:
        """Bytes of the archive in memory now."""
        return self._upload.held

    def add(
        self,
        member_path: str,
        source: Source,
        *,
        id: str | None = None,
        meta: dict[str, Any] | None = None,
        size_bytes: int | None = None,
    ) -> int:
        """Add one member; its content is read before this returns. Returns its size.

        Raises:
            ConfigError: an unsafe path, a source that is none, or of another length than it said.
            InvalidManifestError: `id` or `meta` is not JSON.
            SourceNotFoundError: there is no such local file.
            S3LoaderError: an earlier part could not be uploaded.
        """
        if self._broken:
            raise ConfigError(
                f"an earlier member of {self.key} could not be read to its end; the shard is unusable",
                hint="pack its items again, in a new shard",
            )
        size = source_size(source, size_bytes)
        if type(member_path) is not str:
            check_member_path(member_path)
        line = self._line(member_path, id, meta, size)
        if type(source) is bytes:
            self._upload.write(self._builder.add(member_path, source))
        elif isinstance(source, (bytes, bytearray, memoryview)):
            self._upload.write(self._builder.add(member_path, _flat(source)))
        elif isinstance(source, (str, os.PathLike)):
            with open_source(source) as file:
                self._add_file(member_path, file, size)
        else:
            self._add_file(member_path, source, size)
        self._lines += line
        self.content_bytes += size
        return size

    @property
    def extent(self) -> Extent:
        """What it has."""
        return Extent(len(self), self._builder.body_size, len(self._lines))

    def tar_size(self, more: Extent) -> int:
        """Bytes of the (uncompressed) tar if this were added."""
        return tar_size(self._builder.body_size + more.body, len(self._lines) + more.lines, self._internal_path)

    def extent_of(self, members: Sequence[tuple[str, int]], id: str | None, meta: dict[str, Any] | None) -> Extent:
        """What members (path, bytes) would take.

        Raises:
            InvalidManifestError: `id` or `meta` is not JSON.
        """
        body = sum(len(member_header(path, size)) + size + padding(size) for path, size in members)
        return Extent(len(members), body, sum(len(self._line(path, id, meta, size)) for path, size in members))

    def add_together(
        self, members: Iterable[tuple[str, Source, int]], *, id: str | None = None, meta: dict[str, Any] | None = None
    ) -> None:
        """Add members (path, source, bytes) of which none may be in the archive without the others.

        Raises: as `add`; if some were added already, the shard is unusable.
        """
        before = len(self)
        try:
            for path, source, size in members:
                self.add(path, source, id=id, meta=meta, size_bytes=size)
        except BaseException:
            self._broken = self._broken or len(self) > before
            raise

    def _add_file(self, path: str, file: IO[bytes], size: int) -> None:
        if size <= _CHUNK:
            self._upload.write(self._builder.add(path, _exactly(path, file, size)))
            return
        self._upload.write(self._builder.begin(path, size))
        self._broken = True
        left = size
        while left and (chunk := file.read(min(_CHUNK, left))):
            left -= len(chunk)
            self._upload.write(self._builder.write(chunk))
        self._upload.write(self._builder.end())
        self._broken = False

    def _line(self, path: str, id: str | None, meta: dict[str, Any] | None, size: int) -> bytes:
        """The member's line of the internal manifest; as `serialize_entry` would write it, but put together by hand.

        Raises:
            InvalidManifestError: `id` or `meta` is not JSON.
        """
        name = json_string(path)
        said_id = "null" if id is None else json_string(id) if type(id) is str else json_value(id, f"member {path!r}: its id")
        said_meta = "null" if meta is None else json_value(meta, f"member {path!r}: its meta")
        line = f'{self._before}{name[1:]},"member_path":{name},"id":{said_id},"meta":{said_meta},"size_bytes":{size}}}\n'
        return line.encode("ascii")

    def finish(self) -> ShardEntry:
        """Publish archive and index; returns the manifest entry. May run in the pool.

        Raises:
            ObjectExistsError: the archive's name was taken by somebody who makes no claims.
        """
        if self._broken:
            raise ConfigError(
                f"a member of {self.key} could not be read to its end; the shard is not published",
                hint="pack its items again, in a new shard",
            )
        result, index = self._upload.finish(self._builder.finish(bytes(self._lines) or b"\n"))
        return {
            "kind": "shard",
            "archive_key": self.key,
            "format": "tar",
            "compression": self._said_compression,
            "internal_manifest_path": self._internal_path,
            "count": len(index),
            "size_bytes": index.archive_size,
            "meta": {"etag": result.etag},
        }

    def abort(self) -> None:
        """Drop what was uploaded of it."""
        self._upload.abort()


def pack_shard(
    store: ObjectStore,
    key: str,
    items: Iterable[ShardItem],
    archive_format: str,
    compression: str | None,
    internal_manifest_path: str,
) -> ShardEntry:
    """One archive out of `items`, under a key that is replaced."""
    check_several(items, "item")
    pool = upload_pool(4)
    packer = ShardPacker(
        store,
        key,
        pool=pool,
        archive_format=archive_format,
        compression=compression,
        internal_manifest_path=internal_manifest_path,
    )
    try:
        for item in map(checked_item, items):
            packer.add(
                item["member_path"],
                item["source"],
                id=item.get("id"),
                meta=item.get("meta"),
                size_bytes=item.get("size_bytes"),
            )
        return packer.finish()
    except BaseException:
        pool.stop()
        packer.abort()
        raise
    finally:
        pool.stop()


def _flat(source: Buffer) -> Buffer:
    """The bytes of a buffer in a row; a copy only where they are strided."""
    view = memoryview(source)
    return view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()


def _exactly(path: str, file: IO[bytes], size: int) -> bytes:
    """All of a file, which must be of this size."""
    data = _read(file, size)
    if len(data) != size or file.read(1):
        raise ConfigError(
            f"member {path!r}: its source is not {size} bytes long",
            hint="give its true size_bytes, and leave the file alone while it is packed",
        )
    return data


def _read(file: IO[bytes], size: int) -> bytes:
    """`size` bytes, or fewer at the end: a pipe may give them in pieces."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


# -- items cut into shards, and an archive made of them --------------------------------------------

_COPY_CHUNK: Final = 1 << 20
_LONGEST_BETWEEN: Final = 1000
"""Items that may stand between members of a sample."""
_ARCHIVE_KEY: Final = 48
"""Bytes that the archive's key takes in each line, as an estimate."""


def item_size(item: ShardItem) -> int:
    """Bytes of an item's content: as it says, else as its source is."""
    size = item.get("size_bytes")
    return source_size(checked_item(item)["source"]) if size is None else size


@checked
def create_shards(
    items: Iterable[ShardItem],
    *,
    max_entries: int | None = None,
    max_bytes: int | str | None = None,
    max_samples: int | None = None,
) -> Iterator[list[ShardItem]]:
    """Cut items into batches, in order; a batch ends *before* the sample that would exceed a limit.

    Without limits there is one batch.

    Neighbours that are members of one sample (their names agree up to the first dot of the base name) stay together.

    Args:
        items: The very dicts come back in the batches.
        max_entries: Most items of a batch, unless a single sample has more.
        max_bytes: Most bytes of the tar that a batch makes (its internal manifest as estimated), unless a single sample makes
            a larger one; also as text: ``"64MiB"``.
        max_samples: Most samples of a batch.

    Raises:
        ConfigError: a limit is unusable.
    """
    if max_entries is None and max_bytes is None and max_samples is None:
        return _whole(items)
    return _split(items, ShardSizePolicy(max_entries, max_bytes, max_samples))


def _whole(items: Iterable[ShardItem]) -> Iterator[list[ShardItem]]:
    batch = list(items)
    if batch:
        yield batch


def _samples(items: Iterable[ShardItem]) -> Iterator[list[ShardItem]]:
    """Neighbours of one sample, with what stands between them; an item that belongs to no sample alone."""
    sample: list[ShardItem] = []
    between: list[ShardItem] = []
    key = None
    for item in items:
        path = checked_item(item)["member_path"]
        belongs = isinstance(path, str) and left_out_reason(path) is None
        if belongs and key == sample_key(path):
            sample += between
            sample.append(item)
            between = []
        elif not belongs and sample and len(between) < _LONGEST_BETWEEN:
            between.append(item)
        else:
            yield from filter(None, (sample, *([other] for other in between)))
            sample, between, key = [item], [], sample_key(path) if belongs else None
            if not belongs:
                yield sample
                sample = []
    yield from filter(None, (sample, *([other] for other in between)))


def _split(items: Iterable[ShardItem], policy: ShardSizePolicy) -> Iterator[list[ShardItem]]:
    batch: list[ShardItem] = []
    samples = body = lines = 0
    for sample in _samples(items):
        sizes = [item_size(item) if policy.max_bytes is not None else 0 for item in sample]
        more = sum(
            len(member_header(item["member_path"], size)) + size + padding(size)
            for item, size in zip(sample, sizes, strict=True)
        )
        text = sum(_line_size(item, size) for item, size in zip(sample, sizes, strict=True))
        if batch and not policy.holds(len(batch) + len(sample), samples + 1, tar_size(body + more, lines + text)):
            yield batch
            batch, samples, body, lines = [], 0, 0, 0
        batch += sample
        samples, body, lines = samples + 1, body + more, lines + text
    if batch:
        yield batch


def _line_size(item: ShardItem, size: int) -> int:
    """Bytes of an item's line in the internal manifest, under an archive's key of ordinary length."""
    return len(serialize_entry(member_entry("", item, size))) + _ARCHIVE_KEY


def member_entry(archive_key: str, item: ShardItem, size: int) -> FileEntry:
    """The entry of one member, as it stands in the internal manifest."""
    path = item["member_path"]
    return {
        "kind": "file",
        "key": virtual_key(archive_key, path),
        "member_path": path,
        "id": item.get("id"),
        "meta": item.get("meta"),
        "size_bytes": size,
    }


def create_archive(
    items: Iterable[ShardItem],
    archive_key: str,
    *,
    format: str = "tar",
    compression: str | None = "gzip",
    internal_manifest_path: str = INTERNAL_MANIFEST,
    use_temp_file: bool = True,
    temp_file_threshold: int = 100 << 20,
) -> tuple[bytes | Path, int]:
    """An archive with its internal manifest, not uploaded anywhere.

    Returns:
        The archive, as bytes, or beyond `temp_file_threshold` as the path of a temporary file, which is the caller's
        to delete; and its size.
    """
    check_several(items, "item")
    if format != "tar":
        raise ConfigError(f"Unsupported archive format: {format}", hint='use "tar"; compression is an argument of its own')
    builder = ShardBuilder(compression=normalize_compression(compression), internal_manifest_path=internal_manifest_path)
    entries: list[FileEntry] = []
    with tempfile.SpooledTemporaryFile(max_size=temp_file_threshold if use_temp_file else 0) as body:
        for item in map(checked_item, items):
            source = item["source"]
            if isinstance(source, (str, os.PathLike)):
                size = _add_file(builder, body, item["member_path"], Path(source))
            else:
                data = readable(source)
                size = len(data)
                body.writelines(builder.add(item["member_path"], data))
            entries.append(member_entry(archive_key, item, size))
        built = builder.finish(encode_manifest(entries))
        body.seek(0)
        total = built.index.archive_size
        if not use_temp_file or total <= temp_file_threshold:
            return b"".join((built.head, body.read(), built.tail)), total
        handle, name = tempfile.mkstemp(suffix=".tar")
        with open(handle, "wb") as file:
            file.write(built.head)
            shutil.copyfileobj(body, file, _COPY_CHUNK)
            file.write(built.tail)
        return Path(name), total


def _add_file(builder: ShardBuilder, body: IO[bytes], member_path: str, path: Path) -> int:
    with open_source(path) as file:
        size = os.fstat(file.fileno()).st_size
        body.writelines(builder.begin(member_path, size))
        while chunk := file.read(_COPY_CHUNK):
            body.writelines(builder.write(chunk))
        body.writelines(builder.end())
    return size
