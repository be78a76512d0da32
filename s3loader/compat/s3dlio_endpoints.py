"""s3dlio's `MultiEndpointStore`: one set of objects that several endpoints serve."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from s3loader.errors import ConfigError, S3LoaderError
from s3loader.toolbox import many, single
from s3loader.types import ObjectURL

__all__ = [
    "MultiEndpointStore",
    "create_multi_endpoint_store",
    "create_multi_endpoint_store_from_env",
    "create_multi_endpoint_store_from_file",
    "create_multi_endpoint_store_from_template",
    "expand_template",
]

T = TypeVar("T")

_AT: Final = re.compile(r"s3://((?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):\d+)/(.+)")
"""``s3://host:port/bucket/prefix``."""
_RANGE: Final = re.compile(r"\{(\d+)\.\.\.?(\d+)\}")
_REST: Final = 30.0
"""For so many seconds an endpoint that could not answer is left out."""
_STRATEGIES: Final = ("round_robin", "least_connections")


class _Endpoint:
    def __init__(self, uri: str) -> None:
        found = _AT.fullmatch(uri)
        self.root = f"s3://{found[2]}" if found else uri
        self.root = str(ObjectURL.parse(self.root)).removesuffix("/")
        self.given = uri.removesuffix("/")
        self.place: dict[str, Any] = {"endpoint_url": f"http://{found[1]}"} if found else {}
        self.busy = 0
        self.resting_until = 0.0
        self.stats = {"requests": 0, "errors": 0, "bytes_read": 0, "bytes_written": 0}


class MultiEndpointStore:
    """Spreads requests over endpoints that hold the same objects; a URI may begin with the root of any of them.

    What reads (`get`, `get_range`, `list`) goes on to the next endpoint where one cannot answer for now, and leaves that
    one out for half a minute. What writes goes to one endpoint and raises what it raises.

    Args:
        uris: Roots: ``s3://bucket/prefix``, or ``s3://host:port/bucket/prefix`` for a server of its own, or folders.
        strategy: ``round_robin`` or ``least_connections``.
    """

    def __init__(self, uris: Iterable[str], strategy: str | None = None) -> None:
        self._endpoints = [_Endpoint(uri) for uri in uris]
        self._strategy = (strategy or "round_robin").lower()
        if not self._endpoints:
            raise ConfigError("no endpoints", hint="give at least one URI")
        if self._strategy not in _STRATEGIES:
            raise ConfigError(f"unknown strategy {strategy!r}", hint=f"use one of {', '.join(_STRATEGIES)}")
        self._turn = itertools.count()
        self._lock = threading.Lock()

    def endpoint_count(self) -> int:
        """How many there are."""
        return len(self._endpoints)

    def strategy(self) -> str:
        """How one is chosen."""
        return self._strategy

    def get(self, uri: str) -> bytes:
        """The whole object."""
        return self._ask_any(uri, lambda url, place: single.get(url, **place), read=True)

    def get_range(self, uri: str, offset: int, length: int | None = None) -> bytes:
        """Some bytes of an object."""
        return self._ask_any(uri, lambda url, place: single.get_range(url, offset, length, **place), read=True)

    def get_from_endpoint(self, index: int, uri: str) -> bytes:
        """The whole object, from one of them."""
        return self._ask(self._endpoints[index], uri, lambda url, place: single.get(url, **place), read=True)

    def put(self, uri: str, data: Any, *, borrow: bool = True) -> None:
        """Write one object, by one of them."""
        del borrow
        self._put(self._next(), uri, data)

    def put_to_endpoint(self, index: int, uri: str, data: Any, *, borrow: bool = True) -> None:
        """Write one object, by this one."""
        del borrow
        self._put(self._endpoints[index], uri, data)

    def put_all_endpoints(self, uri: str, data: Any, *, borrow: bool = True) -> None:
        """Write one object by each of them."""
        del borrow
        for endpoint in self._endpoints:
            self._put(endpoint, uri, data)

    def delete(self, uri: str) -> None:
        """Delete one object, by one of them."""
        self._ask(self._next(), uri, lambda url, place: many.delete(url, missing_ok=True, **place))

    def delete_from_endpoint(self, index: int, uri: str) -> None:
        """Delete one object, by this one."""
        self._ask(self._endpoints[index], uri, lambda url, place: many.delete(url, missing_ok=True, **place))

    def list(self, prefix: str, recursive: bool) -> list[str]:
        """URIs below `prefix`, as one of them tells."""
        return self._ask_any(prefix, lambda url, place: many.list(url, recursive, **place))

    def list_all_endpoints(self, prefix: str, recursive: bool) -> list[list[str]]:  # type: ignore[valid-type]
        """URIs below `prefix`, as each of them tells."""
        return [self._ask(one, prefix, lambda url, place: many.list(url, recursive, **place)) for one in self._endpoints]

    def get_endpoint_stats(self) -> list[dict[str, Any]]:  # type: ignore[valid-type]
        """Requests, errors and bytes of each."""
        return [{"uri": one.given, **one.stats} for one in self._endpoints]

    def get_total_stats(self) -> dict[str, int]:
        """Requests, errors and bytes of all."""
        return {name: sum(one.stats[name] for one in self._endpoints) for name in self._endpoints[0].stats}

    def _put(self, endpoint: _Endpoint, uri: str, data: Any) -> None:
        made = self._ask(endpoint, uri, lambda url, place: single.put_bytes(url, data, **place))
        with self._lock:
            endpoint.stats["bytes_written"] += made.size

    def _next(self, tried: Sequence[_Endpoint] = ()) -> _Endpoint:
        """The endpoint whose turn it is, of those not `tried`; one that rests only where all do."""
        now = time.monotonic()
        left = [one for one in self._endpoints if one not in tried]
        left = [one for one in left if one.resting_until <= now] or left
        turn = next(self._turn) % len(left)
        if self._strategy == "round_robin":
            return left[turn]
        with self._lock:
            return min(left[turn:] + left[:turn], key=lambda one: one.busy)

    def _ask_any(self, uri: str, call: Callable[[str, dict[str, Any]], T], read: bool = False) -> T:
        """Ask one endpoint after the other until one answers; an answer is also that there is no such object."""
        tried: list[_Endpoint] = []
        while True:
            endpoint = self._next(tried)
            try:
                return self._ask(endpoint, uri, call, read)
            except S3LoaderError as error:
                tried.append(endpoint)
                if not error.retryable or len(tried) == len(self._endpoints):
                    raise
                endpoint.resting_until = time.monotonic() + _REST

    def _ask(self, endpoint: _Endpoint, uri: str, call: Callable[[str, dict[str, Any]], T], read: bool = False) -> T:
        url = endpoint.root + self._below(uri)
        with self._lock:
            endpoint.busy += 1
            endpoint.stats["requests"] += 1
        try:
            found = call(url, endpoint.place)
        except S3LoaderError:
            with self._lock:
                endpoint.stats["errors"] += 1
            raise
        finally:
            with self._lock:
                endpoint.busy -= 1
        if read:
            with self._lock:
                endpoint.stats["bytes_read"] += len(found)  # type: ignore[arg-type]  # bytes
        return found

    def _below(self, uri: str) -> str:
        for endpoint in self._endpoints:
            for root in (endpoint.given, endpoint.root):
                if uri == root or uri.startswith(f"{root}/"):
                    return uri[len(root) :]
        if "://" in uri:
            known = ", ".join(one.given for one in self._endpoints)
            raise ConfigError(f"{uri} lies below none of the endpoints", hint=f"they are {known}")
        return f"/{uri.removeprefix('/')}"


def create_multi_endpoint_store(uris: Iterable[str], strategy: str | None = None) -> MultiEndpointStore:
    """A store of these roots."""
    return MultiEndpointStore(uris, strategy)


def create_multi_endpoint_store_from_template(uri_template: str, strategy: str | None = None) -> MultiEndpointStore:
    """A store of the roots of a template: ``s3://host{1...4}:9000/bucket/``."""
    return MultiEndpointStore(expand_template(uri_template), strategy)


def expand_template(uri_template: str) -> list[str]:
    """The URIs that a template stands for: ``s3://host{1...4}:9000/bucket/`` for four.

    Raises:
        ConfigError: there is no range in it, or one that ends before it begins.
    """
    found = _RANGE.search(uri_template)
    if found is None:
        raise ConfigError(f"no range in {uri_template!r}", hint="such as {1...4}")
    width = len(found[1]) if found[1].startswith("0") else 0
    numbers = range(int(found[1]), int(found[2]) + 1)
    if not numbers:
        raise ConfigError(f"the range in {uri_template!r} is empty", hint="the smaller number comes first")
    return [f"{uri_template[: found.start()]}{number:0{width}d}{uri_template[found.end() :]}" for number in numbers]


def create_multi_endpoint_store_from_file(file_path: str, strategy: str | None = None) -> MultiEndpointStore:
    """A store of the roots in a file, one a line; empty lines and those that begin with # are passed over."""
    try:
        with open(file_path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file_path}: {error}", hint="a text file with one URI a line") from error
    return MultiEndpointStore([line for line in lines if line and not line.startswith("#")], strategy)


def create_multi_endpoint_store_from_env(strategy: str | None = None) -> MultiEndpointStore:
    """A store of the roots in ``S3_ENDPOINT_URIS``, with commas between them."""
    return MultiEndpointStore(
        [uri.strip() for uri in os.environ.get("S3_ENDPOINT_URIS", "").split(",") if uri.strip()], strategy
    )
