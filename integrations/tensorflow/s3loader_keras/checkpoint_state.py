"""What s3loader's checkpoints need to know of Keras 3, whatever its backend: variables, layers, models, metrics, optimizers.

Found by the core through `FRAMEWORK`, by name, at the first sight of one of Keras's objects. A variable is saved as what it
holds: a tensor of TensorFlow, torch or JAX.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import keras

from s3loader import CheckpointError, UnsupportedStateError
from s3loader.adapters import LeafAdapter, Opened, Source, Target, WithState, adapter_for, with_variables

__all__ = ["FRAMEWORK"]


class _Variable:
    """`keras.Variable`: saved as its value, restored by filling that or by assigning another."""

    def __init__(self, inner: LeafAdapter) -> None:
        self._inner, self.kind = inner, inner.kind

    def source(self, value: Any) -> Source:
        return self._inner.source(value.value)

    def into(self, value: Any) -> Target | None:
        target = self._inner.into(value.value)
        assert target is not None

        def finish() -> Any:
            made = target.finish()
            if not target.in_place:
                value.assign(made)
            return value

        return replace(target, finish=finish, in_place=True)

    def fresh(self, dtype: str, shape: tuple[int, ...]) -> Target:
        return self._inner.fresh(dtype, shape)


class _Keras:
    def adapter(self, value: Any) -> LeafAdapter | None:
        if not isinstance(value, keras.Variable):
            return None
        inner = adapter_for(value.value)
        if inner is None:
            raise UnsupportedStateError(
                f"the variable {value.path!r} holds a {type(value.value).__qualname__}",
                hint="build the model first; the backends known are tensorflow, torch, jax and numpy",
            )
        return _Variable(inner)

    def adapter_of_kind(self, kind: str) -> LeafAdapter | None:
        return None

    def node(self, value: Any) -> Opened | None:
        return None

    def object(self, value: Any) -> WithState | None:
        """Variables by name, numbered, since Keras names layers anew in every model."""
        if isinstance(value, keras.optimizers.Optimizer):
            return with_variables(value, {f"{i:04d}": variable for i, variable in enumerate(value.variables)})
        if isinstance(value, keras.Layer | keras.Metric):
            return with_variables(value, {f"{i:04d}.{variable.name}": variable for i, variable in enumerate(value.variables)})
        return None

    def encode(self, value: Any) -> tuple[str, Any] | None:
        return None

    def decode(self, tag: str, of: Any) -> Any:
        raise CheckpointError(f"unknown constant {tag} {of!r}", hint="the checkpoint was written by a newer s3loader")


FRAMEWORK: Final = _Keras()
