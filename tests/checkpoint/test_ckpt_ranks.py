"""Ranks and the job's name are found where the loaders find them; and managers of one process do not fence each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from s3loader.checkpoint import CheckpointManager, CheckpointOptions, load, save
from s3loader.errors import ConfigError, FencedError, IncompleteCheckpointError, StepExistsError
from s3loader.ranks import Board, board, find_ranks, job_of
from s3loader.testing import open_faulty_store
from s3loader.torch import S3StorageWriter
from s3loader_torch.topology import Ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

LAUNCHERS: dict[str, tuple[dict[str, str], tuple[int, int], str]] = {
    "nothing": ({}, (0, 1), ""),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, (3, 8), ""),
    "torchrun with an id": (
        {"RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "2"},
        (3, 8),
        "torchelastic/r/2",
    ),
    "torchrun on one node": (
        {
            "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "r",
            "TORCHELASTIC_ERROR_FILE": "/tmp/x/none_y/attempt_0/1/error.json",
        },
        (1, 2),
        f"torchelastic/{socket.gethostname()}/tmp/x/none_y/attempt_0",
    ),
    "srun": (
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"},
        (2, 4),
        "slurm/7/0/1",
    ),
    "a batch script, no step": ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1), "slurm/7/0/0"),
    "torchrun inside of srun": (
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "9", "WORLD_SIZE": "16"},
        (9, 16),
        "slurm/7/0/0",
    ),
    "half of it": ({"RANK": "3"}, (0, 1), ""),
}  # fmt: skip
VARIABLES = {name for environ, _, _ in LAUNCHERS.values() for name in environ}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_loaders_and_checkpoints_find_the_same(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environ, (rank, world), job = LAUNCHERS[launcher]
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find_ranks()[:2] == Ranks().resolve() == (rank, world)
    assert CheckpointManager("memory://x")._identity.rank == rank
    assert CheckpointManager("memory://x")._identity.world == world
    assert job_of(os.environ) == job


def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, world in (("x", "2"), ("2", "2"), ("-1", "2"), ("0", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(ConfigError, match="RANK"):
            CheckpointManager("memory://x").save(1, {})
    with pytest.raises(ConfigError, match="belong together"):
        CheckpointManager("memory://x", rank=1)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        CheckpointManager("memory://x", rank=2, world_size=2)
    CheckpointManager("memory://x", rank=0, world_size=1).save(1, {}).result(600)  # what is given beats what is found


def run_all(commands: list[list[str]], **environ: str) -> None:
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ}) for command in commands
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands), "\n".join(errors)


TORCH = """
import os, sys
import numpy as np
how, folder = sys.argv[1], sys.argv[2]
from s3loader.checkpoint import CheckpointManager, CheckpointOptions, PerRank, load, save
if how == "gloo":
    import torch.distributed as dist
    rank, world = int(sys.argv[3]), 2
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{sys.argv[4]}", rank=rank, world_size=world)
else:
    rank, world = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID"))), 2
first = int(sys.argv[4])
options = CheckpointOptions(deadline=600)
with CheckpointManager(folder + "/run", options=options) as manager:
    if first:
        before = manager.restore()
        assert before["rank"] == rank and before["step"] == 3, before
    for step in range(first * 10, first * 10 + 2):
        manager.save(step, {"w": np.arange(1000), "rank": PerRank(rank), "step": step})
with CheckpointManager(folder + "/run", options=options) as manager:  # a second one, in the same job
    assert manager.restore()["rank"] == rank
    manager.save(first * 10 + 2, {"w": np.arange(1000), "rank": PerRank(rank), "step": 2}).result(600)
again = CheckpointManager(folder + "/run", options=options)  # and a third, beside one that was never closed
again.save(first * 10 + 3, {"w": np.arange(1000), "rank": PerRank(rank), "step": 3}).result(600)
again.close()
for n in range(2):
    save(folder + "/simple", {"n": n, "rank": PerRank(rank)}, options=options)
assert load(folder + "/simple") == {"n": 1, "rank": rank}
if how == "gloo":
    __import__("gc").collect()  # gloo of torch 2.13 may abort an ending process that still holds collectives
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["gloo", "torchrun", "srun"])
def test_ranks_find_each_other_without_a_word(tmp_path: Path, how: str) -> None:
    """Two starts of the job, several managers in each, no rank=, world_size= or job=."""
    script = tmp_path / "train.py"
    script.write_text(TORCH)
    for start in range(2):
        if how == "gloo":
            run_all([[sys.executable, str(script), how, str(tmp_path), str(rank), str(start)] for rank in range(2)])
        elif how == "srun":
            for variable in ("RANK", "WORLD_SIZE"):
                assert variable not in os.environ
            step = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": str(start), "SLURM_STEP_NUM_TASKS": "2"}
            commands = [
                ["env", f"SLURM_PROCID={rank}", sys.executable, str(script), how, str(tmp_path), "-", str(start)]
                for rank in range(2)
            ]
            run_all(commands, **step)
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            run_all([[*launch, str(script), how, str(tmp_path), "-", str(start)]])
    with CheckpointManager(tmp_path / "run") as manager:
        assert manager.steps() == [0, 1, 2, 3, 10, 11, 12, 13]
        assert {root.facts["world"] for root in manager.roots()} == {2}


ONLY_READS = """
import sys, torch.distributed as dist
from s3loader.checkpoint import CheckpointManager
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=int(sys.argv[2]), world_size=2)
assert CheckpointManager(sys.argv[1] + "/run").restore() == {"a": 1}
__import__("gc").collect()  # gloo of torch 2.13 may abort an ending process that still holds collectives
dist.destroy_process_group()
"""


def test_a_job_that_only_reads_takes_over_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as training:
        training.save(1, {"a": 1}).result(600)
        run_all([[sys.executable, "-c", ONLY_READS, str(tmp_path), str(rank)] for rank in range(2)])
        training.save(2, {"a": 2}).result(600)


JAX = """
import sys, jax, numpy as np
port, rank, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from s3loader.checkpoint import CheckpointManager, PerRank
for step in (1, 2):
    with CheckpointManager(folder) as manager:
        manager.save(step, {"w": np.arange(10), "rank": PerRank(int(rank))}).result(600)
        assert manager.restore()["rank"] == int(rank)
jax.distributed.shutdown()
"""


def test_ranks_of_jax(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run_all([[sys.executable, "-c", JAX, str(port), str(rank), str(tmp_path)] for rank in range(2)], JAX_PLATFORMS="cpu")
    with CheckpointManager(tmp_path) as manager:
        assert [root.facts["world"] for root in manager.roots()] == [2, 2]


def test_what_is_missing_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``if rank == 0: save(...)``, as many are used to."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "r"}.items():
        monkeypatch.setenv(name, value)
    with CheckpointManager(tmp_path, options=CheckpointOptions(deadline=0.2)) as manager:
        with pytest.raises(IncompleteCheckpointError, match=r"ranks \[1\] have not finished") as caught:
            manager.save(1, {"a": 1}).result(600)
        assert "found in RANK and WORLD_SIZE" in str(caught.value.hint)
        assert "rank=0, world_size=1" in str(caught.value.hint)
    with CheckpointManager(tmp_path, rank=0, world_size=1) as manager:
        manager.save(1, {"a": 1}).result(600)
    assert load(tmp_path) == {"a": 1}
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(ConfigError, match="no name for this incarnation") as unnamed:
        CheckpointManager(tmp_path / "another").save(2, {})
    assert "job=" in str(unnamed.value.hint)


def test_who_has_taken_over_is_told(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, job="a") as old, CheckpointManager(tmp_path, job="b") as new:
        old.session()
        new.session()
        with pytest.raises(FencedError, match=f"process {os.getpid()} on ") as caught:
            old.save(1, {}).result(600)
        assert "rank=, world_size=, job=" in str(caught.value.hint)
        other = CheckpointManager(tmp_path, rank=0, world_size=2, job="b")
        other.session()
        with pytest.raises(FencedError) as caught:
            new.save(1, {}).result(600)
        assert "must be another one at every start" in str(caught.value.hint)
        other.close()


# one process, several savers


def test_managers_of_one_process_do_not_fence_each_other(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as one, CheckpointManager(tmp_path) as two:
        handles = [manager.save(step, {"w": np.full(50_000, step)}) for step, manager in enumerate([one, two, two, one, two])]
        assert [handle.result(600).step for handle in handles] == [0, 1, 2, 3, 4]
        with pytest.raises(StepExistsError):
            one.save(4, {}).result(600)
        assert one.steps() == [0, 1, 2, 3, 4]
    assert len([*tmp_path.glob("control/epoch-*")]) == 1


def test_a_manager_made_after_another_job_takes_over(tmp_path: Path) -> None:
    """As in a notebook that stays open while a job trains."""
    with CheckpointManager(tmp_path) as before:
        before.save(1, {"a": 1}).result(600)
        code = "import sys; from s3loader.checkpoint import *; CheckpointManager(sys.argv[1]).save(2, {'a': 2}).result(600)"
        run_all([[sys.executable, "-c", code, str(tmp_path)]])
        with pytest.raises(FencedError):
            before.save(3, {"a": 3}).result(600)
        with CheckpointManager(tmp_path) as after:
            after.save(4, {"a": 4}).result(600)


def test_overlapping_async_saves_of_dcp(tmp_path: Path) -> None:
    """Two and more, of one path and of steps of a run; the one begun last is what is there in the end."""
    hold, held = threading.Event(), threading.Event()

    class Slow(S3StorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() and not held.is_set():
                held.set()
                assert hold.wait(600)
            return super().write_data(plan, planner)

    first: Any = torch_dcp.async_save({"w": torch.full((4,), 1)}, storage_writer=Slow(tmp_path / "one"), no_dist=True)
    assert held.wait(600)
    second: Any = torch_dcp.async_save(
        {"w": torch.full((4,), 2)}, storage_writer=S3StorageWriter(tmp_path / "one"), no_dist=True
    )
    second.result(600)
    hold.set()
    first.result(600)
    assert load(tmp_path / "one")["w"].tolist() == [2] * 4
    torch_dcp.save({"w": torch.full((4,), 3)}, storage_writer=S3StorageWriter(tmp_path / "one"), no_dist=True)
    assert load(tmp_path / "one")["w"].tolist() == [3] * 4
    futures: list[Any] = [
        torch_dcp.async_save(
            {"w": torch.full((4,), step)}, storage_writer=S3StorageWriter(tmp_path / "run", step=step), no_dist=True
        )
        for step in range(4)
    ]
    for future in futures:
        future.result(600)
    with CheckpointManager(tmp_path / "run") as manager:
        assert manager.steps() == [0, 1, 2, 3]


def test_the_number_after_a_save_under_way_is_free(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        handles = [manager.save(manager.next_step(), {"w": np.zeros(100_000)}) for _ in range(4)]
        assert [handle.result(600).step for handle in handles] == [0, 1, 2, 3]
        assert manager.next_step() == 4


def test_a_live_save_of_this_process_is_not_taken_over(tmp_path: Path) -> None:
    """Two managers save the same step: one is stalled in its upload, and the other must not go on with its files."""
    reached, go_on = threading.Event(), threading.Event()

    def stall(seen: Any, moment: Any) -> None:
        if moment == "after" and seen.key.endswith(".safetensors") and not reached.is_set():
            reached.set()
            assert go_on.wait(600)

    store, _ = open_faulty_store(str(tmp_path), hook=stall)
    state = {"w": np.arange(100_000.0)}
    with store, CheckpointManager(store) as stalled:
        handle = stalled.save(5, state)
        assert reached.wait(600)
        with CheckpointManager(tmp_path) as other:
            assert other.save(5, state).result(600).resumed == 0
            go_on.set()
            with pytest.raises(StepExistsError):
                handle.result(600)
            assert other.open(5).verify() == []
            other.gc(grace=0)
            assert other.open(5).verify() == []


def test_save_in_one_process_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    save(tmp_path, {"a": 1}, rank=0, world_size=1)
    assert load(tmp_path) == {"a": 1}


def test_notes_of_an_earlier_start_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agents keep one key-value store through all restarts of a job."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "r")
        monkeypatch.setenv("WORLD_SIZE", "2")

        def notes(local: int, attempt: int = 0) -> Board:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/x/r_y/attempt_{attempt}/0/error.json")
            found = board(0, 1)
            assert found is not None
            return found

        now = time.time()
        monkeypatch.setattr("s3loader.ranks.time.time", lambda: now - 3600)
        notes(1).put("several nodes", "old")
        notes(2).put("one node", "old")
        monkeypatch.undo()
        for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "r", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert notes(1).get("several nodes", 0) is None
        assert notes(2, attempt=1).get("one node", 0) is None
        assert notes(2, attempt=0).get("one node", 0) == "old", "it is of this start"
        notes(1).put("several nodes", "new note")
        assert notes(1).get("several nodes", 0) == "new note"
    finally:
        torch.distributed.destroy_process_group()
