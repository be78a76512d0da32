"""The parts of a dataset: shards with the number of their samples, and runs of loose objects, torn samples refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from s3loader.errors import ConfigError, FormatError, InvalidManifestError, ObjectNotFoundError, S3LoaderError, ShardReadError
from s3loader.exchange.types import ManifestEntry, ShardEntry
from s3loader.loader.catalog import (
    ArchiveOptions,
    absent_indexes,
    current_index,
    find_index,
    make_indexes,
    pinned,
    remember_index,
)
from s3loader.loader.dataset import Group
from s3loader.loader.layout import LooseRun, Shard
from s3loader.shard.build import OnTorn, no_random_access, torn_between, torn_error
from s3loader.shard.compression import infer_archive_format
from s3loader.shard.index import MAX_SIZE, IndexCounts, ShardIndex, index_key, is_foreign, read_counts
from s3loader.shard.samples import NO_SAMPLE, LeftOut, add_left_out, extension_of, group_names, sample_key, torn_samples
from s3loader.shard.tar import BLOCK
from s3loader.store.backend import ReadResult
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.store.ordered import map_ordered
from s3loader.types import ReadRequest
from s3loader.units import KIB, MIB

__all__ = ["Edges", "Parts", "counted", "parts_of"]

_HEAD: Final = 4 * KIB
"""Bytes of an index that tell what it counts."""
_LARGE_HEAD: Final = 256 * KIB
_HEADS: Final = 8 * MIB
"""Bytes of all indexes together up to which more of each is read, up to `_LARGE_HEAD`, so that most come whole."""
_FEW: Final = 32
"""Indexes of a dataset that are all read when it is opened."""
_PLAIN: Final = ("", "none")
"""Compressions in a manifest's entry with which members can surely be read one by one; the index tells whether of others."""
_TOGETHER: Final = 256
"""Indexes read whole at a time."""


class Parts:
    """Collects shards and runs of loose objects in order.

    Args:
        group: ``"webdataset"``: neighbours whose names agree up to the first dot of the base name are one sample, a dict by
            extension; None: each is a sample. Grouped objects follow the rule for members of samples: those that belong to none
            are left out.
        on_torn: ``"error"`` refuses objects of one sample that do not follow one another.
        gather: The objects come as a listing has them, so those of one sample are brought together.
        where: Where they are, for messages.
        root: What the keys of all objects begin with, and does not count as part of their names.
    """

    def __init__(
        self, group: Group, on_torn: OnTorn = "error", *, gather: bool = False, where: str = "", root: str = ""
    ) -> None:
        self.group = group
        self.done: list[Shard | LooseRun] = []
        self.left_out: dict[str, LeftOut] = {}
        """Objects that belong to no sample, by reason."""
        self._on_torn = on_torn
        self._gather = gather
        self._where = where
        self._root = root
        self._keys: list[str] = []
        self._sizes: list[int] = []
        self._etags: list[str] = []

    def add_object(self, key: str, size: int | None, etag: str) -> None:
        """The next object; its size in bytes and its ETag, where they are known."""
        self._keys.append(key)
        self._sizes.append(-1 if size is None else size)
        self._etags.append(etag)

    def add_shard(self, shard: Shard) -> None:
        """The next shard."""
        self._close_run()
        self.done.append(shard)

    def _close_run(self) -> None:
        if not self._keys:
            return
        kept, first = self._grouped() if self.group else (range(len(self._keys)), np.arange(len(self._keys) + 1))
        if len(kept):
            keys, etags = (tuple(column[i] for i in kept) for column in (self._keys, self._etags))
            sizes = np.array(self._sizes, dtype=np.int64)[np.asarray(kept)]
            self.done.append(LooseRun(keys, sizes, etags, first.astype(np.int64)))
        self._keys, self._sizes, self._etags = [], [], []

    def _grouped(self) -> tuple[Sequence[int], np.ndarray[Any, Any]]:
        """The objects that are members of samples, in order; and where samples begin among them, then their number."""
        order: list[int] = list(range(len(self._keys)))
        if self._gather:
            seen: dict[str, int] = {}
            order.sort(key=[seen.setdefault(sample_key(key), i) for i, key in enumerate(self._keys)].__getitem__)
        names = [self._keys[i].removeprefix(self._root) for i in order]
        grouping = group_names(names)
        add_left_out(self.left_out, grouping.left_out or {})
        if grouping.torn and self._on_torn == "error":
            self._refuse_torn(names)
        inside = grouping.groups != NO_SAMPLE
        groups = grouping.groups[inside].astype(np.int64)
        first = np.searchsorted(groups, np.arange(grouping.samples + 1))
        return [i for i, one in zip(order, inside.tolist(), strict=True) if one], first

    def _refuse_torn(self, names: Sequence[str]) -> None:
        for torn in torn_samples(names):
            if not torn.twice:  # what is listed twice is two samples
                raise FormatError(
                    f"sample {torn.key!r} is torn: {names[torn.first]!r} (object {torn.first}) and"
                    f" {names[torn.second]!r} (object {torn.second}) do not follow one another",
                    url=self._where or None,
                    hint='list the objects of a sample together; on_torn="split" reads each stretch of them as a sample',
                    key=torn.key,
                )

    def finish(self) -> list[Shard | LooseRun]:
        """All parts.

        Raises:
            FormatError: objects of one sample lie apart.
        """
        self._close_run()
        return self.done


def parts_of(entries: Iterable[ManifestEntry], parts: Parts) -> list[Shard | LooseRun]:
    """The parts that the entries of a manifest name; how many samples a shard has may be unknown yet (-1)."""
    for entry in entries:
        if entry["kind"] == "file":
            _check_numbers(entry["key"], size_bytes=entry.get("size_bytes"))
            parts.add_object(entry["key"], entry.get("size_bytes"), _etag(entry.get("etag")))
        elif entry["kind"] == "shard":
            meta: Any = entry.get("meta")
            count = entry.get("count")
            etag = _etag(meta.get("etag") if isinstance(meta, Mapping) else None)
            size = entry.get("size_bytes")
            _check_numbers(entry["archive_key"], count=count, size_bytes=size)
            known = count is not None and str(entry.get("compression") or "") in _PLAIN and not _says_compressed(entry)
            parts.add_shard(Shard(entry["archive_key"], count if known and count is not None else -1, etag, size or 0, count))
    return parts.finish()


def _says_compressed(entry: ShardEntry) -> bool:
    """By its name."""
    try:
        return infer_archive_format(entry["archive_key"])[1] is not None
    except ConfigError:
        return False


def _check_numbers(key: str, **numbers: Any) -> None:
    for name, value in numbers.items():
        if value is not None and not (type(value) is int and 0 <= value < MAX_SIZE):
            raise InvalidManifestError(f"{name} of {key!r} is {value!r}, no number of bytes or members", op="read")


def _etag(value: Any) -> str:
    return value.strip('"') if isinstance(value, str) else ""


def counted(
    store: ObjectStore, parts: list[Shard | LooseRun], group: Group, options: ArchiveOptions, left_out: dict[str, LeftOut]
) -> list[Shard | LooseRun]:
    """`parts` as they are in the store now, with the number of samples of each shard: from the heads of the indexes where the
    manifest does not tell.

    Args:
        store: Where they are.
        parts: Shards may lack their count.
        group: ``"webdataset"``: neighbours whose names agree up to the first dot of the base name are one sample, a dict by
            extension; None: each member (or object) is a sample.
        options: How shards without an index are read, and whether torn samples are refused.
        left_out: What the shards have that is not read is added here, by kind.

    Raises:
        ShardReadError: a shard has no usable index, cannot be read at random, or tears a sample.
    """
    early = {i: part for i, part in enumerate(parts) if isinstance(part, Shard)}
    unknown = {i: part for i, part in early.items() if group is not None or part.samples < 0}
    if len(early) > _FEW:
        early = unknown
    asked: tuple[Callable[[], Any], ...] = (partial(pinned, store, parts), partial(_heads, store, early))  # beside each other
    answers: list[Any] = list(map_ordered(lambda ask: ask(), asked, concurrency=2, name="s3loader-opening"))
    parts, heads = answers
    for i in early.keys() - unknown.keys():  # only so that they are there when the first samples are read
        _remember(store, early[i], heads.pop(i))
    doubtful = {i: part for i, part in enumerate(parts) if isinstance(part, Shard) and 0 <= part.now < BLOCK * part.samples}
    heads |= _heads(store, {i: part for i, part in doubtful.items() if i not in heads})
    shards = {i: part for i, part in enumerate(parts) if isinstance(part, Shard) and i in heads}
    missing = [shards[i] for i, head in heads.items() if isinstance(head, ObjectNotFoundError)]
    absent_indexes(store).difference_update(shard.key for shard in shards.values())
    made = make_indexes(store, missing, options) if missing else set()
    counts = {i: _counts(store, shards[i], head, options, made) for i, head in heads.items()}
    if group is not None:
        counts |= _of_names(store, shards, [i for i, one in counts.items() if one.samples is None], options)
    for i, one in counts.items():
        parts[i] = _with_counts(store, shards[i], one, group)
        for found in (one.not_files, one.not_in_samples if group is not None else {}):
            add_left_out(left_out, found)
    if group is not None and options.on_torn == "error":
        _refuse_torn(store, shards, counts, options)
    return parts


def _heads(store: ObjectStore, shards: Mapping[int, Shard]) -> dict[int, ReadResult | S3LoaderError]:
    """The first bytes of the index of each of these shards, by their numbers, or why there are none."""
    heads: dict[int, ReadResult | S3LoaderError] = {}
    size = max(_HEAD, min(_LARGE_HEAD, _HEADS // max(1, len(shards))))
    requests = [ReadRequest(index_key(shard.key), 0, size, tag=i) for i, shard in shards.items()]
    for answer in store.read_many(requests, errors="return") if requests else ():
        if isinstance(answer, ReadFailure):
            heads[answer.request.tag] = answer.error
        else:  # a copy: a view would keep a pooled buffer lent
            heads[answer.request.tag] = answer._replace(data=memoryview(bytes(answer.data)))
    return heads


def _remember(store: ObjectStore, shard: Shard, head: ReadResult | S3LoaderError) -> None:
    """Keep an index that came whole for its first use."""
    if isinstance(head, ReadResult) and len(head.data) == head.size:
        remember_index(store, shard.key, head.data)


def _counts(
    store: ObjectStore, shard: Shard, head: ReadResult | S3LoaderError, options: ArchiveOptions, made: set[str]
) -> IndexCounts:
    if isinstance(head, S3LoaderError) and not isinstance(head, ObjectNotFoundError):
        raise head
    try:
        counts = None if isinstance(head, S3LoaderError) or is_foreign(head.data) else read_counts(head.data, head.size)
    except ShardReadError as error:
        if not shard.automatic:  # what stands beside an archive of a manifest is not ours to replace
            url = f"{store.url}/{index_key(shard.key)}"
            raise ShardReadError(error.message, op="read", url=url, hint=error.hint) from error
        counts = None
    if counts is not None and _is_current(shard, counts):
        _remember(store, shard, head)
        return counts
    absent = isinstance(head, ObjectNotFoundError) and shard.key not in made
    return IndexCounts.of(current_index(store, shard, options, asked=absent))


def _is_current(shard: Shard, counts: IndexCounts) -> bool:
    """Whether an index need not be held against the archive: it is of its ETag, or manifest and index are of one version
    and the sizes equal."""
    if shard.now < 0 or counts.archive_etag == shard.pin:
        return True
    return bool(shard.etag) and (
        shard.size != shard.now or (counts.archive_size == shard.now and counts.archive_etag == shard.etag)
    )


def _with_counts(store: ObjectStore, shard: Shard, counts: IndexCounts, group: Group) -> Shard:
    url = f"{store.url}/{shard.key}"
    if shard.members is not None and shard.members != counts.members:
        raise ShardReadError(f"the index has {counts.members} members, the manifest says {shard.members}", op="read", url=url)
    if not counts.random_access:
        raise no_random_access(counts.compression or "", url)
    return replace(
        shard,
        samples=counts.members if group is None or counts.samples is None else counts.samples,
        etag=shard.etag or counts.archive_etag,
        size=shard.size or counts.archive_size,
        members=counts.members,
    )


def _whole(
    store: ObjectStore, shards: Mapping[int, Shard], numbers: Sequence[int], options: ArchiveOptions
) -> Iterable[tuple[int, ShardIndex]]:
    """Whole indexes, some at a time."""
    for low in range(0, len(numbers), _TOGETHER):
        requests = [ReadRequest(index_key(shards[i].key), tag=i) for i in numbers[low : low + _TOGETHER]]
        for answer in store.read_many(requests, errors="return"):
            number = answer.request.tag
            if isinstance(answer, ReadFailure) and not isinstance(answer.error, ObjectNotFoundError):
                raise answer.error
            data = None if isinstance(answer, ReadFailure) else bytes(answer.data)
            try:
                yield number, find_index(store, shards[number], options.index_dir, data, asked=True)
            except ShardReadError as error:
                url = f"{store.url}/{index_key(shards[number].key)}"
                raise ShardReadError(error.message, op="read", url=url, hint=error.hint) from error


def _of_names(
    store: ObjectStore, shards: Mapping[int, Shard], numbers: Sequence[int], options: ArchiveOptions
) -> dict[int, IndexCounts]:
    """Counts of indexes that do not tell their samples (earlier versions made them): by the names in them."""
    return {number: IndexCounts.of(index) for number, index in _whole(store, shards, numbers, options)}


def _refuse_torn(
    store: ObjectStore, shards: Mapping[int, Shard], counts: Mapping[int, IndexCounts], options: ArchiveOptions
) -> None:
    """Raise for the first shard that tears a sample, or the first two that hold parts of one.

    The key at a shard's end that is also at another one's start is a torn sample where the two have no extension in common;
    otherwise it is another sample of that name.
    """
    for number, one in counts.items():
        if one.torn:
            _, index = next(iter(_whole(store, shards, [number], options)))
            raise torn_error(index, f"{store.url}/{shards[number].key}")
    pairs = {number: one.edges for number, one in counts.items() if one.edges is not None}
    both = {first for first, _ in pairs.values()} & {last for _, last in pairs.values()}
    edges = Edges()
    suspects = sorted(number for number, pair in pairs.items() if both.intersection(pair))
    for number, index in _whole(store, shards, suspects, options):
        edges.add(shards[number].key, index)
    for key, ending, starting in edges.torn():
        raise torn_between(key, store.url, ending, starting)


class Edges:
    """The samples that shards begin and end with: one key at both, without an extension in common, is a torn sample."""

    def __init__(self) -> None:
        self._starting: dict[str, dict[frozenset[str], tuple[str, str]]] = {}
        self._ending: dict[str, dict[frozenset[str], tuple[str, str]]] = {}

    def add(self, shard: str, index: ShardIndex) -> None:
        """A shard and its index."""
        if not index.samples:
            return
        for found, sample, at in ((self._starting, 0, 0), (self._ending, index.samples - 1, -1)):
            names = [index.name(int(i)) for i in np.flatnonzero(index.groups == sample)]
            extensions = frozenset(map(extension_of, names))
            found.setdefault(sample_key(names[0]), {}).setdefault(extensions, (shard, names[at]))

    def merge(self, other: Edges) -> None:
        """Those of shards that another has looked at."""
        for found, more in ((self._starting, other._starting), (self._ending, other._ending)):
            for key, places in more.items():
                mine = found.setdefault(key, {})
                for extensions, place in places.items():
                    mine.setdefault(extensions, place)

    def torn(self) -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
        """The key of each torn sample, (shard, member) at the end of one, and at the start of another."""
        for key, ends in self._ending.items():
            for left, ending in ends.items():
                for right, starting in self._starting.get(key, {}).items():
                    if not left & right:
                        yield key, ending, starting
