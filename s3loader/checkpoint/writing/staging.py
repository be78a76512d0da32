"""Staging: state is copied once, into reused part-sized buffers, and goes to the store from there.

The caller's thread only copies, with others beside it (`copying`). Upload threads take the full buffers, compute
the checksums of the segments in them and send them, so `save` returns after one copy of the state,
or, where the state is larger than the budget, when the last part of it was copied.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import struct
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from s3loader.checkpoint.format import segments
from s3loader.checkpoint.format.layout import data_id
from s3loader.checkpoint.format.records import Chunk, FileRecord
from s3loader.checkpoint.format.segments import crc64, joined_hash
from s3loader.checkpoint.options import CheckpointOptions
from s3loader.checkpoint.state.leaves import Piece, fresh_memory
from s3loader.checkpoint.writing.copying import Copier
from s3loader.checksum import crc32c
from s3loader.dtypes import itemsize, nbytes
from s3loader.errors import CheckpointError
from s3loader.fetch.safetensors import encode_header
from s3loader.store import ObjectStore
from s3loader.store.parts import LEAST_PART, even_parts
from s3loader.types import PartResult

__all__ = [
    "BufferPool",
    "FilePlan",
    "Kept",
    "Piece",
    "SavedPiece",
    "StagedPart",
    "part_size_of",
    "plan_files",
    "stage",
]


def part_size_of(options: CheckpointOptions, store: ObjectStore) -> Callable[[int], int]:
    """Bytes of each part by the bytes of all files. Only our own client begins with as many connections as there are parts;
    and where the staging memory does not hold all of them, smaller ones bring nothing."""

    def part_size(total: int) -> int:
        most = options.part_size
        if store.engine != "direct" or not most < total <= options.staging_budget:
            return most
        return even_parts(total, most, options.concurrency, LEAST_PART)

    return part_size


class BufferPool:
    """Buffers of about one size, at most `budget` bytes of them (but two at least), kept for the next save."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.memory: Callable[[int], memoryview] = fresh_memory
        """Makes new buffers."""
        self._free: deque[memoryview] = deque()
        self._made = self._bytes = 0
        self._lock = threading.Lock()
        self._waiting = False
        self._wakings: queue.SimpleQueue[None] = queue.SimpleQueue()  # atomic to signals

    @property
    def allocated(self) -> int:
        """Bytes held, whether in use or not."""
        return self._bytes

    def holds(self, count: int, size: int) -> bool:
        """Whether so many buffers of `size` bytes may be in use at a time."""
        return count <= max(2, self.budget // size)

    def take(self, size: int) -> memoryview | None:
        """A buffer of `size` bytes or up to twice as many; None where all are in use and the budget is used up."""
        with contextlib.suppress(IndexError):
            while True:
                buffer = self._free.pop()
                if size <= len(buffer) <= 2 * size:
                    return buffer
                self._drop(buffer)  # of another state
                del buffer
        with self._lock:
            if self._made >= 2 and self._bytes + size > self.budget:
                return None
            self._made += 1
            self._bytes += size
        return self.memory(size)

    def _drop(self, buffer: memoryview) -> None:
        with self._lock:
            self._made -= 1
            self._bytes -= len(buffer)

    def acquire(self, size: int, stopped: Callable[[], bool], exhausted: Callable[[], None]) -> memoryview | None:
        """As `take`; where the budget is used up, calls `exhausted` and waits for one. None as soon as `stopped()`."""
        try:
            while not stopped():
                buffer = self.take(size)
                if buffer is not None:
                    return buffer
                exhausted()
                self._waiting = True
                with contextlib.suppress(queue.Empty):
                    if not self._free:
                        self._wakings.get(timeout=0.2)
            return None
        finally:
            self._waiting = False

    def release(self, buffer: memoryview) -> None:
        """Give a buffer back."""
        self._free.append(buffer)
        self.wake()

    def wake(self) -> None:
        """Let those who wait look at their `stopped()` again."""
        if self._waiting:
            self._wakings.put(None)

    def clear(self) -> None:
        """Let go of the buffers that are not in use."""
        with contextlib.suppress(IndexError):
            while True:
                self._drop(self._free.pop())


@dataclass(slots=True)
class SavedPiece:
    """One piece of a leaf, in the place it gets in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    piece: Piece
    begin: int = 0
    end: int = 0
    crcs: list[int] = field(default_factory=list)
    """CRC32C of what each part has of each segment (`segments.pieces`)."""
    crcs64: list[int] = field(default_factory=list)
    """CRC64NVME of the same, where the content is to be recognised again."""

    def chunk(self, file: FilePlan) -> Chunk:
        """The record of it, once its checksums are there."""
        whole = self.piece.shape == self.shape
        crcs = segments.joined(self.crcs, self.begin, self.end, file.block, file.part)
        return Chunk(
            name=self.name,
            dtype=self.dtype,
            shape=list(self.shape),
            file=file.name,
            begin=self.begin,
            end=self.end,
            crc=struct.pack(f"<{len(crcs)}I", *crcs),
            offset=None if whole else list(self.piece.offset),
            box=None if whole else list(self.piece.shape),
            hash=self._hash(file),
        )

    def _hash(self, file: FilePlan) -> bytes:
        if not self.crcs64:
            return b""
        sizes = [high - low for low, high in segments.pieces(self.begin, self.end, file.block, file.part)]
        return joined_hash(zip(self.crcs, self.crcs64, sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Kept:
    """What an earlier attempt has left of a file."""

    attempt: str
    key: str
    etag: str = ""
    """Of the finished file."""
    upload_id: str = ""
    """Of the open upload; empty: the file is finished."""
    parts: Mapping[int, PartResult] = field(default_factory=dict)
    """What the open upload has, by number."""


@dataclass(slots=True)
class FilePlan:
    """A file to be written: header, then pieces."""

    id: str
    header: bytes
    """As it is written: where the file is taken over it has the id of the attempt that began it."""
    pieces: list[SavedPiece]
    size: int
    block: int
    part: int
    """Bytes of each part that it is staged and sent in, but for the last."""
    header_crcs: list[int]
    own_header: bytes
    kept: Kept | None = None
    """What is taken over of an upload that an earlier attempt has left."""

    @property
    def name(self) -> str:
        """How parts and index name it: its id, or the key it has with the attempt that it was taken over from."""
        return self.kept.key if self.kept is not None else self.id

    @property
    def parts(self) -> int:
        """How many parts it has."""
        return -(-self.size // self.part)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to write."""
        return self.kept is not None and not self.kept.upload_id

    def adopt(self, kept: Kept | None, own_attempt: str = "") -> None:
        """Go on with what another attempt has left (None: with nothing). The header stays as long as it was."""
        self.kept = kept
        self.header = self.own_header
        if kept is not None:  # the metadata comes first, so the first match is it
            self.header = self.own_header.replace(own_attempt.encode(), kept.attempt.encode(), 1)

    def let_go(self) -> None:
        """Let go of the caller's arrays."""
        for saved in self.pieces:
            saved.piece = saved.piece._replace(open=_staged_already, device=None)

    def record(self) -> FileRecord:
        """The record of it, once its checksums are there."""
        crcs = segments.joined(self.header_crcs, 0, len(self.header), self.block, self.part)
        crc = struct.pack(f"<{len(crcs)}I", *crcs)
        return FileRecord(id=self.name, size=self.size, header=len(self.header), crc=crc)


def plan_files(
    pieces: Sequence[SavedPiece],
    rank: int,
    file_size: int,
    block: int,
    metadata: dict[str, str],
    *,
    hashed: bool,
    part_of: Callable[[int], int] | None = None,
) -> list[FilePlan]:
    """Lay `pieces` out in files of about `file_size` bytes (a larger piece has a file of its own).

    Wider element types come first, so that every tensor in a file is aligned to its element.

    Args:
        pieces: What to save.
        rank: Whose.
        file_size: Bytes.
        block: Of the checkpoint.
        metadata: Of each file.
        hashed: Whether the content is to be recognised again.
        part_of: How many bytes each part has, given the bytes of all files; default a block.
    """
    ordered = sorted(pieces, key=lambda p: -itemsize(p.dtype))
    groups: list[list[SavedPiece]] = []
    filled = 0
    names: set[str] = set()
    for piece in ordered:
        size = nbytes(piece.dtype, piece.piece.shape)
        if not groups or (filled and filled + size > file_size) or piece.name in names:
            groups.append([])
            filled, names = 0, set()
        groups[-1].append(piece)
        names.add(piece.name)
        filled += size
    plans = []
    for number, group in enumerate(groups):
        rows = ((p.name, p.dtype, p.piece.shape) for p in group)
        header, spans = encode_header(rows, _with_boxes(group, metadata) or None)
        for piece, (begin, end) in zip(group, spans, strict=True):
            piece.begin, piece.end = begin, end
        plans.append(FilePlan(data_id(rank, number), header, group, spans[-1][1], block, block, [], header))
    part = part_of(sum(plan.size for plan in plans)) if part_of is not None else block
    for plan in plans:
        plan.part = part
        plan.header_crcs = [0] * len(segments.pieces(0, len(plan.header), block, part))
        for piece in plan.pieces:
            piece.crcs = [0] * len(segments.pieces(piece.begin, piece.end, block, part))
            piece.crcs64 = [0] * len(piece.crcs) if hashed else []
    return plans


def _with_boxes(group: Sequence[SavedPiece], metadata: dict[str, str]) -> dict[str, str]:
    """Metadata of a file; where it holds parts of larger tensors, torch's `DCP_SHARDING_INFO` says which."""
    import json

    boxes = {p.name: {"saved_offsets": list(p.piece.offset)} for p in group if p.piece.shape != p.shape}
    return {**metadata, "DCP_SHARDING_INFO": json.dumps(boxes, separators=(",", ":"))} if boxes else metadata


@dataclass(slots=True)
class StagedPart:
    """A part of a file in a staging buffer."""

    file: FilePlan
    number: int
    """1-based."""
    buffer: memoryview
    data: memoryview
    """The filled beginning of `buffer`."""
    checks: list[tuple[list[int], list[int], int, int, int]]
    """``(crcs, crcs64, index, low, high)``: where to put the checksums of ``data[low:high]``."""

    @property
    def begin(self) -> int:
        """Where it begins in the file."""
        return (self.number - 1) * self.file.part

    def head(self) -> None:
        """Write the file's header, as it is now, over the one in it."""
        have = self.file.header[self.begin : self.begin + len(self.data)]
        self.data[: len(have)] = have

    def checksum(self, whole: str | None = None) -> None:
        """Compute the checksums of what is in it.

        Args:
            whole: CRC32C of all of `data` as S3 writes it, where it was computed already: then the largest piece, which mostly
                is nearly all of it, is not looked at again.
        """
        largest = max(self.checks, key=lambda check: check[4] - check[3]) if whole is not None else None
        before = after = 0
        for check in self.checks:
            crcs, crcs64, index, low, high = check
            if crcs64:
                crcs64[index] = crc64(self.data[low:high])
            if check is largest:
                before, after = after, 0
                continue
            crcs[index] = crc32c(self.data[low:high])
            if largest is not None:
                after = segments.combined(after, crcs[index], high - low)
        if largest is not None and whole is not None:
            told = int.from_bytes(base64.b64decode(whole), "big")
            crcs, _, index, low, high = largest
            crcs[index] = segments.middle(told, before, high - low, after, len(self.data) - high)


def stage(
    plan: FilePlan,
    pool: BufferPool,
    stopped: Callable[[], bool],
    exhausted: Callable[[], None],
    *,
    again: bool = False,
    copier: Copier | None = None,
) -> Generator[StagedPart, None, None]:
    """Copy a file's bytes into buffers of the pool, part after part; ends early once `stopped()`.

    Calls `exhausted` when it has to wait for a buffer. Lets go of the caller's arrays, unless they will be staged `again`.
    With a `copier` the copies go on beside each other, and parts are given out only when all buffers are in use, and at the
    end; without, each as soon as it is full.

    Raises:
        CheckpointError: a leaf gave another number of bytes than its type and shape say.
    """
    _choose_memory(plan, pool)
    copies = copier or Copier(1)
    size = min(plan.part, plan.size)
    part: StagedPart | None = None
    full: list[StagedPart] = []
    try:
        for source, begin, end, crcs, crcs64 in _sources(plan, again):
            copy = source(copies)
            for number, (first, last) in enumerate(segments.pieces(begin, end, plan.block, plan.part)):
                at = first % plan.part
                if part is None or at == 0:
                    if part is not None:
                        full.append(part)
                        part = None
                    if stopped():
                        return
                    buffer = pool.take(size) if copier is not None else None
                    if buffer is None:
                        yield from _settled(full, copies)
                        buffer = pool.acquire(size, stopped, exhausted)
                    if buffer is None:
                        return
                    part = StagedPart(plan, first // plan.part + 1, buffer, buffer[:0], [])
                copy(part.buffer[at : at + last - first], first - begin)
                part.checks.append((crcs, crcs64, number, at, at + last - first))
                part.data = part.buffer[: at + last - first]
            del copy, source
        if part is not None:
            full.append(part)
            part = None
        yield from _settled(full, copies)
    finally:
        left = [*full, part] if part is not None else full
        if left:
            try:
                copies.settle()  # until then they are written to
            finally:
                for unused in left:
                    pool.release(unused.buffer)


def _settled(full: list[StagedPart], copies: Copier) -> Iterator[StagedPart]:
    """Give out the parts that are full, as soon as they are."""
    copies.settle()
    full.reverse()
    while full:
        yield full.pop()


_Copying: TypeAlias = Callable[[memoryview, int], None]
"""Begins to copy the bytes of a source from an offset on."""


def _sources(plan: FilePlan, again: bool) -> Iterator[tuple[Callable[[Copier], _Copying], int, int, list[int], list[int]]]:
    """What the file is made of: how to copy it, begin and end in the file, where its checksums go."""
    header = memoryview(plan.header)
    yield (lambda copies: _from_memory(header, copies)), 0, len(header), plan.header_crcs, []
    for saved in plan.pieces:
        yield partial(_from_piece, saved), saved.begin, saved.end, saved.crcs, saved.crcs64
        if not again:
            saved.piece = saved.piece._replace(open=_staged_already, device=None)  # let go of the caller's array


def _from_memory(view: memoryview, copies: Copier) -> _Copying:
    return lambda target, start: copies.copy(target, view[start : start + len(target)])


def _from_piece(saved: SavedPiece, copies: Copier) -> _Copying:
    if saved.piece.device is not None:
        begin = saved.piece.device.fetch()
        return lambda target, start: copies.later(begin(target, start))
    view = saved.piece.open()
    if len(view) != saved.end - saved.begin:
        raise CheckpointError(
            f"{saved.name!r} gave {len(view)} bytes, its type and shape need {saved.end - saved.begin}",
            hint="it was resized while it was saved; let save() return before the state is changed",
        )
    return _from_memory(view, copies)


def _choose_memory(plan: FilePlan, pool: BufferPool) -> None:
    """Buffers that are made from now on are what a device copies to best, if one takes part."""
    for saved in plan.pieces:
        if saved.piece.device is not None:
            pool.memory = saved.piece.device.memory
            return


def _staged_already() -> memoryview:
    raise CheckpointError("a piece is staged once", hint="make a new plan for a second save")
