"""Items to pack: splitting them into shards, and archives made without a store."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from s3loader.errors import ConfigError
from s3loader.exchange.keys import virtual_key
from s3loader.exchange.lines import encode_manifest
from s3loader.exchange.packer import checked_item, source_size
from s3loader.exchange.types import FileEntry, ShardItem
from s3loader.shard.compression import normalize_compression
from s3loader.shard.index import INTERNAL_MANIFEST
from s3loader.shard.writer import ShardBuilder
from s3loader.store.arguments import check_several, open_source, readable

__all__ = ["create_archive", "create_shards"]

_CHUNK: Final = 1 << 20


def item_size(item: ShardItem) -> int:
    """Bytes of an item's content: as it says, else as its source is."""
    size = item.get("size_bytes")
    return source_size(checked_item(item)["source"]) if size is None else size


def create_shards(
    items: Iterable[ShardItem], *, max_entries: int | None = None, max_bytes: int | None = None
) -> Iterator[list[ShardItem]]:
    """Cut items into batches, in order; a batch ends *before* it would exceed a limit. Without limits there is one.

    Args:
        items: The very dicts come back in the batches.
        max_entries: Most items of a batch.
        max_bytes: Most bytes of content of a batch, unless a single item is larger.
    """
    if (max_entries is not None and max_entries < 1) or (max_bytes is not None and max_bytes < 1):
        raise ConfigError("max_entries and max_bytes must be at least 1", hint="None means no limit")
    return _split(items, max_entries, max_bytes)


def _split(items: Iterable[ShardItem], max_entries: int | None, max_bytes: int | None) -> Iterator[list[ShardItem]]:
    batch: list[ShardItem] = []
    total = 0
    for item in items:
        size = item_size(item) if max_bytes is not None else 0
        if batch and (
            (max_entries is not None and len(batch) >= max_entries) or (max_bytes is not None and total + size > max_bytes)
        ):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


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
