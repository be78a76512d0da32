"""Answers that ask for patience (429, 5xx): read to the end and made the typed error.

To hand such a request to the general engine would ask a store again at once that has just asked for
fewer requests; the error lets the retries wait first.
"""

from __future__ import annotations

import re
from typing import Final

from s3loader.errors import S3LoaderError
from s3loader.store.direct.head import Head
from s3loader.store.s3errors import Where, from_response

__all__ = ["MAX_BODY", "asks_for_patience", "is_complete", "refusal", "room_for"]

MAX_BODY: Final = 32 * 1024
"""Bytes of an error document that are read; S3's have less than one KiB."""
_DIALECT: Final = (501, 505)
"""The server cannot do what was asked, in the way it was asked: another engine may ask otherwise."""
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")


def asks_for_patience(status: int | None) -> bool:
    """Whether an answer of this status is the store's own trouble, not the request's."""
    return status is not None and (status == 429 or (status >= 500 and status not in _DIALECT))


def room_for(head: Head) -> int:
    """Bytes of the body to receive, at most `MAX_BODY`."""
    if head.length > MAX_BODY or head.chunked:
        head.keep_alive = False  # the rest of it stays in the connection
    return MAX_BODY if head.chunked else min(head.length, MAX_BODY)


def is_complete(head: Head, body: memoryview) -> bool:
    """Whether all of a body came of which only its own end tells the length."""
    return head.chunked and (bytes(body[-7:]).endswith(b"\r\n0\r\n\r\n") or bytes(body) == b"0\r\n\r\n")


def refusal(status: int, head: Head | None, body: bytes, where: Where) -> S3LoaderError:
    """The error for such an answer.

    Args:
        status: Of the answer.
        head: None where it could not be read.
        body: What came of it, cut off or whole.
        where: What was asked.
    """
    if head is None:
        return from_response(status, b"", where)
    return from_response(status, _joined(body) if head.chunked else body, where, headers=head.headers())


def _joined(raw: bytes) -> bytes:
    """The chunks of a chunked body (RFC 9112, 7.1), as far as they are whole and well formed."""
    chunks: list[bytes] = []
    at = 0
    while (match := _CHUNK.match(raw, at)) and (size := int(match[1], 16)):
        at = match.end() + size
        if raw[at : at + 2] != b"\r\n":
            break
        chunks.append(raw[match.end() : at])
        at += 2
    return b"".join(chunks)
