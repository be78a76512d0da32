"""`FaultProxy`: an HTTP/1.1 proxy on loopback that does to the traffic what its rules say."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable
from io import BufferedReader
from types import TracebackType
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from s3loader.errors import ConfigError
from s3loader.testing._wire import (
    BODILESS,
    HangUpError,
    Message,
    Reply,
    chunks,
    end_to_end,
    error_reply,
    mismatch,
    read_reply,
    read_request,
    rewrite,
    signed_elsewhere,
)
from s3loader.testing.faults import Plan, Request, Rule

__all__ = ["FaultProxy"]

_HOST: Final = "127.0.0.1"


class FaultProxy:
    """A proxy in front of a plain HTTP server, with threads in this process.

        rule = Rule("drop_reply", method="PUT", path="/root.jsonl", nth=1)
        with FaultProxy(s3.endpoint_url, [rule]) as proxy:
            store = s3.open_store(bucket, endpoint_url=proxy.endpoint_url)
            ...
            assert proxy.count("PUT") == 2 and rule.fired == 1

    The Host header is forwarded as it came, since it is the one that was signed. Each request
    goes upstream on a connection of its own, so that the proxy never has to guess whether the
    server saw it; to the client it keeps connections alive.

    Args:
        target: The server's URL, ``http://HOST:PORT``.
        rules: The faults; the first rule that strikes a request decides. None: it only records.
        seed: For probabilities and for bits that are not given.
        ssl_context: Speak TLS to the client with this server-side context.
        verify_checksums: Refuse a body that its ``x-amz-checksum-*`` header or Content-MD5 does not match,
            as S3 does; the servers from pip do not know CRC32C, or do not look.
        region: Refuse what is signed for another region and name this one, as S3 does; the servers from pip do not look.
        redirect: Refuse it with a 301 in place of a 400; S3 does both.
    """

    def __init__(
        self,
        target: str,
        rules: Iterable[Rule] = (),
        *,
        seed: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        verify_checksums: bool = False,
        region: str | None = None,
        redirect: bool = False,
    ) -> None:
        parts = urlsplit(target)
        if parts.scheme != "http" or parts.hostname is None:
            raise ConfigError(f"the proxy needs a plain HTTP target, not {target!r}", hint="write http://HOST:PORT")
        self._target = (parts.hostname, parts.port or 80)
        self.plan = Plan(rules, seed)
        self._ssl = ssl_context
        self._verify = verify_checksums
        self._region, self._redirect = region, redirect
        self._lock = threading.Lock()
        self._requests: dict[int, Request] = {}
        self._next = 0
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._listener = socket.create_server((_HOST, 0), backlog=512)
        self.connections = 0
        """Client connections accepted so far."""
        scheme = "http" if ssl_context is None else "https"
        self.endpoint_url = f"{scheme}://{_HOST}:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    # -- what was seen ---------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in the order they came; `status` is None until it is answered."""
        with self._lock:
            return list(self._requests.values())

    def count(self, method: str = "", path: str = "") -> int:
        """How many requests with this method whose decoded path contains `path`."""
        return sum((not method or r.method == method) and path in r.path for r in self.requests)

    def clear(self) -> None:
        """Forget the requests seen so far."""
        with self._lock:
            self._requests.clear()

    # -- life ------------------------------------------------------------------------------

    def close(self) -> None:
        """Release what is held, cut every connection, end the threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sockets = [*self._sockets]
        for rule in self.plan.rules:
            rule.release.set()
        _cut(self._listener)
        for each in sockets:
            _cut(each)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=run, args=args, name="s3loader-fault-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                if self._closed:
                    client.close()
                    return
                self.connections += 1
                self._sockets.add(client)
                self._threads = [t for t in self._threads if t.is_alive()]
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """One client connection, request after request."""
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._ssl is not None:
                client = self._over_tls(client, self._ssl)  # shakes hands on the first read
            with client.makefile("rb") as stream:
                while self._one(client, stream):
                    pass
        except (OSError, HangUpError, http.client.HTTPException):
            pass  # a client that leaves, or is left, is what this proxy is for
        finally:
            with self._lock:
                self._sockets.discard(client)
            client.close()

    def _over_tls(self, raw: socket.socket, context: ssl.SSLContext) -> socket.socket:
        client = context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._sockets.discard(raw)
            self._sockets.add(client)
        return client

    # -- one request -----------------------------------------------------------------------

    def _one(self, client: socket.socket, stream: BufferedReader) -> bool:
        """Serve the next request; whether another may follow on this connection."""
        request = read_request(client, stream)
        if request is None:
            return False
        method, target, version = request.first.split(" ", 2)
        rule = self.plan.strike(method, target)
        path, _, query = target.partition("?")
        headers = {k.lower(): v for k, v in request.headers if k.lower() != "authorization"}
        seen = Request(method, unquote(path), query, headers, len(request.body), fault=rule.action if rule else None)
        number = self._note(None, seen)
        reply = self._answer(request, rule, seen.path)
        headless = method == "HEAD" or reply.status in BODILESS
        size = 0 if headless else len(reply.body)
        if rule is not None and rule.action in ("truncate", "reset", "stall"):
            size = min(size, size // 2 if rule.at is None else rule.at)
        # Noted before the client can have seen the last byte, so that a test may ask at once.
        self._note(number, dataclasses.replace(seen, status=reply.status, received=size))
        self._send(client, reply, rule, headless, size)
        return version == "HTTP/1.1" and request.get("connection").lower() != "close"

    def _note(self, number: int | None, seen: Request) -> int:
        with self._lock:
            if number is None:
                number = self._next
                self._next += 1
            elif number not in self._requests:
                return number  # forgotten by `clear`
            self._requests[number] = seen
            return number

    def _answer(self, request: Message, rule: Rule | None, path: str) -> Reply:
        """The reply to send, with what the rule does before that done."""
        action = rule.action if rule else None
        if self._region is not None and (wrong := signed_elsewhere(request, self._region, redirect=self._redirect)) is not None:
            return error_reply(wrong, path)
        if rule is None:
            return self._forward(request)
        if action not in ("hold", "hold_reply", "stall"):
            rule.reached.set()
        if action == "refuse":
            raise HangUpError
        if action == "delay":
            time.sleep(rule.seconds)
        if action == "hold":
            self._wait(rule)
        if action == "flip_request" and request.body:
            request.body = self._flip(request.body, rule)
        if action == "error":
            if rule.forward:
                self._forward(request)
            return error_reply(rule, path)
        reply = self._forward(request)
        if action == "duplicate":
            self._forward(request)
        if action == "hold_reply":
            self._wait(rule)
        if action == "drop_reply":
            raise HangUpError
        if action == "flip" and reply.body:
            reply.body = self._flip(reply.body, rule)
        if action == "rewrite":
            rewrite(reply, rule)
        return reply

    def _forward(self, request: Message) -> Reply:
        if self._verify and (name := mismatch(request)) is not None:
            return error_reply(Rule("error", status=400, code="BadDigest"), name)
        headers = end_to_end(request.headers)
        if request.body or request.get("content-length") or request.get("transfer-encoding"):
            headers.append(("Content-Length", str(len(request.body))))
        headers.append(("Connection", "close"))
        with socket.create_connection(self._target, timeout=60) as upstream:
            with self._lock:
                self._sockets.add(upstream)
            try:
                upstream.sendall(request.head(headers) + request.body)
                return read_reply(upstream, request.first.split(" ", 1)[0])
            finally:
                with self._lock:
                    self._sockets.discard(upstream)

    def _wait(self, rule: Rule) -> None:
        rule.reached.set()
        rule.release.wait()
        if self._closed:
            raise HangUpError

    def _flip(self, body: bytes, rule: Rule) -> bytes:
        bit = rule.bit if rule.bit is not None else self.plan.draw(8 * len(body))
        changed = bytearray(body)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    def _send(self, client: socket.socket, reply: Reply, rule: Rule | None, headless: bool, size: int) -> None:
        """Send the reply as the rule has it: `size` bytes of its body, and what comes after them."""
        action = rule.action if rule else None
        chunked = action == "chunked" and not headless
        headers = end_to_end(reply.headers)
        if chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        elif reply.status not in BODILESS:
            headers.append(("Content-Length", reply.length or str(len(reply.body))))
        client.sendall(reply.head(headers))
        if headless:
            return
        if rule is not None and action == "rate":
            self._send_slowly(client, reply.body, rule.bytes_per_second)
            return
        client.sendall(chunks(reply.body) if chunked else reply.body[:size])
        if rule is not None and action == "stall":
            self._wait(rule)
            client.sendall(reply.body[size:])
        elif action == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if action in ("truncate", "reset"):
            raise HangUpError

    def _send_slowly(self, client: socket.socket, body: bytes, rate: int) -> None:
        step = max(1, rate // 50)
        start = time.monotonic()
        for at in range(0, len(body), step):
            client.sendall(body[at : at + step])
            time.sleep(max(0.0, start + (at + step) / rate - time.monotonic()))
            if self._closed:
                raise HangUpError


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
