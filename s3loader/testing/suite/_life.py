"""The life of a store: processes, threads, pickles, async, closing, probing, failing."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest

from s3loader import events
from s3loader.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ClosedError,
    ObjectNotFoundError,
    S3LoaderError,
    StoreConnectionError,
    StoreTimeoutError,
)
from s3loader.store import ObjectStore
from s3loader.testing.suite import _elsewhere
from s3loader.testing.suite._base import Base, random_bytes, run_together, wait_until
from s3loader.types import ReadRequest


class LifeTests(Base):
    """Where, how often and by whom a store is used."""

    def test_pickles(self, store: ObjectStore) -> None:
        store.put("k", b"data")
        clone = self.reopen(store)
        try:
            assert (clone.url, clone.engine) == (store.url, store.engine)
            assert clone.get("k") == b"data"
        finally:
            clone.close()
        assert store.get("k") == b"data", "closing one store left the other alone"

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_in_another_process(self, store: ObjectStore, method: str) -> None:
        """Used in the parent through every verb, then in a child of each kind, then in the parent again."""
        if method not in self.start_methods or method not in multiprocessing.get_all_start_methods():
            pytest.skip(f"no {method} here")
        data = random_bytes(100_000)
        store.put("k", data)
        assert [bytes(r.data) for r in store.get_many(["k"] * 3, driver="threads")] == [data] * 3
        assert [entry.key for entry in store.list()] == ["k"]
        context: Any = multiprocessing.get_context(method)
        answers = context.SimpleQueue()
        child = context.Process(
            target=_elsewhere.use,
            args=(store, "k", _elsewhere.sha256(data), self.shared or method == "fork", answers),
            daemon=True,
        )
        child.start()
        child.join(60)
        if child.is_alive():
            child.kill()
            child.join()
            pytest.fail(f"the {method} child hangs")
        assert child.exitcode == 0
        assert not answers.empty(), "the child ended without an answer"
        assert answers.get() is None
        answers.close()
        child.close()
        assert store.get("k") == data
        assert store.exists("from the child") == self.shared

    def test_fork_in_the_middle_of_a_bulk_read(self, store: ObjectStore) -> None:
        """The child's reads are its own; the parent's go on."""
        if "fork" not in self.start_methods:
            pytest.skip("no fork here")
        data = random_bytes(100_000)
        store.put("k", data)
        results = store.read_many((ReadRequest("k") for _ in range(40)), max_bytes=400_000, driver="threads")
        next(results)
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=_elsewhere.use, args=(store, "k", _elsewhere.sha256(data), True, answers), daemon=True)
        child.start()
        rest = [bytes(result.data) for result in results]
        child.join(60)
        hangs = child.is_alive()
        child.kill()
        child.join()
        child.close()
        assert rest == [data] * 39
        assert not hangs, "the child hangs"
        assert answers.get() is None
        answers.close()

    def test_threads_share_a_store(self, store: ObjectStore) -> None:
        values = [random_bytes(20_000, i) for i in range(8)]

        def work(index: int) -> None:
            key = f"t/{index}"
            for _ in range(4):
                store.put(key, values[index])
                assert store.get(key) == values[index]
                assert store.head(key).size == 20_000
                assert [bytes(r.data) for r in store.get_many([key] * 3)] == [values[index]] * 3

        assert run_together([lambda i=i: work(i) for i in range(8)]) == [None] * 8  # type: ignore[misc]

    def test_async_twins(self, store: ObjectStore) -> None:
        async def main() -> None:
            aio = store.aio
            put = await aio.put("a/1", b"one")
            await asyncio.gather(*(aio.put(f"a/{i}", b"%d" % i) for i in range(2, 8)))
            assert await aio.get("a/1") == b"one"
            assert await aio.get_range("a/1", 1, 3) == b"ne"
            assert [bytes(v) for v in await aio.get_ranges("a/1", [(0, 1), (2, 3)])] == [b"o", b"e"]
            assert (await aio.head("a/1")).etag == put.etag
            assert await aio.exists("a/1")
            assert not await aio.exists("a/none")
            into = bytearray(2)
            await aio.read_into("a/1", 0, into)
            assert into == b"on"
            assert [entry.key async for entry in aio.list("a/")] == [f"a/{i}" for i in range(1, 8)]
            assert [bytes(r.data) async for r in aio.get_many(["a/2", "a/1"])] == [b"2", b"one"]
            assert [bytes(r.data) async for r in aio.read_many([ReadRequest("a/1", 0, 2)])] == [b"on"]
            await aio.copy("a/1", "b")
            await aio.delete("a/1")
            assert await aio.delete_many(["a/2", "a/3"]) == []
            with pytest.raises(ObjectNotFoundError):
                await aio.get("a/1")
            assert sorted([entry.key async for entry in aio.list()]) == ["a/4", "a/5", "a/6", "a/7", "b"]

        asyncio.run(main())
        asyncio.run(main_again(store))

    def test_async_iteration_may_be_left(self, store: ObjectStore) -> None:
        store.put("k", random_bytes(10_000))
        before = threading.active_count()

        async def main() -> None:
            results = store.aio.get_many(["k"] * 50, max_bytes=50_000)
            async with contextlib.aclosing(results):
                async for _ in results:
                    break

        for _ in range(3):
            asyncio.run(main())
        store.close()
        assert wait_until(lambda: threading.active_count() <= before), threading.enumerate()

    def test_close(self, store: ObjectStore) -> None:
        with self.reopen(store) as clone:
            clone.put("k", b"x")
        clone.close()
        clone.close()
        for use in (lambda: clone.get("k"), lambda: clone.put("k", b"y"), lambda: list(clone.get_many(["k"]))):
            with pytest.raises(ClosedError):
                use()
        if self.shared:
            assert store.get("k") == b"x"

    def test_repr_is_short_and_holds_no_secret(self, store: ObjectStore) -> None:
        text = repr(store)
        assert store.url in text
        assert len(text) < 500
        for secret in self.secrets:
            assert secret not in text
            assert secret not in repr(store.options)
            assert secret not in repr(store.backend)

    def test_capabilities(self, store: ObjectStore) -> None:
        found = store.capabilities()
        if self.capabilities is not None:
            assert found == self.capabilities
        assert list(store.list()) == [], "probing left something behind"
        assert list(store.backend.list_multipart()) == []
        seen: list[events.OpEvent] = []
        unsubscribe = events.subscribe(seen.append)
        try:
            assert store.capabilities() == found
        finally:
            unsubscribe()
        assert not [event for event in seen if event.url.startswith(store.url)], "probed twice"

    def test_everything_is_an_event(self, store: ObjectStore) -> None:
        seen: list[events.OpEvent] = []
        unsubscribe = events.subscribe(seen.append)
        try:
            store.put("k", b"12345")
            store.get("k")
            list(store.get_many(["k", "k"]))
            store.head("k")
            list(store.list())
            store.get_range("k", 1, 3)
            store.delete_many(["k", "l"])
            with pytest.raises(ObjectNotFoundError):
                store.get("k")
        finally:
            unsubscribe()
        ours = [event for event in seen if event.url.startswith(store.url)]
        moved = {op: sum(e.bytes for e in ours if e.op == op and e.error is None) for op in ("PUT", "GET")}
        assert moved == {"PUT": 5, "GET": 17}
        assert [event.offset for event in ours if event.op == "GET" and event.error is None] == [0, 0, 0, 1]
        assert [event.objects for event in ours if event.op == "LIST"] == [1]
        assert sum(event.objects for event in ours if event.op == "DELETE") == 2
        assert {"PUT", "GET", "HEAD", "LIST", "DELETE"} <= {event.op for event in ours}
        assert [event.error is not None for event in ours if event.op == "GET"][-1]
        assert all(event.end >= event.start for event in ours)
        assert all(secret not in repr(event) for event in ours for secret in self.secrets)

    # -- what cannot work ------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["bucket", "credentials", "endpoint"])
    def test_broken_stores_say_so(self, store: ObjectStore, how: Literal["bucket", "credentials", "endpoint"]) -> None:
        """One typed error with a hint, from every verb, without a hang and without a secret."""
        broken = self.broken(store, how)
        if broken is None:
            pytest.skip("there is no such thing here")
        expected: tuple[type[S3LoaderError], ...] = {
            "bucket": (BucketNotFoundError,),
            "credentials": (AccessDeniedError,),
            "endpoint": (StoreConnectionError, StoreTimeoutError),
        }[how]
        with broken:
            calls: dict[str, Callable[[], Any]] = {
                "get": lambda: broken.get("k"),
                "put": lambda: broken.put("k", b"x"),
                "list": lambda: list(broken.list()),
                "get_many": lambda: list(broken.get_many(["k", "l"])),
                "head": lambda: broken.head("k"),
            }
            for verb, call in calls.items():
                with pytest.raises(S3LoaderError) as caught:
                    call()
                if verb == "head":
                    # A HEAD answer has no body to tell a missing bucket from a missing key.
                    assert isinstance(caught.value, (*expected, ObjectNotFoundError)), verb
                    continue
                assert isinstance(caught.value, expected), (verb, caught.value)
                assert caught.value.hint, verb
                assert all(secret not in str(caught.value) for secret in self.secrets)
                revived = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  our own pickle
                assert str(revived) == str(caught.value)


async def main_again(store: ObjectStore) -> None:
    """In a second event loop: nothing of the first may be left in the store."""
    await store.aio.put("again", b"x")
    assert await store.aio.get("again") == b"x"
