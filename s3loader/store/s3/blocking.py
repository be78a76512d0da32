"""The blocking way: one job on one connection in the calling thread (`perform`), and many jobs in background threads, one
connection each, that take the next job themselves (`Threads`): for prefetch beside a main thread that is busy in Python,
where a poll loop would starve for the GIL.

A job changes hands through two C queues: no future, no condition variable per job.
"""

from __future__ import annotations

import math
import os
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias

from s3loader.errors import ClosedError, S3LoaderError, ThrottledError
from s3loader.store.client_errors import passed_over
from s3loader.store.s3.connection import TICK, Connection, Connections, is_stale
from s3loader.store.s3.http import UnexpectedResponse
from s3loader.store.s3.in_flight import Hedges
from s3loader.store.s3.jobs import HEDGED, Job, Scratch, Source
from s3loader.types import Buffer

__all__ = ["Threads", "exchange", "perform"]


# -- socket calls that keep the GIL ----------------------------------------------------------------

# `socket.send` gives the GIL away even for the microseconds that copying a request takes, and where
# the main thread is busy in Python it comes back only after its switch interval, 5 ms. A call that
# cannot wait need not pay that. `ctypes.PyDLL` is the documented way to call C with the GIL held.

_FLAGS: Final = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
_Calls: TypeAlias = tuple[Callable[..., int], Callable[..., int]]
_calls: _Calls | None = None


def _load() -> _Calls | None:
    global _calls
    if _calls is None and os.name == "posix" and hasattr(socket, "MSG_DONTWAIT"):
        import ctypes  # 2 ms that only those pay who use background threads

        library = ctypes.PyDLL(None)
        library.send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
        library.recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        library.send.restype = library.recv.restype = ctypes.c_ssize_t
        address, first_byte = ctypes.addressof, ctypes.c_char.from_buffer
        _calls = (
            lambda descriptor, data: library.send(descriptor, data, len(data), _FLAGS),
            lambda descriptor, view: library.recv(descriptor, address(first_byte(view)), len(view), _FLAGS),
        )
    return _calls


def send_now(descriptor: int, data: bytes) -> int:
    """Bytes sent at once; -1: none, and why, the ordinary call will say."""
    calls = _load()
    return -1 if calls is None else calls[0](descriptor, data)


def receive_now(descriptor: int, target: memoryview) -> int:
    """Bytes received at once into `target` (writable, not empty); -1: none, 0: the other side has closed."""
    calls = _load()
    return -1 if calls is None else calls[1](descriptor, target)


# -- one job on one connection ---------------------------------------------------------------------

_SHORT: Final = 64 * 1024
"""Bytes that may be copied with the GIL held."""
_WAIT_ALL: Final = getattr(socket, "MSG_WAITALL", 0)


def exchange(
    connection: Connection,
    job: Job,
    scratch: Scratch,
    admit: Callable[[Job, int], None] | None = None,
    quiet: bool = False,
    hedges: Hedges | None = None,
) -> None:
    """Send the job's request and receive its answer.

    Args:
        job: Becomes done.
        scratch: Memory of this thread.
        admit: Called once, before the body is received, with the bytes by which the object is larger than `job.cost`
            said (negative: smaller); it may wait.
        quiet: Give the GIL away as rarely as can be: once where all goes well.
        hedges: Is told how long the first byte took.

    Raises:
        UnexpectedResponse, OSError: as they come; the connection is spoilt then.
    """
    connection.block(True)
    connection.expires = time.monotonic() + job.time_limit
    job.begin(scratch)
    quiet = quiet and not connection.tls
    pieces = job.wire()
    left: Sequence[Buffer] = pieces
    if quiet and len(pieces) == 1 and send_now(connection.fd, pieces[0]) == len(pieces[0]):
        left = ()
    while left:
        left = connection.send(left)
    cost = job.cost
    expected = job.least() if quiet else 0
    connection.sent = time.monotonic()
    done = _receive(connection, job, expected)
    if hedges is not None:
        hedges.first_byte(time.monotonic() - connection.sent)
    connection.used = True
    while not done and job.head is None:
        done = _receive(connection, job, 0)
    if admit is not None and job.cost != cost:
        admit(job, job.cost - cost)
    while not done:
        target = job.target()
        count = receive_now(connection.fd, target) if quiet and len(target) <= _SHORT else -1
        done = job.feed(count) if count > 0 else _receive(connection, job, -1)


def _receive(connection: Connection, job: Job, expected: int) -> bool:
    """Wait for bytes; True: the answer is complete.

    Args:
        job: Gets them.
        expected: Wait until so many bytes are there, -1: all that the job has room for. Where
            fewer come, that costs `TICK` seconds.
    """
    target = job.target()
    flags = 0
    if expected and not connection.tls:
        flags = _WAIT_ALL
        if expected > 0:
            target = target[:expected]
    deadline = 0.0
    while True:
        try:
            count = connection.sock.recv_into(target, 0, flags)
        except (BlockingIOError, ssl.SSLWantReadError):  # the kernel's timeout, `TICK`
            now = time.monotonic()
            deadline = deadline or now + connection.read_timeout - TICK
            if now >= deadline:
                raise TimeoutError(f"nothing came for {connection.read_timeout:g} s") from None
            _on_time(connection)
            continue
        if not count:
            raise ConnectionResetError("the server closed the connection")
        if count >= expected:
            return job.feed(count) or _on_time(connection)
        done = True
        try:
            done = job.feed(count)
        finally:
            if done:
                job.was_short()
        return done or _on_time(connection)


def _on_time(connection: Connection) -> bool:
    """False, as long as the job may take its time."""
    if time.monotonic() > connection.expires:
        raise TimeoutError("the response did not end in time")
    return False


def perform(
    job: Job,
    connections: Connections,
    scratch: Scratch,
    *,
    admit: Callable[[Job, int], None] | None = None,
    track: Callable[[Connection | None], None] | None = None,
    quiet: bool = False,
) -> None:
    """Run one job in this thread, on the careful path where need be; `job.done` afterwards.

    Args:
        job: The job.
        connections: Where to take a connection from, and to give it back to.
        scratch: Memory of this thread.
        admit, quiet: Of `exchange`.
        track: Called with the connection in use, and with None after it, so that another thread can shut it.
    """
    if not job.fast:
        job.ask_carefully()
        return
    connection = None
    try:
        connection = connections.take()
        while True:
            if connection is None:
                job.check_credentials()
                connection = connections.open()
            connection.job, connection.sent = job, math.inf
            if track is not None:
                track(connection)
            try:
                if job.winner is not None:
                    raise ConnectionAbortedError(HEDGED)
                exchange(connection, job, scratch, admit, quiet, connections.hedges if quiet and job.in_place else None)
                break
            except OSError as error:
                if job.winner is not None or not is_stale(connection, job, error):
                    raise
                connection.close()
                connection = None
    except (OSError, UnexpectedResponse) as error:
        if connection is not None:
            connection.close()
        if track is not None:
            track(None)
        if job.winner is not None:
            job.take_over(job.winner)
            return
        job.refuse(error)
        job.ask_carefully()
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
        job.ask_carefully()  # unless it is done, as nearly always


# -- background threads ----------------------------------------------------------------------------

_FAR: Final = 0.005
"""Seconds to the first byte from which on stragglers are asked for once more: nearer, other work delays answers as long."""
_JOIN_SECONDS: Final = 1.0
_ANY: Final = 1 << 63
_PAUSE: Final = 0.05
"""Seconds between two looks of a thread whether it is wanted again."""
_MOST_AHEAD: Final = 4096
"""Jobs drawn before they are needed, however small they are."""


class Threads:
    """Runs jobs in threads and gives them back, done, in their order. Arguments as of `Pump`.

    Jobs are drawn by the calling thread, as far ahead as the bound allows: what it allows does not
    change until the caller takes a result, so the threads lose nothing by it.
    """

    def __init__(self, jobs: Iterator[Job], connections: Connections, *, max_bytes: int, concurrency: int) -> None:
        self._source = Source(jobs)
        self._connections = connections
        self._generation = connections.generation
        self._max_bytes = max_bytes
        self._concurrency = concurrency
        self._in_flight = connections.in_flight
        self._order: deque[Job] = deque()
        self._todo: SimpleQueue[Job | None] = SimpleQueue()
        self._finished: SimpleQueue[None] = SimpleQueue()
        self._wanted: Job | None = None
        self._threads: list[threading.Thread] = []
        self._hedges = connections.hedges
        self._races: dict[Job, Job] = {}
        """Jobs that were asked for once more, and by which."""
        self._racing: list[threading.Thread] = []
        self._in_use: dict[int, Connection] = {}
        self._stopped = False
        self._over = threading.Event()
        """As `_stopped`, for threads that are more than the limit allows."""
        self._held = self._in_place = 0
        """Bytes under way or not yet taken, and those of them that go to the caller's memory."""
        self._waiting = 0
        self._room = threading.Condition()

    def run(self) -> Generator[Job, None, None]:
        """The jobs, done; their errors are in them.

        Raises:
            ClosedError: the process was forked meanwhile, and this is the child.
        """
        order = self._order
        try:
            while True:
                self._draw()
                if not order:
                    break
                self._wanted = order[0]
                begun = time.monotonic()
                while not order[0].done:
                    self._await()
                self._in_flight.waited(time.monotonic() - begun)
                job = order.popleft()
                self._wanted = None
                with self._room:
                    self._held -= job.cost
                    self._in_place -= job.cost * job.in_place
                    if self._waiting:
                        self._room.notify_all()
                yield job
                del job
                if self._connections.generation != self._generation:
                    raise ClosedError("this iterator belongs to the parent process", hint="begin a new one in the child")
            if self._source.error is not None:
                raise self._source.error
        finally:
            self._stop()

    def _await(self) -> None:
        """Wait for the job whose turn it is, and look for stragglers meanwhile."""
        hedges = self._hedges
        try:
            self._finished.get(timeout=None if hedges is None else hedges.interval)
        except Empty:
            if hedges is not None and hedges.usual >= _FAR:
                self._ask_again(hedges)

    def _ask_again(self, hedges: Hedges) -> None:
        """Ask once more for what goes to the caller's memory and has got no answer for too long; the first answer counts."""
        now = time.monotonic()
        for connection in list(self._in_use.values()):
            job: Job | None = connection.job
            waited = now - connection.sent
            if job is None or waited <= hedges.delay or not job.in_place or not job.untouched or job in self._races:
                continue
            second = job.again()
            if second is not None and second.fast and hedges.may_ask(waited):
                self._races[job] = second
                thread = threading.Thread(target=self._race, args=(job, second), daemon=True, name="s3loader-s3-again")
                self._racing.append(thread)
                thread.start()

    def _draw(self) -> None:
        """Hand out jobs while there is room."""
        order = self._order
        while len(order) < _MOST_AHEAD:
            if order:
                left, lent = self._max_bytes - self._held, self._held - self._in_place
                job = self._source.take(min(left, self._in_flight.room(self._max_bytes) - lent), left)
            else:
                job = self._source.take(_ANY, _ANY)
            if job is None:
                return
            with self._room:
                self._held += job.cost
                self._in_place += job.cost * job.in_place
            order.append(job)
            self._todo.put(job)
            if len(self._threads) < min(self._concurrency, self._in_flight.limit, len(order)):
                number = len(self._threads)
                thread = threading.Thread(target=self._work, args=(number,), daemon=True, name=f"s3loader-s3-{number}")
                self._threads.append(thread)
                thread.start()

    # -- in the threads --------------------------------------------------------------------------

    def _race(self, first: Job, second: Job) -> None:
        """Run a second request for what `first` asks for. If it comes first, the thread of `first`, which may be receiving
        just then, is the one that copies it to the caller's memory."""
        try:
            perform(second, self._connections, Scratch(), track=partial(self._track, threading.get_ident()), quiet=True)
        except BaseException as error:  # noqa: BLE001 - whoever has sent the first request goes on with that
            second.fail(error)
        won = second.error is None and second.winner is None and not first.done
        if won:
            self._supersede(first, second)
        if self._hedges is not None:
            self._hedges.settled(won)

    def _supersede(self, job: Job, winner: Job) -> None:
        """`winner` has come first: whoever waits for the answer to `job` waits no longer."""
        job.winner = winner
        for connection in list(self._in_use.values()):
            if connection.job is job:
                connection.shut()

    def _work(self, number: int) -> None:
        scratch = Scratch()
        track = partial(self._track, threading.get_ident())
        while (job := self._todo.get()) is not None and not self._stopped:
            gate = job.gate
            if gate is not None and not gate.begin():
                job.fail(passed_over(job.where().url))
                gate = None
            else:
                if self._hedges is not None and job.in_place:
                    self._hedges.sent += 1
                try:
                    perform(job, self._connections, scratch, admit=self._admit, track=track, quiet=True)
                except BaseException as error:  # noqa: BLE001 - raised at the job's place by whoever consumes
                    job.fail(error)
                second = self._races.get(job)
                if second is not None and job.winner is None and not second.done:
                    self._supersede(second, job)
            if gate is not None:
                gate.end(None if job.result is None else job.result.data)
            if self._wanted is job:
                self._finished.put(None)
            if isinstance(job.error, ThrottledError):
                self._in_flight.rejected()
            if not isinstance(job.error, ClosedError):
                near = self._hedges is not None and self._hedges.near
                self._in_flight.completed(job.cost, full=not self._todo.empty(), most=self._concurrency, near=near)
            del job  # it holds a buffer
            while number >= self._in_flight.limit and not self._over.wait(_PAUSE):
                pass

    def _admit(self, job: Job, more: int) -> None:
        """The object is `more` bytes larger than thought: wait until there is room, or its turn."""
        with self._room:
            self._waiting += 1
            while more > 0 and self._held + more > self._max_bytes and job is not self._order[0] and not self._stopped:
                self._room.wait()
            self._waiting -= 1
            self._held += more

    def _track(self, thread: int, connection: Connection | None) -> None:
        if connection is not None:
            self._in_use[thread] = connection
            if self._stopped:
                connection.shut()
        else:
            self._in_use.pop(thread, None)

    # -- the end ---------------------------------------------------------------------------------

    def _stop(self) -> None:
        """End the threads: those that wait for a server by shutting the socket under them."""
        if self._connections.generation != self._generation:
            return  # the threads are the parent's
        self._stopped = True
        self._over.set()
        with self._room:
            self._room.notify_all()
        for _ in self._threads:
            self._todo.put(None)
        for connection in list(self._in_use.values()):
            if connection.job is not None and not connection.job.done:
                connection.shut()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in [*self._threads, *self._racing]:
            if thread.is_alive():  # Ctrl-C may have come while it was being started
                thread.join(max(0.0, deadline - time.monotonic()))
