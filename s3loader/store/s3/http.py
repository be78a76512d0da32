"""HTTP/1.1 as our client speaks it to S3: heads of requests, written and signed; heads of responses (RFC 9112), read strictly.

The signature is AWS Signature Version 4 in headers, for requests whose payload is not signed ("Authenticating Requests: Using
the Authorization Header" of the S3 API reference). What does not change from request to request is computed once: the signing
key and the first blocks of its HMAC (RFC 2104) per day, the header lines per second.

The fast path takes one kind of response: complete, of known length, and exactly what was asked for. `UnexpectedResponse` is
everything else; whoever catches it closes the connection and leaves the request to the careful path, or makes it the
caller's error.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote

from s3loader.credentials import Credentials
from s3loader.errors import ConfigError, ObjectChangedError, RangeError, S3LoaderError, UnsupportedOperationError
from s3loader.ranges import first_byte
from s3loader.store.arguments import bare_etag
from s3loader.store.s3errors import Where, from_status, parse_error
from s3loader.types import ATTRIBUTES, ObjectMeta, PutMode, Update

__all__ = [
    "MAX_HEAD",
    "ErrorResponse",
    "Head",
    "Signer",
    "UnexpectedResponse",
    "check_read",
    "checked_header",
    "condition_headers",
    "harmless",
    "parse_head",
    "query_of",
    "quoted_etag",
    "short_read",
]

_PAYLOAD: Final = "UNSIGNED-PAYLOAD"
_KNOWN_PATHS: Final = 4096
_NONE: Final[Mapping[str, str]] = {}


class Signer:
    """Writes the start of request heads for one host: request line, Host, and the signature.

    Args:
        credentials: The keys; None sends requests unsigned.
        region: As it stands in the signature's scope.
        host: Value of the Host header.
        always: More headers to send and sign with every request; names in lower case.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        credentials: Credentials | None,
        region: str,
        host: str,
        *,
        always: Mapping[str, str] = _NONE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.credentials = credentials
        self.region = region
        self.host = host
        self.always = always
        self._clock = clock
        self._moment = _Moment(self, clock(), None)

    def get(self, path: str) -> str:
        """Head of a GET of `path` (quoted), open for unsigned header lines such as Range.

        The signature does not cover those, so it is kept for as long as its second lasts: many
        ranges of one object are signed once.
        """
        moment = self._now()
        known = moment.known
        head = known.get(path)
        if head is None:
            head = moment.sign("GET", path, "", _NONE)
            if len(known) < _KNOWN_PATHS:
                known[path] = head
        return head

    def head(self, method: str, path: str, query: str = "", headers: Mapping[str, str] = _NONE) -> str:
        """Head of any request, open for unsigned header lines.

        Args:
            method: ``PUT`` ...
            path: Quoted path.
            query: Quoted query, parameters in order of their names, without ``?``.
            headers: More headers to send and sign; names in lower case.
        """
        return self._now().sign(method, path, query, headers)

    def _now(self) -> _Moment:
        moment = self._moment
        now = self._clock()
        if not moment.until - 1 <= now < moment.until:  # a clock may be set back, too
            moment = self._moment = _Moment(self, now, moment)
        return moment


class _Moment:
    """All that is the same for every request of one second. Never changed once it is made, but for
    the paths it knows, so threads may share it."""

    __slots__ = ("_day", "_inner", "_keyed", "_lines", "_names", "_plain", "_scope", "_signer", "_tail", "known", "until")

    def __init__(self, signer: Signer, now: float, previous: _Moment | None) -> None:
        second = int(now)
        self.until = second + 1
        self.known: dict[str, str] = {}
        self._signer = signer
        self._plain = f"Host: {signer.host}\r\nUser-Agent: s3loader\r\n"
        credentials = signer.credentials
        if credentials is None:
            self._plain += "".join(f"{name}: {value}\r\n" for name, value in signer.always.items())
            return
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
        self._day = stamp[:8]
        self._scope = f"{self._day}/{signer.region}/s3/aws4_request"
        if previous is not None and previous._day == self._day:
            self._keyed: tuple[Any, Any] = previous._keyed
        else:
            self._keyed = _hmac_start(_signing_key(credentials, self._day, signer.region))
        self._inner = self._keyed[0].copy()
        self._inner.update(f"AWS4-HMAC-SHA256\n{stamp}\n{self._scope}\n".encode())
        fixed = {"host": signer.host, "x-amz-content-sha256": _PAYLOAD, "x-amz-date": stamp}
        if credentials.session_token:
            fixed["x-amz-security-token"] = credentials.session_token
        if signer.always:
            fixed = dict(sorted({**fixed, **signer.always}.items()))
        self._lines = fixed
        self._names = ";".join(fixed)
        self._tail = "".join(f"{name}:{value}\n" for name, value in fixed.items()) + f"\n{self._names}\n{_PAYLOAD}"
        self._plain += "".join(f"{name}: {value}\r\n" for name, value in fixed.items() if name != "host")
        self._plain += f"Authorization: AWS4-HMAC-SHA256 Credential={credentials.access_key_id}/{self._scope}, SignedHeaders="

    def sign(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> str:
        target = f"{path}?{query}" if query else path
        sent = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) if headers else ""
        if self._signer.credentials is None:
            return f"{method} {target} HTTP/1.1\r\n{self._plain}{sent}"
        names, tail = self._names, self._tail
        if headers:
            signed = dict(sorted({**self._lines, **headers}.items()))
            names = ";".join(signed)
            tail = "".join(f"{name}:{' '.join(value.split())}\n" for name, value in signed.items())
            tail += f"\n{names}\n{_PAYLOAD}"
        digest = hashlib.sha256(f"{method}\n{path}\n{query}\n{tail}".encode()).hexdigest()
        inner = self._inner.copy()
        inner.update(digest.encode())
        outer = self._keyed[1].copy()
        outer.update(inner.digest())
        return f"{method} {target} HTTP/1.1\r\n{self._plain}{names}, Signature={outer.hexdigest()}\r\n{sent}"


def _signing_key(credentials: Credentials, day: str, region: str) -> bytes:
    key = b"AWS4" + credentials.secret_access_key.encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _hmac_start(key: bytes) -> tuple[Any, Any]:
    """Inner and outer hash of an HMAC-SHA256, the key already in: copies of them cost a third of
    an `hmac.digest`."""
    block = key.ljust(64, b"\0")
    return hashlib.sha256(bytes(b ^ 0x36 for b in block)), hashlib.sha256(bytes(b ^ 0x5C for b in block))


# -- what may stand in a request -------------------------------------------------------------------


def query_of(**parameters: str | int) -> str:
    """A query, quoted, its parameters in the order in which they are signed."""
    pairs = sorted((quote(name, safe="-_.~"), quote(str(value), safe="-_.~")) for name, value in parameters.items())
    return "&".join(f"{name}={value}" for name, value in pairs)


def condition_headers(mode: PutMode) -> dict[str, str]:
    """Headers that make a write conditional."""
    if isinstance(mode, Update):
        return {"if-match": quoted_etag(mode.etag)}
    return {"if-none-match": "*"} if mode == "create" else {}


def quoted_etag(etag: str) -> str:
    """An ETag as a condition holds it.

    Raises:
        ConfigError: it cannot stand in a header.
    """
    return f'"{bare_etag(checked_header("an ETag", etag))}"'


def checked_header(what: str, value: str) -> str:
    """`value`, which may stand in a header.

    Raises:
        ConfigError: it may not.
    """
    if not harmless(value):
        raise ConfigError(f"{what} cannot be sent: {value!r}", hint="printable ASCII without blanks at its ends")
    return value


def harmless(value: str | None) -> bool:
    """Whether `value` can stand in a header."""
    return value is None or (value.isascii() and value.isprintable() and value == value.strip())


# -- responses -------------------------------------------------------------------------------------

MAX_HEAD: Final = 16 * 1024
"""Bytes; no S3 server writes nearly as much."""

_STATUS: Final = re.compile(rb"HTTP/1\.1 ([1-5]\d\d)(?: [^\x00-\x08\x0a-\x1f]*)?")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL: Final = re.compile(rb"[\x00\r\n]")
_RANGE: Final = re.compile(rb"bytes (0|[1-9]\d{0,17})-(0|[1-9]\d{0,17})/(0|[1-9]\d{0,17})")
_EMPTY: Final = b"bytes 0--1/0"
"""Content-Range of what some servers send of an empty object, asked for bytes from its end."""

_ZERO: Final = ord("0")
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
        value = value.strip(b" \t")
        if role == _LENGTH_NAME and value.isdigit() and len(value) < 18 and value[0] != _ZERO:
            head.length = int(value)  # the usual case of `_read_known`, without the call
        else:
            _read_known(head, role, value)
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
