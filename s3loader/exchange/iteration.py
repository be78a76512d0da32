"""Entries to contents: shards expanded, objects fetched ahead, in the order of the entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from s3loader.exchange.shard import Shard
from s3loader.exchange.types import FileEntry, ManifestEntry
from s3loader.shard.body import ObjectBody
from s3loader.store.base import ReadResult

if TYPE_CHECKING:
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["iter_contents", "iter_files"]

Item: TypeAlias = tuple[ObjectBody, ManifestEntry]
_BATCH: Final = 256
"""Neighbouring loose objects fetched as one bulk call."""
_WINDOW: Final = 64 << 20


def iter_files(
    store: S3ExchangeStore, entries: Iterable[ManifestEntry], *, expand_shards: bool = True
) -> Iterator[ManifestEntry]:
    """The entries with each shard replaced by its members' entries."""
    for entry in entries:
        if expand_shards and entry["kind"] == "shard":
            yield from Shard.from_entry(store, entry).iter_entries()
        else:
            yield entry


def iter_contents(store: S3ExchangeStore, entries: Iterable[ManifestEntry], *, expand_shards: bool = True) -> Iterator[Item]:
    """``(stream, entry)`` for each entry, in order; streams are fetched ahead within bounds.

    Raises:
        ExchangeObjectNotFoundError: an object is gone; at its turn, with `.key`.
        ObjectChangedError: it is not the one the manifest recorded (by ETag).
    """
    loose: list[FileEntry] = []
    for entry in entries:
        if entry["kind"] == "file" and _is_loose(entry):
            loose.append(entry)
            if len(loose) == _BATCH:
                yield from _loose(store, loose)
                loose = []
            continue
        yield from _loose(store, loose)
        loose = []
        if entry["kind"] == "shard" and expand_shards:
            yield from Shard.from_entry(store, entry).iter_objects()
        elif entry["kind"] == "shard":
            yield store.access.open(entry["archive_key"], resolve_virtual_keys=False), entry
        elif entry["kind"] == "file":
            yield store.access.open(entry["key"]), entry
        else:
            yield store.access.open(entry["key"], resolve_virtual_keys=False), entry
    yield from _loose(store, loose)


def _is_loose(entry: FileEntry) -> bool:
    return "#" not in entry["key"]


def _loose(store: S3ExchangeStore, entries: list[FileEntry]) -> Iterator[Item]:
    """Objects of their own, several at a time."""
    access = store.access
    if len(entries) == 1:  # nothing to fetch beside it
        entry = entries[0]
        request = access.first_request(entry["key"], entry.get("etag"))
        yield from _answers(store, entries, access.store.read_many([request], errors="return"))
    elif entries:
        requests = (access.first_request(entry["key"], entry.get("etag")) for entry in entries)
        yield from _answers(store, entries, access.store.read_many(requests, max_bytes=_WINDOW, errors="return"))


def _answers(store: S3ExchangeStore, entries: list[FileEntry], answers: Iterator[Any]) -> Iterator[Item]:
    for entry, answer in zip(entries, answers, strict=True):
        if isinstance(answer, ReadResult):
            yield store.access.body_of(answer), entry
        else:
            yield store.access.retry_alone(entry["key"], answer.error), entry
