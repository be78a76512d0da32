"""From samples to byte ranges: what to ask a store for, so that all wanted members can be cut from it, and where what comes
waits. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from s3loader.errors import S3LoaderError
from s3loader.loader.layout import MEMBER_GAP, Layout
from s3loader.plan.budget import GET_WORTH
from s3loader.plan.permutation import Int64Array
from s3loader.types import ReadRequest

__all__ = ["OpenBlock", "SampleBuffer", "SampleRead", "plan_reads"]

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
