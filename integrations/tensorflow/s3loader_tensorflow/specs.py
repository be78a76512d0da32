"""From batches of the loader to TensorFlow: values tf.data takes, and the static specs that describe them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from s3loader import ConfigError, Ragged, SampleError
from s3loader.adapters import columns, stacked

__all__ = ["collate_tensors", "held", "spec_of", "to_tensorflow"]

_RETURN = "return arrays, numbers, bytes, strings, or tuples and dicts of them from transform= or collate="


# -- samples to batches ----------------------------------------------------------------------


def collate_tensors(samples: list[Any]) -> Any:
    """Columns of samples: arrays, numbers and lists of them stacked, bytes and strings as lists (one `tf.string` each).

    Raises:
        SampleError: the samples differ in structure, kind or shape, or no array holds them as they are.
    """
    return columns([_arrays(sample) for sample in samples], _column)


def _column(values: list[Any], field: str) -> Any:
    if all(isinstance(value, (str, bytes, bytearray, memoryview)) for value in values):
        return values
    return stacked(values, field)


def _arrays(value: Any) -> Any:
    """`value` with arrays in the place of lists and of other frameworks' tensors."""
    if isinstance(value, (str, bytes, bytearray, memoryview, np.ndarray, np.generic)):
        return value
    if isinstance(value, Mapping):
        return _mapping(value, _arrays)
    if isinstance(value, tuple):
        return _tuple(value, [_arrays(item) for item in value])
    if isinstance(value, list):
        rows = _column([_arrays(item) for item in value], "") if value else np.zeros(0, np.float32)
        return _strings(rows) if isinstance(rows, list) else rows
    return np.asarray(value) if hasattr(value, "__array__") else value


def _mapping(value: Mapping[Any, Any], change: Callable[[Any], Any]) -> Any:
    """A dict, or an `OrderedDict`: all that tf.data makes again as it was."""
    items = ((name, change(item)) for name, item in value.items())
    return OrderedDict(items) if isinstance(value, OrderedDict) else dict(items)


def _tuple(like: tuple[Any, ...], items: list[Any]) -> Any:
    make: Callable[[list[Any]], Any] = getattr(type(like), "_make", tuple)
    return make(items)


# -- batches to tensors ----------------------------------------------------------------------


def _strings(values: list[Any]) -> Any:
    """One array of bytes and strings; None where something else is among them."""
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        if not isinstance(value, (str, bytes, bytearray, memoryview)):
            return None
        array[place] = value if isinstance(value, str) else bytes(value)
    return array


def to_tensorflow(value: Any) -> Any:
    """`value` as tf.data takes it: arrays and `Ragged` stay, lists of bytes or str are arrays of them, other lists tuples."""
    if isinstance(value, Mapping):
        return _mapping(value, to_tensorflow)
    if isinstance(value, tuple):
        return _tuple(value, [to_tensorflow(item) for item in value])
    if isinstance(value, list):
        strings = _strings(value) if value else None
        return tuple(to_tensorflow(item) for item in value) if strings is None else strings
    if isinstance(value, (np.ndarray, np.generic, Ragged)) or not hasattr(value, "__array__"):
        return value
    return value if isinstance(value, tf.RaggedTensor) else np.asarray(value)


def spec_of(value: Any, batch: int | None, *, ragged: bool = False, field: str = "") -> Any:
    """The static spec of `value` (what `to_tensorflow` made) with `batch` rows, None for any number.

    Args:
        value: One batch.
        batch: Its rows.
        ragged: Arrays that have rows of an axis or more are of unlike length in other batches.
        field: Where in a batch the value is.

    Raises:
        ConfigError: TensorFlow has no type for it.
    """
    if isinstance(value, Mapping):
        specs = ((name, spec_of(item, batch, ragged=ragged, field=f"{field}[{name!r}]")) for name, item in value.items())
        return OrderedDict(specs) if isinstance(value, OrderedDict) else dict(specs)
    if isinstance(value, tuple):
        return _tuple(value, [spec_of(item, batch, ragged=ragged, field=f"{field}[{i}]") for i, item in enumerate(value)])
    if isinstance(value, tf.RaggedTensor):
        return tf.RaggedTensorSpec(
            (batch, *value.shape[1:]), value.dtype, ragged_rank=value.ragged_rank, row_splits_dtype=value.row_splits.dtype
        )
    at = f" at {field}" if field else ""
    if isinstance(value, (np.ndarray, Ragged)):
        rows = value.values if isinstance(value, Ragged) else value
        dtype = _dtype_of(rows)
        if dtype is None:
            raise ConfigError(f"TensorFlow has no type for values of dtype {rows.dtype}{at}", hint=_RETURN)
        if isinstance(value, Ragged):
            return _ragged_spec((batch, None, *rows.shape[1:]), dtype)
        if ragged and value.ndim > 1:
            return _ragged_spec((batch, None, *value.shape[2:]), dtype)
        return tf.TensorSpec((batch, *value.shape[1:]), dtype)
    raise ConfigError(f"no tensor can be made of a {type(value).__name__}{at}", hint=_RETURN)


def _ragged_spec(shape: tuple[int | None, ...], dtype: Any) -> Any:
    return tf.RaggedTensorSpec(shape, dtype, ragged_rank=1, row_splits_dtype=tf.int64)


def _dtype_of(array: npt.NDArray[Any]) -> Any:
    if array.dtype.kind in "OSU":
        return tf.string if _only_strings(array) else None
    try:
        return tf.as_dtype(array.dtype)
    except TypeError:
        return None


def _only_strings(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind in "SU" or all(isinstance(item, (str, bytes)) for item in array.flat)


# -- held against the specs ------------------------------------------------------------------


def held(value: Any, spec: Any, *, rounding: bool, field: str = "") -> Any:
    """`value` (what `to_tensorflow` made) as `spec` says, every number as it is.

    Args:
        value: One batch.
        spec: Its static spec.
        rounding: The user chose the specs, so that floats may be rounded to those of fewer bits.
        field: Where in a batch the value is.

    Raises:
        SampleError: it is something else, or numbers would change; `.row` is the first sample of which one would, `.field`
            the place.
    """
    if isinstance(spec, Mapping):
        if not isinstance(value, Mapping) or value.keys() != spec.keys():
            raise _differs(value, spec, field)
        parts = ((name, held(value[name], spec[name], rounding=rounding, field=f"{field}[{name!r}]")) for name in spec)
        return OrderedDict(parts) if isinstance(spec, OrderedDict) else dict(parts)
    if isinstance(spec, tuple):
        if not isinstance(value, tuple) or len(value) != len(spec):
            raise _differs(value, spec, field)
        pairs = enumerate(zip(value, spec, strict=True))
        return _tuple(spec, [held(item, its, rounding=rounding, field=f"{field}[{i}]") for i, (item, its) in pairs])
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(spec, tf.RaggedTensorSpec) and isinstance(value, (np.ndarray, Ragged)):
        rows = value if isinstance(value, Ragged) else Ragged.join(list(value))
        made: Any = tf.RaggedTensor  # its classmethods are invisible to type checkers
        splits: Any = getattr(spec, "row_splits_dtype")  # noqa: B009 - invisible to type checkers
        values = _exactly(rows.values, spec.dtype, rounding, field, rows.offsets)
        value = made.from_row_splits(values, rows.offsets.astype(splits.as_numpy_dtype), validate=False)
        if not spec.is_compatible_with(value):
            raise _differs(value, spec, field)
        return value
    if isinstance(spec, tf.TensorSpec):
        if not isinstance(value, np.ndarray) or not spec.shape.is_compatible_with(value.shape):
            raise _differs(value, spec, field)
        return _exactly(value, spec.dtype, rounding, field, None)
    return value


def _differs(value: Any, spec: Any, field: str) -> SampleError:
    if isinstance(value, Ragged):
        text = "rows of unlike length"
    elif isinstance(value, np.ndarray):
        text = f"an array of shape {value.shape}"
    elif isinstance(value, Mapping):
        text = f"a mapping of {', '.join(map(repr, value))}"
    else:
        text = f"a {type(value).__name__}"
    wanted = ", ".join(map(repr, spec)) if isinstance(spec, Mapping) else spec
    at = f" at {field}" if field else ""
    return SampleError(
        f"a batch has {text} where the specs say {wanted}{at}",
        hint="bring samples to one structure in transform=; the specs are those of the first, or of output_signature=",
        field=field,
    )


def _exactly(array: npt.NDArray[Any], dtype: Any, rounding: bool, field: str, offsets: Any) -> npt.NDArray[Any]:
    """`array` as TensorFlow's `dtype`."""
    if dtype == tf.string:
        if array.dtype.kind in "OSU" and _only_strings(array):
            return array
        bad = np.ones(array.shape, dtype=bool)
    else:
        wanted = np.dtype(dtype.as_numpy_dtype)
        if array.dtype == wanted:
            return array
        bad = _changed(array, wanted, rounding)
        if not bad.any():
            return array.astype(wanted)
    first = int(np.argwhere(bad)[0][0]) if bad.ndim else 0
    found = array[tuple(np.argwhere(bad)[0])] if bad.size else array.dtype
    row = first if offsets is None else int(np.searchsorted(offsets, first, side="right")) - 1
    at = f" at {field}" if field else ""
    raise SampleError(
        f"{found!r} (dtype {array.dtype}) cannot be held as {dtype.name}{at}, which the specs say",
        hint="bring the samples to one dtype in transform=, or give output_signature=; without it the first sample decides",
        row=row,
        field=field,
    )


def _changed(array: npt.NDArray[Any], wanted: np.dtype[Any], rounding: bool) -> npt.NDArray[np.bool_]:
    """Which values would be others as `wanted`."""
    every = np.ones(array.shape, dtype=bool)
    if array.dtype.kind in "OSUMm" or (array.dtype.kind == "b") != (wanted.kind == "b"):
        return every
    with np.errstate(all="ignore"):
        try:
            cast = array.astype(wanted)
            back = cast.astype(array.dtype)
        except (TypeError, ValueError):
            return every
        gone = np.asarray(array != array) & np.asarray(cast != cast)  # a NaN is not itself
        if rounding and np.issubdtype(array.dtype, np.floating) and np.issubdtype(wanted, np.floating):
            return np.asarray(np.isfinite(array) & ~np.isfinite(cast))
        # Both ways: a huge integer comes back from a float as it was only by luck of saturation.
        same = np.asarray(back == array)
        if array.dtype.kind in "iu" and wanted.kind in "iu":
            same &= np.asarray((cast < 0) == (array < 0))
        elif array.dtype.kind in "fc" and wanted.kind in "iu":
            same &= np.asarray(np.abs(array) < 2.0**53)
    return np.asarray(~(same | gone))
