"""Torch state: modules, optimizers, schedulers, generators; training that was restored equals training that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from s3loader.checkpoint import CheckpointManager, CheckpointOptions
from s3loader.errors import CheckpointError, UnsupportedStateError


class Training:
    """A tiny training with everything that has state."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(10, 20), torch.nn.BatchNorm1d(20), torch.nn.Dropout(0.3), torch.nn.Linear(20, 3)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        self.generator = torch.Generator().manual_seed(seed)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(8, 10, generator=self.generator)
            self.optimizer.zero_grad()
            self.model(x).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()

    def items(self) -> dict[str, Any]:
        return {
            "model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
            "rng": {"data": self.generator.get_state(), "dropout": torch.get_rng_state()},
        }  # fmt: skip

    def digest(self) -> list[bytes]:
        return [t.numpy().tobytes() for t in self.model.state_dict().values()]


@pytest.mark.parametrize("how", ["into the objects", "anew"])
def test_restored_training_equals_uninterrupted_training(tmp_path: Path, how: str) -> None:
    straight = Training(1)
    straight.run(6)
    first = Training(1)
    first.run(3)
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, first.items())
        first.run(1)  # goes on while the save is under way
        manager.wait()
        other = Training(2)
        pointers = [p.data_ptr() for p in other.model.parameters()]
        if how == "anew":
            state = manager.restore()
            other.model.load_state_dict(state["model"])
            other.optimizer.load_state_dict(state["optimizer"])
            other.scheduler.load_state_dict(state["scheduler"])
        else:
            target = {k: v for k, v in other.items().items() if k != "rng"}
            state = manager.restore(target=target)
            assert state["model"] is other.model
            state |= manager.restore(items=["rng"])
        assert pointers == [p.data_ptr() for p in other.model.parameters()]
        other.generator.set_state(state["rng"]["data"])
        torch.set_rng_state(state["rng"]["dropout"])
        other.run(3)
    assert other.digest() == straight.digest()


def test_types_layouts_and_constants(tmp_path: Path) -> None:
    base = torch.arange(24).reshape(2, 3, 4)
    items = {
        "t": {
            "bf16": torch.randn(5).bfloat16(), "f8": torch.randn(4).to(torch.float8_e4m3fn),
            "bool": torch.tensor([True, False]), "c64": torch.randn(3, dtype=torch.complex64),
            "conj": torch.randn(3, dtype=torch.complex64).conj(),
            "transposed": base.permute(2, 0, 1), "slice": base[:, 1], "zero_d": torch.tensor(3.5), "empty": torch.empty(0, 4),
            "expanded": torch.tensor([1.0]).expand(3), "parameter": torch.nn.Parameter(torch.ones(2)),
        },
        "c": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
    }  # fmt: skip
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, items).result(600)
        restored = manager.restore()
        assert restored["c"] == items["c"]
        assert isinstance(restored["c"][2], torch.Size)
        for name, tensor in items["t"].items():  # type: ignore[attr-defined]
            have = restored["t"][name]
            assert have.dtype == tensor.dtype
            assert have.shape == tensor.shape
            assert (
                have.view(torch.uint8).equal(tensor.detach().contiguous().resolve_conj().view(torch.uint8))
                if tensor.dim()
                else have == tensor
            )
        plain = load_file(next(tmp_path.rglob("*.safetensors")))
        assert plain["t/bf16"].equal(items["t"]["bf16"])  # type: ignore[index]
        into = torch.zeros(3, 4, 2).permute(1, 2, 0).to(torch.int64)
        manager.restore(target={"t": {"transposed": into}})
        assert into.equal(base.permute(2, 0, 1))


def test_what_torch_cannot_give_is_named(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for bad in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
            with pytest.raises(UnsupportedStateError, match="'m/x'"):
                manager.save(1, {"m": {"x": bad}})
        manager.save(1, {"m": torch.nn.Linear(2, 3)}).result(600)
        with pytest.raises(CheckpointError, match=r"'m/weight' is F32 \[3, 2\] in the checkpoint, F32 \[2, 2\] in the target"):
            manager.restore(target={"m": torch.nn.Linear(2, 2)})
        with pytest.raises(CheckpointError, match=r"(?s)'m'.*Missing key"):
            manager.restore(target={"m": torch.nn.Sequential(torch.nn.Linear(2, 3))})


class FakeCuda:
    """Stands for torch.cuda where there is none: the CPU's tensors count as its own, a copy is made when it is waited for."""

    types = ("cpu",)

    def __init__(self) -> None:
        self.under_way: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.buffers: list[torch.Tensor] = []
        self.waits = 0

    def pinned(self, size: int) -> torch.Tensor:
        self.buffers.append(torch.full((size,), 0xEE, dtype=torch.uint8))
        return self.buffers[-1]

    def stream(self, device: torch.device) -> Any:
        return self

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.under_way.append((target, source))

    def synchronize(self) -> None:
        self.waits += 1
        for target, source in self.under_way:
            target.copy_(source)
        self.under_way.clear()


def on_device(n: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    big = torch.randn(300, 1000, generator=generator)
    return {
        "f32": big,
        "t": torch.randn(50, 70, generator=generator).T,
        "bf16": big[:9].to(torch.bfloat16),
        "half": big[1].half(),
        "bool": big[0] > 0,
        "scalar": torch.tensor(2.5),
        "conj": torch.randn(7, dtype=torch.complex64, generator=generator).conj(),
        "none": torch.empty(0, 3),
        "host": big[3].numpy(),
    }


@pytest.mark.parametrize(("budget", "waits"), [(64 << 20, 1), (1 << 18, None)])
def test_a_device_copies_into_pinned_memory_and_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, waits: int | None
) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr("s3loader_torch.checkpoint_device._cuda", cuda)
    options = CheckpointOptions(part_size=1 << 17, staging_budget=budget, incremental=False)
    with CheckpointManager(tmp_path, options=options) as manager:
        for step in (1, 2):
            cuda.waits = 0
            state = on_device(step)
            handle = manager.save(step, state)
            assert not cuda.under_way  # when save returns, the tensors may be changed
            for value in state.values():
                value.copy_(torch.zeros_like(value)) if isinstance(value, torch.Tensor) else value.fill(0)
            handle.result(600)
            assert cuda.waits == waits if waits is not None else 1 < cuda.waits < 40
        made = len(cuda.buffers)
        assert made == manager.pool.allocated >> 17  # every staging buffer is the device's, and the second save made none
        restored = manager.restore()
        for name, value in on_device(2).items():
            assert torch.equal(torch.as_tensor(restored[name]), torch.as_tensor(value)), name
        assert torch.equal(manager.restore(1)["f32"], on_device(1)["f32"])


def test_what_a_device_copies_on_is_waited_for_once_per_stream() -> None:
    from s3loader_torch import checkpoint_device

    first, second = FakeCuda(), FakeCuda()
    assert checkpoint_device._wait_for(first) == checkpoint_device._wait_for(first) != checkpoint_device._wait_for(second)
    assert checkpoint_device.device_of(torch.zeros(3)) is None  # the processor copies its own memory


class Scaled(torch.nn.Module):
    """Has extra state, and saves its weight doubled."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.scale = torch.zeros(())
        if hooked:
            self._register_state_dict_hook(lambda _m, state, _p, _l: state.update(weight=state["weight"] * 2))
            self._register_load_state_dict_pre_hook(lambda state, *_: state.update(weight=state["weight"] / 2))

    def get_extra_state(self) -> torch.Tensor:
        return self.scale.clone()

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scale = state.clone()


@pytest.mark.parametrize("hooked", [False, True])
def test_a_module_with_a_say_in_its_state_gets_it_loaded(tmp_path: Path, hooked: bool) -> None:
    saved, other = Scaled(hooked), Scaled(hooked)
    saved.weight.data.fill_(5)
    saved.scale += 7
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": saved}).result(600)
        manager.restore(target={"model": other})
    assert other.weight.tolist() == [5, 5, 5]
    assert other.scale.item() == 7


def test_lazy_modules(tmp_path: Path) -> None:
    made = torch.nn.LazyLinear(3)
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UnsupportedStateError, match=r"'m/weight'.*no memory"):
            manager.save(1, {"m": made})
        made(torch.ones(1, 2))
        manager.save(1, {"m": made}).result(600)
        other = torch.nn.LazyLinear(3)
        manager.restore(target={"m": other})
    assert torch.equal(other.weight, made.weight)


def test_tensors_without_memory_of_their_own_are_refused(tmp_path: Path) -> None:
    with FakeTensorMode():
        fake = torch.ones(3)
    with CheckpointManager(tmp_path) as manager, pytest.raises(UnsupportedStateError, match="FakeTensor"):
        manager.save(1, {"x": fake})


def test_an_expanded_target_is_refused(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"x": torch.arange(6.0).reshape(2, 3)}).result(600)
        with pytest.raises(CheckpointError, match="'x': the tensor of the target has elements that share memory"):
            manager.restore(target={"x": torch.zeros(3).expand(2, 3)})
