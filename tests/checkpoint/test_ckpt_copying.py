"""Staging: every byte copied twice on its way (into staging memory, into the socket), by several threads, within the budget."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.adapters import Piece
from s3loader.checkpoint import CheckpointManager, CheckpointOptions, LatestN
from s3loader.checkpoint.format import segments
from s3loader.checkpoint.reading import targets as reading
from s3loader.checkpoint.reading.targets import DataFile
from s3loader.checkpoint.writing import copying
from s3loader.checkpoint.writing.copying import Copier
from s3loader.checkpoint.writing.staging import BufferPool, SavedPiece, StagedPart, plan_files, stage
from s3loader.errors import CheckpointError
from s3loader.store import MemoryBackend
from s3loader.store.s3.connection import Connection
from s3loader.testing import Server, server

MIB = 1 << 20
PART = 5 * MIB  # the least that S3 takes


def span(view: Any) -> tuple[int, int]:
    """Address of the first byte and of the one behind the last."""
    array = np.frombuffer(view, np.uint8)
    at = int(array.ctypes.data)
    return at, at + array.nbytes


def within(view: Any, regions: Sequence[tuple[int, int]]) -> bool:
    first, last = span(view)
    return any(low <= first and last <= high for low, high in regions)


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("moto") as running:
        yield running


def torch_state(rng: np.random.Generator) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {str(i): torch.from_numpy(rng.standard_normal(MIB).astype(np.float32)) for i in range(5)}


def numpy_state(rng: np.random.Generator) -> dict[str, Any]:
    return {str(i): rng.standard_normal(MIB).astype(np.float32) for i in range(5)}


@pytest.mark.parametrize("make", [numpy_state, torch_state])
def test_each_byte_is_copied_twice(s3: Server, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    state = make(np.random.default_rng(0))
    arrays = [np.asarray(value) for value in state.values()]
    size = sum(array.nbytes for array in arrays)
    staged: list[tuple[memoryview, memoryview]] = []
    sent: list[tuple[Any, int]] = []
    copy, send = Copier.copy, Connection.send

    def counted_copy(self: Copier, target: memoryview, source: memoryview) -> None:
        staged.append((target, source))
        copy(self, target, source)

    def counted_send(self: Connection, pieces: Sequence[Any]) -> list[memoryview]:
        left = send(self, pieces)
        done = sum(map(len, pieces)) - sum(map(len, left))
        for piece in pieces:
            went = min(done, len(piece))
            done -= went
            if went:
                sent.append((piece, went))
        return left

    store = s3.open_store(s3.bucket() + "/run")
    with CheckpointManager(store, options=CheckpointOptions(part_size=PART, concurrency=2)) as manager:
        manager.save(1, state).result(600)  # the buffers are made
        buffers = [span(buffer) for buffer in manager.pool._free]
        monkeypatch.setattr(Copier, "copy", counted_copy)
        monkeypatch.setattr(Connection, "send", counted_send)
        tracemalloc.start()
        try:
            result = manager.save(2, state).result(600)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert [span(buffer) for buffer in sorted(manager.pool._free, key=span)] == sorted(buffers)  # no more were made
        header = result.written - size
        assert 0 < header < 4096

        # the first copy: from the caller's own memory into a staging buffer, each byte once
        sources = [source for _, source in staged]
        assert sum(map(len, sources)) == result.written
        mine = [span(array) for array in arrays]
        assert [len(source) for source in sources if not within(source, mine)] == [header]
        assert sum(len(source) for source in sources if within(source, mine)) == size
        assert all(within(target, buffers) for target, _ in staged)

        # the second: the kernel's, out of that buffer, each byte once; what else is sent are heads of requests
        assert sum(went for piece, went in sent if within(piece, buffers)) == result.written
        assert all(len(piece) < 4096 for piece, _ in sent if not within(piece, buffers))

        # and nothing was copied beside that, to be thrown away
        assert peak < MIB


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12 * MIB), max_size=5), st.integers(1, 4), st.integers(0, 2**32))
def test_copies_are_copies(sizes: list[int], threads: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, 1 << 16, np.uint8)
    sources = [np.resize(noise, size) for size in sizes]
    targets = [np.zeros(size, np.uint8) for size in sizes]
    with Copier(threads) as copier:
        for source, target in zip(sources, targets, strict=True):
            copier.copy(memoryview(target), memoryview(source))
        copier.settle()
        for source, target in zip(sources, targets, strict=True):
            assert np.array_equal(source, target)
    assert not [t for t in threading.enumerate() if t.name.startswith("s3loader-ckpt-copy")]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_copy_that_fails_is_raised(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    def broken(self: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(copying._Copy, "make", broken)
    with pytest.raises(MemoryError), Copier(threads) as copier:
        copier.copy(memoryview(bytearray(32 * MIB)), memoryview(bytes(32 * MIB)))
    assert not [t for t in threading.enumerate() if t.name.startswith("s3loader-ckpt-copy")]


def pieces(sizes: Sequence[int]) -> tuple[list[SavedPiece], bytes]:
    data = [np.random.default_rng(i).integers(0, 256, size, np.uint8) for i, size in enumerate(sizes)]
    saved = [
        SavedPiece(f"t{i}", "U8", (array.size,), Piece((0,), (array.size,), lambda array=array: memoryview(array)))  # type: ignore[misc]
        for i, array in enumerate(data)
    ]
    return saved, b"".join(array.tobytes() for array in data)


@pytest.mark.parametrize("buffers", [2, 3, 100])
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_stage_needs_no_more_buffers_than_there_are(buffers: int, threads: int | None) -> None:
    saved, data = pieces([3 * MIB, 5, 7 * MIB + 3, 0, 1000, 4 * MIB])
    (plan,) = plan_files(saved, 0, 1 << 40, MIB, {}, hashed=False)
    pool = BufferPool(buffers * MIB)
    found: dict[int, bytes] = {}
    copier = Copier(threads) if threads is not None else None
    for part in stage(plan, pool, lambda: False, lambda: None, copier=copier):
        part.checksum()
        found[part.number] = bytes(part.data)
        pool.release(part.buffer)
    if copier is not None:
        copier.__exit__(None, None, None)
    assert b"".join(found[n] for n in sorted(found)) == plan.header + data
    assert sorted(found) == list(range(1, len(found) + 1))
    assert len(pool._free) == pool.allocated // MIB <= buffers


def release_all(parts: Iterator[StagedPart], pool: BufferPool) -> None:
    for part in parts:
        pool.release(part.buffer)


@pytest.mark.parametrize("threads", [None, 3])
def test_buffers_come_back_when_staging_ends_early(threads: int | None) -> None:
    saved, _ = pieces([9 * MIB, 9 * MIB])
    saved[1].piece = saved[1].piece._replace(open=lambda: memoryview(b"too short"))
    (plan,) = plan_files(saved, 0, 1 << 40, MIB, {}, hashed=False)
    pool = BufferPool(64 * MIB)
    copier = Copier(threads) if threads is not None else None
    try:
        parts = stage(plan, pool, lambda: False, lambda: None, copier=copier)
        with pytest.raises(CheckpointError, match="'t1' gave 9 bytes, its type and shape need 9437184"):
            release_all(parts, pool)
        stop = stage(plan_files(pieces([9 * MIB])[0], 0, 1 << 40, MIB, {}, hashed=False)[0], pool, lambda: True, lambda: None)
        assert list(stop) == []
        goes = stage(plan_files(pieces([9 * MIB])[0], 0, 1 << 40, MIB, {}, hashed=False)[0], pool, lambda: False, lambda: None)
        pool.release(next(goes).buffer)
        goes.close()  # type: ignore[attr-defined]
    finally:
        if copier is not None:
            copier.__exit__(None, None, None)
    assert len(pool._free) == pool.allocated // MIB > 0


def test_as_much_is_under_way_as_the_memory_lent_for_it_allows() -> None:
    file = DataFile("k", "e")
    block = segments.BLOCK

    def group(number: int, size: int, *, direct: bool) -> Any:
        segment = reading._Segment(number * block, number * block + size, 0, "t")
        sink = reading._Sink(reading._Memory(lambda: memoryview(b""), lambda _: None), 0, segment.low, segment.high)
        segment.sinks = [sink] if direct else [sink, sink]
        return file, [segment]

    large = [group(i, block, direct=True) for i in range(100)]
    assert reading._window(large) == reading._IN_PLACE_WINDOW
    assert reading._window([]) == reading._IN_PLACE_WINDOW
    small = [group(i, 300_000, direct=False) for i in range(100)]
    assert reading._window(g for pair in zip(large, small, strict=True) for g in pair) == reading._IN_PLACE_WINDOW
    dense = [group(i, 8 * MIB, direct=False) for i in range(7)]
    assert reading._window([*large, *dense]) == reading._WINDOW
    assert reading._window([*dense[:4], *large, *dense[4:]]) == reading._IN_PLACE_WINDOW


def test_what_was_saved_or_restored_goes_with_its_last_reference(tmp_path: Path) -> None:
    state = {"a": np.arange(1000.0), "large": np.zeros(8 * MIB, np.uint8)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state).result(600)
        target = {name: np.empty_like(array) for name, array in state.items()}
        gc.collect()
        gc.disable()
        try:
            restored = manager.restore()
            manager.restore(target=target)
            manager.save(2, state).result(600)
            seen = [weakref.ref(array) for array in (*restored.values(), *target.values(), *state.values())]
            restored.clear()
            target.clear()
            state.clear()
            assert [ref() is None for ref in seen] == [True] * 6
        finally:
            gc.enable()


def test_only_the_first_save_asks_the_store_in_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    verbs = ("get", "put", "head", "list", "delete", "delete_many", "create_multipart", "upload_part", "complete_multipart")
    for verb in verbs:
        original = getattr(MemoryBackend, verb)

        def watched(self: MemoryBackend, *args: Any, verb: str = verb, original: Any = original, **options: Any) -> Any:
            asked.append((verb, threading.current_thread() is threading.main_thread()))
            return original(self, *args, **options)

        monkeypatch.setattr(MemoryBackend, verb, watched)
    state = {"w": np.arange(100_000.0)}
    options = CheckpointOptions(part_size=1 << 17)
    with CheckpointManager("memory://asks/run", keep=LatestN(2), options=options) as manager:
        manager.save(1, state).result(600)
        assert any(here for _, here in asked)  # it begins the session
        for step in (2, 3, 4):
            asked.clear()
            manager.save(step, state).result(600)
            assert len(asked) > 8
            assert [verb for verb, here in asked if here] == []
