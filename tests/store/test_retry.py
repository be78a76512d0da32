"""Retries: which errors, when, how long."""

from __future__ import annotations

import itertools
import pickle
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retry_helpers import Clock, make

from s3loader import events
from s3loader.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreTimeoutError,
    ThrottledError,
    TruncatedError,
    UnavailableError,
)
from s3loader.store import MemoryBackend, ObjectStore, Pipeline, RetryPolicy
from s3loader.testing import Fault
from s3loader.types import DeleteFailure


@pytest.mark.parametrize("kind", ["unavailable", "throttled", "timeout", "refused", "reset", "drop_reply"])
def test_passing_errors_are_retried(kind: Any) -> None:
    store, memory, broken, clock = make(Fault(kind, times=3))
    memory.put("k", b"data")
    assert store.get("k") == b"data"
    assert len(broken.seen) == 4
    assert clock.slept == [0.2, 0.4, 0.8]


def test_other_errors_are_not() -> None:
    store, _, broken, clock = make()
    with pytest.raises(ObjectNotFoundError) as caught:
        store.get("missing")
    assert (len(broken.seen), clock.slept, caught.value.attempts) == (1, [], 1)


def test_attempts_end_and_are_told() -> None:
    store, memory, broken, _ = make(Fault("unavailable", times=None), max_attempts=4)
    memory.put("k", b"x")
    with pytest.raises(UnavailableError, match="4 attempts") as caught:
        store.get("k")
    assert caught.value.attempts == len(broken.seen) == 4
    assert pickle.loads(pickle.dumps(caught.value)).attempts == 4


def test_the_budget_ends_them_too() -> None:
    store, memory, _, clock = make(Fault("timeout", times=None), max_attempts=1000, budget=7.0)
    memory.put("k", b"x")
    with pytest.raises(StoreTimeoutError):
        store.head("k")
    assert sum(clock.slept) <= 7.0
    assert len(clock.slept) >= 4


def test_waits_are_jittered_and_capped() -> None:
    highs: list[float] = []

    def jitter(low: float, high: float) -> float:
        assert low == 0.0
        highs.append(high)
        return high / 2

    store, _, _, clock = make(Fault("unavailable", times=None), max_attempts=12, budget=1e9, jitter=jitter)
    with pytest.raises(UnavailableError):
        store.head("k")
    assert highs[:3] == [0.2, 0.4, 0.8]
    assert max(highs) == highs[-1] == 10.0
    assert clock.slept == [high / 2 for high in highs]


def test_what_the_server_asks_for_is_waited() -> None:
    store, memory, _, clock = make()
    memory.put("k", b"x")
    calls = itertools.count()

    class Asking(MemoryBackend):
        def head(self, key: str, *, version_id: str | None = None) -> Any:
            if next(calls) == 0:
                raise ThrottledError("slow down", retry_after=3.5)
            return super().head(key)

    inner = Asking(memory.name)
    store = ObjectStore("memory://", Pipeline(inner, retry=RetryPolicy(clock=clock, sleep=clock.sleep)))
    assert store.head("k").size == 1
    assert clock.slept == [3.5]


def test_retries_are_events() -> None:
    store, memory, _, _ = make(Fault("throttled", times=2))
    memory.put("k", b"x")
    seen: list[events.OpEvent] = []
    stop = events.subscribe(seen.append)
    try:
        store.get("k")
    finally:
        stop()
    retries = [event for event in seen if event.op == "RETRY"]
    assert [event.attempt for event in retries] == [2, 3]
    assert all(event.status == 503 and "ThrottledError" in (event.error or "") for event in retries)
    assert all(event.url.endswith("/k") for event in retries)


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_short_body_is_not_believed(size: int) -> None:
    store, memory, broken, _ = make(Fault("truncate", op="get", times=1))
    memory.put("k", b"x" * size)
    assert store.get("k") == b"x" * size
    assert len(broken.seen) == 2
    store, memory, broken, _ = make(Fault("truncate", op="get", times=None), max_attempts=3)
    memory.put("k", b"x" * size)
    with pytest.raises(TruncatedError):
        store.get("k")
    with pytest.raises(TruncatedError):
        store.get_range("k", 0, size)


def test_a_short_read_into_is_repeated() -> None:
    store, memory, _, _ = make(Fault("truncate", op="read", times=1))
    memory.put("k", bytes(range(200)))
    buffer = bytearray(100)
    store.read_into("k", 50, buffer)
    assert buffer == bytes(range(50, 150))


@settings(max_examples=40, deadline=None)
@given(
    keys=st.sets(st.text("ab/", min_size=1, max_size=5), min_size=1, max_size=20),
    prefix=st.text("ab/", max_size=2),
    delimiter=st.sampled_from(["", "/", "b"]),
    start_after=st.text("ab/", max_size=3),
)
def test_a_listing_that_breaks_goes_on(keys: set[str], prefix: str, delimiter: str, start_after: str) -> None:
    store, memory, _, _ = make(Fault("truncate", op="list", times=3))
    for key in keys:
        memory.put(key, b"")
    expected = list(memory.list(prefix, delimiter=delimiter, start_after=start_after))
    assert list(store.list(prefix, delimiter=delimiter, start_after=start_after)) == expected


def test_progress_renews_the_attempts_of_a_listing() -> None:
    """Each break comes after new entries: that is a long listing over a bad line, not a dead store."""
    store, memory, _, _ = make(Fault("truncate", op="list", times=8), max_attempts=2)
    for i in range(600):
        memory.put(f"{i:03}", b"")
    assert [entry.key for entry in store.list()] == [f"{i:03}" for i in range(600)]


def test_delete_many_repeats_what_may_pass() -> None:
    failing = {"b": 2, "d": 99}

    class Moody(MemoryBackend):
        def delete_many(self, keys: Sequence[str]) -> Any:
            failures = []
            for key in keys:
                if failing.get(key, 0):
                    failing[key] -= 1
                    failures.append(DeleteFailure(key, ThrottledError("slow down")))
                elif key == "denied":
                    failures.append(DeleteFailure(key, ObjectExistsError("no")))
                else:
                    self.delete(key)
            return failures

    clock = Clock()
    memory = Moody(uuid.uuid4().hex)
    store = ObjectStore("memory://", Pipeline(memory, retry=RetryPolicy(3, clock=clock, sleep=clock.sleep)))
    for key in "abcd":
        memory.put(key, b"")
    failures = store.delete_many(["a", "b", "c", "d", "denied"])
    assert {failure.key for failure in failures} == {"d", "denied"}
    assert [entry.key for entry in memory.list()] == ["d"]
