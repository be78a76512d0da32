"""Entries to contents: shards expanded, objects fetched ahead, in the order of the entries."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, Final, TypeAlias

from s3loader.exchange.shard import PreparedShard, Shard
from s3loader.exchange.types import FileEntry, ManifestEntry
from s3loader.shard.body import ObjectBody
from s3loader.store.base import ReadResult
from s3loader.types import ReadRequest

if TYPE_CHECKING:
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["iter_contents", "iter_files"]

Item: TypeAlias = tuple[ObjectBody, ManifestEntry]
_AHEAD: Final = 2
"""Shards whose index is read before their turn."""
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
    with ThreadPoolExecutor(_AHEAD, "s3loader-shard") as pool:
        ahead = _ahead(store, entries, pool if expand_shards else None)
        for is_loose, run in groupby(ahead, lambda item: item[0]["kind"] == "file" and "#" not in item[0]["key"]):
            if is_loose:
                yield from _loose(store, (entry for entry, _ in run))
                continue
            for entry, prepared in run:
                if prepared is not None:
                    assert entry["kind"] == "shard"
                    yield from Shard.from_entry(store, entry).iter_prepared(prepared.result())
                elif entry["kind"] == "shard":
                    yield store.access.open(entry["archive_key"], resolve_virtual_keys=False), entry
                else:
                    yield store.access.open(entry["key"], resolve_virtual_keys=entry["kind"] == "file"), entry


def _ahead(
    store: S3ExchangeStore, entries: Iterable[ManifestEntry], pool: ThreadPoolExecutor | None
) -> Iterator[tuple[ManifestEntry, Future[PreparedShard | None] | None]]:
    """The entries; indexes of the next shards are read while the one before is. An error keeps its turn."""
    source = iter(entries)
    waiting: deque[tuple[ManifestEntry, Future[PreparedShard | None] | None]] = deque()
    error: Exception | None = None
    ended = False
    while True:
        while not ended and len(waiting) <= _AHEAD:
            try:
                entry = next(source)
            except StopIteration:
                ended = True
                break
            except Exception as failure:  # noqa: BLE001 - raised below, when its turn has come
                error, ended = failure, True
                break
            shard = Shard.from_entry(store, entry) if pool is not None and entry["kind"] == "shard" else None
            waiting.append((entry, None if shard is None or pool is None else pool.submit(shard.prepare)))
        if not waiting:
            if error is not None:
                raise error
            return
        yield waiting.popleft()


def _loose(store: S3ExchangeStore, entries: Iterable[ManifestEntry]) -> Iterator[Item]:
    """Objects of their own, several at a time."""
    access = store.access
    asked: deque[FileEntry] = deque()
    errors: list[Exception] = []

    def requests() -> Iterator[ReadRequest]:
        try:
            for entry in entries:
                assert entry["kind"] == "file"
                asked.append(entry)
                yield access.first_request(entry["key"], entry.get("etag"))
        except Exception as failure:  # noqa: BLE001 - raised below: answers to earlier requests come first
            errors.append(failure)

    for answer in access.store.read_many(requests(), max_bytes=_WINDOW, errors="return"):
        entry = asked.popleft()
        if isinstance(answer, ReadResult):
            yield access.body_of(answer), entry
        else:
            yield access.retry_alone(entry["key"], answer.error), entry
    if errors:
        raise errors[0]
