"""One clean manifest out of one with many parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from s3loader.errors import ConfigError
from s3loader.exchange.commit import is_part_key, new_spool, publish_file, settled_mode
from s3loader.exchange.keys import split_virtual_key
from s3loader.exchange.lines import EMPTY_MANIFEST, serialize_entry, serialize_member
from s3loader.exchange.members import ShardMembers
from s3loader.exchange.objects import ObjectAccess
from s3loader.exchange.reading import read_manifest_lines
from s3loader.exchange.types import CompactReport, ManifestEntry
from s3loader.store.arguments import checked_key
from s3loader.store.ordered import map_ordered
from s3loader.types import PutMode, Update

__all__ = ["compact"]

_CHECKS: Final = 16
"""Existence checks at a time."""


class _Kept(NamedTuple):
    """An entry, and its line."""

    entry: ManifestEntry
    line: bytes


def compact(
    access: ObjectAccess,
    given: Iterable[ManifestEntry] | None,
    src_key: str | None,
    dst_key: str,
    *,
    resolve_refs: bool = True,
    apply_deletes: bool = True,
    expand_shards: bool = False,
    delete_parts: bool = False,
) -> CompactReport:
    """Write the entries of a manifest as one manifest under `dst_key`.

    The new manifest appears at once or not at all. Compacting onto its own key fails with `ObjectChangedError` if
    somebody appended meanwhile. Lines are carried over byte for byte, also those no JSON (NaN) that other writers made.

    Args:
        access: What opens objects and members.
        given: What to compact, where it stands in no store.
        src_key: The key of what to compact, if it has one.
        dst_key: Where to.
        resolve_refs: Put the entries of references in their place; otherwise references are kept.
        apply_deletes: Drop entries whose object, archive or member is gone: one HEAD each, 16 at a time.
        expand_shards: Put a shard's members in place of its entry.
        delete_parts: Compacting onto its own key: delete its old parts afterwards.

    Raises:
        ConfigError: `delete_parts` where the parts are still needed.
        ManifestNotFoundError: it, or one that it references, does not exist; nothing was written.
        InvalidManifestError: a line is not understood; nothing was written.
        IntegrityError: the bytes of one are not what was written; nothing was written.
    """
    checked_key(dst_key)
    if delete_parts and (src_key != dst_key or not resolve_refs):
        raise ConfigError(
            "delete_parts=True: the manifest that is compacted would still refer to its parts",
            hint="compact it onto its own key, with resolve_refs=True",
        )
    report: CompactReport = {"total_entries": 0, "removed_entries": 0, "resolved_refs": 0, "expanded_shards": 0}
    mode: PutMode = "overwrite"
    lines: Iterator[tuple[ManifestEntry, bytes | None]] = ((entry, None) for entry in given or ())
    if given is None and src_key is not None:
        etag, lines = read_manifest_lines(access.store, src_key)
        if src_key == dst_key:  # what is replaced is what was read, and nothing later
            mode = Update(etag)
    elif src_key == dst_key:
        mode = Update(access.store.head(dst_key).etag)
    parts: list[str] = []
    entries = _walk(access, lines, src_key, resolve_refs, expand_shards, apply_deletes, report, parts)
    if apply_deletes:
        entries = _existing(access, entries, report)
    with new_spool() as spool:
        for kept in entries:
            spool.write(kept.line + b"\n")
            report["total_entries"] += 1
        if not report["total_entries"]:
            spool.write(EMPTY_MANIFEST)
        publish_file(access.store, dst_key, spool, settled_mode(access.store, dst_key, mode))
    for failure in access.store.delete_many(parts) if delete_parts else ():
        failure.error.add_note(f"s3loader: {dst_key} is compacted; only its old part {failure.key} could not be deleted")
        raise failure.error
    return report


def _walk(
    access: ObjectAccess,
    lines: Iterator[tuple[ManifestEntry, bytes | None]],
    src_key: str | None,
    resolve_refs: bool,
    expand: bool,
    deletes: bool,
    report: CompactReport,
    parts: list[str],
) -> Iterator[_Kept]:
    """The entries, references and shards replaced as asked, and counted; `parts` gets the parts of the manifest itself."""
    seen = {src_key} if src_key is not None else set()
    stack: list[Iterator[tuple[ManifestEntry, bytes | None]]] = [lines]
    while stack:
        entry, line = next(stack[-1], (None, None))
        if entry is None:
            stack.pop()
        elif entry["kind"] == "manifest_ref" and resolve_refs:
            report["resolved_refs"] += 1
            key = entry["key"]
            if key not in seen:
                if src_key is not None and len(stack) == 1 and is_part_key(src_key, key):
                    parts.append(key)
                seen.add(key)
                stack.append(read_manifest_lines(access.store, key)[1])
        elif entry["kind"] == "shard" and expand:
            if deletes and not access.store.exists(entry["archive_key"]):
                report["removed_entries"] += 1
                continue
            for member in ShardMembers(access, entry).entries():
                report["expanded_shards"] += 1
                yield _Kept(member, serialize_member(member).encode("ascii"))
        else:
            yield _Kept(entry, serialize_entry(entry).encode("ascii") if line is None else line)


def _existing(access: ObjectAccess, entries: Iterable[_Kept], report: CompactReport) -> Iterator[_Kept]:
    """Those whose object is still there, in order."""
    archives: dict[str, bool] = {}

    def there(entry: ManifestEntry) -> bool:
        if entry["kind"] == "shard":
            return access.store.exists(entry["archive_key"])
        if entry["kind"] == "file" and "archive_key" in entry:  # just read from that archive, or a member kept by itself
            archive = entry["archive_key"]
            if archive not in archives:
                archives[archive] = access.store.exists(archive)
            return archives[archive]
        return access.exists(entry["key"]) if split_virtual_key(entry["key"]) else access.store.exists(entry["key"])

    looked = map_ordered(
        lambda kept: (kept, there(kept.entry)), entries, concurrency=_CHECKS, name="s3loader-exists", ahead=4 * _CHECKS
    )
    for kept, still in looked:
        if still:
            yield kept
        else:
            report["removed_entries"] += 1
