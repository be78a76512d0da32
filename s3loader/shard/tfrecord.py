"""TFRecord files as archives: each record is a member whose name is its number, found and checked by the file's own checksums.

A record is its length (u64, little-endian), the masked CRC-32C of these 8 bytes, the data, and the masked CRC-32C of the data
(``tensorflow/core/lib/io/record_writer.h``). So an index needs no byte of the data: checksums stand behind them.

DALI's index of such a file (``tfrecord2idx``, NVIDIA DALI, tools/tfrecord2idx) is text: a line ``offset size`` for each record,
where it begins and how many bytes it has, with its length and checksums.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator
from typing import Final

import numpy as np

from s3loader.checksum import crc32c
from s3loader.errors import IntegrityError, ShardReadError
from s3loader.shard.compression import decompressor
from s3loader.shard.index import ShardIndex
from s3loader.shard.samples import Grouping
from s3loader.shard.source import RangeSource
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer

__all__ = [
    "RECORD_OVERHEAD",
    "compressed_records",
    "dali_index",
    "index_tfrecord",
    "is_tfrecord",
    "masked_crc",
    "no_random_records",
    "parse_dali_index",
    "read_records",
]

_HEAD: Final = struct.Struct("<QI")
_FOOT: Final = struct.Struct("<I")
_MASK: Final = 0xA282EAD8
RECORD_OVERHEAD: Final = _HEAD.size + _FOOT.size
"""Bytes of a record beside its data: length and checksums."""
_KEPT: Final = 1 << 20
"""Bytes that were taken and are let go together."""


def masked_crc(crc: int) -> int:
    """A CRC-32C as TFRecord files hold it."""
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def _unmasked(value: int) -> int:
    rotated = (value - _MASK) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


def is_tfrecord(head: Buffer) -> bool:
    """Whether a file that begins so (12 bytes) holds records: the length of the first has the checksum that is behind it."""
    if len(head) < _HEAD.size:
        return False
    return bool(_HEAD.unpack_from(head)[1] == masked_crc(crc32c(memoryview(head)[:8])))


def compressed_records(head: Buffer) -> str | None:
    """``"gzip"`` or ``"zlib"`` where a file that begins so (some hundred bytes) is a TFRecord file that was compressed."""
    for name, window in (("gzip", 31), ("zlib", 15)):
        try:
            plain = zlib.decompressobj(window).decompress(head, _HEAD.size)
        except zlib.error:
            continue
        if is_tfrecord(plain):
            return name
    return None


def no_random_records(compression: str, url: str) -> ShardReadError:
    """What to raise where records are wanted of a file that can only be read from its beginning."""
    return ShardReadError(
        f"the TFRecord file is compressed with {compression}: it cannot be read at random, only from its beginning",
        op="index",
        url=url,
        hint="s3loader pack FILES URL reads such files in order and writes shards of their records;"
        " or write them without compression",
    )


def read_records(chunks: Iterator[Buffer], url: str) -> Iterator[bytes]:
    """The records of a TFRecord file from its beginning to its end, plain or compressed, each held against its checksums.

    Args:
        chunks: The file.
        url: Of the file, for errors.

    Raises:
        ShardReadError: it is damaged, cut off, or no TFRecord file.
        IntegrityError: a record's checksum does not fit.
    """
    stream = _Stream(chunks)
    head = stream.peek(512)
    compression = compressed_records(head) if not is_tfrecord(head) else None
    if compression is not None:
        stream = _Stream(decompressor(compression, stream.rest()))
    number = 0
    try:
        while start := stream.take(_HEAD.size):
            if not is_tfrecord(start):
                raise ShardReadError(f"the length of record {number} is damaged, or the file is no TFRecord file")
            length = int(_HEAD.unpack(start)[0])
            data, foot = stream.take(length), stream.take(_FOOT.size)
            if len(data) < length or len(foot) < _FOOT.size:
                raise ShardReadError(f"record {number} of {length} bytes is cut off")
            if masked_crc(crc32c(data)) != _FOOT.unpack(foot)[0]:
                raise IntegrityError(
                    f"record {number} does not match its CRC-32C", op="read", url=url, hint="copy the file again"
                )
            yield data
            number += 1
    except ShardReadError as error:
        raise ShardReadError(error.message, op="read", url=url, hint="copy the file again, or write it again") from error


class _Stream:
    """Bytes that come in chunks, taken as many at a time as are wanted."""

    def __init__(self, chunks: Iterator[Buffer]) -> None:
        self._chunks = chunks
        self._here = bytearray()
        self._at = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, which stay; fewer where it ends."""
        while len(self._here) - self._at < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            if self._at > _KEPT:
                del self._here[: self._at]
                self._at = 0
            self._here += chunk
        return bytes(memoryview(self._here)[self._at : self._at + size])

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer where it ends."""
        found = self.peek(size)
        self._at += len(found)
        return found

    def rest(self) -> Iterator[Buffer]:
        """What follows, in chunks."""
        yield self.peek(len(self._here) - self._at)
        yield from self._chunks


def index_tfrecord(store: ObjectStore, key: str, *, etag: str | None = None) -> ShardIndex:
    """The index of a TFRecord file, of its lengths and checksums; of large records the data is not fetched.

    Raises:
        ObjectNotFoundError: there is no such file.
        ShardReadError: it is damaged, cut off, or compressed.
        ObjectChangedError: it was replaced while it was read.
    """
    source = RangeSource(store, key, etag=etag)
    size = source.meta.size
    offsets, sizes, crcs = array("Q"), array("Q"), array("I")
    for offset, length, crc in _records(source, size, f"{store.url}/{key}"):
        offsets.append(offset)
        sizes.append(length)
        crcs.append(crc)
    count = len(offsets)
    names = [b"%d" % number for number in range(count)]
    return ShardIndex(
        offsets=np.array(offsets, np.uint64),
        sizes=np.array(sizes, np.uint64),
        crc32c=np.array(crcs, np.uint32),
        names_blob=b"".join(names),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.uint64),
        archive_size=size,
        etag=source.meta.etag,
        known_grouping=Grouping.each(count),
    )


def _records(source: RangeSource, size: int, url: str) -> Iterator[tuple[int, int, int]]:
    """(offset of the data, bytes of it, its CRC32C) of each record."""
    at = number = 0
    head = source.read(0, _HEAD.size)
    while at < size:
        if len(head) < _HEAD.size or not is_tfrecord(head):
            what = "is cut off" if len(head) < _HEAD.size else "is damaged, or the file is no TFRecord file"
            if not number and (compression := compressed_records(source.read(0, min(size, 512)))) is not None:
                raise no_random_records(compression, url)
            raise ShardReadError(
                f"the length of record {number} (byte {at}) {what}", op="index", url=url, hint="write the file again"
            )
        length = int(_HEAD.unpack_from(head)[0])
        end = at + _HEAD.size + length
        if end + _FOOT.size > size:
            text = f"record {number} (byte {at}) of {length} bytes is cut off: the file has {size}"
            raise ShardReadError(text, op="index", url=url, hint="copy the file again, or write it again")
        behind = source.read(end, _FOOT.size + _HEAD.size)  # its checksum, and the next record's head
        yield at + _HEAD.size, length, _unmasked(_FOOT.unpack_from(behind)[0])
        at, number, head = end + _FOOT.size, number + 1, behind[_FOOT.size :]


def dali_index(index: ShardIndex) -> str:
    """The index as ``tfrecord2idx`` writes it: a line ``offset size`` for each record, checksums included."""
    rows = zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)
    return "".join(f"{offset - _HEAD.size} {size + RECORD_OVERHEAD}\n" for offset, size in rows)


def parse_dali_index(text: str) -> list[tuple[int, int]]:
    """(offset, bytes) of each record, with its length and checksums, from what ``tfrecord2idx`` wrote.

    Raises:
        ShardReadError: it is no such index; says the line.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts) or int(parts[1]) < RECORD_OVERHEAD:
            raise ShardReadError(
                f"line {number} is no 'offset size' of a record: {line!r:.80}", hint="s3loader index FILE makes one"
            )
        found.append((int(parts[0]), int(parts[1])))
    return found
