"""The bulk verbs of `ObjectStore`, with their types told apart by `errors`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, overload

from s3loader.errors import ConfigError
from s3loader.store.arguments import check_several
from s3loader.store.base import Backend, Driver, ReadResult
from s3loader.store.bulk import BulkOptions, OnError, PutFailure, ReadFailure, put_many, read_many
from s3loader.store.options import StoreOptions
from s3loader.types import PutRequest, PutResult, ReadRequest
from s3loader.units import parse_size

__all__ = ["BulkVerbs"]


class BulkVerbs(ABC):
    """`read_many`, `get_many` and `put_many` over a backend."""

    options: StoreOptions

    @property
    @abstractmethod
    def backend(self) -> Backend:
        """The outermost backend."""

    @overload
    def read_many(
        self,
        requests: Iterable[ReadRequest],
        *,
        max_bytes: int | str = ...,
        concurrency: int | None = ...,
        driver: Driver = ...,
        errors: Literal["raise"] = ...,
    ) -> Iterator[ReadResult]: ...
    @overload
    def read_many(
        self,
        requests: Iterable[ReadRequest],
        *,
        max_bytes: int | str = ...,
        concurrency: int | None = ...,
        driver: Driver = ...,
        errors: Literal["return"],
    ) -> Iterator[ReadResult | ReadFailure]: ...
    def read_many(
        self,
        requests: Iterable[ReadRequest],
        *,
        max_bytes: int | str = "64MiB",
        concurrency: int | None = None,
        driver: Driver = "auto",
        errors: OnError = "raise",
    ) -> Iterator[Any]:
        """Many reads, several at a time, answers in the order of `requests`.

        Args:
            requests: Taken as they are needed, in the calling thread.
            max_bytes: Most bytes fetched or being fetched and not yet taken (one request may be larger).
            concurrency: Requests at a time; default `StoreOptions.concurrency`.
            driver: See `Driver`.
            errors: ``"raise"`` raises an error at the position of its request and ends; ``"return"``
                gives a `ReadFailure` there and goes on.

        Yields:
            `ReadResult`; its `data` stays valid as long as a view of it lives.
        """
        check_several(requests, "ReadRequest")
        return read_many(self.backend, requests, **self._bulk_options(max_bytes, concurrency, driver, errors))

    @overload
    def get_many(
        self,
        keys: Iterable[str],
        *,
        max_bytes: int | str = ...,
        concurrency: int | None = ...,
        driver: Driver = ...,
        errors: Literal["raise"] = ...,
    ) -> Iterator[ReadResult]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[str],
        *,
        max_bytes: int | str = ...,
        concurrency: int | None = ...,
        driver: Driver = ...,
        errors: Literal["return"],
    ) -> Iterator[ReadResult | ReadFailure]: ...
    def get_many(
        self,
        keys: Iterable[str],
        *,
        max_bytes: int | str = "64MiB",
        concurrency: int | None = None,
        driver: Driver = "auto",
        errors: OnError = "raise",
    ) -> Iterator[Any]:
        """Many whole objects; as `read_many` with one request per key."""
        check_several(keys, "key")
        return read_many(self.backend, map(ReadRequest, keys), **self._bulk_options(max_bytes, concurrency, driver, errors))

    @overload
    def put_many(
        self,
        requests: Iterable[PutRequest],
        *,
        max_bytes: int | str = ...,
        concurrency: int | None = ...,
        driver: Driver = ...,
        errors: Literal["raise"] = ...,
    ) -> Iterator[PutResult]: ...
    @overload
    def put_many(
        self,
        requests: Iterable[PutRequest],
        *,
        max_bytes: int | str = ...,
        concurrency: int | None = ...,
        driver: Driver = ...,
        errors: Literal["return"],
    ) -> Iterator[PutResult | PutFailure]: ...
    def put_many(
        self,
        requests: Iterable[PutRequest],
        *,
        max_bytes: int | str = "64MiB",
        concurrency: int | None = None,
        driver: Driver = "auto",
        errors: OnError = "raise",
    ) -> Iterator[Any]:
        """Many writes, several at a time, results in the order of `requests`. Runs as the iterator is consumed.

        Args and errors as in `read_many`, with `PutFailure`; `max_bytes` counts data taken from
        `requests` and not yet written.
        """
        check_several(requests, "PutRequest")
        return put_many(self.backend, requests, **self._bulk_options(max_bytes, concurrency, driver, errors))

    def _bulk_options(self, max_bytes: int | str, concurrency: int | None, driver: Driver, errors: OnError) -> BulkOptions:
        if concurrency is None:
            concurrency = self.options.concurrency
        if not isinstance(concurrency, int) or concurrency < 1:
            raise ConfigError(f"concurrency must be a whole number from 1 up, not {concurrency!r}")
        if driver not in get_args(Driver):
            raise ConfigError(f"unknown driver {driver!r}", hint=f"use one of {', '.join(get_args(Driver))}")
        if errors not in get_args(OnError):
            raise ConfigError(f"errors is 'raise' or 'return', not {errors!r}")
        return {"max_bytes": parse_size(max_bytes), "concurrency": concurrency, "driver": driver, "errors": errors}
