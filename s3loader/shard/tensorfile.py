"""The safetensors container, in the few lines an index needs.

Source of the format: https://github.com/huggingface/safetensors (8 bytes little-endian length of
a JSON header, the header, then the tensors' bytes). Written here and not by the package because an
index must be the same bytes for the same input, and the package keeps metadata in a hash map.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from s3loader.errors import FormatError
from s3loader.types import Buffer

__all__ = ["decode", "decode_header", "encode"]

_DTYPES: Final[dict[str, np.dtype[Any]]] = {"U8": np.dtype("<u1"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8")}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
MAX_HEADER: Final = 1 << 20


def encode(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """The file for one-dimensional u8, u32 and u64 `tensors`, widest first so that all are aligned."""
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    chunks = []
    at = 0
    for name in order:
        data = np.ascontiguousarray(tensors[name]).astype(tensors[name].dtype.newbyteorder("<"), copy=False)
        header[name] = {"dtype": _NAMES[data.dtype], "shape": list(data.shape), "data_offsets": [at, at + data.nbytes]}
        chunks.append(data.tobytes())
        at += data.nbytes
    head = json.dumps(header, separators=(",", ":")).encode("ascii")
    head += b" " * (-len(head) % 8)
    return b"".join([struct.pack("<Q", len(head)), head, *chunks])


def decode_header(data: Buffer) -> tuple[dict[str, Any], dict[str, str], int]:
    """Header entries, metadata and the offset of the first tensor byte.

    `data` may be only the beginning of the file, as long as the header is in it.

    Raises:
        FormatError: this is not the beginning of a safetensors file.
    """
    view = memoryview(data)
    if len(view) < 8:
        raise FormatError("too short for a safetensors header")
    length = struct.unpack_from("<Q", view)[0]
    if not 2 <= length <= min(MAX_HEADER, len(view) - 8) or view[8] != ord("{"):
        raise FormatError("not a safetensors header")
    try:
        header = json.loads(bytes(view[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"safetensors header is not JSON: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("safetensors metadata is not a map of strings")
    return header, metadata, 8 + length


def decode(data: Buffer) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Tensors (views of `data`, no copy) and metadata.

    Raises:
        FormatError: truncated, overlapping or mistyped.
    """
    header, metadata, start = decode_header(data)
    body = memoryview(data)[start:]
    tensors = {}
    end = 0
    for name, entry in header.items():
        try:
            dtype, (length,), (low, high) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"bad safetensors entry {name!r}") from error
        if not all(type(value) is int for value in (length, low, high)) or low != end or high - low != length * dtype.itemsize:
            raise FormatError(f"safetensors entry {name!r} has a wrong extent")
        if length < 0 or high > len(body):
            raise FormatError(f"truncated: safetensors entry {name!r} ends at {high} of {len(body)} bytes")
        tensors[name] = np.frombuffer(body[low:high], dtype=dtype)
        end = high
    if end != len(body):
        raise FormatError(f"{len(body) - end} bytes after the last tensor")
    return tensors, metadata
