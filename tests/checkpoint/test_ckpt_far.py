"""Saving to a distant store and restoring from it: all connections have work, nothing waits in vain. No seconds are counted."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import events
from s3loader.checkpoint import CheckpointManager, CheckpointOptions
from s3loader.checkpoint.format import segments
from s3loader.checkpoint.reading import targets as reading
from s3loader.checkpoint.writing import staging
from s3loader.checkpoint.writing.staging import BufferPool, Piece, SavedPiece, plan_files, stage
from s3loader.checksum import crc32c, crc32c_base64
from s3loader.errors import IntegrityError
from s3loader.events import OpEvent
from s3loader.store import open_store
from s3loader.store.parts import LEAST_PART, even_parts
from s3loader.testing import FaultProxy, Moment, Rule, Seen, open_faulty_store, recorded, server

MIB = 1 << 20
MOST = 16 * MIB


@given(st.integers(1, 1 << 36), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_parts_fill_every_round_of_the_connections(total: int, connections: int) -> None:
    part = even_parts(total, MOST, connections, LEAST_PART)
    assert LEAST_PART <= part <= MOST + MOST // 16
    # what the busiest connection moves: never more than with parts of the full size, but for the rounding of each
    rounds, before = -(-total // part // connections), -(-total // MOST // connections)
    assert rounds * part <= before * MOST + rounds * 256 * 1024 or part == LEAST_PART
    if part > LEAST_PART:  # and no connection stands idle in any round but for what is rounded
        assert rounds * part * connections <= total + connections * (part + rounds * 256 * 1024)


def test_the_sizes_that_states_have() -> None:
    rounds = {total: -(-total // even_parts(total, MOST, 64, LEAST_PART)) for total in (1 << 30, (1 << 30) + 2944, 512 * MIB)}
    assert set(rounds.values()) <= {61, 62, 63, 64}
    assert even_parts(1 << 40, 1 * MIB, 64, LEAST_PART) == 1 * MIB  # a part size of the caller's own that is smaller


def pieces(sizes: list[int]) -> list[SavedPiece]:
    arrays = [np.random.default_rng(i).integers(0, 256, size, np.uint8) for i, size in enumerate(sizes)]
    return [
        SavedPiece(f"t{i}", "U8", (array.size,), Piece((0,), (array.size,), lambda array=array: memoryview(array)))  # type: ignore[misc]
        for i, array in enumerate(arrays)
    ]


@pytest.mark.parametrize("told", [False, True], ids=["computed", "told by the client"])
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.integers(64, 2000), st.integers(64, 2000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_checksums_of_segments_do_not_depend_on_the_parts(
    told: bool, sizes: list[int], block: int, part: int, hashed: bool
) -> None:
    saved = pieces(sizes)
    (plan,) = plan_files(saved, 0, 1 << 40, block, {}, hashed=hashed, part_of=lambda _: part)
    pool, stored = BufferPool(1 << 20), b""
    for staged in stage(plan, pool, lambda: False, lambda: None):
        assert staged.begin == len(stored)
        staged.checksum(crc32c_base64(staged.data) if told else None)
        stored += bytes(staged.data)
        pool.release(staged.buffer)
    assert len(stored) == plan.size
    record = plan.record()
    want = [crc32c(stored[low:high]) for low, high in segments.cut(0, len(plan.header), block)]
    assert list(np.frombuffer(record.crc, "<u4")) == want
    for piece in saved:
        chunk = piece.chunk(plan)
        cut = segments.cut(chunk.begin, chunk.end, block)
        assert list(np.frombuffer(chunk.crc, "<u4")) == [crc32c(stored[low:high]) for low, high in cut]
        if hashed:
            assert chunk.hash == segments.content_hash(memoryview(stored)[chunk.begin : chunk.end]) or not piece.crcs


def test_a_part_that_was_sent_with_its_checksum_is_not_read_for_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def counting(data: Any, previous: int = 0) -> int:
        nonlocal seen
        seen += len(data)
        return crc32c(data, previous)

    monkeypatch.setattr(staging, "crc32c", counting)
    saved = np.random.default_rng(1).integers(0, 256, 24 * MIB, np.uint8)
    with server("moto") as s3, recorded() as requests, CheckpointManager(s3.open_store(f"{s3.bucket()}/run")) as manager:
        manager.save(1, {"w": saved}).result(600)
        assert np.array_equal(manager.restore()["w"], saved)
        assert manager.open(1).verify() == []
    parts = [event.bytes for event in requests if event.op == "PUTPART"]
    assert sorted(parts)[1:] == [5 * MIB] * 4
    assert sum(parts) > saved.nbytes
    assert seen < 2 * MIB  # the header, and the smaller piece of the part in which a segment ends


def test_what_carries_no_data_is_sent_while_the_state_is_still_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Event()

    def hook(event: OpEvent) -> None:
        if "/intent-" in event.url:
            ready.set()

    plain = staging._from_piece

    def slowly(saved: Any, copies: Any) -> Any:
        assert ready.wait(600), "the intent waits for the copy"
        return plain(saved, copies)

    with server("moto") as s3, CheckpointManager(s3.open_store(f"{s3.bucket()}/run")) as manager:
        manager.save(1, {"w": np.arange(9)}).result(600)
        monkeypatch.setattr(staging, "_from_piece", slowly)
        end = events.subscribe(hook)
        try:
            manager.save(2, {"w": np.arange(9)}).result(600)
        finally:
            end()


def test_a_known_large_restore_begins_with_all_connections_it_has_work_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was measured before: its bytes are known, and the store is distant."""
    monkeypatch.setattr(reading, "LEAST_READ", 64 * 1024)
    state = {f"t{i}": np.random.default_rng(i).integers(0, 256, 2 * MIB, np.uint8) for i in range(3)}
    with server("moto") as s3, FaultProxy(s3.endpoint_url, [Rule("delay", seconds=0.02)]) as proxy:
        with CheckpointManager(s3.open_store(f"{s3.bucket()}/run", endpoint_url=proxy.endpoint_url)) as manager:
            manager.save(1, state).result(600)
            target = {name: np.zeros_like(array) for name, array in state.items()}
            with recorded() as requests:
                manager.restore(1, target=target)
            assert all(np.array_equal(target[name], state[name]) for name in state)
            network = manager.store.network()
            assert network is not None
            assert network.connections == 64
        data = [event for event in requests if event.op == "GET" and event.url.endswith(".safetensors")]
        assert sum(event.bytes for event in data) == 6 * MIB
        assert len(data) == 24  # of 256 KiB, the step that sizes are rounded to


def test_neighbours_of_one_tensor_come_in_one_request() -> None:
    """A tensor does not begin at a multiple of the block, so it has a small segment at its end: no request of its own."""
    store = open_store("memory://neighbours")
    with CheckpointManager(store, options=CheckpointOptions(part_size="4MiB")) as manager:
        state = {f"t{i}": np.full(8 * MIB, i, np.uint8) for i in range(3)}
        manager.save(1, state).result(600)
        target = {name: np.zeros_like(array) for name, array in state.items()}
        with recorded() as requests:
            manager.restore(1, target=target)
        assert all(np.array_equal(target[name], state[name]) for name in state)
    data = [event.bytes for event in requests if event.op == "GET" and event.url.endswith(".safetensors")]
    assert data == [8 * MIB] * 3


@pytest.mark.parametrize("flip", [0, 3 * MIB, 8 * MIB - 1])
def test_a_run_that_is_damaged_anywhere_is_an_error(flip: int, tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, options=CheckpointOptions(part_size="4MiB")) as manager:
        state = {"t": np.full(8 * MIB, 7, np.uint8)}
        manager.save(1, state).result(600)
        (file,) = tmp_path.rglob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[len(data) - 8 * MIB + flip] ^= 1
        file.write_bytes(data)
        with pytest.raises(IntegrityError):
            manager.restore(1, target={"t": np.zeros(8 * MIB, np.uint8)})


def test_what_proves_itself_is_read_once_whatever_the_etag_looks_like() -> None:
    """Of an object that is encrypted with a key of KMS the ETag has 32 hexadecimal digits, and is no MD5."""
    store, backend = open_faulty_store("memory://kms")
    seen: list[str] = []

    def hook(request: Seen, moment: Moment) -> None:
        if request.op == "get" and moment == "before":
            seen.append(request.key)

    with CheckpointManager(store) as manager:
        manager.save(1, {"w": np.arange(9)}).result(600)
    plain = backend.get

    def encrypted(key: str, *args: Any, **kwargs: Any) -> Any:
        meta, data = plain(key, *args, **kwargs)
        return dataclasses.replace(meta, etag=meta.etag and "0" * 32), data

    backend.get = encrypted  # type: ignore[method-assign]
    backend.hook = hook
    with CheckpointManager(store) as manager:
        assert np.array_equal(manager.restore(1)["w"], np.arange(9))
    twice = {key for key in seen if seen.count(key) > 1 and not key.endswith(".safetensors")}
    assert not twice, seen


def test_buffers_of_another_state_are_replaced_within_the_budget() -> None:
    pool = BufferPool(10 * MIB)
    large = pool.take(6 * MIB)
    assert large is not None
    second = pool.take(6 * MIB)  # two there always are
    assert second is not None
    assert pool.take(MIB) is None
    pool.release(large)
    again = pool.take(4 * MIB)
    assert again is not None
    assert len(again) == 6 * MIB
    pool.release(again)
    pool.release(second)
    del large, second, again
    small = pool.take(MIB)  # both are of another state
    assert small is not None
    assert len(small) == MIB
    assert pool.allocated == MIB
    pool.clear()
    assert pool.allocated == MIB
    pool.release(small)
    pool.clear()
    assert pool.allocated == 0
