"""Reading tensors: from a checkpoint's files into targets, every byte verified.

Whole segments of 1 MiB and more go straight from the socket into the target's memory. Smaller
neighbours are fetched together, and what a target needs only a part of is read through a
lent buffer; both are copied once.
"""

from __future__ import annotations

import struct
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
from s3loader.types import Buffer, ReadRequest
from s3loader.units import KIB, MIB

__all__ = ["DataFile", "read_targets", "verify_chunks"]

_DIRECT: Final = MIB
_LAST: Final = -1
"""Of `_Fetch.rest`: the last part of its segment."""
_GAP: Final = 64 * KIB
_TOGETHER: Final = 8 * MIB
_BOX_BYTES: Final = 256 * MIB
_WINDOW: Final = 48 * MIB
"""Most bytes under way in memory that is lent for them."""
_IN_PLACE_WINDOW: Final = 256 * MIB
"""The same where nearly all of them go into the targets' own memory..."""
_CONNECTIONS: Final = 64
_IN_PLACE_WINDOW_S3: Final = _CONNECTIONS * 16 * MIB
"""...and where it is our own client that receives them there: a request of a block on each connection."""
_DISTANT: Final = 0.005
_LEAST_PART: Final = 4 * MIB
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
    file: DataFile
    segments: Sequence[_Segment]
    into: memoryview | None
    rest: int = 0
    """Where it is a part of its only segment: the bytes of the parts after it, `_LAST` of the last one."""


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
        latency: Seconds that a small request takes: from 5 ms on, large segments come in parts over many connections.

    Returns:
        Bytes fetched.

    Raises:
        IntegrityError: a checksum was wrong twice.
        CheckpointError: a target's shape or type is not the tensor's, or chunks do not cover it.
    """
    plan = _Plan(block)
    for chunks, target, done in wanted:
        _plan_target(plan, chunks, target, done)
    groups = list(_groups(plan, files))
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
        arrived(fetch, memoryview(data) if fetch.into is None else fetch.into)

    fetched = 0
    if known:
        for file, wants in groups:
            if file.key in known:
                deliver((file, wants), known[file.key][wants[0].low : wants[-1].high])
                fetched += wants[-1].high - wants[0].low
        groups = [group for group in groups if group[0].key not in known]
    direct = store.engine == "direct"
    window = _window(groups, _IN_PLACE_WINDOW_S3 if direct else _IN_PLACE_WINDOW)
    if share is None:
        distant = direct and latency >= _DISTANT
        part = max(_LEAST_PART, _bytes_of(groups) // (2 * _CONNECTIONS)) if distant else 1 << 62
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


def _window(groups: Iterable[_Group], in_place: int = _IN_PLACE_WINDOW) -> int:
    """Bytes that may be under way: `in_place` where nearly all goes straight to its target, fewer where memory is lent for
    them."""
    under_way: deque[tuple[int, int]] = deque()
    total = lent = 0
    for _, group in groups:
        size = group[-1].high - group[0].low
        needs = 0 if _in_place(group) else size
        under_way.append((size, needs))
        total, lent = total + size, lent + needs
        if lent > _WINDOW:
            return _WINDOW
        while total > in_place:
            size, needs = under_way.popleft()
            total, lent = total - size, lent - needs
    return in_place


def _in_place(group: Sequence[_Segment]) -> bool:
    return len(group) == 1 and group[0].direct() is not None


def _arrived(store: ObjectStore, fetch: _Fetch, answer: memoryview, verify: bool) -> int:
    """Verify what came and hand it to where it belongs; returns its bytes."""
    if fetch.rest and fetch.into is not None:
        return _part_arrived(store, fetch, fetch.into, verify)
    base = fetch.segments[0].low
    for segment in fetch.segments:
        data = answer[segment.low - base : segment.high - base]
        if verify:
            data = _proven(store, fetch.file, segment, data, data if fetch.into is not None else None)
        for sink in segment.sinks:
            if fetch.into is None:
                piece = data[sink.low - segment.low : sink.high - segment.low]
                sink.memory.view[sink.at : sink.at + len(piece)] = piece
            sink.memory.arrived()
    return fetch.segments[-1].high - base


def _part_arrived(store: ObjectStore, fetch: _Fetch, data: memoryview, verify: bool) -> int:
    """The same of a part of a segment; parts come in their order, and the last one ends it."""
    segment = fetch.segments[0]
    if verify:
        segment.found = crc32c(data, segment.found)
    if fetch.rest == _LAST:
        sink = segment.sinks[0]
        if verify and segment.found != segment.crc:
            whole = sink.memory.view[sink.at : sink.at + sink.high - sink.low]
            _proven(store, fetch.file, segment, whole, whole)
        sink.memory.arrived()
    return len(data)


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


def _groups(plan: _Plan, files: Mapping[str, DataFile]) -> Iterator[_Group]:
    """What is fetched by one request each, in the order of the files."""
    for file_id in sorted(plan.by_file):
        file = files[file_id]
        wanted = sorted(plan.by_file.pop(file_id).values(), key=lambda segment: segment.low)
        starts, ends = [segment.low for segment in wanted], [segment.high for segment in wanted]
        alone = [_alone(segment) for segment in wanted]
        for first, end in neighbours(starts, ends, max_gap=_GAP, max_size=_TOGETHER, alone=alone):
            yield file, wanted[first:end]


def _alone(segment: _Segment) -> bool:
    return segment.high - segment.low >= _DIRECT and segment.direct() is not None


def _request(file: DataFile, group: Sequence[_Segment]) -> ReadRequest:
    into = None
    if len(group) == 1 and (sink := group[0].direct()) is not None:
        into = sink.memory.view[sink.at : sink.at + sink.high - sink.low]
    fetch = _Fetch(file, group, into)
    return ReadRequest(file.key, group[0].low, group[-1].high, file.etag or None, into, fetch)


def _requests(file: DataFile, group: Sequence[_Segment], part: int) -> Iterator[ReadRequest]:
    """The requests of a group; one segment that goes straight to its target comes in parts of about `part` bytes, so that all
    connections have work."""
    whole = _request(file, group)
    into, low = whole.into, group[0].low
    size = group[-1].high - low
    count = min(size // part, _CONNECTIONS)
    if into is None or count < 2:
        yield whole
        return
    for number in range(count):
        first, last = size * number // count, size * (number + 1) // count
        view = memoryview(into)[first:last]
        rest = size - last or _LAST
        yield ReadRequest(file.key, low + first, low + last, file.etag or None, view, _Fetch(file, group, view, rest))


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
