"""Leaves of a checkpoint: whatever has an element type, a shape and bytes.

The core knows numpy arrays and byte strings. Other frameworks' arrays are known to an
integration (a `Framework`), found by the name of the package that a value's class comes from
and loaded at first sight, so that the core imports none of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from s3loader.checkpoint.format.dtypes import name_of, nbytes, numpy_dtype
from s3loader.errors import CheckpointError, UnsupportedStateError

__all__ = [
    "BYTES",
    "NUMPY",
    "ArrayShard",
    "Device",
    "Framework",
    "LeafAdapter",
    "Piece",
    "Source",
    "Target",
    "adapter_for",
    "adapter_of_kind",
    "framework_for",
    "framework_of_tag",
    "framework_that_expands",
]


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
    """Of `s3loader.checkpoint.format.dtypes`."""
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
        """Recorded with every leaf: ``numpy``, ``bytes``, ``torch``, ``jax``, ``jax.key.<implementation>``, ``tensorflow``."""
        ...

    def source(self, value: Any) -> Source:
        """`value`, to be saved."""
        ...

    def into(self, value: Any) -> Target | None:
        """`value` itself, to be restored in place; None where it cannot be written to."""
        ...

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        """A new leaf."""
        ...


class Framework(Protocol):
    """What an integration tells the core about its framework's objects."""

    def adapter(self, value: Any) -> LeafAdapter | None:
        """The adapter of `value`, None where it is no leaf."""
        ...

    def adapter_of_kind(self, kind: str) -> LeafAdapter | None:
        """The adapter that saved leaves of `kind`."""
        ...

    def expand(self, value: Any) -> Any:
        """The state of one of the framework's containers as a tree, None for anything else."""
        ...

    def absorb(self, value: Any, state: Any, *, in_place: bool) -> Any:
        """Give a restored tree back to the container it was `expand`-ed from; with `in_place`,
        every leaf of it has been written into the container's own memory already. Returns the
        container, or, where it cannot be changed, a new one."""
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
        if inner is None:
            return None
        pieces = [piece._replace(offset=tuple(value.offset)) for piece in inner.pieces]

        def finish() -> ArrayShard:
            inner.finish()
            return value

        return Target(inner.dtype, tuple(value.shape), pieces, finish, True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        return NUMPY.fresh(dtype, shape)


class _Numpy:
    """`numpy.ndarray` and numpy's scalars (restored as arrays of no dimension)."""

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

        if not (isinstance(value, np.ndarray) and value.flags.writeable and value.dtype.isnative):
            return None
        if isinstance(value, np.ma.MaskedArray):
            return None
        dtype = name_of(value.dtype)
        if dtype is None:
            return None
        shape = tuple(value.shape)
        if value.flags.c_contiguous:
            return Target(dtype, shape, [Piece((0,) * len(shape), shape, lambda: _bytes_view(value))], lambda: value, True)
        scratch: list[Any] = []

        def open_scratch() -> memoryview:
            scratch.append(np.empty(shape, value.dtype))
            return _bytes_view(scratch[0])

        def finish() -> Any:
            np.copyto(value, scratch[0])
            return value

        return Target(dtype, shape, [Piece((0,) * len(shape), shape, open_scratch)], finish, True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        import numpy as np

        made: list[Any] = []

        def allocate() -> memoryview:
            made.append(np.empty(shape, numpy_dtype(dtype)))
            return _bytes_view(made[0])

        return Target(dtype, shape, [Piece((0,) * len(shape), shape, allocate)], lambda: made[0])


class _Bytes:
    """`bytes`, `bytearray`, `memoryview`: restored as `bytes`."""

    kind = "bytes"

    def source(self, value: Any) -> Source:
        view = memoryview(value)
        if not view.contiguous:
            view = memoryview(view.tobytes())
        shape = (view.nbytes,)
        return Source(self.kind, "U8", shape, [Piece((0,), shape, lambda: view.cast("B"))])

    def into(self, value: Any) -> Target | None:
        return None

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        data = bytearray(nbytes(dtype, shape))
        return Target(dtype, shape, [Piece((0,) * len(shape), shape, lambda: memoryview(data))], lambda: bytes(data))


NUMPY: Final[LeafAdapter] = _Numpy()
BYTES: Final[LeafAdapter] = _Bytes()
_SHARD: Final[LeafAdapter] = _Shard()

_PACKAGES: Final = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "tensorflow": "tensorflow", "keras": "tensorflow"}
"""Package a class comes from -> the integration that knows it."""
_KINDS: Final = {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow"}
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


def framework_that_expands(value: Any) -> tuple[Framework, Any] | None:
    """An integration that can open `value`, and its state; also asks those of frameworks in use about classes of
    nobody's (a user's own pytree node)."""
    owner = framework_for(value)
    others = [_load(name) for package, name in _KINDS.items() if package in sys.modules]
    for framework in [owner] if owner is not None else others:
        state = framework.expand(value) if framework is not None else None
        if framework is not None and state is not None:
            return framework, state
    return None


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
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return NUMPY
    framework = framework_for(value)
    return framework.adapter(value) if framework is not None else None


def adapter_of_kind(kind: str) -> LeafAdapter:
    """How leaves of `kind` are made anew; numpy arrays where their framework is not installed.

    Raises:
        CheckpointError: no such kind is known.
    """
    if kind in ("numpy", "bytes"):
        return NUMPY if kind == "numpy" else BYTES
    name = _KINDS.get(kind.partition(".")[0])
    if name is None:
        raise CheckpointError(f"unknown kind of leaf {kind!r}", hint="the checkpoint was written by a newer s3loader")
    framework = _load(name)
    adapter = framework.adapter_of_kind(kind) if framework is not None else None
    return adapter if adapter is not None else NUMPY
