"""The index side-car of a shard: where each member's bytes are, and their checksum.

`<archive>.idx` is a safetensors file. Tensors (all one-dimensional, N members in archive order):

========== ==== =======================================================================
offset     u64  N: first byte of the member's content, in the (uncompressed) tar stream
size       u64  N: length of the content in bytes
crc32c     u32  N: CRC32C of the content; absent where nobody has read the contents yet
group      u32  N: number of the sample the member belongs to, from 0, never decreasing
name_end   u64  N: end of the member's name in `names`
names      u8   the names in UTF-8, one after another
frame      u64  F+1: start of each zstd frame in the archive, then the end of the last
frame_tar  u64  F+1: the same boundaries in the uncompressed tar stream
========== ==== =======================================================================

`frame` and `frame_tar` exist only for zstd shards with a seek table. The metadata holds strings: ``format``
("s3loader-shard-index"), ``version`` ("1"), ``members``, ``samples``, ``archive_size``,
``archive_etag``, ``compression`` ("", "gzip", "bz2", "xz" or "zstd") and, where the archive has an internal
manifest, ``internal_manifest``: "offset,size,crc32c" of that member.

The internal manifest (`__manifest__.jsonl`) describes the other members and is no sample, so it
is *not* among the N members; `ShardIndex.internal_manifest` says where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from s3loader.errors import FormatError, ObjectNotFoundError, ShardReadError
from s3loader.shard import tensorfile
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer

__all__ = [
    "INTERNAL_MANIFEST",
    "IndexCounts",
    "MemberRange",
    "ShardIndex",
    "claim_bytes",
    "index_key",
    "is_foreign",
    "load_index",
    "read_counts",
    "sample_key",
    "second_index_key",
]

INTERNAL_MANIFEST: Final = "__manifest__.jsonl"
FORMAT: Final = "s3loader-shard-index"
VERSION: Final = 1
_CLAIM: Final = "claim"
_SUFFIX: Final = ".idx"
_SECOND_SUFFIX: Final = ".s3loader.idx"  # where another tool's side-car already has the first name


class MemberRange(NamedTuple):
    """Where one member's content is."""

    offset: int
    """First byte in the (uncompressed) tar stream."""
    size: int
    """Bytes."""
    crc32c: int | None
    """None where the index was built without reading the contents."""


class IndexCounts(NamedTuple):
    """What the first kilobytes of an index tell."""

    members: int
    samples: int
    archive_size: int
    archive_etag: str
    compression: str | None


@dataclass(frozen=True)
class ShardIndex:
    """All members of one archive, in archive order; the internal manifest is not one of them.

    Two members may bear one name: iteration and positions give both, `find` the last one, as
    extracting the archive would leave it.
    """

    offsets: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    crc32c: npt.NDArray[np.uint32] | None
    """None: the index was built without reading the contents, nothing can be verified."""
    groups: npt.NDArray[np.uint32]
    """Sample number of each member: neighbours with the same `sample_key` share one."""
    names_blob: Buffer = field(repr=False)
    name_ends: npt.NDArray[np.uint64] = field(repr=False)
    archive_size: int
    etag: str
    """ETag of the archive the index was made for; empty where the store gives none."""
    compression: str | None = None
    """None, ``gzip``, ``bz2``, ``xz`` or ``zstd``."""
    internal_manifest: MemberRange | None = None
    frames: npt.NDArray[np.uint64] | None = None
    """zstd only: frame boundaries in the archive, F+1."""
    frames_tar: npt.NDArray[np.uint64] | None = None
    """zstd only: the same boundaries in the tar stream."""

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def samples(self) -> int:
        """How many samples (groups of members) there are."""
        return int(self.groups[-1]) + 1 if len(self.groups) else 0

    def name(self, i: int) -> str:
        """Name of member `i`; bytes that are not UTF-8 come as surrogates, as `os.fsdecode` does."""
        i = range(len(self))[i]
        start = int(self.name_ends[i - 1]) if i else 0
        return bytes(self.names_blob[start : int(self.name_ends[i])]).decode("utf-8", "surrogateescape")

    def names(self) -> list[str]:
        """All names, in archive order."""
        ends = self.name_ends.tolist()
        blob = bytes(self.names_blob)
        return [blob[low:high].decode("utf-8", "surrogateescape") for low, high in zip([0, *ends], ends, strict=False)]

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names())}

    def find(self, name: str) -> int:
        """Position of the member called `name`; of the last one where several are.

        Raises:
            KeyError: there is none.
        """
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def member(self, i: int) -> MemberRange:
        """Extent and checksum of member `i`."""
        i = range(len(self))[i]
        crc = None if self.crc32c is None else int(self.crc32c[i])
        return MemberRange(int(self.offsets[i]), int(self.sizes[i]), crc)

    @property
    def random_access(self) -> bool:
        """Whether a member can be read without what lies before it."""
        return self.compression is None or self.frames is not None

    def fetch_range(self, start: int, end: int) -> tuple[int, int]:
        """Bytes of the *archive* to fetch for bytes ``[start, end)`` of the tar stream.

        Plain tar: the same bytes. zstd: the whole frames around them.

        Raises:
            ShardReadError: gzip, bz2 and xz have no random access.
        """
        if self.compression is None or start == end:
            return start, end
        if self.frames is None or self.frames_tar is None:
            raise ShardReadError(f"{self.compression} shards can only be read from their beginning")
        first = int(np.searchsorted(self.frames_tar, start, side="right")) - 1
        last = int(np.searchsorted(self.frames_tar, end, side="left"))
        return int(self.frames[first]), int(self.frames[last])

    def to_bytes(self) -> bytes:
        """The side-car, byte for byte the same for the same index."""
        tensors: dict[str, npt.NDArray[Any]] = {"offset": self.offsets, "size": self.sizes, "name_end": self.name_ends}
        if self.crc32c is not None:
            tensors["crc32c"] = self.crc32c
        if self.frames is not None and self.frames_tar is not None:
            tensors |= {"frame": self.frames, "frame_tar": self.frames_tar}
        tensors |= {"group": self.groups, "names": np.frombuffer(self.names_blob, dtype=np.uint8)}
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "members": str(len(self)),
            "samples": str(self.samples),
            "archive_size": str(self.archive_size),
            "archive_etag": self.etag,
            "compression": self.compression or "",
        }
        if self.internal_manifest is not None:
            metadata["internal_manifest"] = ",".join("" if v is None else str(v) for v in self.internal_manifest)
        return tensorfile.encode(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: Buffer) -> ShardIndex:
        """Read a side-car; the arrays are views of `data`.

        Raises:
            ShardReadError: it is no index, of a newer version, or contradicts itself.
        """
        counts = read_counts(data)
        try:
            tensors, metadata = tensorfile.decode(data)
            internal = _internal(metadata.get("internal_manifest"))
            index = cls(
                offsets=_take(tensors, "offset", 8),
                sizes=_take(tensors, "size", 8),
                crc32c=_take(tensors, "crc32c", 4) if "crc32c" in tensors else None,
                groups=_take(tensors, "group", 4),
                names_blob=_take(tensors, "names", 1).data,
                name_ends=_take(tensors, "name_end", 8),
                archive_size=counts.archive_size,
                etag=counts.archive_etag,
                compression=counts.compression,
                internal_manifest=internal,
                frames=_take(tensors, "frame", 8) if "frame" in tensors else None,
                frames_tar=_take(tensors, "frame_tar", 8) if "frame_tar" in tensors else None,
            )
        except (FormatError, ValueError) as error:
            raise ShardReadError(f"shard index is corrupt: {error}") from error
        _check(index, counts)
        return index


def _take(tensors: dict[str, npt.NDArray[Any]], name: str, width: int) -> npt.NDArray[Any]:
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype.itemsize != width:
        raise FormatError(f"tensor {name!r} is missing or mistyped")
    return tensor


def _internal(text: str | None) -> MemberRange | None:
    if text is None:
        return None
    offset, size, crc = text.split(",")
    return MemberRange(int(offset), int(size), int(crc) if crc else None)


def _check(index: ShardIndex, counts: IndexCounts) -> None:
    """Refuse an index whose arrays would send a reader outside the archive."""
    n = len(index)
    same = all(len(a) == n for a in (index.sizes, index.groups, index.name_ends)) and (
        index.crc32c is None or len(index.crc32c) == n
    )
    if not same or counts.members != n or (n and counts.samples != index.samples):
        raise ShardReadError("shard index is corrupt: its arrays differ in length from its counts")
    if (index.frames is not None and index.compression != "zstd") or (index.frames_tar is None) != (index.frames is None):
        raise ShardReadError("shard index is corrupt: zstd frames out of place")
    end = index.archive_size
    if index.frames is not None and index.frames_tar is not None:
        if len(index.frames) != len(index.frames_tar) or not len(index.frames) or int(index.frames[-1]) > end:
            raise ShardReadError("shard index is corrupt: bad zstd frames")
        if (np.diff(index.frames.astype(np.int64)) < 0).any() or (np.diff(index.frames_tar.astype(np.int64)) < 0).any():
            raise ShardReadError("shard index is corrupt: zstd frames run backwards")
        if int(index.frames[0]) or int(index.frames_tar[0]):
            raise ShardReadError("shard index is corrupt: zstd frames do not begin at 0")
        end = int(index.frames_tar[-1])
    elif index.compression is not None:
        end = 1 << 62  # gzip, bz2, xz: the length of the tar stream is not known beforehand
    internal = index.internal_manifest
    beyond = (internal is not None and internal.offset + internal.size > end) or (n and (index.sizes > np.uint64(end)).any())
    if beyond or (n and (index.offsets > np.uint64(end) - index.sizes).any()):
        raise ShardReadError(f"shard index is corrupt: a member lies beyond the archive's {index.archive_size} bytes")
    steps = np.diff(index.groups.astype(np.int64))
    if n and (int(index.groups[0]) != 0 or (steps < 0).any() or (steps > 1).any()):
        raise ShardReadError("shard index is corrupt: sample numbers are not consecutive")
    if n and (int(index.name_ends[-1]) != len(index.names_blob) or (np.diff(index.name_ends.astype(np.int64)) < 0).any()):
        raise ShardReadError("shard index is corrupt: names")


def read_counts(data: Buffer) -> IndexCounts:
    """Counts and identity from the first bytes of a side-car (4 KiB hold them).

    Raises:
        ShardReadError: it is no index, or of a newer version.
    """
    try:
        _, metadata, _ = tensorfile.decode_header(data)
        if metadata.get("format") != FORMAT:
            raise FormatError("not a shard index of s3loader")
        if _CLAIM in metadata:
            raise FormatError("the shard's name is claimed, its writer has not finished")
        if int(metadata["version"]) > VERSION:
            raise FormatError(f"index version {metadata['version']} is newer than this s3loader reads ({VERSION})")
        return IndexCounts(
            members=int(metadata["members"]),
            samples=int(metadata["samples"]),
            archive_size=int(metadata["archive_size"]),
            archive_etag=metadata["archive_etag"],
            compression=metadata["compression"] or None,
        )
    except (FormatError, KeyError, ValueError) as error:
        raise ShardReadError(f"not a usable shard index: {error}") from error


def claim_bytes(owner: str) -> bytes:
    """What stands at `index_key(archive)` while `owner` writes the archive: an index without members."""
    return tensorfile.encode({}, {"format": FORMAT, "version": str(VERSION), _CLAIM: owner})


def index_key(archive_key: str) -> str:
    """Key of the side-car."""
    return archive_key + _SUFFIX


def second_index_key(archive_key: str) -> str:
    """Key of our side-car where another tool (Energon) keeps its own at `index_key`."""
    return archive_key + _SECOND_SUFFIX


def is_foreign(data: Buffer) -> bool:
    """Whether a file at `index_key` was written by another tool and must not be replaced."""
    try:
        _, metadata, _ = tensorfile.decode_header(data)
    except FormatError:
        return True
    return metadata.get("format") != FORMAT


def load_index(store: ObjectStore, archive_key: str, *, etag: str | None = None) -> ShardIndex:
    """The side-car of `archive_key`, one GET.

    Args:
        store: Where the archive is.
        archive_key: Key of the archive.
        etag: The archive's ETag, where known: an index made for another one is refused.

    Raises:
        ObjectNotFoundError: there is no side-car.
        ShardReadError: it is corrupt, or made for another version of the archive.
    """
    key = index_key(archive_key)
    data = store.get(key)
    if is_foreign(data):
        try:
            key = second_index_key(archive_key)
            data = store.get(key)
        except ObjectNotFoundError:
            raise ShardReadError(
                "not a shard index of s3loader",
                op="read",
                url=f"{store.url}/{index_key(archive_key)}",
                hint="s3loader.shard.build_index makes one beside it",
            ) from None
    try:
        index = ShardIndex.from_bytes(data)
    except ShardReadError as error:
        raise ShardReadError(error.message, op="read", url=f"{store.url}/{key}") from error
    if etag is not None and index.etag != etag:
        raise ShardReadError(
            f"the index was made for ETag {index.etag!r}, the archive now has {etag!r}",
            op="read",
            url=f"{store.url}/{key}",
            hint="s3loader.shard.build_index makes a new one",
        )
    return index


def sample_key(name: str) -> str:
    """The part of a member's name that the members of one WebDataset sample share: folder and base
    name up to its first dot (``a/b.seg.png`` -> ``a/b``). Without a dot, or with one at the start of
    the base name, the whole name."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    return name if dot <= base else name[:dot]
