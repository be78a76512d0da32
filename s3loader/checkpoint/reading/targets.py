"""Reading tensors: from a checkpoint's files into targets, every byte verified.

What is 1 MiB and more in one piece, in the file and in the target, goes straight from the socket into the target's memory
(a *run* of whole segments; where several processes of a node share the reading, one segment). Smaller neighbours are fetched
together, and what a target needs only a part of is read through a lent buffer; both are copied once.
"""

from __future__ import annotations

import itertools
import struct
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

from s3loader.checkpoint.format import segments
from s3loader.checkpoint.format.boxes import Overlap, intersect, linear, row_blocks
from s3loader.checkpoint.format.records import Chunk, box_of
from s3loader.checkpoint.reading.share import NodeShare
from s3loader.checkpoint.state.leaves import Target
from s3loader.checksum import crc32c, mismatch, once_more
from s3loader.dtypes import itemsize
from s3loader.errors import CheckpointError, IntegrityError
from s3loader.progress import Report
from s3loader.ranges import neighbours
from s3loader.store import ObjectStore
from s3loader.store.parts import even_parts
from s3loader.types import Buffer, ReadRequest
from s3loader.units import KIB, MIB

__all__ = ["DISTANT", "LEAST_READ", "MOST_READS", "DataFile", "read_targets", "verify_chunks"]

_DIRECT: Final = MIB
_GAP: Final = 64 * KIB
_TOGETHER: Final = 8 * MIB
_TOGETHER_FAR: Final = 4 * MIB
"""The same from a distant store, so that more connections have work."""
_BOX_BYTES: Final = 256 * MIB
_WINDOW: Final = 48 * MIB
"""Most bytes under way in memory that is lent for them..."""
_WINDOW_FAR: Final = 256 * MIB
"""...and from a distant store, as a loader has them."""
_IN_PLACE_WINDOW: Final = 256 * MIB
"""The same where nearly all of them go into the targets' own memory..."""
MOST_READS: Final = 64
"""At a time from a distant store."""
_IN_PLACE_WINDOW_S3: Final = MOST_READS * 16 * MIB
"""...and where it is our own client that receives them there: a request of a block on each connection."""
DISTANT: Final = 0.005
"""Seconds that a small request takes, from which on a store is distant."""
LEAST_READ: Final = 4 * MIB
"""Requests of so much keep a connection of 90 MB/s busy for longer than a distant store takes to the first byte."""


class DataFile(NamedTuple):
    """A data file as the store has it now."""

    key: str
    etag: str
    """Pins every read of this load to one version of the object."""


class _Memory:
    """A destination that several segments fill: one piece of a target, or the scratch of a strided box."""

    def __init__(self, open_memory: Callable[[], memoryview], done: Callable[[memoryview], None]) -> None:
        self._open, self._done = open_memory, done
        self._view: memoryview | None = None
        self.pending = 0

    @property
    def view(self) -> memoryview:
        if self._view is None:
            self._view = self._open()
        return self._view

    def arrived(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            view, self._view = self.view, None
            self._done(view)


class _Sink(NamedTuple):
    memory: _Memory
    at: int
    """Offset in the memory where the byte `low` goes."""
    low: int
    high: int
    """File offsets of the bytes wanted."""


@dataclass(slots=True)
class _Segment:
    low: int
    high: int
    crc: int
    name: str
    sinks: list[_Sink] = field(default_factory=list)
    found: int = 0
    """CRC32C of what has come of it, where it comes in parts."""

    def direct(self) -> _Sink | None:
        """The only sink, where it wants the whole segment."""
        only = self.sinks[0] if len(self.sinks) == 1 else None
        return only if only is not None and (only.low, only.high) == (self.low, self.high) else None


class _Fetch(NamedTuple):
    """What one request brings."""

    file: DataFile
    segments: Sequence[_Segment]
    """Where they go to memory that is lent, all of each; else the first and the last may be cut by `low` and `high`."""
    low: int
    high: int
    into: memoryview | None
    """Where the bytes go, which is where the segments' sinks want them."""


class _Plan:
    """Collects what to read, by file and segment."""

    def __init__(self, block: int) -> None:
        self._block = block
        self.by_file: dict[str, dict[int, _Segment]] = {}

    def want(self, chunk: Chunk, low: int, high: int, memory: _Memory, at: int) -> None:
        """Bytes ``[low, high)`` of the chunk go to ``memory[at:]``."""
        low, high = chunk.begin + low, chunk.begin + high
        file = self.by_file.setdefault(chunk.file, {})
        parts = segments.cut(chunk.begin, chunk.end, self._block)
        for number in segments.covering(chunk.begin, chunk.end, self._block, low, high):
            first, last = parts[number]
            segment = file.get(first)
            if segment is None:
                crc: int = struct.unpack_from("<I", chunk.crc, 4 * number)[0]
                segment = file[first] = _Segment(first, last, crc, chunk.name)
            sink_low, sink_high = max(low, first), min(high, last)
            segment.sinks.append(_Sink(memory, at + sink_low - low, sink_low, sink_high))
            memory.pending += 1

    def box(self, chunk: Chunk, overlap: Overlap, piece: _Memory, piece_shape: Sequence[int]) -> None:
        """One overlap of a chunk with a piece of a target."""
        size = itemsize(chunk.dtype)
        _, shape = box_of(chunk)
        low, high, flat = linear(overlap.source, overlap.shape, shape)
        at, _, flat_there = linear(overlap.target, overlap.shape, piece_shape)
        if flat and flat_there:
            self.want(chunk, low * size, high * size, piece, at * size)
            return
        for rows in row_blocks(overlap, shape, _BOX_BYTES // size):
            low, high, _ = linear(rows.source, rows.shape, shape)
            copy = _strided_copy(rows, low, shape, piece_shape, size, piece)
            piece.pending += 1
            scratch = _Memory(lambda n=(high - low) * size: memoryview(bytearray(n)), copy)  # type: ignore[misc]
            self.want(chunk, low * size, high * size, scratch, 0)


def _strided_copy(
    rows: Overlap, first: int, shape: Sequence[int], piece_shape: Sequence[int], size: int, piece: _Memory
) -> Callable[[memoryview], None]:
    """What to do when the elements from `first` on, which span `rows`, have arrived in a scratch buffer."""

    def copy(scratch: memoryview) -> None:
        import numpy as np

        strides = [size] * len(shape)
        for i in range(len(shape) - 2, -1, -1):
            strides[i] = strides[i + 1] * shape[i + 1]
        source = np.ndarray((*rows.shape, size), np.uint8, scratch, 0, (*strides, 1))
        target = np.frombuffer(piece.view, np.uint8).reshape((*piece_shape, size))
        target[tuple(slice(a, a + n) for a, n in zip(rows.target, rows.shape, strict=True))] = source
        piece.arrived()

    return copy


def read_targets(
    store: ObjectStore,
    files: Mapping[str, DataFile],
    block: int,
    wanted: Iterable[tuple[Sequence[Chunk], Target, Callable[[Any], None]]],
    *,
    verify: bool = True,
    share: NodeShare | None = None,
    report: Report | None = None,
    known: Mapping[str, memoryview] | None = None,
    latency: float = 0.0,
) -> int:
    """Fill every target from its chunks, then call its callback with the leaf's value.

    Args:
        store: Where the files are.
        files: Each file by the id that chunks use.
        block: The checkpoint's block size in bytes.
        wanted: Chunks of a tensor, the target it goes to, what to call when it is there.
        verify: Compare the checksum of every segment read.
        share: Reads once per node, where several processes of it want the same.
        report: Told of each request that has come.
        known: Whole files that are here already, by key.
        latency: Seconds that a small request takes: from 5 ms on, many connections are used from the first request on.

    Returns:
        Bytes fetched.

    Raises:
        IntegrityError: a checksum was wrong twice.
        CheckpointError: a target's shape or type is not the tensor's, or chunks do not cover it.
    """
    plan = _Plan(block)
    for chunks, target, done in wanted:
        _plan_target(plan, chunks, target, done)
    direct = store.engine == "direct"
    distant = direct and latency >= DISTANT
    groups = list(_groups(plan, files, _TOGETHER_FAR if distant else _TOGETHER, runs=share is None))
    total = 0 if report is None else _bytes_of(groups)
    come = 0

    def arrived(fetch: _Fetch, data: memoryview) -> int:
        nonlocal come
        size = _arrived(store, fetch, data, verify)
        if report is not None:
            come += size
            report(come, total, come)
        return size

    def deliver(group: _Group, data: Buffer) -> None:
        fetch: _Fetch = _request(*group).tag
        if fetch.into is not None:
            fetch.into[:] = data
        arrived(fetch, memoryview(data))

    fetched = 0
    if known:
        for file, wants in groups:
            if file.key in known:
                deliver((file, wants), known[file.key][wants[0].low : wants[-1].high])
                fetched += wants[-1].high - wants[0].low
        groups = [group for group in groups if group[0].key not in known]
    window = _window(groups, _IN_PLACE_WINDOW_S3 if direct else _IN_PLACE_WINDOW, _WINDOW_FAR if distant else _WINDOW)
    if share is None:
        part, size = segments.BLOCK, _bytes_of(groups)
        if distant:
            part = even_parts(size, segments.BLOCK, MOST_READS, LEAST_READ)
            store.open_ahead(min(MOST_READS, -(-size // LEAST_READ)), reads=True)
        for result in store.read_many((each for group in groups for each in _requests(*group, part)), max_bytes=window):
            fetched += arrived(result.request.tag, result.data)
        return fetched

    division = share.division(groups, lambda group: _name_of(store, *group), deliver)
    try:
        for result in store.read_many((_request(*group) for group in division.mine()), max_bytes=window):
            fetch: _Fetch = result.request.tag
            fetched += arrived(fetch, result.data)
            division.fetched((fetch.file, fetch.segments), result.data)
    finally:
        division.close()
    return fetched


def _bytes_of(groups: Iterable[_Group]) -> int:
    return sum(group[-1].high - group[0].low for _, group in groups)


def _window(groups: Iterable[_Group], in_place: int = _IN_PLACE_WINDOW, most_lent: int = _WINDOW) -> int:
    """Bytes that may be under way: `in_place` where nearly all goes straight to its target, fewer where memory is lent for
    them."""
    under_way: deque[tuple[int, int]] = deque()
    total = lent = 0
    for _, group in groups:
        size = group[-1].high - group[0].low
        needs = 0 if _in_place(group) else size
        under_way.append((size, needs))
        total, lent = total + size, lent + needs
        if lent > most_lent:
            return most_lent
        while total > in_place:
            size, needs = under_way.popleft()
            total, lent = total - size, lent - needs
    return in_place


def _in_place(group: Sequence[_Segment]) -> bool:
    """Whether all of it goes to where a target wants it, in one piece."""
    return group[0].direct() is not None and all(map(_follows, group, group[1:]))


def _follows(before: _Segment, segment: _Segment) -> bool:
    """Whether both are wanted whole, once, and one after the other, in the file and in the target."""
    first, second = before.direct(), segment.direct()
    return (
        first is not None
        and second is not None
        and before.high == segment.low
        and first.memory is second.memory
        and first.at + first.high - first.low == second.at
    )


def _arrived(store: ObjectStore, fetch: _Fetch, answer: memoryview, verify: bool) -> int:
    """Verify what came and hand it to where it belongs; returns its bytes.

    Of a segment that comes in parts they come in their order, and the last one ends it.
    """
    for segment in fetch.segments:
        low, high = max(segment.low, fetch.low), min(segment.high, fetch.high)
        data = answer[low - fetch.low : high - fetch.low]
        if fetch.into is not None:
            if verify:
                segment.found = crc32c(data, segment.found)
            if high < segment.high:
                break
            if verify and segment.found != segment.crc:
                sink = segment.sinks[0]
                whole = sink.memory.view[sink.at : sink.at + sink.high - sink.low]
                _proven(store, fetch.file, segment, whole, whole)
            segment.sinks[0].memory.arrived()
            continue
        if verify:
            data = _proven(store, fetch.file, segment, data)
        for sink in segment.sinks:
            piece = data[sink.low - segment.low : sink.high - segment.low]
            sink.memory.view[sink.at : sink.at + len(piece)] = piece
            sink.memory.arrived()
    return fetch.high - fetch.low


def _plan_target(plan: _Plan, chunks: Sequence[Chunk], target: Target, done: Callable[[Any], None]) -> None:
    left = len(target.pieces)

    def piece_done(_: memoryview) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            done(target.finish())

    for piece in target.pieces:
        memory = _Memory(piece.open, piece_done)
        memory.pending = 1  # held until all of it is planned
        covered = 0
        for chunk in chunks:
            if chunk.dtype != target.dtype or tuple(chunk.shape) != tuple(target.shape):
                told = f"{chunk.dtype} {chunk.shape} in the checkpoint, {target.dtype} {list(target.shape)} in the target"
                raise CheckpointError(
                    f"{chunk.name!r} is {told}",
                    hint="give a target of the shape that was saved; `s3loader ckpt inspect` tells it",
                )
            if chunk.box is None and piece.shape == target.shape:  # all of it: by far the most frequent case
                covered += _volume(piece.shape)
                plan.want(chunk, 0, chunk.end - chunk.begin, memory, 0)
                continue
            overlap = intersect(box_of(chunk), (piece.offset, piece.shape))
            if overlap is not None:
                covered += _volume(overlap.shape)
                plan.box(chunk, overlap, memory, piece.shape)
        if covered != _volume(piece.shape):
            name = chunks[0].name if chunks else "a tensor"
            raise CheckpointError(
                f"{name!r}: the checkpoint has {covered} of {_volume(piece.shape)} elements of the box {piece.offset}",
                hint="the index does not cover the tensor; `s3loader ckpt verify` the step, go back to another one",
            )
        memory.arrived()
    if not target.pieces:
        done(target.finish())


def _volume(shape: Sequence[int]) -> int:
    volume = 1
    for n in shape:
        volume *= n
    return volume


_Group: TypeAlias = tuple[DataFile, Sequence[_Segment]]


def _name_of(store: ObjectStore, file: DataFile, group: Sequence[_Segment]) -> tuple[str, str, str, int, int]:
    return store.url, file.key, file.etag, group[0].low, group[-1].high


def _groups(plan: _Plan, files: Mapping[str, DataFile], together: int, *, runs: bool) -> Iterator[_Group]:
    """What is fetched together, in the order of the files: runs that go straight to a target, and neighbours that are small."""
    for file_id in sorted(plan.by_file):
        file = files[file_id]
        wanted = sorted(plan.by_file.pop(file_id).values(), key=lambda segment: segment.low)
        firsts = [i for i, segment in enumerate(wanted) if not (runs and i and _follows(wanted[i - 1], segment))]
        units = [wanted[first:end] for first, end in itertools.pairwise([*firsts, len(wanted)])]
        starts, ends = [unit[0].low for unit in units], [unit[-1].high for unit in units]
        alone = [unit[-1].high - unit[0].low >= _DIRECT and unit[0].direct() is not None for unit in units]
        for first, end in neighbours(starts, ends, max_gap=_GAP, max_size=together, alone=alone):
            yield file, [segment for unit in units[first:end] for segment in unit]


def _request(file: DataFile, group: Sequence[_Segment]) -> ReadRequest:
    low, high = group[0].low, group[-1].high
    into = None
    if _in_place(group):
        sink = group[0].sinks[0]
        into = sink.memory.view[sink.at : sink.at + high - low]
    return ReadRequest(file.key, low, high, file.etag or None, into, _Fetch(file, group, low, high, into))


def _requests(file: DataFile, group: Sequence[_Segment], part: int) -> Iterator[ReadRequest]:
    """The requests of a group; what goes straight to its target comes in parts of about `part` bytes, so that all connections
    have work."""
    whole = _request(file, group)
    into, low = whole.into, group[0].low
    size = group[-1].high - low
    count = (size + part // 2) // part
    if into is None or count < 2:
        yield whole
        return
    lows, highs = [segment.low for segment in group], [segment.high for segment in group]
    for number in range(count):
        first, last = size * number // count, size * (number + 1) // count
        view = memoryview(into)[first:last]
        of = group[bisect_right(highs, low + first) : bisect_left(lows, low + last)]
        fetch = _Fetch(file, of, low + first, low + last, view)
        yield ReadRequest(file.key, low + first, low + last, file.etag or None, view, fetch)


def _proven(
    store: ObjectStore, file: DataFile, segment: _Segment, data: memoryview, into: memoryview | None = None
) -> memoryview:
    """The bytes of a segment, fetched once more (into `into`, where that is given) if their checksum is wrong."""

    def again() -> memoryview:
        if into is None:
            return memoryview(store.get_range(file.key, segment.low, segment.high, if_match=file.etag or None))
        store.read_into(file.key, segment.low, into, if_match=file.etag or None)
        return into

    def error(found: int) -> IntegrityError:
        return mismatch(
            f"{segment.name!r}: bytes {segment.low}-{segment.high} of {file.key} are not what was saved",
            f"{store.url}/{file.key}",
            segment.low,
            segment.high,
            name=segment.name,
            hint="restore an earlier step, or pass on_corruption='previous'",
        )

    return data if crc32c(data) == segment.crc else once_more(segment.crc, again, error)


def verify_chunks(
    store: ObjectStore, files: Mapping[str, DataFile], block: int, chunks: Iterable[Chunk]
) -> tuple[int, list[IntegrityError]]:
    """Read all of `chunks` and compare checksums, keeping nothing.

    Returns:
        Bytes read, and an error for each segment that is wrong.
    """

    def requests() -> Iterator[ReadRequest]:
        for chunk in sorted(chunks, key=lambda c: (c.file, c.begin)):
            for number, (low, high) in enumerate(segments.cut(chunk.begin, chunk.end, block)):
                crc: int = struct.unpack_from("<I", chunk.crc, 4 * number)[0]
                file = files[chunk.file]
                yield ReadRequest(file.key, low, high, file.etag or None, None, (file, _Segment(low, high, crc, chunk.name)))

    total, wrong = 0, []
    for result in store.read_many(requests(), max_bytes=_WINDOW):
        file, segment = result.request.tag
        total += len(result.data)
        try:
            _proven(store, file, segment, result.data)
        except IntegrityError as error:
            wrong.append(error)
    return total, wrong
