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
from functools import partial
from typing import Any, Final, Protocol

from s3loader.errors import ConfigError, FormatError, ShardReadError
from s3loader.types import Buffer

__all__ = [
    "COMPRESSIONS",
    "LARGEST_FRAME",
    "Compressor",
    "FrameTable",
    "compressor",
    "decompressor",
    "infer_archive_format",
    "most_inside",
    "read_seek_table",
    "unpack",
    "unread_compression",
]

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
_UNREAD: Final = {
    ".tar.lzma": "lzma",
    ".tlz": "lzma",
    ".tar.z": "compress (.Z)",
    ".taz": "compress (.Z)",
    ".tar.lz4": "lz4",
    ".tar.lz": "lzip",
    ".tar.lzo": "lzop",
    ".tar.sz": "snappy",
    ".tar.br": "brotli",
}
"""Archives that are known by their names, and not read."""
_ALIASES: Final = {"gz": "gzip", "bzip2": "bz2", "lzma": "xz", "zst": "zstd", "none": None, "": None}

SKIPPABLE_MAGIC: Final = 0x184D2A5E
SEEKABLE_MAGIC: Final = 0x8F92EAB1
MAX_FRAME: Final = 8 << 20
"""Most plain bytes in one zstd frame that we write: bounds the memory of reader and writer."""
LARGEST_FRAME: Final = 8 * MAX_FRAME
"""Most plain bytes in one zstd frame that is read at random; archives with larger ones are streamed."""
_MAX_WINDOW: Final = 1 << 27
_MOST_PER_BYTE: Final = 1 << 15  # a zstd block of one repeated byte: 4 bytes for 128 KiB
_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def infer_archive_format(key: str) -> tuple[str, str | None]:
    """``("tar", compression)`` by the suffix of `key`.

    Raises:
        ConfigError: it is no name of a tar archive.
    """
    lower = key.lower()
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if lower.endswith(suffix):
            return "tar", _SUFFIXES[suffix]
    unread = unread_compression(key)
    kind = f" ({unread} is not read)" if unread else ""
    raise ConfigError(f"Unsupported archive format: {key}{kind}", hint=f"known suffixes: {' '.join(_SUFFIXES)}")


def unread_compression(key: str) -> str | None:
    """What compresses an archive of this name, where that is known and not read."""
    lower = key.lower()
    return next((name for suffix, name in _UNREAD.items() if lower.endswith(suffix)), None)


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
    if descriptor & 0x7F:
        raise ShardReadError(f"zstd seek table with unknown flags {descriptor:#x}")
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
        if packed < 8 or plain > most_inside(packed):
            raise ShardReadError(f"zstd seek table: frame {i} cannot hold {plain} bytes in {packed}")
        table.packed.append(packed)
        table.plain.append(plain)
    if sum(table.packed) + needed != archive_size:
        raise ShardReadError("zstd seek table does not add up to the archive")
    return table


def most_inside(packed: int) -> int:
    """The most plain bytes that `packed` bytes of zstd frames can stand for: whoever claims more is wrong."""
    return packed * _MOST_PER_BYTE


def unpack(frame: Buffer, size: int | None = None, *, at_most: int = LARGEST_FRAME) -> bytes:
    """The content of one zstd frame, which must be all of `frame`.

    What the frame's header states is compared with what is expected before anything is inflated, so that
    no memory beyond the expected size is ever taken.

    Args:
        frame: The frame, without a byte more.
        size: Bytes it must hold; None where only a bound is known.
        at_most: The bound, for frames of unknown size.

    Raises:
        FormatError: it is damaged, no frame, more than one, or holds another number of bytes.
    """
    import zstandard

    view = memoryview(frame)
    most = at_most if size is None else size
    if most > most_inside(len(view)):
        if size is not None:
            raise FormatError(f"{len(view)} bytes of zstd cannot hold {size} bytes")
        most = most_inside(len(view))
    if len(view) >= 8 and _is_skippable(view):
        if struct.unpack_from("<I", view, 4)[0] + 8 != len(view) or size:
            raise FormatError(f"a skippable frame where {size} bytes should be")
        return b""
    try:
        if bytes(view[:4]) != _MAGIC:
            raise FormatError("not a zstd frame")
        head = zstandard.get_frame_parameters(view[:18])
        if head.dict_id:
            raise FormatError(f"it needs the dictionary {head.dict_id}")
        stated = (
            None if head.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR) else head.content_size
        )
        if head.window_size > max(_MAX_WINDOW, most):
            raise FormatError(f"it needs a window of {head.window_size} bytes")
        if stated is not None and (stated > most or (size is not None and stated != size)):
            raise FormatError(f"it holds {stated} bytes, {'at most ' if size is None else ''}{most} are expected")
        inflater = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        plain = inflater.decompress(view, max_output_size=max(most, 1), allow_extra_data=False)
    except (zstandard.ZstdError, ValueError, MemoryError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"it is damaged: {error}") from error
    if len(plain) > most or (size is not None and len(plain) != size):
        raise FormatError(f"it holds {len(plain)} bytes, {most} are expected")
    return plain


def _is_skippable(view: memoryview) -> bool:
    magic: int = struct.unpack_from("<I", view)[0]
    return magic & 0xFFFFFFF0 == 0x184D2A50


class _Decompressor(Protocol):
    def decompress(self, data: Buffer) -> bytes: ...


def decompressor(compression: str, chunks: Iterator[Buffer], *, max_chunk: int = 1 << 20) -> Iterator[bytes]:
    """Plain bytes of a compressed stream, in pieces of bounded size; several streams in a row are one.

    Args:
        compression: One of `COMPRESSIONS`, or ``"zlib"``.
        chunks: The stream.
        max_chunk: Most bytes of a piece.

    Raises:
        ShardReadError: the stream is damaged or ends early.
    """
    make: Any
    if compression in ("gzip", "zlib"):
        make = partial(_Gzip, 31 if compression == "gzip" else 15)
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

    def __init__(self, window: int) -> None:
        self._in = zlib.decompressobj(window)
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

        self._in = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
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
