"""What s3loader's checkpoints need to know of TensorFlow: tensors, variables, modules, generators.

Found by the core through `FRAMEWORK`, by name, at the first sight of one of their objects.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import tensorflow as tf

from s3loader import CheckpointError, UnsupportedStateError
from s3loader.adapters import DTYPES, NUMPY, LeafAdapter, Opened, Source, Target, WithState, numpy_name, with_variables

__all__ = ["FRAMEWORK", "TENSORFLOW"]


class _Tensor:
    """Eager tensors (restored anew) and variables (assigned)."""

    kind = "tensorflow"

    def source(self, value: Any) -> Source:
        if isinstance(value, tf.Tensor) and not hasattr(value, "numpy"):
            raise UnsupportedStateError(
                "a tensor inside a tf.function has no value yet",
                hint="save outside of the tf.function, where tensors are eager",
            )
        array = _numpy(value)
        if numpy_name(array.dtype.name) is None:
            raise UnsupportedStateError(
                f"tensors of {value.dtype} cannot be saved", hint="cast it to a number type, or keep strings as Python strings"
            )
        inner = NUMPY.source(array)
        return Source(self.kind, inner.dtype, inner.shape, inner.pieces)

    def into(self, value: Any) -> Target | None:
        name = numpy_name(value.dtype.base_dtype.name)
        if name is None:
            raise CheckpointError(
                f"the tensor of the target is of {value.dtype.name}, which no checkpoint holds", hint="give None in its place"
            )
        shape = tuple(value.shape if value.shape.is_fully_defined() else _numpy(value).shape)
        if not hasattr(value, "assign"):
            return self.fresh(name, shape)
        inner = NUMPY.fresh(name, shape)

        def finish() -> Any:
            value.assign(inner.finish())
            return value

        return Target(name, shape, inner.pieces, finish, True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        inner = NUMPY.fresh(dtype, shape)
        if DTYPES[dtype][1] not in tf.dtypes.__dict__:
            return inner
        return Target(dtype, shape, inner.pieces, lambda: tf.convert_to_tensor(inner.finish()))


def _numpy(value: Any) -> Any:
    """The value as an array that later changes do not reach."""
    return np.array(value.numpy())


TENSORFLOW: Final[LeafAdapter] = _Tensor()


class _TensorFlow:
    def adapter(self, value: Any) -> LeafAdapter | None:
        return TENSORFLOW if isinstance(value, tf.Tensor | tf.Variable) else None

    def adapter_of_kind(self, kind: str) -> LeafAdapter | None:
        return TENSORFLOW if kind == "tensorflow" else None

    def node(self, value: Any) -> Opened | None:
        return None

    def object(self, value: Any) -> WithState | None:
        """A generator, or a module: its variables by their paths."""
        if isinstance(value, tf.random.Generator):
            return with_variables(value, {"state": value.state})
        if isinstance(value, tf.Module):
            walk: Any = getattr(value, "_flatten")  # noqa: B009 - what `Module.variables` uses, with the paths
            pairs = walk(predicate=lambda item: isinstance(item, tf.Variable), with_path=True)
            return with_variables(value, {".".join(str(part) for part in path): variable for path, variable in pairs})
        return None

    def encode(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, tf.DType):
            return "tensorflow.dtype", value.name
        if isinstance(value, tf.TensorShape) and value.rank is not None:
            return "tensorflow.shape", value.as_list()
        return None

    def decode(self, tag: str, of: Any) -> Any:
        if tag == "tensorflow.dtype":
            return tf.dtypes.as_dtype(of)
        if tag == "tensorflow.shape":
            return tf.TensorShape(of)
        raise CheckpointError(f"unknown constant {tag} {of!r}", hint="the checkpoint was written by a newer s3loader")


FRAMEWORK: Final = _TensorFlow()
