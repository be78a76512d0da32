"""Keep-alive connections to one endpoint: to any of its addresses, idle ones kept, looked at before they are used again.

A front end of a large store is one address of many, and a name resolves to others every few seconds. A dead address, or an
IPv6 that leads nowhere, costs a quarter of a second once, not a connect timeout each time: the next address is tried beside
it, and the first that answers wins (RFC 8305, "happy eyeballs"; the delay is the one recommended there).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import selectors
import socket
import ssl
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from s3loader.endpoint import Endpoint
from s3loader.store.s3.in_flight import Hedges, InFlight
from s3loader.types import Buffer

__all__ = ["RECORDS", "TICK", "Addresses", "Connection", "Connections", "NotConnectedError", "is_stale"]

_STAGGER: Final = 0.25
"""Seconds after which the next address is tried beside the ones before."""
_FRESH: Final = 30.0
"""Seconds that what a name resolves to is believed."""
_SHUNNED: Final = 60.0
"""Seconds that an address which did not answer comes last."""
_UNDER_WAY: Final = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)


class Addresses:
    """The addresses of one host: spread over all of them, past those that do not answer. Safe to use from several threads."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._found: list[Any] = []
        self._until = 0.0
        self._turn = itertools.count()
        self._shunned: dict[Any, float] = {}

    def connect(self, timeout: float) -> socket.socket:
        """A connected socket, in blocking mode.

        Args:
            timeout: Seconds for all addresses together.

        Raises:
            OSError: none of them answered in time; the error of the last.
        """
        order = self._order()
        if len(order) == 1:
            return self._try_one(order[0], timeout)
        return self._try_all(order, timeout)

    def _order(self) -> list[Any]:
        """Each connection begins with another address; those that did not answer of late come last."""
        now = time.monotonic()
        found = self._found
        if not found or now > self._until:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._found, self._until = found, now + _FRESH
        first = next(self._turn) % len(found)
        rotated = found[first:] + found[:first]
        return sorted(rotated, key=lambda info: self._shunned.get(info[4], 0.0) > now)

    def _shun(self, address: Any) -> None:
        if len(self._shunned) > 256:
            self._shunned.clear()
        self._shunned[address] = time.monotonic() + _SHUNNED

    def _try_one(self, info: Any, timeout: float) -> socket.socket:
        sock = socket.socket(*info[:3])
        try:
            sock.settimeout(timeout)
            sock.connect(info[4])
            sock.setblocking(True)
        except BaseException:
            sock.close()
            self._until = 0.0  # the name may lead elsewhere by now
            raise
        return sock

    def _try_all(self, order: list[Any], timeout: float) -> socket.socket:
        deadline = time.monotonic() + timeout
        waiting: dict[socket.socket, Any] = {}
        error: OSError = TimeoutError("no address answered in time")
        with selectors.DefaultSelector() as selector:
            try:
                start_next = 0.0
                while order or waiting:
                    now = time.monotonic()
                    if now >= deadline:
                        raise TimeoutError(f"none of {self._host}'s addresses answered within {timeout:g} s")
                    if order and (now >= start_next or not waiting):
                        info = order.pop(0)
                        sock = socket.socket(*info[:3])
                        waiting[sock] = info[4]
                        sock.setblocking(False)
                        selector.register(sock, selectors.EVENT_WRITE, sock)
                        code = sock.connect_ex(info[4])
                        if code not in _UNDER_WAY:
                            error = self._failed(selector, waiting, sock, code)
                        else:
                            start_next = now + _STAGGER
                        continue
                    for key, _ in selector.select((min(start_next, deadline) if order else deadline) - now):
                        tried: socket.socket = key.data
                        code = tried.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                        if code:
                            error, start_next = self._failed(selector, waiting, tried, code), 0.0
                            continue
                        del waiting[tried]
                        for address in waiting.values():  # begun before or beside it, and still silent
                            self._shun(address)
                        tried.setblocking(True)
                        return tried
                self._until = 0.0
                raise error
            finally:
                for sock in waiting:
                    sock.close()

    def _failed(
        self, selector: selectors.BaseSelector, waiting: dict[socket.socket, Any], sock: socket.socket, code: int
    ) -> OSError:
        address = waiting.pop(sock)
        self._shun(address)
        selector.unregister(sock)
        sock.close()
        return OSError(code, f"{errno.errorcode.get(code, code)} from {address[0]}")


# -- connections -----------------------------------------------------------------------------------

_IDLE_SECONDS: Final = 15.0
"""Servers close idle connections after 5 to 75 s; one that was idle for longer than this is not
worth the risk of a lost round trip."""
_MOST_IDLE: Final = 64
RECORDS: Final = 32
"""TLS records handled on one connection before the others get their turn."""
TICK: Final = 0.1
"""Seconds after which a blocking receive returns with what it has."""
_PEEK: Final = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)


class NotConnectedError(OSError):
    """No connection came about, so nothing was sent; its cause says why."""


class Connection:
    """One socket, in blocking mode with the kernel's timeouts unless `block(False)` was called."""

    __slots__ = (
        "__weakref__",
        "_blocking",
        "_poll",
        "deadline",
        "endpoint",
        "expires",
        "fd",
        "idle_since",
        "job",
        "known",
        "pending",
        "read_timeout",
        "sent",
        "sock",
        "tls",
        "used",
    )

    def __init__(self, sock: socket.socket, endpoint: Endpoint, read_timeout: float) -> None:
        self.sock = sock
        self.read_timeout = read_timeout
        """Seconds to wait for the next bytes."""
        self.fd = sock.fileno()
        self.endpoint = endpoint
        """Where it leads."""
        self.tls = endpoint.tls
        self.used = False
        """Whether an answer was received on it: the server may close such a one at any time."""
        self.known = False
        """Whether its TLS session was kept for others."""
        self.idle_since = 0.0
        self.job: Any = None
        """The `Job` that is under way here; None: nothing."""
        self.pending: list[memoryview] = []
        """For the pump: what is still to be sent."""
        self.deadline = 0.0
        """For the pump: when to give up if nothing comes."""
        self.sent = 0.0
        """For the pump: when the request went out."""
        self.expires = 0.0
        """When to give up on the job that is under way, whatever comes."""
        self._blocking = True
        self._poll: Callable[[int], list[tuple[int, int]]] | None = None
        if not self.tls and hasattr(select, "poll"):
            poller = select.poll()
            poller.register(self.fd, select.POLLIN)
            self._poll = poller.poll

    def block(self, blocking: bool) -> None:
        """Set the socket's mode."""
        if self._blocking != blocking:
            self.sock.setblocking(blocking)
            self._blocking = blocking

    def is_quiet(self) -> bool:
        """Whether nothing lies in the socket: no byte that nobody asked for, no end of the connection.

        Such a byte would be taken for the beginning of the next response: of another object's bytes.
        """
        if self._poll is not None:  # a quarter of the time of a peek, which raises where nothing is there
            return not self._poll(0)
        sock = self.sock
        try:
            if isinstance(sock, ssl.SSLSocket):
                blocking = self._blocking
                self.block(False)
                try:
                    sock.recv(1)  # TLS may have a word of its own to say, such as a session ticket
                finally:
                    self.block(blocking)
            else:
                sock.recv(1, _PEEK)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def send(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        """Send what the socket takes; returns what is left."""
        sock = self.sock
        if self.tls:
            return self._send_records(pieces)
        sent = sock.send(pieces[0]) if len(pieces) == 1 else sock.sendmsg(pieces)
        left = []
        for piece in pieces:
            size = len(piece)
            if sent < size:
                left.append(memoryview(piece)[sent:])
                sent = 0
            else:
                sent -= size
        return left

    def _send_records(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        """`send` over TLS, where one call takes one record of 16 KiB."""
        left = [memoryview(piece) for piece in pieces if len(piece)]
        try:
            for _ in range(RECORDS):
                if not left:
                    break
                left[0] = left[0][self.sock.send(left[0]) :]
                if not left[0]:
                    del left[0]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):  # it will do on
            pass
        return left

    def decrypted(self) -> int:
        """Bytes that TLS has ready, which a poller does not see."""
        return self.sock.pending() if isinstance(self.sock, ssl.SSLSocket) else 0

    def shut(self) -> None:
        """End what another thread waits for here."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close without a word to the server."""
        self.sock.close()


class Connections:
    """Opens connections to one endpoint and keeps idle ones. Safe to use from several threads.

    A forked child begins with none: it closes its copies of the parent's descriptors, which the
    server does not notice.

    Args:
        endpoint: Where to, and whom to trust.
        connect_timeout: Seconds for connecting and the TLS handshake, each.
        read_timeout: Seconds to wait for the next bytes, or to get rid of some.
        hedge: Whether reads whose answers take unusually long are asked for once more.
    """

    def __init__(self, endpoint: Endpoint, connect_timeout: float, read_timeout: float, *, hedge: bool = True) -> None:
        self.endpoint = endpoint
        self._addresses = Addresses(endpoint.host, endpoint.port)
        self.connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self.in_flight = InFlight()
        self.hedges = Hedges() if hedge else None
        """When reads are asked for once more; None: never."""
        self._context: dict[str, ssl.SSLContext] = {}
        """One, once there is one: sessions belong to it."""
        self._session: ssl.SSLSession | None = None
        self.generation = 0
        """Grows with every fork that this object has been through."""
        self._idle: deque[Connection] = deque()
        self._opening = self._closings = 0
        """Connections that are opened ahead, and how often all were closed."""
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()
        _all.add(self)
        weakref.finalize(self, _close_all, self._idle)

    def open(self) -> Connection:
        """A new connection.

        Raises:
            OSError: it failed, or took too long.
        """
        endpoint = self.endpoint
        try:
            sock = self._connect(endpoint)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise NotConnectedError(str(error)) from error
        connection = Connection(sock, endpoint, self.read_timeout)
        self._open.add(connection)
        return connection

    def _connect(self, endpoint: Endpoint) -> socket.socket:
        sock = self._addresses.connect(self.connect_timeout)
        try:
            sock.settimeout(self.connect_timeout)  # for the handshake
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(min(TICK, self.read_timeout)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self.read_timeout))
            if endpoint.tls:
                sock = self._tls_context().wrap_socket(sock, server_hostname=endpoint.host, session=self._session)
            sock.setblocking(True)
        except BaseException:
            sock.close()
            raise
        return sock

    def move(self, endpoint: Endpoint) -> None:
        """From now on connect to `endpoint`; what is idle is closed."""
        self.endpoint = endpoint
        self._addresses = Addresses(endpoint.host, endpoint.port)
        self._session = None
        self.close()

    def try_open(self) -> Connection | Exception:
        """`open`, its error returned."""
        try:
            return self.open()
        except Exception as error:  # noqa: BLE001 - it is not lost: whoever asked goes on with it
            return error

    def open_ahead(self, count: int) -> None:
        """Begin to open connections, in threads, until `count` are idle or on their way. One that cannot be opened is not
        missed: whoever needs one tries again, and says why it fails. What has been idle for too long counts for nothing."""
        self._close_old()
        for _ in range(count - len(self._idle) - self._opening):
            self._opening += 1
            threading.Thread(
                target=self._open_one, args=(self.generation, self._closings), daemon=True, name="s3loader-connect"
            ).start()

    def _open_one(self, generation: int, closings: int) -> None:
        connection = self.try_open()
        if self.generation != generation:
            return  # a copy of this thread's parent
        self._opening -= 1
        if isinstance(connection, Connection):
            if self._closings == closings:
                self.give(connection, new=True)
            else:
                connection.close()

    def _tls_context(self) -> ssl.SSLContext:
        context = self._context.get("tls")
        if context is None:
            context = ssl.create_default_context(cafile=self.endpoint.ca_bundle)
            context.set_alpn_protocols(["http/1.1"])
            context = self._context.setdefault("tls", context)  # that of the thread that was first: `setdefault` is atomic
        return context

    def take(self) -> Connection | None:
        """The connection that was used last, if a usable one is idle; the server may close it any time."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            young = time.monotonic() - connection.idle_since < _IDLE_SECONDS
            if young and connection.endpoint is self.endpoint and connection.is_quiet():
                return connection
            connection.close()

    def learn(self, connection: Connection) -> None:
        """Later handshakes go on from the session of this connection, which nobody uses now: half a round trip and most of
        their CPU time are saved."""
        sock = connection.sock
        if isinstance(sock, ssl.SSLSocket) and connection.endpoint is self.endpoint:
            with contextlib.suppress(ValueError):
                session = sock.session
                if session is not None and (session.has_ticket or session.id):  # TLS 1.3 has neither before a ticket was read
                    self._session = session

    def give(self, connection: Connection, *, new: bool = False) -> None:
        """Keep a connection on which nothing is under way; one that is `new` is taken after those that were used."""
        connection.idle_since = time.monotonic()
        self.learn(connection)
        if new:
            self._idle.appendleft(connection)
        else:
            self._idle.append(connection)
        if len(self._idle) > _MOST_IDLE:
            with contextlib.suppress(IndexError):  # another thread was faster
                self._idle.popleft().close()

    def _close_old(self) -> None:
        """Close what has been idle for so long that `take` would."""
        since = time.monotonic() - _IDLE_SECONDS
        with contextlib.suppress(IndexError):  # another thread was faster
            for _ in range(len(self._idle)):
                connection = self._idle.popleft()
                if connection.idle_since > since:
                    self._idle.append(connection)  # one round leaves them in their order
                else:
                    connection.close()

    def close(self) -> None:
        """Close what is idle."""
        self._closings += 1
        _close_all(self._idle)

    def _forget(self) -> None:
        for connection in list(self._open):
            connection.close()
        self.generation += 1
        self._opening = 0
        self.in_flight = InFlight()
        self.hedges = None if self.hedges is None else Hedges()
        self._idle.clear()
        self._open.clear()


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _close_all(idle: deque[Connection]) -> None:
    while idle:
        idle.pop().close()


_all: weakref.WeakSet[Connections] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for connections in list(_all):
        connections._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def is_stale(connection: Connection, job: Any, error: BaseException) -> bool:
    """Whether the server may have closed an idle connection just as the request went out, so that
    the request, if it may be sent twice, deserves another connection."""
    return connection.used and job.resendable and job.untouched and isinstance(error, ConnectionError | ssl.SSLEOFError)
