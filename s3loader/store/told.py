"""Requests as `events` tells of them: their names there, and what is known of one while it is under way.

An engine that sends several requests for one verb (boto3, obstore) tells of each itself; around the others (files, memory) the
pipeline tells of the verb. What only the engine sees of such a verb, it notes for its thread: `first_byte_came`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

from s3loader import events
from s3loader.errors import S3LoaderError
from s3loader.store.backend import Op
from s3loader.store.retry import current_attempt

__all__ = ["NAMES", "Request", "first_byte_came", "take_first_byte"]

NAMES: Final[dict[Op, str]] = {
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
    "tags": "HEAD",
}
"""What `events` calls the request of a verb."""


@dataclass(slots=True)
class Request:
    """One request under way. Made when it is sent; `end` tells of it."""

    name: str
    """As `events.OpEvent.op`."""
    url: str
    engine: str
    offset: int | None = None
    endpoint: str = ""
    attempt: int = field(default_factory=current_attempt)
    start: float = field(default_factory=events.now)
    first_byte: float | None = None
    """When the first byte of the answer was there; None: nobody knows, or there was none."""
    status: int | None = None

    def answered(self, status: int | None = None) -> None:
        """The first byte of its answer is there."""
        self.first_byte, self.status = events.now(), status

    def end(self, size: int = 0, error: S3LoaderError | None = None, objects: int = 1) -> None:
        """Tell of it.

        Args:
            size: Body bytes moved.
            error: What it failed with.
            objects: How many it concerns.
        """
        events.emit(
            events.OpEvent(
                self.name,
                self.url,
                size if error is None else 0,
                self.start,
                events.now(),
                self.first_byte,
                engine=self.engine,
                attempt=self.attempt,
                status=error.status if self.status is None and error is not None else self.status,
                error=None if error is None else f"{type(error).__name__}: {error.message}",
                objects=objects,
                offset=self.offset,
                endpoint=self.endpoint,
            )
        )


class _Noted(threading.local):
    first_byte: float | None = None
    status: int | None = None


_noted = _Noted()


def first_byte_came(at: float | None = None, status: int | None = None) -> None:
    """Note, for whoever tells of this thread's verb, that the first byte of what is read is there.

    Args:
        at: When it came; default: now.
        status: Of the HTTP answer; None: it is none, or nobody knows.
    """
    _noted.first_byte, _noted.status = events.now() if at is None else at, status


def take_first_byte() -> tuple[float | None, int | None]:
    """What `first_byte_came` has noted since this was called last: the time and the status."""
    found = _noted.first_byte, _noted.status
    _noted.first_byte = _noted.status = None
    return found
