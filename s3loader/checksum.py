"""CRC32C (Castagnoli, RFC 3720 appendix B.4) of buffers, at memory speed.

`awscrt.checksums` does the work: it takes memoryviews and needs no thread, so it is safe after
fork. It is imported on first use, to keep ``import s3loader`` light.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Callable
from typing import IO, Any, Final, cast

from s3loader.types import Buffer

__all__ = [
    "crc32c",
    "crc32c_base64",
    "crc32c_bytes",
    "file_crc32c",
    "file_crc32c_base64",
    "json_seal_holds",
    "md5_base64",
    "seal_json",
]

_JSON_SEAL: Final = re.compile(rb'\{"crc32c":"([0-9a-f]{8})"[,}]')
_SEAL_SIZE: Final = len('{"crc32c":"01234567"')

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
    return crc32c_bytes(crc32c(data))


def file_crc32c(file: IO[bytes]) -> int:
    """CRC32C of a whole file, which stands at its beginning then."""
    file.seek(0)
    crc = 0
    while chunk := file.read(1 << 20):
        crc = crc32c(chunk, crc)
    file.seek(0)
    return crc


def file_crc32c_base64(file: IO[bytes]) -> str:
    """As `crc32c_base64`, of what is left of a file."""
    crc = 0
    while chunk := file.read(1 << 20):
        crc = crc32c(chunk, crc)
    return crc32c_bytes(crc)


def md5_base64(data: Buffer) -> str:
    """The MD5 of `data` as a Content-MD5 header holds it."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")


def crc32c_bytes(crc: int) -> str:
    """A CRC32C as S3 writes it."""
    return base64.b64encode(struct.pack(">I", crc)).decode("ascii")


def seal_json(text: bytes) -> bytes:
    """A JSON object with its own checksum as its first field.

    Args:
        text: ``{...}``, without white space before it.
    """
    rest = b"," * (len(text) > len("{}")) + text[1:]
    return b'{"crc32c":"%08x"' % crc32c(rest) + rest


def json_seal_holds(text: Buffer, *plain: bytes) -> bool | None:
    """Whether `text` is what `seal_json` made of it; None where it is an object without a seal.

    Args:
        plain: How objects of the releases that sealed none begin: anything else is damaged, so that no bit that is
            wrong in the seal itself makes an object look like one of those.
    """
    data = bytes(text)
    match = _JSON_SEAL.match(data)
    if match is None:
        return None if data.startswith(plain or b"") else False
    return crc32c(data[_SEAL_SIZE:]) == int(match.group(1), 16)
