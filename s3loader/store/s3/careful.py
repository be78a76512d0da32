"""The careful path: one request over urllib3, for what the fast path cannot read.

That is: bodies in chunks or without a length, interim (1xx) responses, HTTP/1.0, proxies, and all requests that
are few (listings, multipart control, copies). It sends the very bytes that the job signed, and leaves all judgement of the
response to the job; so both paths check the same. Slow, and in no hurry: a thread watches the time limit.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from s3loader.credentials import Credentials, CredentialsSource
from s3loader.errors import ConfigError, S3LoaderError, StoreTimeoutError, TruncatedError
from s3loader.store.client_errors import from_transport
from s3loader.store.options import MOST_THREADS, StoreOptions
from s3loader.store.s3.connection import Connections
from s3loader.store.s3.http import Head, Signer, UnexpectedResponse
from s3loader.store.s3errors import Where
from s3loader.types import Buffer

__all__ = ["CarefulPath", "Response"]

_REDIRECTS: Final = (301, 302, 307, 308)
_MOST_REDIRECTS: Final = 4
_PIECE: Final = 256 << 10
_SIGNED_FIRST: Final = ("host", "user-agent", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token", "authorization")


class Response:
    """A response whose head has come; its body is read from here, once."""

    def __init__(self, raw: Any, head: Head, where: Where, watch: _Watch) -> None:
        self.head = head
        self._raw = raw
        self._where = where
        self._watch = watch

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the body, which must be exactly as long.

        Raises:
            TruncatedError: it is shorter.
            UnexpectedResponse: it is longer.
        """
        at, size = 0, len(view)
        while at < size:
            piece = self._read(min(_PIECE, size - at))
            if not piece:
                text = f"the body ended after {at} of {size} bytes"
                raise TruncatedError(text, op=self._where.op, url=self._where.url, retryable=True)
            view[at : at + len(piece)] = piece
            at += len(piece)
        self.end()

    def read_up_to(self, limit: int) -> bytearray:
        """The body, or its first `limit` bytes."""
        found = bytearray()
        while len(found) < limit and (piece := self._read(min(_PIECE, limit - len(found)))):
            found += piece
        return found

    def read_all(self, limit: int) -> bytearray:
        """The whole body, whose length need not be known, as long as its end is told.

        Raises:
            UnexpectedResponse: it has more than `limit` bytes, or nothing tells its end from a connection that broke.
        """
        if self.head.length < 0 and not getattr(self._raw, "chunked", False):
            raise UnexpectedResponse("nothing says how long it is", self.head.status)
        if self.head.length > limit:
            raise UnexpectedResponse(f"it has more than {limit} bytes", self.head.status)
        found = self.read_up_to(limit)
        self.end()
        if 0 <= self.head.length != len(found):
            text = f"the body ended after {len(found)} of {self.head.length} bytes"
            raise TruncatedError(text, op=self._where.op, url=self._where.url, retryable=True)
        return found

    def end(self) -> None:
        """Read the end of the body.

        Raises:
            UnexpectedResponse: there is more of it.
        """
        if self._read(1):
            raise UnexpectedResponse("the body goes on beyond its end", self.head.status)

    def _read(self, size: int) -> bytes:
        try:
            piece: bytes = self._raw.read1(size)
        except Exception as error:
            raise self._watch.explain(error, self._where, in_body=True) from error
        self._watch.check(self._where)
        return piece


class CarefulPath:
    """Sends requests over urllib3's pools, one set of them per process.

    Args:
        connections: Know the endpoint.
        credentials: For requests that a redirect sends to another host.
        options: Timeouts, redirects.
        proxy: URL of the proxy to go through; None: none.
    """

    def __init__(
        self, connections: Connections, credentials: CredentialsSource, options: StoreOptions, proxy: str | None = None
    ) -> None:
        self._connections = connections
        self._credentials = credentials
        self._options = options
        self._proxy = proxy
        self._pools: dict[tuple[Any, ...], Any] = {}
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def send(self, wire: tuple[Any, ...], where: Where, time_limit: float, bodiless: bool) -> Iterator[Response]:
        """Send a request and receive the head of its response; redirects are followed as far as that is allowed.

        Args:
            wire: Head and body, as a job writes them.
            where: What errors say was asked.
            time_limit: Seconds for all of it, reading the body included.
            bodiless: It is a HEAD.

        Raises:
            S3LoaderError: it could not be sent, or no response came.
            UnexpectedResponse: the response is not HTTP.
        """
        method, target, headers = _parsed(wire[0])
        body = wire[1] if len(wire) > 1 else None
        with _Watch(time_limit) as watch:
            raw = self._request(self._pool(), method, target, headers, body, where, watch)
            for _ in range(_MOST_REDIRECTS):
                location = raw.headers.get("location") if raw.status in _REDIRECTS else None
                hop = self._hop(method, location, headers) if location else None
                if hop is None:
                    break
                raw.close()
                pool, target, headers = hop
                raw = self._request(pool, method, target, headers, body, where, watch)
            try:
                if raw.version not in (10, 11):
                    raise UnexpectedResponse("not an HTTP/1.1 status line", raw.status)
                told = {name.lower(): value for name, value in raw.headers.items()}
                if "transfer-encoding" in told:
                    told.pop("content-length", None)
                yield Response(raw, Head.of(raw.status, told), where, watch)
                if bodiless:
                    raw.drain_conn()
            finally:
                raw.close()  # of a body that was read to its end, the connection is back in its pool already

    def _request(
        self, pool: Any, method: str, target: str, headers: dict[str, str], body: Buffer | None, where: Where, watch: _Watch
    ) -> Any:
        from urllib3 import Timeout

        options = self._options
        if self._proxy is not None and pool.scheme == "http":
            target = f"http://{headers['Host']}{target}"
        _here.watch = watch
        try:
            return pool.urlopen(
                method,
                target,
                body=body,
                headers=headers,
                retries=False,
                redirect=False,
                assert_same_host=False,  # of an absolute target, as proxies want it
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=options.connect_timeout, read=options.read_timeout),
            )
        except Exception as error:
            raise watch.explain(error, where, in_body=False) from error
        finally:
            _here.watch = None

    # -- pools -------------------------------------------------------------------------------------

    def open_ahead(self) -> None:
        """Load urllib3 and connect once, for what comes next; where that fails, who asks will say why."""
        if self._proxy is not None:
            return
        with contextlib.suppress(Exception):
            pool = self._pool()
            connection = pool._get_conn()
            if not connection.sock:
                connection.connect()
            pool._put_conn(connection)

    def _pool(self) -> Any:
        endpoint = self._connections.endpoint
        return self._pool_to(endpoint.scheme, endpoint.host, endpoint.port)

    def _pool_to(self, scheme: str, host: str, port: int) -> Any:
        if self._pid != os.getpid():  # a forked child: connections and locks are the parent's
            self._pools, self._lock, self._pid = {}, threading.Lock(), os.getpid()
        with self._lock:
            pool = self._pools.get((scheme, host, port))
            if pool is None:
                pool = self._pools[scheme, host, port] = self._make(scheme, host, port)
            return pool

    def _make(self, scheme: str, host: str, port: int) -> Any:
        import ssl

        import urllib3

        options: dict[str, Any] = {"maxsize": self._options.concurrency or MOST_THREADS, "block": False}
        if scheme == "https":
            options["ssl_context"] = ssl.create_default_context(cafile=self._connections.endpoint.ca_bundle)
        manager: Any
        if self._proxy is None:
            manager = urllib3.PoolManager(**options)
        else:
            parts = urlsplit(self._proxy)
            proxy_headers = None
            if parts.username is not None:
                words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
                proxy_headers = urllib3.make_headers(proxy_basic_auth=words)
            manager = urllib3.ProxyManager(self._proxy, proxy_headers=proxy_headers, **options)
        pool = manager.connection_from_host(f"[{host}]" if ":" in host else host, port, scheme)
        pool.ConnectionCls = _watched(pool.ConnectionCls)
        pool.s3loader_manager = manager  # it would take its pools with it
        return pool

    def close(self) -> None:
        """Close what is idle."""
        pools, self._pools = self._pools, {}
        if self._pid == os.getpid():
            for pool in pools.values():
                pool.close()

    # -- redirects to other hosts -----------------------------------------------------------------

    def _hop(self, method: str, location: str, headers: dict[str, str]) -> tuple[Any, str, dict[str, str]] | None:
        """Pool, target and headers of the request that follows a redirect; None: it is not to be followed."""
        allowed = self._options.follow_redirects
        endpoint = self._connections.endpoint
        parts = urlsplit(urljoin(endpoint.url() + "/", location))
        host = (parts.hostname or "").lower()
        listed = not isinstance(allowed, bool) and host in allowed
        if not host or not (allowed is True or listed) or parts.scheme not in ("http", "https"):
            return None
        if endpoint.tls and parts.scheme != "https":
            raise ConfigError(
                f"the store redirects from https to plain http ({host})",
                hint="such a redirect is never followed",
                url=endpoint.url(),
            )
        port = parts.port or (443 if parts.scheme == "https" else 80)
        _, target, again = _parsed(self._resigned(method, parts, headers, listed))
        return self._pool_to(parts.scheme, host, port), target, again

    def _resigned(self, method: str, to: SplitResult, headers: dict[str, str], trusted: bool) -> bytes:
        """The head of the request, signed for another host; with the session token only where that host is trusted."""
        keys = self._credentials()
        if keys is not None and not trusted:
            keys = Credentials(keys.access_key_id, keys.secret_access_key)
        kept = {name.lower(): value for name, value in headers.items() if name.lower() not in _SIGNED_FIRST}
        unsigned = {name: kept.pop(name) for name in ("range", "if-match", "content-length") if name in kept}
        signer = Signer(keys, self._connections.endpoint.region, to.netloc.rpartition("@")[2])
        text = signer.head(method, to.path or "/", to.query, kept)
        return (text + "".join(f"{name}: {value}\r\n" for name, value in unsigned.items())).encode("ascii")


def _parsed(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers of a request head."""
    first, *lines = head.decode("ascii").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.partition(": ") for line in lines)
    return method, target, {name: value for name, _, value in pairs}


# -- the time limit ---------------------------------------------------------------------------------

_here = threading.local()


class _Watch:
    """Shuts the socket of a request that takes longer than it may."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._connection: Any = None
        self.expired = False

    def __enter__(self) -> _Watch:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def on(self, connection: Any) -> None:
        """The request goes out on `connection`, a connection of http.client."""
        self._connection = connection

    def _expire(self) -> None:
        self.expired = True
        sock = getattr(self._connection, "sock", None)
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def check(self, where: Where) -> None:
        """Raise `StoreTimeoutError` if the time is over."""
        if self.expired:
            raise StoreTimeoutError(
                f"the response did not end within {self._seconds:.0f} s",
                op=where.op,
                url=where.url,
                hint="StoreOptions.request_timeout says how long one request may take",
            )

    def explain(self, error: Exception, where: Where, *, in_body: bool) -> S3LoaderError | UnexpectedResponse:
        """What to raise for what http.client, urllib3 or the socket raised."""
        if isinstance(error, S3LoaderError):
            return error
        try:
            self.check(where)
        except StoreTimeoutError as late:
            return late
        return from_transport(error, where, in_body=in_body)


def _watched(base: Any) -> Any:
    """urllib3's class of a connection, which tells the watch of this thread where the request goes out."""

    class Watched(base):  # type: ignore[misc]  # urllib3 chooses the class
        def connect(self) -> None:
            _watch_on(self)
            super().connect()

        def putrequest(self, *args: Any, **options: Any) -> None:
            _watch_on(self)
            super().putrequest(*args, **options)

    return Watched


def _watch_on(connection: Any) -> None:
    watch = getattr(_here, "watch", None)
    if watch is not None:
        watch.on(connection)
