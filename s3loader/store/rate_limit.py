"""A bound on requests per second, per store and process."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable

from s3loader import events
from s3loader.errors import ConfigError
from s3loader.store.threads import pause

__all__ = ["RateLimit"]


class RateLimit:
    """Lets at most `rate` requests per second pass, evenly spaced; the others wait their turn.

    Each wait is a ``WAIT`` event. A listing counts as one request.
    """

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = pause,
    ) -> None:
        if not rate > 0:
            raise ConfigError(f"a rate must be positive, not {rate!r}", hint="requests per second; leave it out for no limit")
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._next = 0.0
        self._lock = threading.Lock()
        _all.add(self)

    def __reduce__(self) -> tuple[type[RateLimit], tuple[float]]:
        return RateLimit, (self.rate,)

    def reserve(self) -> float:
        """Take the next turn; returns the seconds to wait for it."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + 1 / self.rate
            return turn - now

    def wait(self, url: str, engine: str) -> None:
        """Wait for a turn; `url` and `engine` are for the event."""
        delay = self.reserve()
        if delay <= 0:
            return
        start = events.now()
        self._sleep(delay)
        if events.active():
            events.emit(events.OpEvent("WAIT", url, 0, start, events.now(), engine=engine))


_all: weakref.WeakSet[RateLimit] = weakref.WeakSet()


def _renew_locks() -> None:
    for limit in list(_all):  # another thread of the parent may have held it
        limit._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)
