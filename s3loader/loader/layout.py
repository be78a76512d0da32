"""Where the bytes of each sample are: one `Layout` per shard, or per run of loose objects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from s3loader.errors import IntegrityError, ObjectNotFoundError, S3LoaderError, ShardReadError, TruncatedError
from s3loader.plan.permutation import Int64Array
from s3loader.shard.index import ShardIndex
from s3loader.shard.samples import NO_SAMPLE, extension_of
from s3loader.units import KIB

__all__ = ["MEMBER_GAP", "Layout", "LayoutCache", "LooseRun", "MemberSavings", "Shard", "group_starts", "wrong_size"]

MEMBER_GAP: Final = 256 * KIB
"""Members that are left out cost less to read than another request, up to so many bytes."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar archive of a dataset."""

    key: str
    samples: int
    etag: str = ""
    """As the manifest or the index recorded it: part of what identifies the data. Empty where neither did."""
    size: int = 0
    """Bytes."""
    members: int | None = None
    """As the manifest counts them; checked against the index."""
    pin: str = ""
    """The ETag it had when the dataset was opened, where that is known: reads take this version only."""
    now: int = -1
    """Bytes it had then; -1 where that is not known."""
    automatic: bool = False
    """No manifest vouches for it: its index is made from it where there is none that fits."""

    @property
    def if_match(self) -> str | None:
        """The ETag of the version to read, where one is known."""
        return self.pin or self.etag or None


@dataclass(frozen=True, slots=True)
class LooseRun:
    """Loose objects that follow one another in a dataset; a sample is one object, or a group of neighbours."""

    keys: Sequence[str]
    sizes: Int64Array
    """Bytes; -1 where unknown."""
    etags: Sequence[str]
    """As they were recorded; empty where they were not."""
    first: Int64Array
    """First object of each sample, then their number: int64, samples + 1."""
    pins: Sequence[str] = ()
    """The ETags they had when the dataset was opened: reads take these versions only. Empty: those recorded."""
    wrong: Mapping[int, int] = field(default_factory=dict)
    """Objects that had another size then, and which; -1: empty ones that were not there."""
    now: Int64Array | None = None
    """Bytes they had then; -1 where that is unknown."""

    @property
    def known_sizes(self) -> Int64Array:
        """Bytes of each object: as recorded, else as it was when the dataset was opened; -1 where neither is known."""
        return self.sizes if self.now is None else np.where(self.sizes < 0, self.now, self.sizes)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self.first) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Samples of one part of a dataset as ranges of members, and members as ranges of bytes."""

    first: Int64Array
    """First member of each sample, then the number of members: int64, samples + 1."""
    offsets: Int64Array
    sizes: Int64Array
    """-1: not known beforehand (loose objects only)."""
    crc32c: npt.NDArray[np.uint32] | None
    source: Shard | LooseRun
    etag: str
    index: ShardIndex | None = None
    nbytes: int = field(default=0)
    """Memory held, roughly."""
    wanted: frozenset[str] | None = None
    """Extensions of the members that samples have; None: all."""
    lower: bool = False
    """Extensions in small letters."""
    largest_gap: int = field(init=False, default=0)
    """Most bytes between a sample and the next, in a shard."""
    inner_gap: int = field(init=False, default=0)
    """Most bytes between two members of a sample, in a shard."""
    linked: bool = field(init=False, default=False)
    """Members do not lie one behind the other: links stand for bytes elsewhere in the shard."""

    def __post_init__(self) -> None:
        if self.index is None or len(self.offsets) < 2:
            return
        gaps = self.offsets[1:] - (self.offsets[:-1] + self.sizes[:-1])
        if int(gaps.min()) < 0:
            object.__setattr__(self, "linked", True)
            return
        between = self.first[1:-1] - 1
        if len(between):
            object.__setattr__(self, "largest_gap", int(gaps[between].max()))
            gaps[between] = 0
        object.__setattr__(self, "inner_gap", int(gaps.max()))

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self.first) - 1

    @property
    def source_bytes(self) -> int:
        """Bytes of the whole part, not compressed; those of a filtered one in proportion to its samples."""
        if self.index is None:
            assert isinstance(self.source, LooseRun)
            whole = int(np.maximum(self.source.sizes, 0).sum())
        else:
            tar = self.index.frames_tar
            whole = self.index.archive_size if tar is None else int(tar[-1])
        return whole * self.samples // max(1, self.source.samples)

    def span(self, low: int, high: int) -> tuple[int, int]:
        """(first byte, end) of samples `low` to `high` (included) of a shard."""
        last = self.first[high + 1] - 1
        return int(self.offsets[self.first[low]]), int(self.offsets[last] + self.sizes[last])

    @property
    def loose(self) -> bool:
        """Whether each member is an object of its own."""
        return self.index is None

    def key(self, member: int) -> str:
        """Key of the object that holds `member`."""
        return self.source.keys[member] if isinstance(self.source, LooseRun) else self.source.key

    def name(self, member: int) -> str:
        """Name of `member` in its shard; the key of a loose object."""
        if self.index is not None:
            return self.index.name(member)
        assert isinstance(self.source, LooseRun)
        return self.source.keys[member]

    def etag_of(self, member: int) -> str | None:
        """ETag of the object that holds `member`, where one is known."""
        if isinstance(self.source, LooseRun):
            return (self.source.pins or self.source.etags)[member] or None
        return self.etag or None

    def wrong_size(self, member: int) -> int | None:
        """Bytes that a loose object has in place of those it should have, where that is known."""
        return self.source.wrong.get(member) if isinstance(self.source, LooseRun) else None

    def asks(self, member: int) -> bool:
        """Whether a loose object has to be fetched: not for nothing, and not where its size is wrong already."""
        return bool(self.sizes[member] != 0) and self.wrong_size(member) is None

    @classmethod
    def of_shard(cls, shard: Shard, index: ShardIndex, *, grouped: bool, lower: bool = False) -> Layout:
        """The layout of a shard; grouped, without the members that belong to no sample."""
        first = np.arange(len(index) + 1, dtype=np.int64)
        offsets, sizes = index.offsets.astype(np.int64), index.sizes.astype(np.int64)
        etag = shard.if_match or index.etag
        nbytes = 2 * offsets.nbytes * 2 + first.nbytes
        if grouped:
            inside = np.flatnonzero(index.groups != NO_SAMPLE).astype(np.int64)
            starts = group_starts(index.groups[inside])
            if len(inside) < len(index):
                whole = cls(first, offsets, sizes, index.crc32c, shard, etag, index, nbytes, None, lower)
                return _Selected.build(whole, inside, starts)
            first = starts
        return cls(first, offsets, sizes, index.crc32c, shard, etag, index, nbytes, None, lower)

    def select(self, samples: Int64Array) -> Layout:
        """Only some of the samples, by number, in rising order."""
        lengths = (self.first[1:] - self.first[:-1])[samples]
        ends = np.cumsum(lengths)
        members = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
        members += np.repeat(self.first[samples] - (ends - lengths), lengths)
        return _Selected.build(self, members, np.concatenate([[0], ends]).astype(np.int64))

    def only(self, wanted: frozenset[str]) -> Layout:
        """The same samples with only the members that have one of these extensions.

        A sample that has none of them keeps its first member, without a byte, for its name.

        Raises:
            ShardReadError: no member at all has one of them.
        """
        names = [self.name(member) for member in range(int(self.first[-1]))]
        extensions = [extension_of(name).lower() if self.lower else extension_of(name) for name in names]
        kept = np.array([extension in wanted for extension in extensions], dtype=bool)
        if len(kept) and not kept.any():
            there = ", ".join(sorted(set(extensions))[:8])
            raise ShardReadError(
                f"no member is one of members={sorted(wanted)}; there are {there}",
                hint="members= takes what follows the first dot of a member's name",
            )
        counts = np.add.reduceat(kept, self.first[:-1], dtype=np.int64) if self.samples else np.zeros(0, dtype=np.int64)
        bare = self.first[:-1][counts == 0]
        kept[bare] = True
        members = np.flatnonzero(kept).astype(np.int64)
        first = np.concatenate([[0], np.cumsum(np.maximum(counts, 1))]).astype(np.int64)
        return _Selected.build(self, members, first, wanted, np.searchsorted(members, bare))

    @classmethod
    def of_loose(cls, run: LooseRun, *, lower: bool = False) -> Layout:
        """The layout of loose objects."""
        return cls(run.first, np.zeros(len(run.keys), dtype=np.int64), run.known_sizes, None, run, "", lower=lower)


@dataclass(frozen=True, slots=True, eq=False)
class _Selected(Layout):
    members: Int64Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @classmethod
    def build(
        cls,
        whole: Layout,
        members: Int64Array,
        first: Int64Array,
        wanted: frozenset[str] | None = None,
        bare: Int64Array | Sequence[int] = (),
    ) -> _Selected:
        """`members` of a layout; those at `bare` without their bytes."""
        crc, sizes, at = None if whole.crc32c is None else whole.crc32c[members], whole.sizes[members], np.array(bare, np.int64)
        sizes[at] = 0
        if crc is not None:
            crc[at] = 0  # the CRC32C of nothing
        return cls(
            first,
            whole.offsets[members],
            sizes,
            crc,
            whole.source,
            whole.etag,
            whole.index,
            whole.nbytes + members.nbytes,
            whole.wanted if wanted is None else wanted,
            whole.lower,
            members=whole.members[members] if isinstance(whole, _Selected) else members,
        )

    def key(self, member: int) -> str:
        return Layout.key(self, int(self.members[member]))

    def name(self, member: int) -> str:
        return Layout.name(self, int(self.members[member]))

    def etag_of(self, member: int) -> str | None:
        return Layout.etag_of(self, int(self.members[member]))

    def wrong_size(self, member: int) -> int | None:
        return Layout.wrong_size(self, int(self.members[member]))


def group_starts(groups: npt.NDArray[np.uint32]) -> Int64Array:
    """First member of each group, then the number of members, from non-decreasing group numbers."""
    edges = np.flatnonzero(np.diff(groups.astype(np.int64))) + 1
    return np.concatenate([np.zeros(min(1, len(groups)), dtype=np.int64), edges, [len(groups)]]).astype(np.int64)


class LayoutCache:
    """The layouts used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held: OrderedDict[int, Layout] = OrderedDict()
        self._bytes = 0

    def __contains__(self, part: int) -> bool:
        return part in self._held

    def get(self, part: int) -> Layout | None:
        """The layout of `part`, if it is here."""
        layout = self._held.get(part)
        if layout is not None:
            self._held.move_to_end(part)
        return layout

    def put(self, part: int, layout: Layout) -> None:
        """Keep `layout`; the ones not used for longest make room, but never the newest."""
        old = self._held.pop(part, None)
        self._bytes += layout.nbytes - (old.nbytes if old else 0)
        self._held[part] = layout
        while self._bytes > self.max_bytes and len(self._held) > 1:
            _, gone = self._held.popitem(last=False)
            self._bytes -= gone.nbytes


class MemberSavings(NamedTuple):
    """What leaving members out saves, seen on some parts of a dataset: shares of the bytes of all members."""

    used: float
    fetched: float
    """With those that are read over."""
    splits: float
    """Ranges per sample beyond the first, where the members of a sample lie far apart."""

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> MemberSavings:
        """Those of whole parts that are read from end to end."""
        whole = used = fetched = samples = splits = 0
        for layout in layouts:
            starts, ends = layout.offsets, layout.offsets + layout.sizes
            gaps = np.maximum(starts[1:] - ends[:-1], 0)  # a link may stand for bytes that lie before it
            mine = int(np.maximum(layout.sizes, 0).sum())
            samples, used = samples + layout.samples, used + mine
            if layout.index is None:
                whole, fetched = whole + layout.source_bytes, fetched + mine
                continue
            whole += layout.source_bytes
            fetched += mine + int(gaps[gaps <= MEMBER_GAP].sum())
            splits += int((gaps > MEMBER_GAP).sum())
        if not whole:
            return cls(1.0, 1.0, 0.0)
        return cls(min(1.0, used / whole), min(1.0, fetched / whole), splits / max(1, samples))


def wrong_size(key: str, expected: int, size: int) -> S3LoaderError:
    """The error of an object that has `size` bytes (-1: is not there) and not those that manifest or index tell."""
    if size < 0:
        return ObjectNotFoundError("the object is not there", op="read", url=key)
    kind = TruncatedError if size < expected else IntegrityError
    hint = "it was replaced, or its copy is not complete: restore it, or write the manifest anew"
    return kind(f"it has {size} bytes, the dataset expects {expected}", op="read", url=key, hint=hint)
