"""Checksums of tensors: how their bytes are cut into segments to be verified, and by what their content is recognised.

A file is cut at every multiple of the block size, and at the bounds of every tensor; each
one (a *segment*) has its own CRC32C. So a whole small tensor is verified by reading exactly
its own bytes, and a range of a large one by reading at most two partial blocks more. A writer checks
its upload parts in parallel: where a part ends inside a segment, the segment is cut once more (into
*pieces*), and its CRC32C is put together of theirs; nothing of that is stored.

Equal content is recognised by 96 bits of checksum, CRC32C and CRC64NVME, at memory speed. The two polynomials have no common
factor, so together they are one CRC of degree 96: any two contents that differ within 96 bits differ in it, others are
mistaken for each other once in 2^96. It is no defence against an adversary.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final

from s3loader.checksum import crc32c

__all__ = [
    "BLOCK",
    "combined",
    "content_hash",
    "count",
    "covering",
    "crc64",
    "cut",
    "joined",
    "joined_hash",
    "middle",
    "pieces",
]

BLOCK: Final = 16 << 20
"""Default block size in bytes; a checkpoint's index states its own."""


_PERIOD: Final = (1 << 31) - 1
"""Bytes of zeros after which a CRC32C, as `combined` counts it, is what it was."""


def cut(begin: int, end: int, block: int) -> list[tuple[int, int]]:
    """Segments of the tensor at ``[begin, end)`` of a file."""
    edges = [begin, *range((begin // block + 1) * block, end, block), end]
    return [(low, high) for low, high in itertools.pairwise(edges) if high > low]


def pieces(begin: int, end: int, block: int, part: int) -> list[tuple[int, int]]:
    """What `cut` makes, cut again at every multiple of `part`, so that no piece lies in two upload parts."""
    if part % block == 0:
        return cut(begin, end, block)
    inner = {*range((begin // block + 1) * block, end, block), *range((begin // part + 1) * part, end, part)}
    return [(low, high) for low, high in itertools.pairwise([begin, *sorted(inner), end]) if high > low]


def joined(crcs: Sequence[int], begin: int, end: int, block: int, part: int) -> list[int]:
    """CRC32C of each segment, from those of its `pieces`."""
    if part % block == 0:
        return list(crcs)
    found: list[int] = []
    for crc, (low, high) in zip(crcs, pieces(begin, end, block, part), strict=True):
        if low > begin and low % block:
            found[-1] = combined(found[-1], crc, high - low)
        else:
            found.append(crc)
    return found


def combined(first: int, second: int, size: int) -> int:
    """CRC32C of two pieces end to end, from that of each; `size`: bytes of the second one."""
    from awscrt.checksums import combine_crc32c

    return int(combine_crc32c(first, second, size))


def middle(whole: int, before: int, size: int, after: int, rest: int) -> int:
    """CRC32C of `size` bytes in the middle of something, from that of all of it, of what is before them, and of the `rest`
    bytes after them.

    To append n bytes multiplies a CRC by x^8n and adds theirs, so it is undone by adding theirs again and multiplying by
    x^-8n. The powers of x repeat after 2^31-1 (the polynomial is x+1 times a primitive one), so x^-8n is x^8(2^31-1-n).
    """
    through = whole ^ after ^ combined(before, 0, size + rest)  # of the middle, with `rest` zeros appended
    return combined(through, 0, -rest % _PERIOD)


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
