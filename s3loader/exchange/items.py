"""Items to pack: splitting them into shards, and archives made without a store."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from s3loader.arguments import checked
from s3loader.errors import ConfigError
from s3loader.exchange.keys import virtual_key
from s3loader.exchange.lines import encode_manifest, serialize_entry
from s3loader.exchange.pack import checked_item, source_size, tar_size
from s3loader.exchange.types import FileEntry, ShardItem, ShardSizePolicy
from s3loader.shard.compression import normalize_compression
from s3loader.shard.index import INTERNAL_MANIFEST
from s3loader.shard.samples import left_out_reason, sample_key
from s3loader.shard.tar import member_header, padding
from s3loader.shard.writer import ShardBuilder
from s3loader.store.arguments import check_several, open_source, readable

__all__ = ["create_archive", "create_shards"]

_CHUNK: Final = 1 << 20
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
            shutil.copyfileobj(body, file, _CHUNK)
            file.write(built.tail)
        return Path(name), total


def _add_file(builder: ShardBuilder, body: IO[bytes], member_path: str, path: Path) -> int:
    with open_source(path) as file:
        size = os.fstat(file.fileno()).st_size
        body.writelines(builder.begin(member_path, size))
        while chunk := file.read(_CHUNK):
            body.writelines(builder.write(chunk))
        body.writelines(builder.end())
    return size
