"""Work done by background threads, results in the order of the items, within a bound of bytes.

No future per item: threads take the next slot themselves, a slot's own lock says when it is done.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Generic, TypeVar

from s3loader.errors import ClosedError
from s3loader.store.threads import Crew

__all__ = ["Budget", "Slot", "run_ordered"]

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
) -> Iterator[Slot[T]]:
    """Slots, done, in the order of `items`.

    Items are drawn in the calling thread, as far ahead as the budget allows; what that raises is
    raised when all before it were given. Closing the iterator, or losing it, stops the threads.

    Args:
        work: Makes a slot's result; an `Exception` it raises ends up in the slot's `error`.
        cost: Bytes that an item will need, as far as known beforehand.
        max_bytes: Bound on the cost of all slots not yet given; a single one may exceed it.
    """
    pid = os.getpid()
    crew = Crew(concurrency, name)
    budget = Budget(max_bytes)
    window: deque[Slot[T]] = deque()
    source = _Source(items, cost)
    try:
        while True:
            while (ahead := source.peek()) is not None and (
                not window or (budget.used + ahead.cost <= max_bytes and len(window) < _MAX_SLOTS)
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
