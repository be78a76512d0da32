"""Contents in order: of a manifest's entries, shards expanded; or by key, neighbours in one request. Fetched ahead."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice, pairwise
from typing import Any, Final, Literal, TypeAlias

from s3loader.errors import ConfigError, ExchangeObjectNotFoundError, ObjectChangedError, ObjectNotFoundError, RangeError
from s3loader.exchange.keys import infer_id_from_key, is_shard_key, split_virtual_key
from s3loader.exchange.lines import file_entry
from s3loader.exchange.members import PreparedShard, ShardMembers
from s3loader.exchange.objects import ObjectAccess
from s3loader.exchange.types import FileEntry, ManifestEntry
from s3loader.shard.body import ObjectBody
from s3loader.shard.index import ShardIndex
from s3loader.shard.reader import Run, ShardReader, plan_runs
from s3loader.store.arguments import check_several
from s3loader.store.backend import ReadResult
from s3loader.store.ordered import BoundedPool, map_ordered
from s3loader.types import ReadRequest

__all__ = ["KeyedObjects", "filter_by_prefix", "iter_contents", "iter_files", "iter_keys"]

Item: TypeAlias = tuple[ObjectBody, ManifestEntry]
_AHEAD: Final = 2
"""Shards whose index is read before their turn."""
_WINDOW: Final = 64 << 20
"""Bytes of loose objects that are fetched ahead."""


def iter_files(
    access: ObjectAccess, entries: Iterable[ManifestEntry], *, expand_shards: bool = True
) -> Iterator[ManifestEntry]:
    """The entries with each shard replaced by its members' entries."""
    for entry in entries:
        if expand_shards and entry["kind"] == "shard":
            yield from ShardMembers(access, entry).entries()
        else:
            yield entry


def iter_keys(access: ObjectAccess, entries: Iterable[ManifestEntry], *, expand_shards: bool = True) -> Iterator[str]:
    """Keys of entries; of the members of shards virtual keys, or the archives' own keys where they are not expanded."""
    for entry in iter_files(access, entries, expand_shards=expand_shards):
        yield entry["archive_key"] if entry["kind"] == "shard" else entry["key"]


def filter_by_prefix(access: ObjectAccess, entries: Iterable[ManifestEntry], prefix: str) -> Iterator[ManifestEntry]:
    """Entries, and members of shards, whose key or virtual key starts with `prefix`; other shards are not read."""
    for entry in entries:
        if entry["kind"] != "shard":
            if entry["key"].startswith(prefix):
                yield entry
            continue
        archive = entry["archive_key"] + "#"
        if archive.startswith(prefix) or prefix.startswith(archive):
            yield from (member for member in ShardMembers(access, entry).entries() if member["key"].startswith(prefix))


def iter_contents(access: ObjectAccess, entries: Iterable[ManifestEntry], *, expand_shards: bool = True) -> Iterator[Item]:
    """``(stream, entry)`` for each entry, in order; streams are fetched ahead within bounds.

    Raises:
        ExchangeObjectNotFoundError: an object is gone; at its turn, with `.key`.
        IntegrityError: it has not as many bytes as its entry says.
    """
    pool = BoundedPool(_AHEAD, "s3loader-shard")
    try:
        ahead = _ahead(access, entries, pool if expand_shards else None)
        for is_loose, run in groupby(ahead, lambda item: item[0]["kind"] == "file" and "#" not in item[0]["key"]):
            if is_loose:
                yield from _loose(access, (entry for entry, _ in run))
                continue
            for entry, asked in run:
                if asked is not None:
                    assert entry["kind"] == "shard"
                    prepared = asked.result()
                    if isinstance(prepared, Exception):
                        raise prepared
                    yield from ShardMembers(access, entry).contents_of(prepared)
                elif entry["kind"] == "shard":
                    body: ObjectBody = access.open(entry["archive_key"], resolve_virtual_keys=False)
                    yield access.checked(body, entry), entry
                else:
                    body = access.open(entry["key"], resolve_virtual_keys=entry["kind"] == "file")
                    yield access.checked(body, entry), entry
    finally:
        pool.stop()


def _prepared(shard: ShardMembers) -> PreparedShard | Exception | None:
    try:
        return shard.prepare()
    except Exception as error:  # noqa: BLE001 - raised when the shard's turn has come
        return error


_Prepared: TypeAlias = Future[PreparedShard | Exception | None] | None
"""None: there is nothing to prepare."""


def _ahead(
    access: ObjectAccess, entries: Iterable[ManifestEntry], pool: BoundedPool | None
) -> Iterator[tuple[ManifestEntry, _Prepared]]:
    """The entries; indexes of the next shards are read while the one before is. An error keeps its turn."""
    source = iter(entries)
    waiting: deque[tuple[ManifestEntry, _Prepared]] = deque()
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
            shard = ShardMembers(access, entry) if pool is not None and entry["kind"] == "shard" else None
            waiting.append((entry, None if shard is None or pool is None else pool.submit(partial(_prepared, shard))))
        if not waiting:
            if error is not None:
                raise error
            return
        yield waiting.popleft()


def _loose(access: ObjectAccess, entries: Iterable[ManifestEntry]) -> Iterator[Item]:
    """Objects of their own, several at a time."""
    asked: deque[FileEntry] = deque()
    errors: list[Exception] = []

    def requests() -> Iterator[ReadRequest]:
        try:
            for entry in entries:
                assert entry["kind"] == "file"
                asked.append(entry)
                yield access.first_request(entry["key"])
        except Exception as failure:  # noqa: BLE001 - raised below: answers to earlier requests come first
            errors.append(failure)

    for answer in access.store.read_many(requests(), max_bytes=_WINDOW, errors="return"):
        entry = asked.popleft()
        if isinstance(answer, ReadResult):
            yield access.checked(access.body_of(answer), entry), entry
        else:
            yield access.checked(access.retry_alone(entry["key"], answer.error), entry), entry
    if errors:
        raise errors[0]


_KEYS: Final = 4096
"""Keys planned together ..."""
_ARCHIVES: Final = 64
"""... and the most archives among them."""
_LOADS: Final = 8
_ENTRIES: Final = 200_000
"""Members whose entries are kept."""

KeyedItem: TypeAlias = tuple[ObjectBody, FileEntry]


@dataclass(slots=True)
class _Step:
    """The next keys, and the one request they need (None: they are opened one by one)."""

    keys: list[str]
    request: ReadRequest | None = None
    reader: ShardReader | None = None
    index: ShardIndex | None = None
    run: Run | None = None


def _load_index(reader: ShardReader) -> None:
    with contextlib.suppress(Exception):
        reader.has_side_car()


class KeyedObjects(Iterator[KeyedItem]):
    """``(stream, entry)`` for keys, in the order of the keys; `missing` lists those that were not found.

    Args:
        access: What opens objects and members.
        keys: Plain and virtual keys.
        infer_id: Makes the id of a plain object's entry from its key.
        limit: Most streams; None: all.
        on_missing: ``"raise"`` at its turn, or ``"report"`` in `missing` and go on.
        details: Read the internal manifests for the members' full entries.
    """

    missing: list[str]

    def __init__(
        self,
        access: ObjectAccess,
        keys: Iterable[str],
        *,
        infer_id: Callable[[str], str] = infer_id_from_key,
        limit: int | None = None,
        on_missing: Literal["raise", "report"] = "raise",
        details: bool = True,
    ) -> None:
        if on_missing not in ("raise", "report"):
            raise ConfigError(
                f'on_missing is "raise" or "report", not {on_missing!r}',
                hint='"raise" stops at a missing key, "report" lists it in .missing',
            )
        check_several(keys, "key")
        self.missing = []
        self._report = on_missing == "report"
        self._details = details
        self._access = access
        self._infer_id = infer_id
        self._entries: OrderedDict[str, dict[str, FileEntry]] = OrderedDict()
        self._kept = 0
        wanted = keys if self._report else islice(keys, limit)  # then each key is one item
        self._items = islice(self._run(iter(wanted)), limit)

    def __iter__(self) -> KeyedObjects:
        return self

    def __next__(self) -> KeyedItem:
        return next(self._items)

    def _run(self, keys: Iterator[str]) -> Iterator[KeyedItem]:
        for batch in _batches(keys):
            self._load_indexes(batch)
            steps = [step for archive, run in groupby(batch, _archive_of) for step in self._plan(archive, list(run))]
            requests = (step.request for step in steps if step.request is not None)
            answers = self._access.store.read_many(requests, max_bytes=_WINDOW, errors="return")
            for step in steps:
                yield from self._deliver(step, next(answers) if step.request is not None else None)

    def _load_indexes(self, batch: list[str]) -> None:
        """Several at a time, where there are several; what goes wrong is said at the turn of its keys."""
        archives = {archive for archive in map(_archive_of, batch) if archive is not None}
        readers = [reader for reader in map(self._access.reader, archives) if not reader.is_loaded]
        if len(readers) > 1:
            deque(map_ordered(_load_index, readers, concurrency=min(_LOADS, len(readers)), name="s3loader-index"), 0)

    # planning

    def _plan(self, archive: str | None, keys: list[str]) -> Iterator[_Step]:
        if archive is None:
            for key in keys:
                yield _Step([key], self._access.first_request(key))
            return
        reader = self._access.reader(archive)
        try:
            index = reader.index
        except ObjectNotFoundError:  # the whole key may be a plain one
            yield from self._plan(None, keys)
            return
        paths = [(split_virtual_key(key) or ("", ""))[1] for key in keys]
        if not index.random_access:
            yield _Step(keys, reader=reader, index=index)
            return
        for there, pairs in groupby(zip(keys, paths, strict=True), lambda pair: pair[1] in index):
            some = list(pairs)
            if not there:
                yield from (_Step([key], reader=reader) for key, _ in some)
                continue
            at = 0
            for run in plan_runs(index, [index.find(path) for _, path in some]):
                count = len(run.positions)
                request = reader.request(index, run) if run.low < run.high else None
                yield _Step([key for key, _ in some[at : at + count]], request, reader, index, run)
                at += count

    # delivering

    def _deliver(self, step: _Step, answer: Any) -> Iterator[KeyedItem]:
        if step.reader is None:
            yield from self._plain(step.keys[0], answer)
        elif step.index is None:
            self._miss(step.keys[0], step.reader)
        elif step.run is None:
            yield from self._sequential(step.reader, step.index, step.keys)
        elif answer is not None and not isinstance(answer, ReadResult):
            if not isinstance(answer.error, (ObjectChangedError, ObjectNotFoundError, RangeError)):
                raise answer.error
            for key in step.keys:  # replaced or deleted since its index was read
                yield from self._alone(key)
        elif answer is not None and not _is_of(step.reader, step.index, answer):
            for key in step.keys:
                yield from self._alone(key)
        else:
            members = step.reader.cut(step.index, step.run, answer)
            for key, member in zip(step.keys, members, strict=True):
                yield member.body, self._entry(step.reader, key, member.name, member.size)

    def _plain(self, key: str, answer: Any) -> Iterator[KeyedItem]:
        if isinstance(answer, ReadResult):
            yield self._access.body_of(answer), self._file(key, answer.size, answer.etag)
        elif "#" in key and isinstance(answer.error, ObjectNotFoundError):
            yield from self._alone(key)  # a member of an archive with an unusual suffix
        else:
            try:
                body = self._access.retry_alone(key, answer.error)
            except ObjectNotFoundError:
                if not self._report:
                    raise
                self.missing.append(key)
                return
            yield body, self._file(key, body.size, None)

    def _alone(self, key: str) -> Iterator[KeyedItem]:
        try:
            body = self._access.open(key)
        except ObjectNotFoundError:
            if not self._report:
                raise
            self.missing.append(key)
            return
        virtual = split_virtual_key(key)
        yield body, self._file(key, body.size, None) if virtual is None else _member(*virtual, body.size)

    def _miss(self, key: str, reader: ShardReader) -> None:
        if not self._report:
            raise ExchangeObjectNotFoundError(key, op="get", url=reader.url, hint="the archive has no such member")
        self.missing.append(key)

    def _sequential(self, reader: ShardReader, index: ShardIndex, keys: list[str]) -> Iterator[KeyedItem]:
        """gzip and the like: one pass where the keys are in archive order, else one pass for each."""
        paths = [(split_virtual_key(key) or ("", ""))[1] for key in keys]
        positions = [index.find(path) if path in index else -1 for path in paths]
        if -1 not in positions and all(a < b for a, b in pairwise(positions)):
            wanted = dict(zip(positions, keys, strict=True))
            for position, member in enumerate(reader.iter_members()):
                if position in wanted:
                    yield member.body, self._entry(reader, wanted[position], member.name, member.size)
                if position == positions[-1]:
                    return
            return
        for key, path, position in zip(keys, paths, positions, strict=True):
            if position < 0:
                self._miss(key, reader)
                continue
            body = reader.open_at(position)
            yield body, self._entry(reader, key, path, body.size or 0)

    # entries

    def _file(self, key: str, size: int | None, etag: str | None) -> FileEntry:
        return file_entry(key, self._infer_id(key), None, None, size, etag)

    def _entry(self, reader: ShardReader, key: str, path: str, size: int) -> FileEntry:
        archive = reader.key
        if not self._details:
            return _member(archive, path, size)
        entries = self._entries.pop(archive, None)
        if entries is None:
            members = ShardMembers(self._access, {"kind": "shard", "archive_key": archive})
            entries = {entry.get("member_path", ""): entry for entry in members.entries()}
            self._kept += len(entries)
        self._entries[archive] = entries
        while self._kept > _ENTRIES and len(self._entries) > 1:
            self._kept -= len(self._entries.popitem(last=False)[1])
        return entries.get(path) or _member(archive, path, size)


def _is_of(reader: ShardReader, index: ShardIndex, answer: ReadResult) -> bool:
    """Whether an answer is of the archive that the index is of."""
    try:
        reader.accept(index, answer.etag, answer.size)
    except ObjectChangedError:
        return False
    return True


def _member(archive: str, path: str, size: int | None) -> FileEntry:
    return {
        "kind": "file",
        "key": f"{archive}#{path}",
        "member_path": path,
        "id": infer_id_from_key(path),
        "meta": None,
        "size_bytes": size,
        "archive_key": archive,
    }


def _batches(keys: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    archives: set[str | None] = set()
    for key in keys:
        archive = _archive_of(key)
        if len(batch) == _KEYS or (len(archives) == _ARCHIVES and archive not in archives):
            yield batch
            batch, archives = [], set()
        batch.append(key)
        archives.add(archive)
    if batch:
        yield batch


def _archive_of(key: str) -> str | None:
    virtual = split_virtual_key(key)
    return virtual[0] if virtual is not None and is_shard_key(virtual[0]) else None
