"""Reading one object piece by piece, pinned to the version it had at the first piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from s3loader.errors import RangeError, ShardReadError
from s3loader.shard.compression import decompressor
from s3loader.shard.tar import BLOCK, is_header
from s3loader.store.backend import ReadResult
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ObjectMeta, ReadRequest

__all__ = ["RangeSource", "StreamSource", "TarSource", "get_from_start", "read_chunks", "rest_of", "sniff_compression"]

CHUNK: Final = 4 << 20
AHEAD: Final = 4
"""Chunks fetched before they are asked for."""


def read_chunks(
    store: ObjectStore,
    key: str,
    *,
    start: int = 0,
    end: int | None = None,
    etag: str | None = None,
    version_id: str | None = None,
    chunk: int = CHUNK,
    ahead: int = AHEAD,
) -> tuple[ObjectMeta, Iterator[Buffer]]:
    """Bytes ``[start, end)`` of an object as a stream of chunks, the next ones already under way.

    The first chunk is fetched at the call (so a missing object is said at once), the others with
    If-Match: the bytes are one version's, or `ObjectChangedError`.

    Returns:
        The object's metadata (size, ETag) and the chunks; none for an empty range.

    Raises:
        ObjectNotFoundError: there is no such object.
        ObjectChangedError: its ETag is not `etag`, or it was replaced on the way.
    """
    stop = start + chunk if end is None else min(end, start + chunk)
    meta, first = get_from_start(store, key, start, stop, etag=etag, version_id=version_id)
    last = meta.size if end is None else min(end, meta.size)
    return meta, _rest(store, key, meta, first, start, last, version_id, chunk, ahead)


def get_from_start(
    store: ObjectStore, key: str, start: int, stop: int, *, etag: str | None = None, version_id: str | None = None
) -> tuple[ObjectMeta, Buffer]:
    """`Backend.get`, but an empty object read from its beginning is empty and no `RangeError`."""
    try:
        return store.backend.get(key, start, stop, if_match=etag, version_id=version_id)
    except RangeError:
        meta = store.head(key, version_id=version_id)
        if start or meta.size or (etag is not None and meta.etag != etag):
            raise
        return meta, b""


def _rest(
    store: ObjectStore,
    key: str,
    meta: ObjectMeta,
    first: Buffer,
    start: int,
    end: int,
    version_id: str | None,
    chunk: int,
    ahead: int,
) -> Iterator[Buffer]:
    if len(first):
        yield first
    at = start + len(first)
    del first
    cuts = [(low, min(low + chunk, end)) for low in range(at, end, chunk)]
    pin = meta.etag or None
    if version_id is not None or len(cuts) < 2 or ahead < 2:
        for low, high in cuts:
            yield store.backend.get(key, low, high, if_match=pin, version_id=version_id)[1]
        return
    requests = (ReadRequest(key, low, high, if_match=pin) for low, high in cuts)
    for result in store.read_many(requests, max_bytes=ahead * chunk, concurrency=ahead):
        yield result.data


def rest_of(store: ObjectStore, answer: ReadResult) -> Iterator[Buffer]:
    """All of an object of which the first bytes came in a bulk read."""
    if len(answer.data):
        yield answer.data
    if len(answer.data) < answer.size:
        yield from read_chunks(store, answer.request.key, start=len(answer.data), etag=answer.etag or None)[1]


class TarSource:
    """Forward access to a tar stream for `tar.walk`: `read` at rising offsets."""

    meta: ObjectMeta

    def read(self, offset: int, size: int) -> Buffer:
        """The bytes there, fewer only at the end of the stream."""
        raise NotImplementedError


class RangeSource(TarSource):
    """A plain tar in a store, by ranged GETs.

    While headers lie close together the windows grow and everything is read in large pieces; where
    large members lie between them only the headers' surroundings are fetched.
    """

    SMALL: Final = 64 << 10
    LARGE: Final = 8 << 20

    def __init__(self, store: ObjectStore, key: str, *, etag: str | None = None) -> None:
        self._store = store
        self._key = key
        self._window_size = self.SMALL
        self._start = 0
        self.meta, self._window = get_from_start(store, key, 0, self.SMALL, etag=etag)

    def read(self, offset: int, size: int) -> Buffer:
        """The bytes there, fewer only at the end of the stream."""
        end = min(offset + size, self.meta.size)
        if offset >= end:
            return b""
        low = offset - self._start
        high = self._start + len(self._window)
        if low < 0 or end > high:
            near = low >= 0 and offset - high <= self._window_size
            self._window_size = min(self._window_size * 2, self.LARGE) if near else self.SMALL
            stop = min(offset + max(size, self._window_size), self.meta.size)
            _, self._window = self._store.backend.get(self._key, offset, stop, if_match=self.meta.etag or None)
            self._start = offset
            low = 0
        return memoryview(self._window)[low : low + (end - offset)]


class StreamSource(TarSource):
    """A tar read from its beginning to its end in bounded memory, decompressed on the way.

    Args:
        store: Where it is.
        key: Its key.
        compression: Its compression.
        etag: Only this version.
        chunk: Bytes of the archive that are fetched at a time.
        most: Bytes that the tar is known to have; a stream that gives more is refused.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        compression: str | None,
        *,
        etag: str | None = None,
        chunk: int = CHUNK,
        most: int | None = None,
    ) -> None:
        self._most = most
        self.meta, chunks = read_chunks(store, key, etag=etag, chunk=chunk, ahead=AHEAD if chunk >= CHUNK else 1)
        self._plain = chunks if compression is None else decompressor(compression, chunks)
        self._pieces: deque[Buffer] = deque()
        self._start = 0  # of the first piece
        self._end = 0  # of the last

    def read(self, offset: int, size: int) -> Buffer:
        """The bytes there, fewer only at the end of the stream; `offset` may not lie before the last one asked for."""
        end = offset + size
        while self._pieces and self._start + len(self._pieces[0]) <= offset:
            self._start += len(self._pieces.popleft())
        while self._end < end:
            piece = next(self._plain, None)
            if piece is None:
                break
            self._end += len(piece)
            if self._most is not None and self._end > self._most:
                raise ShardReadError(f"the archive holds more than the {self._most} bytes that its seek table tells")
            if self._end > offset:
                self._pieces.append(memoryview(piece))
            else:
                self._start = self._end
        low = offset - self._start
        if self._pieces and low + size <= len(self._pieces[0]):
            return self._pieces[0][low : low + size]
        return b"".join(self._pieces)[low : low + size] if self._end > offset else b""


_DECOMPRESS: Final = "decompress it, and use the plain .tar, or compress that with zstd"
_REPACK: Final = "extract it, and pack the files into .tar shards"
_FETCH: Final = "fetch the archive again: a server answered with a page, perhaps of an error, in its place"
_OTHERS: Final = (
    (b"]\0\0", "lzma", _DECOMPRESS),
    (b"\x1f\x9d", "compress (.Z)", _DECOMPRESS),
    (b"\x04\x22\x4d\x18", "lz4", _DECOMPRESS),
    (b"\x02\x21\x4c\x18", "lz4", _DECOMPRESS),
    (b"LZIP", "lzip", _DECOMPRESS),
    (b"\x89LZO", "lzop", _DECOMPRESS),
    (b"\xff\x06\0\0sNaPpY", "snappy", _DECOMPRESS),
    (b"PK\x03\x04", "zip", _REPACK),
    (b"7z\xbc\xaf", "7-zip", _REPACK),
    (b"Rar!", "rar", _REPACK),
    (b"!<arch>", "an ar archive", _REPACK),
    (b"070701", "cpio", _REPACK),
    (b"070707", "cpio", _REPACK),
    (b"PAR1", "Parquet", "read it with a Parquet library, and pack its rows into .tar shards"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the archive itself: git lfs pull"),
    (b"<!doctype html", "an HTML page", _FETCH),
    (b"<html", "an HTML page", _FETCH),
    (b"<?xml", "an XML document", _FETCH),
)
"""First bytes, what they show, and what helps."""


def sniff_compression(head: Buffer) -> str | None:
    """Which compression the first block (512 bytes) of an archive shows; None: a plain tar (or nothing known).

    Raises:
        ShardReadError: it is something else that is known, such as lz4 or zip.
    """
    start = bytes(head[:32])
    if start[:2] == b"\x1f\x8b":
        return "gzip"
    if start[:3] == b"BZh":
        return "bz2"
    if start[:6] == b"\xfd7zXZ\0":
        return "xz"
    if start[:4] == b"\x28\xb5\x2f\xfd" or (start[1:4] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        return "zstd"
    for magic, kind, hint in _OTHERS:
        if (start.startswith(magic) or start.lower().startswith(magic)) and not is_header(bytes(head[:BLOCK])):
            raise ShardReadError(f"this is {kind}, not a tar archive that is read here", hint=hint)
    return None
