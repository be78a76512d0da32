"""Builds a shard as a stream: tar bytes out, index and CRC32C on the fly. No I/O.

The first member of a shard, `__manifest__.jsonl`, describes all others, so its length is known
last. The builder therefore gives the archive in three pieces: the *body* (members, as they come), and
at the end the *head* (that first member) and the *tail*. Whoever uploads them keeps part 1 of a
multipart upload back until the head is known; nothing else waits, and nothing is written twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from s3loader.checksum import crc32c
from s3loader.errors import ConfigError
from s3loader.shard.compression import FrameTable, ZstdFrames, compressor, normalize_compression
from s3loader.shard.index import INTERNAL_MANIFEST, MemberRange, ShardIndex
from s3loader.shard.index_builder import IndexBuilder
from s3loader.shard.tar import check_member_path, end_of_archive, member_header, padding
from s3loader.types import Buffer

__all__ = ["BuiltShard", "ShardBuilder"]

_PADDING = [bytes(n) for n in range(512)]


@dataclass(frozen=True, slots=True)
class BuiltShard:
    """What `ShardBuilder.finish` adds to the body."""

    head: bytes
    """Goes before the body."""
    tail: bytes
    """Goes behind it."""
    index: ShardIndex
    """Complete but for the ETag."""


class ShardBuilder:
    """One shard in the making.

    Args:
        compression: None, ``"gzip"``, ``"bz2"``, ``"xz"`` or ``"zstd"``.
        level: Of the compression; None is its usual one.
        frame_size: zstd: a frame is closed at the first member boundary after this many plain bytes.
            Smaller frames mean fewer bytes per random read, larger ones compress better.
        internal_manifest_path: Name of the first member, which no other may have.
    """

    def __init__(
        self,
        *,
        compression: str | None = None,
        level: int | None = None,
        frame_size: int = 64 << 10,
        internal_manifest_path: str = INTERNAL_MANIFEST,
    ) -> None:
        self.compression = normalize_compression(compression)
        check_member_path(internal_manifest_path)
        self._level = level
        self._frame_size = frame_size
        self._internal_path = internal_manifest_path
        self._packer = compressor(self.compression, level, frame_size)
        self._at = 0  # in the body's tar stream
        self._packed = 0  # bytes of body given out
        self._rows = IndexBuilder(internal_manifest_path)
        self._open = 0
        self._sealed: list[Buffer] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def body_size(self) -> int:
        """Bytes of the (uncompressed) tar so far, without head and tail."""
        return self._at

    def add(self, path: str, data: Buffer) -> list[Buffer]:
        """One whole member; returns the next bytes of the body (buffers may be `data` itself).

        Raises:
            ConfigError: the path is unsafe, or the internal manifest's.
        """
        size = len(data)
        header = self._register(path, size, crc32c(data))
        self._at += size + padding(size)
        if self.compression is None:
            self._packed += len(header) + size + padding(size)
            return [header, data, _PADDING[padding(size)]]
        return self._count([*self._pack((header, data, _PADDING[padding(size)])), *self._packer.boundary()])

    def begin(self, path: str, size: int) -> list[Buffer]:
        """A member whose `size` bytes follow through `write`."""
        header = self._register(path, size, 0)
        self._open = size
        return self._count(self._pack((header,)))

    def write(self, chunk: Buffer) -> list[Buffer]:
        """The next bytes of the member that was begun.

        Raises:
            ConfigError: more bytes than `begin` announced.
        """
        if len(chunk) > self._open:
            raise ConfigError(
                f"member {self._rows.last_name!r} is longer than the size given for it",
                hint="give the true size of its content",
            )
        self._rows.update_crc(chunk)
        self._open -= len(chunk)
        self._at += len(chunk)
        return self._count(self._pack((chunk,)))

    def end(self) -> list[Buffer]:
        """Close the member that was begun.

        Raises:
            ConfigError: fewer bytes than `begin` announced.
        """
        if self._open:
            raise ConfigError(
                f"member {self._rows.last_name!r} is {self._open} bytes shorter than the size given for it",
                hint="give the true size of its content",
            )
        pad = padding(self._rows.last_size)
        self._at += pad
        return self._count([*self._pack((_PADDING[pad],)), *self._packer.boundary()])

    def finish(self, internal_manifest: Buffer | None) -> BuiltShard:
        """Head, tail and index; `internal_manifest` is the content of the first member, or None for no such member.

        May be called again with another internal manifest, but then nothing can be added any more.
        """
        if self._sealed is None:
            self._sealed = self._packer.finish()
        body_end = self._sealed
        head_tar, internal = self._head(internal_manifest)
        shift = len(head_tar)
        head_packer = compressor(self.compression, self._level, self._frame_size)
        head = b"".join([*head_packer.write(head_tar), *head_packer.finish()]) if head_tar else b""
        tail_tar = end_of_archive(shift + self._at)
        tail_packer = compressor(self.compression, self._level, self._frame_size)
        tail = b"".join([*body_end, *tail_packer.write(tail_tar), *tail_packer.finish()])
        table = None
        if self.compression == "zstd":
            table = FrameTable()
            for packer in (head_packer, self._packer, tail_packer):
                assert isinstance(packer, ZstdFrames)
                table.packed += packer.table.packed
                table.plain += packer.table.plain
            tail += table.seek_table()
        size = len(head) + self._packed + len(tail)
        index = self._rows.index(size, compression=self.compression, table=table, internal=internal, shift=shift)
        return BuiltShard(head, tail, index)

    def _register(self, path: str, size: int, crc: int) -> bytes:
        """Check a new member, note it, and return its headers."""
        if self._open or self._sealed is not None:
            raise ConfigError(
                f"member {self._rows.last_name!r} has not ended" if self._open else "the shard is finished",
                hint="call end() after the last write(), and finish() once",
            )
        check_member_path(path)
        if path == self._internal_path:
            raise ConfigError(
                f"member path {path!r} is the internal manifest's",
                hint="name the member otherwise, or set internal_manifest_path",
            )
        header = member_header(path, size)
        self._at += len(header)
        self._rows.add_file(path, self._at, size, crc)
        return header

    def _head(self, internal_manifest: Buffer | None) -> tuple[bytes, MemberRange | None]:
        if internal_manifest is None:
            return b"", None
        size = len(internal_manifest)
        header = member_header(self._internal_path, size)
        head = b"".join((header, internal_manifest, _PADDING[padding(size)]))
        return head, MemberRange(len(header), size, crc32c(internal_manifest))

    def _pack(self, pieces: Iterable[Buffer]) -> list[Buffer]:
        return [out for piece in pieces if len(piece) for out in self._packer.write(piece)]

    def _count(self, pieces: list[Buffer]) -> list[Buffer]:
        self._packed += sum(map(len, pieces))
        return pieces
