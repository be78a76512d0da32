"""Staging: state is copied once, into reused part-sized buffers, and goes to the store from there.

The caller's thread only copies. As soon as a buffer is full an upload thread takes it, computes
the checksums of the segments in it and sends it, so `save` returns after one copy of the state,
or, where the state is larger than the budget, when the last part of it was copied.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from s3loader.checkpoint import segments
from s3loader.checkpoint.dtypes import itemsize, nbytes
from s3loader.checkpoint.hashing import crc64, joined_hash
from s3loader.checkpoint.layout import data_id
from s3loader.checkpoint.leaves import Piece
from s3loader.checkpoint.memory import fresh_memory
from s3loader.checkpoint.records import Chunk, FileRecord
from s3loader.checkpoint.stformat import encode_header
from s3loader.checksum import crc32c
from s3loader.errors import CheckpointError

__all__ = ["BufferPool", "FilePlan", "Piece", "SavedPiece", "StagedPart", "plan_files", "stage"]


class BufferPool:
    """Buffers of one size, at most `budget` bytes of them, kept for the next save."""

    def __init__(self, budget: int, size: int) -> None:
        self.size = size
        self.limit = max(2, budget // size)
        self._free: list[memoryview] = []
        self._made = 0
        self._changed = threading.Condition()

    @property
    def allocated(self) -> int:
        """Bytes held, whether in use or not."""
        return self._made * self.size

    def acquire(self, stopped: Callable[[], bool], exhausted: Callable[[], None]) -> memoryview | None:
        """A buffer; where the budget is used up, calls `exhausted` and waits for one. None as soon as `stopped()`."""
        with self._changed:
            while not stopped():
                if self._free:
                    return self._free.pop()
                if self._made < self.limit:
                    self._made += 1
                    break
                exhausted()
                self._changed.wait(0.2)
            else:
                return None
        return fresh_memory(self.size)

    def release(self, buffer: memoryview) -> None:
        """Give a buffer back."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def wake(self) -> None:
        """Let those who wait look at their `stopped()` again."""
        with self._changed:
            self._changed.notify_all()

    def clear(self) -> None:
        """Let go of the buffers that are not in use."""
        with self._changed:
            self._made -= len(self._free)
            self._free.clear()


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
    crcs64: list[int] = field(default_factory=list)
    """CRC64NVME of each segment, where the content is to be recognised again."""

    def chunk(self, file: str, block: int) -> Chunk:
        """The record of it, once its checksums are there."""
        whole = self.piece.shape == self.shape
        return Chunk(
            name=self.name,
            dtype=self.dtype,
            shape=list(self.shape),
            file=file,
            begin=self.begin,
            end=self.end,
            crc=struct.pack(f"<{len(self.crcs)}I", *self.crcs),
            offset=None if whole else list(self.piece.offset),
            box=None if whole else list(self.piece.shape),
            hash=self._hash(block),
        )

    def _hash(self, block: int) -> bytes:
        if not self.crcs64:
            return b""
        sizes = [high - low for low, high in segments.cut(self.begin, self.end, block)]
        return joined_hash(zip(self.crcs, self.crcs64, sizes, strict=True))


@dataclass(slots=True)
class FilePlan:
    """A file to be written: header, then pieces."""

    id: str
    header: bytes
    pieces: list[SavedPiece]
    size: int
    block: int
    header_crcs: list[int]

    def record(self) -> FileRecord:
        """The record of it, once its checksums are there."""
        crc = struct.pack(f"<{len(self.header_crcs)}I", *self.header_crcs)
        return FileRecord(id=self.id, size=self.size, header=len(self.header), crc=crc)


def plan_files(
    pieces: Sequence[SavedPiece], rank: int, file_size: int, block: int, metadata: dict[str, str], *, hashed: bool
) -> list[FilePlan]:
    """Lay `pieces` out in files of about `file_size` bytes (a larger piece has a file of its own).

    Wider element types come first, so that every tensor in a file is aligned to its element.
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
        header, spans = encode_header(((p.name, p.dtype, p.piece.shape) for p in group), _with_boxes(group, metadata))
        for piece, (begin, end) in zip(group, spans, strict=True):
            piece.begin, piece.end = begin, end
            piece.crcs = [0] * segments.count(begin, end, block)
            piece.crcs64 = [0] * len(piece.crcs) if hashed else []
        end = spans[-1][1]
        plans.append(FilePlan(data_id(rank, number), header, group, end, block, [0] * segments.count(0, len(header), block)))
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

    def checksum(self) -> None:
        """Compute the checksums of the segments in it."""
        for crcs, crcs64, index, low, high in self.checks:
            crcs[index] = crc32c(self.data[low:high])
            if crcs64:
                crcs64[index] = crc64(self.data[low:high])


def stage(plan: FilePlan, pool: BufferPool, stopped: Callable[[], bool], exhausted: Callable[[], None]) -> Iterator[StagedPart]:
    """Copy a file's bytes into buffers of the pool, part after part; ends early once `stopped()`.

    Calls `exhausted` when it has to wait for a buffer.

    Raises:
        CheckpointError: a leaf gave another number of bytes than its type and shape say.
    """
    size = pool.size
    part: StagedPart | None = None
    try:
        for source, begin, crcs, crcs64 in _sources(plan):
            view = source()
            low, high = begin, begin + len(view)
            for number, (first, last) in enumerate(segments.cut(low, high, plan.block)):
                at = first % size
                if part is None or at == 0:
                    if part is not None:
                        full, part = part, None
                        yield full
                    buffer = pool.acquire(stopped, exhausted)
                    if buffer is None:
                        return
                    part = StagedPart(plan, first // size + 1, buffer, buffer[:0], [])
                _copy(part.buffer, at, view, first - low, last - first)
                part.checks.append((crcs, crcs64, number, at, at + last - first))
                part.data = part.buffer[: at + last - first]
            del view, source
        if part is not None:
            full, part = part, None
            yield full
    finally:
        if part is not None:
            pool.release(part.buffer)


def _sources(plan: FilePlan) -> Iterator[tuple[Callable[[], memoryview], int, list[int], list[int]]]:
    yield (lambda: memoryview(plan.header)), 0, plan.header_crcs, []
    for saved in plan.pieces:
        yield _checked(saved), saved.begin, saved.crcs, saved.crcs64
        saved.piece = saved.piece._replace(open=_staged_already)  # let go of the caller's array


def _staged_already() -> memoryview:
    raise CheckpointError("a piece is staged once")


def _checked(saved: SavedPiece) -> Callable[[], memoryview]:
    def opened() -> memoryview:
        view = saved.piece.open()
        if len(view) != saved.end - saved.begin:
            raise CheckpointError(f"{saved.name!r} gave {len(view)} bytes, its type and shape need {saved.end - saved.begin}")
        return view

    return opened


_COPY_WITHOUT_NUMPY = 1 << 16


def _copy(target: memoryview, at: int, source: memoryview, start: int, n: int) -> None:
    """Copy `n` bytes; large copies let go of the GIL, so that uploads go on beside them."""
    if n < _COPY_WITHOUT_NUMPY:
        target[at : at + n] = source[start : start + n]
        return
    np: Any = _numpy()
    np.copyto(np.frombuffer(target, np.uint8, n, at), np.frombuffer(source, np.uint8, n, start))


def _numpy() -> Any:
    import numpy as np

    return np
