"""Which rows of a global batch this process owes its devices, read off a sharding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from s3loader import ConfigError, SampleError
from s3loader.adapters import map_leaves

__all__ = ["place", "process_slice", "shard_batch"]


def process_slice(sharding: Sharding) -> tuple[int, int]:
    """``(rank, world_size)`` of this process for a batch axis laid out by `sharding`.

    Processes whose devices hold the same rows (they differ along model axes only) get the same rank, so
    they load the same samples.

    Raises:
        ConfigError: the rows of a process are not one contiguous run, or runs differ in length.
    """
    rows_in_all = sharding.num_devices  # divisible by every way to split the axis over the devices
    rows: dict[int, set[tuple[int, int]]] = {}
    rows_of: Mapping[Any, Any] = _along(sharding, 1).devices_indices_map((rows_in_all,))
    for device, index in rows_of.items():
        start, stop, _ = index[0].indices(rows_in_all)
        rows.setdefault(device.process_index, set()).add((start, stop))
    runs = {process: _one_run(spans) for process, spans in rows.items()}
    distinct = sorted(set(runs.values()))
    lengths = {stop - start for start, stop in distinct}
    tiles = [0, *(stop for _, stop in distinct)] == [*(start for start, _ in distinct), rows_in_all]
    if len(lengths) != 1 or not tiles:
        raise ConfigError(
            f"the sharding gives processes rows {distinct} of {rows_in_all}: not equal runs that tile the batch axis",
            hint="shard the batch axis over whole processes, or over all devices in mesh order",
        )
    mine = runs.get(jax.process_index())
    if mine is None:
        raise ConfigError("no device of this process is in the sharding's mesh")
    return distinct.index(mine), len(distinct)


def _along(sharding: Sharding, axes: int) -> Sharding:
    """`sharding` for an array of only `axes` axes."""
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > axes:
        spec: Callable[..., PartitionSpec] = PartitionSpec
        return NamedSharding(sharding.mesh, spec(*tuple(sharding.spec)[:axes]))
    return sharding


def _one_run(spans: set[tuple[int, int]]) -> tuple[int, int]:
    ordered = sorted(spans)
    for (_, stop), (start, _) in itertools.pairwise(ordered):
        if start > stop:
            raise ConfigError(
                f"the devices of one process hold separate runs of rows: {ordered}",
                hint="order the mesh so that the devices of a process are neighbours along the batch axis",
            )
    return ordered[0][0], ordered[-1][1]


def place(array: npt.NDArray[Any], sharding: Sharding, world_size: int) -> jax.Array:
    """This process's rows of one global array as that `jax.Array` (axis 0 is the batch)."""
    global_shape = (array.shape[0] * world_size, *array.shape[1:])
    make: Callable[..., jax.Array] = jax.make_array_from_process_local_data
    along = _along(sharding, array.ndim)
    try:
        along.shard_shape(global_shape)
    except ValueError as error:
        raise ConfigError(
            f"the sharding does not divide an array of shape {global_shape}: {error}",
            hint="choose a batch_size that the devices along the batch axis divide",
        ) from error
    return make(along, array, global_shape)


def shard_batch(batch: Any, sharding: Sharding, world_size: int) -> Any:
    """`batch` with each of its numeric arrays as a global `jax.Array`; anything else, and containers, stay as they are.

    Raises:
        SampleError: without ``jax_enable_x64`` a number has no room; `.row` is its sample.
    """

    def placed(value: Any) -> Any:
        if not isinstance(value, np.ndarray) or not value.ndim or not _is_numeric(value.dtype):
            return value
        return place(_with_room(value), sharding, world_size)

    return map_leaves(batch, placed)


def _is_numeric(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biufc" or (dtype.kind == "V" and bool(jax.numpy.issubdtype(dtype, np.number)))


def _with_room(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`array` in the dtype that jax has for it: of 32 bits for 64, unless ``jax_enable_x64`` is set. Floats are rounded."""
    canonical: Callable[[Any], np.dtype[Any]] = jax.dtypes.canonicalize_dtype
    dtype = canonical(array.dtype)
    if dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    whole = array.dtype.kind in "iu"
    lost = np.asarray(cast != array) if whole else np.isfinite(array) & ~np.isfinite(cast)
    if lost.any():
        place = np.argwhere(lost)[0]
        raise SampleError(
            f"{array[tuple(place)]!r} has no room in {dtype}, which jax makes of {array.dtype}",
            hint="set jax_enable_x64, or bring the samples to another dtype in transform=",
            row=int(place[0]),
        )
    return cast
