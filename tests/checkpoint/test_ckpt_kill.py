"""SIGKILL before and after every request of a save with retention, a collection, a deletion; on one rank and on three.

Whatever dies, whenever: the newest step is the old or the new one, bit for bit, every committed step is whole, garbage
collection deletes nothing that lives, and the next job goes on.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import start_child

from s3loader.checkpoint import ArrayShard, CheckpointManager, CheckpointOptions, LatestN, PerRank
from s3loader.checkpoint.format import layout
from s3loader.errors import FencedError, IncompleteCheckpointError
from s3loader.store import Backend, ObjectStore, open_store

OPTIONS = CheckpointOptions(part_size="2048B", file_size="6000B", concurrency=2, deadline=0.25, incremental=True)
VERBS = [
    name for name, member in inspect.getmembers(Backend, inspect.isfunction) if not name.startswith("_") and name != "close"
]


class Killer:
    """A backend that sends its process SIGKILL before or after its nth request."""

    def __init__(self, inner: Any, nth: int, after: bool) -> None:
        self._inner, self._nth, self._after = inner, nth, after
        self.count = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._inner, name)
        if name not in VERBS:
            return verb

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.count += 1
                strike = self.count == self._nth
            if strike and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                result = verb(*args, **kwargs)
                return iter(list(result)) if name in ("list", "list_multipart") else result
            finally:
                if strike:
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small files are synced here."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    with tempfile.TemporaryDirectory(dir=base) as name:
        yield Path(name)


def state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    frozen = np.random.default_rng(0).standard_normal(299)  # the same in every step: later steps refer to the first
    return {"model": {"frozen": frozen, **{f"w{i}": rng.standard_normal(300 + i) for i in range(4)}}, "step": step}


def whole(manager: CheckpointManager, step: int) -> bool:
    have, want = manager.restore(step), state(step)
    return have["step"] == step and all(np.array_equal(have["model"][k], want["model"][k]) for k in want["model"])


def killed(
    store_path: Path, nth: int, after: bool, work: Callable[[CheckpointManager], None], **kwargs: Any
) -> Callable[[], None]:
    def run() -> None:
        inner = open_store(store_path)
        killer: Any = Killer(inner.backend, nth, after)
        store: Any = ObjectStore(inner.url, killer, options=inner.options)
        store.conditional_writes = lambda: True  # probing has tests of its own
        manager = CheckpointManager(store, options=OPTIONS, **kwargs)
        work(manager)
        manager.close()

    return run


def prepare(path: Path) -> None:
    """Steps 10 and 20, an abandoned attempt at step 15, and one at step 20."""
    with CheckpointManager(path, options=OPTIONS) as manager:
        for step in (10, 20):
            manager.save(step, state(step)).result(600)
    for step, name in ((15, "00000001-000007-00000000"), (20, "00000001-000008-00000000")):
        folder = path / f"ckpt/{step:012d}" / name
        folder.mkdir(parents=True)
        (folder / "d-00000-000.safetensors").write_bytes(b"x" * 100)


def check(path: Path, allowed: set[int | None], must: set[int]) -> None:
    """What must hold after any death: the newest step is one of `allowed`, and the steps `must` are there."""
    with CheckpointManager(path, options=OPTIONS) as manager:
        latest = manager.latest()
        assert latest in allowed
        steps = manager.steps()
        assert must <= set(steps) <= {10, 20, 30}
        for step in steps:
            assert whole(manager, step), step
            assert manager.open(step).verify() == []
        live = {key for step in steps for key in manager.open(step).files()}
        dry = manager.gc(dry_run=True, grace=0)
        assert not live & set(dry.keys)
        assert manager.gc(grace=0).keys is not None
        assert manager.steps() == steps
        for step in steps:
            assert whole(manager, step), step
        assert manager.gc(grace=0, dry_run=True).keys == []
        manager.save(40, state(40)).result(600)
        assert manager.latest() == 40
        needed = {key for root in manager.roots() for key, _ in root.keys.values()}
        own = tuple(f"ckpt/{root.step:012d}/{root.attempt}/" for root in manager.roots())
        left = {m.key for m in manager.store.list("ckpt/") if "/root" not in m.key and m.key != layout.COMPACTED}
        assert {key for key in left if not key.startswith(own)} <= needed <= left


def save_and_retire(manager: CheckpointManager) -> None:
    manager.keep = LatestN(2)
    manager.save(30, state(30)).result(600)


WORKS: dict[str, tuple[Callable[[CheckpointManager], Any], set[int | None], set[int], int]] = {
    "save with retention": (save_and_retire, {20, 30}, {20}, 20),
    "first save of a run": (lambda m: m.save(10, state(10)).result(600), {None, 10}, set(), 14),
    "replace": (lambda m: m.save(20, state(20), on_exists="replace").result(600), {20}, {10, 20}, 14),
    "gc, and compaction of its tombstone": (lambda m: [m.gc(grace=0) for _ in range(2)], {20}, {10, 20}, 24),
    "delete the newest": (lambda m: m.delete(20), {10, 20}, {10}, 7),
}
"""What is done, which steps may be the newest afterwards, which must be there, and how many requests it takes at least."""


@pytest.mark.parametrize("name", WORKS)
def test_one_process(folder: Path, name: str) -> None:
    work, allowed, must, requests = WORKS[name]
    if name == "first save of a run":
        (folder / "base").mkdir()
    else:
        prepare(folder / "base")
    deaths = 0
    for nth in range(1, 200):
        codes = []
        for after in (False, True) if nth % 3 == 0 else (False,):  # after n is nearly before n + 1: a third will do
            path = folder / f"{nth}{after}"
            shutil.copytree(folder / "base", path)
            pid = start_child(killed(path, nth, after, work))
            codes.append(os.waitpid(pid, 0)[1])
            check(path, allowed, must)
            shutil.rmtree(path)
        if not any(codes):
            break
        assert set(codes) == {signal.SIGKILL}
        deaths += 1
    else:
        pytest.fail("it never ends")
    assert deaths >= requests


def rank_work(manager: CheckpointManager, rank: int) -> None:
    want = state(30)["model"]
    boxes = {
        k: ArrayShard(np.array_split(v, 3)[rank], (sum(len(p) for p in np.array_split(v, 3)[:rank]),), v.shape)
        for k, v in want.items()
    }
    try:
        manager.save(30, {"model": boxes, "step": 30, "rng": PerRank(rank)}).result(600)
    except (IncompleteCheckpointError, FencedError):
        os._exit(7)


@pytest.mark.parametrize("victim", [0, 2])
def test_three_processes(folder: Path, victim: int) -> None:
    prepare(folder / "base")
    deaths = 0
    for nth in range(1, 100, 2):
        path = folder / str(nth)
        shutil.copytree(folder / "base", path)
        pids = []
        for rank in range(3):
            strike = nth if rank == victim else 0
            work = functools.partial(rank_work, rank=rank)
            pids.append(start_child(killed(path, strike, nth % 3 == 0, work, rank=rank, world_size=3, job="j")))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        check(path, {20, 30}, {10, 20})
        assert all(code in (0, 7) for rank, code in enumerate(codes) if rank != victim), codes
        shutil.rmtree(path)
        if codes[victim] != -signal.SIGKILL:
            break
        deaths += 1
    else:
        pytest.fail("it never ends")
    assert deaths >= 5
