"""Checksums of tensors: how their bytes are cut into segments to be verified, and by what their content is recognised.

A file is cut at every multiple of the block size, and at the bounds of every tensor; each
piece (a *segment*) has its own CRC32C. So a whole small tensor is verified by reading exactly
its own bytes, a range of a large one by reading at most two partial blocks more, and an upload
part (a multiple of the block size) holds whole segments only, so parts are checked in parallel.

Equal content is recognised by 96 bits of checksum, CRC32C and CRC64NVME, at memory speed. The two polynomials have no common
factor, so together they are one CRC of degree 96: any two contents that differ within 96 bits differ in it, others are
mistaken for each other once in 2^96. It is no defence against an adversary.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from typing import Any, Final

from s3loader.checksum import crc32c

__all__ = ["BLOCK", "content_hash", "count", "covering", "crc64", "cut", "joined_hash"]

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


def crc64(data: memoryview) -> int:
    """CRC64NVME of `data`."""
    from awscrt.checksums import crc64nvme

    update: Any = crc64nvme  # any buffer will do, whatever its annotation says
    return int(update(data))


def content_hash(data: memoryview) -> bytes:
    """Hash of `data`, 12 bytes."""
    return struct.pack("<IQ", crc32c(data), crc64(data))


def joined_hash(pieces: Iterable[tuple[int, int, int]]) -> bytes:
    """Hash of a whole from ``(CRC32C, CRC64NVME, bytes)`` of its pieces, in order."""
    from awscrt.checksums import combine_crc32c, combine_crc64nvme

    low, high = 0, 0
    for crc, crc_64, size in pieces:
        low, high = combine_crc32c(low, crc, size), combine_crc64nvme(high, crc_64, size)
    return struct.pack("<IQ", low, high)
