"""Small objects that carry a checksum, and the proof that what was read is what was written.

A *seal* is the CRC32C of the object's bytes in its user metadata: it changes none of them, and whoever does not know it
reads the object as ever. Copies by other tools lose it. Then the ETag may tell (of a plain put it is often the MD5), and
where that says nothing either, two reads that agree are proof that nothing was damaged on the way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Final

from s3loader.checksum import crc32c, crc32c_bytes
from s3loader.errors import IntegrityError
from s3loader.types import Buffer, ObjectMeta

__all__ = ["SEAL", "Seal", "damaged", "proven", "seal"]

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


def proven(read: Read, url: str, *, crc: int | None = None, strict: bool = True) -> tuple[ObjectMeta, Buffer]:
    """A whole object whose bytes are certain; what fails is read again once.

    Args:
        read: Reads it whole.
        url: Of it, for errors.
        crc: CRC32C that a seal beside the object says; None: none is known.
        strict: Where nothing tells, read until two reads in a row agree. Needed before anything that was read is written
            back, or decides what is deleted.

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
