"""Each request that a boto3 client sends, told to `events`: botocore's own repetitions and look-ups of a bucket's region too.

botocore has events around a request. What is registered there (once for a client, on a client of the user's too) does something
only while a `Watch` is open in the thread that sends.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

from s3loader.errors import S3LoaderError
from s3loader.events import now
from s3loader.store.client_errors import from_botocore
from s3loader.store.s3errors import Where
from s3loader.store.told import Request

__all__ = ["Watch"]

_ID: Final = "s3loader-watch"
_BUCKETS: Final = {"HeadBucket": "HEAD", "GetBucketLocation": "HEAD"}
"""What botocore asks by itself to find a bucket, as `events` names it."""


class Watch:
    """``with Watch(client, ...):`` around one call of `client`; then `end`.

    The event of the last request waits for `end`: a body may be read after the call.

    Args:
        client: A boto3 client.
        where: What is asked, for errors.
        name: As `events.OpEvent.op`.
        url: What the event says that it concerns.
        offset: Of a read: its first byte.
    """

    __slots__ = ("_before", "_began", "_failed", "_name", "_offset", "_repeated", "_request", "_url", "_where")

    def __init__(self, client: Any, where: Where, name: str, url: str, offset: int | None = None) -> None:
        self._name, self._url, self._where, self._offset = name, url, where, offset
        self._began = now()
        self._request: Request | None = None
        self._failed: S3LoaderError | None = None
        self._repeated = 0
        self._before: Watch | None = None
        emitter: Any = getattr(getattr(client, "meta", None), "events", None)
        if emitter is not None:
            for event, handler in _HANDLERS:
                emitter.register(f"{event}.s3", handler, unique_id=f"{_ID}-{event}")

    def __enter__(self) -> Watch:
        self._before, _here.watch = _here.watch, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _here.watch = self._before

    def sending(self, operation: str, url: str) -> None:
        """A request is sent now; the one before it is over."""
        self._finish(0, self._failed, 1)
        parts = urlsplit(url)
        endpoint = f"{parts.scheme}://{parts.netloc}"
        if operation in _BUCKETS:
            self._request = Request(_BUCKETS[operation], self._url, "boto3", endpoint=endpoint)
            return
        self._request = Request(self._name, self._url, "boto3", self._offset, endpoint)
        self._request.attempt += self._repeated
        self._repeated += 1

    def answering(self, status: int) -> None:
        """Its answer is there, and will be parsed."""
        if self._request is not None:
            self._request.answered(status)

    def answered(self, answer: Any, error: Exception | None) -> None:
        """What became of it, as far as botocore knows."""
        from botocore.exceptions import ClientError

        if error is None and self._request is not None and (self._request.status or 0) >= 300:
            error = ClientError(answer or {}, self._name)
        self._failed = None if error is None else from_botocore(error, self._where)

    def end(
        self, size: int = 0, error: S3LoaderError | None = None, objects: int = 1, answer: Mapping[str, Any] | None = None
    ) -> None:
        """The call is over, and its body read.

        Args:
            size: Body bytes moved.
            error: What it failed with.
            objects: How many it concerns.
            answer: Of the client.
        """
        if self._request is None and (error is None or error.status is not None):  # a stub, or a client made by hand
            self._request = Request(self._name, self._url, "boto3", self._offset, start=self._began)
            self._request.status = ((answer or {}).get("ResponseMetadata") or {}).get("HTTPStatusCode")
        self._finish(size, error, objects)

    def _finish(self, size: int, error: S3LoaderError | None, objects: int) -> None:
        request, self._request, self._failed = self._request, None, None
        if request is not None:
            request.end(size, error, objects)


class _Here(threading.local):
    watch: Watch | None = None


_here = _Here()


def _sending(event_name: str = "", request: Any = None, **_: Any) -> None:
    if _here.watch is not None:
        _here.watch.sending(event_name.rpartition(".")[2], request.url)


def _answering(response_dict: Any = None, **_: Any) -> None:
    if _here.watch is not None:
        _here.watch.answering(response_dict["status_code"])


def _answered(parsed_response: Any = None, exception: Exception | None = None, **_: Any) -> None:
    if _here.watch is not None:
        _here.watch.answered(parsed_response, exception)


_HANDLERS: Final = (("before-send", _sending), ("before-parse", _answering), ("response-received", _answered))
