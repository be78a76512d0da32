"""Responses that are errors or redirects (status 300 and above): their body, capped, and the typed error they are."""

from __future__ import annotations

import re
from typing import Final

from s3loader.errors import S3LoaderError
from s3loader.store.s3.head import Head
from s3loader.store.s3errors import Where, from_status, parse_error

__all__ = ["ErrorResponse"]

_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")


class ErrorResponse:
    """What one such response says.

    Args:
        head: Of the response.
        body: As it came, as far as it was read; chunks (RFC 9112, 7.1) are joined here if the head says that it has some.
    """

    MAX_BODY: Final = 32 * 1024
    """Bytes of an error document that are read; S3's have less than one KiB."""

    def __init__(self, head: Head, body: bytes) -> None:
        self._status = head.status
        self._headers = head.headers()
        text = _joined(body)[0] if head.chunked else body
        self._code, self._message, self._request_id, told = parse_error(text)
        self.region = self._headers.get("x-amz-bucket-region") or told
        """The region it names as the bucket's."""
        self.location = self._headers.get("location")
        """Where it redirects to."""

    def error(self, where: Where) -> S3LoaderError:
        """The typed error."""
        return from_status(
            self._status,
            self._code,
            self._message,
            where,
            request_id=self._request_id,
            headers=self._headers,
            region=self.region,
        )

    @staticmethod
    def room_for(head: Head) -> int:
        """Bytes of the body to receive, at most `MAX_BODY`."""
        if head.length > ErrorResponse.MAX_BODY:
            head.keep_alive = False  # the rest of it stays in the connection
        return ErrorResponse.MAX_BODY if head.chunked else min(head.length, ErrorResponse.MAX_BODY)

    @staticmethod
    def is_complete(head: Head, body: memoryview) -> bool:
        """Whether all of a body came of which only its own end tells the length."""
        return head.chunked and _joined(bytes(body))[1]


def _joined(raw: bytes) -> tuple[bytes, bool]:
    """The chunks of a chunked body, as far as they are whole and well formed, and whether the last one ends it."""
    chunks: list[bytes] = []
    at = 0
    while match := _CHUNK.match(raw, at):
        size = int(match[1], 16)
        if not size:
            return b"".join(chunks), raw[match.end() :] == b"\r\n"
        at = match.end() + size
        if raw[at : at + 2] != b"\r\n":
            break
        chunks.append(raw[match.end() : at])
        at += 2
    return b"".join(chunks), False
