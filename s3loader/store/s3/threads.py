"""Background threads, one connection each, that take the next job themselves: for prefetch beside a
main thread that is busy in Python, where a poll loop would starve for the GIL.

A job changes hands through two C queues: no future, no condition variable per job.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Final

from s3loader.errors import ClosedError, ThrottledError
from s3loader.store.s3.connection import Connection, Connections
from s3loader.store.s3.exchange import perform
from s3loader.store.s3.jobs import Job, Scratch, Source

__all__ = ["Threads"]

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
        self._in_use: dict[int, Connection] = {}
        self._stopped = False
        self._held = 0
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
                    self._finished.get()
                self._in_flight.waited(time.monotonic() - begun)
                job = order.popleft()
                self._wanted = None
                with self._room:
                    self._held -= job.cost
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

    def _draw(self) -> None:
        """Hand out jobs while there is room."""
        order = self._order
        while len(order) < _MOST_AHEAD:
            job = self._source.take(self._in_flight.room(self._max_bytes) - self._held if order else _ANY)
            if job is None:
                return
            with self._room:
                self._held += job.cost
            order.append(job)
            self._todo.put(job)
            if len(self._threads) < min(self._concurrency, self._in_flight.limit, len(order)):
                number = len(self._threads)
                thread = threading.Thread(target=self._work, args=(number,), daemon=True, name=f"s3loader-s3-{number}")
                self._threads.append(thread)
                thread.start()

    # -- in the threads --------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        scratch = Scratch()
        track = partial(self._track, threading.get_ident())
        while (job := self._todo.get()) is not None and not self._stopped:
            try:
                perform(job, self._connections, scratch, admit=self._admit, track=track, quiet=True)
            except BaseException as error:  # noqa: BLE001 - raised at the job's place by whoever consumes
                job.fail(error)
            if self._wanted is job:
                self._finished.put(None)
            if isinstance(job.error, ThrottledError):
                self._in_flight.rejected()
            self._in_flight.completed(job.cost, full=not self._todo.empty(), most=self._concurrency)
            del job  # it holds a buffer
            while number >= self._in_flight.limit and not self._stopped:
                time.sleep(_PAUSE)

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
        with self._room:
            self._room.notify_all()
        for _ in self._threads:
            self._todo.put(None)
        for connection in list(self._in_use.values()):
            if connection.job is not None and not connection.job.done:
                connection.shut()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
