"""A shard as one forward-only stream of its plain tar, whose members are checked on their way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from s3loader.arguments import checked
from s3loader.checksum import crc32c, mismatch
from s3loader.errors import ShardReadError
from s3loader.shard.body import ObjectBody
from s3loader.shard.index import ShardIndex
from s3loader.shard.reader import ShardReader
from s3loader.shard.source import StreamSource, get_from_start, sniff_compression
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer

__all__ = ["TarStream", "open_tar_stream"]

_PIECE: Final = 1 << 20
"""Bytes that are given on at a time, about."""
_AT_ONCE: Final = 16 << 20
"""Bytes of the largest member that is held back until all of it is right; of larger ones, the last piece is."""
_HEAD: Final = 512


class TarStream(ObjectBody):
    """A readable, forward-only file over the bytes of a tar.

    An error stays: whoever reads on after it gets it again, not a stream that seems to end.
    """

    def __init__(self, pieces: Iterator[Buffer], *, verified: bool) -> None:
        self._error: BaseException | None = None
        self.verified = verified
        """Whether members are held against an index."""
        super().__init__(self._kept(pieces))

    def _kept(self, pieces: Iterator[Buffer]) -> Iterator[Buffer]:
        try:
            yield from pieces
        except Exception as error:
            self._error = error
            raise

    def _next(self) -> bool:
        if self._error is not None:
            raise self._error
        return super()._next()


@checked
def open_tar_stream(store: ObjectStore, key: str, *, verify: bool = True) -> TarStream:
    """The tar in `key`, decompressed on the way (gzip, bz2, xz, zstd), pinned to one version of the object.

    Where an index with checksums stands beside it, no byte of a member is given on before the member's CRC32C was right (of
    members above 16 MiB: not the last MiB); what is wrong is fetched once more. Without an index bytes are given as they come.

    Args:
        store: Where it is.
        key: Key of the archive.
        verify: False: look for no index.

    Raises:
        ObjectNotFoundError: there is no such archive.
        ObjectChangedError: it is not the one its index was made for.
        IntegrityError: when it is read: a member's CRC32C is wrong both times.
        ShardReadError: it ends before its index says it does.
    """
    reader = ShardReader(store, key)
    if not verify or not reader.has_side_car() or reader.index.crc32c is None:
        meta, head = get_from_start(store, key, 0, _HEAD)
        source = StreamSource(store, key, sniff_compression(head), etag=meta.etag or None)
        return TarStream(_pieces(source), verified=False)
    index = reader.index
    source = StreamSource(store, key, index.compression)
    reader.accept(index, source.meta.etag, source.meta.size)
    return TarStream(_checked(reader, index, source), verified=True)


def _pieces(source: StreamSource) -> Iterator[Buffer]:
    at = 0
    while len(data := source.read(at, _PIECE)):
        yield data
        at += len(data)


class _Members:
    """The members of an index by their place in the tar, each place once (links lead to places that others have)."""

    def __init__(self, index: ShardIndex) -> None:
        offsets, sizes = index.offsets.astype(np.int64), index.sizes.astype(np.int64)
        assert index.crc32c is not None
        crcs: npt.NDArray[Any] = index.crc32c.astype(np.int64)
        rows = np.arange(len(offsets))
        internal = index.internal_manifest
        if internal is not None and internal.crc32c is not None:
            offsets, sizes = np.append(offsets, internal.offset), np.append(sizes, internal.size)
            crcs, rows = np.append(crcs, internal.crc32c), np.append(rows, -1)
        rows_with_bytes = np.flatnonzero(sizes > 0)
        first = rows_with_bytes[np.unique(offsets[rows_with_bytes], return_index=True)[1]]
        self.starts = offsets[first]
        self.ends = self.starts + sizes[first]
        self.crcs: list[int] = crcs[first].tolist()
        self.rows: list[int] = rows[first].tolist()


def _checked(reader: ShardReader, index: ShardIndex, source: StreamSource) -> Iterator[Buffer]:
    members = _Members(index)
    at = done = 0
    count = len(members.rows)
    while True:
        end = at + _PIECE
        upto = int(np.searchsorted(members.ends, end, "right"))
        if upto < count and (start := int(members.starts[upto])) < end:  # this one does not end in here
            if start > at:
                end = start
            elif int(members.ends[upto]) - start <= _AT_ONCE:
                end = int(members.ends[upto])
                upto += 1
            else:
                yield from _large(reader, source, start, int(members.ends[upto]), members.crcs[upto])
                at, done = int(members.ends[upto]), upto + 1
                continue
        data = source.read(at, end - at)
        if not len(data):
            break
        for number in range(done, upto):
            low, high = int(members.starts[number]) - at, int(members.ends[number]) - at
            if crc32c(memoryview(data)[low:high]) != members.crcs[number]:
                data = _mended(reader, data, low, members.rows[number])
        yield data
        at, done = at + len(data), upto
    if done < count:
        raise ShardReadError(f"the archive ends before byte {int(members.ends[-1])} of its tar", op="read", url=reader.url)


def _mended(reader: ShardReader, data: Buffer, low: int, row: int) -> Buffer:
    """`data` with the member at `low` as it is when it is read anew, which raises if that is wrong, too."""
    again = reader.read_internal_manifest() if row < 0 else reader.read(row)
    whole = bytearray(data)
    whole[low : low + len(again)] = again
    return whole


def _large(reader: ShardReader, source: StreamSource, start: int, end: int, crc: int) -> Iterator[Buffer]:
    found, held = 0, None
    for low in range(start, end, _PIECE):
        if held is not None:
            yield held
        held = source.read(low, min(_PIECE, end - low))
        found = crc32c(held, found)
    if found != crc:
        text = f"CRC32C of bytes {start} to {end} of the tar is {found:08x}, should be {crc:08x}"
        raise mismatch(text, reader.url, start, end, archive=reader.key)
    if held is not None:
        yield held
