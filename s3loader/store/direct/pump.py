"""The pump: many connections turned by the calling thread itself; no handoff, no future.

Between two results the caller's own code runs; meanwhile the kernel's socket buffers fill. What may
block (connecting, the general engine) happens in short-lived threads beside it, so that it neither
holds up the other connections nor keeps Ctrl-C waiting.
"""

from __future__ import annotations

import select
import ssl
import time
from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, Final

from s3loader.errors import ClosedError, S3LoaderError
from s3loader.store.direct.aside import Aside
from s3loader.store.direct.connection import RECORDS, Connection, Connections, is_stale
from s3loader.store.direct.head import OddAnswer
from s3loader.store.direct.jobs import Job, Scratch, Source

__all__ = ["Pump"]

_EPOLL: Final = hasattr(select, "epoll")
_IN: Final[int] = select.EPOLLIN if _EPOLL else select.POLLIN
_OUT: Final[int] = select.EPOLLOUT if _EPOLL else select.POLLOUT
_GLANCE: Final = 0.0005
"""Seconds after which sockets are looked at even though a result is ready."""
_PATIENCE: Final = 0.5
"""Seconds between two looks at the deadlines."""
_ANY: Final = 1 << 63
_AGAIN: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Pump:
    """Runs jobs in order of arrival and gives them back, done, in that same order.

    Args:
        jobs: Is asked for the next job when there is a connection and room for it.
        connections: Of the endpoint.
        max_bytes: Bound on the cost of all jobs that are under way or not yet taken; a single job
            above it runs alone.
        concurrency: Most connections.

    Raises:
        OSError: there is no descriptor left for what it needs itself.
    """

    def __init__(self, jobs: Iterator[Job], connections: Connections, *, max_bytes: int, concurrency: int) -> None:
        self._source = Source(jobs)
        self._connections = connections
        self._generation = connections.generation
        self._max_bytes = max_bytes
        self._concurrency = concurrency
        self._scratch = Scratch()
        self._order: deque[Job] = deque()
        self._held = 0
        self._by_fd: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._parked: list[tuple[Connection, int]] = []
        """Their objects turned out larger than thought, by so many bytes, for which there is no room
        yet: nothing is received until there is."""
        self._poller: Any = select.epoll() if _EPOLL else select.poll()
        self._aside = Aside()
        self._poller.register(self._aside.fd, _IN)
        self._now = self._looked = self._checked = time.monotonic()

    def run(self) -> Generator[Job, None, None]:
        """The jobs, done; their errors are in them.

        Raises:
            ClosedError: the process was forked meanwhile, and this is the child.
        """
        order, source = self._order, self._source
        try:
            while True:
                if not source.exhausted and (self._idle or len(self._by_fd) < self._concurrency):
                    self._fill()
                if not order and source.exhausted:
                    break
                if not order or not order[0].done:
                    self._turn(_PATIENCE)
                    continue
                job = order.popleft()
                self._held -= job.cost
                yield job
                del job  # it holds a buffer
                if self._connections.generation != self._generation:
                    raise ClosedError("this iterator belongs to the parent process", hint="begin a new one in the child")
                if time.monotonic() - self._looked > _GLANCE:
                    self._turn(0)
            if source.error is not None:
                raise source.error
        finally:
            self._release()

    # -- giving out work -------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give jobs to connections that are free, or new ones."""
        while self._idle or len(self._by_fd) + self._aside.busy < self._concurrency:
            job = self._admit()
            if job is None:
                return
            if not job.direct:
                self._ask_general(job)
                continue
            connection = self._idle.pop() if self._idle else self._connections.take()
            if connection is None:
                self._dial(job)
            else:
                self._send(self._adopt(connection), job)

    def _admit(self) -> Job | None:
        """The next job, if there is one and room for it; it is in `_order` then."""
        if self._aside.busy >= self._concurrency:
            return None
        job = self._source.take(self._max_bytes - self._held if self._held else _ANY)
        if job is not None:
            self._held += job.cost
            self._order.append(job)
        return job

    def _adopt(self, connection: Connection) -> Connection:
        if connection.fd not in self._by_fd:
            connection.block(False)
            self._by_fd[connection.fd] = connection
            self._poller.register(connection.fd, _IN)
        return connection

    def _dial(self, job: Job) -> None:
        self._aside.run(self._connections.try_open, partial(self._dialled, job))

    def _dialled(self, job: Job, outcome: Connection | Exception) -> None:
        if isinstance(outcome, Connection):
            self._send(self._adopt(outcome), job)
        else:
            job.refuse(outcome)
            self._ask_general(job)

    def _ask_general(self, job: Job) -> None:
        if not job.done:
            self._aside.run(job.ask_general, lambda _: None)

    def _send(self, connection: Connection, job: Job) -> None:
        connection.job = job
        connection.deadline = self._now + self._connections.read_timeout
        left: Any
        try:
            job.begin(self._scratch)
            left = job.wire()
        except S3LoaderError as error:
            job.fail(error)
            connection.job = None
            self._idle.append(connection)
            return
        try:
            left = connection.send(left)
        except _AGAIN:
            pass
        except OSError as error:
            self._failed(connection, error)
            return
        if left:
            connection.pending = left
            self._poller.modify(connection.fd, _IN | _OUT)

    # -- turning ---------------------------------------------------------------------------------

    def _turn(self, timeout: float) -> None:
        """Wait for the sockets up to `timeout` seconds and do what they ask for."""
        if self._parked:
            self._unpark()
        ready = self._poller.poll(timeout if _EPOLL else timeout * 1000)
        now = self._now = time.monotonic()
        deadline = now + self._connections.read_timeout
        find = self._by_fd.get
        for fd, mask in ready:
            connection = find(fd)
            if connection is None:
                if fd == self._aside.fd:
                    self._aside.collect()
                continue
            connection.deadline = deadline
            if connection.job is None:  # closed by the server, or it talks unasked
                self._idle.remove(connection)
                self._drop(connection)
            else:
                self._serve(connection, connection.job, mask)
        if now - self._checked > _PATIENCE:
            self._check_deadlines()
        self._looked = time.monotonic()

    def _serve(self, connection: Connection, job: Job, mask: int) -> None:
        try:
            if mask & _OUT and connection.pending:
                self._send_rest(connection)
            if mask & ~_OUT:
                self._receive(connection, job)
        except _AGAIN:
            pass
        except (OSError, OddAnswer) as error:
            self._failed(connection, error)

    def _receive(self, connection: Connection, job: Job) -> None:
        sock, rounds = connection.sock, 0
        while True:
            cost = job.cost
            count = sock.recv_into(job.target())
            if not count:
                raise ConnectionResetError("the server closed the connection")
            connection.used = True
            if job.feed(count):
                self._held += job.cost - cost
                self._completed(connection, job)
                return
            if job.cost != cost and not self._grow(connection, job, job.cost - cost):
                return
            if not connection.tls:
                return
            rounds += 1
            if rounds >= RECORDS and not connection.decrypted():
                return

    def _completed(self, connection: Connection, job: Job) -> None:
        assert job.head is not None
        connection.job = None
        if not job.head.keep_alive or connection.pending:
            self._drop(connection)
            return
        following = self._admit()
        if following is None:
            self._idle.append(connection)
        elif following.direct:
            self._send(connection, following)
        else:
            self._idle.append(connection)
            self._ask_general(following)

    def _grow(self, connection: Connection, job: Job, more: int) -> bool:
        """An object of unknown size has one now, `more` bytes above what was counted for it; whether
        it may go on."""
        if more > 0 and self._held + more > self._max_bytes and job is not self._order[0]:
            job.cost -= more
            self._parked.append((connection, more))
            self._poller.unregister(connection.fd)
            return False
        self._held += more
        return True

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        for connection, more in parked:
            job = connection.job
            if job is not None and (self._held + more <= self._max_bytes or job is self._order[0]):
                job.cost += more
                self._held += more
                connection.deadline = time.monotonic() + self._connections.read_timeout
                self._poller.register(connection.fd, _IN)
                if connection.tls:
                    self._serve(connection, job, _IN)
            else:
                self._parked.append((connection, more))

    def _send_rest(self, connection: Connection) -> None:
        left: list[memoryview] = connection.send(connection.pending)
        connection.pending = left
        if not left:
            self._poller.modify(connection.fd, _IN)

    # -- when it goes wrong ----------------------------------------------------------------------

    def _failed(self, connection: Connection, error: Exception) -> None:
        job = connection.job
        assert job is not None
        self._drop(connection)
        if is_stale(connection, job, error):
            self._dial(job)
        else:
            job.refuse(error)
            self._ask_general(job)

    def _check_deadlines(self) -> None:
        now = self._checked = self._now
        parked = {connection for connection, _ in self._parked}
        for connection in list(self._by_fd.values()):
            if connection.job is not None and connection.deadline < now and connection not in parked:
                self._failed(connection, TimeoutError(f"nothing came for {self._connections.read_timeout:g} s"))

    def _drop(self, connection: Connection) -> None:
        del self._by_fd[connection.fd]
        self._poller.unregister(connection.fd)  # a child just forked may hold the socket open: closing would not do
        connection.close()

    def _release(self) -> None:
        """Let go of everything; what is under way is cut off."""
        if self._connections.generation != self._generation:  # all of it is the parent's
            self._aside.abandon()
        else:
            self._aside.close()
            for connection in self._by_fd.values():
                if connection.job is None:
                    self._connections.give(connection)
                else:
                    connection.close()
        self._by_fd.clear()
        if _EPOLL:
            self._poller.close()
