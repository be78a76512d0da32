"""From the members of an archive to its index, whoever tells of them: a walk through a tar, another tool's list, a writer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

import numpy as np

from s3loader.checksum import crc32c
from s3loader.shard.compression import FrameTable
from s3loader.shard.index import INTERNAL_MANIFEST, MemberRange, ShardIndex, is_internal
from s3loader.shard.links import Link, resolve_links
from s3loader.shard.samples import LeftOut, note_left_out
from s3loader.shard.tar import TarMember
from s3loader.types import Buffer

__all__ = ["IndexBuilder"]

_KINDS: Final = {"dir": "folder"}


class IndexBuilder:
    """Takes the members of an archive in order; files and links to them are rows, other kinds are counted.

    Args:
        internal_manifest_path: The first member of this name is no row but the internal manifest. With the usual name
            also a first member called `WEBDATASET_MANIFEST`.
    """

    def __init__(self, internal_manifest_path: str = INTERNAL_MANIFEST) -> None:
        self._internal_path = internal_manifest_path
        self._internal: MemberRange | None = None
        self._offsets = array("Q")
        self._sizes = array("Q")
        self._crcs = array("I")
        self._names: list[str] = []
        self._links: list[Link] = []
        self._folders: list[str] = []
        self._left_out: dict[str, LeftOut] = {}
        self._unread = False
        self._seen = 0

    def add(self, member: TarMember, crc: int | None) -> None:
        """The next member, with the CRC32C of its content where that was read."""
        self._seen += 1
        if member.kind in ("hardlink", "symlink"):
            self._links.append(Link(member.name, member.link, member.kind == "symlink", len(self._names)))
        elif member.kind != "file":
            if member.kind == "dir":
                self._folders.append(member.name)
            note_left_out(self._left_out, _KINDS.get(member.kind, member.kind), member.name)
        elif is_internal(member.name, self._seen == 1, self._internal_path):
            self._internal = self._internal or MemberRange(member.offset, member.size, crc)
        else:
            self.add_file(member.name, member.offset, member.size, crc)

    def add_file(self, name: str, offset: int, size: int, crc: int | None) -> None:
        """A row."""
        if crc is None:
            self._unread, crc = True, 0
        self._offsets.append(offset)
        self._sizes.append(size)
        self._crcs.append(crc)
        self._names.append(name)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def last_name(self) -> str:
        """Name of the last row."""
        return self._names[-1]

    @property
    def last_size(self) -> int:
        """Bytes of the last row."""
        return self._sizes[-1]

    def update_crc(self, data: Buffer) -> None:
        """The next bytes of the last row's content, which was added with the checksum of what came before."""
        self._crcs[-1] = crc32c(data, self._crcs[-1])

    def index(
        self,
        size: int,
        etag: str = "",
        compression: str | None = None,
        table: FrameTable | None = None,
        *,
        internal: MemberRange | None = None,
        shift: int = 0,
    ) -> ShardIndex:
        """The index of all that was added; may be asked for again.

        Args:
            size: Bytes of the archive.
            etag: Of the archive.
            compression: Of the archive.
            table: Its zstd frames.
            internal: Its internal manifest, where that was not among the members.
            shift: Bytes of the tar stream before the first of them.
        """
        names = self._names
        offsets, sizes, crcs = (np.array(column) for column in (self._offsets, self._sizes, self._crcs))
        if self._links:
            order, names = self._with_links()
            offsets, sizes, crcs = offsets[order], sizes[order], crcs[order]
        blob, lengths = _encoded(names)
        return ShardIndex(
            offsets=offsets.astype(np.uint64) + np.uint64(shift),
            sizes=sizes.astype(np.uint64),
            crc32c=None if self._unread else crcs.astype(np.uint32),
            names_blob=blob,
            name_ends=np.cumsum(lengths, dtype=np.uint64),
            archive_size=size,
            etag=etag,
            compression=compression,
            internal_manifest=internal or self._internal,
            frames=None if table is None else _boundaries(table.packed),
            frames_tar=None if table is None else _boundaries(table.plain),
            not_files=self._left_out,
        )

    def _with_links(self) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], list[str]]:
        """Which file stands in each row, and the rows' names: links in the order of the archive among the files."""
        found = resolve_links(self._names, self._links, self._folders)
        order: list[int] = []
        names: list[str] = []
        done = 0
        for link, target in zip(self._links, found, strict=True):
            if isinstance(target, str):
                note_left_out(self._left_out, target, link.name)
                continue
            order += range(done, link.at)
            names += self._names[done : link.at]
            done = link.at
            order.append(target)
            names.append(link.name)
        order += range(done, len(self._names))
        names += self._names[done:]
        return np.array(order, dtype=np.int64), names


def _encoded(names: Sequence[str]) -> tuple[bytes, np.ndarray[tuple[int], np.dtype[np.uint64]]]:
    """Names in UTF-8, one after another, and the bytes of each."""
    text = "".join(names)
    if text.isascii():
        return text.encode(), np.fromiter(map(len, names), np.uint64, len(names))
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    return b"".join(encoded), np.fromiter(map(len, encoded), np.uint64, len(encoded))


def _boundaries(sizes: array[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.uint64))]).astype(np.uint64)
