"""``tf.train.Example`` and ``tf.train.SequenceExample`` without TensorFlow: the few protobuf messages they are made of.

::

    Example         1: Features                        SequenceExample  1: Features (context)  2: FeatureLists
    Features        1: map of string to Feature        FeatureLists     1: map of string to FeatureList
    Feature         1: BytesList | 2: FloatList | 3: Int64List          FeatureList   1: repeated Feature
    BytesList, FloatList, Int64List                    1: repeated value

(``tensorflow/core/example/{example,feature}.proto``.) Read as protobuf reads: numbers packed or one by one, fields in any
order, unknown ones skipped, of a field that comes twice the last counts, messages and lists that come twice are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from s3loader.errors import FormatError
from s3loader.types import Buffer

__all__ = ["decode_example", "decode_sequence_example"]

_VARINT, _FIXED64, _BYTES, _GROUP, _END_GROUP, _FIXED32 = range(6)
_DEEPEST: Final = 100
"""Groups inside one another, as protobuf's own limit is."""
_FEW: Final = 16
"""So many bytes of numbers are read in Python, more in numpy."""
_HINT: Final = "is it a serialized tf.train.Example, and all of it?"


def decode_example(data: Buffer) -> dict[str, Any]:
    """The features of a serialized ``tf.train.Example``.

    Returns:
        By name: a list of bytes, a float32 array, an int64 array (each 1-D, with as many values as there are), or None for a
        feature of no kind.

    Raises:
        FormatError: it is none.
    """
    features: dict[str, Any] = {}
    for number, value in _fields(memoryview(data)):
        if number == 1 and isinstance(value, memoryview):
            _add_entries(features, value, _feature)
    return features


def decode_sequence_example(data: Buffer) -> dict[str, Any]:
    """The features of a serialized ``tf.train.SequenceExample``.

    Returns:
        The context's features as `decode_example` gives them; of each feature list, by its name, the list of its features.

    Raises:
        FormatError: it is none, or a name is in both.
    """
    context: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    for number, value in _fields(memoryview(data)):
        if number == 1 and isinstance(value, memoryview):
            _add_entries(context, value, _feature)
        elif number == 2 and isinstance(value, memoryview):
            _add_entries(lists, value, _feature_list)
    if both := context.keys() & lists.keys():
        raise FormatError(f"the context and the feature lists both have {min(both)!r}", hint="name them apart")
    return context | lists


# -- messages --------------------------------------------------------------------------------------


def _add_entries(found: dict[str, Any], data: memoryview, make: Callable[[list[memoryview]], Any]) -> None:
    """The entries of a map, which is field 1 of `data`."""
    for number, value in _fields(data):
        if number != 1 or not isinstance(value, memoryview):
            continue
        name, parts = "", []
        for inner, content in _fields(value):
            if isinstance(content, memoryview) and inner == 1:
                try:
                    name = str(content, "utf-8")
                except UnicodeDecodeError as error:
                    raise FormatError("the name of a feature is no UTF-8", hint=_HINT) from error
            elif isinstance(content, memoryview) and inner == 2:
                parts.append(content)
        found[name] = make(parts)


def _feature_list(parts: list[memoryview]) -> list[Any]:
    return [
        _feature([value]) for part in parts for number, value in _fields(part) if number == 1 and isinstance(value, memoryview)
    ]


def _feature(parts: list[memoryview]) -> Any:
    kind = 0
    found: list[Any] = []
    for part in parts:
        for number, value in _fields(part):
            if number in _LISTS and isinstance(value, memoryview):
                here = list(_LISTS[number](value))  # also of what another kind takes the place of: it may be damaged
                kind, found = number, [*found, *here] if number == kind else here
    if kind < 2:
        return found if kind else None
    if len(found) == 1:
        return found[0]
    return np.concatenate(found) if found else np.empty(0, np.float32 if kind == 2 else np.int64)


def _byte_strings(data: memoryview) -> Iterator[bytes]:
    return (bytes(value) for number, value in _fields(data) if number == 1 and isinstance(value, memoryview))


def _floats(data: memoryview) -> Iterator[Any]:
    for number, value in _fields(data):
        if number != 1:
            continue
        if isinstance(value, _Fixed32):
            yield np.frombuffer(value.data, "<f4").astype(np.float32)
        elif isinstance(value, memoryview):
            if len(value) % 4:
                raise FormatError(f"{len(value)} bytes of packed floats", hint=_HINT)
            yield np.frombuffer(value, "<f4").astype(np.float32)


def _integers(data: memoryview) -> Iterator[Any]:
    alone: list[int] = []
    for number, value in _fields(data):
        if number != 1:
            continue
        if isinstance(value, int):
            alone.append(value)
        elif isinstance(value, memoryview):
            if alone:
                yield np.array(alone, np.uint64).astype(np.int64)
                alone = []
            yield _varints(value)
    if alone:
        yield np.array(alone, np.uint64).astype(np.int64)


def _varints(data: memoryview) -> Any:
    """Packed varints, int64."""
    if len(data) <= _FEW:
        at, values = 0, []
        while at < len(data):
            value, at = _varint(data, at)
            values.append(value)
        return np.array(values, np.uint64).astype(np.int64)
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128) + 1
    if not len(ends) or ends[-1] != len(raw):
        raise FormatError("a number is cut off", hint=_HINT)
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    if int(lengths.max()) > 10:
        raise FormatError("a number has more than ten bytes", hint=_HINT)
    found = np.zeros(len(ends), np.uint64)
    for place in range(int(lengths.max())):
        longer = lengths > place
        found[longer] |= (raw[starts[longer] + place] & 127).astype(np.uint64) << np.uint64(7 * place)
    return found.astype(np.int64)


_LISTS: Final[dict[int, Callable[[memoryview], Iterator[Any]]]] = {1: _byte_strings, 2: _floats, 3: _integers}


# -- the wire --------------------------------------------------------------------------------------


class _Fixed32:
    """Four bytes of a field."""

    __slots__ = ("data",)

    def __init__(self, data: memoryview) -> None:
        self.data = data


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int | _Fixed32 | None]]:
    """(number, value) of each field of a message: an int of a varint, bytes, four bytes; None for the rest."""
    at, end = 0, len(data)
    while at < end:
        number, kind, at = _tag(data, at)
        if kind == _BYTES:
            size, at = _varint(data, at)
            if size > end - at:
                raise FormatError(f"a field of {size} bytes, where {end - at} are left", hint=_HINT)
            yield number, data[at : at + size]
            at += size
        elif kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif kind == _FIXED32:
            if end - at < 4:
                raise FormatError("a number is cut off", hint=_HINT)
            yield number, _Fixed32(data[at : at + 4])
            at += 4
        else:
            at = _skip(data, at, number, kind, 0)
            yield number, None


def _tag(data: memoryview, at: int, least: int = 1) -> tuple[int, int, int]:
    """(number, kind, where it ends) of a field."""
    tag, after = _varint(data, at)
    if after - at > 5 or tag >= 1 << 32 or tag < least << 3:
        raise FormatError(f"no field begins with {tag}", hint=_HINT)
    return tag >> 3, tag & 7, after


def _skip(data: memoryview, at: int, number: int, kind: int, depth: int) -> int:
    """The end of a field that nobody wants."""
    if kind == _VARINT:
        return _varint(data, at)[1]
    if kind == _GROUP:
        if depth >= _DEEPEST:
            raise FormatError(f"more than {_DEEPEST} groups inside one another", hint=_HINT)
        while True:
            inner, kind, at = _tag(data, at, 0)  # protobuf does not look at numbers there
            if kind == _END_GROUP:
                if inner != number:
                    raise FormatError("a group ends that did not begin", hint=_HINT)
                return at
            at = _skip(data, at, inner, kind, depth + 1)
    size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
    if kind == _BYTES:
        size, at = _varint(data, at)
    if size is None:
        raise FormatError(f"a field of the unknown kind {kind}", hint=_HINT)
    if size > len(data) - at:
        raise FormatError("a field is cut off", hint=_HINT)
    return at + size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value modulo 2**64, where it ends)."""
    value = shift = 0
    for after in range(at, min(at + 10, len(data))):
        byte = data[after]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, after + 1
        shift += 7
    raise FormatError("a number is cut off, or has more than ten bytes", hint=_HINT)
