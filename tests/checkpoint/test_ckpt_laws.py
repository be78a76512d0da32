"""Laws: segments, boxes, any tiling saved and any other tiling restored, every single byte flipped, memory, two jobs."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.checkpoint import ArrayShard, BestN, CheckpointManager, CheckpointOptions, EveryNSteps, LatestN, StepInfo
from s3loader.checkpoint.format import boxes, segments
from s3loader.checkpoint.format.segments import content_hash, joined_hash
from s3loader.checkpoint.writing.incremental import owned
from s3loader.checkpoint.writing.staging import SavedPiece
from s3loader.checksum import crc32c
from s3loader.errors import (
    CheckpointError,
    ConfigError,
    FencedError,
    FormatError,
    IncompleteCheckpointError,
    S3LoaderError,
    StepExistsError,
)
from s3loader.fetch.safetensors import encode_header, parse_header

SMALL = CheckpointOptions(part_size="256B", file_size="2000B", concurrency=2, deadline=300)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 60), st.data())
@settings(max_examples=50, deadline=None)
def test_segments(begin: int, size: int, block: int, data: st.DataObject) -> None:
    end = begin + size
    parts = segments.cut(begin, end, block)
    assert [low for low, _ in parts] + [end] == [begin] + [high for _, high in parts]
    assert len(parts) == segments.count(begin, end, block)
    assert all(low // block == (high - 1) // block for low, high in parts)
    low = data.draw(st.integers(begin, end))
    high = data.draw(st.integers(low, end))
    touched = [i for i, (a, b) in enumerate(parts) if a < high and low < b]
    assert list(segments.covering(begin, end, block, low, high)) == (touched if high > low else [])


def tilings(shape: tuple[int, ...]) -> st.SearchStrategy[list[boxes.Box]]:
    """Exact tilings by recursive cuts: not only grids."""

    def cut(draw: Any, box: boxes.Box, depth: int) -> list[boxes.Box]:
        axes = [d for d, n in enumerate(box[1]) if n > 1]
        if not axes or depth == 0 or not draw(st.booleans()):
            return [box]
        axis = draw(st.sampled_from(axes))
        at = draw(st.integers(1, box[1][axis] - 1))
        left = (box[0], (*box[1][:axis], at, *box[1][axis + 1 :]))
        offset = (*box[0][:axis], box[0][axis] + at, *box[0][axis + 1 :])
        right = (offset, (*box[1][:axis], box[1][axis] - at, *box[1][axis + 1 :]))
        return cut(draw, left, depth - 1) + cut(draw, right, depth - 1)

    return st.composite(lambda draw: cut(draw, ((0,) * len(shape), shape), 4))()


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


@given(st.data(), shapes)
@settings(max_examples=50, deadline=None)
def test_a_tiling_is_told_from_gaps_and_overlaps(data: st.DataObject, shape: tuple[int, ...]) -> None:
    tiles = data.draw(tilings(shape))
    assert boxes.problem_in_tiling(shape, tiles) is None
    victim = data.draw(st.integers(0, len(tiles) - 1))
    assert "missing" in str(boxes.problem_in_tiling(shape, tiles[:victim] + tiles[victim + 1 :]))
    assert "overlap" in str(boxes.problem_in_tiling(shape, [*tiles, tiles[victim]]))


def shard(full: np.ndarray[Any, Any], box: boxes.Box) -> ArrayShard:
    index = tuple(slice(o, o + n) for o, n in zip(*box, strict=True))
    return ArrayShard(np.array(full[index]), box[0], full.shape)


@given(st.data(), shapes, st.sampled_from([np.int8, np.float32, np.complex128]))
@settings(max_examples=30, deadline=None)
def test_saved_in_one_tiling_restored_in_another(data: st.DataObject, shape: tuple[int, ...], dtype: Any) -> None:
    full = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    saved, wanted = data.draw(tilings(shape)), data.draw(tilings(shape))
    url = f"memory://{next(_serial)}-reshard"
    world = len(saved)
    errors: list[BaseException] = []

    def save(rank: int) -> None:
        try:
            with CheckpointManager(url, rank=rank, world_size=world, job="j", options=SMALL) as manager:
                manager.save(1, {"w": shard(full, saved[rank]), "same": full}).result(600)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with CheckpointManager(url) as manager:
        checkpoint = manager.open()
        assert np.array_equal(checkpoint["w"], full)
        assert np.array_equal(checkpoint["same"], full)
        for box in wanted:
            target = shard(np.zeros_like(full), box)
            assert checkpoint.restore({"w": target})["w"] is target
            assert np.array_equal(target.array, shard(full, box).array)


_serial = itertools.count()


def test_ranks_that_leave_gaps_or_differ_do_not_commit() -> None:
    full = np.arange(12.0)
    cases: list[tuple[list[Any], str]] = [
        ([ArrayShard(full[:6], (0,), (12,)), ArrayShard(full[7:], (7,), (12,))], "1 of 12 elements are missing"),
        ([ArrayShard(full[:7], (0,), (12,)), ArrayShard(full[6:], (6,), (12,))], "overlap"),
        ([full, full + 1], "is not the same on all ranks"),
        ([{"a": 1}, {"a": 2}], "'w/a' is not the same on rank 0 and rank 1"),
        ([{"a": 1}, {"b": 1}], "is not the same on rank 0 and rank 1"),
        ([[1, 2], [1]], "'w/1' is not the same on rank 0 and rank 1"),
    ]
    for values, message in cases:
        url = f"memory://{next(_serial)}-gaps"
        found: list[str] = []

        def save(rank: int, url: str = url, values: list[Any] = values, found: list[str] = found) -> None:
            manager = CheckpointManager(url, rank=rank, world_size=2, job="j", options=CheckpointOptions(deadline=0.3))
            try:
                manager.save(1, {"w": values[rank]}).result(600)
            except CheckpointError as error:
                found.append(str(error))

        threads = [threading.Thread(target=save, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 2
        assert any(message in text for text in found), found
        assert CheckpointManager(url).latest() is None


def test_a_missing_rank_is_named_before_the_deadline() -> None:
    url = f"memory://{next(_serial)}-missing"
    with pytest.raises(ConfigError, match="several ranks, but no name"):
        CheckpointManager(url, rank=0, world_size=3).save(1, {})
    with pytest.raises(IncompleteCheckpointError, match="rank 0 of job 'j' did not begin") as joined:
        CheckpointManager(url, rank=1, world_size=3, job="j", options=CheckpointOptions(deadline=0.1)).save(1, {})
    assert joined.value.missing == [0]
    manager = CheckpointManager(url, rank=0, world_size=3, job="j", options=CheckpointOptions(deadline=0.1))
    with pytest.raises(IncompleteCheckpointError, match=r"ranks \[1, 2\] have not finished") as caught:
        manager.save(1, {"a": 1}).result(600)
    assert caught.value.missing == [1, 2]


def test_every_single_byte_flipped_is_an_error_or_no_difference(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"w": np.arange(5, dtype=np.int16), "e": {"x": 1.5, "s": "a"}}
    with CheckpointManager(tmp_path / "good", options=SMALL) as manager:
        manager.save(7, saved).result(600)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    silent = 0
    for path in sorted((tmp_path / "bad" / "ckpt").rglob("*")):
        if path.is_dir():
            continue
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            with CheckpointManager(tmp_path / "bad", options=SMALL) as manager:
                try:
                    restored = manager.restore(7)
                except S3LoaderError:
                    continue
                silent += 1
                assert np.array_equal(restored["w"], saved["w"]), (path, at)
                assert restored["e"] == saved["e"], (path, at)
                if path.suffix == ".safetensors":  # its header is not needed to restore, but `verify` reads it
                    assert manager.open(7).verify() != [], at
        path.write_bytes(content)
    assert silent > 0


def test_two_jobs_on_one_path_never_mix(tmp_path: Path) -> None:
    outcomes: list[tuple[int, int, str]] = []

    def job(number: int) -> None:
        manager = CheckpointManager(tmp_path, options=SMALL, keep=LatestN(3))
        for step in range(1, 9):
            try:
                manager.save(step, {"who": number, "w": np.full(50, number)}).result(600)
                outcomes.append((number, step, "saved"))
            except (StepExistsError, FencedError) as error:
                outcomes.append((number, step, type(error).__name__))

    threads = [threading.Thread(target=job, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with CheckpointManager(tmp_path) as manager:
        steps = manager.steps()
        assert steps
        for step in steps:
            restored = manager.restore(step)
            assert np.array_equal(restored["w"], np.full(50, restored["who"]))
        for step in range(1, 9):
            assert sum(s == step and what == "saved" for _, s, what in outcomes) <= 1


MEMORY = """
import os, resource, sys
import numpy as np
from s3loader.checkpoint import CheckpointManager, CheckpointOptions

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

MIB = 1 << 20
state = {f"t{i}": np.full(24 * MIB, i, np.uint8) for i in range(8)}
manager = CheckpointManager(sys.argv[1], options=CheckpointOptions(staging_budget="48MiB", part_size="8MiB", concurrency=2))
manager.save(0, {"warm": np.zeros(9 * MIB, np.uint8)}).result()
before = peak()
manager.save(1, {"state": state}).result()
saving = peak() - before
before = peak()
manager.restore(1, {"state": state})
print(saving, peak() - before)
"""


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=600, check=True
    )
    saving, loading = map(int, done.stdout.split())
    assert saving < (48 + 24) << 20  # the budget, and what the interpreter takes beside it; the state has 192 MiB
    assert loading < 64 << 20


@given(st.lists(st.tuples(st.sampled_from(["F32", "U8", "C128", "BF16"]), shapes), max_size=6))
@settings(max_examples=30, deadline=None)
def test_headers(tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header, spans = encode_header(((f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors)), {"k": "v"})
    assert len(header) % 64 == 0
    entries, metadata = parse_header(header)
    assert metadata == {"k": "v"}
    assert sorted(((e.begin, e.end) for e in entries), key=str) == sorted(spans, key=str)
    with pytest.raises(FormatError):
        parse_header(header[:-1])
    with pytest.raises(FormatError):
        parse_header(b"\xff" * 16)


@given(st.lists(st.binary(max_size=40), max_size=6))
@settings(max_examples=30, deadline=None)
def test_hashes_join(pieces: list[bytes]) -> None:
    from s3loader.checkpoint.format.segments import crc64

    told = [(crc32c(p), crc64(memoryview(p)), len(p)) for p in pieces]
    assert joined_hash(told) == content_hash(memoryview(b"".join(pieces)))


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_every_shared_tensor_has_one_owner(sizes: list[int], world: int) -> None:
    from s3loader.adapters import Piece

    def pieces() -> list[SavedPiece]:
        return [SavedPiece(f"t{i}", "U8", (n,), Piece((0,), (n,), lambda: memoryview(b""))) for i, n in enumerate(sizes)]

    owners = [{p.name for p in owned(pieces(), rank, world)[0]} for rank in range(world)]
    assert sorted(itertools.chain.from_iterable(owners)) == sorted(f"t{i}" for i in range(len(sizes)))


def test_policies() -> None:
    infos = [
        StepInfo(s, {"loss": m} if m is not None else {}) for s, m in [(10, 3.0), (20, 1.0), (25, None), (30, 1.0), (40, 2.0)]
    ]
    assert LatestN(2).keep(infos) == {30, 40}
    assert EveryNSteps(20).keep(infos) == {20, 40}
    assert BestN("loss").keep(infos) == {30}
    assert BestN("loss", 2, mode="max").keep(infos) == {10, 40}
    assert (LatestN(1) | BestN("loss", 2)).keep(infos) == {20, 30, 40}
    assert LatestN(2).keep([]) == set()
    for wrong in (lambda: LatestN(0), lambda: EveryNSteps(0), lambda: BestN("x", 0), lambda: BestN("x", mode="top")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            wrong()
