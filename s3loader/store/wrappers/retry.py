"""Trying again: what may help, and for how long."""

from __future__ import annotations

import builtins
import functools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from s3loader import events
from s3loader.errors import ClosedError, S3LoaderError, TruncatedError
from s3loader.store.base import Backend
from s3loader.store.settle import WRITE_ID, Settler
from s3loader.store.threads import current_attempt, pause, set_attempt, take_failure
from s3loader.store.wrappers.wrapper import Interceptor, Op
from s3loader.types import Buffer, CommonPrefix, DeleteFailure, ObjectMeta, PartResult, PutMode, PutResult

__all__ = ["RetryBackend"]

T = TypeVar("T")

_BASE: Final = 0.1
_CAP: Final = 10.0


class RetryBackend(Interceptor):
    """Repeats requests whose error says that it may help, with jittered exponential back-off.

    The wait after try n is uniform in ``[0, min(10 s, 0.1 s * 2**n)]`` (the "full jitter" of AWS's
    architecture blog, 2015), or longer where the server asked for that. Each wait is a ``RETRY``
    event, with the error that caused it. The error that is raised in the end is the last one; its
    `attempts` says how many there were.

    Args:
        max_attempts: Most tries of one request.
        budget: Seconds after which no further try of it begins.
    """

    LETS_BULK_PAST = True

    def __init__(
        self,
        inner: Backend,
        *,
        max_attempts: int = 5,
        budget: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = pause,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        super().__init__(inner)
        self.max_attempts = max_attempts
        self.budget = budget
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._upload_writes: dict[str, str] = {}

    def __reduce__(self) -> tuple[Callable[..., RetryBackend], tuple[Backend, int, float]]:
        return _rebuild, (self.inner, self.max_attempts, self.budget)

    def around(self, op: Op, key: str, size: int, run: Callable[[], T]) -> T:
        """Do it until it works, or trying again cannot help."""
        return self._tries(op, key, run)

    def _tries(
        self, op: Op, key: str, run: Callable[[], T], settle: Callable[[S3LoaderError, bool], T | None] | None = None
    ) -> T:
        """Run `run` as often as needed.

        Args:
            settle: Is asked about each failure, and told whether it is the last: what it returns is
                the result after all (None: it is a failure), what it raises ends the matter.
        """
        round_ = _Round(self, op, key)
        earlier = take_failure()
        try:
            while True:
                try:
                    if earlier is not None:
                        failure, earlier = earlier, None
                        raise failure
                    return run()
                except S3LoaderError as error:
                    last = round_.is_last(error)
                    if settle is not None and (settled := settle(error, last)) is not None:
                        return settled
                    if last:
                        raise
                    round_.wait(error)
        finally:
            round_.end()

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """See `Backend.get`. A body of another length than the object's size says is not believed."""

        def run() -> tuple[ObjectMeta, Buffer]:
            meta, data = self.inner.get(key, start, end, if_match=if_match, version_id=version_id)
            expected = (meta.size if end is None or end > meta.size else end) - start
            if len(data) != expected and expected > 0:
                raise TruncatedError(f"{len(data)} bytes came, not {expected}", op="get", url=f"{self.url}/{key}")
            return meta, data

        return self._tries("get", key, run)

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        """See `Backend.put`. A conditional one carries a `WRITE_ID`, and is settled by it."""
        settle = None
        if mode != "overwrite":
            metadata, write_id = _with_write_id(metadata)
            settle = Settler(self, "put", key, write_id, mode)
        return self._tries(
            "put",
            key,
            lambda: self.inner.put(key, data, mode=mode, content_type=content_type, metadata=metadata),
            settle,
        )

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """See `Backend.copy`."""
        settle = Settler(self, "copy", target, None, mode) if mode != "overwrite" else None
        return self._tries("copy", source, lambda: self.inner.copy(source, target, mode=mode), settle)

    def create_multipart(self, key: str, *, content_type: str | None = None, metadata: Mapping[str, str] | None = None) -> str:
        """See `Backend.create_multipart`. The object will carry a `WRITE_ID`."""
        metadata, write_id = _with_write_id(metadata)
        upload_id = super().create_multipart(key, content_type=content_type, metadata=metadata)
        self._upload_writes[upload_id] = write_id
        return upload_id

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """See `Backend.complete_multipart`. An upload that is gone after a lost answer may have been completed."""
        settle = Settler(self, "complete upload", key, self._upload_writes.get(upload_id), mode)
        result = self._tries(
            "complete upload", key, lambda: self.inner.complete_multipart(key, upload_id, parts, mode=mode), settle
        )
        self._upload_writes.pop(upload_id, None)
        return result

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """See `Backend.abort_multipart`."""
        self._upload_writes.pop(upload_id, None)
        super().abort_multipart(key, upload_id)

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """See `Backend.delete_many`. Keys that failed for a passing reason are tried again."""
        round_ = _Round(self, "delete many", keys[0] if keys else "")
        failures: builtins.list[DeleteFailure] = []
        try:
            while True:
                now = self._tries("delete many", keys[0] if keys else "", functools.partial(self.inner.delete_many, keys))
                passing = [f for f in now if isinstance(f.error, S3LoaderError) and may_retry(f.error)]
                failures += [f for f in now if f not in passing]
                if not passing:
                    return failures
                error = passing[0].error
                assert isinstance(error, S3LoaderError)
                if round_.is_last(error):
                    return failures + passing
                keys = [failure.key for failure in passing]
                round_.wait(error)
        finally:
            round_.end()

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """See `Backend.list`. After a failure it goes on behind the last entry given."""
        last = ""
        round_ = _Round(self, "list", prefix)
        try:
            while True:
                try:
                    for entry in self.inner.list(prefix, delimiter=delimiter, start_after=last or start_after):
                        if entry.key == last:  # a common prefix appears again while keys in it are left
                            continue
                        last = entry.key
                        if round_.attempt > 1:
                            round_.end()
                            round_ = _Round(self, "list", prefix)
                        yield entry
                    return
                except S3LoaderError as error:
                    if round_.is_last(error):
                        raise
                    round_.wait(error)
        finally:
            round_.end()


class _Round:
    """The tries of one request: how many, since when, and whether another one may follow."""

    __slots__ = ("attempt", "key", "op", "outer", "policy", "start")

    def __init__(self, policy: RetryBackend, op: Op, key: str) -> None:
        self.policy = policy
        self.op = op
        self.key = key
        self.attempt = 1
        self.outer = 0
        self.start = policy._clock()

    def is_last(self, error: S3LoaderError) -> bool:
        """Note the attempt in `error`; whether there is no further one."""
        error.attempts = max(error.attempts, self.attempt)
        policy = self.policy
        return not may_retry(error) or self.attempt >= policy.max_attempts or policy._clock() - self.start >= policy.budget

    def wait(self, error: S3LoaderError) -> None:
        """Until the next attempt."""
        policy = self.policy
        left = policy.budget - (policy._clock() - self.start)
        delay = policy._jitter(0.0, min(_CAP, _BASE * 2.0**self.attempt))
        asked = error.details.get("retry_after")
        if isinstance(asked, (int, float)):
            delay = max(delay, float(asked))
        begin = events.now()
        policy._sleep(max(0.0, min(delay, left)))
        if not self.outer:
            self.outer = current_attempt()
        self.attempt += 1
        set_attempt(self.attempt)
        if events.active():
            events.emit(
                events.OpEvent(
                    "RETRY",
                    f"{policy.url}/{self.key}",
                    0,
                    begin,
                    events.now(),
                    engine=policy.engine,
                    attempt=self.attempt,
                    status=error.status,
                    error=f"{type(error).__name__}: {error.message}",
                )
            )

    def end(self) -> None:
        """Leave the thread as it was."""
        if self.outer:
            set_attempt(self.outer)


def may_retry(error: S3LoaderError) -> bool:
    """Whether the same request may succeed if it is sent again."""
    return (error.retryable or isinstance(error, TruncatedError)) and not isinstance(error, ClosedError)


def _with_write_id(metadata: Mapping[str, str] | None) -> tuple[dict[str, str], str]:
    carried = dict(metadata or {})
    return carried, carried.setdefault(WRITE_ID, os.urandom(16).hex())


def _rebuild(inner: Backend, max_attempts: int, budget: float) -> RetryBackend:
    return RetryBackend(inner, max_attempts=max_attempts, budget=budget)
