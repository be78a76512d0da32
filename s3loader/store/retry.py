"""Trying again: what may help, how long to wait, and when to give up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from s3loader import events
from s3loader.errors import ClosedError, S3LoaderError, ThrottledError, TruncatedError
from s3loader.store.threads import current_attempt, pause, set_attempt

__all__ = ["Attempts", "RetryPolicy", "may_retry"]

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
