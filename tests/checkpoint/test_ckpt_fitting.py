"""Targets that are not quite what was saved: other names, missing and unexpected parts, other types; each on request."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch

from s3loader.checkpoint import CheckpointManager, Restored, load
from s3loader.errors import CheckpointError, ConfigError, IntegrityError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Net(torch.nn.Module):
    def __init__(self, *parts: str, width: int = 3) -> None:
        super().__init__()
        for part in parts:
            self.add_module(part, torch.nn.Linear(2, width))


class Wrapped(torch.nn.Module):
    """As DDP, ``torch.compile`` and others hold what they wrap."""

    def __init__(self, inner: torch.nn.Module, attribute: str) -> None:
        super().__init__()
        self.add_module(attribute, inner)


def net(seed: int, *parts: str, wrap: tuple[str, ...] = (), **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    made: torch.nn.Module = Net(*(parts or ("body", "head")), **kwargs)
    for attribute in wrap:
        made = Wrapped(made, attribute)
    return made


def tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(a.equal(b) for a, b in zip(one, other, strict=True))


def saved(path: Path, items: dict[str, Any]) -> CheckpointManager:
    manager = CheckpointManager(path)
    manager.save(1, items).result(600)
    return manager


def test_missing_and_unexpected(tmp_path: Path) -> None:
    source, target = net(0, "body", "head"), net(1, "body", "extra")
    body, extra = source.get_submodule("body"), tensors(target.get_submodule("extra"))
    with saved(tmp_path, {"model": source, "more": {"a": np.ones(2), "b": 1}}) as manager:
        with pytest.raises(CheckpointError, match="extra") as caught:
            manager.restore(target={"model": target})
        assert "strict=False" in str(caught.value.hint)
        mine = np.zeros(3)
        restored = manager.restore(target={"model": target, "more": {"a": np.zeros(2), "c": mine}, "new": 7}, strict=False)
        assert isinstance(restored, Restored)
        assert restored["model"] is target
        assert restored.missing == ["model/extra.weight", "model/extra.bias", "more/c", "new"]
        assert restored.unexpected == ["model/head.weight", "model/head.bias"]
        assert equal(tensors(target.get_submodule("body")), tensors(body))
        assert equal(tensors(target.get_submodule("extra")), extra), "left as it was"
        assert restored["more"]["c"] is mine
        assert restored["more"]["a"].tolist() == [1, 1]
        assert restored["more"]["b"] == 1
        assert type(manager.restore(target={"model": source})) is dict


def test_what_is_not_in_the_module_is_not_read(tmp_path: Path) -> None:
    with saved(tmp_path, {"model": net(0, "body", "head")}) as manager:
        for path in tmp_path.rglob("*.safetensors"):
            data = bytearray(path.read_bytes())
            at = data.index(np.float32(net(0, "body", "head").state_dict()["head.weight"][0, 0].item()).tobytes())
            data[at] ^= 1
            path.write_bytes(data)
        with pytest.raises(IntegrityError):
            manager.restore(target={"model": net(1)})
        assert len(manager.restore(target={"model": net(1, "body")}, strict=False).unexpected) == 2  # type: ignore[attr-defined]


WRAPS = [(), ("module",), ("_orig_mod",), ("_orig_mod", "module"), ("module", "_orig_mod"), ("_fsdp_wrapped_module",)]


@pytest.mark.parametrize(("of_source", "of_target"), list(itertools.product(WRAPS, WRAPS)))
def test_wrappers(tmp_path: Path, of_source: tuple[str, ...], of_target: tuple[str, ...]) -> None:
    source, target = net(0, wrap=of_source), net(1, wrap=of_target)
    with saved(tmp_path, {"model": source}) as manager:
        if of_source != of_target:
            with pytest.raises(CheckpointError) as caught:
                manager.restore(target={"model": target})
            assert "strip=True" in str(caught.value.hint)
        assert manager.restore(target={"model": target}, strip=True)["model"] is target
    assert equal(tensors(source), tensors(target))


def test_wrappers_of_parts_and_names_that_only_look_so(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = Net("module", "other")  # a part is really called module
    with saved(tmp_path, {"model": source}) as manager:
        target = Net("module", "other")
        manager.restore(target={"model": target}, strip=True)
        assert equal(tensors(source), tensors(target))
        compiled = Net("other")
        compiled.add_module("module", Wrapped(torch.nn.Linear(2, 3), "_orig_mod"))
        manager.restore(target={"model": compiled}, strip="_orig_mod")
        assert torch.equal(compiled.get_parameter("module._orig_mod.weight"), source.get_parameter("module.weight"))
        with pytest.raises(ConfigError, match="strip"):
            manager.restore(target={"model": target}, strip=("",))
        with pytest.raises(CheckpointError, match="one name without"):
            manager.restore(target={"model": net(0, "a", "module.a".replace(".", "_"))}, strip=("a.", "module_a."))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_assign(tmp_path: Path, device: str) -> None:
    source = net(0).to(torch.float64)
    with saved(tmp_path, {"model": source}) as manager:
        target = net(1).to(device)
        if device == "meta":
            for options in ({}, {"strict": False}, {"strip": True}):
                with pytest.raises(CheckpointError, match="meta device") as caught:
                    manager.restore(target={"model": target}, **options)
                assert "assign=True" in str(caught.value.hint)
        manager.restore(target={"model": target}, assign=True)
        assert equal(tensors(source), tensors(target))
        assert next(target.parameters()).dtype == torch.float64
        plain = net(1)
        manager.restore(target={"model": plain})
        assert next(plain.parameters()).dtype == torch.float32, "converted, as load_state_dict does"


def test_shapes_are_never_bent(tmp_path: Path) -> None:
    with saved(tmp_path, {"model": net(0), "w": np.zeros((2, 3))}) as manager:
        for options in ({}, {"strict": False}, {"convert": True}, {"strip": True}, {"assign": True}):
            with pytest.raises(CheckpointError) as caught:
                manager.restore(target={"model": net(0, width=4)}, **options)
            assert caught.value.hint
            with pytest.raises(CheckpointError, match="w"):
                manager.restore(target={"w": np.zeros((3, 2))}, **options)


NUMPY = ["float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "complex64"]


@pytest.mark.parametrize(("one", "other"), list(itertools.product(NUMPY, NUMPY)))
def test_types_are_converted_on_request(tmp_path: Path, one: str, other: str) -> None:
    """Numbers of one kind into each other, and into wider kinds; numpy's arrays and torch's tensors, contiguous or not."""
    kinds = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}
    dtypes = [np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in (one, other)]
    kind_of = [2 if name == "bfloat16" else kinds[dtype.kind] for name, dtype in zip((one, other), dtypes, strict=True)]
    values = np.array([[0, 1], [1, 0]], dtypes[0])
    with saved(tmp_path, {"a": values, "l": [values]}) as manager:
        array, strided = np.zeros((2, 2), dtypes[1]), np.zeros((2, 4), dtypes[1])[:, ::2]
        tensor = torch.zeros((2, 2), dtype=getattr(torch, other))
        if one != other:
            with pytest.raises(CheckpointError) as caught:
                manager.restore(target={"a": array})
            assert caught.value.hint
        for target in (array, strided, tensor):
            if kind_of[0] <= kind_of[1]:
                restored = manager.restore(target={"a": target, "l": [None]}, convert=True)
                assert restored["a"] is target
                assert np.asarray(
                    target.to(torch.complex64) if isinstance(target, torch.Tensor) else target, "c8"
                ).real.tolist() == [
                    [0, 1],
                    [1, 0],
                ]
            else:
                with pytest.raises(CheckpointError):
                    manager.restore(target={"a": target}, convert=True)


def test_conversion_inside_of_containers(tmp_path: Path) -> None:
    with saved(tmp_path, {"s": OrderedDict(a=np.arange(3.0), b=[np.ones(2), (np.ones(1),)])}) as manager:
        target = OrderedDict(a=np.zeros(3, np.float32), b=[np.zeros(2, np.float16), (np.zeros(1, np.float32),)])
        restored = manager.restore(target={"s": target}, convert=True)["s"]
        assert type(restored) is OrderedDict
        assert restored["a"] is target["a"]
        assert target["a"].tolist() == [0, 1, 2]  # type: ignore[attr-defined]
        assert restored["b"][1][0].dtype == np.float32
        assert restored["b"][1][0].tolist() == [1]


class Pair(NamedTuple):
    a: Any
    b: Any


def test_every_framework_converts_in_every_container(tmp_path: Path) -> None:
    jax, tensorflow = pytest.importorskip("jax"), pytest.importorskip("tensorflow")
    empty = np.zeros((0, 3))
    with saved(tmp_path, {"p": Pair(np.arange(6.0).reshape(2, 3), [np.arange(4), empty])}) as manager:
        abstract = jax.ShapeDtypeStruct((2, 3), np.dtype(ml_dtypes.bfloat16))
        for target in (jax.numpy.zeros((2, 3), "float32"), abstract, np.zeros((2, 3), ">f4"), torch.zeros(3, 2).half().T):
            pair = Pair(target, [np.zeros(4, "f4"), np.zeros((0, 3), "f4")])
            with pytest.raises(CheckpointError, match="p/a"):
                manager.restore(target={"p": pair})
            got = manager.restore(target={"p": pair}, convert=True)["p"]
            assert type(got) is Pair
            assert got.a.dtype == target.dtype
            assert np.asarray(got.a, "f4").tolist() == [[0, 1, 2], [3, 4, 5]]
            assert got.b[0].tolist() == [0, 1, 2, 3]
            assert got.b[1].shape == (0, 3)
        variable = tensorflow.Variable(tensorflow.zeros((2, 3), "float16"))
        assert manager.restore(target={"p": Pair(variable, [None, None])}, convert=True)["p"].a is variable
        assert variable.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(CheckpointError) as caught:
            manager.restore(target={"p": Pair(np.zeros((2, 3), "i8"), [None, None])}, convert=True)
        assert "convert" not in str(caught.value.hint).replace("conversion", "")


def test_the_simple_door(tmp_path: Path) -> None:
    source, target = net(0, wrap=("module",)), net(1, "body")
    saved(tmp_path, {"model": source}).close()
    found = load(tmp_path, {"model": target}, strip=True, strict=False)
    assert isinstance(found, Restored)
    assert found.unexpected == ["model/module.head.weight", "model/module.head.bias"]
    assert equal(tensors(target), tensors(source)[:2])
