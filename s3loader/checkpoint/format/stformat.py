"""The safetensors file format: an 8-byte length, a JSON header, then the tensors without gaps.

Format: https://github.com/huggingface/safetensors. The header is known from names, types and
shapes alone, so a file can be streamed before any tensor was read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from s3loader.checkpoint.format.dtypes import in_safetensors, nbytes
from s3loader.errors import FormatError

__all__ = ["ALIGNMENT", "HeaderEntry", "encode_header", "header_size", "parse_header"]

ALIGNMENT: Final = 64
"""Where the tensors begin is a multiple of this, so that a mapped file is aligned for any type."""
_MAX_HEADER: Final = 100_000_000  # what the reference implementation accepts


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
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[tuple[int, int]]]:
    """Header of a file that holds `tensors` (name, dtype, shape) in this order.

    Returns:
        The header's bytes and each tensor's ``(begin, end)``, counted from the start of the file.

    Raises:
        FormatError: a name is taken twice or reserved, or the header is larger than readers accept.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
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
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > _MAX_HEADER:
        raise FormatError(
            f"a safetensors header of {len(text)} bytes is larger than readers accept",
            hint="save fewer tensors per file: CheckpointOptions(file_size=...)",
        )
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [(start + begin, start + end) for begin, end in spans]


def header_size(first8: bytes | memoryview) -> int:
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


def parse_header(data: bytes | memoryview) -> tuple[list[HeaderEntry], dict[str, str]]:
    """Tensors (in file order) and metadata of a header with its 8 bytes of length.

    Raises:
        FormatError: it is not the header of a safetensors file.
    """
    start = header_size(data)
    if len(data) < start:
        raise FormatError("the safetensors header is cut short", hint="the file is not whole; copy it again")
    try:
        header = json.loads(bytes(data[8:start]))
        metadata = header.pop("__metadata__", {})
        entries = [
            HeaderEntry(
                name, info["dtype"], tuple(info["shape"]), start + info["data_offsets"][0], start + info["data_offsets"][1]
            )
            for name, info in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"not a safetensors header: {error}", hint="it is another kind of file, or damaged") from error
    return sorted(entries, key=lambda entry: (entry.begin, entry.end)), metadata
