"""One clean manifest out of one with many parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from s3loader.exchange.commit import new_spool, publish_file, settled_mode
from s3loader.exchange.keys import split_virtual_key
from s3loader.exchange.lines import EMPTY_MANIFEST, serialize_entry
from s3loader.exchange.reading import read_manifest_object
from s3loader.exchange.shard import Shard
from s3loader.exchange.types import CompactReport, ManifestEntry
from s3loader.types import PutMode, Update

if TYPE_CHECKING:
    from s3loader.exchange.manifest import Manifest
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["compact"]

_CHECKS: Final = 16
"""Existence checks at a time."""


def compact(
    store: S3ExchangeStore,
    source: Manifest,
    dst_key: str,
    *,
    resolve_refs: bool = True,
    apply_deletes: bool = True,
    expand_shards: bool = False,
) -> CompactReport:
    """Write the entries of `source` as one manifest under `dst_key`.

    The new manifest appears at once or not at all. Compacting onto its own key fails with `ObjectChangedError` if
    somebody appended meanwhile. Parts of the old manifest stay where they are.

    Args:
        store: The store.
        source: What to compact.
        dst_key: Where to.
        resolve_refs: Put the referenced entries in place of references; otherwise references are kept as they are.
        apply_deletes: Drop entries whose object, archive or member is gone (one HEAD each, several at a time).
        expand_shards: Put a shard's members in place of its entry.
    """
    report: CompactReport = {"total_entries": 0, "removed_entries": 0, "resolved_refs": 0, "expanded_shards": 0}
    mode: PutMode = "overwrite"
    if source.key == dst_key:
        mode = Update(store.objects.head(dst_key).etag)
    entries = _walk(store, source, resolve_refs, expand_shards, apply_deletes, report)
    if apply_deletes:
        entries = _existing(store, entries, report)
    with new_spool() as spool:
        for entry in entries:
            spool.write(f"{serialize_entry(entry)}\n".encode("ascii"))
            report["total_entries"] += 1
        if not report["total_entries"]:
            spool.write(EMPTY_MANIFEST)
        publish_file(store.objects, dst_key, spool, settled_mode(store.objects, dst_key, mode))
    return report


def _walk(
    store: S3ExchangeStore, source: Manifest, resolve_refs: bool, expand: bool, deletes: bool, report: CompactReport
) -> Iterator[ManifestEntry]:
    """The entries, references and shards replaced as asked, and counted."""
    seen = {source.key} if source.key is not None else set()
    stack: list[Iterator[ManifestEntry]] = [source.iter_entries(resolve_refs=False)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif entry["kind"] == "manifest_ref" and resolve_refs:
            report["resolved_refs"] += 1
            if entry["key"] not in seen:
                seen.add(entry["key"])
                stack.append(read_manifest_object(store.objects, entry["key"]))
        elif entry["kind"] == "shard" and expand:
            if deletes and not store.objects.exists(entry["archive_key"]):
                report["removed_entries"] += 1
                continue
            for member in Shard.from_entry(store, entry).iter_entries():
                report["expanded_shards"] += 1
                yield member
        else:
            yield entry


def _existing(store: S3ExchangeStore, entries: Iterable[ManifestEntry], report: CompactReport) -> Iterator[ManifestEntry]:
    """Those whose object is still there, in order."""
    archives: dict[str, bool] = {}

    def there(entry: ManifestEntry) -> bool:
        if entry["kind"] == "shard":
            return store.objects.exists(entry["archive_key"])
        if entry["kind"] == "file" and "archive_key" in entry:  # just read from that archive, or a member kept by itself
            archive = entry["archive_key"]
            if archive not in archives:
                archives[archive] = store.objects.exists(archive)
            return archives[archive]
        return store.exists(entry["key"]) if split_virtual_key(entry["key"]) else store.objects.exists(entry["key"])

    with ThreadPoolExecutor(_CHECKS, "s3loader-exists") as pool:
        window: deque[tuple[ManifestEntry, Future[bool]]] = deque()

        def settle() -> Iterator[ManifestEntry]:
            entry, future = window.popleft()
            if future.result():
                yield entry
            else:
                report["removed_entries"] += 1

        for entry in entries:
            window.append((entry, pool.submit(there, entry)))
            if len(window) >= 4 * _CHECKS:
                yield from settle()
        while window:
            yield from settle()
