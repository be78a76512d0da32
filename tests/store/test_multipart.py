"""The multipart writer: order, bounds, back-pressure, and errors that come out."""

from __future__ import annotations

import gc
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from forking import in_child
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.errors import ClosedError, ConfigError, ObjectExistsError, S3LoaderError, UnavailableError
from s3loader.store import ObjectStore
from s3loader.store.memory import MemoryBackend
from s3loader.store.multipart import MultipartWriter, part_size_for, part_size_of
from s3loader.store.options import MAX_PARTS
from s3loader.store.wrappers.fault import Fault, FaultBackend, Moment, Seen
from s3loader.types import Buffer, PartResult, Update

TIB = 1 << 40


def make(*faults: Fault, hook: Callable[[Seen, Moment], None] | None = None) -> tuple[ObjectStore, FaultBackend]:
    broken = FaultBackend(MemoryBackend(uuid.uuid4().hex), faults, hook=hook)
    return ObjectStore(broken.url, broken), broken


def threads() -> int:
    return sum(thread.name.startswith("s3loader-upload") for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
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
    with store.multipart("k", part_size=part_size, max_in_flight=in_flight) as writer:
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
    with store.multipart("k", part_size=3, max_in_flight=1) as writer:
        for _ in range(10):
            writer.write(bytes(1001))
    assert sizes[:900] == [3] * 900
    assert sizes[900:1800] == [6] * 900
    assert sizes[1800:-1] == [12] * (len(sizes) - 1801)
    assert sum(sizes) == writer.tell() == store.head("k").size == 10_010


def test_no_more_than_the_allowed_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3loader.store.multipart.MAX_PARTS", 3)
    store, _ = make()
    writer = store.multipart("k", part_size=1)
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
            assert release.wait(30)

    store, _ = make(hook=hold)
    written: list[int] = []
    writer = store.multipart("k", part_size=10, max_in_flight=2)

    def write() -> None:
        for i in range(8):
            writer.write(bytes([i]) * 10)
            written.append(i)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive(), "it does not wait"
    assert len(running) == 2
    assert written == [0, 1]
    release.set()
    thread.join(30)
    writer.close()
    assert store.get("k") == b"".join(bytes([i]) * 10 for i in range(8))
    assert threads() == 0


@pytest.mark.parametrize("surfaces_at", ["write", "flush", "close", "reserve"])
def test_an_error_of_a_part_comes_out(surfaces_at: str) -> None:
    gate = threading.Event()

    def hold(seen: Seen, moment: Moment) -> None:
        if seen.fault:
            assert gate.wait(30)

    store, broken = make(Fault("unavailable", op="upload part", nth=2), hook=hold)
    writer = store.multipart("k", part_size=10, max_in_flight=2)
    writer.write(bytes(20))
    gate.set()
    assert wait_until(lambda: writer._error is not None)
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
    with pytest.raises(KeyError), store.multipart("k", part_size=10) as writer:  # noqa: PT012 - the block is the test
        writer.write(bytes(35))
        raise KeyError
    assert not store.exists("k")
    assert list(store.backend.list_multipart()) == []
    with pytest.raises(ClosedError, match="aborted"):
        writer.write(b"x")
    writer.abort()


def test_abort_inside_the_block_is_no_error() -> None:
    store, _ = make()
    with store.multipart("k", part_size=10) as writer:
        writer.write(bytes(35))
        writer.abort()
    assert not store.exists("k")
    assert list(store.backend.list_multipart()) == []


def test_an_abort_that_fails_does_not_hide_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    store, _ = make(Fault("unavailable", op="abort upload", times=None))
    with pytest.raises(KeyError), store.multipart("k", part_size=10) as writer:  # noqa: PT012 - the block is the test
        writer.write(bytes(35))
        raise KeyError
    assert "may be left behind" in caplog.text


def test_a_failed_create_and_completion() -> None:
    store, _ = make(Fault("unavailable", op="create upload"))
    writer = store.multipart("k", part_size=10)
    with pytest.raises(UnavailableError):
        writer.write(bytes(35))
    store, _ = make(Fault("unavailable", op="complete upload"))
    with pytest.raises(UnavailableError), store.multipart("k", part_size=10) as writer:
        writer.write(bytes(35))
    assert list(store.backend.list_multipart()) == []
    assert not store.exists("k")


@pytest.mark.parametrize("size", [0, 5, 25])
def test_conditions_hold_for_every_size(size: int) -> None:
    store, _ = make()
    old = store.put("k", b"old")
    with pytest.raises(ObjectExistsError), store.multipart("k", part_size=10, mode="create") as writer:
        writer.write(bytes(size))
    assert store.get("k") == b"old"
    with store.multipart("k", part_size=10, mode=Update(old.etag)) as writer:
        writer.write(bytes(size))
    assert store.get("k") == bytes(size)
    assert list(store.backend.list_multipart()) == []


def test_what_fits_a_part_is_one_put() -> None:
    store, broken = make()
    for size in (0, 1, 9):
        with store.multipart(f"{size}", part_size=10, content_type="a/b", metadata={"x": "y"}) as writer:
            writer.write(bytes(size))
        meta = store.head(f"{size}")
        assert (meta.size, meta.content_type, dict(meta.metadata)) == (size, "a/b", {"x": "y"})
    assert {seen.op for seen in broken.seen} == {"put", "head"}


def test_close_twice_gives_the_same() -> None:
    store, _ = make()
    writer = store.multipart("k", part_size=10)
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
    writer = store.multipart("k", part_size=10)
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
    import array

    store, _ = make()
    with store.multipart("k", part_size=10) as writer:
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
            assert held.wait(20)
            sent.append(data.obj if isinstance(data, memoryview) else data)
            return super().upload_part(key, upload_id, number, data)

    backend = Slow(uuid.uuid4().hex)
    store = ObjectStore(backend.url, backend)
    fixed, changing = bytes(range(40)), bytearray(b"m" * 20)
    with store.multipart("k", part_size=10, max_in_flight=20) as writer:
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
    writer = store.multipart("k", part_size=10)
    writer.write(bytes(35))
    del writer
    gc.collect()
    assert wait_until(lambda: threads() == 0)
    assert "lost before close" in caplog.text


def test_a_child_cannot_go_on_with_it() -> None:
    store, _ = make()
    writer = store.multipart("k", part_size=10)
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
