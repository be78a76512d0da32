"""Many reads or writes at once over any backend, results in order, a bounded number of bytes in hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

from s3loader.errors import S3LoaderError
from s3loader.store.base import Backend, Driver, ReadResult
from s3loader.types import PutRequest, PutResult, ReadRequest

__all__ = ["OnError", "PutFailure", "ReadFailure", "put_many", "read_many"]

OnError: TypeAlias = Literal["raise", "return"]


class ReadFailure(NamedTuple):
    """In place of a `ReadResult`: this request failed."""

    request: ReadRequest
    error: S3LoaderError


class PutFailure(NamedTuple):
    """In place of a `PutResult`: this request failed."""

    request: PutRequest
    error: S3LoaderError


def read_one(backend: Backend, request: ReadRequest) -> ReadResult:
    if request.into is not None:
        meta = backend.read_into(request.key, request.start, request.into, if_match=request.if_match)
        return ReadResult(request, request.into, meta.etag, meta.size)
    meta, data = backend.get(request.key, request.start, request.end, if_match=request.if_match)
    return ReadResult(request, memoryview(data), meta.etag, meta.size)


def read_many(
    backend: Backend, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver, errors: OnError
) -> Iterator[Any]:
    for request in requests:
        try:
            yield read_one(backend, request)
        except S3LoaderError as error:
            if errors == "raise":
                raise
            yield ReadFailure(request, error)


def put_many(
    backend: Backend, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver, errors: OnError
) -> Iterator[Any]:
    for request in requests:
        try:
            yield backend.put(request.key, request.data, mode=request.mode, content_type=request.content_type)
        except S3LoaderError as error:
            if errors == "raise":
                raise
            yield PutFailure(request, error)
