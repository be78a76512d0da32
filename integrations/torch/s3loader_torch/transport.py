"""Cheap and faithful passage from worker processes.

A tensor sent from a worker costs a file descriptor, fresh shared memory and a round trip, so what a batch holds travels as
one: its bytes are laid end to end, with the pickle of all that is around them, and the batch is made again on the other side.
Pickling it here, and not in the thread of torch's queue, turns what cannot be sent into an error: that thread prints it and
drops the batch.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, cast

import torch

from s3loader import ConfigError, SampleError, WorkerError
from s3loader_torch.shared_slots import SharedRows, lend_slot

__all__ = ["Packed", "Raw", "pack", "pack_views", "tensor_over"]

_BY_PIPE: Final = 16 << 10
"""Bytes of a batch up to which a pipe costs less than a slot. It holds 64 KiB: what is larger waits for its reader."""
_RATHER_BY_PIPE: Final = 1 << 20
"""Bytes of a batch up to which a pipe costs less than fresh shared memory (a third, at 128 KiB)."""
_ALIGN: Final = 64
_ZEROS: Final = memoryview(bytes(_ALIGN))
_FEW: Final = 16
"""So many tensors may go each by itself."""


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


class Raw:
    """Bytes as they were read, to become what `make` makes of a buffer on the other side."""

    __slots__ = ("make", "view")

    def __init__(self, view: memoryview, make: Callable[[Any], Any]) -> None:
        self.view = view
        self.make = make


# -- out of the worker -----------------------------------------------------------------------------


class _Pickler(ForkingPickler):
    """Tensors and views go as buffers beside the pickle; of types it does not know, `ForkingPickler` and theirs decide."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is Raw:
            return obj.make, (pickle.PickleBuffer(obj.view),)
        if kind is memoryview:
            flat = obj if obj.contiguous else memoryview(obj.tobytes())
            return _view, (pickle.PickleBuffer(flat.cast("B")), obj.format, obj.shape)
        if issubclass(kind, torch.Tensor):
            return _reduced(obj)
        if kind is torch.UntypedStorage and obj.device.type == "cpu" and not obj.is_shared():
            # torch's own way moves it to shared memory in its place: buffers of tensors over it would point to nothing
            return _storage, (pickle.PickleBuffer(_bytes_of(torch.empty(0, dtype=torch.uint8).set_(obj))),)
        return NotImplemented


def _bytes_of(flat: torch.Tensor) -> Any:  # numpy's arrays are no `Buffer` to typeshed
    return (flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)).numpy()


def _reduced(tensor: torch.Tensor) -> Any:
    if tensor.requires_grad and not tensor.is_leaf:
        raise SampleError("a tensor with a graph behind it", hint="call .detach() on it in transform= or collate=")
    if tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested:
        if tensor.is_conj():  # torch's own way forgets this
            return _conj, (tensor.conj(),)
        if tensor.is_neg():
            return _negated, (torch._neg_view(tensor),)  # type: ignore[attr-defined, unused-ignore]  # the bit has no other name
    if not _is_plain(tensor):
        return NotImplemented
    data = tensor.detach()
    flat = data.as_strided((data.numel(),), (1,))  # a single element may have any stride
    return _tensor, (pickle.PickleBuffer(_bytes_of(flat)), tensor.dtype, tuple(tensor.shape), tensor.requires_grad)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether bytes, dtype and shape are all there is to it."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_neg() or tensor.is_conj())
        and tensor.is_contiguous()
    )


def pack(data: Any) -> Any:
    """`data`, or a `Packed` that unpickles to an equal object.

    Raises:
        SampleError: it holds something that cannot be sent.
    """
    if _goes_alone(data):
        return data
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> None:
        buffers.append(buffer.raw())

    file = io.BytesIO()
    try:
        _Pickler(file, 5, True, keep).dump(data)  # by position: ForkingPickler passes no keywords on
    except Exception as error:  # whatever the object's own pickling raises
        why = error.message if isinstance(error, SampleError) else f"{type(error).__name__}: {error}"
        hint = error.hint if isinstance(error, SampleError) else None
        raise SampleError(
            f"a batch cannot be sent from a worker: {why}",
            hint=hint or "return tensors, arrays, numbers, text, bytes, or containers of them from transform= or collate=",
        ) from error
    values, bounds = _joined([file.getbuffer(), *buffers])
    return Packed(_unpack, values, bounds)


def _goes_alone(data: Any) -> bool:
    """A few tensors go torch's own way: there a `collate_fn` of the DataLoader can look at them."""
    kind = type(data)
    if kind is dict:
        tensors: Sequence[Any] = list(data.values())
    else:
        tensors = data if kind in (tuple, list) else [data]
    return 0 < len(tensors) <= _FEW and all(
        type(tensor) is torch.Tensor
        and not (tensor.dtype == torch.uint8 and tensor.ndim == 1 and kind is not torch.Tensor)
        and _is_plain(tensor)
        and not (tensor.requires_grad and not tensor.is_leaf)
        for tensor in tensors
    )


def pack_views(views: Sequence[memoryview], *, as_bytes: bool) -> Packed:
    """A `Packed` that unpickles to the list of the views' bytes: as `bytes`, or as uint8 tensors."""
    sizes = [view.nbytes for view in views]
    return Packed(_unpack_views, _sent([_flat(view) for view in views], sum(sizes)), sizes, as_bytes)


def _flat(view: memoryview) -> memoryview:
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    return memoryview(view.tobytes()) if not view.contiguous else view.cast("B")


def _joined(rows: Sequence[memoryview]) -> tuple[Any, list[int]]:
    """(all rows in one, begin and end of each), aligned for any dtype."""
    parts: list[memoryview] = []
    bounds, end = [], 0
    for row in rows:
        gap = -end % _ALIGN
        parts += [_ZEROS[:gap], row]
        bounds += [end + gap, end + gap + len(row)]
        end = bounds[-1]
    return _sent(parts, end), bounds


def _sent(parts: Sequence[memoryview], size: int) -> Any:
    """All parts, flat bytes, end to end: in a slot, by the queue's pipe where that costs less, or in fresh shared memory."""
    slot = lend_slot(size) if size > _BY_PIPE else None
    if slot is not None:
        _lay(parts, slot.data)
        return SharedRows(slot, size)
    if size <= _RATHER_BY_PIPE:
        return bytearray().join(parts)
    values = torch.empty(size, dtype=torch.uint8)
    _lay(parts, values.numpy())
    return values


def _lay(parts: Sequence[memoryview], target: Any) -> None:
    into, end = memoryview(target), 0
    for part in parts:
        begin, end = end, end + len(part)
        into[begin:end] = part


# -- in the training process -----------------------------------------------------------------------


def _received(values: Any) -> torch.Tensor:
    return tensor_over(values) if isinstance(values, bytearray) else values


def tensor_over(buffer: Any, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """A flat tensor over memory that may be written to."""
    if isinstance(buffer, memoryview) and buffer.readonly:  # as it was before it was sent
        buffer = buffer.obj
    return torch.frombuffer(buffer, dtype=dtype) if len(buffer) else torch.empty(0, dtype=dtype)


def _unpack(values: Any, bounds: list[int]) -> Any:
    whole = _received(values).numpy()
    blob, *buffers = [whole[begin:end] for begin, end in zip(bounds[::2], bounds[1::2], strict=True)]
    try:
        return pickle.loads(cast("bytes", blob), buffers=buffers)  # noqa: S301  # of a process of our own
    except Exception as error:
        raise WorkerError(
            f"what a worker has sent cannot be made again: {type(error).__name__}: {error}",
            hint="classes in a batch must be importable in the training process, and be made again by pickle",
        ) from error


def _unpack_views(values: Any, sizes: list[int], as_bytes: bool) -> list[Any]:
    if not as_bytes:
        return list(torch.split(_received(values), sizes))
    whole = memoryview(values if isinstance(values, bytearray) else values.numpy())
    ends = list(itertools.accumulate(sizes))
    return [whole[end - size : end].tobytes() for end, size in zip(ends, sizes, strict=True)]


def _view(buffer: Any, format_: str, shape: tuple[int, ...]) -> memoryview:
    flat = memoryview(buffer)
    return flat if format_ == "B" and len(shape) == 1 else flat.cast(format_, shape)  # type: ignore[call-overload]


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> torch.Tensor:
    return tensor_over(buffer, dtype).view(shape).requires_grad_(requires_grad)


def _storage(buffer: Any) -> torch.UntypedStorage:
    return tensor_over(buffer).untyped_storage()


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(tensor)  # type: ignore[attr-defined, no-any-return, unused-ignore]


def _conj(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.conj()
