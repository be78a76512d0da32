"""From the members of an archive to its index, whoever tells of them: a walk through a tar, another tool's list, a writer.

Links first: which member's bytes a hard or symbolic link stands for. A hard link names an earlier member by its full path. A
symbolic link is relative to its own folder, may point forward, to another link, or through a link to a folder. Both mean what
extracting the archive would leave under that path. A leading slash counts for nothing, as for `tar`, except that a symbolic
link with a relative name may not point to an absolute path.
"""

from __future__ import annotations

import posixpath
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from s3loader.checksum import crc32c
from s3loader.shard.compression import FrameTable
from s3loader.shard.index import INTERNAL_MANIFEST, MemberRange, ShardIndex, is_internal
from s3loader.shard.samples import LeftOut, note_left_out
from s3loader.shard.tar import TarMember
from s3loader.types import Buffer

__all__ = ["IndexBuilder", "Link", "resolve_links"]

_MOST_HOPS: Final = 40


class Link(NamedTuple):
    """One link of an archive."""

    name: str
    target: str
    symbolic: bool
    at: int
    """How many files stand before it."""


class _Place(NamedTuple):
    at: int
    """Files before it."""
    file: int | None
    link: Link | None


def resolve_links(names: Sequence[str], links: Sequence[Link], folders: Sequence[str] = ()) -> list[int | str]:
    """For each link the position in `names` of the file it stands for; or, as text, what kind of link leads to none.

    Args:
        names: The files of the archive, in archive order.
        links: Its links, in archive order.
        folders: The folders it lists.
    """
    return _Resolver(names, links, folders).all(links)


class _Resolver:
    def __init__(self, names: Sequence[str], links: Sequence[Link], folders: Sequence[str]) -> None:
        self._places: dict[str, list[_Place]] = {}
        self._folders = {_path(folder) for folder in folders}
        self._found: dict[Link, int | str] = {}
        waiting = deque(links)
        for position, name in enumerate(names):
            while waiting and waiting[0].at <= position:
                self._add_link(waiting.popleft())
            path = _path(name)
            self._places.setdefault(path, []).append(_Place(position, position, None))
            self._add_folders(path)
        for link in waiting:
            self._add_link(link)

    def _add_link(self, link: Link) -> None:
        path = _path(link.name)
        self._places.setdefault(path, []).append(_Place(link.at, None, link))
        self._add_folders(path)

    def _add_folders(self, path: str) -> None:
        while (path := posixpath.dirname(path)) and path not in self._folders:
            self._folders.add(path)

    def all(self, links: Sequence[Link]) -> list[int | str]:
        for link in links:  # earlier ones first: a hard link to a hard link, and so on, is one step
            self._found[link] = self._resolve(link, 0)
        return [self._found[link] for link in links]

    def _resolve(self, link: Link, hops: int) -> int | str:
        if link in self._found:
            return self._found[link]
        kind = "symbolic link" if link.symbolic else "hard link"
        if hops > _MOST_HOPS:
            return f"{kind} in a circle"
        if not link.symbolic:
            path = _path(link.target)
            earlier = [place for place in self._places.get(path, ()) if self._before(place, link)]
            if earlier and path == _path(link.name):
                return "hard link to itself"  # a file that was given to tar twice
            return self._follow(earlier[-1], hops) if earlier else "hard link without its file"
        target = _target(link)
        return "symbolic link out of the archive" if target is None else self._follow_path(target, hops)

    @staticmethod
    def _before(place: _Place, link: Link) -> bool:
        return place.link is not link and (place.at < link.at or (place.file is None and place.at == link.at))

    def _follow(self, place: _Place, hops: int) -> int | str:
        if place.file is not None:
            return place.file
        assert place.link is not None
        return self._resolve(place.link, hops + 1)

    def _follow_path(self, path: str, hops: int) -> int | str:
        path = posixpath.normpath(path)
        if path == ".." or path.startswith("../"):
            return "symbolic link out of the archive"
        places = self._places.get(path)
        if places:
            return self._follow(places[-1], hops)
        if path in self._folders or path == ".":
            return "symbolic link to a folder"
        parts = path.split("/")
        for i in range(1, len(parts)):
            folder = self._places.get("/".join(parts[:i]))
            link = folder[-1].link if folder else None
            if link is None or not link.symbolic or hops > _MOST_HOPS:
                continue
            inner = _target(link)
            if inner is None:
                return "symbolic link out of the archive"
            return self._follow_path(posixpath.join(inner, *parts[i:]), hops + 1)
        return "symbolic link without its file"


def _path(name: str) -> str:
    return posixpath.normpath(name.lstrip("/"))


def _target(link: Link) -> str | None:
    """Where a symbolic link leads, from the root of the archive; None: out of it."""
    if link.target.startswith("/"):
        return link.target.lstrip("/") if link.name.startswith("/") else None
    return posixpath.join(posixpath.dirname(link.name.lstrip("/")), link.target)


# -- the builder -----------------------------------------------------------------------------------

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
