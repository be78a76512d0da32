"""From a list of samples to one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from s3loader.errors import ConfigError, SampleError

__all__ = ["Collate", "Ragged", "collate_fixed", "collate_ragged", "make_collate"]

Collate: TypeAlias = Literal["fixed", "ragged"] | Callable[[list[Any]], Any] | None
"""None: a list of samples. ``"fixed"``: arrays and numbers stacked, structure kept; shapes must agree.
``"ragged"``: the same, but bytes and arrays of unlike length become `Ragged`. A function: it gets the list."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of unlike length, end to end: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: npt.NDArray[Any]
    """First axis: all rows; further axes as in each row."""
    offsets: npt.NDArray[np.int64]
    """Rows + 1."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        row = range(len(self))[row]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @classmethod
    def join(cls, rows: Sequence[npt.NDArray[Any]]) -> Ragged:
        """One copy of every row."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.concatenate(rows) if rows else np.zeros(0, dtype=np.uint8), offsets)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, (bytes, bytearray, memoryview))


def _columns(samples: list[Any], leaf: Callable[[list[Any]], Any]) -> Any:
    """`leaf` applied to each column of equal structures."""
    head = samples[0]
    if isinstance(head, Mapping):
        keys = head.keys()
        for sample in samples:
            if sample.keys() != keys:
                raise SampleError(
                    f"samples differ in their keys: {sorted(keys)} and {sorted(sample.keys())}",
                    hint="bring them to one shape in transform=, or give a collate function",
                )
        return {key: _columns([sample[key] for sample in samples], leaf) for key in keys}
    if isinstance(head, (tuple, list)):
        if any(len(sample) != len(head) for sample in samples):
            raise SampleError("samples differ in length", hint="bring them to one shape in transform=")
        columns = [_columns(list(column), leaf) for column in zip(*samples, strict=True)]
        return type(head)(*columns) if hasattr(head, "_fields") else type(head)(columns)
    return leaf(samples)


def _fixed(values: list[Any]) -> Any:
    head = values[0]
    if isinstance(head, str):
        return values
    if _is_bytes(head):
        rows = [np.frombuffer(value, dtype=np.uint8) for value in values]
        if len({len(row) for row in rows}) > 1:
            raise SampleError(
                "samples differ in size", hint='decode them to one shape, or use collate="ragged" or collate=None'
            )
        return np.stack(rows)
    if isinstance(head, (bool, int, float, complex, np.generic)):
        return np.asarray(values)
    if isinstance(head, np.ndarray):
        if len({value.shape for value in values}) > 1:
            shapes = sorted({str(value.shape) for value in values})[:3]
            raise SampleError(f"samples differ in shape: {', '.join(shapes)}", hint='use collate="ragged", or transform=')
        return np.stack(values)
    return values


def _ragged(values: list[Any]) -> Any:
    head = values[0]
    if _is_bytes(head):
        return Ragged.join([np.frombuffer(value, dtype=np.uint8) for value in values])
    if isinstance(head, np.ndarray) and head.ndim and len({value.shape for value in values}) > 1:
        if len({value.shape[1:] for value in values}) > 1:
            raise SampleError("samples differ in shape beyond the first axis", hint="bring them to one shape in transform=")
        return Ragged.join(values)
    return _fixed(values)


def collate_fixed(samples: list[Any]) -> Any:
    """Stack samples of one structure and shape.

    Raises:
        SampleError: they differ.
    """
    return _columns(samples, _fixed) if samples else samples


def collate_ragged(samples: list[Any]) -> Any:
    """As `collate_fixed`, but rows of unlike length become `Ragged`."""
    return _columns(samples, _ragged) if samples else samples


def make_collate(collate: Collate) -> Callable[[list[Any]], Any] | None:
    """The function that `collate` names.

    Raises:
        ConfigError: it names none.
    """
    if collate is None or callable(collate):
        return collate
    known = {"fixed": collate_fixed, "ragged": collate_ragged}
    if collate not in known:
        raise ConfigError(f"unknown collate {collate!r}", hint='use "fixed", "ragged", a function, or None')
    return known[collate]
