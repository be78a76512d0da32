"""From samples to byte ranges: what to ask a store for, so that all wanted members can be cut from it. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from s3loader.errors import S3LoaderError
from s3loader.loader.layout import Layout
from s3loader.plan.permutation import Int64Array
from s3loader.types import ReadRequest
from s3loader.units import KIB

__all__ = ["MEMBER_GAP", "Block", "Piece", "cut_into_pieces"]

MEMBER_GAP: Final = 256 * KIB
"""Members that are left out cost less to read than another request, up to so many bytes."""

_LOOSE_TOGETHER: Final = 16
"""Loose samples in one piece: what is done once per piece costs as much as a small sample."""


class Slots:
    """Where fetched samples wait, as where their bytes are: three parallel lists.

    No object is made per sample before it is handed out: tens of thousands of waiting memoryviews or dicts would
    keep the garbage collector busy.

    Attributes:
        source: A memoryview, something with `build`, `Failed`, or None while the sample is not here.
        starts: First byte in a memoryview; for `build`, its argument.
        ends: End in a memoryview; for `build`, the bytes of the sample's members.
        left: How many are not here yet.
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


class Block(Slots):
    """Neighbouring samples that are fetched together and used over a stretch of positions."""

    __slots__ = ("start", "until")

    def __init__(self, start: int, length: int, until: int) -> None:
        super().__init__(length)
        self.start = start
        self.until = until
        """No position from here on needs it."""


class Piece:
    """Some samples of one part of a dataset that are cut from one range (or, loose, from one object each member).

    Where members are left out there may be several ranges.

    Attributes:
        numbers: Their numbers in the part, rising.
        target: Where they go.
        at: Slot of the first of them.
        start: First byte of the range, in the (uncompressed) tar stream.
        end: Its end.
        ranges: The ranges, where there are several.
        error: Set where nothing can be fetched: every sample fails with it.
    """

    __slots__ = ("at", "end", "error", "layout", "numbers", "ranges", "start", "target")

    def __init__(
        self,
        layout: Layout | None,
        numbers: Int64Array,
        target: Slots,
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
        if layout is not None and layout.inner_gap > MEMBER_GAP:
            self.ranges = self._split(layout)

    def _split(self, layout: Layout) -> list[tuple[int, int]]:
        """Ranges of the members, joined over gaps up to `MEMBER_GAP`."""
        members = self.members()
        members = members[layout.sizes[members] > 0]
        starts = layout.offsets[members]
        ends = starts + layout.sizes[members]
        breaks = np.flatnonzero(starts[1:] - ends[:-1] > MEMBER_GAP) + 1
        bounds = [0, *breaks.tolist(), len(members)]
        return [(int(starts[low]), int(ends[high - 1])) for low, high in itertools.pairwise(bounds) if low < high]

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
                if sizes[i] != 0
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


def cut_into_pieces(
    layout: Layout | S3LoaderError, numbers: Int64Array, target: Slots, at: int, *, max_gap: int, max_size: int
) -> Iterator[Piece]:
    """Pieces for rising `numbers` of one part: neighbours within `max_gap` bytes together, up to `max_size` bytes.

    A piece holds whole samples, so nothing is ever joined from two answers; a sample larger than
    `max_size` is a piece of its own. The samples go to the slots of `target` from `at` on.
    """
    if isinstance(layout, S3LoaderError):
        yield Piece(None, numbers, target, at, error=layout)
        return
    if layout.loose:
        sums = np.concatenate([[0], np.cumsum(np.maximum(layout.sizes, 0))])
        ends = np.cumsum(sums[layout.first[numbers + 1]] - sums[layout.first[numbers]])
        i = 0
        while i < len(numbers):
            before = int(ends[i - 1]) if i else 0
            j = min(max(i + 1, int(np.searchsorted(ends, before + max_size, side="right"))), i + _LOOSE_TOGETHER)
            yield Piece(layout, numbers[i:j], target, at + i)
            i = j
        return
    low, high = int(numbers[0]), int(numbers[-1])
    gap = max_gap if layout.wanted is None else max(max_gap, MEMBER_GAP)
    if high - low + 1 == len(numbers) and layout.largest_gap <= gap:  # neighbours: the usual case, mostly one piece
        start, end = layout.span(low, high)
        if end - start <= max_size or low == high:
            yield Piece(layout, numbers, target, at, start, end)
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
            yield Piece(layout, numbers[i:j], target, at + i, int(starts[i]), int(ends[j - 1]))
            i = j
