"""What a rank need not write: tensors that have not changed since the newest step, and replicas that another rank writes.

A tensor is recognised by its content (96 bits of checksum), whatever framework it comes from, so nothing has to be declared
frozen. References to an earlier step always name the file that holds the bytes, never another reference.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Chunk, FileRecord, Pin, box_of
from s3loader.checkpoint.format.segments import content_hash
from s3loader.checkpoint.protocol.commit import Attempt
from s3loader.checkpoint.protocol.latest import read_index
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.writing.staging import SavedPiece
from s3loader.dtypes import nbytes
from s3loader.errors import CheckpointError, FormatError, IntegrityError

__all__ = ["Base", "References", "find_base", "owned", "refer", "replica"]


@dataclass(frozen=True, slots=True)
class Base:
    """A committed step whose tensors may be referred to."""

    root: Root
    block: int
    chunks: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Chunk]
    """By name, offset and box; `Chunk.file` is a key."""
    files: dict[str, FileRecord]
    """By key."""


@dataclass(frozen=True, slots=True)
class References:
    """What a save takes from its base."""

    base: int
    chunks: list[Chunk]
    files: list[FileRecord]


def find_base(run: Run, block: int, known: Base | None) -> Base | None:
    """The newest good step, if it can be referred to; `known` is reused if it is still that one."""
    for root in run.newest_first():
        if known is not None and (root.step, root.attempt) == (known.root.step, known.root.attempt):
            return known
        if root.state != "committed":
            continue
        try:
            index = read_index(run, root)
        except (CheckpointError, FormatError, IntegrityError):
            continue
        if index is None or index.block != block:
            return None
        keys = {record.id: root.keys[record.id][0] for record in index.files}
        chunks = {}
        for chunk in index.chunks:
            if chunk.hash:
                chunk.file = keys[chunk.file]
                chunks[(chunk.name, *box_of(chunk))] = chunk
        files = {}
        for record in index.files:
            record.id = keys[record.id]
            files[record.id] = record
        return Base(root, block, chunks, files)
    return None


def refer(attempt: Attempt, base: Base, pieces: Sequence[SavedPiece]) -> tuple[References | None, list[SavedPiece]]:
    """Which of `pieces` the base holds already, and which are left to be written.

    The files needed are pinned first, and the base is looked at again afterwards: who deletes it goes the other way round.
    """
    chunks: list[Chunk] = []
    rest: list[SavedPiece] = []
    for piece in pieces:
        known = base.chunks.get((piece.name, piece.piece.offset, piece.piece.shape))
        alike = known is not None and (known.dtype, tuple(known.shape)) == (piece.dtype, piece.shape)
        if alike and known is not None and content_hash(piece.piece.open()) == known.hash:
            chunks.append(known)
        else:
            rest.append(piece)
    if not chunks:
        return None, rest
    keys = sorted({chunk.file for chunk in chunks})
    pin = Pin(format=records.FORMAT, step=attempt.step, attempt=attempt.id, keys=keys)
    attempt.run.put(layout.pin_key(attempt.id, attempt.rank), records.encode(pin))
    now = attempt.run.roots.read(base.root.step)
    if (now.state, now.attempt) != ("committed", base.root.attempt):
        return None, list(pieces)  # it was deleted meanwhile: its files may go at any time
    return References(base.root.step, chunks, [base.files[key] for key in keys]), rest


def owned(pieces: Sequence[SavedPiece], rank: int, world: int) -> tuple[list[SavedPiece], list[SavedPiece]]:
    """Which of `pieces`, which every rank has, `rank` writes, and which it leaves to others.

    Every rank comes to the same division by itself: the largest first, each to the rank that has least.
    """
    if world == 1:
        return list(pieces), []
    loads = [(0, r) for r in range(world)]
    mine: list[SavedPiece] = []
    others: list[SavedPiece] = []
    sizes = {id(piece): nbytes(piece.dtype, piece.piece.shape) for piece in pieces}
    for piece in sorted(pieces, key=lambda p: (-sizes[id(p)], p.name)):
        load, owner = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[id(piece)] + 1, owner))
        (mine if owner == rank else others).append(piece)
    return mine, others


def replica(piece: SavedPiece) -> Chunk:
    """What a rank says of a tensor it does not write."""
    box = piece.piece.shape
    whole = box == piece.shape
    return Chunk(
        name=piece.name,
        dtype=piece.dtype,
        shape=list(piece.shape),
        file="",
        begin=0,
        end=0,
        crc=b"",
        offset=None if whole else list(piece.piece.offset),
        box=None if whole else list(box),
        hash=content_hash(piece.piece.open()),
    )
