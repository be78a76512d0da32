"""From a list of samples to one batch."""

from __future__ import annotations

import contextlib
import copy
import reprlib
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from s3loader.arguments import checked
from s3loader.errors import ConfigError, SampleError

__all__ = [
    "Collate",
    "Ragged",
    "_check_one_dtype",
    "collate_fixed",
    "collate_ragged",
    "columns",
    "make_collate",
    "map_leaves",
    "ragged",
    "stacked",
]

_SHAPE: Final = "bring them to one shape in transform="
_TYPE: Final = "samples differ in type"

Collate: TypeAlias = Literal["fixed", "ragged"] | Callable[[list[Any]], Any] | None
"""None: a list of samples. ``"fixed"``: arrays and numbers stacked, structure kept; shapes must agree, and a column has values
of one kind (flags, numbers, bytes, arrays ...), held as they are: else it is an error that names sample and field.
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


def columns(samples: Sequence[Any], leaf: Callable[[list[Any], str], Any], field: str = "") -> Any:
    """`leaf` of each column of equal structures, and of the column's place in a sample (``['a'][0]``).

    Mappings, tuples and lists keep the type that all samples have.

    Raises:
        SampleError: the structures differ; `.row` is the first sample that does, `.field` the place.
    """
    head = samples[0]
    if isinstance(head, Mapping):
        keys = head.keys()
        _need(samples, lambda sample: isinstance(sample, Mapping), field)
        for row, sample in enumerate(samples):
            if sample.keys() != keys:
                both = f"{sorted(map(str, keys))} and {sorted(map(str, sample.keys()))}"
                text = f"samples differ in their keys: {both}{_at(field)}"
                raise SampleError(text, hint=_SHAPE + ", or give a collate function", row=row, field=field)
        found = {key: columns([sample[key] for sample in samples], leaf, f"{field}[{key!r}]") for key in keys}
        alike = len(set(map(type, samples))) == 1
        return (like_mapping(head, found) if alike else None) or found
    if isinstance(head, (tuple, list)):
        kind: Any = type(head)
        _need(samples, lambda sample: type(sample) is kind, field)
        _need(samples, lambda sample: len(sample) == len(head), field, "samples differ in length")
        parts = [columns(list(column), leaf, f"{field}[{place}]") for place, column in enumerate(zip(*samples, strict=True))]
        return kind._make(parts) if hasattr(kind, "_make") else kind(parts)
    _need(samples, lambda sample: not isinstance(sample, (Mapping, tuple, list)), field)
    return leaf(list(samples), field)


def _at(field: str) -> str:
    return f" at {field}" if field else ""


def _need(
    values: Sequence[Any],
    good: Callable[[Any], bool],
    field: str,
    text: str = _TYPE,
    hint: str = _SHAPE,
) -> None:
    """Raise the error of the first of `values` that is not `good`."""
    for row, value in enumerate(values):
        if not good(value):
            if text == _TYPE:
                text += f": {type(values[0]).__name__} and {type(value).__name__}"
            raise SampleError(text + _at(field), hint=hint, row=row, field=field)


_FLAG, _NUMBER, _BYTES, _TEXT, _TIME, _RECORD, _ARRAY, _OTHER = range(8)
_KINDS: Final = {"b": _FLAG, **dict.fromkeys("iufc", _NUMBER), **dict.fromkeys("Mm", _TIME)}


def _kind(type_: Any) -> int:
    """What a column of values of this type is stacked as."""
    if issubclass(type_, str):
        return _TEXT
    if issubclass(type_, (bytes, bytearray, memoryview)):
        return _BYTES
    if issubclass(type_, (bool, np.bool_)):
        return _FLAG
    if issubclass(type_, (np.datetime64, np.timedelta64)):
        return _TIME
    if issubclass(type_, (int, float, complex, np.number)):
        return _NUMBER
    if issubclass(type_, np.generic):
        return _RECORD
    return _ARRAY if issubclass(type_, np.ndarray) else _OTHER


def _kind_of(values: list[Any], field: str) -> int:
    """The one kind of all `values`.

    Raises:
        SampleError: there are several: what they would become together would depend on their order, or not be what they are.
    """
    kinds = {_kind(type_) for type_ in set(map(type, values))}
    if kinds <= {_TEXT, _OTHER}:  # neither is stacked
        return _OTHER
    if len(kinds) > 1:
        first = _kind(type(values[0]))
        _need(values, lambda value: _kind(type(value)) == first, field)
    return kinds.pop()


def stacked(values: list[Any], field: str = "") -> Any:
    """A column of one batch: numbers and arrays as one array, bytes as rows of it, anything else as a list.

    Raises:
        SampleError: they differ in kind or shape, or no array holds them all as they are.
    """
    kind = _kind_of(values, field)
    if kind == _BYTES:
        rows = [np.frombuffer(value, dtype=np.uint8) for value in values]
        other = 'decode them to one shape, or use collate="ragged" or collate=None'
        _need(rows, lambda row: len(row) == len(rows[0]), field, "samples differ in size", other)
        return np.stack(rows)
    if kind == _NUMBER:
        return _numbers(values, field)
    if kind == _ARRAY:
        if len({value.shape for value in values}) > 1:
            row = next(row for row, value in enumerate(values) if value.shape != values[0].shape)
            shapes = f"{values[0].shape}, {values[row].shape}"
            text = f"samples differ in shape: {shapes}{_at(field)}"
            raise SampleError(text, hint='use collate="ragged", or transform=', row=row, field=field)
        _check_one_dtype(values, field)
        return np.stack(values)
    if kind in (_TIME, _RECORD):
        _need(values, lambda value: value.dtype == values[0].dtype, field, "samples differ in dtype")
    return values if kind == _OTHER else np.asarray(values)


def _numbers(values: list[Any], field: str) -> Any:
    array = np.asarray(values)
    kinds = set(map(type, values))
    if array.dtype.kind == "i" or (len(kinds) == 1 and kinds != {int} and array.dtype.kind in "iufc"):
        return array
    whole = all(issubclass(kind, (int, np.integer)) for kind in kinds)
    if whole:  # beyond 63 bits: perhaps all are positive
        with contextlib.suppress(OverflowError):
            array = np.asarray([int(value) for value in values], dtype=np.uint64)
    fits = array.dtype.kind in ("u" if whole else "fc")
    for row, value in enumerate(values):
        same = fits and array[row].item() == value
        if not same and not (fits and value != value):  # a NaN is not itself
            text = f"no array holds {reprlib.repr(value)} together with the others{_at(field)}"
            raise SampleError(text, hint="bring them to one type in transform=", row=row, field=field)
    return array


def _check_one_dtype(arrays: list[npt.NDArray[Any]], field: str) -> None:
    """See that what the types of `arrays` have in common holds each value as it is.

    Raises:
        SampleError: it does not.
    """
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) == 1:
        return
    head = arrays[0].dtype
    kinds = {_KINDS.get(dtype.kind) for dtype in dtypes}
    whole: np.dtype[Any] | None = None
    if kinds == {_NUMBER} or {dtype.kind for dtype in dtypes} in ({"U"}, {"S"}):
        whole = np.result_type(*dtypes)
    for row, array in enumerate(arrays):
        if array.dtype == (head if whole is None else whole):
            continue
        rounded = whole is not None and array.dtype.kind in "iu" and whole.kind in "fc"
        if whole is None or (rounded and not np.array_equal(array.astype(whole).astype(array.dtype), array)):
            text = f"samples differ in dtype: {head}, {array.dtype if row else whole}{_at(field)}"
            raise SampleError(text, hint="bring them to one dtype in transform=", row=row, field=field)


def ragged(values: list[Any], field: str = "") -> Any:
    """As `stacked`, but rows of unlike length become `Ragged`."""
    kind = _kind_of(values, field)
    if kind == _BYTES:
        return Ragged.join([np.frombuffer(value, dtype=np.uint8) for value in values])
    if kind == _ARRAY and len({value.shape for value in values}) > 1:
        beyond = values[0].shape[1:]
        text = "samples differ in shape beyond the first axis"
        _need(values, lambda value: value.ndim and value.shape[1:] == beyond, field, text)
        _check_one_dtype(values, field)
        return Ragged.join(values)
    return stacked(values, field)


@checked
def collate_fixed(samples: list[Any]) -> Any:
    """Stack samples of one structure and shape. What comes out depends on no order, and every value is what it was.

    Raises:
        SampleError: they differ.
    """
    return columns(samples, stacked) if samples else samples


@checked
def collate_ragged(samples: list[Any]) -> Any:
    """As `collate_fixed`, but rows of unlike length become `Ragged`."""
    return columns(samples, ragged) if samples else samples


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


# -- lists, tuples and mappings around values: walked and made again, each of its own type -----------


def like_mapping(like: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any] | None:
    """`items`, which have the keys of `like`, as a mapping of its type; None where no such one can be made.

    Subclasses of dict keep what else they are made of, as a defaultdict its factory.
    """
    kind = type(like)
    if kind is dict:
        return items
    try:
        if isinstance(like, (dict, UserDict)):
            made: Any = copy.copy(like)
            for key, value in items.items():
                made[key] = value
        else:
            made = kind(items)  # type: ignore[call-arg]  # as mappings are made; one that is not is left alone
        same = type(made) is kind and made.keys() == like.keys() and all(made[key] is items[key] for key in items)
    except Exception:  # noqa: BLE001  # of a class that nobody here knows
        return None
    return made if same else None


def _like_sequence(like: Any, items: list[Any]) -> Any:
    kind = type(like)
    if kind is list:
        return items
    if kind is tuple:
        return tuple(items)
    try:
        if isinstance(like, list):
            made: Any = copy.copy(like)
            made[:] = items
        else:
            made = kind._make(items) if hasattr(kind, "_make") else kind(items)
    except Exception:  # noqa: BLE001  # as above
        return None
    return made if type(made) is kind and len(made) == len(items) else None


def map_leaves(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`leaf` of every leaf of lists, tuples and mappings, which keep their types.

    Where no leaf changes, and where a container of its type cannot be made, the container stays the one it is.
    """
    if isinstance(value, (list, tuple)):
        items = [map_leaves(item, leaf) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        made = _like_sequence(value, items)
        return value if made is None else made
    if isinstance(value, Mapping):
        found = {key: map_leaves(item, leaf) for key, item in value.items()}
        if all(new is value[key] for key, new in found.items()):
            return value
        like = like_mapping(value, found)
        return value if like is None else like
    return leaf(value)
