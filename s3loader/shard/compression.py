"""Compressed tar streams: gzip, bz2, xz as one stream each way, zstd as independent frames.

A zstd shard is a sequence of independent frames followed by the seek table of the zstd seekable
format in a skippable frame, so that any zstd tool decompresses it and ours starts at any frame.

Source: zstd, contrib/seekable_format/zstd_seekable_compression_format.md; RFC 8878 (frames).
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from array import array
from collections.abc import Iterator
from typing import Any, Final, Protocol

from s3loader.errors import ConfigError, ShardReadError
from s3loader.types import Buffer

__all__ = ["COMPRESSIONS", "Compressor", "FrameTable", "compressor", "decompressor", "infer_archive_format", "read_seek_table"]

COMPRESSIONS: Final = ("gzip", "bz2", "xz", "zstd")
_SUFFIXES: Final = {
    ".tar": None,
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.bz2": "bz2",
    ".tbz2": "bz2",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.zst": "zstd",
    ".tar.zstd": "zstd",
}
_ALIASES: Final = {"gz": "gzip", "bzip2": "bz2", "lzma": "xz", "zst": "zstd", "none": None, "": None}

SKIPPABLE_MAGIC: Final = 0x184D2A5E
SEEKABLE_MAGIC: Final = 0x8F92EAB1
MAX_FRAME: Final = 8 << 20
"""Most plain bytes in one zstd frame: bounds the memory of reader and writer."""


def infer_archive_format(key: str) -> tuple[str, str | None]:
    """``("tar", compression)`` by the suffix of `key`.

    Raises:
        ConfigError: it is no name of a tar archive.
    """
    lower = key.lower()
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if lower.endswith(suffix):
            return "tar", _SUFFIXES[suffix]
    raise ConfigError(f"Unsupported archive format: {key}", hint=f"known suffixes: {' '.join(_SUFFIXES)}")


def normalize_compression(name: str | None) -> str | None:
    """One of `COMPRESSIONS` or None.

    Raises:
        ConfigError: the name is unknown.
    """
    if name is None or name in COMPRESSIONS:
        return name
    if name in _ALIASES:
        return _ALIASES[name]
    raise ConfigError(f"unknown compression {name!r}", hint=f"one of {', '.join(COMPRESSIONS)}, or None")


def suffix_of(compression: str | None) -> str:
    """File name suffix of a shard: ``.tar``, ``.tar.gz``, ..."""
    return {None: ".tar", "gzip": ".tar.gz", "bz2": ".tar.bz2", "xz": ".tar.xz", "zstd": ".tar.zst"}[compression]


class Compressor(Protocol):
    """Bytes in, compressed bytes out, never more held back than one frame."""

    def write(self, data: Buffer) -> list[Buffer]:
        """Take `data`; returns what is ready."""
        ...

    def boundary(self) -> list[Buffer]:
        """A good place to cut: a member ends here."""
        ...

    def finish(self) -> list[Buffer]:
        """The rest."""
        ...


class _Plain:
    def write(self, data: Buffer) -> list[Buffer]:
        return [data]

    def boundary(self) -> list[Buffer]:
        return []

    def finish(self) -> list[Buffer]:
        return []


class _Stream:
    """gzip (header with time 0: same input, same bytes), bz2 or xz."""

    def __init__(self, compression: str, level: int | None) -> None:
        self._out: Any
        if compression == "gzip":
            self._out = zlib.compressobj(6 if level is None else level, zlib.DEFLATED, 31)
        elif compression == "bz2":
            self._out = bz2.BZ2Compressor(9 if level is None else level)
        else:
            self._out = lzma.LZMACompressor(preset=level)

    def write(self, data: Buffer) -> list[Buffer]:
        out = self._out.compress(data)
        return [out] if out else []

    def boundary(self) -> list[Buffer]:
        return []

    def finish(self) -> list[Buffer]:
        return [self._out.flush()]


class FrameTable:
    """Compressed and plain sizes of the frames of a zstd stream, as they are made."""

    def __init__(self) -> None:
        self.packed = array("Q")
        self.plain = array("Q")

    def seek_table(self) -> bytes:
        """The skippable frame that ends a seekable zstd stream."""
        entries = b"".join(struct.pack("<II", packed, plain) for packed, plain in zip(self.packed, self.plain, strict=True))
        footer = struct.pack("<IBI", len(self.packed), 0, SEEKABLE_MAGIC)
        return struct.pack("<II", SKIPPABLE_MAGIC, len(entries) + len(footer)) + entries + footer


class ZstdFrames:
    """Independent frames, closed at member boundaries once `frame_size` plain bytes are in them."""

    def __init__(self, level: int | None, frame_size: int) -> None:
        import zstandard

        self._zstd = zstandard.ZstdCompressor(level=3 if level is None else level, write_checksum=True)
        self._frame_size = min(frame_size, MAX_FRAME)
        self._pending = bytearray()
        self.table = FrameTable()

    def write(self, data: Buffer) -> list[Buffer]:
        self._pending += data
        frames: list[Buffer] = []
        while len(self._pending) >= MAX_FRAME:
            frames += self._frame(MAX_FRAME)
        return frames

    def boundary(self) -> list[Buffer]:
        return self._frame(len(self._pending)) if len(self._pending) >= self._frame_size else []

    def finish(self) -> list[Buffer]:
        return self._frame(len(self._pending)) if self._pending else []

    def _frame(self, size: int) -> list[Buffer]:
        frame = self._zstd.compress(bytes(self._pending[:size]))
        del self._pending[:size]
        self.table.packed.append(len(frame))
        self.table.plain.append(size)
        return [frame]


def compressor(compression: str | None, level: int | None = None, frame_size: int = 64 << 10) -> Compressor:
    """A compressor for one of `COMPRESSIONS`, or one that passes bytes through."""
    if compression is None:
        return _Plain()
    if compression == "zstd":
        return ZstdFrames(level, frame_size)
    return _Stream(compression, level)


def read_seek_table(tail: Buffer, archive_size: int) -> FrameTable | None:
    """The seek table at the end of a zstd archive, from its last bytes.

    Returns:
        None where there is no seek table: the archive can only be read from its beginning. The
        frames' sizes then add up to everything before the table.

    Raises:
        ShardReadError: a seek table is there and contradicts the archive.
        ValueError: `tail` is too short; ``.args[0]`` is the number of bytes needed.
    """
    view = memoryview(tail)
    if len(view) < 17 or struct.unpack_from("<I", view, len(view) - 4)[0] != SEEKABLE_MAGIC:
        return None
    count, descriptor, _ = struct.unpack_from("<IBI", view, len(view) - 9)
    width = 12 if descriptor & 0x80 else 8
    needed = 8 + count * width + 9
    if needed > archive_size:
        raise ShardReadError(f"zstd seek table claims {count} frames in {archive_size} bytes")
    if needed > len(view):
        raise ValueError(needed)
    body = view[len(view) - needed :]
    magic, length = struct.unpack_from("<II", body)
    if magic != SKIPPABLE_MAGIC or length != needed - 8:
        raise ShardReadError("zstd seek table has no skippable frame around it")
    table = FrameTable()
    for i in range(count):
        packed, plain = struct.unpack_from("<II", body, 8 + i * width)
        table.packed.append(packed)
        table.plain.append(plain)
    if sum(table.packed) + needed != archive_size:
        raise ShardReadError("zstd seek table does not add up to the archive")
    return table


class _Decompressor(Protocol):
    def decompress(self, data: Buffer) -> bytes: ...


def decompressor(compression: str, chunks: Iterator[Buffer], *, max_chunk: int = 1 << 20) -> Iterator[bytes]:
    """Plain bytes of a compressed stream, in pieces of bounded size; several streams in a row are one.

    Raises:
        ShardReadError: the stream is damaged or ends early.
    """
    make: Any
    if compression == "gzip":
        make = _Gzip
    elif compression == "bz2":
        make = bz2.BZ2Decompressor
    elif compression == "xz":
        make = lzma.LZMADecompressor
    else:
        make = _Zstd
    unit = None
    try:
        for piece in _pieces(chunks, 4 << 10 if compression == "zstd" else 1 << 20):
            data: Buffer = piece
            while data or (unit is not None and not unit.eof and not unit.needs_input):
                if unit is None:
                    unit = make()
                plain = unit.decompress(data, max_chunk)
                data = b""
                if plain:
                    yield plain
                if unit.eof:
                    data = unit.unused_data
                    unit = None
                    if compression == "gzip" and not bytes(data).strip(b"\0"):
                        data = b""  # gzip allows zero padding behind the last stream
    except (zlib.error, OSError, lzma.LZMAError, EOFError, ValueError, _zstd_error()) as error:
        raise ShardReadError(f"{compression} stream is damaged: {error}") from error
    if unit is not None:
        raise ShardReadError(f"{compression} stream ends early")


def _pieces(chunks: Iterator[Buffer], size: int) -> Iterator[memoryview]:
    """Small pieces: zstd has no output limit of its own, and 4 bytes may stand for 128 KiB."""
    for chunk in chunks:
        view = memoryview(chunk)
        for at in range(0, len(view), size):
            yield view[at : at + size]


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


class _Gzip:
    """`zlib` with the interface of `bz2.BZ2Decompressor`."""

    def __init__(self) -> None:
        self._in = zlib.decompressobj(31)
        self._tail = b""

    def decompress(self, data: Buffer, max_length: int) -> bytes:
        plain = self._in.decompress(self._tail + bytes(data) if self._tail else data, max_length)
        self._tail = self._in.unconsumed_tail
        return plain

    @property
    def eof(self) -> bool:
        return self._in.eof

    @property
    def needs_input(self) -> bool:
        return not self._tail

    @property
    def unused_data(self) -> bytes:
        return self._in.unused_data


class _Zstd:
    """One zstd frame; skippable frames give nothing."""

    def __init__(self) -> None:
        import zstandard

        self._in = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        self._head = b""
        self._skip: int | None = None
        self._eof = False
        self._unused = b""

    def decompress(self, data: Buffer, max_length: int) -> bytes:
        data = bytes(data)
        if self._skip is None:
            self._head += data
            if len(self._head) < 8:
                return b""
            data, self._head = self._head, b""
            magic, length = struct.unpack_from("<II", data)
            self._skip = length + 8 if magic & 0xFFFFFFF0 == 0x184D2A50 else 0
        if self._skip:
            used = min(self._skip, len(data))
            self._skip -= used
            if not self._skip:
                self._eof, self._unused = True, data[used:]
            return b""
        plain = self._in.decompress(data)
        self._eof, self._unused = self._in.eof, self._in.unused_data
        return plain

    @property
    def eof(self) -> bool:
        return self._eof

    @property
    def needs_input(self) -> bool:
        return True

    @property
    def unused_data(self) -> bytes:
        return self._unused
