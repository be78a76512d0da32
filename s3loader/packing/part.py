"""A part of a dataset that is being made: shards, and a manifest of their own that says they are whole.

A part may be tried twice, also at the same time by two machines. Each try writes shards in a folder of its own, and never
touches what another has written; the first one that puts the part's manifest is the part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from s3loader.errors import ObjectExistsError
from s3loader.exchange.lines import iter_entries
from s3loader.exchange.types import ManifestEntry
from s3loader.exchange.writer import ManifestWriter
from s3loader.packing.sources import Sample
from s3loader.store import ObjectStore

__all__ = ["archive_of", "drop_tries", "entries_of", "write_part"]


def write_part(
    store: ObjectStore,
    samples: Iterable[Sample],
    key: str,
    folder: str,
    options: dict[str, Any],
    count: Callable[[int, int], None] | None = None,
) -> None:
    """Write the shards of a part, then its manifest, if no other try was first.

    Args:
        store: Where to.
        samples: Of the part.
        key: Of its manifest.
        folder: The folders of its tries begin with this and a dash.
        options: For `ManifestWriter`: how shards are cut.
        count: Called with 1 and the bytes of each sample.
    """
    mine = f"{folder}-{os.urandom(4).hex()}"
    writer = ManifestWriter(store, key, mode="overwrite", publish="create", shard_prefix=mine, **options)
    try:
        with writer:
            for name, values in samples:
                writer.add_sample(name, values)
                if count is not None:
                    count(1, sum(len(v) if isinstance(v, bytes) else os.path.getsize(v) for v in values.values()))
    except ObjectExistsError:
        writer.abandon()  # another try was faster


def entries_of(store: ObjectStore, key: str) -> list[ManifestEntry]:
    """The entries of one manifest."""
    return list(iter_entries([store.get(key)]))


def archive_of(entry: Any) -> str:
    """Key of an entry's shard."""
    return str(entry.get("archive_key", ""))


def drop_tries(store: ObjectStore, folder: str, entries: Iterable[ManifestEntry]) -> None:
    """Delete what tries below folders that begin with `folder` have written, and `entries` do not name."""
    kept = {archive_of(entry) for entry in entries}
    found = (entry.key for entry in store.list(f"{folder}-"))
    store.delete_many([key for key in found if key.removesuffix(".idx") not in kept])
