"""From fetched bytes to samples: decompress, verify, slice without copying, group by name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from s3loader.errors import FormatError, IntegrityError, S3LoaderError, ShardReadError, TruncatedError
from s3loader.loader.layout import Layout
from s3loader.loader.mds_format import MdsShard
from s3loader.loader.pieces import Piece
from s3loader.plan.permutation import Int64Array
from s3loader.shard.index import sample_key

__all__ = ["Cut", "Failed", "cut"]


class Failed:
    """In place of a sample: why there is none. Raised when its turn comes."""

    __slots__ = ("error", "member")

    def __init__(self, error: S3LoaderError, member: str = "") -> None:
        self.error = error
        self.member = member


class Cut(NamedTuple):
    """The samples of a piece, as `Slots.put` takes them."""

    source: list[Any]
    starts: list[int]
    ends: list[int]
    doubtful: bool
    """A checksum or length did not fit: another copy of the bytes may be better."""

    @classmethod
    def failed(cls, error: S3LoaderError, count: int, *, doubtful: bool = False) -> Cut:
        """All `count` samples fail with `error`."""
        return cls([Failed(error)] * count, [0] * count, [0] * count, doubtful)


class Groups:
    """Samples of several members each, built as dicts when they are handed out."""

    __slots__ = ("_bounds", "_ends", "_names", "_source", "_starts", "_url", "_wanted")

    def __init__(
        self,
        bounds: list[int],
        names: list[str],
        source: list[Any],
        starts: list[int],
        ends: list[int],
        url: str,
        wanted: frozenset[str] | None,
    ) -> None:
        self._wanted = wanted
        self._bounds = bounds
        self._names = names
        self._source = source
        self._starts = starts
        self._ends = ends
        self._url = url

    def build(self, i: int) -> Any:
        """``__key__``, and each member by what follows the first dot of its base name."""
        low, high = self._bounds[i], self._bounds[i + 1]
        key = sample_key(self._names[low])
        sample: dict[str, Any] = {"__key__": key}
        at = len(key) + 1
        for member in range(low, high):
            name, source = self._names[member], self._source[member]
            if type(source) is not memoryview:
                return source
            extension = name[at:]
            if self._wanted is not None and extension not in self._wanted:
                continue  # it stands for a sample that has none of them
            if extension in sample:
                return Failed(FormatError(f"two members of sample {key!r} are called {name!r}", url=self._url), name)
            sample[extension] = source[self._starts[member] : self._ends[member]]
        return sample


class Rows:
    """Samples of an MDS shard, their columns decoded when they are handed out."""

    __slots__ = ("_layout", "_members", "_places")

    def __init__(self, layout: Layout, members: list[int], places: _Places) -> None:
        self._layout = layout
        self._members = members
        self._places = places

    def build(self, i: int) -> Any:
        """``__key__``, and each column by its name."""
        source, starts, ends = self._places
        name, shard = self._layout.name(self._members[i]), self._layout.source
        assert isinstance(shard, MdsShard)
        try:
            return shard.row(name, source[i][starts[i] : ends[i]])
        except S3LoaderError as error:
            return Failed(error, name)


def cut(piece: Piece, bodies: Sequence[memoryview | Failed], *, grouped: bool, verify: bool) -> Cut:
    """Verify what came for `piece` and find its samples in it; nothing is copied.

    Args:
        piece: What was asked for.
        bodies: What came for each of its requests.
        grouped: Make dicts of neighbours.
        verify: Check checksums.
    """
    layout = piece.layout
    assert layout is not None
    members = piece.members()
    if not layout.loose:
        for body in bodies:
            if isinstance(body, Failed):
                return Cut.failed(body.error, len(piece.numbers))
    try:
        source, starts, ends = _loose(layout, members, bodies) if layout.loose else _slices(layout, piece, members, bodies)
    except S3LoaderError as error:
        return Cut.failed(error, len(piece.numbers), doubtful=isinstance(error, IntegrityError))
    bad = _mismatches(layout, members, source, starts, ends) if verify and layout.crc32c is not None else []
    for i in bad:
        source[i] = _corrupt(layout, int(members[i]))
    if isinstance(layout.source, MdsShard):
        rows = Rows(layout, members.tolist(), (source, starts, ends))
        return Cut([rows] * len(members), list(range(len(members))), layout.sizes[members].tolist(), False)
    if not grouped:
        return Cut(source, starts, ends, bool(bad))
    lengths = layout.first[piece.numbers + 1] - layout.first[piece.numbers]
    bounds = [0, *np.cumsum(lengths).tolist()]
    names = [layout.name(i) for i in members.tolist()]
    groups = Groups(bounds, names, source, starts, ends, layout.key(int(members[0])), layout.wanted)
    count = len(piece.numbers)
    sums = np.concatenate([[0], np.cumsum(np.array(ends, dtype=np.int64) - starts)])
    return Cut([groups] * count, list(range(count)), np.diff(sums[bounds]).tolist(), bool(bad))


_Places: TypeAlias = tuple[list[Any], list[int], list[int]]


def _slices(layout: Layout, piece: Piece, members: Int64Array, bodies: Sequence[Any]) -> _Places:
    assert layout.index is not None
    if piece.ranges is None:
        base, data = _range(layout, piece.start, piece.end, bodies[0] if bodies else memoryview(b""))
        starts = layout.offsets[members] - base
        return [data] * len(members), starts.tolist(), (starts + layout.sizes[members]).tolist()
    pairs = zip(piece.ranges, bodies, strict=True)
    parts = [_range(layout, start, end, body) for (start, end), body in pairs] or [(0, memoryview(b""))]
    which = np.searchsorted([start for start, _ in piece.ranges], layout.offsets[members], side="right") - 1
    which = np.maximum(which, 0)  # a member without bytes may lie before all of them
    starts = layout.offsets[members] - np.array([base for base, _ in parts], dtype=np.int64)[which]
    starts[layout.sizes[members] == 0] = 0
    return [parts[k][1] for k in which.tolist()], starts.tolist(), (starts + layout.sizes[members]).tolist()


def _range(layout: Layout, start: int, end: int, data: memoryview) -> tuple[int, memoryview]:
    """(tar offset of its first byte, plain bytes) of what came for bytes ``[start, end)`` of the tar stream."""
    base = start
    if layout.index is not None and layout.index.compression is not None and start < end:
        base, data = _inflate(layout, start, end, data)
    if len(data) < end - base:
        raise TruncatedError(f"{end - base} bytes were expected at {base}, {len(data)} came", op="read", url=layout.key(0))
    return base, data


def _inflate(layout: Layout, start: int, end: int, packed: memoryview) -> tuple[int, memoryview]:
    """(tar offset, plain bytes) of the frames around bytes ``[start, end)`` of the tar stream."""
    import zstandard

    index = layout.index
    assert index is not None
    if index.frames is None or index.frames_tar is None:
        raise ShardReadError(f"{index.compression} shards cannot be read at random", op="read", url=layout.key(0))
    first = int(np.searchsorted(index.frames_tar, start, side="right")) - 1
    last = int(np.searchsorted(index.frames_tar, end, side="left"))
    inflater = zstandard.ZstdDecompressor()
    out = bytearray()
    cuts = (index.frames[first : last + 1].astype(np.int64) - int(index.frames[first])).tolist()
    try:
        for low, high in itertools.pairwise(cuts):
            out += inflater.decompress(packed[low:high], max_output_size=1 << 30)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"a zstd frame does not decompress: {error}", op="read", url=layout.key(0)) from error
    return int(index.frames_tar[first]), memoryview(out).toreadonly()


def _loose(layout: Layout, members: Int64Array, bodies: Sequence[memoryview | Failed]) -> _Places:
    views: list[Any] = []
    ends, given = [], iter(bodies)
    for i, expected in zip(members.tolist(), layout.sizes[members].tolist(), strict=True):
        view = memoryview(b"") if expected == 0 else next(given)
        size = 0 if isinstance(view, Failed) else len(view)
        if not isinstance(view, Failed) and expected >= 0 and size != expected:
            text = f"it has {size} bytes, the dataset expects {expected}"
            view, size = Failed(TruncatedError(text, op="read", url=layout.key(i)), layout.name(i)), 0
        views.append(view)
        ends.append(size)
    return views, [0] * len(views), ends


def _mismatches(layout: Layout, members: Int64Array, source: list[Any], starts: list[int], ends: list[int]) -> list[int]:
    from awscrt.checksums import crc32c  # the bare function: this loop runs for every sample

    assert layout.crc32c is not None
    expected = layout.crc32c[members].tolist()
    rows = enumerate(zip(source, starts, ends, expected, strict=True))
    return [i for i, (data, start, end, crc) in rows if crc32c(data[start:end]) != crc]


def _corrupt(layout: Layout, member: int) -> Failed:
    start = int(layout.offsets[member])
    end = start + int(layout.sizes[member])
    name = layout.name(member)
    error = IntegrityError(
        f"member {name!r}, bytes [{start}, {end}), does not match its CRC32C",
        op="read",
        url=layout.key(member),
        member=name,
        range=(start, end),
        hint="the shard was damaged where it is stored, or changed without a new index",
    )
    return Failed(error, name)
