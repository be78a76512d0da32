"""One event per attempt at a request: what `s3loader.events` subscribers see of a store."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from s3loader import events
from s3loader.errors import S3LoaderError
from s3loader.store.threads import current_attempt
from s3loader.store.wrappers.wrapper import Interceptor, Op
from s3loader.types import CommonPrefix, DeleteFailure, ObjectMeta

__all__ = ["ObservedBackend"]

T = TypeVar("T")

_NAMES: Final[dict[Op, str]] = {
    "get": "GET",
    "read": "GET",
    "head": "HEAD",
    "put": "PUT",
    "list": "LIST",
    "delete": "DELETE",
    "delete many": "DELETE",
    "copy": "COPY",
    "create upload": "MULTIPART",
    "upload part": "PUTPART",
    "complete upload": "MULTIPART",
    "abort upload": "MULTIPART",
    "list uploads": "LIST",
    "list parts": "LIST",
}


class ObservedBackend(Interceptor):
    """Stands next to the engine. Costs one truth test while nobody listens.

    Bulk requests that an engine runs by itself are not seen here: such an engine emits their events.
    """

    LETS_BULK_PAST = True

    def around(self, op: Op, key: str, size: int, run: Callable[[], T]) -> T:
        """Do it, and tell how it went."""
        if not events.active():
            return run()
        start = events.now()
        try:
            result = run()
        except S3LoaderError as error:
            self._emit(op, key, 0, start, error)
            raise
        if op == "get":
            size = len(result[1])  # type: ignore[index]  # what get returns
        self._emit(op, key, size, start, None)
        return result

    def _emit(self, op: Op, key: str, size: int, start: float, error: S3LoaderError | None, objects: int = 1) -> None:
        events.emit(
            events.OpEvent(
                _NAMES[op],
                f"{self.url}/{key}",
                size,
                start,
                events.now(),
                engine=self.engine,
                attempt=current_attempt(),
                status=error.status if error else None,
                error=f"{type(error).__name__}: {error.message}" if error else None,
                objects=objects,
            )
        )

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """See `Backend.delete_many`. The event counts the keys; its error is the first failure's."""
        start = events.now()
        failed: Exception | None = None
        try:
            failures = self.inner.delete_many(keys)
            failed = failures[0].error if failures else None
        except S3LoaderError as error:
            failed = error
            raise
        finally:
            if events.active():
                told = failed if isinstance(failed, S3LoaderError) else None
                self._emit("delete many", keys[0] if keys else "", 0, start, told, len(keys))
        return failures

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """See `Backend.list`. The event comes at its end and counts the entries; the consumer's time is not in it."""
        entries = self.inner.list(prefix, delimiter=delimiter, start_after=start_after)
        return self._counted(entries, prefix) if events.active() else entries

    def _counted(self, entries: Iterator[Any], prefix: str) -> Iterator[Any]:
        start = events.now()
        waited = 0.0
        count = 0
        failed: S3LoaderError | None = None
        try:
            while True:
                asked = events.now()
                try:
                    entry = next(entries)
                except StopIteration:
                    return
                finally:
                    waited += events.now() - asked
                count += 1
                yield entry
        except S3LoaderError as error:
            failed = error
            raise
        finally:
            event_start = events.now() - waited if count else start
            self._emit("list", prefix, 0, event_start, failed, count)
