"""Leaves of a checkpoint: whatever has an element type, a shape and bytes.

The core knows numpy arrays and byte strings. Other frameworks' arrays are known to an
integration (a `Framework`), found by the name of the package that a value's class comes from
and loaded at first sight, so that the core imports none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from s3loader.dtypes import name_of, nbytes, numpy_dtype
from s3loader.errors import CheckpointError, UnsupportedStateError
from s3loader.store.buffers import aligned_block

__all__ = [
    "BYTES",
    "LARGE",
    "NUMPY",
    "ArrayShard",
    "Device",
    "Framework",
    "LeafAdapter",
    "Opened",
    "Piece",
    "Source",
    "SpreadAdapter",
    "Target",
    "WithState",
    "adapter_for",
    "adapter_of_kind",
    "framework_for",
    "framework_of_tag",
    "framework_with_state",
    "frameworks_in_use",
    "fresh_memory",
    "overlaps",
    "registered",
]

_ALIGNED_FROM: Final = 64 << 10
"""Bytes from which an array gets an aligned start."""


class Piece(NamedTuple):
    """A box of a leaf that this process holds."""

    offset: tuple[int, ...]
    """Where the box begins in the whole array, in elements."""
    shape: tuple[int, ...]
    open: Callable[[], memoryview]
    """Its bytes in C order (1-D, format ``B``); writable where the piece belongs to a `Target`.
    May copy or allocate, so it is called late, once, and the result dropped early."""
    device: Device | None = None
    """Of a piece to be saved that lies in a device's memory: it copies from there into staging memory by itself."""


class Device(Protocol):
    """How a piece is copied out of a device's memory."""

    def memory(self, size: int) -> memoryview:
        """Staging memory of `size` bytes that the device copies to best."""
        ...

    def fetch(self) -> Callable[[memoryview, int], Callable[[], None]]:
        """A function that begins to copy the piece's bytes from an offset on into the memory it is given. What that
        returns waits until all copies begun so are done; equal ones need be called once."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """A leaf to be saved."""

    kind: str
    dtype: str
    """Of `s3loader.dtypes`."""
    shape: tuple[int, ...]
    """Of the whole array, over all processes."""
    pieces: Sequence[Piece]
    sharded: bool = False
    """Whether each process holds other pieces; else every process is assumed to hold the same."""


@dataclass(frozen=True, slots=True)
class Target:
    """Memory that a leaf is restored into."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[Piece]
    finish: Callable[[], Any]
    """Called when all pieces are filled and verified; returns the leaf's value."""
    in_place: bool = False
    """Whether the value is the caller's own object."""


class LeafAdapter(Protocol):
    """How one kind of leaf gives and takes its bytes."""

    @property
    def kind(self) -> str:
        """Recorded with every leaf: ``numpy``, ``numpy.scalar``, ``bytes``, ``torch``, ``torch.dtensor...``, ``jax``,
        ``jax.key.<implementation>``, ``tensorflow``."""
        ...

    def source(self, value: Any) -> Source:
        """`value`, to be saved."""
        ...

    def into(self, value: Any) -> Target | None:
        """Where what takes the place of `value` is read to: `value` itself, in place, or a new one of its kind where its
        kind is immutable. None where also its shape is part of its value (`bytes`): then `fresh` makes it.

        Raises:
            CheckpointError: `value` cannot be written to, although its kind can.
        """
        ...

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        """A new leaf."""
        ...


@runtime_checkable
class SpreadAdapter(Protocol):
    """A `LeafAdapter` of values that are spread over processes."""

    def beside(self, dtype: str, shape: tuple[int, ...], neighbours: Iterable[Any]) -> Target:
        """A new leaf, spread as what was saved, over the processes that `neighbours` (leaves of the target) are spread over;
        whole where none of them is spread.

        Raises:
            CheckpointError: they are spread in a way that cannot be taken for this one.
        """
        ...

    def like(self, value: Any, dtype: str) -> Target:
        """A new leaf of that type with the shape of `value`, spread as `value` is, which need have no memory."""
        ...


@dataclass(frozen=True, slots=True)
class Opened:
    """A container, one level deep."""

    tag: str
    """How it is written: ``dict odict counter list tuple namedtuple``."""
    children: dict[Any, Any]
    """By key, name or position, in order."""
    rebuild: Callable[[dict[Any, Any]], Any]
    """A container like it, of the values by the same keys, in the same order."""
    fixed: bool = False
    """Whether it is always made of these very children: its type says so."""
    named: bool = False
    """Whether it is a thing with fields."""
    rest: frozenset[str] = frozenset()
    """Fields that are no state; checkpoints of earlier versions hold them."""
    foreign: bool = False
    """Whether a framework's registry has opened it."""


@dataclass(frozen=True, slots=True)
class WithState:
    """An object that gives and takes its state."""

    state: Any
    load: Callable[[Any, str, bool], Any]
    """Gives a state to it: the state, the object's name in the checkpoint, whether every leaf was written in place
    already. Returns the object."""
    in_place: bool = False
    """Whether its leaves take what was saved by themselves, one by one; else `load` does, and converts what differs."""
    exact: bool = False
    """Whether arrays of another shape than its own are refused before it is asked."""
    near: Sequence[Any] = ()
    """Arrays of the object that are no part of its state: an optimizer's parameters."""
    place: Callable[[tuple[Any, ...], str, tuple[int, ...]], Target | None] | None = None
    """Makes the target of a leaf that its state lacks: path in the state, type, shape; None: as it was saved."""


class Framework(Protocol):
    """What an integration tells the core about its framework's objects."""

    def adapter(self, value: Any) -> LeafAdapter | None:
        """The adapter of `value`, None where it is no leaf."""
        ...

    def adapter_of_kind(self, kind: str) -> LeafAdapter | None:
        """The adapter that saved leaves of `kind`."""
        ...

    def node(self, value: Any) -> Opened | None:
        """A node of the framework's registry of containers, None for what is not registered."""
        ...

    def object(self, value: Any) -> WithState | None:
        """One of the framework's objects with state, None for anything else."""
        ...

    def encode(self, value: Any) -> tuple[str, Any] | None:
        """A small constant (a dtype, a device) as a tag that begins with the framework's name and a dot, and JSON."""
        ...

    def decode(self, tag: str, of: Any) -> Any:
        """The constant that `encode` described."""
        ...


def _bytes_view(array: Any) -> memoryview:
    return memoryview(array.reshape(-1).view("u1")) if array.size else memoryview(b"")


@dataclass(frozen=True, slots=True, eq=False)
class ArrayShard:
    """A box of a larger array that this rank holds: saved as that part of it, restored as that part of it.

    The ranks' boxes must tile the whole array exactly.
    """

    array: Any
    """A `numpy.ndarray`."""
    offset: tuple[int, ...]
    """Where the box begins in the whole array."""
    shape: tuple[int, ...]
    """Of the whole array."""

    def __post_init__(self) -> None:
        boxes = zip(self.offset, self.array.shape, self.shape, strict=False)
        if not len(self.offset) == len(self.shape) == self.array.ndim or any(o < 0 or o + n > w for o, n, w in boxes):
            raise CheckpointError(
                f"a box of {self.array.shape} at {self.offset} does not lie in an array of {self.shape}",
                hint="offset plus shape of the piece must lie inside the shape of the whole array",
            )


class _Shard:
    """`ArrayShard`: one box of an array whose other boxes other ranks hold."""

    kind = "numpy"

    def source(self, value: ArrayShard) -> Source:
        inner = NUMPY.source(value.array)
        pieces = [piece._replace(offset=tuple(value.offset)) for piece in inner.pieces]
        return Source(self.kind, inner.dtype, tuple(value.shape), pieces, sharded=True)

    def into(self, value: ArrayShard) -> Target | None:
        inner = NUMPY.into(value.array)
        assert inner is not None
        pieces = [piece._replace(offset=tuple(value.offset)) for piece in inner.pieces]

        def finish() -> ArrayShard:
            inner.finish()
            return value

        return Target(inner.dtype, tuple(value.shape), pieces, finish, True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        return NUMPY.fresh(dtype, shape)


class _Numpy:
    """`numpy.ndarray`."""

    kind = "numpy"

    def source(self, value: Any) -> Source:
        import numpy as np

        if (dtype := name_of(value.dtype)) is None:
            raise UnsupportedStateError(
                f"arrays of type {value.dtype} cannot be saved",
                hint="cast it to numbers or booleans; strings are saved as str, in lists",
            )
        if isinstance(value, np.ma.MaskedArray):
            raise UnsupportedStateError("a masked array cannot be saved", hint="save its .data and its .mask")

        def contiguous() -> memoryview:
            array = np.ascontiguousarray(value)
            return _bytes_view(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))

        shape = tuple(value.shape)
        return Source(self.kind, dtype, shape, [Piece((0,) * len(shape), shape, contiguous)])

    def into(self, value: Any) -> Target | None:
        import numpy as np

        dtype = name_of(value.dtype)
        if (why := _why_not(value, dtype)) or dtype is None:
            raise CheckpointError(f"the array of the target {why}", hint="give a plain array, or None to get a new one")
        shape = tuple(value.shape)
        if value.flags.c_contiguous and value.dtype.isnative:
            return Target(dtype, shape, [Piece((0,) * len(shape), shape, lambda: _bytes_view(value))], lambda: value, True)
        scratch: list[Any] = []

        def open_scratch() -> memoryview:
            scratch.append(_fresh_array(shape, value.dtype.newbyteorder("=")))
            return _bytes_view(scratch[0])

        def finish() -> Any:
            np.copyto(value, scratch[0])
            return value

        return Target(dtype, shape, [Piece((0,) * len(shape), shape, open_scratch)], finish, True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        made: list[Any] = []

        def allocate() -> memoryview:
            made.append(_fresh_array(shape, numpy_dtype(dtype)))
            return _bytes_view(made[0])

        return Target(dtype, shape, [Piece((0,) * len(shape), shape, allocate)], lambda: made[0])


def _fresh_array(shape: tuple[int, ...], dtype: Any) -> Any:
    """A new array; a large one starts on a 64-byte boundary, as all that is received into (`store.buffers` says why)."""
    import numpy as np

    size = math.prod(shape) * dtype.itemsize
    if size < _ALIGNED_FROM:
        return np.empty(shape, dtype)
    memory = np.empty(size + 64, np.uint8)
    pad = -memory.ctypes.data % 64
    return memory[pad : pad + size].view(dtype).reshape(shape)


def _why_not(array: Any, dtype: str | None) -> str:
    """Why a numpy array cannot be filled; empty where it can."""
    import numpy as np

    if dtype is None:
        return f"is of type {array.dtype}, which no checkpoint holds"
    if isinstance(array, np.ma.MaskedArray):
        return "is masked"
    if not array.flags.writeable:
        return "is read-only"
    return "has elements that share memory" if overlaps(array.shape, array.strides, array.itemsize) else ""


def overlaps(shape: Sequence[int], strides: Sequence[int], itemsize: int = 1) -> bool:
    """Whether elements of an array may share memory: it is broadcast, expanded, or a window that slides.

    Args:
        shape: Of the array.
        strides: In the unit of `itemsize`.
        itemsize: Of an element.
    """
    if 0 in shape:
        return False
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride < reach + itemsize:
            return True
        reach += stride * (size - 1)
    return False


class _Scalar:
    """numpy's scalars (`numpy.float32` and the like)."""

    kind = "numpy.scalar"

    def source(self, value: Any) -> Source:
        return replace(NUMPY.source(value), kind=self.kind)

    def into(self, value: Any) -> Target | None:
        dtype = name_of(value.dtype)
        if dtype is None:
            raise CheckpointError(
                f"the target is a scalar of type {value.dtype}, which no checkpoint holds", hint="give None in its place"
            )
        return self.fresh(dtype, ())

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        inner = NUMPY.fresh(dtype, shape)
        return replace(inner, finish=lambda: inner.finish()[()])


class _Bytes:
    """`bytes`, `bytearray`, `memoryview`: restored as `bytes`; a `bytearray` or writable `memoryview` is a target."""

    kind = "bytes"

    def source(self, value: Any) -> Source:
        view = memoryview(value)
        if not view.contiguous:
            view = memoryview(view.tobytes())
        shape = (view.nbytes,)
        return Source(self.kind, "U8", shape, [Piece((0,), shape, lambda: view.cast("B"))])

    def into(self, value: Any) -> Target | None:
        if isinstance(value, bytes):
            return None
        view = memoryview(value)
        if view.readonly or not view.c_contiguous:
            raise CheckpointError(
                "the memoryview of the target cannot be written to as a whole", hint="give None to get new bytes"
            )
        shape = (view.nbytes,)
        return Target("U8", shape, [Piece((0,), shape, lambda: view.cast("B"))], lambda: value, True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        data = bytearray(nbytes(dtype, shape))
        return Target(dtype, shape, [Piece((0,) * len(shape), shape, lambda: memoryview(data))], lambda: bytes(data))


NUMPY: Final[LeafAdapter] = _Numpy()
BYTES: Final[LeafAdapter] = _Bytes()
_SCALAR: Final[LeafAdapter] = _Scalar()
_SHARD: Final[LeafAdapter] = _Shard()

_PACKAGES: Final = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "tensorflow": "tensorflow", "keras": "keras"}
"""Package a class comes from -> the integration that knows it."""
_KINDS: Final = {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow"}
_REGISTRIES: Final = ("jax", "torch")
"""Frameworks with a registry of containers, in the order in which they are asked."""
_loaded: dict[str, Framework | None] = {}


def _load(name: str) -> Framework | None:
    """The integration `name`, None where it (or its framework) is not installed."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f"s3loader_{name}.checkpoint_state").FRAMEWORK
        except ImportError:
            _loaded[name] = None
    return _loaded[name]


def framework_for(value: Any) -> Framework | None:
    """The integration that knows `value`'s class or one of its bases."""
    for cls in type(value).__mro__:
        name = _PACKAGES.get(cls.__module__.partition(".")[0])
        if name is not None:
            return _load(name)
    return None


def frameworks_in_use() -> Iterator[Framework]:
    """The integrations of those frameworks that have a registry of containers and are imported."""
    for name in _REGISTRIES:
        framework = _load(name) if name in sys.modules else None
        if framework is not None:
            yield framework


def registered(value: Any) -> Opened | None:
    """`value` as a registry of a framework in use opens it (also a class of nobody's: a user's own node); None for what is
    not registered."""
    for framework in frameworks_in_use():
        if (node := framework.node(value)) is not None:
            return node
    return None


def framework_with_state(value: Any) -> WithState | None:
    """One of the objects of the framework that `value`'s class comes from, with its state."""
    framework = framework_for(value)
    return framework.object(value) if framework is not None else None


def framework_of_tag(tag: str) -> Framework | None:
    """The integration whose `encode` made `tag`."""
    name = _KINDS.get(tag.partition(".")[0])
    return _load(name) if name is not None else None


def adapter_for(value: Any) -> LeafAdapter | None:
    """How `value` is saved as a leaf; None where it is none."""
    if isinstance(value, bytes | bytearray | memoryview):
        return BYTES
    if isinstance(value, ArrayShard):
        return _SHARD
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return NUMPY
    if numpy is not None and isinstance(value, numpy.generic):
        return _SCALAR
    framework = framework_for(value)
    return framework.adapter(value) if framework is not None else None


def adapter_of_kind(kind: str) -> LeafAdapter:
    """How leaves of `kind` are made anew; numpy arrays where their framework is not installed.

    Raises:
        CheckpointError: no such kind is known.
    """
    for own in (NUMPY, _SCALAR, BYTES):
        if kind == own.kind:
            return own
    name = _KINDS.get(kind.partition(".")[0])
    if name is None:
        raise CheckpointError(f"unknown kind of leaf {kind!r}", hint="the checkpoint was written by a newer s3loader")
    framework = _load(name)
    adapter = framework.adapter_of_kind(kind) if framework is not None else None
    return adapter if adapter is not None else NUMPY


LARGE: Final = 4 << 20
"""Bytes from which `fresh_memory` takes huge pages."""


def fresh_memory(size: int) -> memoryview:
    """`size` writable bytes that start on a 64-byte boundary; freed with the last view of them.

    Where they are `LARGE`, they start on a page and are not yet touched.

    Touching new memory for the first time costs more than reading a checkpoint into it: 0.35 s per GB in pages of 4 KiB, 0.06
    in pages of 2 MiB (measured). numpy asks for huge pages by itself, malloc does not.
    """
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(aligned_block(size))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them: ordinary pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
