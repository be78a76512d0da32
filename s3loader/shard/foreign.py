"""Index files of other tools, read: DALI's `wds2idx` text and Megatron-Energon's `.tar.idx`.

`wds2idx` (NVIDIA DALI, tools/wds2idx.py), ``shard.idx`` beside ``shard.tar``: a line ``v1.2 <samples>``, then
one line per sample with four fields for each of its files: extension, offset of the content, size, name. Version
1.1 lacks the name.

Energon (megatron/energon/flavors/webdataset/itar.py), ``shard.tar.idx``: u64 little-endian offsets of the
first header of each sample, then the end of the last one.

Neither holds checksums or says which version of the archive it belongs to, so both are held against the archive
where they are used: the header of every entry, that nothing else stands between, and that the archive ends there.
"""

from __future__ import annotations

import posixpath
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from s3loader.errors import ObjectNotFoundError, ShardReadError
from s3loader.shard.compression import infer_archive_format
from s3loader.shard.index import index_key
from s3loader.shard.source import RangeSource
from s3loader.shard.tar import BLOCK, Reader, TarMember, padding, walk
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ObjectMeta

__all__ = ["WdsComponent", "members_from_side_car", "parse_energon", "parse_wds2idx", "wds2idx_key"]

_TOGETHER: Final = 256
"""Pieces of an archive that are held at a time."""
_MOST_HEADERS: Final = 1 << 20
"""More bytes than this between two contents are no headers."""
_NOTHING: Final = TarMember("", 0, 0, 0, "")


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
        samples = int(count) if _is_number(count) else -1
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
            if not (_is_number(offset) and _is_number(size)):
                raise ShardReadError(f"wds2idx line {number + 2}: {offset!r} and {size!r} are no offset and size")
            name = fields[i + 3] if width == 4 else ""
            components.append(WdsComponent(number, extension, int(offset), int(size), name))
    return components


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


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


def members_from_side_car(store: ObjectStore, key: str, meta: ObjectMeta) -> list[TarMember] | None:
    """The members of an archive by another tool's side-car, or None where there is none that fits the archive."""
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
            return read(store, key, meta, data)
        except ShardReadError:
            continue  # another file of that name, or of another version of the archive: the archive itself decides
    return None


def _from_wds2idx(store: ObjectStore, key: str, meta: ObjectMeta, data: bytes) -> list[TarMember]:
    """What stands between the contents is read, many pieces at a time: it must be the headers of just these members."""
    components = parse_wds2idx(data)
    if not all(c.name for c in components):
        raise ShardReadError("wds2idx file without names")
    between: list[tuple[int, int]] = []
    end = 0
    for component in components:
        if not (end + BLOCK <= component.offset <= end + _MOST_HEADERS and component.size <= meta.size - component.offset):
            raise ShardReadError(f"wds2idx file does not fit the archive at {component.name!r}")
        between.append((end, component.offset))
        end = component.offset + component.size
        end += padding(end)
    if end > meta.size or meta.size - end > _MOST_HEADERS:
        raise ShardReadError("wds2idx file does not end where the archive does")
    found: list[TarMember] = []
    pin = meta.etag or None
    for some in range(0, len(between), _TOGETHER):
        ranges = between[some : some + _TOGETHER]
        blocks = store.get_ranges(key, ranges, if_match=pin)
        for component, (low, high), block in zip(components[some:], ranges, blocks, strict=False):
            *others, last = list(walk(_reader(block, low), start=low, end=high)) or [_NOTHING]
            same = (last.name, last.offset, last.size, last.kind) == (component.name, component.offset, component.size, "file")
            if not same or any(other.kind == "file" for other in others):
                raise ShardReadError(f"wds2idx file does not fit the archive at {component.name!r}")
            found += [*others, last]
    (rest,) = store.get_ranges(key, [(end, meta.size)], if_match=pin)
    if any(member.kind == "file" for member in walk(_reader(rest, end), start=end)):
        raise ShardReadError("wds2idx file lacks members of the archive")
    return found


def _reader(block: Buffer, start: int) -> Reader:
    view = memoryview(block)
    return lambda offset, size: view[max(0, offset - start) : max(0, offset - start + size)]


def _from_energon(store: ObjectStore, key: str, meta: ObjectMeta, data: bytes) -> list[TarMember]:
    """The file says where samples begin, not where members do: all headers are walked, and compared with it."""
    offsets = parse_energon(data)
    if int(offsets[0]) != 0 or int(offsets[-1]) > meta.size:
        raise ShardReadError("Energon index does not fit the archive")
    members = list(walk(RangeSource(store, key, etag=meta.etag or None).read))
    starts = {member.header_offset for member in members}
    end = max((member.offset + member.size + padding(member.size) for member in members), default=0)
    if end != int(offsets[-1]) or not starts.issuperset(offsets[:-1].tolist()):
        raise ShardReadError("Energon index does not fit the archive")
    return members
