"""Small crews of background threads that end on request, and waits that such a thread can be called out of."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator

from s3loader.errors import ClosedError

__all__ = ["Crew", "after_failure", "current_attempt", "pause", "set_attempt", "take_failure"]

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


def current_attempt() -> int:
    """Which try of a request runs in this thread; 1 where nothing is tried again."""
    return getattr(_here, "attempt", 1)


def set_attempt(number: int) -> None:
    """Note which try of a request runs in this thread from now on."""
    _here.attempt = number


@contextlib.contextmanager
def after_failure(error: Exception) -> Iterator[None]:
    """The request made inside was tried once already, elsewhere, and failed with `error`: what retries
    counts that try, and waits before the next one."""
    _here.failed = error
    try:
        yield
    finally:
        _here.failed = None


def take_failure() -> Exception | None:
    """The error that `after_failure` told of; only the first who asks gets it."""
    error: Exception | None = getattr(_here, "failed", None)
    if error is not None:
        _here.failed = None
    return error
