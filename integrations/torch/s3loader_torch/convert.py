"""From bytes to what torch code wants, and cheap passage from worker processes.

A tensor sent from a worker costs a file descriptor, fresh shared memory and a round trip, so a batch of many
small ones travels as one: its bytes are laid end to end, and the list is made again on the other side.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from s3loader.errors import ConfigError, SampleError
from s3loader.loader import Collate, Ragged, collate_fixed, collate_ragged
from s3loader_torch.ring import SharedRows, lend_slot

__all__ = [
    "Packed",
    "RaggedTensor",
    "ReturnType",
    "S3Reader",
    "convert_batch",
    "pack",
    "to_return_type",
    "to_tensors",
    "torch_collate",
]

ReturnType: TypeAlias = Literal["tensor", "bytes", "reader", "sample"]
"""What raw bytes become. ``"tensor"``: a uint8 tensor without a copy. ``"bytes"``: `bytes`. ``"reader"``: a file with the
object's key, as s3torchconnector gives. ``"sample"``: memoryviews from an `S3DataLoader` without workers, else `bytes`."""


_SENDABLE: Final = frozenset({torch.Tensor, str, bool, int, float, complex, type(None)})
"""Types that need no look before they are sent."""

_BY_PIPE: Final = 1 << 20
"""Bytes of a batch up to which a pipe costs less than shared memory (a third, at 128 KiB)."""


class S3Reader(io.BytesIO):
    """A readable, seekable file over one sample."""

    def __init__(self, data: Any = b"", key: str = "", bucket: str = "") -> None:
        super().__init__(data)
        self.key = key
        """Key of the object; ``archive#member`` in a shard."""
        self.bucket = bucket

    def __reduce__(self) -> tuple[Any, ...]:
        return (S3Reader, (self.getvalue(), self.key, self.bucket))


class RaggedTensor(NamedTuple):
    """Rows of unlike length end to end: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: torch.Tensor
    offsets: torch.Tensor
    """int64, rows + 1."""

    def rows(self) -> list[torch.Tensor]:
        """One view per row."""
        ends = self.offsets.tolist()
        return [self.values[low:high] for low, high in itertools.pairwise(ends)]


def tensor_of(view: memoryview) -> torch.Tensor:
    """A uint8 tensor over `view`; a copy only where the memory is read-only."""
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


def _map(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`leaf` of every leaf of lists, tuples and dicts."""
    if isinstance(value, Mapping):
        return {key: _map(item, leaf) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, leaf) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, leaf) for item in value)
    return leaf(value)


class ToReturnType:
    """One sample's raw bytes turned into the return type, then the user's transform. Picklable if that is."""

    def __init__(self, kind: ReturnType, transform: Callable[[Any], Any] | None, bucket: str) -> None:
        self._kind = kind
        self._transform = transform
        self._bucket = bucket

    def __call__(self, sample: Any, key: str = "") -> Any:
        if self._kind == "reader":
            sample = _map(sample, lambda value: S3Reader(value, key, self._bucket) if isinstance(value, memoryview) else value)
        elif self._kind != "sample":
            leaf = tensor_of if self._kind == "tensor" else bytes
            sample = _map(sample, lambda value: leaf(value) if isinstance(value, memoryview) else value)
        return sample if self._transform is None else self._transform(sample)


def to_return_type(kind: ReturnType, transform: Callable[[Any], Any] | None, bucket: str = "") -> Callable[[Any], Any]:
    """The transform for the engine.

    Raises:
        ConfigError: the return type is unknown.
    """
    if kind not in ("tensor", "bytes", "reader", "sample"):
        raise ConfigError(f"unknown return_type {kind!r}", hint='use "tensor", "bytes", "reader" or "sample"')
    return ToReturnType(kind, transform, bucket)


def convert_batch(data: Any, kind: ReturnType) -> Any:
    """Raw bytes in a batch as the return type, arrays as tensors."""
    if type(data) is list and set(map(type, data)) == {memoryview}:  # the usual case, without a call per sample
        if kind == "tensor":
            return [tensor_of(view) for view in data]
        return list(map(bytes, data)) if kind == "bytes" else data

    def leaf(value: Any) -> Any:
        if not isinstance(value, memoryview):
            return _tensor_leaf(value)
        return tensor_of(value) if kind == "tensor" else bytes(value) if kind == "bytes" else value

    return _map(data, leaf)


def to_tensors(data: Any) -> Any:
    """Arrays of a collated batch as tensors over the same memory; anything else as it is."""
    if type(data) is list and set(map(type, data)) == {torch.Tensor}:
        return data
    return _map(data, _tensor_leaf)


def _tensor_leaf(value: Any) -> Any:
    if isinstance(value, Ragged):
        return RaggedTensor(_tensor_leaf(value.values), _tensor_leaf(value.offsets))
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return value


class _Collated:
    """A collate of the engine, for samples that hold tensors. Picklable."""

    def __init__(self, kind: str) -> None:
        self._collate = collate_fixed if kind == "fixed" else collate_ragged

    def __call__(self, samples: list[Any]) -> Any:
        arrays = [_map(sample, lambda value: value.numpy() if isinstance(value, torch.Tensor) else value) for sample in samples]
        return to_tensors(self._collate(arrays))


def torch_collate(collate: Collate) -> Collate:
    """`collate` for samples that may hold CPU tensors."""
    return _Collated(collate) if isinstance(collate, str) else collate


class Packed:
    """A batch on its way out of a worker; unpickles to the batch itself."""

    def __init__(self, rebuild: Callable[..., Any], *parts: Any) -> None:
        self._call = (rebuild, parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call

    def _refuse(self, *_: Any) -> Any:
        raise ConfigError(
            "the collate_fn of the DataLoader gets batches that are packed to leave the worker",
            hint="give the function to the dataset, as collate=",
        )

    __len__ = __iter__ = __getitem__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for hooks
            raise AttributeError(name)
        return self._refuse()


class _Hole:
    """Stands for one packed leaf."""

    __slots__ = ("as_bytes", "index")

    def __init__(self, index: int, as_bytes: bool) -> None:
        self.index = index
        self.as_bytes = as_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hole, (self.index, self.as_bytes))


def _unpack(structure: Any, values: Any, sizes: list[int]) -> Any:
    rows = _rows(values, sizes)

    def fill(value: Any) -> Any:
        if not isinstance(value, _Hole):
            return value
        row = rows[value.index]
        return row.numpy().tobytes() if value.as_bytes else row

    return _map(structure, fill)


def _unpack_list(values: Any, sizes: list[int], as_bytes: bool) -> list[Any]:
    rows = _rows(values, sizes)
    return [row.numpy().tobytes() for row in rows] if as_bytes else list(rows)


def pack(data: Any, kind: ReturnType) -> Any:
    """`data`, or a `Packed` that unpickles to it, where it holds byte strings or flat uint8 tensors; raw bytes as `kind`."""
    as_bytes = kind != "tensor"
    if type(data) is list and set(map(type, data)) == {memoryview}:
        return Packed(_unpack_list, *_joined([np.frombuffer(view, dtype=np.uint8) for view in data]), as_bytes)
    rows: list[Any] = []

    def mark(value: Any) -> Any:
        if isinstance(value, (bytes, memoryview)):
            rows.append(np.frombuffer(value, dtype=np.uint8))
            return _Hole(len(rows) - 1, as_bytes=as_bytes or isinstance(value, bytes))
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 1 and value.device.type == "cpu":
            rows.append(value.numpy())
            return _Hole(len(rows) - 1, as_bytes=False)
        if type(value) not in _SENDABLE:
            _check_sendable(value)
        return value

    structure = _map(data, mark)
    return Packed(_unpack, structure, *_joined(rows)) if rows and not isinstance(data, torch.Tensor) else data


def _check_sendable(value: Any) -> None:
    """The thread of torch's queue prints what it cannot pickle and drops it, and the training process would wait for ever."""
    try:
        ForkingPickler.dumps(value)
    except Exception as error:  # whatever the object's own pickling raises
        raise SampleError(
            f"a batch cannot be sent from a worker: {type(error).__name__}: {error}",
            hint="return tensors, arrays, numbers, text, bytes, or lists and dicts of them from transform= or collate=",
        ) from error


def _joined(rows: list[Any]) -> tuple[Any, list[int]]:
    """(all rows end to end, their sizes): through the queue's pipe while that is cheaper, else in shared memory."""
    sizes = [len(row) for row in rows]
    if sum(sizes) <= _BY_PIPE:
        return bytearray(b"".join(rows)), sizes
    slot = lend_slot(sum(sizes))
    if slot is not None:
        np.concatenate(rows, out=slot.data[: sum(sizes)])
        return SharedRows(slot, sum(sizes)), sizes
    values = torch.empty(sum(sizes), dtype=torch.uint8)
    np.concatenate(rows, out=values.numpy())
    return values, sizes


def _rows(values: Any, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    if isinstance(values, bytearray):
        values = tensor_of(memoryview(values))
    return torch.split(values, sizes)
