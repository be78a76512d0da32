"""Bulk calls through an engine's own bulk verbs: what it fails at goes through the wrappers."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from bulk_helpers import Engine, through

from s3loader import PutFailure, ReadFailure, ReadResult
from s3loader.errors import (
    ObjectNotFoundError,
    UnavailableError,
)
from s3loader.store import ObjectStore, Pipeline, RateLimit, RetryPolicy, open_store
from s3loader.testing import Fault, FaultBackend
from s3loader.types import PutRequest, PutResult, ReadRequest


@pytest.mark.parametrize("prefix", ["", "a/b/"])
def test_an_engine_is_handed_everything(prefix: str) -> None:
    store, engine = through(prefix)
    requests = [PutRequest(f"{i}", b"%d" % i, tag=i) for i in range(5)]
    assert [result.key for result in store.put_many(requests)] == [f"{i}" for i in range(5)]
    assert [entry.key for entry in engine.list()] == [f"{prefix}{i}" for i in range(5)]
    reads = [ReadRequest(f"{i}", 0, 1, tag=i) for i in (3, 1, 1, 0)]
    results = list(store.read_many(reads))
    assert [bytes(r.data) for r in results] == [b"3", b"1", b"1", b"0"]
    assert [r.request for r in results] == reads
    assert engine.by_bulk == 9
    assert engine.closed == 2


@pytest.mark.parametrize("prefix", ["", "p/"])
def test_what_it_fails_at_goes_through_the_wrappers(prefix: str) -> None:
    store, engine = through(prefix)
    for i in range(6):
        store.put(f"{i}", b"%d" % i)
    engine.failures = {f"{prefix}2": [UnavailableError("for now")], f"{prefix}4": [UnavailableError("for now")] * 2}
    assert [bytes(r.data) for r in store.get_many(["0", "1", "2", "3", "4", "4", "5"])] == [
        b"%d" % i for i in (0, 1, 2, 3, 4, 4, 5)
    ]
    engine.failures = {f"{prefix}2": [ObjectNotFoundError("gone")]}
    results = store.get_many(["1", "2", "3"])
    assert bytes(next(results).data) == b"1"
    with pytest.raises(ObjectNotFoundError):
        next(results)
    engine.failures = {f"{prefix}2": [ObjectNotFoundError("gone")]}
    mixed = list(store.get_many(["1", "2", "3"], errors="return"))
    assert [type(r) for r in mixed] == [ReadResult, ReadFailure, ReadResult]
    assert [r.request.key for r in mixed] == ["1", "2", "3"]
    engine.failures = {f"{prefix}7": [UnavailableError("for now")]}
    assert [r.key for r in store.put_many([PutRequest("6", b""), PutRequest("7", b"seven")])] == ["6", "7"]
    assert store.get("7") == b"seven"


def test_its_try_counts() -> None:
    """The engine's own try is the first of the request's: there is a wait behind it, and one less to come."""
    waits: list[float] = []
    engine = Engine(uuid.uuid4().hex)
    broken: Any = Pipeline(engine, retry=RetryPolicy(3, sleep=waits.append))
    store = ObjectStore("memory://", broken)
    engine.failures = {"k": [UnavailableError("for now")]}
    calls = 0

    def failing(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        raise UnavailableError("for now")

    engine.get = failing  # type: ignore[method-assign]
    with pytest.raises(UnavailableError) as caught:
        list(store.get_many(["k"]))
    assert (calls, len(waits), caught.value.attempts) == (2, 2, 3)


def test_a_crash_of_the_engine_is_not_taken_for_an_answer() -> None:
    store, engine = through()
    store.put("k", b"")
    engine.failures = {"k": [MemoryError()]}
    with pytest.raises(MemoryError):
        list(store.get_many(["k"], errors="return"))


def test_conditional_puts_go_the_general_way() -> None:
    """They need a write id, which the bulk verbs do not carry."""
    store, engine = through("p/")
    store.put("taken", b"theirs")
    engine.by_bulk = 0
    requests = [
        PutRequest("a", b"1"),
        PutRequest("b", b"2", mode="create"),
        PutRequest("taken", b"3", mode="create"),
        PutRequest("c", b"4"),
        PutRequest("d", b"5"),
    ]
    results = list(store.put_many(requests, errors="return"))
    assert [type(r) for r in results] == [PutResult, PutResult, PutFailure, PutResult, PutResult]
    assert engine.by_bulk == 3
    assert store.head("b").metadata
    assert store.get("taken") == b"theirs"


def test_an_engine_keeps_to_the_rate() -> None:
    clock = [0.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock[0] += seconds

    engine = Engine(uuid.uuid4().hex)
    store = ObjectStore("memory://", Pipeline(engine, limit=RateLimit(10.0, clock=lambda: clock[0], sleep=sleep)))
    engine.put("k", b"x")
    assert len(list(store.get_many(["k"] * 11))) == 11
    assert engine.by_bulk == 11
    assert sum(waits) == pytest.approx(1.0)
    store.get("k")
    assert sum(waits) == pytest.approx(1.1)


def test_errors_of_the_source_through_an_engine() -> None:
    store, engine = through("p/")
    store.put("k", b"x")

    def requests() -> Iterator[ReadRequest]:
        yield ReadRequest("k")
        raise KeyError("the plan")

    results = store.read_many(requests())
    assert bytes(next(results).data) == b"x"
    with pytest.raises(KeyError):
        next(results)
    assert engine.closed == 1
    leaving: Any = store.get_many(["k"] * 5)
    next(leaving)
    leaving.close()
    assert engine.closed == 2


def test_faults_see_every_request_of_a_bulk_call() -> None:
    """Around an engine with bulk verbs the fault layer is no hole."""
    engine = Engine(uuid.uuid4().hex)
    broken = FaultBackend(engine, [Fault("unavailable", op="get", nth=2)])
    store = ObjectStore("memory://", Pipeline(broken, retry=RetryPolicy(sleep=lambda _: None)))
    engine.put("k", b"x")
    assert len(list(store.get_many(["k"] * 4, driver="pump"))) == 4
    assert engine.by_bulk == 0
    assert len(broken.seen) == 5


def test_slow_files_are_read_by_threads(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that makes us wait is a reason for threads; the page cache is none."""
    store = open_store(tmp_path)
    for i in range(30):
        (tmp_path / f"{i}").write_bytes(b"%d" % i)
    assert [bytes(r.data) for r in store.get_many([f"{i}" for i in range(30)])] == [b"%d" % i for i in range(30)]
    names: set[str] = set()
    pread = os.pread

    def slow(*args: Any) -> bytes:
        names.add(threading.current_thread().name)
        time.sleep(0.005)
        return pread(*args)

    monkeypatch.setattr(os, "pread", slow)
    assert [bytes(r.data) for r in store.get_many([f"{i}" for i in range(30)])] == [b"%d" % i for i in range(30)]
    assert any(name.startswith("s3loader-read") for name in names)
