"""From bytes to what torch code wants."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeAlias

import numpy as np
import torch

from s3loader import Collate, ConfigError, Ragged, SampleError
from s3loader.adapters import columns, map_leaves, ragged, stacked
from s3loader_torch.transport import Raw, pack, pack_views, tensor_over

__all__ = [
    "RaggedTensor",
    "ReturnType",
    "S3Reader",
    "convert_batch",
    "pack_batch",
    "to_return_type",
    "to_tensors",
    "torch_collate",
]

ReturnType: TypeAlias = Literal["tensor", "bytes", "reader", "sample"]
"""What raw bytes become. ``"tensor"``: a uint8 tensor without a copy. ``"bytes"``: `bytes`. ``"reader"``: a file with the
object's key, as s3torchconnector gives. ``"sample"``: memoryviews from an `S3DataLoader`, else `bytes`."""


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
    return tensor_over(bytearray(view) if view.readonly else view)


def _views_as(make: Callable[[memoryview], Any], sample: Any) -> Any:
    return map_leaves(sample, lambda value: make(value) if isinstance(value, memoryview) else value)


class ToReturnType:
    """One sample's raw bytes turned into the return type, then the user's transform. Picklable if that is."""

    def __init__(self, kind: ReturnType, transform: Callable[[Any], Any] | None, bucket: str) -> None:
        self._kind = kind
        self._transform = transform
        self._bucket = bucket

    def __call__(self, sample: Any, key: str = "") -> Any:
        if self._kind == "reader":
            sample = map_leaves(
                sample, lambda value: S3Reader(value, key, self._bucket) if isinstance(value, memoryview) else value
            )
        elif self._kind != "sample":
            leaf = tensor_of if self._kind == "tensor" else bytes
            sample = map_leaves(sample, lambda value: leaf(value) if isinstance(value, memoryview) else value)
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

    return map_leaves(data, leaf)


def pack_batch(data: Any, kind: ReturnType | None) -> Any:
    """What leaves a worker for `convert_batch` of `data`, or where `kind` is None for `to_tensors` of it.

    Raises:
        SampleError: it holds something that cannot be sent.
    """
    if kind in ("tensor", "bytes") and type(data) is list and set(map(type, data)) == {memoryview}:
        return pack_views(data, as_bytes=kind == "bytes")
    make: Any = {"tensor": tensor_over, "bytes": bytes}.get(kind or "")

    def leaf(value: Any) -> Any:
        if not isinstance(value, memoryview):
            return _tensor_leaf(value)
        return value if make is None else Raw(value, make)

    return pack(map_leaves(data, leaf))


def to_tensors(data: Any) -> Any:
    """Arrays of a collated batch as tensors over the same memory; anything else as it is."""
    if type(data) is list and set(map(type, data)) == {torch.Tensor}:
        return data
    return map_leaves(data, _tensor_leaf)


def _tensor_leaf(value: Any) -> Any:
    if isinstance(value, Ragged):
        return RaggedTensor(_tensor_leaf(value.values), _tensor_leaf(value.offsets))
    if type(value) is not np.ndarray and not isinstance(value, np.memmap):  # a mask or the like would be lost
        return value
    through = _AS_BITS.get(value.dtype.name)
    if through is not None:
        bits, dtype = through
        return _tensor_leaf(value.view(bits)).view(dtype)
    if value.dtype.kind not in "biufc" or value.dtype.type in (np.longdouble, np.clongdouble):
        return value
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    except ValueError:  # it runs backwards, or over fields of records
        return torch.from_numpy(value.copy())


_AS_BITS: Final = {
    name: (np.dtype(np.int16 if dtype.itemsize == 2 else np.uint8), dtype)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if (dtype := getattr(torch, name, None)) is not None
}
"""Types of `ml_dtypes`, which share their names with torch's: (a type of numpy's as wide, torch's)."""


class _Collated:
    """A collate of the engine, for samples that hold tensors. Picklable."""

    def __init__(self, kind: str) -> None:
        self._ragged = kind == "ragged"
        self._leaf = ragged if self._ragged else stacked

    def __call__(self, samples: list[Any]) -> Any:
        return to_tensors(columns(samples, self._column) if samples else samples)

    def _column(self, values: list[Any], field: str) -> Any:
        if not any(isinstance(value, torch.Tensor) for value in values):
            return self._leaf(values, field)
        tensors = [_tensor_leaf(value) for value in values]
        head = tensors[0]
        for row, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor) or not isinstance(head, torch.Tensor):
                _differ("type", type(head).__name__, type(tensor).__name__, row, field)
        ragged = self._ragged and head.ndim > 0 and len({tensor.shape for tensor in tensors}) > 1
        dtype = head.dtype
        for row, tensor in enumerate(tensors):
            shapes = [one.shape[1:] if ragged else one.shape for one in (head, tensor)]
            if shapes[0] != shapes[1] or (ragged and not tensor.ndim):
                _differ("shape", head.shape, tensor.shape, row, field)
            if tensor.device != head.device or tensor.layout != head.layout:
                _differ("device or layout", (head.device, head.layout), (tensor.device, tensor.layout), row, field)
            if tensor.dtype != dtype:
                dtype = torch.promote_types(dtype, tensor.dtype)
        for row, tensor in enumerate(tensors):
            if tensor.dtype != dtype and not _holds(dtype, tensor):
                _differ("dtype", head.dtype, tensor.dtype if row else dtype, row, field)
        with torch.no_grad():
            alike = [tensor.to(dtype) for tensor in tensors]
            rows = torch.cat(alike) if ragged else torch.stack(alike)
        rows.requires_grad_(any(tensor.requires_grad for tensor in tensors))
        if not ragged:
            return rows
        offsets = [0, *itertools.accumulate(len(tensor) for tensor in tensors)]
        return RaggedTensor(rows, torch.tensor(offsets, dtype=torch.int64))


def _differ(what: str, first: Any, other: Any, row: int, field: str) -> NoReturn:
    at = f" at {field}" if field else ""
    raise SampleError(
        f"samples differ in {what}: {first}, {other}{at}",
        hint=f"bring them to one {what} in transform=, or use collate=None",
        row=row,
        field=field,
    )


def _holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether `dtype` has every value of `tensor` as it is; flags are no numbers."""
    if torch.bool in (dtype, tensor.dtype):
        return False
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return True  # `dtype` is what it was promoted to
    return bool((tensor.to(dtype).to(tensor.dtype) == tensor).all())


def torch_collate(collate: Collate) -> Collate:
    """`collate` for samples that may hold CPU tensors."""
    return _Collated(collate) if isinstance(collate, str) else collate
