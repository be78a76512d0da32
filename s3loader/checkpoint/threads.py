"""Threads that outlive a Ctrl-C in the thread that has them started.

``threading.Thread.start`` and ``threading.Event`` are Python code around a lock: an exception raised there by a signal can
leave the lock taken for ever, and a thread that nobody ends keeps the interpreter from ending. What is used here is atomic to
signals. `at_once` is for requests that do not depend on each other.
"""

from __future__ import annotations

import _thread
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, overload

__all__ = ["Gate", "Worker", "at_once"]

_MOST: Final = 32
"""Calls beside each other."""

A = TypeVar("A")
B = TypeVar("B")


class Gate:
    """Closed, then open for ever; like `threading.Event`, but whatever moment a signal strikes at, no waiter is left behind."""

    __slots__ = ("_open", "_tokens")

    def __init__(self) -> None:
        self._open = False
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()

    def open(self) -> None:
        """Let everybody through; opening twice is fine."""
        self._open = True
        self._tokens.put(None)

    def is_open(self) -> bool:
        """Whether it is."""
        return self._open

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is open, at most `timeout` seconds; returns whether it is."""
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._open:
                self._tokens.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except queue.Empty:
            return self._open
        finally:
            if self._open:
                self._tokens.put(None)  # for the next waiter
        return True


class Worker:
    """A thread that an interpreter which ends waits for, and that can be called off as long as it has not begun.

    Args:
        work: What it does; raises nothing, and ends by itself once its owner tells it to.
        name: Of the thread.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name)
        self._claim: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._claim.put(None)
        self._ended = Gate()
        self._called_off = False

    def start(self) -> None:
        """Start it. A signal that strikes here may be raised before or after it has begun: then `call_off` tells.

        Raises:
            RuntimeError: the system has no more threads.
        """
        began: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def begin() -> None:  # no signal is handled in this thread
            error: BaseException | None = None
            try:
                self._thread.start()
            except BaseException as problem:  # noqa: BLE001 - raised by `start`
                error = problem
            began.put(error)

        _thread.start_new_thread(begin, ())
        error = began.get()
        if error is not None:
            raise error

    def call_off(self) -> bool:
        """Whether it has not begun; then it never will."""
        try:
            self._claim.get_nowait()
        except queue.Empty:
            return self._called_off
        self._called_off = True
        self._ended.open()
        return True

    def join(self) -> None:
        """Wait until it has ended, or was called off."""
        self._ended.wait()
        if not self._called_off:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._claim.get_nowait()
        except queue.Empty:
            return
        try:
            self._work()
        finally:
            self._ended.open()


@overload
def at_once(one: Callable[[], A], other: Callable[[], B], /) -> tuple[A, B]: ...
@overload
def at_once(*calls: Callable[[], A]) -> tuple[A, ...]: ...
def at_once(*calls: Callable[[], Any]) -> tuple[Any, ...]:
    """Make all calls, up to 32 beside each other, the first one in the calling thread; returns when all have ended.

    Where the system has no more threads, they are made one after the other.

    Returns:
        Their results, in the order of the calls.

    Raises:
        BaseException: what the first of them, in the order of the calls, has raised.
    """
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()
    results: list[Any] = [None] * len(calls)
    errors: dict[int, BaseException] = {}

    def make(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:  # noqa: BLE001 - raised by the caller of all of them
            errors[number] = error
        ended.put(None)

    def work() -> None:
        while True:
            try:
                number = left.get_nowait()
            except queue.Empty:
                return
            make(number)

    for number in range(1, len(calls)):
        left.put(number)
    for _ in range(min(len(calls), _MOST) - 1):
        try:
            _thread.start_new_thread(work, ())
        except RuntimeError:
            break
    if calls:
        make(0)
    work()
    for _ in calls:
        ended.get()
    if errors:
        raise errors[min(errors)]
    return tuple(results)
