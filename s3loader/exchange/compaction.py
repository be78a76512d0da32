"""One clean manifest out of one with many parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

from s3loader.errors import ConfigError
from s3loader.exchange.commit import is_part_key, new_spool, publish_file, settled_mode
from s3loader.exchange.keys import split_virtual_key
from s3loader.exchange.lines import EMPTY_MANIFEST, serialize_entry, serialize_member
from s3loader.exchange.reading import read_manifest_lines
from s3loader.exchange.shard import Shard
from s3loader.exchange.types import CompactReport, ManifestEntry
from s3loader.store.arguments import checked_key
from s3loader.types import PutMode, Update

if TYPE_CHECKING:
    from s3loader.exchange.manifest import Manifest
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["compact"]

_CHECKS: Final = 16
"""Existence checks at a time."""


class _Kept(NamedTuple):
    """An entry, and its line."""

    entry: ManifestEntry
    line: bytes


def compact(
    store: S3ExchangeStore,
    source: Manifest,
    dst_key: str,
    *,
    resolve_refs: bool = True,
    apply_deletes: bool = True,
    expand_shards: bool = False,
    delete_parts: bool = False,
) -> CompactReport:
    """Write the entries of `source` as one manifest under `dst_key`.

    The new manifest appears at once or not at all. Compacting onto its own key fails with `ObjectChangedError` if
    somebody appended meanwhile. Lines are carried over byte for byte, also those no JSON (NaN) that other writers made.

    Args:
        store: The store.
        source: What to compact.
        dst_key: Where to.
        resolve_refs, apply_deletes, expand_shards, delete_parts: See `CompactOptions`.

    Raises:
        ConfigError: `delete_parts` where the parts are still needed.
        ManifestNotFoundError, InvalidManifestError: see `read_manifest_object`; nothing was written.
    """
    checked_key(dst_key)
    if delete_parts and (source.key != dst_key or not resolve_refs):
        raise ConfigError(
            "delete_parts=True: the manifest that is compacted would still refer to its parts",
            hint="compact it onto its own key, with resolve_refs=True",
        )
    report: CompactReport = {"total_entries": 0, "removed_entries": 0, "resolved_refs": 0, "expanded_shards": 0}
    mode: PutMode = "overwrite"
    if source.key == dst_key:
        mode = Update(store.objects.head(dst_key).etag)
    parts: list[str] = []
    entries = _walk(store, source, resolve_refs, expand_shards, apply_deletes, report, parts)
    if apply_deletes:
        entries = _existing(store, entries, report)
    with new_spool() as spool:
        for kept in entries:
            spool.write(kept.line + b"\n")
            report["total_entries"] += 1
        if not report["total_entries"]:
            spool.write(EMPTY_MANIFEST)
        publish_file(store.objects, dst_key, spool, settled_mode(store.objects, dst_key, mode))
    for failure in store.objects.delete_many(parts) if delete_parts else ():
        failure.error.add_note(f"s3loader: {dst_key} is compacted; only its old part {failure.key} could not be deleted")
        raise failure.error
    return report


def _walk(
    store: S3ExchangeStore,
    source: Manifest,
    resolve_refs: bool,
    expand: bool,
    deletes: bool,
    report: CompactReport,
    parts: list[str],
) -> Iterator[_Kept]:
    """The entries, references and shards replaced as asked, and counted; `parts` gets the parts of `source` itself."""
    seen = {source.key} if source.key is not None else set()
    stack: list[Iterator[tuple[ManifestEntry, bytes | None]]] = [source.iter_own_lines()]
    while stack:
        entry, line = next(stack[-1], (None, None))
        if entry is None:
            stack.pop()
        elif entry["kind"] == "manifest_ref" and resolve_refs:
            report["resolved_refs"] += 1
            key = entry["key"]
            if key not in seen:
                if source.key is not None and len(stack) == 1 and is_part_key(source.key, key):
                    parts.append(key)
                seen.add(key)
                stack.append(read_manifest_lines(store.objects, key))
        elif entry["kind"] == "shard" and expand:
            if deletes and not store.objects.exists(entry["archive_key"]):
                report["removed_entries"] += 1
                continue
            for member in Shard.from_entry(store, entry).iter_entries():
                report["expanded_shards"] += 1
                yield _Kept(member, serialize_member(member).encode("ascii"))
        else:
            yield _Kept(entry, serialize_entry(entry).encode("ascii") if line is None else line)


def _existing(store: S3ExchangeStore, entries: Iterable[_Kept], report: CompactReport) -> Iterator[_Kept]:
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
        window: deque[tuple[_Kept, Future[bool]]] = deque()

        def settle() -> Iterator[_Kept]:
            kept, future = window.popleft()
            if future.result():
                yield kept
            else:
                report["removed_entries"] += 1

        for kept in entries:
            window.append((kept, pool.submit(there, kept.entry)))
            if len(window) >= 4 * _CHECKS:
                yield from settle()
        while window:
            yield from settle()
