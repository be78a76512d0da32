"""Reading members of an archive: one ranged GET each or for several neighbours, verified; or all of them in a stream,
also into a local folder (`extract`)."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from s3loader.arguments import checked
from s3loader.checksum import crc32c, mismatch, once_more
from s3loader.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    ObjectChangedError,
    ObjectNotFoundError,
    RangeError,
    ShardReadError,
    TruncatedError,
)
from s3loader.ranges import neighbours
from s3loader.shard.body import ArchiveMemberBody
from s3loader.shard.build import index_archive
from s3loader.shard.compression import unpack
from s3loader.shard.index import INTERNAL_MANIFEST, MemberRange, ShardIndex, is_internal, load_index
from s3loader.shard.source import CHUNK, StreamSource, TarSource, get_from_start, read_chunks, sniff_compression
from s3loader.shard.tar import TarMember, unsafe_reason, walk
from s3loader.store.backend import ReadResult
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ReadRequest

__all__ = [
    "AT_ONCE",
    "SPAN",
    "Member",
    "Run",
    "ShardReader",
    "extract",
    "inflate",
    "list_archive",
    "plan_runs",
    "unpack_frames",
]

# -- which members share a request, and how they are cut out of what came --------------------------

AT_ONCE: Final = 16 << 20
"""Members up to this size are fetched whole and verified before use; larger ones are streamed."""
SPAN: Final = 8 << 20
"""Bytes of one request when neighbouring members are read one after another."""
GAP: Final = 64 << 10
"""Bytes fetched in vain to save a request."""


class Run(NamedTuple):
    """Members that come with one request."""

    positions: list[int]
    low: int
    """First byte in the tar stream."""
    high: int
    """End; ``low == high``: nothing to fetch together, the members (large or empty) are opened one by one."""


def plan_runs(index: ShardIndex, wanted: Sequence[int]) -> Iterator[Run]:
    """Cut `wanted` into runs, in order; neighbours in the archive that follow each other in `wanted` share one."""
    positions = np.asarray(wanted, dtype=np.int64)
    sizes = index.sizes[positions]
    starts = index.offsets[positions]
    alone = ((sizes == 0) | (sizes > AT_ONCE)).tolist()
    low, high = starts.tolist(), (starts + sizes).tolist()
    places = positions.tolist()
    for first, end in neighbours(low, high, max_gap=GAP, max_size=SPAN, alone=alone):
        if alone[first]:
            yield Run([places[first]], 0, 0)
        else:
            yield Run(places[first:end], low[first], high[end - 1])


def unpack_frames(index: ShardIndex, data: Buffer, low: int, start: int, end: int, url: str) -> Buffer:
    """Bytes ``[start, end)`` of the tar stream out of whole zstd frames that begin at archive byte `low`.

    Raises:
        ShardReadError: a frame is damaged or holds another number of bytes than the index says.
    """
    base, plain = inflate(index, data, low, end, url)
    return memoryview(plain)[start - base : end - base]


def inflate(index: ShardIndex, data: Buffer, low: int, end: int, url: str) -> tuple[int, Buffer]:
    """(tar offset, plain bytes) of whole zstd frames that begin at archive byte `low`, up to the frame that holds `end`.

    Raises:
        ShardReadError: a frame is damaged, cut off, or holds another number of bytes than the index says.
    """
    assert index.frames is not None
    assert index.frames_tar is not None
    first = int(np.searchsorted(index.frames, low, side="right")) - 1
    last = max(first + 1, int(np.searchsorted(index.frames_tar, end, side="left")))
    packed, inside = index.frames[first : last + 1].tolist(), index.frames_tar[first : last + 1].tolist()
    view = memoryview(data)
    if len(view) < packed[-1] - low:
        raise ShardReadError(f"{packed[-1] - low} bytes were expected at {low}, {len(view)} came", op="read", url=url)
    plain = []
    for number, (lo, hi) in enumerate(itertools.pairwise(packed)):
        try:
            plain.append(unpack(view[lo - low : hi - low], inside[number + 1] - inside[number]))
        except FormatError as error:
            raise ShardReadError(f"zstd frame {first + number}: {error.message}", op="read", url=url) from error
    return inside[0], plain[0] if len(plain) == 1 else b"".join(plain)


# -- the reader ------------------------------------------------------------------------------------

WINDOW: Final = 64 << 20
"""Bytes fetched ahead of the reader."""


class Member(NamedTuple):
    """A member and its content."""

    name: str
    size: int
    body: ArchiveMemberBody


@checked
class ShardReader:
    """The members of one archive; keep it to keep the index. Safe for several threads.

    The index is read on first use from its side-car. Where there is none, or it is stale, it is made by
    walking the archive's headers (plain tar) or reading it once (compressed), and kept in memory.

    What is read first pins the version that is read from then on. An index with checksums that was made under
    another ETag is one of a copy where the sizes are equal: every member is verified.

    Args:
        store: Where the archive is.
        key: Key of the archive.
        index: An index already at hand.
        etag: Read this version only: any other is an `ObjectChangedError`.
        size: Bytes the archive must have, where that is known.
        internal_manifest_path: The member that is not a sample.
        verify: Check every member's CRC32C where the index knows it.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        index: ShardIndex | None = None,
        etag: str | None = None,
        size: int | None = None,
        internal_manifest_path: str = INTERNAL_MANIFEST,
        verify: bool = True,
    ) -> None:
        self.store = store
        self.key = key
        self.internal_manifest_path = internal_manifest_path
        self._verify = verify
        self._index = index
        self._etag = etag or None
        self._pin = self._etag
        self._size = size
        self._has_none = False
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        """Where the archive is."""
        return f"{self.store.url}/{self.key}"

    @property
    def index(self) -> ShardIndex:
        """The index, loaded or made on first use.

        Raises:
            ObjectNotFoundError: there is no such archive.
            ShardReadError: the archive is damaged.
            IntegrityError: it has not the size it should have.
        """
        with self._lock:
            if self._index is None:
                self._index = self._side_car() or self._made()
            return self._index

    def accept(self, index: ShardIndex, etag: str, size: int) -> None:
        """Pin the version that an answer came from, if that can be one that `index` is of.

        Raises:
            ObjectChangedError: it cannot, or another one is pinned.
            IntegrityError: the archive has not the size it should have.
        """
        self._check_size(size)
        with self._lock:
            if size != index.archive_size or (etag != index.etag and index.crc32c is None):
                raise self._changed(f"it has {size} bytes, its index is of an archive of {index.archive_size}")
            if self._pin is None:
                self._pin = etag or None
            elif etag != self._pin:
                raise self._changed("it was replaced while it was read")

    def _changed(self, text: str) -> ObjectChangedError:
        return ObjectChangedError(text, op="read", url=self.url)

    def _side_car(self) -> ShardIndex | None:
        if not self._has_none:
            try:
                index = load_index(self.store, self.key, etag=self._etag)
                if self._size in (None, index.archive_size):
                    return index
            except (ObjectNotFoundError, ShardReadError):
                pass
            self._has_none = True  # none, another tool's, corrupt, of another archive: the archive itself is the truth
        return None

    def _made(self) -> ShardIndex:
        internal = self.internal_manifest_path
        index = index_archive(self.store, self.key, etag=self._etag, internal_manifest_path=internal, checksums=False)
        self._check_size(index.archive_size)
        return index

    def _check_size(self, size: int) -> None:
        if self._size not in (None, size):
            kind = TruncatedError if size < (self._size or 0) else IntegrityError
            text = f"the archive has {size} bytes, the manifest says {self._size}"
            raise kind(text, op="read", url=self.url, hint="it was replaced, or its copy is not complete")

    @property
    def is_loaded(self) -> bool:
        """Whether the index is in memory."""
        return self._index is not None

    def has_side_car(self) -> bool:
        """Whether an index is at hand without reading the archive."""
        with self._lock:
            self._index = self._index or self._side_car()
            return self._index is not None

    # one member

    def find(self, name: str) -> int:
        """Position of the member `name`; of the last of that name.

        Raises:
            KeyError: there is none.
        """
        return self.index.find(name)

    def read(self, i: int) -> Buffer:
        """Content of member `i`, verified.

        Raises:
            IntegrityError: its CRC32C is wrong, also when fetched again; says archive, member and range.
            ObjectChangedError: the archive is not the one the index was made for.
        """
        index = self.index
        return self._fetch(index, index.name(i), index.member(i))

    def open(self, name: str) -> ArchiveMemberBody:
        """A stream over the member `name`, or over the internal manifest.

        An archive that was replaced since its index was read is looked up anew.

        Raises:
            KeyError: there is no such member.
        """
        try:
            return self._open(name)
        except (IntegrityError, ObjectChangedError) as error:
            if self._etag is not None or (isinstance(error, IntegrityError) and not self._may_be_stale()):
                raise
            self._refresh()
            return self._open(name)

    def _may_be_stale(self) -> bool:
        """Whether the index is of another version of the archive, and nobody vouches for the archive either."""
        return self._size is None and self._index is not None and self._index.etag != (self._pin or "")

    def _open(self, name: str) -> ArchiveMemberBody:
        index = self.index
        if name == self.internal_manifest_path and index.internal_manifest is not None:
            return _body(self._fetch(index, name, index.internal_manifest))
        return self._open_at(index, index.find(name))

    def open_at(self, i: int) -> ArchiveMemberBody:
        """A stream over member `i`."""
        return self._open_at(self.index, i)

    def _open_at(self, index: ShardIndex, i: int) -> ArchiveMemberBody:
        member = index.member(i)
        if member.size > AT_ONCE:
            return self._stream(index, index.name(i), member)
        return _body(self._fetch(index, index.name(i), member))

    def read_internal_manifest(self) -> Buffer:
        """Content of the internal manifest; empty where the archive has none."""
        index = self.index
        if index.internal_manifest is None:
            return b""
        return self._fetch(index, self.internal_manifest_path, index.internal_manifest)

    def _fetch(self, index: ShardIndex, name: str, member: MemberRange) -> Buffer:
        data = self._tar_range(index, member.offset, member.offset + member.size)
        return self._proven(index, name, member, data)

    def _proven(self, index: ShardIndex, name: str, member: MemberRange, data: Buffer) -> Buffer:
        """`data` of a member, or what comes the second time; raises if that is wrong, too."""
        if not self._verify or member.crc32c is None or crc32c(data) == member.crc32c:
            return data
        end = member.offset + member.size
        return once_more(
            member.crc32c,
            lambda: self._tar_range(index, member.offset, end),
            lambda found: self._mismatch(name, member, found),
        )

    def _mismatch(self, name: str, member: MemberRange, found: int) -> IntegrityError:
        start, end = member.offset, member.offset + member.size
        what = f"CRC32C of member {name!r} (bytes {start} to {end} of the tar) is {found:08x}, should be {member.crc32c:08x}"
        return mismatch(what, self.url, start, end, archive=self.key, member=name)

    def _refresh(self) -> None:
        """The archive is not the one the index was made for: take the newer side-car, or make an index."""
        with self._lock:
            old, self._has_none, self._pin = self._index, False, None
            fresh = self._side_car()
            self._index = fresh if fresh is not None and old is not None and fresh.etag != old.etag else self._made()

    def _tar_range(self, index: ShardIndex, start: int, end: int) -> Buffer:
        if start == end:
            return b""
        if index.random_access:
            low, high = index.fetch_range(start, end)
            try:
                meta, data = self.store.backend.get(self.key, low, high, if_match=self._pin)
            except RangeError as error:
                raise self._changed("it ends before its index does") from error
            self.accept(index, meta.etag, meta.size)
            return self._decode(index, data, low, start, end)
        source = self._from_the_beginning(index)
        data = source.read(start, end - start)
        if len(data) < end - start:
            raise ShardReadError(f"{index.compression} stream ends before byte {end}", op="read", url=self.url)
        return data

    def _from_the_beginning(self, index: ShardIndex) -> StreamSource:
        source = StreamSource(self.store, self.key, index.compression, etag=self._pin)
        self.accept(index, source.meta.etag, source.meta.size)
        return source

    def _decode(self, index: ShardIndex, data: Buffer, low: int, start: int, end: int) -> Buffer:
        """Bytes ``[start, end)`` of the tar stream out of archive bytes that begin at `low`."""
        if index.frames is None or index.frames_tar is None:
            if len(data) < end - low:
                raise ShardReadError(f"the archive ends before byte {end}", op="read", url=self.url)
            return memoryview(data)[start - low : end - low]
        return unpack_frames(index, data, low, start, end, self.url)

    def _stream(self, index: ShardIndex, name: str, member: MemberRange) -> ArchiveMemberBody:
        """A large member, piece by piece; the first one is fetched now."""
        pieces = self._pieces(index, member)
        first = next(pieces)
        return ArchiveMemberBody(self._checked(name, member, chain([first], pieces)), size=member.size)

    def _pieces(self, index: ShardIndex, member: MemberRange) -> Iterator[Buffer]:
        end = member.offset + member.size
        if index.compression is None:
            meta, chunks = read_chunks(self.store, self.key, start=member.offset, end=end, etag=self._pin)
            self.accept(index, meta.etag, meta.size)
            yield from chunks
            return
        if index.random_access:
            for low in range(member.offset, end, SPAN):
                yield self._tar_range(index, low, min(low + SPAN, end))
            return
        source = self._from_the_beginning(index)
        yield from _source_pieces(source, member.offset, member.size)

    def _checked(self, name: str, member: MemberRange, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        """Hand `pieces` on one late, so that the last is given only if the whole is right."""
        crc = size = 0
        held: Buffer | None = None
        for piece in pieces:
            if held is not None:
                yield held
            held = piece
            crc = crc32c(piece, crc)
            size += len(piece)
        if size != member.size:
            raise ShardReadError(f"member {name!r} ends after {size} of {member.size} bytes", op="read", url=self.url)
        if self._verify and member.crc32c is not None and crc != member.crc32c:
            raise self._mismatch(name, member, crc)
        if held is not None:
            yield held

    def _is_internal(self, name: str, first: bool) -> bool:
        return is_internal(name, first, self.internal_manifest_path)

    def peek_internal_manifest(self) -> Buffer:
        """The internal manifest without making an index: only the first member is looked at."""
        if self.has_side_car():
            return self.read_internal_manifest()
        source = self._stream_source(self._pin, chunk=256 << 10)
        first = next(walk(source.read), None)
        if first is None or first.kind != "file" or not self._is_internal(first.name, True):
            return b""
        return b"".join(_source_pieces(source, first.offset, first.size))

    def _stream_source(self, etag: str | None, *, chunk: int = CHUNK) -> StreamSource:
        meta, head = get_from_start(self.store, self.key, 0, 512, etag=etag)
        return StreamSource(self.store, self.key, sniff_compression(head), etag=meta.etag or None, chunk=chunk)

    # many members

    def iter_members(self, positions: Sequence[int] | None = None, *, index: ShardIndex | None = None) -> Iterator[Member]:
        """Members with their content, in the order of `positions` (default: all, in archive order).

        Args:
            positions: Positions in `index`.
            index: The index the positions were found in; default: the present one.

        Neighbours come in one request, the next requests are under way meanwhile, memory is bounded. A
        large member's body must be read before the next member is asked for where the archive has no
        side-car or no random access.

        Raises:
            IntegrityError, ShardReadError, ObjectChangedError: at the member concerned.
        """
        if positions is None and (not self.has_side_car() or not self.index.random_access):
            yield from self._iter_stream()
            return
        index = index or self.index
        wanted = range(len(index)) if positions is None else positions
        if not index.random_access:
            for i in wanted:
                yield Member(index.name(i), index.member(i).size, self._open_at(index, i))
            return
        yield from self._iter_spans(index, wanted)

    def _iter_spans(self, index: ShardIndex, wanted: Sequence[int]) -> Iterator[Member]:
        runs = list(plan_runs(index, wanted))
        answers = self.store.read_many((self.request(index, run) for run in runs if run.low < run.high), max_bytes=WINDOW)
        for run in runs:
            yield from self.cut(index, run, next(answers) if run.low < run.high else None)

    def request(self, index: ShardIndex, run: Run) -> ReadRequest:
        """What to fetch for a run of members."""
        return ReadRequest(self.key, *index.fetch_range(run.low, run.high), if_match=self._pin)

    def cut(self, index: ShardIndex, run: Run, answer: ReadResult | None) -> Iterator[Member]:
        """The members of a run out of the answer to its `request`, verified; None where there was nothing to fetch."""
        if answer is None:
            for i in run.positions:
                yield Member(index.name(i), index.member(i).size, self._open_at(index, i))
            return
        self.accept(index, answer.etag, answer.size)
        plain = memoryview(self._decode(index, answer.data, answer.request.start, run.low, run.high))
        for i in run.positions:
            member = index.member(i)
            data: Buffer = plain[member.offset - run.low : member.offset - run.low + member.size]
            name = index.name(i)
            yield Member(name, member.size, _body(self._proven(index, name, member, data)))

    def _iter_stream(self) -> Iterator[Member]:
        """All members of an archive without random access, in one pass."""
        index = self._index
        source = self._stream_source(self._pin)
        if index is not None:
            self.accept(index, source.meta.etag, source.meta.size)
        position = 0
        for number, member in enumerate(walk(source.read)):
            if member.kind in ("hardlink", "symlink"):
                index = index or self._made()  # it knows whether the link leads to a file, and where that is
                if position < len(index) and index.name(position) == member.name:
                    yield Member(member.name, index.member(position).size, self._open_at(index, position))
                    position += 1
                continue
            if member.kind != "file" or self._is_internal(member.name, number == 0):
                continue
            known = index.crc32c if index is not None else None
            extent = MemberRange(member.offset, member.size, None if known is None else int(known[position]))
            position += 1
            pieces = self._checked(member.name, extent, _source_pieces(source, member.offset, member.size))
            if member.size <= AT_ONCE:
                yield Member(member.name, member.size, _body(b"".join(pieces)))
            else:
                yield Member(member.name, member.size, ArchiveMemberBody(pieces, size=member.size))


def _body(data: Buffer) -> ArchiveMemberBody:
    return ArchiveMemberBody(iter([data] if len(data) else []), size=len(data))


def _source_pieces(source: TarSource, offset: int, size: int) -> Iterator[Buffer]:
    for low in range(offset, offset + size, 1 << 20):
        yield source.read(low, min(1 << 20, offset + size - low))


# -- a whole archive -------------------------------------------------------------------------------


def list_archive(
    store: ObjectStore, key: str, *, allow_missing_end: bool = False, allow_trailing: bool = False
) -> list[TarMember]:
    """All members of an archive, links and folders too, as they are named; nothing is written anywhere.

    Args:
        store: Where the archive is.
        key: Its key.
        allow_missing_end: Accept an archive without the zero blocks that end one (it may be truncated).
        allow_trailing: Leave out what follows the end of the archive.

    Raises:
        ShardReadError: it is damaged, or no tar.
    """
    _, head = get_from_start(store, key, 0, 512)
    source = StreamSource(store, key, sniff_compression(head))
    return list(walk(source.read, allow_missing_end=allow_missing_end, allow_trailing=allow_trailing))


@checked
def extract(store: ObjectStore, key: str, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the files of an archive below `folder`, contents verified where the index knows their CRC32C.

    Args:
        store: Where the archive is.
        key: Its key.
        folder: Made if it does not exist.

    Returns:
        The files written, in archive order.

    Raises:
        ShardReadError: the archive holds a link, a device, or a path that leaves `folder`; nothing was written.
        FileExistsError: a path needs a folder where there is a file.
    """
    for entry in list_archive(store, key):
        reason = unsafe_reason(entry.name)
        if entry.kind not in ("file", "dir", "volume label"):
            reason = f"is a {entry.kind}"
        if reason is not None:
            raise ShardReadError(
                f"refusing to extract: member {entry.name!r} {reason}", url=f"{store.url}/{key}", member=entry.name
            )
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    real_root = root.resolve()
    written = []
    for member in ShardReader(store, key).iter_members():
        target = root / member.name
        parent = target.parent.resolve()
        if parent != real_root and real_root not in parent.parents:  # a link that was in `folder` before
            raise ConfigError(f"{target} would be written outside {root}", hint="extract into an empty folder")
        parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            target.unlink()
        with open(target, "wb") as file:
            while chunk := member.body.read(1 << 20):
                file.write(chunk)
        written.append(target)
    return written
