"""Small datasets of known content, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from s3loader.exchange.commit import publish_manifest
from s3loader.exchange.lines import encode_manifest
from s3loader.exchange.types import ManifestEntry
from s3loader.shard.index import index_key
from s3loader.shard.writer import ShardBuilder
from s3loader.store.objectstore import ObjectStore

__all__ = ["write_shard", "write_sharded_dataset"]


def write_shard(
    store: ObjectStore,
    key: str,
    members: Iterable[tuple[str, bytes]],
    *,
    compression: str | None = None,
    metas: Mapping[str, Any] | None = None,
    index: bool = True,
) -> ManifestEntry:
    """One shard with its index side-car; returns its manifest entry.

    Args:
        store: Where to.
        key: Key of the archive.
        members: ``(name, content)`` pairs.
        compression: None, ``"gzip"``, ``"bz2"``, ``"xz"`` or ``"zstd"``.
        metas: `meta` of members, by name, for the internal manifest.
        index: Write the side-car too.
    """
    members = list(members)
    builder = ShardBuilder(compression=compression, frame_size=8 << 10)
    body = b"".join(bytes(piece) for name, content in members for piece in builder.add(name, content))
    rows: list[Any] = [
        {
            "kind": "file",
            "key": f"{key}#{name}",
            "member_path": name,
            "id": None,
            "meta": (metas or {}).get(name),
            "size_bytes": len(content),
        }
        for name, content in members
    ]
    built = builder.finish(encode_manifest(rows))
    result = store.put(key, built.head + body + built.tail)
    if index:
        store.put(index_key(key), dataclasses.replace(built.index, etag=result.etag).to_bytes())
    return {
        "kind": "shard",
        "archive_key": key,
        "format": "tar",
        "compression": compression,
        "internal_manifest_path": "__manifest__.jsonl",
        "count": len(members),
        "size_bytes": result.size,
        "meta": {"etag": result.etag},
    }


def write_sharded_dataset(
    store: ObjectStore,
    samples: Iterable[tuple[str, bytes]],
    *,
    per_shard: int,
    prefix: str = "shards",
    manifest: str = "manifest.jsonl",
    compression: str | None = None,
    metas: Mapping[str, Any] | None = None,
) -> list[ManifestEntry]:
    """Shards of `per_shard` members each and a manifest over them; returns its entries."""
    entries = []
    members = iter(samples)
    for number in itertools.count():
        some = list(itertools.islice(members, per_shard))
        if not some:
            break
        key = f"{prefix}/shard-{number:06d}.tar" + (".zst" if compression == "zstd" else "")
        entries.append(write_shard(store, key, some, compression=compression, metas=metas))
    publish_manifest(store, manifest, entries)
    return entries
