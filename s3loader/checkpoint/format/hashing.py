"""Recognising equal content: 96 bits of checksum, CRC32C and CRC64NVME, at memory speed.

The two polynomials have no common factor, so together they are one CRC of degree 96: any two contents that differ
within 96 bits differ in it, others are mistaken for each other once in 2^96. It is no defence against an adversary.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from s3loader.checksum import crc32c

__all__ = ["content_hash", "crc64", "joined_hash"]


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
