"""What the store has of a dataset's parts: their ETags and sizes now, and their indexes.

ETags pin one session on one store, sizes tell what the content is. ETags that a manifest or an index has recorded belong to the
store that was written to. A copy has others: it is the same data where the sizes are equal and the checksums fit. An index of a
shard that came without one is made on first use, and kept beside it or, where that is not allowed, locally.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

from s3loader.arguments import local_path
from s3loader.errors import (
    AccessDeniedError,
    IntegrityError,
    ObjectNotFoundError,
    RangeError,
    S3LoaderError,
    ShardReadError,
    UnsupportedOperationError,
)
from s3loader.loader.layout import LooseRun, Shard
from s3loader.shard.build import OnTorn, build_index, check_on_torn, index_archive
from s3loader.shard.index import ShardIndex, index_key, is_foreign, load_index
from s3loader.shard.reader import ShardReader
from s3loader.store.backend import key_bytes
from s3loader.store.objectstore import ObjectStore
from s3loader.store.ordered import map_ordered
from s3loader.types import Buffer, ObjectMeta

__all__ = [
    "ArchiveOptions",
    "absent_indexes",
    "copies",
    "current_index",
    "find_index",
    "keep_index",
    "kept_index",
    "look",
    "make_indexes",
    "pinned",
    "remember_index",
    "take_index",
]

_WORKERS: Final = 4
_LOOKS: Final = 3
"""Members that are looked at to tell whether an index is of an archive."""
_LOOKED_AT: Final = 4 << 20
"""Bytes of the largest one that is looked at."""


@dataclass(frozen=True, slots=True)
class ArchiveOptions:
    """How archives are read that have no index yet, and what torn samples mean.

    Raises:
        ConfigError: `on_torn` is neither ``"error"`` nor ``"split"``.
    """

    index_dir: str | None = None
    """Where indexes are kept if the store may not be written to; None: the user's cache folder."""
    on_torn: OnTorn = "error"
    allow_missing_end: bool = False
    """Accept an archive without the zero blocks that end one (it may be truncated)."""
    allow_trailing: bool = False
    """Leave out what follows the end of an archive."""

    def __post_init__(self) -> None:
        if self.index_dir is not None:
            object.__setattr__(self, "index_dir", local_path(self.index_dir, "index_dir"))
        check_on_torn(self.on_torn)


def _local_path(store: ObjectStore, key: str, index_dir: str | None) -> str:
    if index_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        index_dir = os.path.join(base, "s3loader", "indexes")
    name = hashlib.sha256(f"{store.url}/{key}".encode("utf-8", "surrogateescape")).hexdigest()
    return os.path.join(index_dir, f"{name}.idx")


_absent: weakref.WeakKeyDictionary[ObjectStore, set[str]] = weakref.WeakKeyDictionary()


def absent_indexes(store: ObjectStore) -> set[str]:
    """Keys of archives without an index beside them, as `store` said; theirs are kept locally: it need not be asked again."""
    return _absent.setdefault(store, set())


_READ_AT_OPENING: Final = 16 << 20
"""Bytes of indexes that are kept between the opening of a dataset and its first use."""


class _ReadIndexes:
    """Indexes of one store as they were read, by the archive's key; the oldest give way."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}
        self._bytes = 0

    def put(self, key: str, data: bytes) -> None:
        self.take(key)
        self._kept[key] = data
        self._bytes += len(data)
        while self._bytes > _READ_AT_OPENING:
            self.take(next(iter(self._kept)))

    def take(self, key: str) -> bytes | None:
        data = self._kept.pop(key, None)
        self._bytes -= len(data or b"")
        return data


_read: weakref.WeakKeyDictionary[ObjectStore, _ReadIndexes] = weakref.WeakKeyDictionary()


def remember_index(store: ObjectStore, key: str, data: Buffer) -> None:
    """Keep the index that stands beside the archive `key`, as it was read, until it is wanted; the oldest give way."""
    _read.setdefault(store, _ReadIndexes()).put(key, bytes(data))


def take_index(store: ObjectStore, key: str) -> bytes | None:
    """The index that was remembered, once."""
    kept = _read.get(store)
    return None if kept is None else kept.take(key)


def find_index(
    store: ObjectStore, shard: Shard, index_dir: str | None, beside: Buffer | None = None, *, asked: bool = False
) -> ShardIndex:
    """The index of an archive: beside it, or kept locally; best one made for its present ETag, else of its size.

    Args:
        store: Where the archive is.
        shard: The archive, as it was found when the dataset was opened.
        index_dir: Where indexes are kept locally.
        beside: What stands beside it, where that was read already.
        asked: The store was asked for it already: where there is no `beside`, nothing stands there.

    Raises:
        ObjectNotFoundError: there is none.
        ShardReadError: it is corrupt, or of another archive.
    """
    found: ShardIndex | None = None
    error: S3LoaderError | None = None
    try:
        if asked and beside is None:
            raise ObjectNotFoundError("there is no index beside it", op="get", url=f"{store.url}/{index_key(shard.key)}")
        found = load_index(store, shard.key) if beside is None or is_foreign(beside) else ShardIndex.from_bytes(beside)
        if not shard.pin or found.etag == shard.pin:
            return found
    except (ObjectNotFoundError, ShardReadError) as failure:
        error = failure
    local = kept_index(store, shard, index_dir)
    if local is not None:
        if isinstance(error, ObjectNotFoundError):
            absent_indexes(store).add(shard.key)
        return local
    if found is not None and found.archive_size in (shard.now, shard.size):
        return found  # of the archive this one is a copy of
    raise error or ShardReadError(
        "the index is of another version of the archive",
        op="read",
        url=f"{store.url}/{index_key(shard.key)}",
        hint="s3loader.shard.build_index makes a new one",
    )


def kept_index(store: ObjectStore, shard: Shard, index_dir: str | None) -> ShardIndex | None:
    """The index that is kept locally, if it is of this version of the archive."""
    try:
        with open(_local_path(store, shard.key, index_dir), "rb") as file:
            index = ShardIndex.from_bytes(file.read())
    except (FileNotFoundError, ShardReadError):
        return None  # none, or a damaged one: what was made automatically is made again
    return index if not shard.pin or index.etag == shard.pin else None


def current_index(store: ObjectStore, shard: Shard, options: ArchiveOptions, *, asked: bool = False) -> ShardIndex:
    """As `find_index`, for an archive whose index may be of another version: then a new one is made and kept.

    An index with another ETag is taken, as that of a copy, where the sizes are equal and members of it, looked at
    here and there, are what the index says. With `asked` the store has said that none stands beside it.

    Raises:
        ObjectNotFoundError: there is no such archive.
        ShardReadError: the archive is damaged.
    """
    try:
        index = find_index(store, shard, options.index_dir, asked=asked)
        if index.etag == shard.pin or _describes(store, shard, index):
            return index
    except (ObjectNotFoundError, ShardReadError):
        pass  # none that fits: the archive itself decides
    beside = make_indexes(store, [shard], options)
    return find_index(store, shard, options.index_dir, asked=asked and shard.key not in beside)


def _describes(store: ObjectStore, shard: Shard, index: ShardIndex) -> bool:
    """Whether a few members, from the first to the last, have the checksums of `index`."""
    if index.crc32c is None or not index.random_access:
        return False
    small = np.flatnonzero((index.sizes > 0) & (index.sizes <= np.uint64(_LOOKED_AT)))
    some = small[np.unique(np.linspace(0, len(small) - 1, _LOOKS).astype(np.int64))].tolist() if len(small) else []
    reader = ShardReader(store, shard.key, index=replace(index, etag=shard.pin))
    try:
        for member in reader.iter_members(some):
            member.body.read()
    except (IntegrityError, RangeError, ShardReadError):
        return False
    return bool(some) or not len(index)


def make_indexes(store: ObjectStore, shards: Sequence[Shard], options: ArchiveOptions) -> set[str]:
    """Read the archives once and keep their indexes; those that are kept locally already are left alone.

    Returns:
        Keys of the archives that have an index beside them now.

    Raises:
        ObjectNotFoundError: there is no such archive.
        ShardReadError: an archive is damaged, or cannot be read at random.
    """
    index_dir = options.index_dir
    different = {shard.key: shard for shard in shards}.values()
    keys = [shard.key for shard in different if kept_index(store, shard, index_dir) is None]
    if not keys:
        return set()
    results = build_index(
        keys,
        store=store,
        workers=_WORKERS,
        errors="return",
        random_access=True,
        on_torn="split",  # whoever groups its samples looks at that
        allow_missing_end=options.allow_missing_end,
        allow_trailing=options.allow_trailing,
    )
    denied = []
    for key, result in zip(keys, results, strict=True):
        if isinstance(result.error, (AccessDeniedError, UnsupportedOperationError)):
            denied.append(key)
        elif result.error is not None:
            raise result.error
    if denied:
        for _ in map_ordered(lambda key: keep_index(store, key, options), denied, concurrency=_WORKERS, name="s3loader-index"):
            pass
    return set(keys).difference(denied)


def keep_index(store: ObjectStore, key: str, options: ArchiveOptions) -> ShardIndex:
    """Read an archive once and keep its index locally, whatever stands beside it.

    Raises:
        ObjectNotFoundError: there is no such archive.
        ShardReadError: it is damaged, or cannot be read at random.
        S3LoaderError: the index cannot be written.
    """
    index = index_archive(
        store,
        key,
        random_access=True,
        allow_missing_end=options.allow_missing_end,
        allow_trailing=options.allow_trailing,
    )
    data = index.to_bytes()
    path = _local_path(store, key, options.index_dir)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        raise S3LoaderError(
            f"the index of {key} cannot be kept in {os.path.dirname(path)}: {error}",
            hint="give index_dir= a folder that may be written to",
        ) from error
    return index


# -- ETags and sizes now ---------------------------------------------------------------------------

_LOOKING: Final = 32
_LISTED: Final = 8
"""So many objects of one folder are found by listing it, fewer are asked for one by one."""
_LISTED_TOGETHER: Final = 10_000
"""Objects that one listing looks for."""
_PASSED: Final = 4
"""Entries that a listing may pass for each object it looks for."""


class Now(NamedTuple):
    """An object as it is in the store."""

    size: int
    etag: str


def look(store: ObjectStore, keys: Sequence[str]) -> list[Now | None]:
    """Size and ETag of each object, in the order of `keys`; None for one that is not there, or may not be looked at."""
    wanted = list(dict.fromkeys(keys))
    folders: dict[str, list[str]] = {}
    for key in wanted:
        folders.setdefault(key[: key.rfind("/") + 1], []).append(key)
    jobs: list[tuple[str, list[str]]] = []
    for folder, names in folders.items():
        some = len(names) if store.engine == "file" else _LISTED_TOGETHER
        if len(names) < _LISTED:
            jobs += [("", [name]) for name in names]
        else:
            names.sort(key=key_bytes)
            jobs += [(folder, names[low : low + some]) for low in range(0, len(names), some)]
    found: dict[str, Now] = {}
    threads, name = min(_LOOKING, len(jobs)), "s3loader-look"

    def one(job: tuple[str, list[str]]) -> dict[str, Now]:
        return dict(_listed(store, *job)) if len(job[1]) > 1 else _asked(store, job[1])

    for part in map_ordered(one, jobs, concurrency=threads, name=name):
        found |= part
    listed = [key for folder, names in jobs if folder or len(names) > 1 for key in names]
    missing = [key for key in listed if key not in found] if found else []
    for part in map_ordered(lambda key: _asked(store, [key]), missing, concurrency=threads, name=name):
        found |= part
    return [found.get(key) for key in keys]


def _listed(store: ObjectStore, folder: str, names: list[str]) -> Iterator[tuple[str, Now]]:
    wanted, last, left = set(names), key_bytes(names[-1]), _PASSED * len(names) + 1000
    try:
        for entry in store.list(folder, delimiter="/", start_after=names[0][:-1]):
            if isinstance(entry, ObjectMeta) and entry.key in wanted:
                yield entry.key, Now(entry.size, entry.etag)
            left -= 1
            if left < 0 or key_bytes(entry.key) > last:
                return
    except (AccessDeniedError, ObjectNotFoundError, UnsupportedOperationError):
        return  # asked for one by one


def _asked(store: ObjectStore, keys: list[str]) -> dict[str, Now]:
    try:
        return {key: Now(meta.size, meta.etag) for key in keys for meta in [store.head(key)]}
    except (AccessDeniedError, ObjectNotFoundError, UnsupportedOperationError):
        return {}  # reading it will say so


def pinned(store: ObjectStore, parts: Sequence[Shard | LooseRun]) -> list[Shard | LooseRun]:
    """`parts` with the ETag and size that each object has in the store now."""
    keys = [key for part in parts for key in ([part.key] if isinstance(part, Shard) else part.keys)]
    now = iter(look(store, keys))
    return [
        _shard(part, next(now)) if isinstance(part, Shard) else _run(part, [next(now) for _ in part.keys]) for part in parts
    ]


def _shard(shard: Shard, now: Now | None) -> Shard:
    return shard if now is None else replace(shard, pin=now.etag, now=now.size)


def _run(run: LooseRun, now: Sequence[Now | None]) -> LooseRun:
    pins = tuple(etag if there is None else there.etag for there, etag in zip(now, run.etags, strict=True))
    sizes = np.array([-1 if there is None else there.size for there in now], dtype=np.int64)
    wrong = np.flatnonzero((run.sizes >= 0) & (sizes >= 0) & (run.sizes != sizes)).tolist()
    gone = np.flatnonzero((run.sizes == 0) & (sizes < 0)).tolist()  # nothing is fetched for them that would say so
    return replace(run, pins=pins, wrong={i: int(sizes[i]) for i in (*wrong, *gone)}, now=sizes)


def copies(parts: Sequence[Shard | LooseRun]) -> str | None:
    """What to tell of objects whose ETags are not the recorded ones; None where there are none."""
    moved = total = 0
    for part in parts:
        pairs = [(part.etag, part.pin)] if isinstance(part, Shard) else zip(part.etags, part.pins, strict=False)
        for recorded, pin in pairs:
            total += 1
            moved += bool(recorded and pin and recorded != pin)
    if not moved:
        return None
    return (
        f"{moved:,} of {total:,} objects have other ETags than were recorded, as copies do: accepted, because their sizes are"
        " those recorded; members of shards are checked by CRC32C"
    )
