"""The bulk verbs of `ObjectStore`, with their types distinguished by `errors`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypedDict, Unpack, overload

from s3loader.options import at_least, one_of
from s3loader.store.arguments import check_several
from s3loader.store.backend import Backend, Driver, ReadResult
from s3loader.store.bulk import BulkOptions, OnError, PutFailure, ReadFailure, put_many, read_many
from s3loader.store.options import MOST_CONNECTIONS, MOST_THREADS, StoreOptions
from s3loader.types import PutRequest, PutResult, ReadRequest
from s3loader.units import parse_size

__all__ = ["BulkKeywords", "BulkVerbs"]


class BulkKeywords(TypedDict, total=False):
    """How a bulk call is made."""

    max_bytes: int | str
    """Most bytes fetched or being fetched and not yet taken, or taken from the requests and not yet written (one request may
    be larger); default 128 MiB."""
    concurrency: int | None
    """Requests at a time; default `StoreOptions.concurrency`."""
    driver: Driver
    """Who turns the sockets: ``"pump"``, the calling thread itself (epoll, no handoff); ``"threads"``, background threads, for
    reads beside a busy main thread; default ``"auto"``: the pump, but threads for large reads into the caller's memory."""


class BulkVerbs(ABC):
    """`read_many`, `get_many` and `put_many` over a backend."""

    options: StoreOptions

    @property
    @abstractmethod
    def backend(self) -> Backend:
        """The outermost backend."""

    @overload
    def read_many(
        self, requests: Iterable[ReadRequest], *, errors: Literal["raise"] = ..., **options: Unpack[BulkKeywords]
    ) -> Iterator[ReadResult]: ...
    @overload
    def read_many(
        self, requests: Iterable[ReadRequest], *, errors: Literal["return"], **options: Unpack[BulkKeywords]
    ) -> Iterator[ReadResult | ReadFailure]: ...
    def read_many(
        self, requests: Iterable[ReadRequest], *, errors: OnError = "raise", **options: Unpack[BulkKeywords]
    ) -> Iterator[Any]:
        """Many reads, several at a time, answers in the order of `requests`.

        Args:
            requests: Taken as they are needed, in the calling thread.
            options: The fields of `BulkKeywords`: `max_bytes` in flight, `concurrency`, `driver`.
            errors: ``"raise"`` raises an error at the position of its request and ends; ``"return"``
                gives a `ReadFailure` there and goes on.

        Yields:
            `ReadResult`; its `data` stays valid as long as a view of it lives.
        """
        check_several(requests, "ReadRequest")
        return read_many(self.backend, requests, **self._bulk_options(errors, **options))

    @overload
    def get_many(
        self, keys: Iterable[str], *, errors: Literal["raise"] = ..., **options: Unpack[BulkKeywords]
    ) -> Iterator[ReadResult]: ...
    @overload
    def get_many(
        self, keys: Iterable[str], *, errors: Literal["return"], **options: Unpack[BulkKeywords]
    ) -> Iterator[ReadResult | ReadFailure]: ...
    def get_many(self, keys: Iterable[str], *, errors: OnError = "raise", **options: Unpack[BulkKeywords]) -> Iterator[Any]:
        """Many whole objects; as `read_many` with one request per key."""
        check_several(keys, "key")
        return read_many(self.backend, map(ReadRequest, keys), **self._bulk_options(errors, **options))

    @overload
    def put_many(
        self, requests: Iterable[PutRequest], *, errors: Literal["raise"] = ..., **options: Unpack[BulkKeywords]
    ) -> Iterator[PutResult]: ...
    @overload
    def put_many(
        self, requests: Iterable[PutRequest], *, errors: Literal["return"], **options: Unpack[BulkKeywords]
    ) -> Iterator[PutResult | PutFailure]: ...
    def put_many(
        self, requests: Iterable[PutRequest], *, errors: OnError = "raise", **options: Unpack[BulkKeywords]
    ) -> Iterator[Any]:
        """Many writes, several at a time, results in the order of `requests`. Runs as the iterator is consumed.

        Args and errors as in `read_many`, with `PutFailure`.
        """
        check_several(requests, "PutRequest")
        return put_many(self.backend, requests, **self._bulk_options(errors, **options))

    def _bulk_options(
        self,
        errors: OnError,
        max_bytes: int | str = "128MiB",
        concurrency: int | None = None,
        driver: Driver = "auto",
    ) -> BulkOptions:
        if concurrency is None:
            found = getattr(self.backend, "bulk", None)
            concurrency = self.options.concurrency or (MOST_THREADS if found is None else MOST_CONNECTIONS)
        at_least("concurrency", concurrency, hint="leave it out for that of StoreOptions")
        one_of("driver", driver, Driver)
        one_of("errors", errors, OnError, '"return" gives a failure in its place and goes on')
        return {"max_bytes": parse_size(max_bytes, "max_bytes"), "concurrency": concurrency, "driver": driver, "errors": errors}
