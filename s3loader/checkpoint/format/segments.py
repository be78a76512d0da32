"""How a tensor's bytes are cut for checksums.

A file is cut at every multiple of the block size, and at the bounds of every tensor; each
piece (a *segment*) has its own CRC32C. So a whole small tensor is verified by reading exactly
its own bytes, a range of a large one by reading at most two partial blocks more, and an upload
part (a multiple of the block size) holds whole segments only, so parts are checked in parallel.
"""

from __future__ import annotations

import itertools
from typing import Final

__all__ = ["BLOCK", "count", "covering", "cut"]

BLOCK: Final = 16 << 20
"""Default block size in bytes; a checkpoint's index states its own."""


def cut(begin: int, end: int, block: int) -> list[tuple[int, int]]:
    """Segments of the tensor at ``[begin, end)`` of a file."""
    edges = [begin, *range((begin // block + 1) * block, end, block), end]
    return [(low, high) for low, high in itertools.pairwise(edges) if high > low]


def count(begin: int, end: int, block: int) -> int:
    """How many segments `cut` makes."""
    return (end - 1) // block - begin // block + 1 if end > begin else 0


def covering(begin: int, end: int, block: int, low: int, high: int) -> range:
    """Which segments of ``[begin, end)`` hold bytes of ``[low, high)`` (file offsets)."""
    if high <= low:
        return range(0)
    first = low // block - begin // block
    return range(first, (high - 1) // block - begin // block + 1)
