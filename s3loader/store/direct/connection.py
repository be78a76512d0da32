"""Keep-alive connections to one endpoint, and the blocking way to run one job on one of them."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from s3loader.endpoint import Endpoint
from s3loader.errors import S3LoaderError
from s3loader.store.direct.gil import receive_now, send_now
from s3loader.store.direct.head import OddAnswer
from s3loader.store.direct.jobs import Job, Scratch
from s3loader.types import Buffer

__all__ = ["RECORDS", "Connection", "Connections", "is_stale", "perform"]

_IDLE_SECONDS: Final = 15.0
"""Servers close idle connections after 5 to 75 s; one that was idle for longer than this is not
worth the risk of a lost round trip."""
_MOST_IDLE: Final = 64
RECORDS: Final = 32
"""TLS records handled on one connection before the others get their turn."""
_TICK: Final = 0.1
"""Seconds after which a blocking receive returns with what it has."""
_SHORT: Final = 64 * 1024
"""Bytes that may be copied with the GIL held."""
_WAIT_ALL: Final = getattr(socket, "MSG_WAITALL", 0)


class Connection:
    """One socket, in blocking mode with the kernel's timeouts unless `block(False)` was called."""

    __slots__ = (
        "__weakref__",
        "_blocking",
        "_read_timeout",
        "deadline",
        "fd",
        "idle_since",
        "job",
        "pending",
        "sock",
        "tls",
        "used",
    )

    def __init__(self, sock: socket.socket, tls: bool, read_timeout: float) -> None:
        self.sock = sock
        self._read_timeout = read_timeout
        self.fd = sock.fileno()
        self.tls = tls
        self.used = False
        """Whether an answer was received on it: the server may close such a one at any time."""
        self.idle_since = 0.0
        self.job: Job | None = None
        """What is under way here."""
        self.pending: list[memoryview] = []
        """For the pump: what is still to be sent."""
        self.deadline = 0.0
        """For the pump: when to give up."""
        self._blocking = True

    def block(self, blocking: bool) -> None:
        """Set the socket's mode."""
        if self._blocking != blocking:
            self.sock.setblocking(blocking)
            self._blocking = blocking

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

    def exchange(self, job: Job, scratch: Scratch, admit: Callable[[Job, int], None] | None, quiet: bool = False) -> None:
        """Send the job's request and receive its answer.

        Args:
            job: Becomes done.
            scratch: Memory of this thread.
            admit: Is told when the object turns out so many bytes larger than `job.cost` said
                (negative: smaller), once, before its body is received; it may wait.
            quiet: Give the GIL away as rarely as can be: once where all goes well.

        Raises:
            OddAnswer, OSError: as they come; the connection is spoilt then.
        """
        self.block(True)
        job.begin(scratch)
        quiet = quiet and not self.tls
        pieces = job.wire()
        left: Sequence[Buffer] = pieces
        if quiet and len(pieces) == 1 and send_now(self.fd, pieces[0]) == len(pieces[0]):
            left = ()
        while left:
            left = self.send(left)
        cost = job.cost
        expected = job.least() if quiet else 0
        done = self._receive(job, expected)
        self.used = True
        while not done and job.head is None:
            done = self._receive(job, 0)
        if admit is not None and job.cost != cost:
            admit(job, job.cost - cost)
        while not done:
            target = job.target()
            count = receive_now(self.fd, target) if quiet and len(target) <= _SHORT else -1
            done = job.feed(count) if count > 0 else self._receive(job, -1)

    def _receive(self, job: Job, expected: int) -> bool:
        """Wait for bytes; True: the answer is complete.

        Args:
            job: Gets them.
            expected: Wait until so many bytes are there, -1: all that the job has room for. Where
                fewer come, that costs `_TICK` seconds.
        """
        target = job.target()
        flags = 0
        if expected and not self.tls:
            flags = _WAIT_ALL
            if expected > 0:
                target = target[:expected]
        deadline = 0.0
        while True:
            try:
                count = self.sock.recv_into(target, 0, flags)
            except (BlockingIOError, ssl.SSLWantReadError):  # the kernel's timeout, `_TICK`
                now = time.monotonic()
                deadline = deadline or now + self._read_timeout - _TICK
                if now >= deadline:
                    raise TimeoutError(f"nothing came for {self._read_timeout:g} s") from None
                continue
            if not count:
                raise ConnectionResetError("the server closed the connection")
            if count >= expected:
                return job.feed(count)
            done = True
            try:
                done = job.feed(count)
            finally:
                if done:
                    job.was_short()
            return done

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
    """

    def __init__(self, endpoint: Endpoint, connect_timeout: float, read_timeout: float) -> None:
        self.endpoint = endpoint
        self.connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self._context: ssl.SSLContext | None = None
        self.generation = 0
        """Grows with every fork that this object has been through."""
        self._idle: deque[Connection] = deque()
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()
        _all.add(self)
        weakref.finalize(self, _close_all, self._idle)

    def open(self) -> Connection:
        """A new connection.

        Raises:
            OSError: it failed, or took too long.
        """
        endpoint = self.endpoint
        sock = socket.create_connection((endpoint.host, endpoint.port), self.connect_timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(min(_TICK, self.read_timeout)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self.read_timeout))
            if endpoint.tls:
                sock = self._tls_context().wrap_socket(sock, server_hostname=endpoint.host)
            sock.setblocking(True)
        except BaseException:
            sock.close()
            raise
        connection = Connection(sock, endpoint.tls, self.read_timeout)
        self._open.add(connection)
        return connection

    def try_open(self) -> Connection | Exception:
        """`open`, its error returned."""
        try:
            return self.open()
        except Exception as error:  # noqa: BLE001 - it is not lost: whoever asked goes on with it
            return error

    def _tls_context(self) -> ssl.SSLContext:
        if self._context is None:
            context = ssl.create_default_context(cafile=self.endpoint.ca_bundle)
            context.set_alpn_protocols(["http/1.1"])
            self._context = context
        return self._context

    def take(self) -> Connection | None:
        """The connection that was used last, if one is idle; it may be stale."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - connection.idle_since < _IDLE_SECONDS:
                return connection
            connection.close()

    def give(self, connection: Connection) -> None:
        """Keep a connection on which nothing is under way."""
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if len(self._idle) > _MOST_IDLE:
            with contextlib.suppress(IndexError):  # another thread was faster
                self._idle.popleft().close()

    def close(self) -> None:
        """Close what is idle."""
        _close_all(self._idle)

    def _forget(self) -> None:
        for connection in list(self._open):
            connection.close()
        self.generation += 1
        self._idle.clear()
        self._open.clear()


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _close_all(idle: deque[Connection]) -> None:
    while idle:
        idle.pop().close()


def is_stale(connection: Connection, job: Job, error: BaseException) -> bool:
    """Whether the server may have closed an idle connection just as the request went out, so that
    the request deserves another connection: all requests of this engine may be sent twice."""
    return connection.used and job.untouched and isinstance(error, ConnectionError | ssl.SSLEOFError)


def perform(
    job: Job,
    connections: Connections,
    scratch: Scratch,
    *,
    admit: Callable[[Job, int], None] | None = None,
    track: Callable[[Connection | None], None] | None = None,
    quiet: bool = False,
) -> None:
    """Run one job in this thread, on the general engine where need be; `job.done` afterwards.

    Args:
        job: The job.
        connections: Where to take a connection from, and to give it back to.
        scratch: Memory of this thread.
        admit, quiet: See `Connection.exchange`.
        track: Is told which connection is in use, None: no longer, so that another thread can shut it.
    """
    if not job.direct:
        job.ask_general()
        return
    connection = None
    try:
        connection = connections.take()
        while True:
            if connection is None:
                connection = connections.open()
            connection.job = job
            if track is not None:
                track(connection)
            try:
                connection.exchange(job, scratch, admit, quiet)
                break
            except OSError as error:
                if not is_stale(connection, job, error):
                    raise
                connection.close()
                connection = None
    except (OSError, OddAnswer) as error:
        if connection is not None:
            connection.close()
        if track is not None:
            track(None)
        job.refuse(error)
        job.ask_general()
    except S3LoaderError as error:  # a key that is no Unicode, credentials that cannot be had
        if connection is not None:
            connection.close()
        job.fail(error)
    except BaseException:  # KeyboardInterrupt: half an answer may be under way
        if connection is not None:
            connection.close()
        raise
    else:
        if track is not None:
            track(None)
        connection.job = None
        if job.head is not None and job.head.keep_alive:
            connections.give(connection)
        else:
            connection.close()


_all: weakref.WeakSet[Connections] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for connections in list(_all):
        connections._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
