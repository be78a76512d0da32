"""HTTP/1.1 messages, whole in memory: what `FaultProxy` reads, changes and writes."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import socket
import zlib
from collections.abc import Callable
from io import BufferedReader
from typing import Final

from s3loader.checksum import crc32c
from s3loader.testing.faults import Rule

__all__ = [
    "HangUpError",
    "Headers",
    "Message",
    "Reply",
    "chunks",
    "end_to_end",
    "error_reply",
    "mismatch",
    "read_reply",
    "read_request",
    "rewrite",
]

BODILESS: Final = frozenset({204, 304})
_LINE: Final = 1 << 16
_CHUNK: Final = 1 << 16
_HOP_BY_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "expect", "content-length"})

Headers = list[tuple[str, str]]


class HangUpError(Exception):
    """The client is gone, or is to be hung up on."""


@dataclasses.dataclass(slots=True)
class Message:
    """A request or a reply, whole in memory."""

    first: str
    headers: Headers
    body: bytes = b""

    def get(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def head(self, headers: Headers) -> bytes:
        return "".join([self.first, "\r\n", *(f"{k}: {v}\r\n" for k, v in headers), "\r\n"]).encode("latin-1")


@dataclasses.dataclass(slots=True)
class Reply(Message):
    status: int = 0
    length: str = ""
    """The Content-Length it stated (for HEAD there is one, and no body)."""


def end_to_end(headers: Headers) -> Headers:
    """Without the headers that belong to one connection or state the body's length."""
    return [(k, v) for k, v in headers if k.lower() not in _HOP_BY_HOP]


def error_reply(rule: Rule, path: str) -> Reply:
    status = rule.status or 500
    reason = http.client.responses.get(status, "Fault")
    headers = [("Content-Type", "application/xml"), ("x-amz-request-id", "FAULT")]
    headers += [(k, v) for k, v in rule.headers.items() if v is not None]
    return Reply(f"HTTP/1.1 {status} {reason}", headers, rule.error_body(path), status)


def signed_elsewhere(request: Message, region: str, *, redirect: bool) -> Rule | None:
    """How S3 refuses what is signed for another region than `region`; None: it is not. Unsigned requests are not asked."""
    scope = request.get("authorization").partition("Credential=")[2].partition(",")[0].split("/")
    if len(scope) < 3 or scope[2] == region:
        return None
    text = f"the region '{scope[2]}' is wrong; expecting '{region}'"
    code, status = ("PermanentRedirect", 301) if redirect else ("AuthorizationHeaderMalformed", 400)
    body = f"<Error><Code>{code}</Code><Message>{text}</Message><Region>{region}</Region><RequestId>FAULT</RequestId></Error>"
    return Rule("error", status=status, code=code, body=body.encode(), headers={"x-amz-bucket-region": region})


def mismatch(request: Message) -> str | None:
    """The name of a checksum header that the body does not match, if there is one."""
    from awscrt.checksums import crc64nvme

    checks: dict[str, Callable[[bytes], bytes]] = {
        "content-md5": lambda body: hashlib.md5(body, usedforsecurity=False).digest(),
        "x-amz-checksum-crc32": lambda body: zlib.crc32(body).to_bytes(4, "big"),
        "x-amz-checksum-crc32c": lambda body: crc32c(body).to_bytes(4, "big"),
        "x-amz-checksum-crc64nvme": lambda body: crc64nvme(body).to_bytes(8, "big"),
        "x-amz-checksum-sha1": lambda body: hashlib.sha1(body, usedforsecurity=False).digest(),
        "x-amz-checksum-sha256": lambda body: hashlib.sha256(body).digest(),
    }
    for name, check in checks.items():
        claimed = request.get(name)
        if claimed and claimed != base64.b64encode(check(request.body)).decode():
            return name
    return None


def rewrite(reply: Reply, rule: Rule) -> None:
    changed = {k.lower(): v for k, v in rule.headers.items()}
    reply.headers = [(k, v) for k, v in reply.headers if k.lower() not in changed]
    reply.headers += [(k, v) for k, v in rule.headers.items() if v is not None]
    reply.length = changed.get("content-length") or reply.length
    if rule.status is not None:
        reply.status = rule.status
        reply.first = f"HTTP/1.1 {rule.status} {http.client.responses.get(rule.status, 'Fault')}"


def chunks(body: bytes) -> bytes:
    pieces = [body[at : at + _CHUNK] for at in range(0, len(body), _CHUNK)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _read_head(stream: BufferedReader) -> Message | None:
    """The first line and the headers; None at the end of the stream."""
    first = stream.readline(_LINE)
    if not first:
        return None
    headers: Headers = []
    while (line := stream.readline(_LINE)) not in (b"\r\n", b"\n"):
        if not line:
            raise HangUpError
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name, value.strip()))
    return Message(first.decode("latin-1").strip(), headers)


def _read_exactly(stream: BufferedReader, size: int) -> bytes:
    body = stream.read(size)
    if len(body) != size:
        raise HangUpError
    return body


def read_request(client: socket.socket, stream: BufferedReader) -> Message | None:
    request = _read_head(stream)
    if request is None:
        return None
    if request.get("expect").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if "chunked" in request.get("transfer-encoding").lower():
        pieces = []
        while size := int(stream.readline(_LINE).split(b";")[0], 16):
            pieces.append(_read_exactly(stream, size))
            stream.readline(_LINE)
        while stream.readline(_LINE) not in (b"\r\n", b"\n", b""):
            pass
        request.body = b"".join(pieces)
    elif length := int(request.get("content-length") or 0):
        request.body = _read_exactly(stream, length)
    return request


def read_reply(upstream: socket.socket, method: str) -> Reply:
    response = http.client.HTTPResponse(upstream, method=method)
    with contextlib.closing(response):
        response.begin()
        headers = response.getheaders()
        length = response.getheader("content-length") or ""
        first = f"HTTP/1.1 {response.status} {response.reason}"
        return Reply(first, headers, response.read(), response.status, length if method == "HEAD" else "")
