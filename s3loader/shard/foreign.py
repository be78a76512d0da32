"""Index files of other tools, read: DALI's `wds2idx` text and Megatron-Energon's `.tar.idx`.

`wds2idx` (NVIDIA DALI, tools/wds2idx.py), ``shard.idx`` beside ``shard.tar``: a line ``v1.2 <samples>``, then
one line per sample with four fields for each of its files: extension, offset of the content, size, name. Version
1.1 lacks the name.

Energon (megatron/energon/flavors/webdataset/itar.py), ``shard.tar.idx``: u64 little-endian offsets of the
first header of each sample, then the end of the last one.

Neither holds checksums or says which version of the archive it belongs to, so both are checked against the
archive's headers where they are used: every entry that is taken must be where the file says.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from s3loader.errors import ObjectNotFoundError, ShardReadError
from s3loader.shard.compression import infer_archive_format
from s3loader.shard.index import MemberRange, ShardIndex, index_key, sample_key
from s3loader.shard.source import RangeSource
from s3loader.shard.tar import BLOCK, walk
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ObjectMeta

__all__ = ["WdsComponent", "index_from_side_car", "parse_energon", "parse_wds2idx", "wds2idx_key"]

_CHECKED: Final = 16
"""Members of a wds2idx file whose headers are compared with the archive, spread over it."""


class WdsComponent(NamedTuple):
    """One file of one sample in a `wds2idx` index."""

    sample: int
    extension: str
    offset: int
    """First byte of the content."""
    size: int
    name: str
    """Empty in version 1.1."""


def wds2idx_key(archive_key: str) -> str:
    """Where `wds2idx` puts its file by default: ``shard.idx`` for ``shard.tar``."""
    return posixpath.splitext(archive_key)[0] + ".idx"


def parse_wds2idx(data: Buffer) -> list[WdsComponent]:
    """The components of a `wds2idx` file, in order.

    Raises:
        ShardReadError: it is none, or damaged; says the line.
    """
    try:
        lines = bytes(data).decode("utf-8").split("\n")
        version, count = lines[0].split()
        width = {"v1.1": 3, "v1.2": 4}[version]
        samples = int(count)
    except (ValueError, KeyError) as error:
        raise ShardReadError(f"not a wds2idx file: {error}") from error
    rows = [line for line in lines[1:] if line.strip()]
    if len(rows) != samples:
        raise ShardReadError(f"wds2idx file promises {samples} samples and has {len(rows)}")
    components = []
    for number, line in enumerate(rows):
        fields = line.split(" ")
        if not fields or len(fields) % width:
            raise ShardReadError(f"wds2idx line {number + 2} has {len(fields)} fields, not a multiple of {width}")
        for i in range(0, len(fields), width):
            extension, offset, size = fields[i : i + 3]
            if not (offset.isdecimal() and size.isdecimal()):
                raise ShardReadError(f"wds2idx line {number + 2}: {offset!r} and {size!r} are no offset and size")
            name = fields[i + 3] if width == 4 else ""
            components.append(WdsComponent(number, extension, int(offset), int(size), name))
    return components


def parse_energon(data: Buffer) -> npt.NDArray[np.uint64]:
    """Header offsets of the samples, then the end of the last one.

    Raises:
        ShardReadError: it is none.
    """
    if len(data) < 8 or len(data) % 8:
        raise ShardReadError(f"not an Energon tar index: {len(data)} bytes")
    offsets = np.frombuffer(data, dtype="<u8")
    if (offsets % BLOCK).any() or (offsets[1:] <= offsets[:-1]).any():
        raise ShardReadError("not an Energon tar index: offsets do not rise in blocks of 512")
    return offsets


def index_from_side_car(store: ObjectStore, key: str, meta: ObjectMeta, internal_path: str) -> ShardIndex | None:
    """An index (without checksums) from another tool's side-car, or None where there is none that fits the archive."""
    try:
        compressed = infer_archive_format(key)[1] is not None
    except ValueError:
        compressed = False
    if compressed:
        return None
    for side_car, read in ((wds2idx_key(key), _from_wds2idx), (index_key(key), _from_energon)):
        try:
            data = store.get(side_car)
        except ObjectNotFoundError:
            continue
        try:
            rows = list(read(store, key, meta, data))
        except ShardReadError:
            continue  # another file of that name, or of another version of the archive: the archive itself decides
        return _index(rows, meta, internal_path)
    return None


class _Row(NamedTuple):
    name: str
    offset: int
    size: int


def _from_wds2idx(store: ObjectStore, key: str, meta: ObjectMeta, data: bytes) -> Iterator[_Row]:
    components = parse_wds2idx(data)
    if not components or not all(c.name for c in components):
        raise ShardReadError("wds2idx file without names")
    rows = [_Row(c.name, c.offset, c.size) for c in components]
    if min(row.offset for row in rows) < BLOCK:
        raise ShardReadError("wds2idx file with content where the first header must be")
    last = max(rows, key=lambda row: row.offset)
    if last.offset + last.size > meta.size:
        raise ShardReadError("wds2idx file goes beyond the archive")
    step = max(1, len(rows) // _CHECKED)
    for row in [*rows[::step], last]:
        _, header = store.backend.get(key, row.offset - BLOCK, row.offset, if_match=meta.etag or None)
        if _header_size(bytes(header)) != row.size:
            raise ShardReadError("wds2idx file does not fit the archive")
    return iter(rows)


def _header_size(block: bytes) -> int | None:
    member = next(walk(lambda offset, size: block[offset : offset + size], allow_missing_end=True), None)
    return None if member is None else member.size


def _from_energon(store: ObjectStore, key: str, meta: ObjectMeta, data: bytes) -> Iterator[_Row]:
    offsets = parse_energon(data)
    if int(offsets[0]) != 0 or int(offsets[-1]) > meta.size:
        raise ShardReadError("Energon index does not fit the archive")
    source = RangeSource(store, key, etag=meta.etag or None)
    starts = set(offsets[:-1].tolist())
    seen = 0
    for member in walk(source.read, end=int(offsets[-1])):
        seen += member.header_offset in starts
        if member.kind == "file":
            yield _Row(member.name, member.offset, member.size)
    if seen != len(starts):
        raise ShardReadError("Energon index does not fit the archive")


def _index(rows: list[_Row], meta: ObjectMeta, internal_path: str) -> ShardIndex:
    internal = next((MemberRange(row.offset, row.size, None) for row in rows if row.name == internal_path), None)
    rows = [row for row in rows if row.name != internal_path]
    names = [row.name.encode("utf-8", "surrogateescape") for row in rows]
    keys = [sample_key(row.name) for row in rows]
    steps = [i > 0 and keys[i] != keys[i - 1] for i in range(len(keys))]
    return ShardIndex(
        offsets=np.array([row.offset for row in rows], dtype=np.uint64),
        sizes=np.array([row.size for row in rows], dtype=np.uint64),
        crc32c=None,
        groups=np.cumsum(np.array(steps, dtype=np.uint32)).astype(np.uint32),
        names_blob=b"".join(names),
        name_ends=np.cumsum(np.array([len(name) for name in names], dtype=np.uint64)).astype(np.uint64),
        archive_size=meta.size,
        etag=meta.etag,
        internal_manifest=internal,
    )
