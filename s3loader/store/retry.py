"""When a request goes out: again, after a failure (what may help, how long to wait, when to give up); and within a bound on
requests per second, per store and process."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from s3loader import events
from s3loader.errors import ClosedError, ConfigError, S3LoaderError, ThrottledError, TruncatedError
from s3loader.store.ordered import pause

__all__ = [
    "Attempts",
    "RateLimit",
    "RetryPolicy",
    "after_failure",
    "current_attempt",
    "may_retry",
    "set_attempt",
    "take_failure",
]

_BASE: Final = 0.1
_CAP: Final = 10.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long a request is repeated whose error says that it may help.

    The wait after attempt n is uniform in ``[0, min(10 s, 0.1 s * 2**n)]`` (the "full jitter" of AWS's
    architecture blog, 2015), or longer where the server asked for that.
    """

    max_attempts: int = 5
    """Most attempts at one request, the first included."""
    budget: float = 60.0
    """Seconds after which no further attempt of one request begins."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = pause
    jitter: Callable[[float, float], float] = random.uniform
    throttled_attempts: int = 0
    """As `max_attempts`, where the last answer was "slow down", which is no failure but a matter of waiting; 0: no more."""

    @classmethod
    def of(cls, max_attempts: int | None, budget: float) -> RetryPolicy:
        """The policy of a store's options; None: 5 attempts, and 30 where the store says "slow down"."""
        if max_attempts is None:
            return cls(budget=budget, throttled_attempts=30)
        return cls(max_attempts, budget)

    def __reduce__(self) -> tuple[Callable[..., RetryPolicy], tuple[int, float, int]]:
        return _policy, (self.max_attempts, self.budget, self.throttled_attempts)


def _policy(max_attempts: int, budget: float, throttled_attempts: int) -> RetryPolicy:
    return RetryPolicy(max_attempts, budget, throttled_attempts=throttled_attempts)


class Attempts:
    """The attempts at one request: how many, since when, and whether another one may follow.

    Args:
        policy: How often and how long.
        url: Of what is asked for, for events.
        engine: Name of the engine, for events.
    """

    __slots__ = ("_engine", "_outer", "_policy", "_start", "_url", "number")

    def __init__(self, policy: RetryPolicy, url: str, engine: str) -> None:
        self._policy = policy
        self._url = url
        self._engine = engine
        self._outer = 0
        self._start = policy.clock()
        self.number = 1
        """Of the attempt under way."""

    def is_last(self, error: S3LoaderError) -> bool:
        """Note the attempt in `error`; whether there is no further one."""
        error.attempts = max(error.attempts, self.number)
        policy = self._policy
        most = policy.max_attempts
        if isinstance(error, ThrottledError):
            most = max(most, policy.throttled_attempts)
        return not may_retry(error) or self.number >= most or policy.clock() - self._start >= policy.budget

    def wait(self, error: S3LoaderError) -> None:
        """Until the next attempt. Each wait is a ``RETRY`` event, with the error that caused it."""
        policy = self._policy
        left = policy.budget - (policy.clock() - self._start)
        delay = policy.jitter(0.0, min(_CAP, _BASE * 2.0**self.number))
        asked = error.details.get("retry_after")
        if isinstance(asked, (int, float)):
            delay = max(delay, float(asked))
        begin = events.now()
        policy.sleep(max(0.0, min(delay, left)))
        if not self._outer:
            self._outer = current_attempt()
        self.number += 1
        set_attempt(self.number)
        if events.active():
            events.emit(
                events.OpEvent(
                    "RETRY",
                    self._url,
                    0,
                    begin,
                    events.now(),
                    engine=self._engine,
                    attempt=self.number,
                    status=error.status,
                    error=f"{type(error).__name__}: {error.message}",
                )
            )

    def end(self) -> None:
        """Leave the thread as it was."""
        if self._outer:
            set_attempt(self._outer)


def may_retry(error: S3LoaderError) -> bool:
    """Whether the same request may succeed if it is sent again."""
    return (error.retryable or isinstance(error, TruncatedError)) and not isinstance(error, ClosedError)


# -- the try that this thread makes ----------------------------------------------------------------

_here = threading.local()


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


# -- requests per second ---------------------------------------------------------------------------


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
