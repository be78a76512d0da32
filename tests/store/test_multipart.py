"""The multipart writer: order, bounds, back-pressure, and errors that come out."""

from __future__ import annotations

import array
import gc
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from forking import in_child
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import MultipartWriter, StoreOptions
from s3loader.errors import ClosedError, ConfigError, ObjectExistsError, S3LoaderError, StoreError, UnavailableError
from s3loader.store import MemoryBackend, ObjectStore
from s3loader.store.ordered import BoundedPool, map_ordered
from s3loader.store.parts import PartUpload, open_uploads, part_size_for, part_size_of
from s3loader.testing import Fault, FaultBackend, Moment, Seen
from s3loader.types import Buffer, PartResult, PutResult, Update

MAX_PARTS = 10_000
TIB = 1 << 40


def make(*faults: Fault, hook: Callable[[Seen, Moment], None] | None = None) -> tuple[ObjectStore, FaultBackend]:
    broken = FaultBackend(MemoryBackend(uuid.uuid4().hex), faults, hook=hook)
    return ObjectStore(broken.url, broken), broken


def threads() -> int:
    return sum(thread.name.startswith("s3loader-upload") for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 600
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70), max_size=12),
    part_size=st.integers(1, 50),
    in_flight=st.integers(1, 4),
    reserve=st.booleans(),
    flush_at=st.integers(0, 12),
)
def test_any_pieces_make_the_same_object(
    sizes: list[int], part_size: int, in_flight: int, reserve: bool, flush_at: int
) -> None:
    store, broken = make()
    data = os.urandom(sum(sizes))
    at = 0
    with store.multipart("k", part_size=f"{part_size}B", max_in_flight=in_flight) as writer:
        for number, size in enumerate(sizes):
            piece = data[at : at + size]
            at += size
            if number == flush_at:
                writer.flush()
            while reserve and piece:
                room = writer.reserve(len(piece))
                assert 1 <= len(room) <= len(piece)
                taken = len(room)
                room[:] = piece[:taken]
                writer.commit(taken)
                piece = piece[taken:]
            if not reserve:
                assert writer.write(piece) == size
        assert writer.tell() == len(data)
    assert store.get("k") == data
    assert writer.result is not None
    assert writer.result.size == len(data)
    parts = [seen for seen in broken.seen if seen.op == "upload part"]
    assert len(parts) == (-(-len(data) // part_size) if len(data) >= part_size else 0)
    assert list(store.backend.list_multipart()) == []


def test_part_sizes_suffice() -> None:
    for first in (5 << 20, 8 << 20):
        sizes = [part_size_of(number, first) for number in range(1, MAX_PARTS + 1)]
        assert sizes == sorted(sizes)
        assert sum(sizes) >= 5 * TIB
        assert max(sizes) <= 5 << 30
        assert sizes[:900] == [first] * 900
    for size in (0, 1, 8 << 20, 1 << 40, 5 * TIB):
        part = part_size_for(size, 8 << 20)
        assert part >= 8 << 20
        assert -(-size // part) <= MAX_PARTS


def test_parts_double_on_the_way() -> None:
    store, broken = make()
    sizes: list[int] = []
    memory = broken.inner
    assert isinstance(memory, MemoryBackend)
    upload = memory.upload_part

    def note(key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        sizes.append(len(data))
        return upload(key, upload_id, number, data)

    memory.upload_part = note  # type: ignore[method-assign]
    with store.multipart("k", part_size="3B", max_in_flight=1) as writer:
        for _ in range(10):
            writer.write(bytes(1001))
    assert sizes[:900] == [3] * 900
    assert sizes[900:1800] == [6] * 900
    assert sizes[1800:-1] == [12] * (len(sizes) - 1801)
    assert sum(sizes) == writer.tell() == store.head("k").size == 10_010


def test_no_more_than_the_allowed_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3loader.store.parts.MAX_PARTS", 3)
    store, _ = make()
    writer = store.multipart("k", part_size="1B")
    with pytest.raises(ConfigError, match="more than 3 parts"):
        writer.write(b"1234")
    assert list(store.backend.list_multipart()) == []


def test_memory_is_bounded_and_writers_wait() -> None:
    """No more than `max_in_flight` parts are ever taken from the caller and not yet stored."""
    release = threading.Event()
    running: list[int] = []

    def hold(seen: Seen, moment: Moment) -> None:
        if seen.op == "upload part" and moment == "before":
            running.append(seen.number)
            assert release.wait(600)

    store, _ = make(hook=hold)
    written: list[int] = []
    writer = store.multipart("k", part_size="10B", max_in_flight=2)

    def write() -> None:
        for i in range(8):
            writer.write(bytes([i]) * 10)
            written.append(i)

    thread = threading.Thread(target=write)
    thread.start()
    assert wait_until(lambda: len(running) == 2 and written == [0, 1])
    thread.join(0.3)  # time to do wrong
    assert thread.is_alive(), "it does not wait"
    assert len(running) == 2
    assert written == [0, 1]
    release.set()
    thread.join(600)
    writer.close()
    assert store.get("k") == b"".join(bytes([i]) * 10 for i in range(8))
    assert threads() == 0


@pytest.mark.parametrize("surfaces_at", ["write", "flush", "close", "reserve"])
def test_an_error_of_a_part_comes_out(surfaces_at: str) -> None:
    gate = threading.Event()

    def hold(seen: Seen, moment: Moment) -> None:
        if seen.fault:
            assert gate.wait(600)

    store, broken = make(Fault("unavailable", op="upload part", nth=2), hook=hold)
    writer = store.multipart("k", part_size="10B", max_in_flight=2)
    writer.write(bytes(20))
    gate.set()
    assert wait_until(lambda: writer._pool.error is not None)
    calls: dict[str, Callable[[], Any]] = {
        "write": lambda: [writer.write(bytes(10)) for _ in range(4)],
        "flush": writer.flush,
        "close": writer.close,
        "reserve": lambda: [(writer.reserve(10), writer.commit(10)) for _ in range(4)],
    }
    with pytest.raises(UnavailableError):
        calls[surfaces_at]()
    assert list(store.backend.list_multipart()) == []
    assert not store.exists("k")
    with pytest.raises(S3LoaderError):
        writer.write(b"x")
    with pytest.raises(ClosedError):
        writer.close()
    assert threads() == 0
    assert broken.seen


def test_an_exception_inside_aborts() -> None:
    store, _ = make()
    with pytest.raises(KeyError), store.multipart("k", part_size="10B") as writer:  # noqa: PT012 - the block is the test
        writer.write(bytes(35))
        raise KeyError
    assert not store.exists("k")
    assert list(store.backend.list_multipart()) == []
    with pytest.raises(ClosedError, match="aborted"):
        writer.write(b"x")
    writer.abort()


def test_abort_inside_the_block_is_no_error() -> None:
    store, _ = make()
    with store.multipart("k", part_size="10B") as writer:
        writer.write(bytes(35))
        writer.abort()
    assert not store.exists("k")
    assert list(store.backend.list_multipart()) == []


def test_an_abort_that_fails_does_not_hide_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    store, _ = make(Fault("unavailable", op="abort upload", times=None))
    with pytest.raises(KeyError), store.multipart("k", part_size="10B") as writer:  # noqa: PT012 - the block is the test
        writer.write(bytes(35))
        raise KeyError
    assert "may be left behind" in caplog.text


def test_a_failed_create_and_completion() -> None:
    store, _ = make(Fault("unavailable", op="create upload"))
    writer = store.multipart("k", part_size="10B")
    with pytest.raises(UnavailableError):
        writer.write(bytes(35))
    store, _ = make(Fault("unavailable", op="complete upload"))
    with pytest.raises(UnavailableError), store.multipart("k", part_size="10B") as writer:
        writer.write(bytes(35))
    assert list(store.backend.list_multipart()) == []
    assert not store.exists("k")


@pytest.mark.parametrize("size", [0, 5, 25])
def test_conditions_hold_for_every_size(size: int) -> None:
    store, _ = make()
    old = store.put("k", b"old")
    with pytest.raises(ObjectExistsError), store.multipart("k", part_size="10B", mode="create") as writer:
        writer.write(bytes(size))
    assert store.get("k") == b"old"
    with store.multipart("k", part_size="10B", mode=Update(old.etag)) as writer:
        writer.write(bytes(size))
    assert store.get("k") == bytes(size)
    assert list(store.backend.list_multipart()) == []


def test_what_fits_a_part_is_one_put() -> None:
    store, broken = make()
    for size in (0, 1, 9):
        with store.multipart(f"{size}", part_size="10B", content_type="a/b", metadata={"x": "y"}) as writer:
            writer.write(bytes(size))
        meta = store.head(f"{size}")
        assert (meta.size, meta.content_type, dict(meta.metadata)) == (size, "a/b", {"x": "y"})
    assert {seen.op for seen in broken.seen} == {"put", "head"}


def test_close_twice_gives_the_same() -> None:
    store, _ = make()
    writer = store.multipart("k", part_size="10B")
    writer.write(bytes(25))
    assert writer.close() is writer.close() is writer.result
    with pytest.raises(ClosedError, match="closed"):
        writer.write(b"x")
    with pytest.raises(ClosedError):
        writer.flush()
    writer.abort()
    assert store.get("k") == bytes(25)


def test_commit_needs_a_reservation() -> None:
    store, _ = make()
    writer = store.multipart("k", part_size="10B")
    for wrong in (lambda: writer.commit(1), lambda: writer.reserve(0)):
        with pytest.raises(ConfigError):
            wrong()
    writer.reserve(4)
    with pytest.raises(ConfigError):
        writer.commit(11)
    with pytest.raises(ConfigError):
        writer.commit(-1)
    writer.reserve(4)[:] = b"data"
    writer.commit(4)
    assert writer.close().size == 4
    assert store.get("k") == b"data"


def test_numpy_and_other_buffers() -> None:
    store, _ = make()
    with store.multipart("k", part_size="10B") as writer:
        assert writer.write(array.array("d", [1.0, 2.0, 3.0])) == 24
        assert writer.write(memoryview(bytes(12)).cast("B", (3, 4))) == 12
        with pytest.raises(ConfigError):
            writer.write("text")
        with pytest.raises(ConfigError):
            writer.write(memoryview(b"0123456789")[::2])
    assert store.head("k").size == 36


def test_only_what_nobody_can_change_is_uploaded_from_where_it_is() -> None:
    """A part in the middle of its upload while the caller writes over his own memory."""
    sent: list[object] = []
    held = threading.Event()

    class Slow(MemoryBackend):
        def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
            assert held.wait(600)
            sent.append(data.obj if isinstance(data, memoryview) else data)
            return super().upload_part(key, upload_id, number, data)

    backend = Slow(uuid.uuid4().hex)
    store = ObjectStore(backend.url, backend)
    fixed, changing = bytes(range(40)), bytearray(b"m" * 20)
    with store.multipart("k", part_size="10B", max_in_flight=20) as writer:
        writer.write(fixed)
        writer.write(memoryview(fixed)[5:25])
        writer.write(changing)
        writer.write(memoryview(changing).toreadonly())
        changing[:] = b"X" * 20
        writer.write(b"odd")
        writer.write(fixed)  # the buffer has something in it: copied, up to the next part
        held.set()

    assert store.get("k") == fixed + fixed[5:25] + b"m" * 40 + b"odd" + fixed
    assert sum(body is fixed for body in sent) == 4 + 2 + 3
    assert not any(body is changing for body in sent)


def test_a_lost_writer_leaves_no_threads(caplog: pytest.LogCaptureFixture) -> None:
    store, _ = make()
    writer = store.multipart("k", part_size="10B")
    writer.write(bytes(35))
    del writer
    gc.collect()
    assert wait_until(lambda: threads() == 0)
    assert "lost before close" in caplog.text


def test_a_child_cannot_go_on_with_it() -> None:
    store, _ = make()
    writer = store.multipart("k", part_size="10B")
    writer.write(bytes(35))

    def refused() -> None:
        with pytest.raises(ClosedError):
            writer.write(b"x")
        writer.abort()

    in_child(refused)
    writer.write(b"y")
    writer.close()
    assert store.get("k") == bytes(35) + b"y"


def test_arguments() -> None:
    with pytest.raises(ConfigError):
        MultipartWriter(MemoryBackend("x"), "k", part_size=0)


def test_lent_memory_is_uploaded_from_where_it_is() -> None:
    sent: list[object] = []

    class Noting(MemoryBackend):
        def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
            sent.append(data.obj if isinstance(data, memoryview) else data)
            return super().upload_part(key, upload_id, number, data)

    backend = Noting(uuid.uuid4().hex)
    store = ObjectStore(backend.url, backend)
    mine = bytearray(os.urandom(35))
    with store.multipart("k", part_size="10B") as writer:
        assert writer.write(mine, copy=False) == 35
        writer.flush()
        mine[30:] = b"-" * 5  # what fills no part was copied
        writer.write(b"end")
    assert store.get("k")[:30] == mine[:30]
    assert store.get("k")[-3:] == b"end"
    assert sum(body is mine for body in sent) == 3
    whole = os.urandom(4096)
    small = ObjectStore(backend.url, backend, options=StoreOptions(part_size="100B"))
    assert small.put("large", array.array("b", whole)).size == 4096
    assert small.get("large") == whole


def test_bytes_in_flight_are_bounded() -> None:
    release = threading.Event()
    running: list[int] = []

    def hold(seen: Seen, moment: Moment) -> None:
        if seen.op == "upload part" and moment == "before":
            running.append(seen.number)
            assert release.wait(600)

    store, _ = make(hook=hold)
    writer = store.multipart("k", part_size="10B", max_in_flight=8, max_bytes=25)
    written: list[int] = []
    thread = threading.Thread(target=lambda: [(writer.write(bytes(10)), written.append(i)) for i in range(6)])
    thread.start()
    assert wait_until(lambda: len(running) == 2 and len(written) == 2)
    thread.join(0.2)  # time to do wrong
    assert (len(running), len(written)) == (2, 2)
    release.set()
    thread.join(600)
    assert writer.close().size == 60
    with store.multipart("alone", part_size="100B", max_bytes=1) as alone:  # a part larger than the bound goes by itself
        alone.write(bytes(350))
    assert store.head("alone").size == 350


def test_an_announced_size_is_kept_and_too_many_parts_are_refused_at_once() -> None:
    store, broken = make()
    with pytest.raises(ConfigError, match="more than 10000 parts") as caught:
        store.multipart("k", part_size="1B", size=10_001)
    assert "part_size" in (caught.value.hint or "")
    assert not broken.seen
    with store.multipart("k", part_size="10B", size=25) as writer:
        writer.write(bytes(25))
    assert store.head("k").size == 25
    for size in (24, 26, 0, 5):
        with pytest.raises(ConfigError, match="announced"), store.multipart("wrong", part_size="10B", size=size) as writer:
            writer.write(bytes(25))
    assert not store.exists("wrong")
    assert list(store.backend.list_multipart()) == []
    huge = 20_000 * store.options.part_size
    writer = store.multipart("huge", size=huge)
    assert writer._next_size() * MAX_PARTS >= huge
    writer.abort()


def test_a_failed_beginning_loses_no_bytes_silently() -> None:
    """The data of the part whose upload could not begin is gone: so is the writer."""
    store, _ = make(Fault("unavailable", op="create upload"))
    writer = store.multipart("k", part_size="10B")
    with pytest.raises(UnavailableError):
        writer.write(bytes(15))
    with pytest.raises(ClosedError):
        writer.close()
    assert not store.exists("k")


def test_parts_come_from_any_thread_in_any_order() -> None:
    backend = MemoryBackend(uuid.uuid4().hex)
    upload = PartUpload(backend, "k", count=20)
    told: list[int] = []
    threads_ = [
        threading.Thread(target=lambda numbers=numbers: [told.append(upload.store(n, bytes([n]) * n)) for n in numbers])
        for numbers in ((20, 3, 9, 12), (1, 2, 4, 5, 6), (19, 18, 17, 16, 15, 14, 13), (7, 8, 10, 11))
    ]
    for thread in threads_:
        thread.start()
    for thread in threads_:
        thread.join()
    assert sorted(told) == [*range(1, 21)], "each count is told once: one thread completes"
    assert len([*backend.list_multipart()]) == 1
    with pytest.raises(StoreError, match="are 210 bytes, not 211"):
        upload.complete(211)
    assert upload.complete(210).size == 210
    assert bytes(backend.get("k")[1]) == b"".join(bytes([n]) * n for n in range(1, 21))
    with pytest.raises(ClosedError):
        upload.store(21, b"late")
    upload.abort()
    assert list(backend.list_multipart()) == []


def test_a_missing_part_is_named_and_a_wrong_object_is_an_error() -> None:
    class Short(MemoryBackend):
        def complete_multipart(self, *args: Any, **more: Any) -> PutResult:
            return replace(super().complete_multipart(*args, **more), size=3)

    backend = Short(uuid.uuid4().hex)
    upload = PartUpload(backend, "k")
    upload.store(1, b"a")
    upload.store(3, b"c")
    with pytest.raises(StoreError, match="part 2 is missing"):
        upload.complete(2)
    upload.store(2, b"bb")
    with pytest.raises(StoreError, match="it has 3 bytes after its upload, not 4"):
        upload.complete(4)
    aborted = PartUpload(backend, "aborted")
    aborted.store(1, b"a")
    aborted.abort()
    with pytest.raises(ClosedError):  # no second upload is begun by a thread that comes late
        aborted.store(2, b"b")
    assert list(backend.list_multipart()) == []


def test_an_open_upload_is_found_and_gone_on_with() -> None:
    backend = MemoryBackend(uuid.uuid4().hex)
    first = PartUpload(backend, "runs/a")
    first.store(1, b"one")
    PartUpload(backend, "runs/b").store(1, b"other")
    (found,) = open_uploads(backend, "runs/", lambda key: key.endswith("a"))
    assert (found.key, [*found.parts], found.parts[1].size) == ("runs/a", [1], 3)
    again = PartUpload(backend, found.key, upload_id=found.upload_id, parts=found.parts)
    assert again.store(2, b"two") == 2
    assert again.complete(6).size == 6
    assert bytes(backend.get("runs/a")[1]) == b"onetwo"
    assert [upload.key for upload in open_uploads(backend)] == ["runs/b"]


# the pool that parts and shards go through


def test_a_pool_keeps_its_first_error_and_cancels_what_has_not_begun() -> None:
    pool = BoundedPool(1, "s3loader-upload-test", max_jobs=8)
    gate = threading.Event()

    def fail() -> None:
        assert gate.wait(600)
        raise KeyError("first")

    failing, after = pool.submit(fail), pool.submit(lambda: 1)
    gate.set()
    assert isinstance(failing.exception(), KeyError)
    assert after.result() == 1
    for call in (pool.check, pool.wait, lambda: pool.submit(lambda: 2)):
        with pytest.raises(KeyError):
            call()
    hold = threading.Event()
    other = BoundedPool(1, "s3loader-upload-test", max_jobs=8)
    running = other.submit(lambda: hold.wait(600))
    waiting = other.submit(lambda: 3)
    assert wait_until(running.running)
    other.stop(0)
    assert waiting.cancelled()
    hold.set()
    pool.stop()

    def refused() -> None:
        with pytest.raises(ClosedError):
            pool.check()

    in_child(refused)
    assert wait_until(lambda: threads() == 0)


def test_results_come_in_order_and_an_error_in_its_place() -> None:
    def work(n: int) -> int:
        if n == 7:
            raise KeyError(n)
        return n * n

    for concurrency in (1, 3):
        got: list[int] = []
        with pytest.raises(KeyError):
            got.extend(map_ordered(work, range(20), concurrency=concurrency, name="s3loader-upload-test"))
        assert got == [n * n for n in range(7)]
        assert [*map_ordered(work, range(5), concurrency=concurrency, name="s3loader-upload-test")] == [0, 1, 4, 9, 16]
    begun: list[int] = []
    results = map_ordered(lambda n: begun.append(n), iter(range(1000)), concurrency=2, name="s3loader-upload-test", ahead=3)
    next(results)
    assert wait_until(lambda: len(begun) >= 3)
    del results
    gc.collect()
    assert wait_until(lambda: threads() == 0)
    assert len(begun) <= 4


def test_an_error_of_the_items_comes_after_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("third")

    for concurrency in (1, 2):
        got: list[int] = []
        with pytest.raises(KeyError):
            got.extend(map_ordered(lambda n: n + 1, items(), concurrency=concurrency, name="s3loader-upload-test"))
        assert got == [2, 3]
