"""Torch's own doors to checkpoints: DTensor and FSDP shards, torch.distributed.checkpoint, torch.save, Lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from s3loader.checkpoint import CheckpointManager, LatestN, load, open_checkpoint
from s3loader.errors import ConfigError, ObjectNotFoundError
from s3loader.torch import S3Checkpoint, S3StorageReader, S3StorageWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: Any, optimizer: Any, step: int) -> dict[str, Any]:
    m, o = get_state_dict(model, optimizer)
    return {"model": m, "optim": o, "extra": {"step": step, "t": (1, 2), "l": ["a", {"b": torch.arange(3)}], "none": None}}


def test_dcp_saves_and_loads(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch_dcp.save(state_of(model, optimizer, 7), storage_writer=S3StorageWriter(tmp_path), no_dist=True)
    assert not list(tmp_path.rglob("*.distcp"))
    torch.manual_seed(4)
    other = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
    other_optimizer = torch.optim.AdamW(other.parameters())
    state = state_of(other, other_optimizer, 0)
    torch_dcp.load(state, storage_reader=S3StorageReader(), checkpoint_id=str(tmp_path), no_dist=True)
    set_state_dict(other, other_optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert state["extra"]["step"] == 7
    assert state["extra"]["l"][1]["b"].tolist() == [0, 1, 2]
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert a.equal(b)
    assert str(optimizer.state_dict()) == str(other_optimizer.state_dict())
    # the same checkpoint through our own door
    items = load(tmp_path)
    assert items["extra"]["t"] == (1, 2)
    assert items["model"]["0.weight"].equal(model.state_dict()["0.weight"])


def test_dcp_replaces_whole_and_keeps_steps(tmp_path: Path) -> None:
    for value in (1, 2):
        future = torch_dcp.async_save(
            {"w": torch.full((4,), value)}, storage_writer=S3StorageWriter(tmp_path / "one"), no_dist=True
        )
        future.result()
    with CheckpointManager(tmp_path / "one") as manager:
        assert manager.steps() == [1]
        assert manager.restore()["w"].tolist() == [2] * 4
    for step in (10, 20, 30):
        torch_dcp.save(
            {"w": torch.full((4,), step)},
            storage_writer=S3StorageWriter(tmp_path / "run", step=step, keep=LatestN(2)),
            no_dist=True,
        )
    state = {"w": torch.zeros(4)}
    torch_dcp.load(state, storage_reader=S3StorageReader(tmp_path / "run", step=20), no_dist=True)
    assert state["w"].tolist() == [20] * 4
    with CheckpointManager(tmp_path / "run") as manager:
        assert manager.steps() == [20, 30]


def test_dcp_reads_what_a_manager_saved_and_converts_types(tmp_path: Path) -> None:
    model, _ = trained()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": model, "extra": {"n": 5, "lr": [0.1, 0.2]}}).result(600)
    state: dict[str, Any] = {
        "model": {k: torch.zeros_like(v, dtype=torch.bfloat16) for k, v in model.state_dict().items()},
        "extra": {"n": 0},
    }
    torch_dcp.load(state, storage_reader=S3StorageReader(tmp_path), no_dist=True)
    assert state["extra"]["n"] == 5
    for name, tensor in model.state_dict().items():
        assert state["model"][name].equal(tensor.bfloat16())


class Broken(S3StorageWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        self._need()._manager.store._backend = _Failing(self._need()._manager.store._backend)  # type: ignore[assignment]
        return super().write_data(plan, planner)


class _Failing:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if key.endswith(".safetensors"):
            raise OSError("the disk is on fire")
        return self._inner.put(key, *args, **kwargs)


def test_dcp_loses_no_error_and_no_checkpoint(tmp_path: Path) -> None:
    torch_dcp.save({"w": torch.ones(3)}, storage_writer=S3StorageWriter(tmp_path), no_dist=True)
    with pytest.raises(CheckpointException, match="on fire"):
        torch_dcp.save({"w": torch.zeros(3)}, storage_writer=Broken(tmp_path), no_dist=True)
    with pytest.raises(CheckpointException, match="which a checkpoint cannot hold"):
        torch_dcp.save({"w": object()}, storage_writer=S3StorageWriter(tmp_path), no_dist=True)
    assert load(tmp_path)["w"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointException, match="no checkpoint path"):
        torch_dcp.load({}, storage_reader=S3StorageReader(), no_dist=True)


def test_single_object_checkpoints(tmp_path: Path) -> None:
    model, _ = trained()
    checkpoint = S3Checkpoint(region="eu-central-1")
    uri = f"file://{tmp_path}/deep/model.ckpt"
    with checkpoint.writer(uri) as writer:
        torch.save(model.state_dict(), writer)
    with checkpoint.reader(uri) as reader:
        state = torch.load(reader, weights_only=True)
    assert state["0.weight"].equal(model.state_dict()["0.weight"])

    def fail_inside() -> None:
        with checkpoint.writer(uri) as writer:
            writer.write(b"half")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail_inside()
    with checkpoint.reader(uri) as reader:
        assert len(torch.load(reader, weights_only=True)) == 4
    with pytest.raises(ObjectNotFoundError):
        checkpoint.reader(f"file://{tmp_path}/nothing")
    with pytest.raises(ConfigError):
        checkpoint.writer("s3://bucket/")


RANK = """
import os, sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.fsdp import fully_shard
from s3loader.checkpoint import CheckpointManager
from s3loader_torch.checkpoint_dcp import S3StorageWriter, S3StorageReader
warnings.simplefilter("ignore")
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
full = torch.arange(35.0).reshape(7, 5)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(2, 6)).sum().backward()
optimizer.step()
state = {
    "rows": distribute_tensor(full, mesh, [Shard(0)]), "columns": distribute_tensor(full, mesh, [Shard(1)]),
    "same": distribute_tensor(full, mesh, [Replicate()]), "plain": torch.arange(4), "step": 3,
}
with CheckpointManager(folder + "/ours", rank=rank, world_size=world, job=f"w{world}") as manager:
    manager.save(world, {"state": state, "model": model, "optimizer": optimizer}).result(600)
    target = {"rows": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)])}
    got = manager.open(world).restore({"state": target}, rank=rank)["state"]["rows"]
    assert got is target["rows"] and got.full_tensor().equal(full)
dcp.save(state, storage_writer=S3StorageWriter(folder + "/dcp"))
again = {"rows": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)]), "plain": torch.zeros(4, dtype=torch.int64), "step": 0}
dcp.load(again, storage_reader=S3StorageReader(folder + "/dcp"))
assert again["rows"].full_tensor().equal(full) and again["step"] == 3 and again["plain"].tolist() == [0, 1, 2, 3]
whole = {k: v.full_tensor() for k, v in model.state_dict().items()}
if rank == 0:
    torch.save(whole, folder + "/whole.pt")
dist.barrier()
__import__("gc").collect()  # gloo of torch 2.13 may abort an ending process that still holds collectives
dist.destroy_process_group()
"""


def test_shards_of_several_processes(tmp_path: Path) -> None:
    world = 2
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(world), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=600)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    full = torch.arange(35.0).reshape(7, 5)
    items = load(tmp_path / "ours")
    for name in ("rows", "columns", "same"):
        assert items["state"][name].equal(full), name
    whole = torch.load(tmp_path / "whole.pt")
    for name, tensor in whole.items():
        assert items["model"][name].equal(tensor)
    assert items["optimizer"]["state"][0]["exp_avg"].shape == whole["0.weight"].shape
    with open_checkpoint(tmp_path / "ours") as checkpoint:
        assert len(checkpoint.chunks("state/rows")) == 2
        assert len(checkpoint.chunks("state/same")) == 1
    state = {"rows": torch.zeros(7, 5), "columns": torch.zeros(7, 5), "step": 0}
    torch_dcp.load(state, storage_reader=S3StorageReader(tmp_path / "dcp"), no_dist=True)
    assert state["rows"].equal(full)  # type: ignore[attr-defined]
    assert state["columns"].equal(full)  # type: ignore[attr-defined]
    assert state["step"] == 3


CONNECTOR = """
import sys, logging, warnings
warnings.simplefilter("ignore")
import torch, lightning
from types import SimpleNamespace
from s3loader.errors import ConfigError
from s3loader.lightning import S3CheckpointIO
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
folder = sys.argv[1]
config = SimpleNamespace(max_attempts=4, force_path_style=True, profile=None, unsigned=False, requester_pays=False)
io = S3CheckpointIO("eu-central-1", endpoint="http://x:1", s3client_config=config)
assert io._options["endpoint_url"] == "http://x:1" and io._options["region"] == "eu-central-1"
assert io._options["store_options"].max_attempts == 4
for wrong in ({"endpoint_ulr": "x"}, {"prefix_strategy": 1}):
    try:
        S3CheckpointIO(**wrong)
        raise SystemExit("not refused")
    except ConfigError as error:
        assert error.hint

class Model(lightning.LightningModule):
    def __init__(self, width, name="x"):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, width)
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

io = S3CheckpointIO(endpoint=None)
data = torch.utils.data.DataLoader(torch.arange(32.0).reshape(8, 4), batch_size=2)
trainer = lightning.Trainer(max_epochs=1, plugins=[io], logger=False, enable_progress_bar=False, enable_checkpointing=False,
    enable_model_summary=False, accelerator="cpu", default_root_dir=folder)
model = Model(3, name="y")
trainer.fit(model, data)
trainer.save_checkpoint(folder + "/last.ckpt")
again = io.load_from_checkpoint(Model, folder + "/last.ckpt")
assert again.hparams == {"width": 3, "name": "y"}, again.hparams
assert all(a.equal(b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
assert io.load_from_checkpoint(Model, folder + "/last.ckpt", map_location="cpu", strict=False, name="z").hparams["name"] == "z"
try:
    trainer.save_checkpoint(folder + "/more.ckpt", storage_options={"a": 1})
    raise SystemExit("not refused")
except ConfigError as error:
    assert "S3CheckpointIO(" in error.hint
print("good")
"""

LIGHTNING = """
import sys, logging, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch, lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from s3loader.lightning import S3CheckpointIO
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

def run(epochs, path=None):
    torch.manual_seed(0)
    model = Model()
    data = torch.utils.data.DataLoader(torch.arange(32.0).reshape(8, 4), batch_size=2)
    saving = ModelCheckpoint(sys.argv[1] + f"/to-{epochs}", save_top_k=1, monitor=None)
    trainer = lightning.Trainer(
        max_epochs=epochs, plugins=[S3CheckpointIO()], callbacks=[saving], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=sys.argv[1],
    )
    trainer.fit(model, data, ckpt_path=path)
    return model, saving.best_model_path

straight, _ = run(4)
_, path = run(2)
resumed, _ = run(4, path)
assert all(a.equal(b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))
io = S3CheckpointIO()
assert io.load_checkpoint(path)["hyper_parameters"]["lr"] == 0.1
io.remove_checkpoint(path)
assert len(list(Path(path).parent.iterdir())) == 0, "only one was to be kept, and it is deleted"
try:
    io.load_checkpoint(path)
except FileNotFoundError:
    print("gone")
"""


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    done = subprocess.run(
        [sys.executable, "-c", CONNECTOR + LIGHTNING, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.split() == ["good", "gone"], done.stderr
