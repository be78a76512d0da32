"""Work done by a few background threads within a bound of items and bytes; errors come out where the work was asked for.

`run_ordered` pulls items and gives their results in order (no future per item: threads take the next slot themselves, a
slot's own lock says when it is done); `map_ordered` is the same for a plain function. `BoundedPool` is pushed to.
Below all of them is `Crew`: a few threads that end on request, and `pause`, a wait that such a thread can be called out of.
An abandoned iterator stops its threads, Ctrl-C ends the wait at once, and a forked child goes on with nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from typing import Any, Final, Generic, TypeVar

from s3loader.errors import ClosedError

__all__ = ["BoundedPool", "Budget", "Crew", "Slot", "map_ordered", "pause", "run_ordered"]

_here = threading.local()


def pause(seconds: float) -> None:
    """Sleep; in a thread of a `Crew` no longer than until the crew is stopped.

    Raises:
        ClosedError: the crew was stopped; what waited is no longer wanted.
    """
    stop: threading.Event | None = getattr(_here, "stop", None)
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise ClosedError("stopped while it waited")


class Crew:
    """At most `size` daemon threads, one more with each job until then.

    A job must not raise. `stop` drops jobs not begun; it waits a moment for those that run, which
    then end by themselves (a request on the wire cannot be called back, only left alone).
    """

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self.name = name
        self.stopping = threading.Event()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in one of the threads; jobs begin in the order given."""
        self._jobs.put(job)
        if len(self._threads) < self.size:
            thread = threading.Thread(target=self._work, name=f"{self.name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        _here.stop = self.stopping
        while (job := self._jobs.get()) is not None and not self.stopping.is_set():
            job()
            del job  # holds buffers

    def stop(self, wait: float = 0.5) -> bool:
        """End the threads; whether all of them ended within `wait` seconds."""
        self.stopping.set()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + wait
        for thread in self._threads:
            if thread.is_alive():  # Ctrl-C may have come while it was being started
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


R = TypeVar("R")
T = TypeVar("T")
_MAX_SLOTS: Final = 4096


class Slot(Generic[T]):
    """One item on its way: `cost` bytes of the budget are its own until it is taken."""

    __slots__ = ("cost", "done", "error", "item", "result")

    def __init__(self, item: T, cost: int) -> None:
        self.item = item
        self.cost = cost
        self.result: Any = None
        self.error: Exception | None = None
        self.done = threading.Lock()
        self.done.acquire()


class Budget:
    """Bytes in hand. The slot whose turn it is gets what it needs, or nothing would ever move."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._first: Slot[Any] | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._waiting = 0

    def take(self, slot: Slot[Any]) -> None:
        """Count a new slot."""
        with self._changed:
            self.used += slot.cost

    def correct(self, slot: Slot[Any], cost: int) -> None:
        """`slot` turned out to need `cost` bytes; waits until there is room for more.

        Raises:
            ClosedError: nobody wants it any more.
        """
        with self._changed:
            more = cost - slot.cost
            self._waiting += 1
            while more > 0 and self.used + more > self.limit and slot is not self._first and not self._stopped:
                self._changed.wait()
            self._waiting -= 1
            if self._stopped:
                raise ClosedError("stopped while it waited")
            self.used += more
            slot.cost = cost
            if more < 0 and self._waiting:
                self._changed.notify_all()

    def first(self, slot: Slot[Any]) -> None:
        """`slot` is the one waited for."""
        with self._changed:
            self._first = slot
            if self._waiting:
                self._changed.notify_all()

    def give(self, slot: Slot[Any]) -> None:
        """`slot` was taken."""
        with self._changed:
            self.used -= slot.cost
            if self._waiting:
                self._changed.notify_all()

    def stop(self) -> None:
        """Let all who wait go."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def run_ordered(
    items: Iterable[T],
    work: Callable[[Slot[T], Budget], Any],
    cost: Callable[[T], int],
    *,
    max_bytes: int,
    concurrency: int,
    name: str,
    max_items: int = _MAX_SLOTS,
) -> Iterator[Slot[T]]:
    """Slots, done, in the order of `items`.

    Items are drawn in the calling thread, as far ahead as the budget allows; what that raises is
    raised when all before it were given. Closing the iterator, or losing it, stops the threads.

    Args:
        work: Makes a slot's result; an `Exception` it raises ends up in the slot's `error`.
        cost: Bytes that an item will need, as far as known beforehand.
        max_bytes: Bound on the cost of all slots not yet given; a single one may exceed it.
        max_items: Bound on their number.
    """
    pid = os.getpid()
    crew = Crew(concurrency, name)
    budget = Budget(max_bytes)
    window: deque[Slot[T]] = deque()
    source = _Source(items, cost)
    try:
        while True:
            while (ahead := source.peek()) is not None and (
                not window or (budget.used + ahead.cost <= max_bytes and len(window) < max_items)
            ):
                source.drop()
                budget.take(ahead)
                window.append(ahead)
                crew.submit(_Job(ahead, work, budget))
            if not window:
                break
            slot = window[0]
            budget.first(slot)
            slot.done.acquire()
            window.popleft()
            budget.give(slot)
            yield slot
            if os.getpid() != pid:
                raise ClosedError("this iterator belongs to the parent process", hint="begin a new one in the child")
        if source.error is not None:
            raise source.error
    finally:
        if os.getpid() == pid:
            budget.stop()
            crew.stop()


def map_ordered(
    function: Callable[[T], R], items: Iterable[T], *, concurrency: int, name: str, ahead: int | None = None
) -> Iterator[R]:
    """``function(item)`` of each item, in order; an error is raised in its place, and ends the iteration.

    Where there is but one item in a list, or `concurrency` is 1, the calling thread does the work.

    Args:
        ahead: Most results that nobody has taken yet, those under way included; default: twice `concurrency`.
    """
    if concurrency <= 1 or (isinstance(items, Sized) and len(items) < 2):
        yield from map(function, items)
        return
    slots = run_ordered(
        items,
        lambda slot, _: function(slot.item),
        lambda _: 1,
        max_bytes=_MAX_SLOTS,
        max_items=ahead or 2 * concurrency,
        concurrency=concurrency,
        name=name,
    )
    with contextlib.closing(slots):  # type: ignore[type-var]  # a generator: its threads end with this one
        for slot in slots:
            if slot.error is not None:
                raise slot.error
            yield slot.result


class _Source(Generic[T]):
    """The items, one looked ahead; an exception of theirs is kept for its turn."""

    def __init__(self, items: Iterable[T], cost: Callable[[T], int]) -> None:
        self.error: Exception | None = None
        self._items = iter(items)
        self._cost = cost
        self._ahead: Slot[T] | None = None
        self._ended = False

    def peek(self) -> Slot[T] | None:
        if self._ahead is None and not self._ended:
            try:
                item = next(self._items)
                self._ahead = Slot(item, self._cost(item))
            except StopIteration:
                self._ended = True
            except Exception as error:  # noqa: BLE001 - the caller's own, raised at its place
                self._ended = True
                self.error = error
        return self._ahead

    def drop(self) -> None:
        self._ahead = None


class _Job:
    __slots__ = ("budget", "slot", "work")

    def __init__(self, slot: Slot[Any], work: Callable[[Slot[Any], Budget], Any], budget: Budget) -> None:
        self.slot = slot
        self.work = work
        self.budget = budget

    def __call__(self) -> None:
        slot = self.slot
        try:
            slot.result = self.work(slot, self.budget)
        except Exception as error:  # noqa: BLE001 - raised at the slot's place
            slot.error = error
        finally:
            slot.done.release()


class BoundedPool:
    """Runs jobs in a few threads, begun in the order given; `submit` waits while too much is under way.

    After the first failure `submit`, `check` and `wait` raise it, every time: what failed is not in what the caller is about to
    publish. A job may wait for jobs submitted before it (they have begun by then), not for later ones. `submit` may be
    called from several threads. In a forked child every call raises, and `stop` does nothing.

    Args:
        threads: How many run at a time; each is started when there is a job for it.
        name: Of the threads.
        max_jobs: Most jobs that have not ended; default: four for each thread.
        max_bytes: Most bytes held by jobs that have not ended; a single job may exceed it. None: no bound.
    """

    def __init__(self, threads: int, name: str, *, max_jobs: int | None = None, max_bytes: int | None = None) -> None:
        self.threads = threads
        self.error: BaseException | None = None
        """The first failure of any job."""
        self._name = name
        self._max_jobs = max_jobs or 4 * threads
        self._max_bytes = max_bytes
        self._bytes = 0
        self._jobs = 0
        self._changed = threading.Condition()
        self._crew: Crew | None = None
        self._futures: set[Future[Any]] = set()
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise the first failure.

        Raises:
            ClosedError: this is a forked child of the process the pool was made in.
        """
        if self._pid != os.getpid():
            raise ClosedError("made in the parent process, which goes on with it", hint="begin anew in the process that writes")
        if self.error is not None:
            raise self.error

    def submit(self, job: Callable[[], T], size: int = 0) -> Future[T]:
        """Run `job`, which holds `size` bytes; its result or error is the future's, too."""
        self.check()
        with self._changed:
            self._changed.wait_for(lambda: self._room(size) or self.error is not None)
            if self.error is None:
                self._bytes += size
                self._jobs += 1
        self.check()
        if self._crew is None:
            self._crew = Crew(self.threads, self._name)
        future: Future[T] = Future()
        self._futures.add(future)
        self._crew.submit(_PoolJob(self, job, future, size))
        return future

    def wait(self) -> None:
        """Return when no job is under way; raises as `check`."""
        self.check()
        with self._changed:
            self._changed.wait_for(lambda: self._jobs == 0 or self._crew is None)
        self.check()

    def stop(self, wait: float = 0.5) -> None:
        """End the threads; jobs that have not begun are dropped, their futures cancelled.

        Args:
            wait: Seconds to wait for jobs that run; they end by themselves.
        """
        if self._pid != os.getpid():
            return
        for future in list(self._futures):
            future.cancel()
        if self._crew is not None:
            self._crew.stop(wait)
            self._crew = None

    def _room(self, size: int) -> bool:
        fits = self._max_bytes is None or self._bytes + size <= self._max_bytes
        return self._jobs == 0 or (fits and self._jobs < self._max_jobs)

    def _ended(self, future: Future[Any], size: int, error: BaseException | None) -> None:
        self._futures.discard(future)
        with self._changed:
            self._bytes -= size
            self._jobs -= 1
            self.error = self.error or error
            self._changed.notify_all()

    def __getstate__(self) -> Any:
        raise TypeError("work in progress cannot be pickled")


class _PoolJob:
    """One job of a `BoundedPool`."""

    __slots__ = ("future", "job", "pool", "size")

    def __init__(self, pool: BoundedPool, job: Callable[[], Any], future: Future[Any], size: int) -> None:
        self.pool = pool
        self.job = job
        self.future = future
        self.size = size

    def __call__(self) -> None:
        failed: BaseException | None = None
        try:
            if self.future.set_running_or_notify_cancel():
                self.future.set_result(self.job())
        except BaseException as error:  # noqa: BLE001 - raised by the pool's next call, and by the future
            failed = error
            self.future.set_exception(error)
        finally:
            del self.job  # holds buffers
            self.pool._ended(self.future, self.size, failed)
