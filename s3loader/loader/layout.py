"""Where the bytes of each sample are: one `Layout` per shard, or per run of loose objects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from s3loader.errors import ShardReadError
from s3loader.plan.permutation import Int64Array
from s3loader.shard.index import ShardIndex, sample_key

__all__ = ["Layout", "LayoutCache", "LooseRun", "Shard", "group_starts"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar archive of a dataset."""

    key: str
    samples: int
    etag: str = ""
    """Empty where it is not known beforehand; then the index knows it."""
    size: int = 0
    """Bytes."""
    members: int | None = None
    """As the manifest counts them; checked against the index."""


@dataclass(frozen=True, slots=True)
class LooseRun:
    """Loose objects that follow one another in a dataset; a sample is one object, or a group of neighbours."""

    keys: Sequence[str]
    sizes: Int64Array
    """Bytes; -1 where unknown."""
    etags: Sequence[str]
    first: Int64Array
    """First object of each sample, then their number: int64, samples + 1."""

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
    largest_gap: int = field(init=False, default=0)
    """Most bytes between a sample and the next, in a shard."""
    inner_gap: int = field(init=False, default=0)
    """Most bytes between two members of a sample, where some are left out."""

    def __post_init__(self) -> None:
        if self.index is not None and self.samples > 1:
            first, last = self.first[:-1], self.first[1:] - 1
            gaps = self.offsets[first[1:]] - (self.offsets[last[:-1]] + self.sizes[last[:-1]])
            object.__setattr__(self, "largest_gap", int(gaps.max()))
        if self.index is not None and self.wanted is not None and len(self.offsets) > 1:
            gaps = self.offsets[1:] - (self.offsets[:-1] + self.sizes[:-1])
            gaps[self.first[1:-1] - 1] = 0
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
            whole, of = int(np.maximum(self.source.sizes, 0).sum()), self.source.samples
        else:
            tar = self.index.frames_tar
            whole, of = self.index.archive_size if tar is None else int(tar[-1]), self.index.samples
        return whole * self.samples // max(1, of)

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
            return self.source.etags[member] or None
        return self.etag or None

    @classmethod
    def of_shard(cls, shard: Shard, index: ShardIndex, *, grouped: bool, selected: Int64Array | None = None) -> Layout:
        """The layout of a shard; with `selected`, only these of its samples."""
        members = len(index)
        first = group_starts(index.groups) if grouped else np.arange(members + 1, dtype=np.int64)
        offsets, sizes = index.offsets.astype(np.int64), index.sizes.astype(np.int64)
        layout = cls(
            first, offsets, sizes, index.crc32c, shard, shard.etag or index.etag, index, 2 * offsets.nbytes * 2 + first.nbytes
        )
        return layout if selected is None else layout.select(selected)

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
        extensions = [name[len(sample_key(name)) + 1 :] for name in names]
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
    def of_loose(cls, run: LooseRun) -> Layout:
        """The layout of loose objects."""
        return cls(run.first, np.zeros(len(run.keys), dtype=np.int64), run.sizes, None, run, "")


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
            members=whole.members[members] if isinstance(whole, _Selected) else members,
        )

    def key(self, member: int) -> str:
        return Layout.key(self, int(self.members[member]))

    def name(self, member: int) -> str:
        return Layout.name(self, int(self.members[member]))

    def etag_of(self, member: int) -> str | None:
        return Layout.etag_of(self, int(self.members[member]))


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
