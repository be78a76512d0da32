"""Bulk reads and writes by threads and in place: order, errors, bounds."""

from __future__ import annotations

import os
import random
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from bulk_helpers import DRIVERS, Remote, bulk_threads, make, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import PutFailure, ReadFailure, ReadResult
from s3loader.errors import (
    ConfigError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    RangeError,
    UnavailableError,
)
from s3loader.store import MemoryBackend, ObjectStore
from s3loader.store.ordered import run_ordered
from s3loader.testing import Fault, FaultBackend, Moment, Seen
from s3loader.types import Buffer, ObjectMeta, PutRequest, ReadRequest


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), max_size=30),
    order=st.randoms(use_true_random=False),
    max_bytes=st.integers(1, 1000),
    concurrency=st.integers(1, 6),
    driver=st.sampled_from(DRIVERS),
    broken=st.sets(st.integers(0, 29)),
)
def test_results_keep_the_order(
    sizes: list[int], order: random.Random, max_bytes: int, concurrency: int, driver: Any, broken: set[int]
) -> None:
    """Duplicates, gaps, objects larger than the bound: what comes is what was asked for, in place."""
    store, _ = make()
    data = {f"{i}": bytes([i]) * size for i, size in enumerate(sizes)}
    for key, value in data.items():
        store.put(key, value)
    keys = [order.choice(["missing", *data]) if i in broken else order.choice([*data]) for i in range(30)] if data else []
    results = store.get_many(keys, max_bytes=max_bytes, concurrency=concurrency, driver=driver, errors="return")
    for key, result in zip(keys, results, strict=True):
        assert result.request.key == key
        if key == "missing":
            assert isinstance(result, ReadFailure)
            assert isinstance(result.error, ObjectNotFoundError)
        else:
            assert isinstance(result, ReadResult)
            assert bytes(result.data) == data[key]
            assert result.size == len(data[key])


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_error_is_raised_in_its_place(driver: Any) -> None:
    store, _ = make()
    for i in range(10):
        store.put(f"{i}", b"%d" % i)
    results = store.get_many(["0", "1", "missing", "3"], driver=driver)
    assert [bytes(next(results).data) for _ in range(2)] == [b"0", b"1"]
    with pytest.raises(ObjectNotFoundError) as caught:
        next(results)
    assert caught.value.url is not None
    assert caught.value.url.endswith("missing")
    assert list(results) == []
    assert wait_until(lambda: bulk_threads() == 0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_error_of_the_source_waits_its_turn(driver: Any) -> None:
    store, _ = make()
    store.put("k", b"x")

    def requests() -> Iterator[ReadRequest]:
        yield from [ReadRequest("k")] * 3
        raise KeyError("the plan")

    results = store.read_many(requests(), driver=driver)
    assert [bytes(next(results).data) for _ in range(3)] == [b"x"] * 3
    with pytest.raises(KeyError, match="the plan"):
        next(results)
    wrong: list[Any] = [ReadRequest("k"), "k"]
    results = store.read_many(wrong, driver=driver)
    next(results)
    with pytest.raises(ConfigError):
        next(results)


def test_bytes_in_hand_are_bounded() -> None:
    """Fetched and not yet taken, objects of unknown size included."""
    in_hand = most = 0
    lock = threading.Lock()

    class Counting(MemoryBackend):
        def get(self, key: str, *args: Any, **kwargs: Any) -> tuple[ObjectMeta, Buffer]:
            nonlocal in_hand, most
            meta, data = super().get(key, *args, **kwargs)
            with lock:
                in_hand += len(data)
                most = max(most, in_hand)
            return meta, data

        def read_into(self, key: str, start: int, buffer: memoryview, **kwargs: Any) -> ObjectMeta:
            nonlocal in_hand, most
            with lock:
                in_hand += len(buffer)
                most = max(most, in_hand)
            return super().read_into(key, start, buffer, **kwargs)

    store = ObjectStore("memory://", Counting(uuid.uuid4().hex))
    sizes = [10_000, 300_000, 100, 900_000, 70_000, 0, 400_000] * 3
    data = [os.urandom(size) for size in sizes]
    for i, value in enumerate(data):
        store.put(f"{i}", value)
    budget = 1_000_000
    for i, result in enumerate(store.get_many(map(str, range(21)), max_bytes=budget, concurrency=8, driver="threads")):
        assert bytes(result.data) == data[i]
        with lock:
            in_hand -= len(result.data)
    assert most <= budget + 900_000, "one object above the bound, and no more"
    assert in_hand == 0


def test_a_large_object_is_of_one_version() -> None:
    """Its size is unknown at first, so it takes two requests; between them it is replaced."""
    holder: list[ObjectStore] = []
    done = threading.Event()

    def replace(seen: Seen, moment: Moment) -> None:
        if seen.op == "read" and moment == "before" and not done.is_set():
            done.set()
            holder[0].put("k", bytes(300_000))

    store, _ = make(hook=replace)
    holder.append(store)
    store.put("k", os.urandom(300_000))
    with pytest.raises(ObjectChangedError):
        list(store.get_many(["k"], max_bytes=100_000, concurrency=2, driver="threads"))
    assert [bytes(r.data) for r in store.get_many(["k"], max_bytes=100_000, concurrency=2, driver="threads")] == [
        bytes(300_000)
    ]


def test_targets_are_filled() -> None:
    store, _ = make()
    store.put("k", bytes(range(100)))
    target = bytearray(20)
    view = memoryview(target)
    requests = [ReadRequest("k", 10 * i, into=view[5 * i : 5 * i + 5], tag=i) for i in range(4)]
    for driver in DRIVERS:
        target[:] = bytes(20)
        found = list(store.read_many(requests, driver=driver))  # type: ignore[arg-type]
        assert [r.request.tag for r in found] == [0, 1, 2, 3]
        assert target == b"".join(bytes(range(10 * i, 10 * i + 5)) for i in range(4))
        with pytest.raises(RangeError):
            list(store.read_many([ReadRequest("k", 98, into=view[:5])], driver=driver))  # type: ignore[arg-type]


@pytest.mark.parametrize("driver", DRIVERS)
def test_puts(driver: Any) -> None:
    store, _ = make(Fault("unavailable", op="put", key="bad", times=None))
    keys = ["a", "bad", "b", "c"]
    results = list(store.put_many([PutRequest(k, k.encode()) for k in keys], errors="return", driver=driver))
    assert [isinstance(result, PutFailure) for result in results] == [False, True, False, False]
    assert isinstance(results[1], PutFailure)
    assert isinstance(results[1].error, UnavailableError)
    assert [entry.key for entry in store.list()] == ["a", "b", "c"]
    with pytest.raises(ObjectExistsError):
        list(store.put_many([PutRequest("a", b"", mode="create")], driver=driver))
    with pytest.raises(ConfigError):
        list(store.put_many([PutRequest("a", "text")], driver=driver))  # type: ignore[arg-type]


def test_a_large_read_into_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3loader.store.objectstore._PIECE", 1000)
    holder: list[ObjectStore] = []
    replace_at = 0

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.number == replace_at and moment == "before":
            holder[0].put("k", bytes(6000))

    broken = FaultBackend(Remote(uuid.uuid4().hex), hook=hook)
    store = ObjectStore("remote://", broken)
    holder.append(store)
    data = os.urandom(6000)
    store.put("k", data)
    buffer = bytearray(5500)
    assert store.read_into("k", 400, buffer).size == 6000
    assert buffer == data[400:5900]
    assert [seen.op for seen in broken.seen] == ["put", "head", *["read"] * 6]
    with pytest.raises(RangeError):
        store.read_into("k", 600, buffer)
    replace_at = len(broken.seen) + 4
    with pytest.raises(ObjectChangedError):
        store.read_into("k", 0, buffer)


def test_ranges_of_two_versions_are_no_answer() -> None:
    """Also where the store ignores If-Match: the ETags that come are compared."""
    holder: list[ObjectStore] = []

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.number == 3 and moment == "before":
            holder[0].put("k", bytes(10_000))

    store, _ = make(hook=hook)
    holder.append(store)
    store.put("k", os.urandom(10_000))
    with pytest.raises(ObjectChangedError):
        store.get_ranges("k", [(0, 10), (5000, 5010), (9000, 9010)], max_gap=0)
    assert len(store.get_ranges("k", [(0, 10), (5000, 5010)], max_gap=0)) == 2


def test_options_are_checked_at_the_call() -> None:
    store, _ = make()
    wrong: list[dict[str, Any]] = [
        {"concurrency": 0},
        {"concurrency": -1},
        {"concurrency": 1.5},
        {"driver": "horses"},
        {"errors": "ignore"},
        {"max_bytes": "lots"},
    ]
    for options in wrong:
        with pytest.raises(ConfigError):
            store.get_many(["k"], **options)
        with pytest.raises(ConfigError):
            store.put_many([], **options)
    for letters in (store.get_many, store.delete_many):
        with pytest.raises(ConfigError, match="keys"):
            letters("abc")  # type: ignore[operator]


def test_work_of_any_kind_in_order() -> None:
    """`run_ordered` by itself: what the work raises ends up in its slot."""

    def work(slot: Any, _: Any) -> int:
        if slot.item == 3:
            raise ValueError("three")
        return slot.item * 2

    slots = list(run_ordered(range(6), work, lambda item: 1, max_bytes=3, concurrency=3, name="test"))
    assert [slot.result for slot in slots] == [0, 2, 4, None, 8, 10]
    assert isinstance(slots[3].error, ValueError)
