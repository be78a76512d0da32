"""The index side-car of a shard: where each member's bytes are, and their checksum.

`<archive>.idx` is a safetensors file. Tensors (all one-dimensional, N members in archive order):

========== ==== =======================================================================
offset     u64  N: first byte of the member's content, in the (uncompressed) tar stream
size       u64  N: length of the content in bytes
crc32c     u32  N: CRC32C of the content; absent where nobody has read the contents yet
group      u32  N: number of the sample the member belongs to, from 0, rising; 0xFFFFFFFF: to none
name_end   u64  N: end of the member's name in `names`
names      u8   the names in UTF-8, one after another
frame      u64  F+1: start of each zstd frame in the archive, then the end of the last
frame_tar  u64  F+1: the same boundaries in the uncompressed tar stream
========== ==== =======================================================================

`frame` and `frame_tar` exist only for zstd shards with a seek table. The metadata holds strings: ``format``
("s3loader-shard-index"), ``version`` ("2"), ``crc32c`` (of the arrays and the other metadata), ``members``, ``samples``,
``archive_size``,
``archive_etag``, ``compression`` ("", "gzip", "bz2", "xz" or "zstd") and, where the archive has an internal
manifest, ``internal_manifest``: "offset,size,crc32c" of that member. ``grouping`` ("1") says that samples are
numbered by the rule of `s3loader.shard.samples`; indexes without it (made by earlier versions) have their samples numbered
anew when they are read. With it stand ``torn`` (how many samples begin with a key that was there before), ``edges``
(`key_hash` of the first and the last sample, with a comma between) and, where there is any, ``not_files`` (links without their
file, folders, devices) and ``not_in_samples`` (members that belong to none), JSON: ``{kind: [count, [names]]}``.

The internal manifest (`__manifest__.jsonl`) describes the other members and is no sample, so it
is *not* among the N members; `ShardIndex.internal_manifest` says where it is.

Version 1 had no ``crc32c`` of its own. It is still read, with a warning: damage in it may go unnoticed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from s3loader.checksum import crc32c
from s3loader.errors import FormatError, ObjectNotFoundError, ShardReadError
from s3loader.fetch import safetensors
from s3loader.shard.compression import COMPRESSIONS, LARGEST_FRAME, most_inside
from s3loader.shard.samples import NO_SAMPLE, Grouping, LeftOut, group_names
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer

__all__ = [
    "INTERNAL_MANIFEST",
    "WEBDATASET_MANIFEST",
    "IndexCounts",
    "MemberRange",
    "ShardIndex",
    "claim_bytes",
    "index_key",
    "is_foreign",
    "is_internal",
    "load_index",
    "read_counts",
    "second_index_key",
]

INTERNAL_MANIFEST: Final = "__manifest__.jsonl"
WEBDATASET_MANIFEST: Final = "__manifest__"
"""Name of the internal manifest in shards for readers that follow WebDataset's rule: they leave ``__x__`` out."""
FORMAT: Final = "s3loader-shard-index"
VERSION: Final = 2
MAX_SIZE: Final = 1 << 62
"""No archive, member or tar stream is longer."""
_OLD_FIELDS: Final = frozenset(
    ("format", "version", "members", "samples", "archive_size", "archive_etag", "compression", "internal_manifest")
)
"""The metadata of version 1."""
_LEAST_ROW: Final = 28
"""Bytes that each member takes in an index at least."""
_CRC: Final = "crc32c"
GROUPING: Final = "1"
_CLAIM: Final = "claim"
_LONGEST_NOTE: Final = 1000
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
    samples: int | None
    """None: the index does not say (an earlier version made it); its names do."""
    archive_size: int
    archive_etag: str
    compression: str | None
    random_access: bool
    """Whether a member can be read without what lies before it."""
    torn: int
    edges: tuple[str, str] | None
    not_files: Mapping[str, LeftOut]
    not_in_samples: Mapping[str, LeftOut]

    @classmethod
    def of(cls, index: ShardIndex) -> IndexCounts:
        """As the head of `index` tells, or would."""
        grouping = index.grouping
        return cls(
            len(index),
            grouping.samples,
            index.archive_size,
            index.etag,
            index.compression,
            index.random_access,
            grouping.torn,
            grouping.edges,
            index.not_files,
            grouping.left_out or {},
        )


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
    not_files: Mapping[str, LeftOut] = field(default_factory=dict)
    """What the archive has beside files and links to them, by kind."""
    known_grouping: Grouping | None = field(default=None, repr=False)
    """None: found from the names when it is needed."""

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def grouping(self) -> Grouping:
        """Its members as samples."""
        return self.known_grouping or group_names(self.names())

    @property
    def groups(self) -> npt.NDArray[np.uint32]:
        """Sample number of each member; `NO_SAMPLE` for members of none."""
        return self.grouping.groups

    @property
    def samples(self) -> int:
        """How many samples (groups of members) there are."""
        return self.grouping.samples

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
        grouping = self.grouping
        tensors |= {"group": grouping.groups, "names": np.frombuffer(self.names_blob, dtype=np.uint8)}
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "members": str(len(self)),
            "samples": str(grouping.samples),
            "grouping": GROUPING,
            "torn": str(grouping.torn),
            "archive_size": str(self.archive_size),
            "archive_etag": self.etag,
            "compression": self.compression or "",
        }
        if self.internal_manifest is not None:
            metadata["internal_manifest"] = ",".join("" if v is None else str(v) for v in self.internal_manifest)
        if grouping.edges is not None:
            metadata["edges"] = ",".join(grouping.edges)
        for name, left_out in (("not_files", self.not_files), ("not_in_samples", grouping.left_out)):
            if left_out:
                metadata[name] = _note(left_out)
        return safetensors.encode(tensors, {_CRC: _checksum(metadata, tensors), **metadata})

    @classmethod
    def from_bytes(cls, data: Buffer) -> ShardIndex:
        """Read a side-car; the arrays are views of `data`.

        Raises:
            ShardReadError: it is no index, of a newer version, damaged, or contradicts itself.
        """
        counts = read_counts(data)
        try:
            tensors, metadata = safetensors.decode(data)
            _verify(tensors, metadata)
            internal = _internal(metadata.get("internal_manifest"))
            index = cls(
                offsets=_take(tensors, "offset", 8),
                sizes=_take(tensors, "size", 8),
                crc32c=_take(tensors, "crc32c", 4) if "crc32c" in tensors else None,
                names_blob=_take(tensors, "names", 1).data,
                name_ends=_take(tensors, "name_end", 8),
                archive_size=counts.archive_size,
                etag=counts.archive_etag,
                compression=counts.compression,
                internal_manifest=internal,
                frames=_take(tensors, "frame", 8) if "frame" in tensors else None,
                frames_tar=_take(tensors, "frame_tar", 8) if "frame_tar" in tensors else None,
                not_files=counts.not_files,
                known_grouping=_known_grouping(tensors, counts),
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


def _known_grouping(tensors: dict[str, npt.NDArray[Any]], counts: IndexCounts) -> Grouping | None:
    """As it was stored, if by the present rule."""
    groups = _take(tensors, "group", 4)
    if counts.samples is None:
        return None
    steps = np.diff(groups[groups != NO_SAMPLE].astype(np.int64), prepend=-1)
    if ((steps != 0) & (steps != 1)).any() or int(steps.sum()) != counts.samples or (len(steps) and steps[0] != 1):
        raise FormatError("sample numbers are not consecutive, or not as many as it says")
    return Grouping(groups, counts.samples, counts.torn, counts.edges, counts.not_in_samples)


def _note(left_out: Mapping[str, LeftOut]) -> str:
    """As JSON; with fewer names where they would be too long for the head of an index."""
    for shown in (3, 1, 0):
        text = json.dumps({kind: [one.count, list(one.names[:shown])] for kind, one in left_out.items()})
        if len(text) <= _LONGEST_NOTE:
            break
    return text


def _noted(text: str | None) -> dict[str, LeftOut]:
    if text is None:
        return {}
    try:
        kinds = json.loads(text).items()
        return {kind: LeftOut(_number(str(count)), tuple(map(str, names))) for kind, (count, names) in kinds}
    except (AttributeError, TypeError, RecursionError) as error:
        raise FormatError(f"what it says is left out is not understood: {error}") from error


def _internal(text: str | None) -> MemberRange | None:
    if text is None:
        return None
    offset, size, crc = text.split(",")
    return MemberRange(_number(offset), _number(size), _number(crc, 1 << 32) if crc else None)


def _number(text: str, below: int = MAX_SIZE) -> int:
    """A count or size as metadata writes it.

    Raises:
        ValueError: it is none, or `below` or more.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < below):
        raise ValueError(f"{text[:40]!r} is no count or size")
    return int(text)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """CRC32C over everything an index says, however a safetensors writer lays it out: the other metadata in order
    of their names as JSON, then of each tensor in order of the names its name, a NUL, its type, and its bytes."""
    crc = crc32c(json.dumps({k: v for k, v in metadata.items() if k != _CRC}, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        data = tensors[name].astype(tensors[name].dtype.newbyteorder("<"), copy=False)
        crc = crc32c(f"{name}\0u{data.dtype.itemsize * 8}".encode("utf-8", "surrogatepass"), crc)
        crc = crc32c(np.ascontiguousarray(data).data, crc) if len(data) else crc
    return f"{crc:08x}"


def _verify(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Compare an index with its own checksum.

    Raises:
        FormatError: it is damaged.
    """
    if metadata["version"] != "1":
        if metadata.get(_CRC) != _checksum(metadata, tensors):
            raise FormatError("it does not match its own checksum")
        return
    if unknown := metadata.keys() - _OLD_FIELDS:
        raise FormatError(f"version 1 has no {sorted(unknown)[0]!r}")
    warnings.warn(
        "a shard index of an earlier version has no checksum of its own, so damage in it may go unnoticed;"
        " s3loader.shard.build_index(url, force=True) makes a new one",
        UserWarning,
        stacklevel=3,
    )


def _rises(values: npt.NDArray[np.uint64], *, strictly: bool = False) -> bool:
    return bool(((values[1:] > values[:-1]) if strictly else (values[1:] >= values[:-1])).all())


def _check(index: ShardIndex, counts: IndexCounts) -> None:
    """Refuse an index whose arrays would send a reader outside the archive."""
    n = len(index)
    columns: list[npt.NDArray[Any]] = [index.sizes, index.name_ends]
    columns += [] if index.crc32c is None else [index.crc32c]
    columns += [] if index.known_grouping is None else [index.known_grouping.groups]
    if any(len(column) != n for column in columns) or counts.members != n:
        raise ShardReadError("shard index is corrupt: its arrays differ in length from its counts")
    end = _tar_size(index)
    internal = index.internal_manifest
    beyond = (internal is not None and internal.offset + internal.size > end) or (n and (index.sizes > np.uint64(end)).any())
    if beyond or (n and (index.offsets > np.uint64(end) - index.sizes).any()):
        raise ShardReadError(f"shard index is corrupt: a member lies beyond the archive's {index.archive_size} bytes")
    if (int(index.name_ends[-1]) if n else 0) != len(index.names_blob) or not _rises(index.name_ends):
        raise ShardReadError("shard index is corrupt: names")


def _tar_size(index: ShardIndex) -> int:
    """Most bytes the tar stream can have, as far as the index tells.

    Raises:
        ShardReadError: its zstd frames contradict themselves.
    """
    frames, inside, end = index.frames, index.frames_tar, index.archive_size
    if frames is None or inside is None:
        if frames is not inside:
            raise ShardReadError("shard index is corrupt: zstd frames out of place")
        return end if index.compression is None else MAX_SIZE  # gzip, bz2, xz: not known beforehand
    if index.compression != "zstd":
        raise ShardReadError("shard index is corrupt: zstd frames out of place")
    if len(frames) != len(inside) or not len(frames) or int(frames[-1]) > end:
        raise ShardReadError("shard index is corrupt: bad zstd frames")
    if not _rises(frames, strictly=True) or not _rises(inside):
        raise ShardReadError("shard index is corrupt: zstd frames run backwards")
    if int(frames[0]) or int(inside[0]):
        raise ShardReadError("shard index is corrupt: zstd frames do not begin at 0")
    packed, plain = np.diff(frames), np.diff(inside)
    if (plain > np.uint64(LARGEST_FRAME)).any() or (plain > packed * np.uint64(most_inside(1))).any():
        raise ShardReadError("shard index is corrupt: a zstd frame cannot hold so much")
    return int(inside[-1])


def read_counts(data: Buffer, size: int | None = None) -> IndexCounts:
    """Counts and identity from the first bytes of a side-car (4 KiB hold them).

    Args:
        data: The first bytes, or all.
        size: Bytes of the whole side-car, where `data` is not all of it: the counts must fit into them.

    Raises:
        ShardReadError: it is no index, of a newer version, or counts more members than there is room for.
    """
    try:
        entries, metadata = safetensors.parse_header(data)
        if metadata.get("format") != FORMAT:
            raise FormatError("not a shard index of s3loader")
        if _CLAIM in metadata:
            raise FormatError("the shard's name is claimed, its writer has not finished")
        if not 1 <= _number(metadata["version"]) <= VERSION:
            raise FormatError(f"index version {metadata['version']} is not one this s3loader reads (1 to {VERSION})")
        compression = metadata["compression"] or None
        first, comma, last = metadata.get("edges", "").partition(",")
        samples = _number(metadata["samples"])
        counts = IndexCounts(
            members=_number(metadata["members"]),
            samples=samples if metadata.get("grouping") == GROUPING else None,
            archive_size=_number(metadata["archive_size"]),
            archive_etag=metadata["archive_etag"],
            compression=compression,
            random_access=compression is None or any(entry.name == "frame" for entry in entries),
            torn=_number(metadata.get("torn", "0")),
            edges=(first, last) if comma else None,
            not_files=_noted(metadata.get("not_files")),
            not_in_samples=_noted(metadata.get("not_in_samples")),
        )
        if samples > counts.members or counts.members * _LEAST_ROW > (len(data) if size is None else size):
            raise FormatError(f"it has no room for {counts.members} members of {samples} samples")
        if counts.compression not in (None, *COMPRESSIONS):
            raise FormatError(f"unknown compression {counts.compression!r}")
        return counts
    except (FormatError, KeyError, ValueError) as error:
        raise ShardReadError(f"not a usable shard index: {error}") from error


def is_internal(name: str, first: bool, path: str) -> bool:
    """Whether a member is the internal manifest where it is called `path`.

    With the usual path a `first` member called `WEBDATASET_MANIFEST` is one too.
    """
    return name == path or (first and name == WEBDATASET_MANIFEST and path == INTERNAL_MANIFEST)


def claim_bytes(owner: str) -> bytes:
    """What stands at `index_key(archive)` while `owner` writes the archive: an index without members."""
    return safetensors.encode({}, {"format": FORMAT, "version": str(VERSION), _CLAIM: owner})


def index_key(archive_key: str) -> str:
    """Key of the side-car."""
    return archive_key + _SUFFIX


def second_index_key(archive_key: str) -> str:
    """Key of our side-car where another tool (Energon) keeps its own at `index_key`."""
    return archive_key + _SECOND_SUFFIX


def is_foreign(data: Buffer) -> bool:
    """Whether a file at `index_key` was written by another tool and must not be replaced."""
    try:
        _, metadata = safetensors.parse_header(data)
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
