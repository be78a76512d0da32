"""Compaction of tombstones: what is dead stays dead, what is alive is found, and nothing grows for ever."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.checkpoint import CheckpointManager, CheckpointOptions, LatestN
from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Part
from s3loader.checkpoint.protocol.merge import Merged
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.protocol.tombstones import pack, unpack
from s3loader.errors import CheckpointNotFoundError, CommitUnknownError, FencedError, StepExistsError
from s3loader.store import ObjectStore, open_store

PLAIN = CheckpointOptions(part_size="4096B")


def manager_at(path: Path, **kwargs: Any) -> CheckpointManager:
    return CheckpointManager(path, options=PLAIN, **kwargs)


def keys(path: Path) -> list[str]:
    with open_store(path) as store:
        return [entry.key for entry in store.list("ckpt/")]


def save(manager: CheckpointManager, step: int) -> None:
    manager.save(step, {"a": np.full(3, step)}).result(600)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 10**12 - 1) | st.integers(0, 50).map(lambda n: n * 100), st.integers(1, 3)))
def test_a_mark_is_what_was_packed(dead: dict[int, int]) -> None:
    data = records.encode(pack(dead))
    assert unpack(records.decode(data, records.Compacted, "x")) == dead
    assert records.encode(pack(dict(sorted(dead.items(), reverse=True)))) == data


def test_a_mark_is_small() -> None:
    regular = {step: 1 for step in range(0, 4_000_000, 100) if step % 100_000}
    assert len(records.encode(pack(regular))) < 1000  # 40,000 deleted steps, and 40 that were kept
    irregular = dict.fromkeys(np.cumsum(np.random.default_rng(0).integers(1, 200, 40_000)).tolist(), 1)
    assert len(records.encode(pack(irregular))) < 500_000


def test_tombstones_go_and_steps_stay(tmp_path: Path) -> None:
    with manager_at(tmp_path, keep=LatestN(2)) as manager:
        for step in range(0, 100, 10):
            save(manager, step)
        assert len([k for k in keys(tmp_path) if k.endswith("root.jsonl")]) == 10
        assert manager.gc(grace=1000).compacted == []  # they are young
        would = manager.gc(grace=0, dry_run=True)
        assert would.compacted == list(range(0, 80, 10))
        assert len([k for k in keys(tmp_path) if k.endswith("root.jsonl")]) == 10
        assert manager.gc(grace=0).compacted == would.compacted
        assert {k.split("/")[1] for k in keys(tmp_path)} == {"000000000080", "000000000090", "compacted.json"}
        assert manager.steps() == [80, 90]
        assert manager.latest() == 90
        assert manager.gc(grace=0).compacted == []
        with pytest.raises(CheckpointNotFoundError, match="was deleted"):
            manager.open(30)
    with manager_at(tmp_path) as fresh:
        assert fresh.steps() == [80, 90]
        assert [root.step for root in fresh.run.newest_first()] == [90, 80]
        with pytest.raises(CheckpointNotFoundError, match="was deleted"):
            fresh.find(30)


@pytest.mark.parametrize("collect", [False, True], ids=["tombstone", "compacted"])
def test_a_deleted_step_can_be_saved_again(tmp_path: Path, collect: bool) -> None:
    with manager_at(tmp_path) as manager, manager_at(tmp_path) as other:
        for generation in range(3):
            save(manager, 7)
            with pytest.raises(StepExistsError):
                manager.save(7, {"a": 1}).result(600)
            manager.save(7, {"a": np.full(3, 70 + generation)}, on_exists="replace").result(600)
            for each in (manager, other):
                assert each.steps() == [7]
                assert each.latest() == 7
                assert each.find(7).generation == generation
                assert each.restore(7)["a"].tolist() == [70 + generation] * 3
                assert each.open().verify() == []
            other.delete(7)
            assert manager.latest() is None
            if collect:
                other.gc(grace=0)
                assert keys(tmp_path) == [layout.COMPACTED]
    with manager_at(tmp_path) as fresh:
        assert fresh.latest() is None
        save(fresh, 7)
        assert fresh.find().generation == 3
        fresh.gc(grace=0)
        assert [k for k in keys(tmp_path) if "root" in k] == [layout.root_key(7, 3)]
        assert fresh.steps() == [7]


class Paused:
    """A backend whose root writes wait."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if "/root" in key:
            self.reached.set()
            assert self.go_on.wait(600)
        return self._inner.put(key, *args, **kwargs)


def test_a_root_that_comes_after_its_tombstone_was_compacted_counts_for_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    slow = Paused(store.backend)
    backend: Any = slow
    with manager_at(tmp_path) as other, CheckpointManager(ObjectStore(store.url, backend), options=PLAIN) as stalled:
        save(other, 1)
        handle = stalled.save(5, {"a": np.zeros(3)})
        assert slow.reached.wait(600)
        assert other.gc(grace=0).fenced == [5]
        assert other.gc(grace=0).compacted == [5]
        assert layout.root_key(5) not in keys(tmp_path)
        slow.go_on.set()
        with pytest.raises(CommitUnknownError, match="step 5 was deleted") as caught:
            handle.result(600)
        assert caught.value.hint
        assert layout.root_key(5) in keys(tmp_path)  # it has come through
        for manager in (other, stalled, manager_at(tmp_path)):
            assert manager.latest() == 1
            assert manager.steps() == [1]
            with pytest.raises(CheckpointNotFoundError):
                manager.find(5)
    with manager_at(tmp_path) as later:
        save(later, 5)  # and does not stand in the way
        assert later.steps() == [1, 5]
        later.gc(grace=0)
        assert layout.root_key(5) not in keys(tmp_path)
        assert later.restore(5)["a"].tolist() == [5] * 3


@pytest.mark.parametrize("compacted", [False, True])
def test_a_stalled_save_of_a_deleted_step_is_fenced_where_it_writes(tmp_path: Path, compacted: bool) -> None:
    store = open_store(tmp_path)
    slow = Paused(store.backend)
    backend: Any = slow
    with manager_at(tmp_path) as other, CheckpointManager(ObjectStore(store.url, backend), options=PLAIN) as stalled:
        save(other, 1)
        save(other, 5)
        other.delete(5)
        if compacted:
            other.gc(grace=0)
        handle = stalled.save(5, {"a": np.zeros(3)})  # as generation 1
        assert slow.reached.wait(600)
        report = other.gc(grace=0)
        assert (report.fenced, report.skipped) == ([5], {})
        slow.go_on.set()
        with pytest.raises((FencedError, CommitUnknownError)):
            handle.result(600)  # its files are gone
        assert manager_at(tmp_path).steps() == [1]


def test_a_stalled_save_of_a_compacted_step_is_fenced(tmp_path: Path) -> None:
    """The tombstone must be of the generation that the writer is in."""
    with manager_at(tmp_path) as other:
        save(other, 5)
        other.delete(5)
        other.gc(grace=0)
    store = open_store(tmp_path)
    slow = Paused(store.backend)
    backend: Any = slow
    with manager_at(tmp_path) as other, CheckpointManager(ObjectStore(store.url, backend), options=PLAIN) as stalled:
        handle = stalled.save(5, {"a": np.zeros(3)})
        assert slow.reached.wait(600)
        assert other.gc(grace=0).fenced == [5]
        slow.go_on.set()
        with pytest.raises(FencedError, match="was retired"):
            handle.result(600)
        assert other.steps() == []
        assert other.latest() is None
        other.gc(grace=0)
        assert keys(tmp_path) == [layout.COMPACTED]


def test_a_compaction_can_be_cut_off_before_every_write(tmp_path: Path) -> None:
    class Dies:
        def __init__(self, inner: Any, after: int) -> None:
            self._inner, self._left = inner, after

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._inner, name)
            if name not in ("put", "delete", "delete_many"):
                return found

            def write(*args: Any, **kwargs: Any) -> Any:
                self._left -= 1
                if self._left < 0:
                    raise KeyboardInterrupt
                return found(*args, **kwargs)

            return write

    ended = False
    for after in range(20):
        path = tmp_path / str(after)
        with manager_at(path, keep=LatestN(1)) as manager:
            for step in range(4):
                save(manager, step)
        store = open_store(path)
        dying: Any = Dies(store.backend, after)
        try:
            CheckpointManager(ObjectStore(store.url, dying), options=PLAIN).gc(grace=0)
            ended = True
        except KeyboardInterrupt:
            pass
        with manager_at(path) as manager:
            assert manager.steps() == [3]
            assert manager.latest() == 3
            manager.gc(grace=0)
            assert manager.steps() == [3]
            save(manager, 1)
            assert manager.steps() == [1, 3]
            assert len([k for k in keys(path) if "/root" in k]) == 2
        if ended:
            assert after >= 4
            return
    pytest.fail("it never ended")


def test_processes_that_mark_at_once_lose_nothing(tmp_path: Path) -> None:
    stores = [open_store(tmp_path) for _ in range(4)]
    runs = [Run(store) for store in stores]
    runs[0].prepare()
    threads = [
        threading.Thread(target=lambda run=run, i=i: [run.tombstones.add({100 * i + n: 0}) for n in range(5)])
        for i, run in enumerate(runs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in [*runs, Run(stores[0])]:
        run.tombstones.refresh()
        assert sum(run.tombstones.generation(step) for step in range(400)) == 20
    for store in stores:
        store.close()


def test_ranks_that_saw_different_roots_do_not_commit() -> None:
    def part(rank: int, expects: str) -> Part:
        return Part(
            format=1, step=1, epoch=1, attempt="x", rank=rank, world=2, time=0, block=4096, files=[], chunks=[],
            tree={"$": "dict", "of": {}}, expects=expects,
        )  # fmt: skip

    Merged([part(0, "0:"), part(1, "0:")])
    with pytest.raises(FencedError, match="step 1") as caught:
        Merged([part(0, "0:"), part(1, "1:")])
    assert caught.value.hint
