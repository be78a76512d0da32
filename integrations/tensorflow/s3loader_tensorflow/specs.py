"""From batches of the loader to TensorFlow: values tf.data takes, and the static specs that describe them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from s3loader.errors import ConfigError
from s3loader.loader import Ragged

__all__ = ["spec_of", "to_tensorflow"]


def to_tensorflow(value: Any) -> Any:
    """`value` as tf.data takes it: arrays stay, `Ragged` is a `tf.RaggedTensor`, lists of bytes or str are arrays of them."""
    if isinstance(value, Mapping):
        return {name: to_tensorflow(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_tensorflow(item) for item in value)
    if isinstance(value, Ragged):
        ragged: Any = tf.RaggedTensor  # its classmethods are invisible to type checkers
        return ragged.from_row_splits(value.values, value.offsets, validate=False)
    if isinstance(value, list):
        return np.array([item if isinstance(item, str) else bytes(item) for item in value], dtype=object)
    return value


def spec_of(value: Any, batch: int | None) -> Any:
    """The static spec of `value` (what `to_tensorflow` made) with `batch` rows, None for any number.

    Raises:
        ConfigError: TensorFlow has no type for it.
    """
    if isinstance(value, Mapping):
        return {name: spec_of(item, batch) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(spec_of(item, batch) for item in value)
    if isinstance(value, tf.RaggedTensor):
        return tf.RaggedTensorSpec((batch, None, *value.shape[2:]), value.dtype, ragged_rank=1, row_splits_dtype=tf.int64)
    if isinstance(value, np.ndarray):
        dtype = tf.string if value.dtype.kind in "OSU" else tf.as_dtype(value.dtype)
        return tf.TensorSpec((batch, *value.shape[1:]), dtype)
    raise ConfigError(
        f"no tensor can be made of a {type(value).__name__}",
        hint="return arrays, numbers, bytes, strings, or tuples and dicts of them from transform= or collate=",
    )
