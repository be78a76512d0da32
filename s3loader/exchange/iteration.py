"""Entries to contents: shards expanded, objects fetched ahead, in the order of the entries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from s3loader.errors import ConfigError, ObjectNotFoundError
from s3loader.exchange.errors import ExchangeObjectNotFoundError
from s3loader.exchange.keys import is_shard_key, split_virtual_key
from s3loader.exchange.lines import file_entry
from s3loader.exchange.shard import Shard
from s3loader.exchange.types import FileEntry, ManifestEntry
from s3loader.shard.body import ObjectBody
from s3loader.store.base import ReadResult

if TYPE_CHECKING:
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["KeyedObjects", "iter_contents", "iter_files"]

Item: TypeAlias = tuple[ObjectBody, ManifestEntry]
_BATCH: Final = 256
"""Neighbouring loose objects fetched as one bulk call."""
_KEYS: Final = 4096
"""Keys looked at together, so that neighbours can share a request."""
_ARCHIVES: Final = 8
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


class KeyedObjects(Iterator[tuple[ObjectBody, FileEntry]]):
    """``(stream, entry)`` for keys, in the order of the keys; `missing` lists those that were not found.

    Args:
        store: The store.
        keys: Plain and virtual keys.
        limit: At most so many streams.
        on_missing: ``"raise"`` at its turn, or ``"report"`` in `missing` and go on.
    """

    missing: list[str]

    def __init__(
        self,
        store: S3ExchangeStore,
        keys: Iterable[str],
        *,
        limit: int | None = None,
        on_missing: Literal["raise", "report"] = "raise",
    ) -> None:
        if on_missing not in ("raise", "report"):
            raise ConfigError(f'on_missing is "raise" or "report", not {on_missing!r}')
        self.missing = []
        self._report = on_missing == "report"
        self._entries: OrderedDict[str, dict[str, FileEntry]] = OrderedDict()
        self._store = store
        self._items = islice(self._run(iter(keys)), limit)

    def __iter__(self) -> KeyedObjects:
        return self

    def __next__(self) -> tuple[ObjectBody, FileEntry]:
        return next(self._items)

    def _run(self, keys: Iterator[str]) -> Iterator[tuple[ObjectBody, FileEntry]]:
        while batch := list(islice(keys, _KEYS)):
            at = 0
            while at < len(batch):
                archive = _archive_of(batch[at])
                end = at + 1
                while end < len(batch) and _archive_of(batch[end]) == archive:
                    end += 1
                run = batch[at:end]
                yield from self._plain(run) if archive is None else self._members(archive, run)
                at = end

    def _plain(self, keys: list[str]) -> Iterator[tuple[ObjectBody, FileEntry]]:
        access = self._store.access
        requests = (access.first_request(key, None) for key in keys)
        for key, answer in zip(keys, access.store.read_many(requests, max_bytes=_WINDOW, errors="return"), strict=True):
            try:
                if isinstance(answer, ReadResult):
                    body, etag = access.body_of(answer), answer.etag
                elif "#" in key and isinstance(answer.error, ObjectNotFoundError):
                    body, etag = access.open(key), None  # a member of an archive with an unusual suffix
                else:
                    body, etag = access.retry_alone(key, answer.error), None
            except ObjectNotFoundError:
                if not self._report:
                    raise
                self.missing.append(key)
                continue
            yield body, file_entry(key, self._store.infer_id(key), None, None, body.size, etag)

    def _members(self, archive: str, keys: list[str]) -> Iterator[tuple[ObjectBody, FileEntry]]:
        """Neighbouring keys of one archive: coalesced ranged reads."""
        reader = self._store.access.reader(archive)
        paths = [(split_virtual_key(key) or ("", ""))[1] for key in keys]
        try:
            index = reader.index
        except ObjectNotFoundError:
            for key in keys:  # the whole key may be a plain one
                yield from self._plain([key])
            return
        if not index.random_access and len(keys) > 1 and (whole := self._in_one_pass(archive, paths)) is not None:
            yield from whole
            return
        found = [(key, path) for key, path in zip(keys, paths, strict=True) if path in index]
        members = reader.iter_members([index.find(path) for _, path in found], index=index)
        for key, path in zip(keys, paths, strict=True):
            if path not in index:
                if not self._report:
                    raise ExchangeObjectNotFoundError(key, op="get", url=reader.url, hint="the archive has no such member")
                self.missing.append(key)
                continue
            member = next(members)
            yield member.body, self._member_entry(archive, path)

    def _in_one_pass(self, archive: str, paths: list[str]) -> Iterator[tuple[ObjectBody, FileEntry]] | None:
        """gzip and the like: one pass if the keys are in archive order and all there, else None."""
        index = self._store.access.reader(archive).index
        positions = [index.find(path) if path in index else -1 for path in paths]
        if positions[0] < 0 or any(b <= a for a, b in pairwise(positions)):
            return None
        return self._pass(archive, dict(zip(positions, paths, strict=True)))

    def _pass(self, archive: str, wanted: dict[int, str]) -> Iterator[tuple[ObjectBody, FileEntry]]:
        last = max(wanted)
        for position, member in enumerate(self._store.access.reader(archive).iter_members()):
            if position in wanted:
                yield member.body, self._member_entry(archive, wanted[position])
            if position == last:
                return

    def _member_entry(self, archive: str, path: str) -> FileEntry:
        """The entry the archive's internal manifest has; those of the last archives are kept."""
        entries = self._entries.pop(archive, None)
        if entries is None:
            shard = Shard(self._store, {"kind": "shard", "archive_key": archive})
            entries = {entry["member_path"]: entry for entry in shard.iter_entries()}
        self._entries[archive] = entries
        if len(self._entries) > _ARCHIVES:
            self._entries.popitem(last=False)
        return entries[path]


def _archive_of(key: str) -> str | None:
    virtual = split_virtual_key(key)
    return virtual[0] if virtual is not None and is_shard_key(virtual[0]) else None
