"""The manager on one rank: what is saved comes back, steps are atomic, retention keeps what it should."""

from __future__ import annotations

import collections
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from s3loader.checkpoint import BestN, CheckpointManager, CheckpointOptions, EveryNSteps, LatestN
from s3loader.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ClosedError,
    FencedError,
    IntegrityError,
    StepExistsError,
    UnsupportedStateError,
)
from s3loader.exchange import iter_manifest
from s3loader.store import open_store

SMALL = CheckpointOptions(part_size="4096B", staging_budget="16384B", file_size="20000B", concurrency=3)


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "file" else f"memory://{tmp_path.name}/run"


def state(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "model": {
            "w": rng.standard_normal((40, 50)).astype(np.float32),
            "b": rng.standard_normal(33),
            "half": rng.standard_normal(7).astype(np.float16),
            "brain": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
            "empty": np.empty((0, 3), np.int64),
            "scalar": np.array(2.5),
            "mask": np.array([True, False, True]),
            "complex": np.array([1 + 2j, 3.5 - 1j]),
            "a/b~c": np.arange(6).reshape(2, 3).T,
        },
        "progress": {
            "step": seed, "loss": 0.1 + 0.2, "nan": float("nan"), "inf": -float("inf"), "none": None, "yes": True,
            "name": "größe", "list": [1, [2, (3, 4)]], 7: "int key", (1, 2): "tuple key", "big": 2**100,
            "set": {1, 2}, "c": 1 + 2j,
            "counter": collections.Counter("aab"), "odict": collections.OrderedDict(b=1, a=2), "blob": b"\x00\xff",
            "minus": -0.0,
        },
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_everything_comes_back_as_it_was(url: str) -> None:
    saved = state()
    with CheckpointManager(url, options=SMALL) as manager:
        assert manager.latest() is None
        result = manager.save(5, saved, metrics={"loss": 1.5}, metadata={"who": "me"}).result(600)
        assert (result.step, result.retired, result.cleanup_error) == (5, (), None)
        assert result.written > result.bytes > 8000
        assert manager.latest() == 5
        assert same(manager.restore(), saved)
        checkpoint = manager.open()
        assert checkpoint.metrics == {"loss": 1.5}
        assert checkpoint.metadata == {"who": "me"}
        assert checkpoint.verify() == []


def test_a_target_is_filled_in_place(url: str) -> None:
    with CheckpointManager(url, options=SMALL) as manager:
        manager.save(1, state()).result(600)
        strided = np.zeros((50, 80), np.float32)[:, ::2].T
        target = {"model": {"w": strided, "b": np.zeros(33)}}
        restored = manager.restore(target=target)
        assert list(restored) == ["model"]
        assert restored["model"]["w"] is strided
        assert restored["model"]["b"] is target["model"]["b"]
        assert same(np.ascontiguousarray(strided), state()["model"]["w"])
        assert same(restored["model"]["half"], state()["model"]["half"])
        with pytest.raises(CheckpointError, match=r"'model/b' is F64 \[33\] in the checkpoint, F64 \[34\] in the target"):
            manager.restore(target={"model": {"b": np.zeros(34)}})
        with pytest.raises(CheckpointError, match="the target has 'model/extra', which is not in the checkpoint"):
            manager.restore(target={"model": {"extra": np.zeros(1)}})
        with pytest.raises(CheckpointError, match="'progress/step' is 0 in the checkpoint, an array in the target"):
            manager.restore(target={"progress": {"step": np.zeros(1)}})
        with pytest.raises(CheckpointError, match="'model/b' is an array in the checkpoint, a int in the target"):
            manager.restore(target={"model": {"b": 3}})
        with pytest.raises(CheckpointError, match=r"no item 'optimizer' .it has model, progress"):
            manager.restore(items=["optimizer"])


def test_parts_of_a_tensor_are_read_and_verified(url: str) -> None:
    saved = state()
    with CheckpointManager(url, options=SMALL) as manager:
        manager.save(1, saved).result(600)
        view = manager.open(1).get_slice("model/w")
        assert (view.get_shape(), view.get_dtype()) == ([40, 50], "F32")
        w = saved["model"]["w"]
        for index in [
            (slice(3, 9),),
            (slice(None), slice(7, 11)),
            (5,),
            (-1, 3),
            (..., 2),
            (slice(4, 4),),
            (slice(30, None), -1),
        ]:
            assert np.array_equal(view[index], w[index]), index
        with pytest.raises(IndexError):
            view[40]


class Stateful:
    def __init__(self, value: int) -> None:
        self.array = np.full(4, value)
        self.position = value

    def state_dict(self) -> dict[str, Any]:
        return {"array": self.array, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.array, self.position = state["array"], state["position"]


def test_objects_with_state_give_and_take_it(url: str) -> None:
    with CheckpointManager(url, options=SMALL) as manager:
        manager.save(1, {"loader": Stateful(9), "nested": [Stateful(3)]}).result(600)
        target: dict[str, Any] = {"loader": Stateful(0), "nested": [Stateful(0)]}
        before = target["loader"].array
        restored = manager.restore(target=target)
        assert restored["loader"] is target["loader"]
        assert restored["loader"].position == 9
        assert restored["loader"].array is before
        assert before.tolist() == [9, 9, 9, 9]
        assert restored["nested"][0].position == 3
        assert same(manager.restore(items=["loader"]), {"loader": {"array": np.full(4, 9), "position": 9}})


def test_what_cannot_be_saved_is_named_by_its_path_and_changes_nothing(url: str) -> None:
    loop: list[Any] = []
    loop.append(loop)
    cases: list[tuple[Any, str]] = [
        ({"a": {"b": [1, object()]}}, "a/b/1"),
        ({"a": lambda: 0}, "a"),
        ({"a": np.array(["text"])}, "a"),
        ({"a": np.zeros(2, [("x", "i4")])}, "a"),
        ({"a": loop}, "a/0"),
        ({"a": {"x": "\ud800"}}, "a/x"),
        ({"a": signal.SIGTERM}, "a"),
    ]
    with CheckpointManager(url, options=SMALL) as manager:
        for items, path in cases:
            with pytest.raises(UnsupportedStateError) as caught:
                manager.save(1, items)
            assert caught.value.path == path
        with pytest.raises(CheckpointError, match="a step is an integer"):
            manager.save(-1, {"a": 1})
        assert manager.latest() is None


def test_a_change_after_save_does_not_reach_the_checkpoint(url: str) -> None:
    array = np.arange(50_000, dtype=np.int32)
    with CheckpointManager(url, options=SMALL) as manager:
        handle = manager.save(1, {"a": array})
        assert handle.staged(0)
        array[:] = -1
        handle.result(600)
        assert np.array_equal(manager.restore()["a"], np.arange(50_000, dtype=np.int32))


def test_a_step_is_written_once_or_replaced_whole_or_skipped(url: str) -> None:
    with CheckpointManager(url, options=SMALL) as manager:
        manager.save(1, {"a": 1}).result(600)
        handle = manager.save(1, {"a": 2})
        with pytest.raises(StepExistsError, match="step 1 is committed already"):
            handle.result(600)
        assert manager.restore() == {"a": 1}
        assert manager.save(1, {"a": 3}, on_exists="skip").result(600).skipped
        assert manager.restore() == {"a": 1}
        manager.save(1, {"a": np.full(3, 4)}, on_exists="replace").result(600)
        assert same(manager.restore(), {"a": np.full(3, 4)})
        report = manager.gc(grace=0)
        assert report.attempts >= 1
        assert same(manager.restore(), {"a": np.full(3, 4)})
        manager.delete(1)
        assert manager.latest() is None
        with pytest.raises(CheckpointNotFoundError, match="step 1 was deleted"):
            manager.restore(1)
        manager.save(1, {"a": 5}).result(600)
        assert manager.restore(1) == {"a": 5}


def test_retention(url: str) -> None:
    keep = LatestN(2) | EveryNSteps(40) | BestN("loss", 1)
    with CheckpointManager(url, keep=keep, options=SMALL) as manager:
        for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, float("nan")), (50, 5.0), (60, 4.0)]:
            manager.save(step, state(step), metrics={"loss": loss}).result(600)
        assert manager.steps() == [20, 40, 50, 60]
        assert same(manager.restore(20), state(20))
        left = {entry.key for entry in open_store(url).list("ckpt/")}
        assert {key for key in left if "/000000000010/" in key} == {"ckpt/000000000010/root.jsonl"}
        assert manager.gc(grace=0, dry_run=True).keys == []
        assert manager.latest() == 60


def test_a_step_saved_late_is_the_last_one(url: str) -> None:
    with CheckpointManager(url, keep=LatestN(1), options=SMALL) as manager:
        manager.save(20, {"a": 1}).result(600)
        assert manager.save(10, {"a": 2}).result(600).retired == (20,)
        assert manager.steps() == [10]


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    saved = state()
    with CheckpointManager(tmp_path, options=SMALL) as manager:
        manager.save(1, saved).result(600)
        found: dict[str, Any] = {}
        for path in tmp_path.rglob("*.safetensors"):
            found.update(load_file(path))
        for name, array in saved["model"].items():
            have = found["model/" + name.replace("~", "~0").replace("/", "~1")]
            if name == "complex":  # safetensors knows no complex128
                have = have.view(np.complex128).reshape(2)
            assert same(have, np.array(array, order="C")), name
        assert len(list(tmp_path.rglob("*.safetensors"))) >= 1


def test_large_state_goes_through_a_small_budget(url: str) -> None:
    saved = {f"t{i}": np.random.default_rng(i).integers(0, 255, 7000 + i, np.uint8) for i in range(40)}
    with CheckpointManager(url, options=SMALL) as manager:
        handles = [manager.save(step, {"s": saved}) for step in (1, 2)]
        for handle in handles:
            handle.result(600)
            assert handle.progress.sent == handle.progress.total > 280_000
        assert manager.pool.allocated <= SMALL.staging_budget
        assert same(manager.restore()["s"], saved)
        assert len(manager.open().files()) > 10


def test_the_root_is_an_exchange_manifest(url: str) -> None:
    with CheckpointManager(url, options=SMALL, keep=LatestN(1)) as manager:
        manager.save(1, state()).result(600)
        manager.save(2, state()).result(600)
        manager.wait()  # until step 1 is retired
        entries = list(iter_manifest(manager.store, "ckpt/000000000002/root.jsonl"))
        assert {(entry["key"], entry["size_bytes"]) for entry in entries} == set(manager.open(2).files().items())
        tombstone = list(iter_manifest(manager.store, "ckpt/000000000001/root.jsonl"))
        assert [entry["key"] for entry in tombstone] == ["ckpt/000000000001/root.jsonl"]


def test_a_newer_job_fences_the_older_one(url: str) -> None:
    with CheckpointManager(url, options=SMALL, job="old") as old, CheckpointManager(url, options=SMALL, job="new") as new:
        old.save(1, {"a": 1}).result(600)
        new.save(2, {"a": 2}).result(600)
        handle = old.save(3, {"a": 3})
        with pytest.raises(FencedError, match="a newer job"):
            handle.result(600)
        assert new.steps() == [1, 2]
        with pytest.raises(StepExistsError):
            new.save(1, {}).result(600)


def test_errors_reach_the_handle_and_the_next_call(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, options=SMALL)
    manager.save(1, {"a": 1}).result(600)
    handle = manager.save(1, {"a": 2})
    while not handle.done:
        threading.Event().wait(0.01)
    with pytest.raises(StepExistsError):
        manager.save(2, {"a": 1})
    manager.save(2, {"a": 1}).result(600)
    manager.save(2, {"a": 1})
    with pytest.raises(StepExistsError):
        manager.close()
    with pytest.raises(ClosedError):
        manager.save(3, {})

    def fail_inside() -> None:
        with CheckpointManager(tmp_path) as other:
            other.save(2, {"a": 1})
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        fail_inside()
    assert any("step 2 is committed already" in note for note in caught.value.__notes__)


def test_a_save_under_way_can_be_refused(url: str) -> None:
    class Slow(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return {"x": 1}

    with CheckpointManager(url, options=CheckpointOptions(overlap="refuse")) as manager:
        handle = manager.save(1, {"a": Slow(1)})
        try:
            manager.save(2, {"a": 1})
        except CheckpointError as error:
            assert "still being saved" in str(error)  # noqa: PT017 - the first save may be done already
        handle.result(600)


def test_damage_raises_or_falls_back(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, options=SMALL) as manager:
        for step in (1, 2, 3):
            manager.save(step, state(step)).result(600)
        root = tmp_path / "ckpt/000000000003/root.jsonl"
        root.write_bytes(root.read_bytes().replace(b'"world":1', b'"world":2'))
        data = next((tmp_path / "ckpt/000000000002").rglob("*.safetensors"))
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
        assert manager.latest() == 2
        with pytest.raises(CheckpointError, match="root of step 3 is damaged"):
            manager.restore()
        with pytest.raises(IntegrityError, match="are not what was saved"):
            manager.restore(2)
        assert len(manager.open(2).verify()) == 1
        assert same(manager.restore(on_corruption="previous"), state(1))
        next((tmp_path / "ckpt/000000000001").rglob("index*")).unlink()
        with pytest.raises(CheckpointError, match="no step could be restored"):
            manager.restore(on_corruption="previous")


KILLED = """
import os, signal, sys, numpy as np
from s3loader.checkpoint import CheckpointManager
manager = CheckpointManager(sys.argv[1])
start = manager.latest() or 0
for step in range(start + 1, start + 4):
    handle = manager.save(step, {"step": step, "w": np.full(100_000, step)})
    if step < start + 3:
        handle.result()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_newest_step_is_whole_after_sigkill(tmp_path: Path) -> None:
    before = 0
    for _ in range(2):
        child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=600)
        assert child.returncode == -signal.SIGKILL
        with CheckpointManager(tmp_path) as manager:
            latest = manager.latest()
            assert latest is not None
            assert before + 2 <= latest <= before + 3
            before = latest
            restored = manager.restore()
            assert restored["step"] == latest
            assert np.array_equal(restored["w"], np.full(100_000, latest))


AT_EXIT = """
import sys, numpy as np
from s3loader.checkpoint import CheckpointManager
CheckpointManager(sys.argv[1]).save(1, {"w": np.arange(3_000_000)})
"""


def test_an_interpreter_that_ends_finishes_the_save(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", AT_EXIT, str(tmp_path)], timeout=600, check=True)
    with CheckpointManager(tmp_path) as manager:
        assert np.array_equal(manager.restore()["w"], np.arange(3_000_000))


def test_a_forked_child_is_a_job_of_its_own(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, options=SMALL)
    manager.save(1, {"who": "parent"}).result(600)
    pid = os.fork()
    if pid == 0:
        try:
            manager.save(2, {"who": "child"}).result(600)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert manager.restore() == {"who": "child"}
    with pytest.raises(FencedError):
        manager.save(3, {}).result(600)
    manager.close()


def test_nothing_is_left_running(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, options=SMALL)
    manager.save(1, state()).result(600)
    manager.close()
    del manager
    gc.collect()
    assert [t.name for t in threading.enumerate() if t.name.startswith("s3loader-ckpt")] == []
