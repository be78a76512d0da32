"""What s3loader's checkpoints need to know of torch: tensors, modules, and torch's small constants.

Found by the core through `FRAMEWORK`, by name, at the first sight of one of torch's objects.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from s3loader import CheckpointError, UnsupportedStateError
from s3loader.adapters import (
    LARGE,
    LeafAdapter,
    Opened,
    Piece,
    Source,
    Target,
    WithState,
    fresh_memory,
    loading,
    nbytes,
    overlaps,
)
from s3loader_torch.checkpoint_device import device_of

__all__ = ["DTYPES", "FRAMEWORK", "SHARDED", "TORCH", "tensor_bytes", "torch_dtype"]

DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, torch_name)
    for name, torch_name in {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
        "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
        "C64": "complex64", "C128": "complex128", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, torch_name)
}  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of that safetensors name.

    Raises:
        CheckpointError: this torch has none.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise CheckpointError(f"this torch has no type for {name}", hint="install a newer torch") from None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable; kept alive by the view."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()  # typed as no Buffer before Python 3.12
    return memoryview(flat)


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _memoryless(tensor: torch.Tensor) -> bool:
    """Whether it is a lazy module's parameter that is not made yet, or of a class that only poses as a tensor (a fake
    tensor, a wrapper around others)."""
    own: Any = type(tensor)  # typed as what cannot be bound
    plain: Any = torch.Tensor
    return is_lazy(tensor) or own.__torch_dispatch__ is not plain.__torch_dispatch__


_OF_STATE: Final = (
    "state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict", "get_extra_state", "set_extra_state"
)  # fmt: skip
_HOOKS: Final = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def _state_is_its_memory(module: torch.nn.Module) -> bool:
    """Whether the state of `module` is the memory of its parameters and buffers and nothing else: no part of it has
    methods or hooks of its own for its state."""
    return not any(
        any(getattr(part, hooks, None) for hooks in _HOOKS)
        or any(not getattr(part, name).__func__.__module__.startswith("torch.nn.modules.") for name in _OF_STATE)
        for part in module.modules()
    )


def _host(tensor: torch.Tensor) -> memoryview:
    """Its bytes in host memory in C order; a copy where they are not there already."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return tensor_bytes(plain)


def _piece(offset: tuple[int, ...], shape: tuple[int, ...], tensor: torch.Tensor) -> Piece:
    """`tensor`, to be saved as the box of `shape` at `offset`."""
    return Piece(offset, shape, functools.partial(_host, tensor), device_of(tensor))


class _Tensor:
    """Dense tensors on any device."""

    kind = "torch"

    def source(self, value: torch.Tensor) -> Source:
        if _memoryless(value):
            raise UnsupportedStateError(
                f"a {type(value).__qualname__} has no memory of its own to save", hint="save the tensors it is made of"
            )
        if value.layout is not torch.strided or value.is_quantized or value.dtype not in _NAMES or value.is_nested:
            what = f"{value.layout} tensors" if value.layout is not torch.strided else f"tensors of {value.dtype}"
            raise UnsupportedStateError(
                f"{'nested tensors' if value.is_nested else what} cannot be saved", hint="convert it to a dense tensor first"
            )
        if value.device.type == "meta":
            raise UnsupportedStateError(
                "a tensor on the meta device has no data to save", hint="materialise it first: module.to_empty(device=...)"
            )
        shape = tuple(value.shape)
        return Source(self.kind, _NAMES[value.dtype], shape, [_piece((0,) * len(shape), shape, value)])

    def into(self, value: torch.Tensor) -> Target | None:
        name = _NAMES.get(value.dtype)
        if (why := _why_not(value)) or name is None:
            raise CheckpointError(
                f"the tensor of the target {why or f'is of {value.dtype}, which no checkpoint holds'}",
                hint="give a dense tensor with memory of its own (module.to_empty(device=...), tensor.contiguous()), or None",
            )
        shape = tuple(value.shape)
        if _plain(value):
            return Target(name, shape, [Piece((0,) * len(shape), shape, lambda: tensor_bytes(value))], lambda: value, True)
        staged = self.fresh(name, shape)

        def finish() -> torch.Tensor:
            with torch.no_grad(), torch.inference_mode(value.is_inference()):
                value.copy_(staged.finish())
            return value

        return Target(name, shape, staged.pieces, finish, True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        made: list[torch.Tensor] = []

        def allocate() -> memoryview:
            made.append(_empty(dtype, shape))
            return tensor_bytes(made[0])

        return Target(dtype, shape, [Piece((0,) * len(shape), shape, allocate)], lambda: made[0])


def _why_not(tensor: torch.Tensor) -> str:
    """Why a tensor cannot be filled; empty where it can."""
    if tensor.device.type == "meta":
        return "is on the meta device, so there is no memory to fill"
    if _memoryless(tensor):
        return f"is a {type(tensor).__qualname__}, which has no memory of its own"
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        return "is not dense"
    return "has elements that share memory (it is expanded)" if overlaps(tensor.shape, tensor.stride()) else ""


def _empty(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose memory was never touched; large ones are on huge pages."""
    size = nbytes(dtype, shape)
    if size < LARGE:
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.frombuffer(fresh_memory(size), dtype=torch.uint8).view(torch_dtype(dtype)).reshape(shape)


TORCH: Final[LeafAdapter] = _Tensor()


class _Sharded:
    """`DTensor` (FSDP2, tensor parallel) and `ShardedTensor` (FSDP1): every rank saves and restores its own boxes.

    Of the replicas along a mesh dimension only the first saves. The kind says how a `DTensor` was placed on its mesh:
    ``torch.dtensor.S0,R@dp,tp``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def source(self, value: Any) -> Source:
        boxes, mine = _local_boxes(value)
        pieces = [_piece(*box) for box in boxes] if mine else []
        if value.dtype not in _NAMES:
            raise UnsupportedStateError(
                f"tensors of {value.dtype} cannot be saved",
                hint="cast it to a type that safetensors knows, e.g. float32 or bfloat16",
            )
        return Source(self.kind, _NAMES[value.dtype], tuple(value.size()), pieces, sharded=True)

    def into(self, value: Any) -> Target | None:
        boxes, _ = _local_boxes(value)
        inner = [(offset, shape, TORCH.into(local)) for offset, shape, local in boxes]
        pieces = [
            piece._replace(offset=offset, shape=shape)
            for offset, shape, target in inner
            for piece in (target.pieces if target is not None else ())
        ]
        if value.dtype not in _NAMES:
            raise CheckpointError(f"the tensor of the target is of {value.dtype}, which no checkpoint holds")

        def finish() -> Any:
            for _, _, target in inner:
                if target is not None:
                    target.finish()
            return value

        return Target(_NAMES[value.dtype], tuple(value.size()), pieces, finish, True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        return TORCH.fresh(dtype, shape)

    def beside(self, dtype: str, shape: tuple[int, ...], neighbours: Iterable[Any]) -> Target:
        """On the mesh of a `DTensor` among `neighbours` that has as many dimensions (and the same names) as the one saved."""
        spread = [value for value in neighbours if _is_sharded(value)]
        if not spread:
            return self.fresh(dtype, shape)
        placed, _, names = self.kind.removeprefix("torch.dtensor.").partition("@")
        placements = [_placement(text) for text in placed.split(",")]
        meshes = {value.device_mesh for value in spread if hasattr(value, "device_mesh")}
        fitting = [mesh for mesh in meshes if mesh.ndim == len(placements)]
        named = [mesh for mesh in fitting if names and names == _mesh_names(mesh)]
        if None in placements or len(named or fitting) != 1:
            raise CheckpointError(
                "it was spread over processes when it was saved, and the target has no place for it, and no mesh of "
                f"{len(placements)} dimensions to spread it over",
                hint="give a target for it: a DTensor (for an optimizer, the state after one step or get_state_dict's)",
            )
        return spread_target((named or fitting)[0], placements, dtype, shape)

    def like(self, value: Any, dtype: str) -> Target:
        if not hasattr(value, "device_mesh"):
            raise CheckpointError(
                f"a {type(value).__qualname__} is filled in place only", hint="restore without assign=True, or without it"
            )
        device = None if value.device.type == "meta" else value.device
        return spread_target(value.device_mesh, value.placements, dtype, tuple(value.shape), device)


def spread_target(mesh: Any, placements: Sequence[Any], dtype: str, shape: tuple[int, ...], device: Any = None) -> Target:
    """A new `DTensor` with these placements on that mesh; this rank reads its own box."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local_shape, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    local = torch.empty(local_shape, dtype=torch_dtype(dtype), device=device if device is not None else mesh.device_type)
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    target = SHARDED.into(whole)
    assert target is not None
    return target


def _placement(text: str) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    if text == "R":
        return Replicate()
    return Shard(int(text[1:])) if text[:1] == "S" and text[1:].isdecimal() else None


def _placed(placement: Any) -> str:
    from torch.distributed.tensor import Shard

    if placement.is_replicate():
        return "R"
    return f"S{placement.dim}" if type(placement) is Shard else "?"


def _mesh_names(mesh: Any) -> str:
    return ",".join(mesh.mesh_dim_names or ())


def _kind_of(value: Any) -> str:
    if type(value).__name__ == "ShardedTensor":
        return "torch.sharded"
    names = _mesh_names(value.device_mesh)
    return f"torch.dtensor.{','.join(map(_placed, value.placements))}" + (f"@{names}" if names else "")


SHARDED: Final = _Sharded("torch.sharded")
_Box = tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]


def _local_boxes(value: Any) -> tuple[list[_Box], bool]:
    """Offset, shape and data of what this rank holds, and whether it is this rank that saves it."""
    if type(value).__name__ == "ShardedTensor":
        shards = value.local_shards()
        return [(tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes), s.tensor) for s in shards], True
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in value.placements):
        raise UnsupportedStateError("a DTensor of partial sums has no value yet", hint="redistribute it first")
    coordinate = value.device_mesh.get_coordinate()
    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    if coordinate is None or 0 in shape:
        return [], False
    first = all(at == 0 for at, placement in zip(coordinate, value.placements, strict=True) if placement.is_replicate())
    return [(tuple(offset), tuple(shape), value.to_local())], first


def _is_sharded(value: Any) -> bool:
    return any(
        cls.__name__ in ("DTensor", "ShardedTensor") and cls.__module__.startswith("torch.") for cls in type(value).__mro__
    )


class _Torch:
    def adapter(self, value: Any) -> LeafAdapter | None:
        if _is_sharded(value):
            return _Sharded(_kind_of(value))
        return TORCH if isinstance(value, torch.Tensor) else None

    def adapter_of_kind(self, kind: str) -> LeafAdapter | None:
        if kind.startswith(("torch.dtensor.", "torch.sharded")):
            return _Sharded(kind)
        return TORCH if kind == "torch" else None

    def node(self, value: Any) -> Opened | None:
        """A class that somebody has registered with `torch.utils._pytree`; Python's own containers are the core's."""
        known = _pytree.SUPPORTED_NODES.get(type(value))
        if known is None or type(value).__module__ in ("builtins", "collections"):
            return None
        children, context = known.flatten_fn(value)
        keys = _keys(known, value, children)
        tag = "list" if keys == list(range(len(children))) else "dict"

        def rebuild(values: dict[Any, Any]) -> Any:
            return known.unflatten_fn([values[key] for key in keys], context)

        return Opened(tag, dict(zip(keys, children, strict=True)), rebuild, fixed=True, foreign=True)

    def object(self, value: Any) -> WithState | None:
        """A module or an optimizer; everything else that has ``state_dict()`` is the core's."""
        if isinstance(value, torch.nn.Module):
            return WithState(value.state_dict(), functools.partial(_load_module, value), exact=True)
        if isinstance(value, torch.optim.Optimizer):
            parameters = [parameter for group in value.param_groups for parameter in group["params"]]
            place = functools.partial(_place, parameters)
            return WithState(
                value.state_dict(), functools.partial(_load_optimizer, value), exact=True, near=parameters, place=place
            )
        return None

    def encode(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, torch.dtype):
            return "torch.dtype", str(value).removeprefix("torch.")
        if isinstance(value, torch.device):
            return "torch.device", str(value)
        if isinstance(value, torch.Size):
            return "torch.size", list(value)
        return None

    def decode(self, tag: str, of: Any) -> Any:
        if tag == "torch.dtype" and isinstance(getattr(torch, str(of), None), torch.dtype):
            return getattr(torch, str(of))
        if tag == "torch.device":
            return torch.device(of)
        if tag == "torch.size":
            return torch.Size(of)
        raise CheckpointError(f"unknown constant {tag} {of!r}", hint="the checkpoint was written by a newer s3loader")


def _keys(known: Any, value: Any, children: Sequence[Any]) -> list[Any]:
    """What the registry calls the children, else the keys of a mapping that it takes apart in its order, else positions."""
    with_keys = getattr(known, "flatten_with_keys_fn", None)
    if with_keys is not None:
        pairs, _ = with_keys(value)
        return [
            next((getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)), str(key)) for key, _ in pairs
        ]
    if isinstance(value, Mapping) and [*map(id, value.values())] == [*map(id, children)]:
        return [*value]
    return [*range(len(children))]


def _load_module(module: torch.nn.Module, state: Any, name: str, in_place: bool) -> torch.nn.Module:
    """Nothing is left to do for a plain module whose tensors were all filled in place."""
    own = module.state_dict()
    for key, tensor in own.items():
        if not isinstance(tensor, torch.Tensor) or key not in state:
            continue
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"'{name}/{key}' of the target is on the meta device, so there is no memory to fill",
                hint="materialise the module first: module.to_empty(device=...), or restore(..., assign=True)",
            )
        if not isinstance(state[key], torch.Tensor):
            raise CheckpointError(
                f"'{name}/{key}' is a {type(state[key]).__qualname__} in the checkpoint, a tensor in the target",
                hint="restore it without a target and convert it; `s3loader ckpt inspect` tells what was saved",
            )
    if not (in_place and _state_is_its_memory(module) and set(state) == set(own)):
        with loading(module, name):
            module.load_state_dict(state)
    return module


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Any, name: str, in_place: bool) -> torch.optim.Optimizer:
    with loading(optimizer, name):
        optimizer.load_state_dict(state)
    return optimizer


def _place(parameters: Sequence[Any], path: tuple[Any, ...], dtype: str, shape: tuple[int, ...]) -> Target | None:
    """The state of a parameter that is spread over processes is spread as the parameter is, where it has its shape."""
    parameter: Any = None
    if len(path) > 2 and path[0] == "state" and isinstance(path[1], int) and path[1] < len(parameters):
        parameter = parameters[path[1]]
    if type(parameter).__name__ == "ShardedTensor" or not _is_sharded(parameter) or tuple(parameter.shape) != shape:
        return None
    return spread_target(parameter.device_mesh, parameter.placements, dtype, shape, parameter.device)


FRAMEWORK: Final = _Torch()
