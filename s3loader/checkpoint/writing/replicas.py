"""Tensors that several ranks hold alike: who writes which, and proof that they are alike."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from s3loader.checkpoint.format.dtypes import nbytes
from s3loader.checkpoint.format.hashing import content_hash
from s3loader.checkpoint.format.records import Chunk
from s3loader.checkpoint.writing.staging import SavedPiece

__all__ = ["owned", "replica"]


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
