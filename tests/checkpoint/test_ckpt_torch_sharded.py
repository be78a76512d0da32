"""State that is spread over processes, and DCP's planners that keep plans from save to save."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner

from s3loader.checkpoint import CheckpointManager, CheckpointOptions, load, save
from s3loader.checkpoint.format import layout
from s3loader.store import open_store
from s3loader.torch import S3StorageReader, S3StorageWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def no_plans_kept() -> Iterator[None]:
    """Planners keep their plans in the class."""
    kept: list[dict[str, Any]] = [
        SavePlanner._cached_save_plan, SavePlanner._cached_final_save_plan, SavePlanner._cached_all_plans,
        SavePlanner._cached_global_plan, SavePlanner._cached_metadata,
    ]  # fmt: skip
    for cache in kept:
        cache.clear()
    yield
    for cache in kept:
        cache.clear()


def caching(**options: Any) -> DefaultSavePlanner:
    return DefaultSavePlanner(enable_plan_caching=True, **options)


def stored(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*.safetensors")}


def state(value: int, size: int = 4) -> dict[str, Any]:
    return {"w": torch.full((size,), value), "n": value, "big": torch.full((70_000,), float(value))}


@pytest.mark.parametrize("run", [True, False])
def test_a_plan_that_is_kept_never_touches_an_earlier_step(tmp_path: Path, run: bool) -> None:
    options = CheckpointOptions(part_size="64KiB")  # an upload of several parts, too
    seen: dict[str, bytes] = {}
    for value in (1, 2, 3):
        writer = S3StorageWriter(tmp_path, step=value if run else None, options=options)
        torch_dcp.save(state(value, 4 if value < 3 else 5), storage_writer=writer, planner=caching(), no_dist=True)
        if run:
            assert seen.items() <= stored(tmp_path).items()
            seen = stored(tmp_path)
        back = load(tmp_path)
        assert (back["w"].tolist(), back["n"], back["big"][0]) == ([value] * (4 if value < 3 else 5), value, value)
    if run:
        for value in (1, 2, 3):
            assert load(tmp_path, step=value)["n"] == value


def test_a_plan_that_another_storage_has_seen(tmp_path: Path) -> None:
    for value in (1, 2):
        torch_dcp.save(state(value), checkpoint_id=str(tmp_path / f"plain{value}"), planner=caching(), no_dist=True)
        torch_dcp.save(state(value), storage_writer=S3StorageWriter(tmp_path / "ours"), planner=caching(), no_dist=True)
    assert load(tmp_path / "ours")["w"].tolist() == [2] * 4


def test_without_collectives_a_kept_plan_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    writers = [S3StorageWriter(tmp_path, step=step) for step in (1, 2)]
    options: dict[str, Any] = {"no_dist": True, "use_collectives": False}
    torch_dcp.save(state(1), storage_writer=writers[0], planner=caching(), **options)
    before = stored(tmp_path)
    with pytest.raises((CheckpointException, Exception), match="enable_plan_caching=False"):
        torch_dcp.save(state(2), storage_writer=writers[1], planner=caching(), **options)
    assert stored(tmp_path) == before
    assert load(tmp_path)["n"] == 1


def test_an_upload_never_overwrites(tmp_path: Path) -> None:
    """Whatever makes two saves take one attempt for theirs: the second fails, the first stays."""
    for size in (10, 100_000):
        folder = tmp_path / str(size)
        with CheckpointManager(folder, options=CheckpointOptions(part_size="64KiB")) as manager:
            manager.save(1, {"x": np.full(size, 1.0)}).result(600)
            before = stored(folder)
            session = manager.session()
            taken = manager.run.roots.read(1).attempt
            session.incarnation.saves = itertools.count(1)  # begins to count anew
            with pytest.raises(Exception, match=r"never overwritten|committed already"):
                manager.save(1, {"x": np.full(size, 2.0)}, on_exists="replace").result(600)
            assert layout.parse_key(next(iter(manager.run.roots.read(1).keys.values()))[0]).attempt == taken  # type: ignore[union-attr]
        assert stored(folder) == before
        assert load(folder)["x"][0] == 1


def test_numpy_through_dcp(tmp_path: Path) -> None:
    saved: dict[str, Any] = {
        "a": np.arange(6).reshape(2, 3), "s": np.float32(2.5), "d": {"l": [np.int64(3), np.ones(2), torch.ones(2)]},
        "t": (np.zeros(1), 4), "z": np.array(7), "b": b"bytes", "w": torch.ones(3),
    }  # fmt: skip
    torch_dcp.save(saved, storage_writer=S3StorageWriter(tmp_path), no_dist=True)
    target: dict[str, Any] = {
        "a": np.zeros((2, 3), int), "s": np.float32(0), "d": {"l": [np.int64(0), np.zeros(2), torch.zeros(2)]},
        "t": (np.ones(1), 0), "z": np.array(0), "b": b"", "w": torch.zeros(3),
    }  # fmt: skip
    torch_dcp.load(target, storage_reader=S3StorageReader(tmp_path), no_dist=True)
    for name in ("a", "s", "z"):
        assert np.array_equal(target[name], saved[name])
        assert type(target[name]) is type(saved[name])
    assert target["d"]["l"][0] == 3
    assert target["d"]["l"][1].tolist() == target["d"]["l"][2].tolist() == [1, 1]
    assert (target["t"][0].tolist(), target["t"][1], target["b"]) == ([0], 4, b"bytes")
    assert load(tmp_path)["a"].tolist() == saved["a"].tolist()
    with pytest.raises(CheckpointException, match="'a' is a ndarray in the checkpoint, a tensor in the target"):
        torch_dcp.load({"a": torch.zeros(2, 3)}, storage_reader=S3StorageReader(tmp_path), no_dist=True)


def test_names_that_dcp_cannot_tell_apart(tmp_path: Path) -> None:
    save(tmp_path, {"x": {1: torch.ones(1), "1": torch.zeros(1)}})
    with pytest.raises(CheckpointException, match="tells them apart"):
        torch_dcp.load({"x": {"1": torch.ones(1)}}, storage_reader=S3StorageReader(tmp_path), no_dist=True)


def test_storage_meta(tmp_path: Path) -> None:
    writer = S3StorageWriter(tmp_path)
    ids = [told.save_id for _ in range(2) if (writer.reset(), told := writer.storage_meta()) and told is not None]
    assert len({*ids}) == 2
    metadata = torch_dcp.save(state(1), storage_writer=writer, no_dist=True)
    for told in (metadata.storage_meta, S3StorageReader(tmp_path).read_metadata().storage_meta):
        assert told is not None
        assert told.checkpoint_id == tmp_path
        assert told.save_id
    loaded = S3StorageReader(tmp_path).read_metadata().storage_meta
    assert loaded is not None
    assert loaded.load_id


RANK = """
import sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.fsdp import fully_shard
from s3loader.checkpoint import CheckpointManager
from s3loader.errors import CheckpointError
from s3loader.torch import S3StorageWriter, S3StorageReader
warnings.simplefilter("ignore")
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
other = init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "tp"))

# planners that keep plans: every save is its own, and readable afterwards
for step in (1, 2, 3):
    rows = distribute_tensor(torch.full((5, 3), float(step)), mesh, [Shard(0)])
    saved = {"rows": rows, "mine": torch.full((3,), step), "step": step}
    if step == 3:
        saved["more"] = torch.ones(2)  # another plan for one rank at least
    writer = S3StorageWriter(folder + "/cached", step=step)
    dcp.save(saved, storage_writer=writer, planner=DefaultSavePlanner(enable_plan_caching=True))
for step in (1, 2, 3):
    rows = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(1)])
    back = {"rows": rows, "mine": torch.zeros(3, dtype=torch.int64), "step": 0}
    dcp.load(back, storage_reader=S3StorageReader(folder + "/cached", step=step))
    assert back["rows"].full_tensor().eq(step).all() and back["mine"].tolist() == [step] * 3 and back["step"] == step, back

# FSDP2, resumed with a fresh optimizer
def training(seed, on=mesh):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3))
    fully_shard(model, mesh=on)
    return model, torch.optim.AdamW(model.parameters(), 0.1, amsgrad=True)

def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 6) * 0.1).square().sum().backward()
        optimizer.step()

model, optimizer = training(0)
steps(model, optimizer, 2)
extra = {"ema": distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])}
extra["same"] = distribute_tensor(torch.ones(3), mesh, [Replicate()])
with CheckpointManager(folder + "/ours", rank=rank, world_size=world, job="j") as manager:
    manager.save(1, {"model": model, "optimizer": optimizer, "extra": extra}).result(600)
    steps(model, optimizer, 2)
    again, fresh = training(5)
    at = manager.open(1)
    got = at.restore({"model": again, "optimizer": fresh, "extra": {}}, rank=rank)
    for one, group in zip(fresh.state.values(), fresh.param_groups[0]["params"]):
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert isinstance(one[name], DTensor) and one[name].placements == group.placements, one
            assert one[name].to_local().shape == group.to_local().shape
    steps(again, fresh, 2)
    for a, b in zip(model.parameters(), again.parameters()):
        assert a.to_local().equal(b.to_local())
    assert isinstance(got["extra"]["ema"], DTensor) and got["extra"]["ema"].device_mesh == mesh
    assert got["extra"]["ema"].full_tensor().tolist() == list(range(8)) and got["extra"]["ema"].to_local().numel() == 4
    assert got["extra"]["same"].placements == (Replicate(),)
    # only the optimizer: its parameters tell the mesh
    _, fresh = training(6)
    at.restore({"optimizer": fresh}, rank=rank)
    assert all(isinstance(s["exp_avg"], DTensor) for s in fresh.state.values())
    # into lower precision, by conversion
    half, _ = training(7)
    half.to(torch.bfloat16)
    at.restore({"model": half}, rank=rank)
    whole, _ = training(7)
    at.restore({"model": whole}, rank=rank)
    for a, b in zip(whole.parameters(), half.parameters()):
        assert a.to_local().bfloat16().equal(b.to_local())
    # on the meta device, and of other types: memory as the module is spread, of the types that were saved
    manager.save(2, {"model": torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3)).bfloat16()}).result(60)
    for at_step in (at, manager.open(2)):
        with torch.device("meta"):
            bare = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3))
        fully_shard(bare, mesh=mesh)
        for into in (bare, training(8)[0]):
            at_step.restore({"model": into}, rank=rank, assign=True)
            for name, a in into.state_dict().items():
                assert isinstance(a, DTensor) and not a.is_meta, a
                assert a.dtype == (torch.float32 if at_step is at else torch.bfloat16)
                assert a.full_tensor().float().numpy().tolist() == at_step["model/" + name].astype("f4").tolist()
    low = {name: torch.zeros_like(value).bfloat16() for name, value in whole.state_dict().items()}
    at.restore({"model": low}, rank=rank, convert=True)
    assert all(low[name].to_local().equal(value.to_local().bfloat16()) for name, value in whole.state_dict().items())
    # another kind of mesh has no place for it
    try:
        at.restore({"extra": {"same": distribute_tensor(torch.zeros(3), other, [Replicate(), Replicate()])}}, rank=rank)
        raise AssertionError
    except CheckpointError as error:
        assert "extra/ema" in str(error) and error.hint, error
    # nothing of the target is spread: whole
    assert at.restore({"extra": None}, rank=rank)["extra"]["ema"].tolist() == list(range(8))
dist.barrier()
__import__("gc").collect()  # gloo of torch 2.13 may abort an ending process that still holds collectives
dist.destroy_process_group()
"""


def test_several_processes(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    items = load(tmp_path / "ours", step=1)
    assert items["extra"]["ema"].tolist() == list(range(8))
    with open_store(tmp_path / "cached") as store:
        assert not list(store.list("control/save-")), "what the ranks were told is left behind"
