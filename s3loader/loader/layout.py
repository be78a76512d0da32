"""Where the bytes of each sample are: one `Layout` per shard, or per run of loose objects; and from samples to byte ranges:
what to ask a store for, so that all wanted members can be cut from it, and where what comes waits. No I/O."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from s3loader.errors import IntegrityError, ObjectNotFoundError, S3LoaderError, ShardReadError, TruncatedError
from s3loader.plan.budget import GET_WORTH
from s3loader.plan.permutation import Int64Array
from s3loader.shard.index import ShardIndex
from s3loader.shard.samples import NO_SAMPLE, extension_of
from s3loader.types import ReadRequest
from s3loader.units import KIB

__all__ = [
    "MEMBER_GAP",
    "Layout",
    "LayoutCache",
    "LooseRun",
    "MemberSavings",
    "OpenBlock",
    "SampleBuffer",
    "SampleRead",
    "Shard",
    "group_starts",
    "plan_reads",
    "wrong_size",
]

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
    def content(self) -> int:
        """Bytes that its samples take in memory, about."""
        return self.size

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

    def first_member(self, number: int) -> int:
        """The first member of a sample."""
        return int(self.first[number])

    def extent(self, number: int) -> tuple[int, int]:
        """(first byte, bytes to the end of its last member) of a sample; -1 where these are unknown."""
        first, last = int(self.first[number]), int(self.first[number + 1])
        offsets, sizes = self.offsets[first:last], self.sizes[first:last]
        start, end = int(offsets.min()), int((offsets + sizes).max())
        return start, -1 if int(sizes.min()) < 0 else end - start

    def own_reads(self, numbers: Int64Array, target: SampleBuffer, at: int) -> Iterator[SampleRead] | None:
        """The reads for rising `numbers`, where they are not planned as those of all members are (`plan_reads`)."""
        return None

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


# -- from samples to byte ranges -------------------------------------------------------------------

_LOOSE_TOGETHER: Final = 16
"""Loose samples in one read: what is done once per read costs as much as a small sample."""


class SampleBuffer:
    """Where fetched samples wait until a batch takes them, one slot each: three parallel lists.

    No object is made per sample before it is handed out: tens of thousands of waiting memoryviews or dicts would
    keep the garbage collector busy.

    Attributes:
        source: Per slot a memoryview, a builder (an object with ``build(number)``), a `Failed`, or None while the sample
            is not here.
        starts: Per slot the first byte in the memoryview; for a builder, the number to call `build` with.
        ends: Per slot the end in the memoryview, exclusive; for a builder, the bytes of the sample's members.
        left: How many samples are not here yet.
    """

    __slots__ = ("ends", "left", "source", "starts")

    def __init__(self, length: int) -> None:
        self.source: list[Any] = [None] * length
        self.starts: list[int] = [0] * length
        self.ends: list[int] = [0] * length
        self.left = length

    def put(self, at: int, source: list[Any], starts: list[int], ends: list[int]) -> None:
        """Fill the slots from `at` on."""
        stop = at + len(source)
        self.source[at:stop] = source
        self.starts[at:stop] = starts
        self.ends[at:stop] = ends
        self.left -= len(source)

    def take(self, i: int) -> Any:
        """The sample in slot `i`."""
        source = self.source[i]
        if type(source) is memoryview:
            return source[self.starts[i] : self.ends[i]]
        return source.build(self.starts[i]) if hasattr(source, "build") else source


class OpenBlock(SampleBuffer):
    """A block of the order: neighbouring samples that are fetched whole and used over a stretch of positions.

    Attributes:
        start: Number of its first sample in the dataset.
        opened: Position of the epoch at which it was first needed.
        until: No position of the epoch from here on needs it.
    """

    __slots__ = ("opened", "start", "until")

    def __init__(self, start: int, length: int, opened: int, until: int) -> None:
        super().__init__(length)
        self.start = start
        self.opened = opened
        self.until = until


class SampleRead:
    """Some samples of one part of a dataset that come with one request; several where members are left out or linked, and
    one for each member where they are loose objects.

    Attributes:
        layout: Of the part; None where `error` is set.
        numbers: Numbers of the samples in the part, rising; int64.
        target: Where they go.
        at: Slot of the first of them; the others follow.
        start: First byte of the range, in the (uncompressed) tar stream; 0 of loose objects.
        end: Its end, exclusive; of loose objects their bytes.
        ranges: The ``(start, end)`` ranges, where there may be several; else None.
        error: Set where nothing can be fetched: every sample fails with it.
    """

    __slots__ = ("at", "end", "error", "layout", "numbers", "ranges", "start", "target")

    def __init__(
        self,
        layout: Layout | None,
        numbers: Int64Array,
        target: SampleBuffer,
        at: int,
        start: int = 0,
        end: int = 0,
        error: S3LoaderError | None = None,
    ) -> None:
        self.layout = layout
        self.numbers = numbers
        self.target = target
        self.at = at
        self.start = start
        self.end = end
        self.error = error
        self.ranges: list[tuple[int, int]] | None = None
        if layout is not None and (layout.inner_gap > MEMBER_GAP or layout.linked):
            self.ranges = self._split(layout)

    def _split(self, layout: Layout) -> list[tuple[int, int]]:
        """Ranges of the members, joined over gaps up to `MEMBER_GAP`."""
        members = self.members()
        members = members[layout.sizes[members] > 0]
        starts = layout.offsets[members]
        ends = starts + layout.sizes[members]
        if layout.linked:
            order = np.argsort(starts, kind="stable")
            starts, ends = starts[order], np.maximum.accumulate(ends[order])
        breaks = np.flatnonzero(starts[1:] - ends[:-1] > MEMBER_GAP) + 1
        bounds = [0, *breaks.tolist(), len(members)]
        return [(int(starts[low]), int(ends[high - 1])) for low, high in itertools.pairwise(bounds) if low < high]

    @property
    def nbytes(self) -> int:
        """Bytes that it fetches, uncompressed; of objects of unknown size an estimate."""
        return self.end - self.start

    def requests(self) -> list[ReadRequest]:
        """What to read; nothing for empty members."""
        layout = self.layout
        if layout is None:
            return []
        if layout.index is None:
            sizes = layout.sizes
            return [
                ReadRequest(layout.key(i), 0, None if sizes[i] < 0 else int(sizes[i]), layout.etag_of(i))
                for i in self.members().tolist()
                if layout.asks(i)
            ]
        if self.start == self.end:
            return []
        ranges = [(self.start, self.end)] if self.ranges is None else self.ranges
        return [ReadRequest(layout.key(0), *layout.index.fetch_range(*one), layout.etag or None) for one in ranges]

    def members(self) -> Int64Array:
        """Members of all samples, in order."""
        assert self.layout is not None
        first = self.layout.first
        low, high = first[self.numbers], first[self.numbers + 1]
        if len(low) == high[-1] - low[0]:  # one each, and neighbours
            return np.arange(int(low[0]), int(high[-1]), dtype=np.int64)
        lengths = high - low
        ends = np.cumsum(lengths)
        members: Int64Array = np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(low - (ends - lengths), lengths)
        return members


def plan_reads(
    layout: Layout | S3LoaderError, numbers: Int64Array, target: SampleBuffer, at: int, *, max_gap: int, max_size: int
) -> Iterator[SampleRead]:
    """Reads for rising `numbers` of one part: neighbours within `max_gap` bytes together, up to `max_size` bytes.

    A read holds whole samples, so nothing is ever joined from two answers; a sample larger than
    `max_size` is a read of its own. The samples go to the slots of `target` from `at` on.
    """
    if isinstance(layout, S3LoaderError):
        yield SampleRead(None, numbers, target, at, error=layout)
        return
    if (reads := layout.own_reads(numbers, target, at)) is not None:
        yield from reads
        return
    if layout.loose:
        sums = np.concatenate([[0], np.cumsum(np.where(layout.sizes < 0, GET_WORTH, layout.sizes))])
        ends = np.cumsum(sums[layout.first[numbers + 1]] - sums[layout.first[numbers]])
        i = 0
        while i < len(numbers):
            before = int(ends[i - 1]) if i else 0
            j = min(max(i + 1, int(np.searchsorted(ends, before + max_size, side="right"))), i + _LOOSE_TOGETHER)
            yield SampleRead(layout, numbers[i:j], target, at + i, 0, int(ends[j - 1]) - before)
            i = j
        return
    if layout.linked:
        yield from _linked_reads(layout, numbers, target, at, max_size)
        return
    low, high = int(numbers[0]), int(numbers[-1])
    gap = max_gap if layout.wanted is None else max(max_gap, MEMBER_GAP)
    if high - low + 1 == len(numbers) and layout.largest_gap <= gap:  # neighbours: the usual case, mostly one read
        start, end = layout.span(low, high)
        if end - start <= max_size or low == high:
            yield SampleRead(layout, numbers, target, at, start, end)
            return
    first, last = layout.first[numbers], layout.first[numbers + 1] - 1
    starts, ends = layout.offsets[first], layout.offsets[last] + layout.sizes[last]
    # Between neighbours lie only members that nobody wants; else other samples, which others may want.
    limits = max_gap if gap == max_gap else np.where(np.diff(numbers) == 1, gap, max_gap)
    breaks = np.flatnonzero(starts[1:] - ends[:-1] > limits) + 1
    i = 0
    for stop in (*breaks.tolist(), len(numbers)):
        while i < stop:
            j = max(i + 1, i + int(np.searchsorted(ends[i:stop], starts[i] + max_size, side="right")))
            yield SampleRead(layout, numbers[i:j], target, at + i, int(starts[i]), int(ends[j - 1]))
            i = j


def _linked_reads(layout: Layout, numbers: Int64Array, target: SampleBuffer, at: int, max_size: int) -> Iterator[SampleRead]:
    """Reads of a shard with links: as many samples as have `max_size` bytes of content, each with its ranges."""
    sums = np.concatenate([[0], np.cumsum(layout.sizes)])
    ends = np.cumsum(sums[layout.first[numbers + 1]] - sums[layout.first[numbers]])
    i = 0
    while i < len(numbers):
        before = int(ends[i - 1]) if i else 0
        j = max(i + 1, int(np.searchsorted(ends, before + max_size, side="right")))
        yield SampleRead(layout, numbers[i:j], target, at + i, 0, int(ends[j - 1]) - before)
        i = j
