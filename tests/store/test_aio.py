"""The async twins: the same answers, errors at their place, and nothing left running."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from forking import in_child

from s3loader import AsyncObjectStore, ReadFailure
from s3loader.errors import ClosedError, ObjectExistsError, ObjectNotFoundError
from s3loader.store import MemoryBackend, ObjectStore, open_store
from s3loader.testing import FaultBackend, Moment, Seen
from s3loader.types import PutRequest, ReadRequest, Update


@pytest.fixture
def store() -> Any:
    with open_store(f"memory://{uuid.uuid4().hex}") as store:
        yield store


def threads() -> set[threading.Thread]:
    """Those of async calls, of all stores of this process."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("s3loader-aio")}


def test_every_verb_has_its_twin() -> None:
    """With the same arguments and the same documentation."""
    for name, verb in inspect.getmembers(ObjectStore, inspect.isfunction):
        if name.startswith("_") or name in ("below", "open_ahead", "network"):  # these ask for nothing
            continue
        twin = getattr(AsyncObjectStore, name)
        assert inspect.signature(twin) == inspect.signature(verb) or name == "open", name
        assert twin.__doc__, name


def test_verbs(store: ObjectStore) -> None:
    async def main() -> None:
        aio = store.aio
        assert aio is store.aio
        first = await aio.put("k", b"0123456789", metadata={"a": "b"})
        assert (await aio.head("k")).metadata == {"a": "b"}
        await aio.put("k", b"again", mode=Update(first.etag))
        with pytest.raises(ObjectExistsError):
            await aio.put("k", b"", mode="create")
        assert (await aio.capabilities()).conditional_writes
        assert await aio.conditional_writes()
        results = [r async for r in aio.put_many(PutRequest(f"m/{i}", b"%d" % i) for i in range(5))]
        assert [r.key for r in results] == [f"m/{i}" for i in range(5)]
        mixed = [r async for r in aio.get_many(["m/1", "none", "m/2"], errors="return")]
        assert [isinstance(r, ReadFailure) for r in mixed] == [False, True, False]
        assert await aio.delete_many([f"m/{i}" for i in range(5)]) == []

    asyncio.run(main())


def test_errors_come_behind_what_came_before_them(store: ObjectStore) -> None:
    store.put("k", b"x")

    async def main() -> None:
        results = store.aio.get_many(["k", "k", "none", "k"])
        assert [bytes((await anext(results)).data) for _ in range(2)] == [b"x", b"x"]
        with pytest.raises(ObjectNotFoundError):
            await anext(results)

    asyncio.run(main())


def test_writer_and_reader(store: ObjectStore) -> None:
    async def main() -> None:
        async with store.aio.multipart("k", part_size="10B") as writer:
            assert await writer.write(b"0123456789" * 3) == 30
            writer.reserve(5)[:] = b"hello"
            await writer.commit(5)
            await writer.flush()
            assert writer.tell() == 35
        assert writer.result is not None
        assert writer.result.size == 35
        with pytest.raises(KeyError):  # noqa: PT012 - the block is the test
            async with store.aio.multipart("no", part_size="10B") as writer:
                await writer.write(bytes(25))
                raise KeyError
        assert not await store.aio.exists("no")
        async with await store.aio.open("k") as reader:
            assert await reader.read(3) == b"012"
            reader.seek(30)
            buffer = bytearray(5)
            assert await reader.readinto(buffer) == 5
            assert buffer == b"hello"
            assert reader.tell() == 35
        with pytest.raises(ObjectNotFoundError):
            await store.aio.open("none")

    asyncio.run(main())


def test_calls_run_side_by_side() -> None:
    meeting = threading.Barrier(8)

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.op == "head" and moment == "before":
            meeting.wait(600)

    with ObjectStore("memory://", FaultBackend(MemoryBackend(uuid.uuid4().hex), hook=hook)) as store:
        store.put("k", b"x")

        async def main() -> None:
            metas = await asyncio.gather(*(store.aio.head("k") for _ in range(8)))
            assert len(metas) == 8

        asyncio.run(main())


def test_a_cancelled_iteration_is_closed() -> None:
    release = threading.Event()
    stuck = threading.Event()

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.op == "get" and len(seen.key) > 1 and moment == "before":
            stuck.set()
            assert release.wait(600)

    closed = threading.Event()
    with ObjectStore("memory://", FaultBackend(MemoryBackend(uuid.uuid4().hex), hook=hook)) as store:
        store.put("k", b"x")
        store.put("slow", b"x")

        async def read() -> None:
            def keys() -> Any:
                try:
                    yield from ["k", "slow", "k"]
                finally:
                    closed.set()

            async with contextlib.aclosing(store.aio.get_many(keys(), driver="pump")) as results:
                async for _ in results:
                    pass

        async def main() -> None:
            task = asyncio.create_task(read())
            await asyncio.to_thread(stuck.wait, 30)
            task.cancel()
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert closed.wait(600)


def test_close_ends_the_threads(store: ObjectStore, tmp_path: Path) -> None:
    before = threads()  # other tests of this process keep stores open

    async def main() -> None:
        other = open_store(tmp_path)
        await other.aio.put("k", b"x")
        assert threads() - before
        await other.aio.close()
        with pytest.raises(ClosedError):
            await other.aio.get("k")
        await store.aio.put("k", b"x")

    asyncio.run(main())
    store.close()
    with open_store(tmp_path) as third:
        asyncio.run(third.aio.get("k"))  # type: ignore[arg-type]
    for thread in threads() - before:
        thread.join(600)
    assert threads() <= before


def test_a_forked_child_has_threads_of_its_own(store: ObjectStore) -> None:
    async def use() -> bytes:
        return await store.aio.get("k")

    store.put("k", b"x")
    assert asyncio.run(use()) == b"x"
    in_child(lambda: asyncio.run(use()) == b"x")
    assert asyncio.run(use()) == b"x"


def test_bulk_results_come_in_batches(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hop to a thread brings everything that is ready, not one result."""
    store.put("k", b"x")
    aio = store.aio
    hops = 0
    run = aio._pool.run

    async def counted(call: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal hops
        hops += 1
        return await run(call, *args, **kwargs)

    monkeypatch.setattr(aio._pool, "run", counted)

    async def main() -> int:
        return len([r async for r in aio.read_many(ReadRequest("k") for _ in range(500))])

    assert asyncio.run(main()) == 500
    assert hops < 100
