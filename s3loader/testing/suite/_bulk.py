"""Bulk calls: order, bounds, lent buffers, and what is left when they are left."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from s3loader import events
from s3loader.errors import ObjectChangedError, ObjectExistsError, ObjectNotFoundError, RangeError
from s3loader.store import ObjectStore
from s3loader.store.backend import Driver
from s3loader.testing.suite._base import Base, random_bytes, wait_until
from s3loader.types import ByteRange, PutRequest, ReadRequest

DRIVERS: tuple[Driver, ...] = ("pump", "threads")
SIZE = 50_000


def value(index: int, size: int = SIZE) -> bytes:
    """The bytes of object number `index`."""
    return random_bytes(size, index)


def open_sockets() -> int:
    """Sockets of this process; 0 where the system does not tell."""
    try:
        links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    except OSError:
        return 0
    return sum(link.startswith("socket:") for link in links)


def _at_most(count: Callable[[], int], bound: int) -> bool:
    return count() <= bound


class BulkTests(Base):
    """`read_many`, `get_many`, `put_many`."""

    def _fill(self, store: ObjectStore, count: int, size: int = SIZE) -> list[str]:
        keys = [f"o/{i:03}" for i in range(count)]
        results = list(store.put_many(PutRequest(key, value(i, size), tag=i) for i, key in enumerate(keys)))
        assert [result.key for result in results] == keys
        assert [result.size for result in results] == [size] * count
        return keys

    def test_order_with_duplicates(self, store: ObjectStore) -> None:
        keys = self._fill(store, 12)
        for driver in DRIVERS:
            order = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 11, 0, 10]
            etags = {key: store.head(key).etag for key in keys}
            for result, index in zip(store.get_many([keys[i] for i in order], driver=driver), order, strict=True):
                assert bytes(result.data) == value(index)
                assert result.request.key == keys[index]
                assert (result.size, result.etag) == (SIZE, etags[keys[index]])

    def test_ranges_tags_and_targets(self, store: ObjectStore) -> None:
        keys = self._fill(store, 4)
        for driver in DRIVERS:
            target = bytearray(300)
            requests = [
                ReadRequest(keys[2], 10, 20, tag="a"),
                ReadRequest(keys[0], SIZE - 5, None, tag=("b",)),
                ReadRequest(keys[1], 100, into=memoryview(target)[100:200], tag=None),
                ReadRequest(keys[1], 0, 0),
                ReadRequest(keys[3], 0, SIZE, if_match=store.head(keys[3]).etag),
                ReadRequest(keys[3], SIZE - 1, SIZE + 100),
                ReadRequest(keys[2], 10, 20, tag="a"),
            ]
            found = list(store.read_many(requests, driver=driver))
            assert [result.request.tag for result in found] == [request.tag for request in requests]
            whole = [value(i) for i in range(4)]
            assert [bytes(result.data) for result in found] == [
                whole[2][10:20],
                whole[0][-5:],
                whole[1][100:200],
                b"",
                whole[3],
                whole[3][-1:],
                whole[2][10:20],
            ]
            assert target == bytes(100) + whole[1][100:200] + bytes(100)
            assert ByteRange(10, 20) == ByteRange(requests[0].start, requests[0].end or 0)

    @pytest.mark.parametrize("wrong", ["missing", "changed", "range"])
    def test_an_error_comes_in_its_turn(self, store: ObjectStore, wrong: str) -> None:
        keys = self._fill(store, 8)
        for driver in DRIVERS:
            bad, expected = {
                "missing": (ReadRequest("o/missing"), ObjectNotFoundError),
                "changed": (ReadRequest(keys[0], if_match="0" * 32), ObjectChangedError),
                "range": (ReadRequest(keys[0], SIZE, SIZE + 1), RangeError),
            }[wrong]
            requests = [*(ReadRequest(key) for key in keys[:5]), bad, *(ReadRequest(key) for key in keys[5:])]
            results = store.read_many(requests, driver=driver)
            for index in range(5):
                assert bytes(next(results).data) == value(index)
            with pytest.raises(expected) as caught:
                next(results)
            assert caught.value.url is not None
            assert caught.value.url.endswith(bad.key)
            assert list(results) == [], "after its error the iterator is at its end"

    def test_an_error_of_the_requests_comes_through(self, store: ObjectStore) -> None:
        keys = self._fill(store, 3)

        def requests() -> Iterator[ReadRequest]:
            yield from (ReadRequest(key) for key in keys)
            raise KeyError("the plan is broken")

        results = store.read_many(requests())
        with pytest.raises(KeyError, match="plan is broken"):
            for _ in results:
                pass

    def test_nothing_to_do(self, store: ObjectStore) -> None:
        assert list(store.read_many([])) == []
        assert list(store.get_many([])) == []
        assert list(store.put_many([])) == []

    def test_bytes_are_bounded(self, store: ObjectStore) -> None:
        """What was fetched and not yet taken stays within the budget (or one object above it)."""
        keys = self._fill(store, 10)
        budget = 4 * SIZE
        fetched: list[int] = []
        unsubscribe = events.subscribe(lambda event: fetched.append(event.bytes) if event.op == "GET" else None)
        try:
            for driver in DRIVERS:
                fetched.clear()
                taken = 0
                for result in store.get_many(keys * 4, max_bytes=budget, concurrency=8, driver=driver):
                    taken += len(result.data)
                    assert sum(fetched) - taken <= budget + SIZE, driver
                assert taken == 40 * SIZE
        finally:
            unsubscribe()

    def test_one_object_larger_than_the_budget(self, store: ObjectStore) -> None:
        keys = self._fill(store, 3)
        for driver in DRIVERS:
            results = store.get_many(keys, max_bytes=1000, concurrency=2, driver=driver)
            assert [bytes(result.data) for result in results] == [value(i) for i in range(3)]

    def test_the_source_is_read_as_needed(self, store: ObjectStore) -> None:
        keys = self._fill(store, 4)
        for driver in DRIVERS:
            drawn = itertools.count()
            requests = (ReadRequest(keys[next(drawn) % 4]) for _ in itertools.repeat(None))
            results = store.read_many(requests, max_bytes=4 * SIZE, concurrency=4, driver=driver)
            for index in range(10):
                assert bytes(next(results).data) == value(index % 4)
            results.close()  # type: ignore[attr-defined]
            assert next(drawn) < 1000, "an endless source was read ahead without bound"

    def test_lent_buffers_stay_while_a_view_lives(self, store: ObjectStore) -> None:
        keys = self._fill(store, 8)
        for driver in DRIVERS:
            held: list[tuple[int, memoryview]] = []
            for number, result in enumerate(store.get_many(keys * 6, max_bytes=4 * SIZE, concurrency=4, driver=driver)):
                if number % 3 == 0:
                    held.append((number % 8, result.data[100:2000]))
            for index, view in held:
                assert bytes(view) == value(index)[100:2000], "a buffer was used again under a living view"

    def test_what_the_consumer_does_to_a_buffer_stays_there(self, store: ObjectStore) -> None:
        keys = self._fill(store, 4)
        for driver in DRIVERS:
            for number, result in enumerate(store.get_many(keys * 4, max_bytes=2 * SIZE, concurrency=2, driver=driver)):
                assert bytes(result.data) == value(number % 4)
                if not result.data.readonly:
                    result.data[:] = bytes(len(result.data))
            assert [store.get(key) for key in keys] == [value(i) for i in range(4)], "a view reached the stored object"

    def test_abandoned_iterators_leave_nothing(self, store: ObjectStore) -> None:
        keys = self._fill(store, 8)
        for driver in DRIVERS:
            self._abandon(store, keys, driver)
            sockets = open_sockets()
            threads = threading.active_count()
            for _ in range(6):
                self._abandon(store, keys, driver)
            gc.collect()
            assert wait_until(partial(_at_most, threading.active_count, threads)), threading.enumerate()
            assert wait_until(partial(_at_most, open_sockets, sockets + 4)), f"{sockets} sockets became {open_sockets()}"
            assert store.get(keys[0]) == value(0)

    @staticmethod
    def _abandon(store: ObjectStore, keys: list[str], driver: Driver) -> None:
        results = store.get_many(keys * 20, max_bytes=8 * SIZE, concurrency=4, driver=driver)
        next(results)
        del results

    def test_put_many_in_order_and_its_error(self, store: ObjectStore) -> None:
        self._fill(store, 10)
        for index in range(10):
            assert store.get(f"o/{index:03}") == value(index)
        if not self.caps(store).create:
            pytest.skip("the store ignores the condition")
        requests = [PutRequest(f"p/{i}", b"%d" % i) for i in range(6)]
        requests[4] = PutRequest("o/003", b"taken", mode="create")
        results = store.put_many(requests)
        assert [next(results).key for _ in range(4)] == ["p/0", "p/1", "p/2", "p/3"]
        with pytest.raises(ObjectExistsError):
            next(results)
        assert store.get("o/003") == value(3)

    def test_many_small_objects(self, crowded: ObjectStore) -> None:
        keys = self.crowd()[::5]
        assert [bytes(result.data) for result in crowded.get_many(keys)] == [key.encode() for key in keys]
