"""Blocking work in threads beside a poll loop, its results brought back into the loop."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["BlockingCalls"]


class BlockingCalls:
    """One thread per piece of work: there are few, and they take long.

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
