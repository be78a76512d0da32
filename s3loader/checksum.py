"""CRC32C (Castagnoli, RFC 3720 appendix B.4) of buffers, at memory speed.

`awscrt.checksums` does the work: it takes memoryviews and needs no thread, so it is safe after
fork. It is imported on first use, to keep ``import s3loader`` light.

What the checksums are for: JSON documents and small objects that carry their own (*seals*), and a second fetch of what does not
verify. The seal of an object is the CRC32C of its bytes in its user metadata: it changes none of them, and whoever does not
know it reads the object as ever. Copies by other tools lose it. Then the ETag may tell (of a plain put it is often the MD5),
and where that says nothing either, two reads that agree are proof that nothing was damaged on the way.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Callable
from typing import IO, Any, Final, TypeVar, cast

from s3loader.errors import IntegrityError
from s3loader.types import Buffer, ObjectMeta

__all__ = [
    "SEAL",
    "Seal",
    "crc32c",
    "crc32c_base64",
    "crc32c_bytes",
    "damaged",
    "file_crc32c",
    "file_crc32c_base64",
    "json_seal_holds",
    "md5_base64",
    "mismatch",
    "once_more",
    "proven",
    "seal",
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


# -- seals of objects ------------------------------------------------------------------------------

SEAL: Final = "s3loader-crc32c"
"""User metadata: CRC32C of all bytes, as S3 writes it."""
_MD5: Final = re.compile(r"[0-9a-f]{32}")
_READS: Final = 10

Read = Callable[[], tuple[ObjectMeta, Buffer]]


def seal(crc: int) -> dict[str, str]:
    """The metadata to write bytes with whose CRC32C is `crc`."""
    return {SEAL: crc32c_bytes(crc)}


class Seal:
    """Holds bytes, as they come, against what is known of an object.

    Args:
        meta: The answer they come with.
        crc: What may be their CRC32C: the name of a part holds it.
    """

    def __init__(self, meta: ObjectMeta, crc: int | None = None) -> None:
        self._told = meta.metadata.get(SEAL)
        self._crc = crc
        self._etag = meta.etag
        self._md5 = hashlib.md5(usedforsecurity=False) if self._told is None and _MD5.fullmatch(meta.etag) else None
        self.crc = 0
        """CRC32C of what came so far."""

    def update(self, data: Buffer) -> None:
        """The next bytes."""
        self.crc = crc32c(data, self.crc)
        if self._md5 is not None:
            self._md5.update(data)

    def verdict(self) -> bool | None:
        """After all bytes: whether they are what was written; None where nothing tells."""
        if self._told is not None:
            return crc32c_bytes(self.crc) == self._told
        return True if (self._md5 is not None or self._crc is not None) and not self.suspicious else None

    @property
    def suspicious(self) -> bool:
        """Whether what may be a checksum of theirs is none. It need not be one: neither the ETag of an encrypted object,
        nor the digits in the name of a part that another program has made."""
        if self._told is not None or self.crc == self._crc or (self._md5 is not None and self._md5.hexdigest() == self._etag):
            return False
        return self._md5 is not None or self._crc is not None


def damaged(url: str, etag: str) -> IntegrityError:
    """What is raised of bytes that are not what was written, twice; its details have the ETag they came with."""
    return IntegrityError(
        "its bytes are not those that were written: the checksum that was stored with it does not match",
        op="read",
        url=url,
        etag=etag,
        hint="restore it from a copy; a file that was edited on purpose is taken again once it is copied over itself"
        " (`cp FILE NEW && mv NEW FILE`), which leaves the old checksum behind",
    )


def proven(
    read: Read,
    url: str,
    *,
    crc: int | None = None,
    strict: bool = True,
    own: Callable[[bytes], bool] = lambda data: False,
) -> tuple[ObjectMeta, Buffer]:
    """A whole object whose bytes are certain; what fails is read again once.

    Args:
        read: Reads it whole.
        url: Of it, for errors.
        crc: CRC32C that a seal beside the object says; None: none is known.
        strict: Where nothing tells, read until two reads in a row agree. Needed before anything that was read is written
            back, or decides what is deleted.
        own: Whether bytes prove themselves, as by a checksum among them that holds. Then an ETag that looks like an MD5 and is
            none (of an object that is encrypted with a key of KMS) costs no second read.

    Raises:
        IntegrityError: the bytes are not what was written, or others with every read.
    """
    before: tuple[str, Buffer] | None = None
    failed = False
    for _ in range(_READS):
        meta, data = read()
        check = Seal(meta, crc)
        check.update(data)
        verdict = check.verdict()
        if verdict is None and own(bytes(data)):
            return meta, data
        if verdict or (verdict is None and not strict and not check.suspicious):
            return meta, data
        if verdict is False:
            if failed:
                raise damaged(url, meta.etag)
            failed = True
        elif before is not None and before == (meta.etag, data):
            return meta, data
        else:
            before = (meta.etag, data)
    assert before is not None
    raise IntegrityError(f"{_READS} reads of it gave different bytes", op="read", url=url, etag=before[0])


# -- a second fetch of what does not verify --------------------------------------------------------

B = TypeVar("B", bound=Buffer)


def once_more(crc: int, again: Callable[[], B], error: Callable[[int], IntegrityError]) -> B:
    """What `again` fetches, where what came first has not the CRC32C `crc`: the wire or a cache may be at fault.

    Args:
        crc: CRC32C that the bytes must have.
        again: Fetches the same bytes anew, past every cache.
        error: Makes the error, out of the CRC32C that was found the second time.

    Raises:
        IntegrityError: it is wrong both times.
    """
    data = again()
    found = crc32c(data)
    if found != crc:
        raise error(found)
    return data


def mismatch(what: str, url: str, start: int, end: int, **details: Any) -> IntegrityError:
    """The error for bytes that are wrong both times.

    Args:
        what: The sentence.
        url: Of the object.
        start: First byte of the range, where `what` counts from.
        end: Its end.
        details: More that the error carries: ``archive``, ``member``, ``name``, ``hint``.
    """
    return IntegrityError(what, op="read", url=url, range=(start, end), **details)
