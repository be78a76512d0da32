"""What was fetched is held against its checksum before it is used, and fetched once more where it does not match."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from s3loader.checksum import crc32c
from s3loader.errors import IntegrityError
from s3loader.types import Buffer

__all__ = ["mismatch", "once_more"]

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
