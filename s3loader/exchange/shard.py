"""`Shard`: one archive as the exchange API shows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from s3loader.errors import InvalidManifestError, ObjectNotFoundError, ShardReadError
from s3loader.exchange.access import not_found
from s3loader.exchange.errors import ExchangeObjectNotFoundError
from s3loader.exchange.items import create_archive, create_shards
from s3loader.exchange.keys import infer_id_from_key, virtual_key
from s3loader.exchange.lines import iter_members
from s3loader.exchange.removal import delete_archive
from s3loader.exchange.types import FileEntry, ManifestEntry, ShardEntry
from s3loader.shard.body import ArchiveMemberBody
from s3loader.shard.compression import infer_archive_format
from s3loader.shard.index import INTERNAL_MANIFEST, ShardIndex
from s3loader.shard.reader import Member, ShardReader
from s3loader.store.arguments import checked_key
from s3loader.types import Buffer

if TYPE_CHECKING:
    from s3loader.exchange.manifest import Manifest
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["PreparedShard", "Shard", "entry_of"]


@dataclass(frozen=True, slots=True)
class PreparedShard:
    """Index and entries of a shard."""

    index: ShardIndex
    pairs: list[tuple[int, FileEntry]]
    """Position in the index, and entry, of every member."""


class Shard(Mapping[str, Any]):
    """One shard; also a read-only mapping: its manifest entry.

    Args:
        store: The store it is in.
        entry: Its entry. How it is compressed is found from the archive itself.
    """

    infer_archive_format = staticmethod(infer_archive_format)
    create_archive = staticmethod(create_archive)
    split_items = staticmethod(create_shards)

    def __init__(self, store: S3ExchangeStore, entry: ShardEntry) -> None:
        self._store = store
        self._entry = entry

    @classmethod
    def from_key(cls, store: S3ExchangeStore, key: str) -> Shard:
        """The shard under `key`; format and compression by its suffix.

        Raises:
            ConfigError: the suffix is no tar archive's.
        """
        kind, compression = infer_archive_format(checked_key(key))
        return cls(
            store,
            {
                "kind": "shard",
                "archive_key": key,
                "format": kind,
                "compression": compression,
                "internal_manifest_path": INTERNAL_MANIFEST,
            },
        )

    @classmethod
    def from_entry(cls, store: S3ExchangeStore, entry: ShardEntry) -> Shard:
        """The shard of a manifest entry."""
        return cls(store, entry)

    # a mapping

    def __getitem__(self, key: str) -> Any:
        return dict(self._entry)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entry)

    def __len__(self) -> int:
        return len(self._entry)

    def __repr__(self) -> str:
        return f"Shard({self.archive_key!r})"

    # properties

    @property
    def store(self) -> S3ExchangeStore:
        """The store it is in."""
        return self._store

    @property
    def entry(self) -> ShardEntry:
        """Its manifest entry."""
        return self._entry

    @property
    def archive_key(self) -> str:
        """Key of the archive."""
        return self._entry["archive_key"]

    @property
    def format(self) -> str:
        """``"tar"``."""
        return self._entry.get("format") or "tar"

    @property
    def compression(self) -> str | None:
        """As the entry says; without the field, by the suffix of the key."""
        if "compression" in self._entry:
            return self._entry["compression"]
        try:
            return infer_archive_format(self.archive_key)[1]
        except ValueError:
            return None

    @property
    def internal_manifest_path(self) -> str:
        """Name of the member that lists the others."""
        return self._entry.get("internal_manifest_path") or INTERNAL_MANIFEST

    @property
    def reader(self) -> ShardReader:
        """What reads it: see `s3loader.shard.reader.ShardReader`."""
        etag = (self._entry.get("meta") or {}).get("etag")
        return self._store.access.reader(
            self.archive_key, etag=etag if isinstance(etag, str) else None, internal=self.internal_manifest_path
        )

    # reading

    def get_manifest(self) -> Manifest:
        """The internal manifest, with `archive_key` in each entry."""
        return self._store.as_manifest([*self.iter_entries()])

    def iter_entries(self, limit: int | None = None) -> Iterator[FileEntry]:
        """The entries of its members, in archive order, with `archive_key`; contents are not read.

        Raises:
            ExchangeObjectNotFoundError: there is no such archive.
            ShardReadError: it is damaged, or its internal manifest lists members it does not have.
        """
        yield from islice((entry for _, entry in self._listed()), limit)

    def iter_objects(self, limit: int | None = None) -> Iterator[tuple[ArchiveMemberBody, FileEntry]]:
        """Members with their entries, in archive order; neighbours are read in one request.

        The internal manifest is not among them (`get_member` gives it by name).
        """
        if limit is None or limit > 0:
            yield from self.iter_prepared(self.prepare(), limit)

    def prepare(self) -> PreparedShard | None:
        """What `iter_prepared` needs to know beforehand: index and entries; None where the archive must be streamed.

        Raises: as `iter_entries`.
        """
        reader = self.reader
        try:
            if not reader.has_side_car() or not reader.index.random_access:
                return None
            index = reader.index
        except ObjectNotFoundError as error:
            raise not_found(self.archive_key, error) from error
        return PreparedShard(index, self._listed())

    def iter_prepared(
        self, prepared: PreparedShard | None, limit: int | None = None
    ) -> Iterator[tuple[ArchiveMemberBody, FileEntry]]:
        """As `iter_objects`, with what `prepare` returned, perhaps in another thread while something else was read."""
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

    def get_member(self, path: str) -> ArchiveMemberBody:
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

    def delete(self) -> None:
        """Delete the archive and its index."""
        delete_archive(self._store.objects, self.archive_key)
        self._store.access.forget(self.archive_key)

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
            return list(enumerate(said))
        free: dict[str, deque[int]] = {}
        for position, name in enumerate(names):
            free.setdefault(name, deque()).append(position)
        pairs = []
        for entry in said:
            positions = free.get(_path(entry))
            if not positions:
                raise self._absent(_path(entry))
            pairs.append((positions.popleft(), entry))
        rest = sorted(position for positions in free.values() for position in positions)
        return pairs + [(position, self._made_up(names[position], sizes[position])) for position in rest]

    def _stream(self, reader: ShardReader) -> Iterator[tuple[ArchiveMemberBody, FileEntry]]:
        """One pass over an archive without random access."""
        said: dict[str, deque[FileEntry]] = {}
        for entry in self._said(reader.peek_internal_manifest()):
            said.setdefault(_path(entry), deque()).append(entry)
        for member in reader.iter_members():
            entries = said.get(member.name)
            yield member.body, entries.popleft() if entries else self._of(member)
        for path, entries in said.items():
            if entries:
                raise self._absent(path)

    def _of(self, member: Member) -> FileEntry:
        return self._made_up(member.name, member.size)

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


def entry_of(entry: ManifestEntry | Shard) -> ManifestEntry:
    """The manifest entry of a shard; an entry is its own."""
    return entry.entry if isinstance(entry, Shard) else entry


def _with_key(entry: FileEntry, key: str) -> FileEntry:
    return {"kind": "file", "key": key, **{name: value for name, value in entry.items() if name != "kind"}}  # type: ignore[typeddict-item]
