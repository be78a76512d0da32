"""Incremental saves, preemption, the simple functions, and ranks that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader.checkpoint import (
    ArrayShard,
    CheckpointManager,
    CheckpointOptions,
    LatestN,
    Preemption,
    load,
    open_checkpoint,
    save,
)
from s3loader.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    FencedError,
    IncompleteCheckpointError,
    S3LoaderError,
    StoreError,
)
from s3loader.store import ObjectStore, open_store

INCREMENTAL = CheckpointOptions(part_size="4096B", incremental=True)


def test_unchanged_tensors_are_written_once(tmp_path: Path) -> None:
    frozen = {f"f{i}": np.random.default_rng(i).standard_normal(2000) for i in range(3)}
    with CheckpointManager(tmp_path, keep=LatestN(2), options=INCREMENTAL) as manager:
        first = manager.save(1, {"frozen": frozen, "head": np.zeros(10)}).result(600)
        assert first.written > 48_000
        for step in range(2, 6):
            result = manager.save(step, {"frozen": frozen, "head": np.full(10, step)}).result(600)
            assert result.bytes == first.bytes
            assert result.written < 1000
        assert manager.steps() == [4, 5]
        assert manager.open().info["refs"] == [1]
        for step in (4, 5):
            restored = manager.restore(step)
            assert all(np.array_equal(restored["frozen"][k], frozen[k]) for k in frozen)
            assert np.array_equal(restored["head"], np.full(10, step))
        assert manager.gc(grace=0).keys == []
        assert manager.open(4).verify() == []
        frozen["f0"][0] += 1  # no longer the same
        assert 16_000 < manager.save(6, {"frozen": frozen, "head": np.zeros(10)}).result(600).written < 20_000
        manager.save(7, {"other": 1}).result(600)
        manager.save(8, {"other": 1}).result(600)
        assert manager.steps() == [7, 8]
        left = {entry.key for entry in manager.store.list("ckpt/") if entry.key.endswith(".safetensors")}
        assert left == set()  # the last that referred to step 1 took its files along
        assert list(manager.store.list("control/pin-")) == []


def test_a_base_that_vanishes_is_not_referred_to(tmp_path: Path) -> None:
    state = {"a": np.arange(5000)}
    with CheckpointManager(tmp_path, options=INCREMENTAL) as manager, CheckpointManager(tmp_path) as other:
        manager.save(1, state).result(600)
        manager.save(2, state).result(600)
        other.delete(1)
        other.gc(grace=0)
        assert np.array_equal(other.restore(2)["a"], state["a"])
        other.delete(2)
        other.gc(grace=0)
        assert list(other.store.list("ckpt/000000000001/0")) == []
        result = manager.save(3, state).result(600)
        assert result.written > 40_000
        assert np.array_equal(other.restore(3)["a"], state["a"])


def test_a_pin_keeps_files_of_a_base_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    state = {"a": np.arange(5000)}
    with CheckpointManager(tmp_path, options=INCREMENTAL) as manager, CheckpointManager(tmp_path) as other:
        manager.save(1, state).result(600)
        reached, go_on = threading.Event(), threading.Event()

        class Paused:
            def __init__(self, inner: Any) -> None:
                self._inner = inner

            def __getattr__(self, name: str) -> Any:
                return getattr(self._inner, name)

            def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
                if key.endswith("root.jsonl"):
                    reached.set()
                    assert go_on.wait(600)
                return self._inner.put(key, *args, **kwargs)

        store = open_store(tmp_path)
        slow: Any = Paused(store.backend)
        with CheckpointManager(ObjectStore(store.url, slow), options=INCREMENTAL) as saver:
            handle = saver.save(2, state)
            assert reached.wait(600)
            other.delete(1)
            other.gc(grace=1000)
            go_on.set()
            assert handle.result(600).written == 0
        assert np.array_equal(other.restore(2)["a"], state["a"])
        other.gc(grace=0)
        assert np.array_equal(other.restore(2)["a"], state["a"])


def test_simple_functions(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        load(tmp_path / "x")
    save(tmp_path / "x", {"a": np.arange(3), "n": 1})
    save(tmp_path / "x", {"a": np.arange(4), "n": 2}, metadata={"v": 2})
    target = {"a": np.zeros(4, int)}
    assert load(tmp_path / "x", target, items=["a"])["a"] is target["a"]
    assert target["a"].tolist() == [0, 1, 2, 3]
    with open_checkpoint(tmp_path / "x") as checkpoint:
        assert checkpoint.step == 1
        assert checkpoint.metadata == {"v": 2}
        assert list(checkpoint) == ["a"]
        assert "a" in checkpoint
        assert len(checkpoint) == 1
        assert checkpoint.get_slice("a")[1:3].tolist() == [1, 2]
        with pytest.raises(CheckpointError, match="has no tensor 'b'"):
            checkpoint.tensor("b")
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(tmp_path / "x", 0)


PREEMPTED = """
import os, signal, sys, time
import numpy as np
from s3loader.checkpoint import CheckpointManager, Preemption
manager = CheckpointManager(sys.argv[1])
with Preemption(manager, deadline=600) as preempted:
    for step in range(1, 1000):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if preempted:
            manager.save(step, {"w": np.full(1000, step)})
            break
print(manager.latest(), preempted.remaining < 600)
"""

EXITS = """
import os, signal, sys, time
import numpy as np
from s3loader.checkpoint import CheckpointManager, Preemption
manager = CheckpointManager(sys.argv[1])
with Preemption(manager, deadline=600, exit=True):
    handle = manager.save(9, {"w": np.arange(1_000_000)})
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3600)
"""


def test_sigterm_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREEMPTED, str(tmp_path / "a")], capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.split() == ["3", "True"]
    ended = subprocess.run([sys.executable, "-c", EXITS, str(tmp_path / "b")], timeout=600)
    assert ended.returncode == -signal.SIGTERM
    assert np.array_equal(load(tmp_path / "b")["w"], np.arange(1_000_000))


UNHEARD = """
import os, signal, sys, threading, time
from s3loader.checkpoint import CheckpointManager, Preemption
kill, sent = os.kill, []
def unheard_once(pid, signum):  # as a signal is that comes when the main thread is about to block in the system
    sent.append(signum)
    if len(sent) > 1:
        kill(pid, signum)
manager = CheckpointManager(sys.argv[1])
before = []
signal.signal(signal.SIGTERM, lambda *a: before.append(1))
with Preemption(manager, deadline=600, exit=True):
    os.kill = unheard_once
    kill(os.getpid(), signal.SIGTERM)
    while not before:
        time.sleep(0.01)
    time.sleep(1)
print(len(before))
"""


def test_the_signal_that_ends_the_process_is_sent_until_it_is_heard(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNHEARD, str(tmp_path)], capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.split() == ["1"], "the handler of before the block is called once"


class Stuck:
    """A backend whose uploads wait."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.go_on = threading.Event()
        self.reached = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if key.endswith(".safetensors"):
            self.reached.set()
            assert self.go_on.wait(600)
        return self._inner.put(key, *args, **kwargs)


def test_what_is_late_at_the_deadline_is_abandoned(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    stuck: Any = Stuck(store.backend)
    manager = CheckpointManager(ObjectStore(store.url, stuck))
    with Preemption(manager, deadline=0.05, signum=signal.SIGUSR1) as preempted:
        assert not preempted
        assert preempted.remaining == float("inf")
        handle = manager.save(1, {"w": np.arange(10)})
        assert stuck.reached.wait(600)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preempted
    stuck.go_on.set()
    with pytest.raises(CheckpointError, match="step 1 was abandoned before it was committed"):
        handle.result(600)
    assert manager.latest() is None
    manager.close()


def test_a_rank_that_fails_tells_the_others_at_once(tmp_path: Path) -> None:
    class Broken(Stuck):
        def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
            if key.endswith(".safetensors"):
                raise StoreError("the disk is on fire")
            return self._inner.put(key, *args, **kwargs)

    found: dict[int, Exception] = {}
    full = np.arange(10.0)

    def work(rank: int) -> None:
        store = open_store(tmp_path)
        backend: Any = Broken(store.backend) if rank == 1 else store.backend
        options = CheckpointOptions(deadline=3600)  # nobody waits for it
        manager = CheckpointManager(ObjectStore(store.url, backend), rank=rank, world_size=2, job="j", options=options)
        try:
            manager.save(1, {"w": ArrayShard(full[rank * 5 : rank * 5 + 5], (rank * 5,), (10,))}).result(600)
        except S3LoaderError as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(found[0], IncompleteCheckpointError)
    assert found[0].missing == [1]
    assert "rank 1 failed: StoreError: the disk is on fire" in str(found[0])


def test_ranks_agree_on_the_step_to_resume_from(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"a": 1}).result(600)
        zero = CheckpointManager(tmp_path, rank=0, world_size=2, job="new")
        assert zero.restore() == {"a": 1}
        # a step that appears after rank 0 has chosen (of a job that is fenced by now) does not split the ranks
        late = CheckpointManager(tmp_path, rank=0, world_size=1)
        late._session = manager.session()
        with pytest.raises(FencedError):
            late.save(2, {"a": 2}).result(600)
        one = CheckpointManager(tmp_path, rank=1, world_size=2, job="new")
        assert one.restore() == {"a": 1}
        for each in (zero, one, late):
            each.close()


class Counting(Stuck):
    """A backend that counts the bytes of tensors it reads."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.bytes = 0

    def get(self, key: str, start: int = 0, end: int | None = None, **kwargs: Any) -> Any:
        meta, data = self._inner.get(key, start, end, **kwargs)
        self.bytes += len(data) if key.endswith(".safetensors") else 0
        return meta, data

    def read_into(self, key: str, start: int, buffer: Any, **kwargs: Any) -> Any:
        self.bytes += len(buffer)
        return self._inner.read_into(key, start, buffer, **kwargs)


def test_a_node_reads_once(tmp_path: Path) -> None:
    state = {f"t{i}": np.random.default_rng(i).standard_normal(30_000 if i < 20 else 300_000) for i in range(24)}
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"s": state}).result(600)
        whole = sum(array.nbytes for array in state.values())
    options = CheckpointOptions(node_cache=str(tmp_path / "cache"))
    counts: list[int] = []

    def restore(rank: int) -> None:
        store = open_store(tmp_path / "run")
        counting: Any = Counting(store.backend)
        with CheckpointManager(ObjectStore(store.url, counting), rank=rank, world_size=3, job="j", options=options) as each:
            target = {name: np.zeros_like(array) for name, array in state.items()} if rank else None
            got = each.open(1).restore({"s": target} if target else None, rank=rank)["s"]
            assert all(np.array_equal(got[name], array) for name, array in state.items())
        counts.append(counting.bytes)

    threads = [threading.Thread(target=restore, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 3
    assert whole <= sum(counts) < 1.5 * whole, (whole, counts)
    restore(0)
    assert counts[3] == 0
    for path in (tmp_path / "cache").rglob("*.range"):  # a damaged cache is no harm
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    restore(0)
    assert counts[4] == whole
