"""Where obstore may be called, how a call of it can be interrupted, and how the process ends after it.

obstore runs on one Tokio runtime per process, which does not survive fork: in a child of a process
that used it every call hangs for ever, new stores included. Its sync calls do not see a Ctrl-C before
they end. Its async calls end in a thread of Tokio's, which then takes the GIL: where the interpreter
is closing just then, the process aborts. The same where one of them lets go of
a buffer of Python's. So only sync calls are made, the main thread has them made by a thread of ours that
it can leave, and the interpreter closes when calls and buffers under way have come back. All of it is per
process, for all stores.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from s3loader.errors import ClosedError, UnsupportedOperationError
from s3loader.store.ordered import Crew
from s3loader.types import Buffer

__all__ = ["FORKED", "call", "lend", "usable"]

T = TypeVar("T")

FORKED = "obstore was used before this process was forked, and cannot be used here any more"
_PATIENCE: Final = 1.0
"""Seconds for which a closing interpreter waits for what nobody else waits for any more."""


def _loaded() -> bool:
    return "obstore._obstore" in sys.modules


# The module being loaded counts as use: who else in the parent called it cannot be known. A worker
# that finds it loaded before us cannot tell fork from spawn, and is careful.
_tainted = _loaded() and multiprocessing.parent_process() is not None
_crew: Crew | None = None  # of the main thread, when no call of it is under way


class _Abroad:
    """What is in obstore's hands in this process: calls under way, buffers that it has not let go of."""

    def __init__(self) -> None:
        self.closing = False
        self._calls = 0
        self._buffers: list[memoryview] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Around each call. A thread that comes when the interpreter closes is too late: it could not come back."""
        with self._changed:
            if self.closing and threading.current_thread() is not threading.main_thread():
                raise ClosedError("the interpreter is closing")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._take_back()
                self._changed.notify_all()

    def lent(self, view: memoryview) -> None:
        """Note a buffer that was handed over."""
        with self._changed:
            self._buffers.append(view)

    def _take_back(self) -> None:
        self._buffers = [view for view in self._buffers if not _released(view)]

    def close(self) -> None:
        """Let no other thread begin a call, and wait a moment for what is under way."""
        deadline = time.monotonic() + _PATIENCE
        with self._changed:
            self.closing = True
            self._changed.wait_for(lambda: not self._calls, _PATIENCE)
            self._take_back()
            while self._buffers and time.monotonic() < deadline:
                self._changed.wait(0.01)  # nobody tells
                self._take_back()


def _released(view: memoryview) -> bool:
    try:
        view.release()
    except BufferError:  # obstore has it
        return False
    return True


_abroad = _Abroad()


def _in_child() -> None:
    global _tainted, _crew, _abroad
    _tainted = _tainted or _loaded()
    _crew, _abroad = None, _Abroad()  # the threads are the parent's


@atexit.register
def _close() -> None:
    _abroad.close()


os.register_at_fork(after_in_child=_in_child)


def usable() -> bool:
    """Whether obstore works in this process: it was not forked from one that had obstore loaded."""
    return not _tainted


def lend(pieces: Iterable[Buffer]) -> Iterator[memoryview]:
    """`pieces` for a call to read, without a copy; the interpreter will not close before they are back."""
    for piece in pieces:
        view = memoryview(piece)
        try:
            yield view
        finally:
            _abroad.lent(view)


def call(sync: Callable[[], T]) -> T:
    """One sync call of obstore. A Ctrl-C in the main thread leaves it to end by itself.

    Raises:
        UnsupportedOperationError: obstore is not usable in this process.
        ClosedError: the interpreter is closing, and this is not its main thread.
    """
    if _tainted:
        raise UnsupportedOperationError(
            FORKED, hint='start workers by spawn or forkserver: DataLoader(multiprocessing_context="forkserver")'
        )
    if threading.current_thread() is not threading.main_thread() or _abroad.closing:
        with _abroad.one_call():
            return sync()
    return _apart(sync)


def _apart(sync: Callable[[], T]) -> T:
    """`sync` in a thread of its own, while this one waits where a signal reaches it."""
    global _crew
    crew, _crew = _crew or Crew(1, "s3loader-obstore"), None
    outcome: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def job() -> None:
        try:
            with _abroad.one_call():
                outcome.put((sync(), None))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            outcome.put((None, error))

    try:
        crew.submit(job)
    except RuntimeError:  # no thread can be started any more
        with _abroad.one_call():
            return sync()
    try:
        found: Any
        found, error = outcome.get()
    except BaseException:
        crew.stop(0)  # the thread ends with its call
        raise
    _crew = crew
    if error is None:
        return found  # type: ignore[no-any-return]
    try:
        raise error
    finally:
        del error
