"""The pump: many connections turned by the calling thread itself; no handoff, no future.

Between two results the caller's own code runs; meanwhile the kernel's socket buffers fill. What may
block (connecting, the careful path) happens in short-lived threads beside it, so that it neither
holds up the other connections nor keeps Ctrl-C waiting.
"""

from __future__ import annotations

import os
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, Final

from s3loader.errors import ClosedError, S3LoaderError, ThrottledError
from s3loader.store.s3.connection import RECORDS, Connection, Connections, is_stale
from s3loader.store.s3.http import UnexpectedResponse
from s3loader.store.s3.in_flight import Hedges
from s3loader.store.s3.jobs import HEDGED, Job, Scratch, Source

__all__ = ["Pump"]


class BlockingCalls:
    """Blocking work in threads beside the poll loop, its results brought back into the loop. One thread per piece of work:
    there are few, and they take long.

    Raises:
        OSError: there is no descriptor left.
    """

    def __init__(self) -> None:
        self.fd, self._wake = os.pipe()
        """`fd` becomes readable when a result is there."""
        self.busy = 0
        """Pieces of work whose result was not collected yet."""
        self._lock = threading.Lock()
        self._results: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._closed = False

    def run(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Call `work` in a thread (it must not raise), later `then` with its result in `collect`."""
        self.busy += 1
        threading.Thread(target=self._work, args=(work, then), daemon=True, name="s3loader-aside").start()

    def _work(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        result = work()
        with self._lock:
            if not self._closed:
                self._results.append((then, result))
                os.write(self._wake, b"\0")
                return
        _discard(result)

    def collect(self) -> None:
        """Take the results that are there."""
        os.read(self.fd, 4096)
        while self._results:
            then, result = self._results.popleft()
            self.busy -= 1
            then(result)

    def close(self) -> None:
        """Forget what is still running: it ends by itself, and what it brings is closed."""
        with self._lock:
            self._closed = True
            self.abandon()
        while self._results:
            _discard(self._results.popleft()[1])

    def abandon(self) -> None:
        """For a forked child: close its copies of the descriptors. The threads are the parent's, and
        so may the lock be."""
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._wake)
            self.fd = self._wake = -1


def _discard(result: object) -> None:
    close = getattr(result, "close", None)
    if close is not None:
        close()


# -- the pump --------------------------------------------------------------------------------------

_EPOLL: Final = hasattr(select, "epoll")
_IN: Final[int] = select.EPOLLIN if _EPOLL else select.POLLIN
_OUT: Final[int] = select.EPOLLOUT if _EPOLL else select.POLLOUT
_GLANCE: Final = 0.0005
"""Seconds after which sockets are looked at even though a result is ready."""
_FAR: Final = 0.005
"""Seconds to the first byte from which on connections are opened ahead."""
_MEASURE: Final = 0.002
"""Seconds between two turns in which first bytes are measured..."""
_MEASURED: Final = 4
"""...and of how many requests in one."""
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
        concurrency: Most connections; how many pay is measured (`InFlight`).

    Raises:
        OSError: there is no descriptor left for what it needs itself.
    """

    def __init__(self, jobs: Iterator[Job], connections: Connections, *, max_bytes: int, concurrency: int) -> None:
        self._source = Source(jobs)
        self._connections = connections
        self._generation = connections.generation
        self._max_bytes = max_bytes
        self._concurrency = concurrency
        self._reserve = concurrency // 16 if connections.hedges is not None else 0
        """Of them, those that are left for second requests."""
        self._most = concurrency - self._reserve
        self._in_flight = connections.in_flight
        self._hedges = connections.hedges
        self._next_measure = self._next_search = 0.0
        """When first bytes are measured, and stragglers looked for, next: not with every request."""
        self._races: dict[Job, Job] = {}
        """Jobs that were asked for once more, and by which."""
        self._scratch = Scratch()
        self._order: deque[Job] = deque()
        self._held = self._in_place = 0
        """Bytes under way or not yet taken, and those of them that go to the caller's memory."""
        self._room = self._in_flight.room(max_bytes)
        self._done_count = self._done_bytes = self._done_full = 0
        """Requests completed since the limit was told last, their bytes, and how many found a next one waiting."""
        self._by_fd: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._parked: list[tuple[Connection, int]] = []
        """Their objects turned out larger than thought, by so many bytes, for which there is no room
        yet: nothing is received until there is."""
        self._poller: Any = select.epoll() if _EPOLL else select.poll()
        self._blocking = BlockingCalls()
        self._poller.register(self._blocking.fd, _IN)
        self._now = self._looked = self._checked = time.monotonic()

    def run(self) -> Generator[Job, None, None]:
        """The jobs, done; their errors are in them.

        Raises:
            ClosedError: the process was forked meanwhile, and this is the child.
        """
        order, source = self._order, self._source
        try:
            while True:
                if not source.exhausted and self._has_free():
                    self._fill()
                if not order and source.exhausted:
                    break
                if not order or not order[0].done:
                    begun = time.monotonic()
                    self._turn(_PATIENCE)
                    self._in_flight.waited(self._looked - begun)
                    continue
                job = order.popleft()
                self._held -= job.cost
                self._in_place -= job.cost * job.in_place
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

    def _has_free(self, besides: int = 0) -> bool:
        """Whether one more request may be under way; `besides`: connections that are about to be free."""
        active = len(self._by_fd) - len(self._idle) + self._blocking.busy - besides  # `_active`, without the call
        return active < self._most and active < self._in_flight.limit

    def _active(self) -> int:
        """Requests under way, and connections that are being opened for some."""
        return len(self._by_fd) - len(self._idle) + self._blocking.busy

    def _fill(self) -> None:
        """Give jobs to connections that are free, or new ones."""
        while self._has_free():
            job = self._admit()
            if job is None:
                return
            if not job.fast:
                self._ask_carefully(job)
                continue
            connection = self._next_idle()
            if connection is None:
                self._dial(job)
            else:
                self._send(self._adopt(connection), job)
        self._open_ahead()

    def _open_ahead(self) -> None:
        """At the start, far away: have connections opened for twice the requests, since the next round will have them."""
        in_flight, hedges = self._in_flight, self._hedges
        if in_flight.starting and not self._source.exhausted and hedges is not None and hedges.usual >= _FAR:
            most = min(2 * in_flight.limit, self._concurrency)
            self._connections.open_ahead(most - len(self._by_fd) - self._blocking.busy)

    def _admit(self) -> Job | None:
        """The next job, if there is one and room for it; it is in `_order` then."""
        if self._blocking.busy >= self._concurrency:
            return None
        if self._held:
            left, lent = self._max_bytes - self._held, self._held - self._in_place
            job = self._source.take(min(left, self._room - lent), left)
        else:
            job = self._source.take(_ANY, _ANY)
        if job is not None:
            self._held += job.cost
            self._in_place += job.cost * job.in_place
            self._order.append(job)
        return job

    def _next_idle(self) -> Connection | None:
        """A connection that is free and can be used; None: there is none."""
        while self._idle:
            connection = self._idle.pop()
            if self._is_usable(connection):
                return connection
            self._drop(connection)
        return self._connections.take()

    def _is_usable(self, connection: Connection) -> bool:
        return connection.endpoint is self._connections.endpoint and connection.is_quiet()

    def _adopt(self, connection: Connection) -> Connection:
        if connection.fd not in self._by_fd:
            connection.block(False)
            self._by_fd[connection.fd] = connection
            self._poller.register(connection.fd, _IN)
        return connection

    def _dial(self, job: Job) -> None:
        try:
            job.check_credentials()
        except S3LoaderError as error:
            job.fail(error)
            return
        self._blocking.run(self._connections.try_open, partial(self._dialled, job))

    def _dialled(self, job: Job, outcome: Connection | Exception) -> None:
        if job.hedge_of is not None and (job.hedge_of.done or not isinstance(outcome, Connection)):
            self._end_race(job.hedge_of)
            if isinstance(outcome, Connection):
                self._idle.append(self._adopt(outcome))
        elif isinstance(outcome, Connection):
            self._send(self._adopt(outcome), job)
        else:
            job.refuse(outcome)
            self._ask_carefully(job)

    def _ask_carefully(self, job: Job) -> None:
        if not job.done:
            self._blocking.run(job.ask_carefully, lambda _: None)

    def _send(self, connection: Connection, job: Job) -> None:
        connection.job = job
        connection.sent = time.monotonic()
        connection.deadline = self._now + self._connections.read_timeout
        connection.expires = self._now + job.time_limit
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
        if self._hedges is not None:
            self._hedges.sent += 1

    # -- turning ---------------------------------------------------------------------------------

    def _turn(self, timeout: float) -> None:
        """Wait for the sockets up to `timeout` seconds and do what they ask for."""
        if self._parked:
            self._unpark()
        hedges = self._hedges
        begun = time.monotonic()
        measure = hedges is not None and (begun >= self._next_measure or not hedges.usual) and begun - self._looked < _GLANCE
        """Only where nobody kept us from looking is what we see of times the store's."""
        if hedges is not None:
            timeout = min(timeout, hedges.interval)
        measured = 0
        ready = self._poller.poll(timeout if _EPOLL else timeout * 1000)
        now = self._now = time.monotonic()
        deadline = now + self._connections.read_timeout
        find = self._by_fd.get
        for fd, mask in ready:
            connection = find(fd)
            if connection is None:
                if fd == self._blocking.fd:
                    self._blocking.collect()
                continue
            connection.deadline = deadline
            if connection.job is None:  # closed by the server, or it talks unasked
                self._idle.remove(connection)
                self._drop(connection)
            else:
                job = connection.job
                if measure and hedges is not None and mask & _IN and job.head is None and job.untouched:
                    hedges.first_byte(now - connection.sent)
                    self._next_measure = now + _MEASURE
                    measured += 1
                    measure = measured < _MEASURED
                self._serve(connection, job, mask)
        if self._done_count:
            self._tell_limit()
        if hedges is not None and now >= self._next_search:
            self._next_search = now + hedges.interval
            self._ask_again(hedges, now)
        if now - self._checked > _PATIENCE:
            self._check_deadlines()
        self._looked = time.monotonic()

    def _tell_limit(self) -> None:
        """Have the limit of requests follow what was completed in this turn."""
        near = self._hedges is not None and self._hedges.near
        self._in_flight.completed(
            self._done_bytes, full=self._done_full, most=self._concurrency, count=self._done_count, near=near
        )
        self._room = self._in_flight.room(self._max_bytes)
        self._done_count = self._done_bytes = self._done_full = 0

    def _serve(self, connection: Connection, job: Job, mask: int) -> None:
        try:
            if mask & _OUT and connection.pending:
                self._send_rest(connection)
            if mask & ~_OUT:
                self._receive(connection, job)
        except _AGAIN:
            pass
        except (OSError, UnexpectedResponse) as error:
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
        if job.hedge_of is not None:
            self._end_race(job.hedge_of, job)
        elif job in self._races:
            self._end_race(job)
        usable = connection.endpoint is self._connections.endpoint and connection.is_quiet()  # `_is_usable`, without the call
        reusable = usable and job.head.keep_alive and not connection.pending
        if job.hedge_of is None:
            self._ask_carefully(job)  # unless it is done, as nearly always
        if not reusable:
            self._drop(connection)
            return
        if connection.tls and not connection.known:
            connection.known = True
            self._connections.learn(connection)
        following = self._admit() if self._has_free(besides=1) else None
        if isinstance(job.error, ThrottledError):
            self._in_flight.rejected()
        self._done_count += 1
        self._done_bytes += job.cost
        if following is None:
            self._idle.append(connection)
            return
        self._done_full += 1
        if following.fast:
            self._send(connection, following)
        else:
            self._idle.append(connection)
            self._ask_carefully(following)

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

    # -- stragglers ------------------------------------------------------------------------------

    def _ask_again(self, hedges: Hedges, now: float) -> None:
        """Ask once more for what has got no answer for too long; the first answer counts."""
        for connection in list(self._by_fd.values()):
            job: Job | None = connection.job
            waited = now - connection.sent
            if job is None or waited <= hedges.delay or job.head is not None or not job.untouched or job in self._races:
                continue
            first = job.hedge_of or job
            second = first.again()
            if second is None or not second.fast or self._active() >= self._concurrency or not hedges.may_ask(waited):
                continue
            if first is not job:  # the second request is late as well: a third one takes its place
                self._cut_off(job)
            self._races[first] = second
            idle = self._next_idle()
            if idle is None:
                self._dial(second)
            else:
                self._send(self._adopt(idle), second)

    def _end_race(self, job: Job, winner: Job | None = None) -> None:
        """One of two requests is over: `winner`, the second one, came first; without it, `job` itself did, or the
        second one failed."""
        second = self._races.pop(job, None)
        if second is None:
            return
        assert self._hedges is not None
        won = winner is not None and winner.done and winner.error is None
        if won and winner is not None:
            job.take_over(winner)
        else:
            second.give_up(HEDGED)
        self._hedges.settled(won)
        self._cut_off(job if won else second)

    def _cut_off(self, job: Job) -> None:
        """Close the connection on which `job` is under way, if it is on one."""
        for connection in list(self._by_fd.values()):
            if connection.job is job:
                connection.job = None
                self._drop(connection)

    # -- when it goes wrong ----------------------------------------------------------------------

    def _failed(self, connection: Connection, error: Exception) -> None:
        job = connection.job
        assert job is not None
        self._drop(connection)
        self._end_race(job.hedge_of or job)
        if job.hedge_of is not None:
            return
        if is_stale(connection, job, error):
            self._dial(job)
        else:
            job.refuse(error)
            self._ask_carefully(job)

    def _check_deadlines(self) -> None:
        now = self._checked = self._now
        parked = {connection for connection, _ in self._parked}
        for connection in list(self._by_fd.values()):
            if connection.job is None or connection in parked:
                continue
            if connection.deadline < now:
                self._failed(connection, TimeoutError(f"nothing came for {self._connections.read_timeout:g} s"))
            elif connection.expires < now:
                self._failed(connection, TimeoutError("the response did not end in time"))

    def _drop(self, connection: Connection) -> None:
        del self._by_fd[connection.fd]
        self._poller.unregister(connection.fd)  # a child just forked may hold the socket open: closing would not do
        connection.close()

    def _release(self) -> None:
        """Let go of everything; what is under way is cut off."""
        if self._connections.generation != self._generation:  # all of it is the parent's
            self._blocking.abandon()
        else:
            self._blocking.close()
            for connection in self._by_fd.values():
                if connection.job is None:
                    self._connections.give(connection)
                else:
                    connection.close()
                    connection.job.give_up("Abandoned: nobody waits for it any more")
        self._by_fd.clear()
        if _EPOLL:
            self._poller.close()
