"""CRC32C (Castagnoli, RFC 3720 appendix B.4) of buffers, at memory speed.

`awscrt.checksums` does the work: it takes memoryviews and needs no thread, so it is safe after
fork. It is imported on first use, to keep ``import s3loader`` light.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from s3loader.types import Buffer

__all__ = ["crc32c", "crc32c_base64", "file_crc32c_base64"]

_update: Callable[[Any, int], int] | None = None


def crc32c(data: Buffer, previous: int = 0) -> int:
    """The unsigned 32-bit CRC32C of `data`, continued from `previous`."""
    global _update
    if _update is None:
        from awscrt.checksums import crc32c as update

        _update = cast("Callable[[Any, int], int]", update)
    return _update(data, previous)


def crc32c_base64(data: Buffer) -> str:
    """The CRC32C of `data` as S3 writes it: base64 of 4 big-endian bytes."""
    return _base64(crc32c(data))


def file_crc32c_base64(file: BinaryIO) -> str:
    """As `crc32c_base64`, of what is left of a file."""
    crc = 0
    while chunk := file.read(1 << 20):
        crc = crc32c(chunk, crc)
    return _base64(crc)


def _base64(crc: int) -> str:
    return base64.b64encode(struct.pack(">I", crc)).decode("ascii")
