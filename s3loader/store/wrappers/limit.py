"""A bound on requests per second, per store and process."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from s3loader import events
from s3loader.errors import ConfigError
from s3loader.store.base import Backend
from s3loader.store.threads import pause
from s3loader.store.wrappers.wrapper import Interceptor, Op, Wrapper

__all__ = ["LimitBackend", "pace_of"]

T = TypeVar("T")


_all: weakref.WeakSet[LimitBackend] = weakref.WeakSet()


def _renew_locks() -> None:
    for limited in list(_all):  # another thread of the parent may have held it
        limited._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


class LimitBackend(Interceptor):
    """Lets at most `rate` requests per second pass, evenly spaced; the others wait their turn.

    Each wait is a ``WAIT`` event. A listing counts as one request.
    """

    LETS_BULK_PAST = True

    def __init__(
        self,
        inner: Backend,
        rate: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = pause,
    ) -> None:
        super().__init__(inner)
        if not rate > 0:
            raise ConfigError(f"a rate must be positive, not {rate!r}", hint="requests per second; leave it out for no limit")
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._next = 0.0
        self._lock = threading.Lock()
        _all.add(self)

    def __reduce__(self) -> tuple[type[LimitBackend], tuple[Backend, float]]:
        return LimitBackend, (self.inner, self.rate)

    def reserve(self) -> float:
        """Take the next turn; returns the seconds to wait for it."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + 1 / self.rate
            return turn - now

    def wait(self) -> None:
        """Wait for a turn."""
        delay = self.reserve()
        if delay <= 0:
            return
        start = events.now()
        self._sleep(delay)
        if events.active():
            events.emit(events.OpEvent("WAIT", self.url, 0, start, events.now(), engine=self.engine))

    def around(self, op: Op, key: str, size: int, run: Callable[[], T]) -> T:
        """Wait, then do it."""
        self.wait()
        return run()


def pace_of(backend: Backend) -> Callable[[], None] | None:
    """What to call before each request that goes around the wrappers; None where nothing limits."""
    while isinstance(backend, Wrapper):
        if isinstance(backend, LimitBackend):
            return backend.wait
        backend = backend.inner
    return None
