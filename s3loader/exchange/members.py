"""The members of a shard: their entries, and their contents with them.

What an archive has is in its index, what its members are called and mean by its internal manifest. The two are held
against each other: a member that the internal manifest does not list gets an entry made up, one that it lists in vain, or
with another size, is an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from s3loader.errors import ExchangeObjectNotFoundError, InvalidManifestError, ObjectNotFoundError, ShardReadError
from s3loader.exchange.keys import infer_id_from_key, virtual_key
from s3loader.exchange.lines import iter_members
from s3loader.exchange.objects import ObjectAccess, not_found
from s3loader.exchange.types import FileEntry, ShardEntry
from s3loader.shard.body import ArchiveMemberBody
from s3loader.shard.index import INTERNAL_MANIFEST, ShardIndex
from s3loader.shard.reader import ShardReader
from s3loader.types import Buffer

__all__ = ["PreparedShard", "ShardMembers"]


@dataclass(frozen=True, slots=True)
class PreparedShard:
    """Index and entries of a shard, read before its members are."""

    index: ShardIndex
    pairs: list[tuple[int, FileEntry]]
    """Position in the index, and entry, of every member."""


class ShardMembers:
    """The members of one archive.

    Args:
        access: What opens objects, and keeps indexes.
        entry: The shard's manifest entry.
    """

    def __init__(self, access: ObjectAccess, entry: ShardEntry) -> None:
        self._access = access
        self._entry = entry
        self.archive_key = entry["archive_key"]

    @property
    def reader(self) -> ShardReader:
        """What reads the archive's bytes.

        Raises:
            InvalidManifestError: the entry says what no archive can be.
        """
        internal = self._entry.get("internal_manifest_path") or INTERNAL_MANIFEST
        size = self._entry.get("size_bytes")
        if not isinstance(internal, str) or type(size) not in (int, type(None)):
            text = f"the entry of {self.archive_key!r} has internal_manifest_path {internal!r} and size_bytes {size!r}"
            raise InvalidManifestError(text, op="read", url=self._access.store.url)
        return self._access.reader(self.archive_key, size=size, internal=internal)

    def entries(self) -> Iterator[FileEntry]:
        """The entries of the members, in archive order, with `archive_key`; contents are not read.

        Raises:
            ExchangeObjectNotFoundError: there is no such archive.
            ShardReadError: it is damaged, or its internal manifest lists members it does not have.
        """
        yield from (entry for _, entry in self._listed())

    def contents(self, limit: int | None = None) -> Iterator[tuple[ArchiveMemberBody, FileEntry]]:
        """Members with their entries, in archive order; neighbours are read in one request.

        Args:
            limit: Most entries; None: all.

        Raises: as `entries`, and IntegrityError where a member's checksum is wrong.
        """
        if limit is None or limit > 0:
            yield from self.contents_of(self.prepare(), limit)

    def prepare(self) -> PreparedShard | None:
        """What `contents_of` needs to know beforehand: index and entries; None where the archive must be streamed.

        Raises: as `entries`.
        """
        reader = self.reader
        try:
            if not reader.has_side_car() or not reader.index.random_access:
                return None
            index = reader.index
        except ObjectNotFoundError as error:
            raise not_found(self.archive_key, error) from error
        return PreparedShard(index, self._listed())

    def contents_of(
        self, prepared: PreparedShard | None, limit: int | None = None
    ) -> Iterator[tuple[ArchiveMemberBody, FileEntry]]:
        """As `contents`, with what `prepare` returned, perhaps in another thread while something else was read."""
        reader = self.reader
        try:
            if prepared is None:
                yield from islice(self._stream(reader), limit)
                return
            pairs = prepared.pairs[:limit]
            members = reader.iter_members([position for position, _ in pairs], index=prepared.index)
            for member, (_, entry) in zip(members, pairs, strict=True):
                yield member.body, entry
        except ObjectNotFoundError as error:
            raise not_found(self.archive_key, error) from error

    def open(self, path: str) -> ArchiveMemberBody:
        """The member `path`; the last one of that name, as extracting the archive would leave it.

        Raises:
            ExchangeObjectNotFoundError: there is no such member or archive.
            ShardReadError: the archive is damaged.
        """
        reader = self.reader
        try:
            return reader.open(path)
        except KeyError:
            key = virtual_key(self.archive_key, path)
            raise ExchangeObjectNotFoundError(key, op="get", url=reader.url, hint="the archive has no such member") from None
        except ObjectNotFoundError as error:
            raise not_found(self.archive_key, error) from error

    def _listed(self) -> list[tuple[int, FileEntry]]:
        """``(position in the index, entry)`` of every member."""
        reader = self.reader
        try:
            said = self._said(reader.read_internal_manifest())
            names = reader.index.names()
            sizes = reader.index.sizes.tolist()
        except ObjectNotFoundError as error:
            raise not_found(self.archive_key, error) from error
        if [_path(entry) for entry in said] == names:
            return [(position, self._sized(entry, sizes[position])) for position, entry in enumerate(said)]
        free: dict[str, deque[int]] = {}
        for position, name in enumerate(names):
            free.setdefault(name, deque()).append(position)
        pairs = []
        for entry in said:
            positions = free.get(_path(entry))
            if not positions:
                raise self._absent(_path(entry))
            pairs.append((positions[0], self._sized(entry, sizes[positions[0]])))
            positions.popleft()
        rest = sorted(position for positions in free.values() for position in positions)
        return pairs + [(position, self._made_up(names[position], sizes[position])) for position in rest]

    def _stream(self, reader: ShardReader) -> Iterator[tuple[ArchiveMemberBody, FileEntry]]:
        """One pass over an archive without random access."""
        said: dict[str, deque[FileEntry]] = {}
        for entry in self._said(reader.peek_internal_manifest()):
            said.setdefault(_path(entry), deque()).append(entry)
        for member in reader.iter_members():
            entries = said.get(member.name)
            entry = self._sized(entries.popleft(), member.size) if entries else self._made_up(member.name, member.size)
            yield member.body, entry
        for path, entries in said.items():
            if entries:
                raise self._absent(path)

    def _made_up(self, name: str, size: int) -> FileEntry:
        """The entry of a member no internal manifest lists (foreign archives have none)."""
        return {
            "kind": "file",
            "key": virtual_key(self.archive_key, name),
            "member_path": name,
            "id": infer_id_from_key(name),
            "meta": None,
            "size_bytes": size,
            "archive_key": self.archive_key,
        }

    def _sized(self, entry: FileEntry, size: int) -> FileEntry:
        """`entry`, if the internal manifest says the size that the member has."""
        if entry.get("size_bytes") not in (None, size):
            path = _path(entry)
            text = f"member {path!r} has {size} bytes, the internal manifest says {entry.get('size_bytes')}"
            raise ShardReadError(text, url=self.reader.url, member=path)
        return entry

    def _absent(self, path: str) -> ShardReadError:
        return ShardReadError(
            f"the internal manifest lists {path!r}, which the archive does not have", url=self.reader.url, member=path
        )

    def _said(self, data: Buffer) -> list[FileEntry]:
        """The entries of the internal manifest: `key` is made where old writers left it out, `archive_key` added."""
        entries = []
        try:
            for entry in iter_members(data):
                full = entry if "key" in entry else _with_key(entry, virtual_key(self.archive_key, entry["member_path"]))
                entries.append(full | {"archive_key": self.archive_key})
        except InvalidManifestError as error:
            raise ShardReadError(f"internal manifest: {error.message}", op="read", url=self.reader.url) from error
        return entries


def _path(entry: FileEntry) -> str:
    return entry.get("member_path", "")  # `iter_members` gives none without


def _with_key(entry: FileEntry, key: str) -> FileEntry:
    return {"kind": "file", "key": key, **{name: value for name, value in entry.items() if name != "kind"}}  # type: ignore[typeddict-item]
