"""A run that goes back to an earlier step: by rolling back, which deletes what came after, or just by saving on from there."""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.checkpoint import CheckpointManager, CheckpointOptions, EveryNSteps, LatestN, StepInfo
from s3loader.cli.main import root
from s3loader.errors import CheckpointError, CheckpointNotFoundError, FencedError, StepExistsError
from s3loader.testing import Moment, Seen, open_faulty_store


def filled(url: Any, *steps: int, **options: Any) -> CheckpointManager:
    manager = CheckpointManager(url, **options)
    for step in steps:
        manager.save(step, {"w": np.full(3, step)})
    manager.wait()
    return manager


def value(url: Any, step: int | None = None) -> int:
    with CheckpointManager(url) as manager:
        return int(manager.restore(step)["w"][0])


# retention


def test_a_step_saved_after_going_back_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with filled(tmp_path, 10, 20, 30) as manager:
        manager.restore(10)
    with CheckpointManager(tmp_path, keep=LatestN(2)) as manager, caplog.at_level(logging.WARNING):
        assert manager.save(15, {"w": np.full(3, 15)}).result(600).retired == (10, 20)  # which waits for retention
        assert "step 30" in caplog.text
        assert "discard_later=True" in caplog.text
        assert 15 in manager.steps(), "it was reported as saved"
        assert manager.steps() == [15, 30]
        assert manager.save(16, {"w": np.full(3, 16)}).result(600).retired == (30,)
        assert manager.steps() == [15, 16], "the two saved last, whatever their numbers"
        assert manager.latest() == 16
    assert value(tmp_path) == 16


@given(steps=st.lists(st.integers(0, 40), unique=True, max_size=12), n=st.integers(1, 4), data=st.data())
@settings(max_examples=15, deadline=None)
def test_what_was_reported_as_saved_is_there(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], n: int, data: st.DataObject
) -> None:
    """Whatever the order of the steps, and however often the job is restarted between them."""
    url = f"memory://{tmp_path_factory.mktemp('run').name}/run"
    saved: list[int] = []
    manager = CheckpointManager(url, keep=LatestN(n))
    for step in steps:
        if data.draw(st.booleans()):
            manager.close()
            manager = CheckpointManager(url, keep=LatestN(n))
        manager.save(step, {"a": step}).result(600)
        saved.append(step)
        assert manager.steps() == sorted(saved[-n:])
    manager.close()


def test_a_copy_without_its_control_objects_goes_on_in_order(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        filled(tmp_path / "run", step, job=str(step)).close()
    shutil.copytree(tmp_path / "run/ckpt", tmp_path / "copy/ckpt")
    with CheckpointManager(tmp_path / "copy", keep=LatestN(2)) as manager:
        for step in (40, 50, 60):
            manager.save(step, {"w": np.zeros(3)}).result(600)
        assert manager.steps() == [50, 60]


def test_a_policy_is_asked_in_the_order_of_commits(tmp_path: Path) -> None:
    class Seen(LatestN):
        def keep(self, steps: Any) -> set[int]:
            asked.append([info.step for info in steps])
            return {info.step for info in steps}

    asked: list[list[int]] = []
    with filled(tmp_path, 3, 1, 2, keep=Seen(1) | EveryNSteps(100)):
        assert asked == [[3], [3, 1], [3, 1, 2]]
    assert LatestN(2).keep([StepInfo(9), StepInfo(1), StepInfo(5)]) == {1, 5}


# rolling back


@pytest.mark.parametrize("how", ["restore", "rollback", "command"])
def test_rolling_back(tmp_path: Path, how: str) -> None:
    filled(tmp_path, 10, 20, 30, 40).close()
    if how == "command":
        dry = CliRunner().invoke(root, ["ckpt", "rollback", str(tmp_path), "20", "--dry-run"])
        assert (dry.exit_code, dry.stdout.split()) == (0, ["30", "40"])
        assert value(tmp_path) == 40
        done = CliRunner().invoke(root, ["ckpt", "rollback", str(tmp_path), "20"])
        assert (done.exit_code, done.stdout.split()) == (0, ["30", "40"])
    else:
        with CheckpointManager(tmp_path) as manager:
            if how == "restore":
                target = {"w": np.zeros(3, np.int64)}
                assert manager.restore(20, target, discard_later=True)["w"] is target["w"]
                assert target["w"].tolist() == [20] * 3
            else:
                assert manager.rollback(20, dry_run=True) == [30, 40]
                assert manager.latest() == 40
                assert manager.rollback(20) == [30, 40]
            assert manager.latest() == 20
            assert manager.restore()["w"].tolist() == [20] * 3
    with CheckpointManager(tmp_path, keep=LatestN(3)) as manager:
        assert manager.steps() == [10, 20]
        assert not [*tmp_path.rglob("ckpt/000000000030/*/*")], "its files are deleted"
        for step in (25, 30, 40):  # the numbers can be used again
            manager.save(step, {"w": np.full(3, -step)}).result(600)
        assert manager.steps() == [25, 30, 40]
        assert manager.gc(grace=0).keys == []
    assert value(tmp_path, 30) == -30


def test_what_came_after_a_damaged_newest_step_is_discarded(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2, 3).close()
    (file,) = tmp_path.glob("ckpt/000000000003/*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    (tmp_path / "ckpt/000000000002/root.jsonl").write_text("{}\n")
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(CheckpointError, match="step 2 is damaged"):
            manager.rollback(2)
        with pytest.raises(CheckpointNotFoundError):
            manager.rollback(7)
        assert manager.steps() == [1, 3]
        restored = manager.restore(on_corruption="previous", discard_later=True)
        assert restored["w"].tolist() == [1] * 3
        assert manager.steps() == [1]
        assert manager.latest() == 1
        manager.save(2, {"w": np.full(3, 22)}).result(600)
    assert value(tmp_path) == 22


def test_rolling_back_waits_for_saves_and_fences_older_jobs(tmp_path: Path) -> None:
    with filled(tmp_path, 1, 2, job="old") as old, CheckpointManager(tmp_path, job="new") as new:
        new.session()
        handle = new.save(3, {"w": np.zeros(100_000)})
        assert new.rollback(1) == [2, 3]
        assert handle.done
        assert new.steps() == [1]
        with pytest.raises(FencedError):
            old.save(9, {"w": np.zeros(3)}).result(600)
        assert new.latest() == 1


def test_files_that_a_step_before_refers_to_stay(tmp_path: Path) -> None:
    """A run that went back, with incremental saves: an earlier number refers to the files of a later one."""
    options = CheckpointOptions(incremental=True)
    big = np.arange(50_000.0)
    with CheckpointManager(tmp_path, options=options) as manager:
        manager.save(30, {"big": big, "n": 30}).result(600)
        assert manager.save(10, {"big": big, "n": 10}).result(600).written < 1000
        assert manager.restore(10, discard_later=True)["n"] == 10
        assert manager.steps() == [10]
        assert (manager.restore()["big"] == big).all()
        assert manager.open().verify() == []
        manager.save(11, {"big": big, "n": 11}).result(600)
        assert manager.gc(grace=0).skipped == {}
        assert (manager.restore(11)["big"] == big).all()


@pytest.mark.parametrize("nth", range(1, 5))
def test_cut_off_anywhere_the_run_ends_at_some_step(tmp_path: Path, nth: int) -> None:
    filled(tmp_path, 1, 2, 3, 4).close()
    tombstones = itertools.count(1)

    def cut(seen: Seen, moment: Moment) -> None:
        if moment == "before" and seen.op == "put" and seen.key.endswith("root.jsonl") and next(tombstones) >= nth:
            raise KeyboardInterrupt

    store, _ = open_faulty_store(str(tmp_path), hook=cut)
    with store, CheckpointManager(store) as manager:
        if nth <= 3:
            with pytest.raises(KeyboardInterrupt):
                manager.rollback(1)
        else:
            assert manager.rollback(1) == [2, 3, 4]
    with CheckpointManager(tmp_path) as manager:
        left = manager.steps()
        assert left == [1, 2, 3, 4][: len(left)]
        assert len(left) == max(1, 5 - nth)
        assert int(manager.restore()["w"][0]) == left[-1]
        assert manager.rollback(1) == left[1:]
        manager.gc(grace=0)
        assert [p.parent.parent.name for p in tmp_path.rglob("*.safetensors")] == ["000000000001"]


RANK = """
import sys
import numpy as np
from s3loader.checkpoint import CheckpointManager, LatestN
rank, folder = int(sys.argv[1]), sys.argv[2]
with CheckpointManager(folder, rank=rank, world_size=2, job="j", keep=LatestN(2)) as manager:
    for step in (10, 20, 30):
        manager.save(step, {"w": np.full(8, step)})
    manager.wait()
    target = {"w": np.zeros(8, np.int64)}
    manager.restore(20, target, discard_later=True)
    assert manager.latest() == 20 and target["w"][0] == 20
    assert manager.restore()["w"][0] == 20
    manager.save(30, {"w": np.full(8, 31)}).result(600)
    assert manager.restore()["w"][0] == 31
    assert manager.steps() == [20, 30]
"""


def test_all_ranks_roll_back_together(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)


def test_another_job_that_commits_meanwhile_is_not_rolled_back_over(tmp_path: Path) -> None:
    """Only roots that were seen are deleted: what takes their place after that is somebody's success."""
    filled(tmp_path, 1, 2).close()
    with CheckpointManager(tmp_path, job="a") as manager:
        manager.session()
        replaced = threading.Event()
        retire = manager.run.roots.retire

        def late(seen: Any, epoch: int) -> Any:
            if not replaced.is_set():
                replaced.set()
                with CheckpointManager(tmp_path, job="b") as other:
                    other.save(2, {"w": np.full(3, 222)}, on_exists="replace").result(600)
            return retire(seen, epoch)

        manager.run.roots.retire = late  # type: ignore[method-assign]
        assert manager.rollback(1) == [2], "seen in the second round, and deleted then"
        assert manager.steps() == [1]
        with pytest.raises((FencedError, StepExistsError)):
            manager.save(2, {"w": np.zeros(3)}).result(600)


# the protocol, searched exhaustively


class Order(NamedTuple):
    """Steps 1, 2, 3 are committed; somebody rolls back to 1, and may stop anywhere; another job replaces step 2."""

    newest_first: bool = True
    condition: bool = True
    """A step is only un-published as it was seen."""


class State(NamedTuple):
    roots: tuple[str, ...]
    """Who committed steps 1, 2, 3; empty: nobody, or deleted."""
    seen: tuple[str, ...] | None
    left: tuple[int, ...]
    other: bool
    """Whether the other job has replaced step 2."""


def rolled(s: State, v: Order) -> Iterator[State]:
    if not s.other and s.roots[1]:
        yield s._replace(roots=(s.roots[0], "other", s.roots[2]), other=True)
    if s.seen is None:
        steps = (2, 1) if v.newest_first else (1, 2)
        yield s._replace(seen=s.roots, left=steps)
    elif s.left:
        at, *rest = s.left
        gone = not v.condition or s.roots[at] == s.seen[at]
        roots = tuple("" if gone and i == at else root for i, root in enumerate(s.roots))
        yield s._replace(roots=roots, left=tuple(rest))


def rolled_wrong(v: Order) -> str | None:
    start = State(("job",) * 3, None, (), False)
    seen, queue = {start}, [start]
    while queue:
        state = queue.pop()
        if any(late and not early for early, late in itertools.pairwise(state.roots)):
            return "a hole: a later step without the one before it"
        if state.other and not state.roots[1] and state.seen is not None and state.seen[1] == "job":
            return "what was committed after the look is gone"
        for after in rolled(state, v):
            if after not in seen:
                seen.add(after)
                queue.append(after)
    return None


def test_the_order_of_a_rollback_matters() -> None:
    assert rolled_wrong(Order()) is None
    assert "hole" in str(rolled_wrong(Order(newest_first=False)))
    assert "gone" in str(rolled_wrong(Order(condition=False)))
