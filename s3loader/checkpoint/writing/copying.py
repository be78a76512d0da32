"""Copies into staging memory by several threads.

One core moves only a part of what the memory can (19 of 36 GB/s where this was measured), and a save stalls the caller
for as long as its copy takes. So large copies are cut up, and threads that live as long as the staging take some of the pieces.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, NamedTuple

from s3loader.checkpoint.threads import Worker

__all__ = ["Copier"]

_PIECE: Final = 4 << 20
"""Bytes that a thread takes at a time: long against handing it over, short against waiting for the last one."""
_SMALL: Final = 1 << 16
"""Up to here numpy costs more than it saves."""
_MOST_THREADS: Final = 4
"""The memory's limit; a training machine's other cores have batches to make."""


class _Copy(NamedTuple):
    target: memoryview
    source: memoryview

    def make(self) -> None:
        """Copy, without the GIL."""
        np: Any = _numpy()
        np.copyto(np.frombuffer(self.target, np.uint8), np.frombuffer(self.source, np.uint8))


class Copier:
    """Makes copies in the calling thread and in others beside it; for one calling thread.

    Use it as a context manager: its threads end with the block.

    Args:
        threads: How many copy, the calling one included; default: up to 4, at most one per core.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._helpers = min(_cores(), _MOST_THREADS) - 1 if threads is None else threads - 1
        self._threads: list[Worker] = []
        self._broken = False
        """Whether the count of copies under way may be wrong: a signal has struck while it was changed."""
        self._todo: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._handed_out = 0
        self._waits: dict[Callable[[], None], None] = {}

    def copy(self, target: memoryview, source: memoryview) -> None:
        """Begin to copy `source` to `target` (as long, both of bytes); both stay as they are until `settle`."""
        size = len(source)
        if size < _SMALL:
            target[:] = source
            return
        if size <= _PIECE // 2 or self._helpers < 1:
            _Copy(target, source).make()
            return
        self._broken = True
        self._start()
        for at in range(0, size, _PIECE):
            self._todo.put(_Copy(target[at : at + _PIECE], source[at : at + _PIECE]))
            self._handed_out += 1
            if self._todo.qsize() > 2 * self._helpers:
                self._help()
        self._broken = False

    def later(self, wait: Callable[[], None]) -> None:
        """Something else was begun: `wait` returns when it is done. `settle` calls it, once however often it was given."""
        self._waits[wait] = None

    def settle(self) -> None:
        """Return when all that was begun is done.

        Raises:
            BaseException: what a copy failed with.
        """
        if self._broken:
            self._end()
            return
        self._broken = True
        while self._help():
            pass
        failed = None
        while self._handed_out:
            failed = self._done.get() or failed
            self._handed_out -= 1
        waits, self._waits = self._waits, {}
        for wait in waits:
            wait()
        self._broken = False
        if failed is not None:
            raise failed

    def _end(self) -> None:
        """Let the other threads finish what was handed out, and wait for them."""
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            if not thread.call_off():
                thread.join()
        self._threads.clear()

    def _help(self) -> bool:
        """Make one of the copies that nobody has begun; whether there was one."""
        try:
            copy = self._todo.get_nowait()
        except queue.Empty:
            return False
        self._handed_out -= 1
        if copy is not None:
            copy.make()
        return True

    def _start(self) -> None:
        while len(self._threads) < self._helpers:
            self._threads.append(Worker(self._work, f"s3loader-ckpt-copy-{len(self._threads)}"))
            self._threads[-1].start()

    def _work(self) -> None:
        while (copy := self._todo.get()) is not None:
            failed = None
            try:
                copy.make()
            except BaseException as error:  # noqa: BLE001 - raised by `settle`
                failed = error
            del copy  # it keeps the caller's memory
            self._done.put(failed)

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.settle()
        finally:
            self._end()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numpy() -> Any:
    import numpy as np

    return np
