"""What s3loader's checkpoints need to know of JAX: arrays with any sharding, abstract arrays, random keys, pytrees.

Found by the core through `FRAMEWORK`, by name, at the first sight of one of JAX's objects.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from s3loader import CheckpointError, UnsupportedStateError
from s3loader.adapters import NUMPY, LeafAdapter, Opened, Piece, Source, Target, WithState, numpy_dtype, numpy_name, with_fields

__all__ = ["FRAMEWORK", "JAX"]

_Box = tuple[tuple[int, ...], tuple[int, ...]]


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Box:
    """Offset and shape of a shard."""
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    return tuple(low for low, _, _ in bounds), tuple(max(0, high - low) for low, high, _ in bounds)


def _name_of(dtype: Any) -> str:
    name = numpy_name(np.dtype(dtype).name)
    if name is None:
        raise UnsupportedStateError(
            f"arrays of {dtype} cannot be saved", hint="cast it to a type that safetensors knows, e.g. float32 or bfloat16"
        )
    return name


class _Array:
    """`jax.Array`s. Of replicas only the first saves; restored arrays have the sharding of the target.

    A `jax.ShapeDtypeStruct` is a target too: nothing of the old array has to be kept in memory.
    """

    kind = "jax"

    def source(self, value: Any) -> Source:
        _expect_data(value)
        shape = tuple(value.shape)
        pieces = []
        for shard in value.addressable_shards:
            if shard.replica_id == 0:
                offset, box = _box(shard.index, shape)
                pieces.append(Piece(offset, box, _opener(shard.data)))
        return Source(self.kind, _name_of(value.dtype), shape, pieces, sharded=not value.is_fully_addressable)

    def into(self, value: Any) -> Target | None:
        if isinstance(value, jax.core.Tracer):
            raise CheckpointError("the target is an array inside of jit", hint="restore outside of jit")
        sharding = value.sharding if value.sharding is not None else _default_sharding()
        return _target(_name_of(value.dtype), tuple(value.shape), sharding)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        return _target(dtype, shape, _default_sharding())


def _expect_data(value: Any) -> None:
    if isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise UnsupportedStateError(
            "an abstract array has no data to save",
            hint="save arrays that were computed, outside of jit; jax.eval_shape gives targets for restore, nothing to save",
        )
    if value.is_deleted():
        raise UnsupportedStateError("the array was donated or deleted", hint="save before the step that donates it")


def _opener(data: Any) -> Callable[[], memoryview]:
    def opened() -> memoryview:
        array = np.ascontiguousarray(np.asarray(data))
        view: Any = array.reshape(-1).view(np.uint8)  # typed as no Buffer before Python 3.12
        return memoryview(view) if array.size else memoryview(b"")

    return opened


def _default_sharding() -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _target(dtype: str, shape: tuple[int, ...], sharding: Sharding) -> Target:
    """A new array with `sharding`; a box that several devices hold is read once."""
    devices: dict[_Box, list[Any]] = {}
    indices: Any = sharding.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        devices.setdefault(_box(index if index is not None else (slice(None),) * len(shape), shape), []).append(device)
    parts = {box: NUMPY.fresh(dtype, box[1]) for box in devices}

    def finish() -> jax.Array:
        numpy_dtype(dtype)
        arrays = [
            jax.device_put(part.finish(), SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
            for box, part in parts.items()
            for device in devices[box]
        ]
        if arrays and arrays[0].dtype != numpy_dtype(dtype):
            raise CheckpointError(
                f"JAX would make {arrays[0].dtype} of {numpy_dtype(dtype)}", hint="jax.config.update('jax_enable_x64', True)"
            )
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    pieces = [Piece(offset, box, part.pieces[0].open) for (offset, box), part in parts.items()]
    return Target(dtype, shape, pieces, finish)


class _Key:
    """Random keys of the new style (``jax.random.key``), saved as their data."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.kind = f"jax.key.{implementation}"

    def source(self, value: Any) -> Source:
        _expect_data(value)
        inner = JAX.source(jax.random.key_data(value))
        return Source(self.kind, inner.dtype, inner.shape, inner.pieces, inner.sharded)

    def into(self, value: Any) -> Target | None:
        data = jax.eval_shape(jax.random.key_data, _abstract(value.shape, value.dtype))
        sharding = value.sharding if value.sharding is not None else _default_sharding()
        if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and not value.is_deleted():
            sharding = jax.random.key_data(value).sharding
        return self._wrapped(_target(_name_of(data.dtype), tuple(data.shape), sharding))

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        return self._wrapped(JAX.fresh(dtype, shape))

    def _wrapped(self, inner: Target) -> Target:
        def finish() -> Any:
            return jax.random.wrap_key_data(inner.finish(), impl=self.implementation)

        return Target(inner.dtype, inner.shape, inner.pieces, finish)


JAX: Final[LeafAdapter] = _Array()


def _abstract(shape: tuple[int, ...], dtype: Any) -> Any:
    make: Any = jax.ShapeDtypeStruct  # its constructor is untyped
    return make(shape, dtype)


def _key_implementation(value: Any) -> str:
    """The implementation of a random key, which may be abstract; empty for what is none."""
    if not isinstance(value, jax.Array | jax.ShapeDtypeStruct) or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return ""
    told: list[str] = []

    def ask(key: Any) -> Any:
        told.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    jax.eval_shape(ask, _abstract((), value.dtype))
    return told[0]


class _Jax:
    def adapter(self, value: Any) -> LeafAdapter | None:
        if implementation := _key_implementation(value):
            return _Key(implementation)
        return JAX if isinstance(value, jax.Array | jax.ShapeDtypeStruct) else None

    def adapter_of_kind(self, kind: str) -> LeafAdapter | None:
        if kind.startswith("jax.key."):
            return _Key(kind.removeprefix("jax.key."))
        return JAX if kind == "jax" else None

    def node(self, value: Any) -> Opened | None:
        """A registered node by its children's keys. What holds no children and only belongs to the type (as the bookkeeping
        of flax's modules does) is none of them."""
        if type(value) in _BUILTIN:
            return None
        registry: Any = jax.tree_util.default_registry
        opened = registry.flatten_one_level(value)
        if opened is None or (isinstance(value, tuple) and [*map(id, opened[0])] == [*map(id, value)]):
            return None
        pairs, structure = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda child: child is not value)
        entries = [path[0] for path, _ in pairs]
        keys = [_key(entry) for entry in entries]
        if len(set(keys)) < len(keys):
            keys = [*range(len(keys))]
        all_children = dict(zip(keys, (child for _, child in pairs), strict=True))
        children = {key: child for key, child in all_children.items() if not _is_bookkeeping(child)}
        positions = not any(isinstance(entry, jax.tree_util.DictKey) for entry in entries)
        sequence = positions and [*children] == [*range(len(children))]
        fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        if (
            len(children) == len(all_children)
            and fields
            and all(key in fields and getattr(value, key) is child for key, child in children.items())
        ):
            return Opened(
                "dict",
                children,
                lambda values: with_fields(value, values),
                fixed=True,
                named=True,
                rest=frozenset(fields) - children.keys(),
                foreign=True,
            )

        def rebuild(values: dict[Any, Any]) -> Any:
            return jax.tree_util.tree_unflatten(structure, [values.get(key, all_children[key]) for key in keys])

        return Opened("list" if sequence else "dict", children, rebuild, fixed=True, foreign=True)

    def object(self, value: Any) -> WithState | None:
        return None

    def encode(self, value: Any) -> tuple[str, Any] | None:
        return None

    def decode(self, tag: str, of: Any) -> Any:
        raise CheckpointError(f"unknown constant {tag} {of!r}", hint="the checkpoint was written by a newer s3loader")


_BUILTIN: Final = (dict, OrderedDict, defaultdict, list, tuple, type(None))
"""Containers of Python that JAX knows, and that are the core's."""


def _is_bookkeeping(child: Any) -> bool:
    registry: Any = jax.tree_util.default_registry
    if child is None or isinstance(child, dict | list | tuple):
        return False
    opened = registry.flatten_one_level(child)
    return opened is not None and not list(opened[0])


def _key(entry: Any) -> Any:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return str(entry)


FRAMEWORK: Final = _Jax()
