"""A tiny S3 server for the tests of our S3 client, which misbehaves when told to."""

from __future__ import annotations

import contextlib
import random
import re
import select
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape

from s3loader import StoreOptions
from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.store.s3 import S3Backend

DATA = random.Random(5).randbytes(300_000)

KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    """Number of the connection it came on, from 0."""

    @property
    def key(self) -> str:
        return unquote(self.path.partition("?")[0]).removeprefix("/bucket").removeprefix("/")

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.path.partition("?")[2], keep_blank_values=True))


@dataclass
class Reply:
    status: str = "200 OK"
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    keep: bool = True

    def set(self, name: str, value: str | None) -> Reply:
        self.headers = [(n, v) for n, v in self.headers if n.lower() != name.lower()]
        if value is not None:
            self.headers.append((name, value))
        return self

    def raw(self) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        return f"HTTP/1.1 {self.status}\r\n{lines}\r\n".encode("latin-1") + self.body


Fault = Callable[[Request, Reply, socket.socket], bool]
"""Sends something in place of the reply; whether the connection goes on."""


class RogueServer:
    """Serves the objects of `objects` under ``/bucket/``; `fault` is asked for every request.

    It stops with its `with` block and takes its threads along. Several at addresses of one name (127.0.0.1, 127.0.0.2, ...)
    with the same `port` and `context` are one store.
    """

    def __init__(self, context: ssl.SSLContext | None = None, *, address: str = "127.0.0.1", port: int = 0) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.connections = 0
        self.host = address
        """As clients call it."""
        self.resumed: list[bool] = []
        """Of each TLS connection, whether its session went on from an earlier one."""
        self._context = context
        self._listener = socket.create_server((address, port))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def endpoint_url(self) -> str:
        return f"{'https' if self._context else 'http'}://{self.host}:{self.port}"

    def etag(self, key: str) -> str:
        return f"etag-{len(self.objects[key])}"

    def __enter__(self) -> RogueServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_connections()
        for thread in (self._accepting, *self._threads):
            thread.join(10)
            assert not thread.is_alive()

    def cut_connections(self) -> None:
        """Close all connections, as a server does with idle ones."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True)
            self.connections += 1
            self._sockets.append(sock)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        plain = sock
        try:
            if self._context is not None:
                sock = secured = self._context.wrap_socket(sock, server_side=True)
                self.resumed.append(bool(secured.session_reused))
            with sock, sock.makefile("rb") as file:
                while (request := self._read(file, number)) is not None:
                    self.requests.append(request)
                    fault = self.fault(request)
                    reply = self._reply(request)
                    if fault is not None:
                        if not fault(request, reply, sock):
                            break
                        continue
                    sock.sendall(reply.raw())
                    if not reply.keep:
                        break
        except OSError:
            pass
        finally:
            plain.close()
            if plain in self._sockets:
                self._sockets.remove(plain)

    def _read(self, file: object, number: int) -> Request | None:
        line = file.readline()  # type: ignore[attr-defined]
        if not line:
            return None
        method, path, _ = line.decode("ascii").split(" ")
        headers: dict[str, str] = {}
        while (line := file.readline().decode("latin-1").rstrip("\r\n")) != "":  # type: ignore[attr-defined]
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        body = file.read(int(headers.get("content-length", "0")))  # type: ignore[attr-defined]
        return Request(method, path, headers, body, number)

    def _document(self, request: Request) -> bytes | None:
        """The XML of verbs that answer by one; None: it is another verb."""
        query, method = request.query, request.method
        if method == "GET" and "list-type" in query:
            rows = (
                f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>&quot;{self.etag(key)}&quot;</ETag></Contents>"
                for key, data in sorted(self.objects.items())
            )
            return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>".encode()
        if method == "GET" and "uploads" in query:
            return b"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
        if method == "GET" and "uploadId" in query:
            return b"<ListPartsResult><IsTruncated>false</IsTruncated></ListPartsResult>"
        if method == "POST" and "delete" in query:
            for key in re.findall(r"<Key>([^<]*)</Key>", request.body.decode()):
                self.objects.pop(key, None)
            return b"<DeleteResult></DeleteResult>"
        if method == "POST" and "uploads" in query:
            return b"<InitiateMultipartUploadResult><UploadId>id</UploadId></InitiateMultipartUploadResult>"
        if method == "POST":
            self.objects[request.key] = b"made of parts"
            etag = self.etag(request.key)
            return f"<CompleteMultipartUploadResult><ETag>&quot;{etag}&quot;</ETag></CompleteMultipartUploadResult>".encode()
        source = request.headers.get("x-amz-copy-source")
        if method == "PUT" and source is not None:
            if "uploadId" in query:
                return b"<CopyPartResult><ETag>&quot;part&quot;</ETag></CopyPartResult>"
            self.objects[request.key] = self.objects[unquote(source).removeprefix("/bucket/")]
            return f"<CopyObjectResult><ETag>&quot;{self.etag(request.key)}&quot;</ETag></CopyObjectResult>".encode()
        return None

    def _reply(self, request: Request) -> Reply:
        reply = Reply(headers=[("Server", "rogue"), ("Accept-Ranges", "bytes")])
        if request.method in ("PUT", "POST") or request.query:
            found = self._document(request)
            if found is not None:
                reply.body = found
                return reply.set("Content-Length", str(len(found))).set("Content-Type", "application/xml")
        if request.method == "DELETE":
            self.objects.pop(request.key, None)
            reply.status = "204 No Content"
            return reply
        if request.method == "PUT":
            self.objects[request.key] = request.body
            return reply.set("ETag", f'"{self.etag(request.key)}"').set("Content-Length", "0")
        data = self.objects.get(request.key)
        if data is not None and request.method == "HEAD":
            return reply.set("ETag", f'"{self.etag(request.key)}"').set("Content-Length", str(len(data)))
        if data is None:
            return Reply("404 Not Found", [("Content-Length", "9")], b"not found")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        body = data
        if match:
            start = int(match[1])
            end = min(int(match[2]) + 1, len(data)) if match[2] else len(data)
            if start >= len(data):
                return Reply("416 Range Not Satisfiable", [("Content-Length", "0")])
            body = data[start:end]
            reply.status = "206 Partial Content"
            reply.set("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        reply.body = body
        return reply.set("ETag", f'"{self.etag(request.key)}"').set("Content-Length", str(len(body)))


def s3_backend(
    server: RogueServer,
    *,
    ca_bundle: str | None = None,
    unsigned: bool = False,
    token: str | None = None,
    tls_reader: Any = None,
    **options: Any,
) -> S3Backend:
    """Our S3 client on `server`, without retries around it."""
    settings = S3Settings(
        endpoint_url=server.endpoint_url,
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        aws_session_token=token,
        addressing_style="path",
        ca_bundle=ca_bundle,
    )
    source = CredentialsSource(settings, unsigned=unsigned)
    chosen = StoreOptions(**{"read_timeout": 10, "connect_timeout": 5, **options})
    return S3Backend(Endpoint.from_settings(settings, "bucket"), source, chosen, tls_reader=tls_reader)


# -- ways to misbehave: those that still are a right answer, and those that are not ------------------


def _changed(change: Callable[[Reply], object], keep: bool = True) -> Fault:
    def fault(request: Request, reply: Reply, sock: socket.socket) -> bool:
        change(reply)
        sock.sendall(reply.raw())
        return keep

    return fault


def _bytes(make: Callable[[Reply], bytes], keep: bool = False) -> Fault:
    def fault(request: Request, reply: Reply, sock: socket.socket) -> bool:
        sock.sendall(make(reply))
        return keep

    return fault


def _status(status: str, **headers: str) -> Fault:
    listed = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return _bytes(lambda reply: Reply(status, [*listed, ("Content-Length", "5")], b"wrong").raw(), keep=True)


def _drip(request: Request, reply: Reply, sock: socket.socket) -> bool:
    raw = reply.raw()
    stop = raw.index(b"\r\n\r\n") + 6
    for i in range(stop):
        sock.sendall(raw[i : i + 1])
    sock.sendall(raw[stop:])
    return True


def _silence(request: Request, reply: Reply, sock: socket.socket) -> bool:
    select.select([sock], [], [], 30)  # until the client gives up
    return False


def _stalls_in_body(request: Request, reply: Reply, sock: socket.socket) -> bool:
    sock.sendall(reply.raw()[:-1])
    return _silence(request, reply, sock)


def _shift_range(reply: Reply) -> None:
    value = dict(reply.headers)["Content-Range"]
    first, last, size = map(int, re.findall(r"\d+", value))
    reply.set("Content-Range", f"bytes {first + 1}-{last + 1}/{size + 9}")


GOOD: dict[str, Fault] = {
    "plain": _changed(lambda reply: None),
    "closes after it": _changed(lambda reply: reply.set("Connection", "close"), keep=False),
    "head drips": _drip,
    "200 with Content-Range": _changed(lambda reply: setattr(reply, "status", "200 OK")),
    "names in odd case": _changed(lambda reply: reply.set("Content-Length", None).set("cOnTeNt-LeNgTh", str(len(reply.body)))),
    "no reason phrase": _changed(lambda reply: setattr(reply, "status", reply.status[:3] + " ")),
    "long head": _changed(lambda reply: reply.set("X-Padding", "x" * 3000)),
}
BAD: dict[str, Fault] = {
    "short body, closed": _bytes(lambda reply: reply.raw()[:-1]),
    "extra bytes": _bytes(lambda reply: reply.raw() + b"!"),
    "closed in the head": _bytes(lambda reply: reply.raw()[:20]),
    "closed before the head": _bytes(lambda reply: b""),
    "chunked": _bytes(
        lambda reply: (
            reply.set("Content-Length", None).set("Transfer-Encoding", "chunked").raw()
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(reply.body), reply.body)
        )
    ),
    "chunked with a length": _changed(lambda reply: reply.set("Transfer-Encoding", "chunked")),
    "no length": _changed(lambda reply: reply.set("Content-Length", None), keep=False),
    "negative length": _changed(lambda reply: reply.set("Content-Length", "-1")),
    "two lengths": _changed(lambda reply: reply.headers.append(("Content-length", str(len(reply.body))))),
    "HTTP/1.0": _bytes(lambda reply: reply.raw().replace(b"HTTP/1.1", b"HTTP/1.0", 1)),
    "HTTP/2": _bytes(lambda reply: reply.raw().replace(b"HTTP/1.1", b"HTTP/2", 1)),
    "folded line": _changed(lambda reply: reply.set("X-Folded", "a\r\n b")),
    "bare line feed": _changed(lambda reply: reply.set("X-Bare", "a\nb: c")),
    "nul": _changed(lambda reply: reply.set("X-Nul", "a\0b")),
    "continue first": _bytes(lambda reply: b"HTTP/1.1 100 Continue\r\n\r\n" + reply.raw()),
    "endless head": _bytes(lambda reply: reply.set("X-Padding", "x" * 40_000).raw()),
    "no HTTP": _bytes(lambda reply: b"220 smtp ready\r\n\r\n"),
    "301": _status("301 Moved Permanently", Location="http://127.0.0.1:1/"),
    "307": _status("307 Temporary Redirect", Location="http://127.0.0.1:1/"),
    "403": _status("403 Forbidden"),
    "403, clock skew": _status("403 Forbidden", Date="Thu, 01 Jan 1970 00:00:00 GMT"),
    "501": _status("501 Not Implemented"),
    "204": _status("204 No Content"),
}


def _slow_down(body: bytes, length: int | None = None, *, keep: bool = True, **headers: str) -> Fault:
    listed = [(name.replace("_", "-"), value) for name, value in headers.items()]
    if length is not None:
        listed.append(("Content-Length", str(length)))
    return _bytes(lambda reply: Reply("503 Slow Down", listed, body).raw(), keep=keep)


SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Less</Message><RequestId>R1</RequestId></Error>"
_CHUNKS = b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in (SLOW_DOWN[:50], SLOW_DOWN[50:]))
BUSY: dict[str, tuple[Fault, str | None]] = {
    "with its reason": (_slow_down(SLOW_DOWN, len(SLOW_DOWN), Retry_After="1"), "SlowDown"),
    "in chunks": (_slow_down(_CHUNKS + b"0\r\n\r\n", Transfer_Encoding="chunked"), "SlowDown"),
    "in chunks that break off": (_slow_down(_CHUNKS + b"5\r\nx", keep=False, Transfer_Encoding="chunked"), "SlowDown"),
    "no body": (_slow_down(b"", 0), None),
    "no length": (_slow_down(SLOW_DOWN, keep=False), None),
    "cut off": (_slow_down(SLOW_DOWN, len(SLOW_DOWN) + 9, keep=False), "SlowDown"),
    "endless": (_slow_down(b"<Error>" + b"x" * 100_000, 1 << 40, keep=False), None),
    "more than it says": (_slow_down(SLOW_DOWN + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", len(SLOW_DOWN)), "SlowDown"),
    "500": (_status("500 Internal Server Error"), None),
    "429": (_status("429 Too Many Requests"), None),
}
"""Answers that ask for patience, and the code that is read from them."""
BAD_READS: dict[str, Fault] = {
    "another range": _changed(_shift_range),
    "range of another object": _changed(lambda reply: reply.set("Content-Range", "bytes 0-3/4")),
    "unknown size": _changed(lambda reply: reply.set("Content-Range", "bytes 100-299/*")),
    "range ignored": _bytes(lambda reply: b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b"?" * 500, keep=True),
    "206 without Content-Range": _changed(lambda reply: reply.set("Content-Range", None)),
    "another ETag": _changed(lambda reply: reply.set("ETag", '"another"')),
    "weak ETag": _changed(lambda reply: reply.set("ETag", "W/" + dict(reply.headers)["ETag"])),
    "no ETag": _changed(lambda reply: reply.set("ETag", None)),
    "body of another length": _bytes(lambda reply: reply.set("Content-Length", str(len(reply.body) - 1)).raw()[:-1], keep=True),
}
SLOW: dict[str, Fault] = {"silence": _silence, "stalls in the body": _stalls_in_body}


def once(fault: Fault) -> object:
    """Misbehave on the first request only."""
    left = [fault]
    return lambda request: left.pop() if left else None
