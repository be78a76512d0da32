"""What s3loader's checkpoints need to know of JAX: arrays with any sharding, abstract arrays, random keys, pytrees.

Found by the core through `FRAMEWORK`, by name, at the first sight of one of JAX's objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from s3loader.checkpoint.format.dtypes import numpy_dtype, numpy_name
from s3loader.checkpoint.state.leaves import NUMPY, LeafAdapter, Piece, Source, Target
from s3loader.errors import CheckpointError, UnsupportedStateError

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
        if isinstance(value, jax.ShapeDtypeStruct):
            raise UnsupportedStateError(
                "an abstract array has no data to save",
                hint="save arrays that were computed; jax.eval_shape gives targets for restore, nothing to save",
            )
        if value.is_deleted():
            raise UnsupportedStateError("the array was donated or deleted", hint="save before the step that donates it")
        shape = tuple(value.shape)
        pieces = []
        for shard in value.addressable_shards:
            if shard.replica_id == 0:
                offset, box = _box(shard.index, shape)
                pieces.append(Piece(offset, box, _opener(shard.data)))
        return Source(self.kind, _name_of(value.dtype), shape, pieces, sharded=not value.is_fully_addressable)

    def into(self, value: Any) -> Target | None:
        sharding = value.sharding if value.sharding is not None else _default_sharding()
        return _target(_name_of(value.dtype), tuple(value.shape), sharding)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        return _target(dtype, shape, _default_sharding())


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
        arrays = [jax.device_put(part.finish(), device) for box, part in parts.items() for device in devices[box]]
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
        inner = JAX.source(jax.random.key_data(value))
        return Source(self.kind, inner.dtype, inner.shape, inner.pieces, inner.sharded)

    def into(self, value: Any) -> Target | None:
        inner = JAX.into(jax.random.key_data(value))
        return self._wrapped(inner) if inner is not None else None

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        return self._wrapped(JAX.fresh(dtype, shape))

    def _wrapped(self, inner: Target) -> Target:
        def finish() -> Any:
            return jax.random.wrap_key_data(inner.finish(), impl=self.implementation)

        return Target(inner.dtype, inner.shape, inner.pieces, finish)


JAX: Final[LeafAdapter] = _Array()


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key))


class _Jax:
    def adapter(self, value: Any) -> LeafAdapter | None:
        if _is_key(value):
            return _Key(str(jax.random.key_impl(value)))
        return JAX if isinstance(value, jax.Array | jax.ShapeDtypeStruct) else None

    def adapter_of_kind(self, kind: str) -> LeafAdapter | None:
        if kind.startswith("jax.key."):
            return _Key(kind.removeprefix("jax.key."))
        return JAX if kind == "jax" else None

    def expand(self, value: Any) -> Any:
        """The children of a registered pytree node by their keys; None for what is none."""
        registry: Any = jax.tree_util.default_registry
        if registry.flatten_one_level(value) is None:
            return None
        nodes, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda child: child is not value)
        return {_key(path[0]): child for path, child in nodes if path}

    def absorb(self, value: Any, state: Any, *, in_place: bool) -> Any:
        """A new node of the same kind with the children restored."""
        nodes, structure = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda child: child is not value)
        return jax.tree_util.tree_unflatten(structure, [state[_key(path[0])] for path, _ in nodes])

    def encode(self, value: Any) -> tuple[str, Any] | None:
        return None

    def decode(self, tag: str, of: Any) -> Any:
        raise CheckpointError(f"unknown constant {tag} {of!r}", hint="the checkpoint was written by a newer s3loader")


def _key(entry: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


FRAMEWORK: Final = _Jax()
