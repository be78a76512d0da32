"""Uploads in the background: a few at a time, a bounded number of bytes waiting, no error lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from s3loader.errors import ClosedError
from s3loader.store.threads import Crew

__all__ = ["UploadPool"]

T = TypeVar("T")
MAX_BYTES: Final = 64 << 20


class UploadPool:
    """Runs jobs in up to `max_in_flight` threads, in the order given.

    `submit` waits while more than `max_bytes` are in jobs that have not ended. After the first failure
    `submit` and `check` raise it, every time: what failed is not in what the caller is about to publish.

    A job may wait for jobs submitted before it (they have begun by then), not for later ones.
    """

    def __init__(self, max_in_flight: int = 8, max_bytes: int = MAX_BYTES) -> None:
        self.max_in_flight = max_in_flight
        self._max_bytes = max_bytes
        self._bytes = 0
        self._jobs = 0
        self._changed = threading.Condition()
        self._crew: Crew | None = None
        self._futures: set[Future[Any]] = set()
        self._pid = os.getpid()
        self.error: BaseException | None = None
        """The first failure of any job."""

    def check(self) -> None:
        """Raise the first failure.

        Raises:
            ClosedError: this is a forked child of the process the pool was made in.
        """
        if self._pid != os.getpid():
            raise ClosedError(
                "made in the parent process; its uploads go on there", hint="open a writer in the process that writes"
            )
        if self.error is not None:
            raise self.error

    def submit(self, job: Callable[[], T], size: int = 0) -> Future[T]:
        """Run `job`, which holds `size` bytes; its result or error is the future's."""
        self.check()
        with self._changed:
            self._changed.wait_for(lambda: self._room(size) or self.error is not None)
            if self.error is None:
                self._bytes += size
                self._jobs += 1
        self.check()
        if self._crew is None:
            self._crew = Crew(self.max_in_flight, "s3loader-exchange")
        future: Future[T] = Future()
        self._futures.add(future)

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - raised by the caller's next call, and by the future
                with self._changed:
                    self.error = self.error or error
                future.set_exception(error)
            finally:
                self._futures.discard(future)
                with self._changed:
                    self._bytes -= size
                    self._jobs -= 1
                    self._changed.notify_all()

        self._crew.submit(run)
        return future

    def _room(self, size: int) -> bool:
        return self._jobs == 0 or (self._bytes + size <= self._max_bytes and self._jobs < 4 * self.max_in_flight)

    def stop(self) -> None:
        """End the threads; jobs that have not begun are dropped, their futures cancelled."""
        if self._pid != os.getpid():
            return
        for future in list(self._futures):
            future.cancel()
        if self._crew is not None:
            self._crew.stop()
            self._crew = None

    def __getstate__(self) -> Any:
        raise TypeError("uploads in progress cannot be pickled")
