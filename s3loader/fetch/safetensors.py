"""The safetensors container: 8 bytes of little-endian length, a JSON header, then the tensors' bytes without gaps.

Format: https://github.com/huggingface/safetensors. The header is known from names, types and sizes alone, so a file can be
streamed before any tensor was read. Written here and not by the package because the same input must give the same bytes
(the package keeps metadata in a hash map), and because a header is read without its file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from s3loader.dtypes import in_safetensors, nbytes
from s3loader.errors import FormatError
from s3loader.types import Buffer

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["ALIGNMENT", "HeaderEntry", "decode", "encode", "encode_header", "header_size", "parse_header"]

ALIGNMENT: Final = 64
"""Where the tensors begin is a multiple of this, so that a mapped file is aligned for any type."""
_ARRAY_ALIGNMENT: Final = 8
_MAX_HEADER: Final = 100_000_000  # what the reference implementation accepts
_ARRAYS: Final = {"U8": "<u1", "U32": "<u4", "U64": "<u8"}
"""Types of the arrays that `encode` and `decode` know."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Bytes from the start of the file."""
    end: int


def encode_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    *,
    alignment: int = ALIGNMENT,
) -> tuple[bytes, list[tuple[int, int]]]:
    """Header of a file that holds `tensors` (name, dtype, shape) in this order.

    Args:
        metadata: Comes first in the header; None: no such entry.
        alignment: What the header's length is a multiple of, in bytes.

    Returns:
        The header's bytes and each tensor's ``(begin, end)``, counted from the start of the file.

    Raises:
        FormatError: a name is taken twice or reserved, or the header is larger than readers accept.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    spans: list[tuple[int, int]] = []
    at = 0
    for name, dtype, shape in tensors:
        if name in header or name == "__metadata__":
            raise FormatError(
                f"a safetensors file cannot hold the name {name!r} {'twice' if name in header else ''}".rstrip(),
                hint="'__metadata__' is reserved, and every tensor needs a name of its own",
            )
        stated, stated_shape = in_safetensors(dtype, shape)
        size = nbytes(dtype, shape)
        header[name] = {"dtype": stated, "shape": stated_shape, "data_offsets": [at, at + size]}
        spans.append((at, at + size))
        at += size
    text = _json(header)
    text += b" " * (-(8 + len(text)) % alignment)
    if len(text) > _MAX_HEADER:
        raise FormatError(
            f"a safetensors header of {len(text)} bytes is larger than readers accept",
            hint="save fewer tensors per file: CheckpointOptions(file_size=...)",
        )
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [(start + begin, start + end) for begin, end in spans]


def _json(header: Mapping[str, Any]) -> bytes:
    """As UTF-8; escaped where there is a name that UTF-8 has no bytes for."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(header, separators=(",", ":")).encode()


def header_size(first8: Buffer) -> int:
    """Bytes of the whole header, the 8 of its length included.

    Raises:
        FormatError: this is no safetensors file.
    """
    if len(first8) < 8:
        raise FormatError("not a safetensors file: shorter than 8 bytes", hint="it is cut short, or another kind of file")
    size: int = struct.unpack_from("<Q", first8)[0]
    if not 2 <= size <= _MAX_HEADER:
        raise FormatError(f"not a safetensors file: a header of {size} bytes", hint="it is another kind of file, or damaged")
    return 8 + size


def parse_header(data: Buffer) -> tuple[list[HeaderEntry], dict[str, str]]:
    """Tensors (in file order) and metadata of a header with its 8 bytes of length; what follows it is not looked at.

    Raises:
        FormatError: it is not the header of a safetensors file, or not all of it.
    """
    start = header_size(data)
    if len(data) < start:
        raise FormatError("the safetensors header is cut short", hint="the file is not whole; copy it again")
    try:
        header = json.loads(bytes(memoryview(data)[8:start]))
        metadata = header.pop("__metadata__", {})
        entries = [
            HeaderEntry(
                name, info["dtype"], tuple(info["shape"]), start + info["data_offsets"][0], start + info["data_offsets"][1]
            )
            for name, info in header.items()
        ]
        for entry in entries:
            numbers = (*entry.shape, entry.begin, entry.end)
            whole = type(entry.dtype) is str and all(type(number) is int and number >= 0 for number in numbers)
            if not whole or not start <= entry.begin <= entry.end:
                raise ValueError(f"the tensor {entry.name!r} is {entry.dtype!r} {entry.shape} at [{entry.begin}, {entry.end})")
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("its __metadata__ is no map of strings")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"not a safetensors header: {error}", hint="it is another kind of file, or damaged") from error
    return sorted(entries, key=lambda entry: (entry.begin, entry.end)), metadata


def encode(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """The whole file for one-dimensional u8, u32 and u64 `arrays`, widest first so that all are aligned."""
    import numpy as np

    names = {np.dtype(text): name for name, text in _ARRAYS.items()}
    order = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    parts = [np.ascontiguousarray(arrays[name]).astype(arrays[name].dtype.newbyteorder("<"), copy=False) for name in order]
    rows = ((name, names[part.dtype], part.shape) for name, part in zip(order, parts, strict=True))
    header, _ = encode_header(rows, metadata, alignment=_ARRAY_ALIGNMENT)
    return b"".join([header, *(part.tobytes() for part in parts)])


def decode(data: Buffer) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """The arrays (views of `data`, no copy) and metadata of a whole file as `encode` makes it.

    Raises:
        FormatError: truncated, overlapping, with gaps, or of other types.
    """
    import numpy as np

    entries, metadata = parse_header(data)
    view = memoryview(data)
    end = header_size(view)
    arrays = {}
    for entry in entries:
        if entry.dtype not in _ARRAYS or len(entry.shape) != 1:
            raise FormatError(f"bad safetensors entry {entry.name!r}")
        dtype = np.dtype(_ARRAYS[entry.dtype])
        if entry.begin != end or entry.end - entry.begin != math.prod(entry.shape) * dtype.itemsize:
            raise FormatError(f"safetensors entry {entry.name!r} has a wrong extent")
        if entry.end > len(view):
            raise FormatError(f"truncated: safetensors entry {entry.name!r} ends at {entry.end} of {len(view)} bytes")
        arrays[entry.name] = np.frombuffer(view[entry.begin : entry.end], dtype=dtype)
        end = entry.end
    if end != len(view):
        raise FormatError(f"{len(view) - end} bytes after the last tensor")
    return arrays, metadata
