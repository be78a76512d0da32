"""What a response says: its head (HTTP/1.1, RFC 9112), read strictly; and the typed error that it is, where it is one.

The fast path takes one kind of response: complete, of known length, and exactly what was asked for.
`UnexpectedResponse` is everything else; whoever catches it closes the connection and leaves the request to
the careful path, or makes it the caller's error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

from s3loader.errors import ObjectChangedError, RangeError, S3LoaderError, UnsupportedOperationError
from s3loader.ranges import first_byte
from s3loader.store.s3errors import Where, from_status, parse_error
from s3loader.store.s3reads import bare_etag
from s3loader.types import ATTRIBUTES, ObjectMeta

__all__ = ["MAX_HEAD", "ErrorResponse", "Head", "UnexpectedResponse", "check_read", "parse_head", "short_read"]

MAX_HEAD: Final = 16 * 1024
"""Bytes; no S3 server writes nearly as much."""

_STATUS: Final = re.compile(rb"HTTP/1\.1 ([1-5]\d\d)(?: [^\x00-\x08\x0a-\x1f]*)?")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL: Final = re.compile(rb"[\x00\r\n]")
_RANGE: Final = re.compile(rb"bytes (0|[1-9]\d{0,17})-(0|[1-9]\d{0,17})/(0|[1-9]\d{0,17})")
_EMPTY: Final = b"bytes 0--1/0"
"""Content-Range of what some servers send of an empty object, asked for bytes from its end."""

_LENGTH_NAME, _RANGE_NAME, _ETAG_NAME, _CRC_NAME, _VERSION_NAME, _CONNECTION_NAME, _FORBIDDEN, _OTHER = range(8)
_ROLES: Final = {
    b"content-length": _LENGTH_NAME,
    b"content-range": _RANGE_NAME,
    b"etag": _ETAG_NAME,
    b"x-amz-checksum-crc32c": _CRC_NAME,
    b"x-amz-version-id": _VERSION_NAME,
    b"connection": _CONNECTION_NAME,
    b"transfer-encoding": _FORBIDDEN,
    b"upgrade": _FORBIDDEN,
}
_MOST_KNOWN: Final = 256
_status_of: dict[bytes, int] = {}
"""Status lines as this process has met them."""
_role_of: dict[bytes, int] = {}
"""Roles of names, in whatever case they came."""
_idle_lines: set[bytes] = set()
"""Whole lines that are well formed and say nothing of interest: most of every head, again and again."""


class UnexpectedResponse(Exception):
    """The response is not one to take; says why.

    Args:
        reason: What is wrong with it.
        status: Its HTTP status, as far as it could be read.
        kind: The error that it is, if asking again, in another way, cannot give another response; None: it may.
    """

    def __init__(self, reason: str, status: int | None = None, kind: type[S3LoaderError] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.kind = kind


class Head:
    """What was said before the body."""

    length = -1
    """Content-Length in bytes."""
    first = -1
    """First byte of Content-Range; -1 where there is none."""
    last = -1
    size = -1
    """Size of the whole object in bytes."""
    etag = ""
    """Without quotes."""
    checksum = ""
    """``x-amz-checksum-crc32c``."""
    version_id: str | None = None
    keep_alive = True
    chunked = False
    """The body comes in chunks: only with a status of 400 or above is that taken."""

    def __init__(self, raw: bytes, status: int) -> None:
        self.raw = raw
        self.status = status

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str]) -> Head:
        """The head of a response that a library has read; its length is -1 where none was given.

        Args:
            status: HTTP status.
            headers: Names in lower case.

        Raises:
            UnexpectedResponse: a header that matters cannot be read.
        """
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = cls(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("utf-8", "surrogateescape"), status)
        for name, value in headers.items():
            role = _ROLES.get(name.encode("latin-1", "replace"), _OTHER)
            if role < _CONNECTION_NAME:
                _read_known(head, role, value.strip().encode("latin-1", "replace"))
        if status == 204:
            head.length = 0
        return head

    def headers(self) -> dict[str, str]:
        """All header lines: names in lower case, the last of equal names wins."""
        lines = (line.partition(b":") for line in self.raw[:-4].split(b"\r\n")[1:])
        return {name.decode("latin-1").lower(): value.strip(b" \t").decode("utf-8", "replace") for name, _, value in lines}

    def meta(self, key: str) -> ObjectMeta:
        """The object that was described."""
        headers = self.headers()
        try:
            modified = parsedate_to_datetime(headers["last-modified"]).timestamp()
        except (KeyError, ValueError):
            modified = None
        prefix = "x-amz-meta-"
        return ObjectMeta(
            key,
            self.size,
            self.etag,
            modified,
            headers.get("content-type"),
            self.version_id,
            {name[len(prefix) :]: value for name, value in headers.items() if name.startswith(prefix)},
            {name: headers[header] for name, header in ATTRIBUTES.items() if header in headers},
        )


def parse_head(raw: bytes, bodiless: bool = False) -> Head:
    """Read a head: all bytes up to and with its empty line.

    Args:
        raw: Its bytes.
        bodiless: It answers a HEAD: no body follows, whatever it says of one.

    Raises:
        UnexpectedResponse: it breaks the grammar, leaves the length of the body open, or names one thing twice.
    """
    if len(raw) > MAX_HEAD:
        raise UnexpectedResponse("the head is too long")
    lines = raw[:-4].split(b"\r\n")
    status = _status_of.get(lines[0]) or _read_status(lines[0])
    head = Head(raw, status)
    seen = 0
    for line in lines[1:]:
        if line in _idle_lines:
            continue
        name, _, value = line.partition(b":")
        role = _role_of.get(name)
        if role is None:
            role = _classify(name, status)
        if role >= _CONNECTION_NAME:
            _read_other(head, role, line, value)
            continue
        if seen & 1 << role:
            raise UnexpectedResponse(f"{name.decode()} is there twice", status)
        seen |= 1 << role
        _read_known(head, role, value.strip(b" \t"))
    if head.length < 0 and not head.chunked:
        if status == 204:
            head.length = 0
        elif not bodiless:
            raise UnexpectedResponse("no Content-Length", status)
    if head.chunked and head.length >= 0:
        raise UnexpectedResponse("Content-Length and Transfer-Encoding", status)
    return head


def _read_known(head: Head, role: int, value: bytes) -> None:
    status = head.status
    if role == _LENGTH_NAME:
        if not value.isdigit() or len(value) > 18 or (value[:1] == b"0" and value != b"0"):
            raise UnexpectedResponse("bad Content-Length", status)
        head.length = int(value)
    elif role == _ETAG_NAME:
        value = value.removeprefix(b"W/")  # a proxy adds it; the bytes are the same
        head.etag = _text(value[1:-1] if value[:1] == value[-1:] == b'"' and len(value) > 1 else value)
    elif role == _RANGE_NAME:
        match = _RANGE.fullmatch(value)
        if match is not None:
            head.first, head.last, head.size = int(match[1]), int(match[2]), int(match[3])
        elif value == _EMPTY:
            head.first, head.last, head.size = 0, -1, 0
        elif status < 300 or not value.startswith(b"bytes */"):  # as it stands beside a 416
            raise UnexpectedResponse("bad Content-Range", status)
    elif role == _CRC_NAME:
        head.checksum = _text(value)
    else:
        head.version_id = None if value == b"null" else _text(value)


def _read_status(line: bytes) -> int:
    match = _STATUS.fullmatch(line)
    if match is None:
        raise UnexpectedResponse("not an HTTP/1.1 status line")
    status = int(match[1])
    if len(_status_of) < _MOST_KNOWN:
        _status_of[line] = status
    return status


def _classify(name: bytes, status: int) -> int:
    if not _NAME.fullmatch(name):
        raise UnexpectedResponse("bad header line", status)
    role = _ROLES.get(name.lower(), _OTHER)
    if len(_role_of) < _MOST_KNOWN:
        _role_of[name] = role
    return role


def _read_other(head: Head, role: int, line: bytes, value: bytes) -> None:
    if _CONTROL.search(value):
        raise UnexpectedResponse("stray control characters", head.status)
    if role == _FORBIDDEN:
        if head.status >= 400 and line.lower().split(b":")[0] == b"transfer-encoding" and value.strip().lower() == b"chunked":
            head.chunked = True
            return
        raise UnexpectedResponse("Transfer-Encoding or Upgrade", head.status)
    if role == _CONNECTION_NAME:
        tokens = {token.strip(b" \t").lower() for token in value.split(b",")}
        if tokens - {b"keep-alive", b"close", b""}:
            raise UnexpectedResponse("unknown Connection option", head.status)
        if b"close" in tokens:
            head.keep_alive = False
            return
    if len(_idle_lines) >= _MOST_KNOWN:
        _idle_lines.clear()
    _idle_lines.add(line)


def _text(value: bytes) -> str:
    text = value.decode("latin-1")
    if not text.isprintable():
        raise UnexpectedResponse("stray control characters")
    return text


def check_read(head: Head, start: int, end: int | None, if_match: str | None) -> None:
    """Accept the response to a GET of bytes ``[start, end)`` (to the end of the object if `end` is
    None; from its end, if `start` is negative) and set `head.size`, or raise.

    Goes by what came, not by what was asked: a server may answer a range with ``200`` and
    Content-Range, cut it at the object's end, or ignore Range and If-Match altogether.

    Raises:
        UnexpectedResponse: it is not those bytes of that object.
    """
    status, length = head.status, head.length
    if status != 206 and status != 200:
        raise UnexpectedResponse("not a success", status)
    ranged = start != 0 or end is not None
    least = 1
    if start < 0:
        start = first_byte(start, head.size if head.size >= 0 else length)
        least = min(1, head.size)  # there is nothing before the end of an empty object
    if head.size >= 0:
        stop = head.size if end is None or end > head.size else end
        if head.first != start or head.last != stop - 1 or length != stop - start or length < least:
            raise UnexpectedResponse("another range than the one asked for", status)
        if status == 206 and not ranged:
            raise UnexpectedResponse("a part where the whole was asked for", status)
    elif status == 206:
        raise UnexpectedResponse("a part without Content-Range", status)
    elif start or (end is not None and (length > end or not length)):
        raise UnexpectedResponse("the server ignores ranges", status, UnsupportedOperationError)
    else:
        head.size = length
    if if_match is not None and head.etag != if_match and head.etag != bare_etag(if_match):
        raise UnexpectedResponse("its ETag is not the one asked for", None, ObjectChangedError)


def short_read(head: Head, start: int, end: int) -> UnexpectedResponse:
    """The object ends before byte `end` of a buffer that was to be filled."""
    return UnexpectedResponse(f"it has {head.size} bytes, asked for [{start}, {end})", head.status, RangeError)


# -- responses that are errors or redirects --------------------------------------------------------

_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")


class ErrorResponse:
    """What a response of status 300 and above says; its body is capped.

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
