"""s3dlio's streaming writers: an object from pieces, which nobody sees before `finalize`."""

from __future__ import annotations

from typing import Any

from s3loader.checksum import crc32c
from s3loader.errors import ConfigError
from s3loader.shard.compression import compressor
from s3loader.store.arguments import readable
from s3loader.toolbox.stores import object_at
from s3loader.units import MIB

__all__ = ["PyObjectWriter", "PyWriterOptions", "create_s3_writer"]

_SMALLEST_PART = 5 * MIB


class PyWriterOptions:
    """How a writer works.

    Attributes:
        compression: None or ``"zstd"``.
        compression_level: Of zstd; None: 3.
        buffer_size: Bytes of a part; 5 MiB at least, which is what S3 takes. None: that of the store.
    """

    def __init__(self) -> None:
        self.compression: str | None = None
        self.compression_level: int | None = None
        self.buffer_size: int | None = None

    def with_compression(self, compression_type: str, level: int | None = None) -> None:
        """Compress with ``"zstd"``; ``"none"`` does not."""
        if compression_type not in ("zstd", "none"):
            raise ConfigError(f"Unsupported compression type: {compression_type}", hint="zstd or none")
        self.compression = None if compression_type == "none" else compression_type
        self.compression_level = level

    def with_buffer_size(self, size: int) -> None:
        """Parts of so many bytes."""
        self.buffer_size = size


class PyObjectWriter:
    """Writes one object; made by `create_s3_writer`. One that is lost before `finalize` makes none."""

    def __init__(self, uri: str, options: PyWriterOptions | None) -> None:
        options = options or PyWriterOptions()
        store, key = object_at(uri, {})
        part_size = None if options.buffer_size is None else max(_SMALLEST_PART, options.buffer_size)
        self._packs = options.compression is not None
        self._packer = compressor(options.compression, options.compression_level)
        self._writer = store.multipart(key, part_size=part_size)
        self._plain = self._crc = 0

    def write_chunk(self, data: Any) -> None:
        """Append `data`, anything contiguous with the buffer protocol; it may be changed when this returns."""
        view = readable(data)
        for piece in self._packer.write(view):
            self._writer.write(piece)
        self._crc = crc32c(view, self._crc)
        self._plain += len(view)

    def write_owned_bytes(self, data: Any, *, copy: bool = False) -> None:
        """As `write_chunk`; `copy` or not, `data` may be changed when this returns."""
        del copy
        self.write_chunk(data)

    def finalize(self) -> tuple[int, int]:
        """Publish the object: (bytes that were written, bytes that they took compressed, 0 without compression)."""
        for piece in self._packer.finish():
            self._writer.write(piece)
        self._writer.close()
        return self._plain, self.compressed_bytes()

    def bytes_written(self) -> int:
        """So far."""
        return self._plain

    def checksum(self) -> str:
        """``crc32c:`` and eight digits, of what was written so far, before compression."""
        return f"crc32c:{self._crc:08x}"

    def compressed_bytes(self) -> int:
        """Bytes that left the compressor so far; 0 without one."""
        return self._writer.tell() if self._packs else 0


def create_s3_writer(uri: str, options: PyWriterOptions | None = None) -> PyObjectWriter:
    """A writer of the object at `uri`, of any scheme."""
    return PyObjectWriter(uri, options)
