"""Incremental saves: what has not changed since the newest step is referred to, not written again.

A tensor is recognised by its content (see `hashing`), whatever framework it comes from, so nothing has to be
declared frozen. References always name the file that holds the bytes, never another reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.hashing import content_hash
from s3loader.checkpoint.format.records import Chunk, FileRecord, Pin, box_of
from s3loader.checkpoint.protocol.commit import Attempt
from s3loader.checkpoint.protocol.merge import unpack_index
from s3loader.checkpoint.protocol.root import Root
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.writing.staging import SavedPiece
from s3loader.errors import CheckpointError, FormatError

__all__ = ["Base", "References", "find_base", "refer"]


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
            found = run.get(root.keys[layout.INDEX][0])
            index = unpack_index(found[0], root.facts, layout.INDEX) if found is not None else None
        except (CheckpointError, FormatError):
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

    The files needed are pinned first, and the base is looked at again afterwards: see `retention`.
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
    now = attempt.run.read_root(base.root.step)
    if (now.state, now.attempt) != ("committed", base.root.attempt):
        return None, list(pieces)  # it was deleted meanwhile: its files may go at any time
    return References(base.root.step, chunks, [base.files[key] for key in keys]), rest
