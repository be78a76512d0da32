"""What s3loader's checkpoints need to know of TensorFlow and Keras: tensors, variables, modules, models, optimizers.

Found by the core through `FRAMEWORK`, by name, at the first sight of one of their objects.
"""

from __future__ import annotations

from typing import Any, Final

import keras
import numpy as np
import tensorflow as tf

from s3loader.checkpoint.format.dtypes import DTYPES, numpy_name
from s3loader.checkpoint.state.leaves import NUMPY, LeafAdapter, Source, Target
from s3loader.errors import CheckpointError, UnsupportedStateError

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
        name = numpy_name(keras.backend.standardize_dtype(value.dtype))
        if name is None:
            return None
        shape = tuple(value.shape)
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
    return np.array(value.numpy() if hasattr(value, "numpy") else keras.ops.convert_to_numpy(value))


TENSORFLOW: Final[LeafAdapter] = _Tensor()


class _TensorFlow:
    def adapter(self, value: Any) -> LeafAdapter | None:
        return TENSORFLOW if isinstance(value, tf.Tensor | tf.Variable | keras.Variable) else None

    def adapter_of_kind(self, kind: str) -> LeafAdapter | None:
        return TENSORFLOW if kind == "tensorflow" else None

    def expand(self, value: Any) -> Any:
        """Variables by name; a Keras object's are numbered, since Keras names layers anew in every model."""
        if isinstance(value, keras.optimizers.Optimizer):
            return {f"{i:04d}": variable for i, variable in enumerate(value.variables)}
        if isinstance(value, keras.Layer | keras.Metric):
            return {f"{i:04d}.{variable.name}": variable for i, variable in enumerate(value.variables)}
        if isinstance(value, tf.random.Generator):
            return {"state": value.state}
        if isinstance(value, tf.Module):
            walk: Any = getattr(value, "_flatten")  # noqa: B009 - what `Module.variables` uses, with the paths
            pairs = walk(predicate=lambda item: isinstance(item, tf.Variable), with_path=True)
            return {".".join(str(part) for part in path): variable for path, variable in pairs}
        return None

    def absorb(self, value: Any, state: Any, *, in_place: bool) -> Any:
        """Every variable was assigned already; make sure that they are all."""
        have = set(self.expand(value))
        if have != set(state):
            missing, extra = sorted(have - set(state)), sorted(set(state) - have)
            raise CheckpointError(
                f"{type(value).__name__}: the checkpoint lacks {missing[:3]} and has {extra[:3]} beside what the object has",
                hint="build it before restoring: model.build(...), optimizer.build(model.trainable_variables)",
            )
        return value

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
