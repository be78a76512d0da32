"""``torch.distributed.checkpoint.save(use_collectives=False)``: the ranks meet in the store."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.adapters import Box, Identity
from s3loader.checkpoint import CheckpointManager, CheckpointOptions, load, open_checkpoint
from s3loader.checkpoint.rendezvous import meet, shares
from s3loader.errors import ConfigError, IncompleteCheckpointError, S3LoaderError, StepExistsError
from s3loader.torch import S3StorageReader, S3StorageWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

RANK = """
import sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from s3loader.errors import IncompleteCheckpointError
from s3loader_torch.checkpoint_dcp import S3StorageWriter, S3StorageReader
warnings.simplefilter("ignore")
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
full = torch.arange(35.0).reshape(7, 5)
def state(step):
    return {
        "rows": distribute_tensor(full + step, mesh, [Shard(0)]), "same": distribute_tensor(full, mesh, [Replicate()]),
        "plain": torch.arange(4) + step, "deep": {"step": step, "list": [1, {"x": torch.ones(2)}]},
        f"stage{rank}": torch.full((3,), rank),  # as of a pipeline: the others have none
    }
def writer(**kwargs):
    return S3StorageWriter(folder + "/apart", job="j", **kwargs)
for step in (1, 2):
    dcp.save(state(step), storage_writer=writer(step=step), use_collectives=False)
for step in (2, None):
    if step is None:
        dcp.async_save(state(3), storage_writer=writer(), use_collectives=False).result()
    again = {"rows": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)]), "plain": torch.zeros(4, dtype=torch.int64)}
    dcp.load(again, storage_reader=S3StorageReader(folder + "/apart", step=step))
    assert again["rows"].full_tensor().equal(full + (step or 3)) and again["plain"].tolist()[0] == (step or 3)
try:  # what one rank cannot do fails on all, and nobody waits for a deadline
    dcp.save({f"x{rank}": object() if rank else 1, "y": torch.ones(2)}, storage_writer=writer(), use_collectives=False)
    print("saved")
except Exception as error:
    print(type(error).__name__)
dist.barrier()
__import__("gc").collect()  # gloo of torch 2.13 may abort an ending process that still holds collectives
dist.destroy_process_group()
"""


def test_two_ranks_without_collectives(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), "2", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=600) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(err for _, err in told)
    assert "saved" not in told[0][0] + told[1][0]
    assert "IncompleteCheckpointError" in told[0][0]  # tells that rank 1 has failed
    with CheckpointManager(tmp_path / "apart") as manager:
        assert manager.steps() == [3]  # the last one was saved without step=: it replaces the others
        left = [entry.key for entry in manager.store.list("control/save-")]
        assert len(left) <= 1  # of the save that failed
        manager.gc(grace=0)
        assert [entry.key for entry in manager.store.list("control/save-")] == []
    items = load(tmp_path / "apart")
    assert items["rows"].equal(torch.arange(35.0).reshape(7, 5) + 3)
    assert items["deep"]["step"] == 3
    assert items["deep"]["list"][1]["x"].tolist() == [1, 1]
    assert [items[f"stage{rank}"].tolist() for rank in range(2)] == [[0, 0, 0], [1, 1, 1]]
    with open_checkpoint(tmp_path / "apart") as checkpoint:
        assert len(checkpoint.chunks("rows")) == 2
        assert len(checkpoint.chunks("same")) == len(checkpoint.chunks("plain")) == 1  # what both have is written once
        assert checkpoint.verify() == []


def test_one_process_without_collectives(tmp_path: Path) -> None:
    for kwargs in ({"no_dist": True}, {}):
        state: dict[str, Any] = {"w": torch.arange(6.0), "n": 5}
        torch_dcp.save(state, storage_writer=S3StorageWriter(tmp_path), use_collectives=False, **kwargs)
        again: dict[str, Any] = {"w": torch.zeros(6), "n": 0}
        torch_dcp.load(again, storage_reader=S3StorageReader(tmp_path), no_dist=True)
        assert again["w"].equal(state["w"])
        assert again["n"] == 5


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several ranks") as caught:
        torch_dcp.save({"w": torch.ones(2)}, storage_writer=S3StorageWriter(tmp_path, world_size=2), use_collectives=False)
    assert "job=" in caught.value.hint
    planner = torch_dcp.DefaultSavePlanner(enable_plan_caching=True)

    def save_it() -> None:
        writer = S3StorageWriter(tmp_path)
        torch_dcp.save({"w": torch.ones(2)}, storage_writer=writer, use_collectives=False, planner=planner)

    save_it()
    with pytest.raises(ConfigError) as caught:
        save_it()
    assert "enable_plan_caching=False" in caught.value.hint


BOXES = st.lists(
    st.builds(Box, st.sampled_from("abc"), st.tuples(st.integers(0, 2)), st.tuples(st.integers(1, 2)), st.integers(0, 99)),
    max_size=6,
    unique_by=lambda box: box[:3],
)


@settings(max_examples=50, deadline=None)
@given(st.lists(BOXES, min_size=1, max_size=4))
def test_shares_are_whole_and_nothing_is_shared_twice(plans: list[list[Box]]) -> None:
    divided = shares(plans)
    written = [plans[rank][place][:3] for rank, places in enumerate(divided) for place in places]
    assert len(written) == len(set(written))
    assert set(written) == {box[:3] for plan in plans for box in plan}


def test_shares_are_even() -> None:
    same = [Box(f"t{i}", (0,), (9,), 100) for i in range(8)]
    assert [len(places) for places in shares([same] * 4)] == [2] * 4
    alone = [Box("big", (0,), (9,), 500)]
    assert [len(places) for places in shares([alone + same, same])] == [3, 6]


def in_threads(path: Path, worlds: list[int], step: int | None, deadline: float) -> list[Any]:
    """What every rank that comes gets."""
    results: list[Any] = [None] * len(worlds)

    def rank_work(rank: int) -> None:
        with CheckpointManager(path, options=CheckpointOptions(deadline=deadline)) as manager:
            identity = Identity(rank, worlds[rank], f"job of {path}")
            try:
                results[rank] = meet(manager, identity, step, [Box("a", (0,), (4,), 16)])
            except S3LoaderError as error:
                results[rank] = error

    threads = [threading.Thread(target=rank_work, args=(rank,)) for rank in range(len(worlds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    results = in_threads(tmp_path, [3, 3], None, 0.5)
    assert isinstance(results[0], IncompleteCheckpointError)
    assert results[0].missing == [2]
    assert all(isinstance(error, IncompleteCheckpointError) and error.hint and error.url for error in results)


def test_a_step_that_is_taken_is_refused_on_all_ranks(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(4, {"a": 1}).result(600)
    first, second = in_threads(tmp_path, [2, 2], 4, 20)
    assert isinstance(first, StepExistsError)
    assert isinstance(second, IncompleteCheckpointError)
    assert "is committed already" in str(second)
    first, second = in_threads(tmp_path, [2, 2], 5, 20)
    assert first.attempt.id == second.attempt.id
    assert sorted(first.own + second.own) == [0]
