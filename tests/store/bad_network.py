"""What the tests behind a fault proxy need: ways to read, and a call that may not hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from s3loader.errors import (
    StoreConnectionError,
    StoreTimeoutError,
    TruncatedError,
)
from s3loader.store import ObjectStore
from s3loader.testing import FaultProxy

ENGINES = ("direct", "boto3")


IMPATIENT = {"max_attempts": 2, "read_timeout": 0.2, "retry_budget": 5}


PART = 5 * 2**20


DATA = bytes(range(256)) * 400  # 100 KiB


SILENCE = (StoreTimeoutError, StoreConnectionError, TruncatedError)


Open = Callable[..., tuple[ObjectStore, FaultProxy, ObjectStore]]


def in_time(call: Callable[[], Any], seconds: float = 600.0) -> Any:
    """What `call` returns, or raises; a failure when it hangs."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((call(), None))
        except BaseException as error:  # noqa: BLE001  raised below
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "it hangs"
    value, error = result[0]
    if error is not None:
        raise error
    return value


def read_into(store: ObjectStore) -> bytes:
    buffer = bytearray(len(DATA))
    store.read_into("k", 0, buffer)
    return bytes(buffer)


def read_file(store: ObjectStore) -> bytes:
    with store.open("k") as file:
        return bytes(file.read())


def read_many(driver: Any) -> Callable[[ObjectStore], bytes]:
    return lambda store: bytes(next(iter(store.get_many(["k"], driver=driver))).data)


WHOLE: dict[str, Callable[[ObjectStore], bytes]] = {
    "get": lambda store: store.get("k"),
    "pump": read_many("pump"),
    "threads": read_many("threads"),
}


RANGED: dict[str, Callable[[ObjectStore], bytes]] = {
    "get_range": lambda store: store.get_range("k", 0, len(DATA)),
    "get_ranges": lambda store: bytes(store.get_ranges("k", [(0, len(DATA))])[0]),
    "read_into": read_into,
}


READS = {**WHOLE, **RANGED, "open": read_file}


OTHERS: dict[str, Callable[[ObjectStore], Any]] = {
    "put": lambda store: store.put("k", b"x"),
    "list": lambda store: list(store.list()),
}
