"""`Manifest` and `Shard`: a manifest and an archive as the exchange API shows them, and `ScopedStore`. They only delegate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Unpack

from s3loader.arguments import checked
from s3loader.checksum import crc32c, seal
from s3loader.errors import ConfigError
from s3loader.exchange.append import write_manifest
from s3loader.exchange.commit import part_key
from s3loader.exchange.compact import compact
from s3loader.exchange.delete import delete_archive, delete_manifest
from s3loader.exchange.iterate import filter_by_prefix, iter_contents, iter_files, iter_keys
from s3loader.exchange.lines import CONTENT_TYPE, encode_manifest, iter_entries, parse_line, serialize_entry
from s3loader.exchange.members import ShardMembers
from s3loader.exchange.objects import ExchangeBase
from s3loader.exchange.pack import create_archive, create_shards
from s3loader.exchange.reading import iter_given, iter_manifest
from s3loader.exchange.types import (
    CompactOptions,
    CompactReport,
    DeleteReport,
    FileEntry,
    ManifestEntry,
    ManifestRefEntry,
    ShardEntry,
    WriteMode,
)
from s3loader.shard.body import ArchiveMemberBody, ObjectBody
from s3loader.shard.compression import infer_archive_format
from s3loader.shard.index import INTERNAL_MANIFEST
from s3loader.shard.reader import ShardReader
from s3loader.store.arguments import checked_key
from s3loader.store.open import open_store

__all__ = ["Manifest", "ScopedStore", "Shard", "entry_of"]


@checked
class Manifest:
    """A manifest under a key, or a list of entries.

    Args:
        store: The `S3ExchangeStore` its keys are in.
        key: Key of the manifest.
        entries: Entries, instead of a key.

    Raises:
        ConfigError: neither key nor entries.
    """

    parse_line = staticmethod(parse_line)
    serialize_entry = staticmethod(serialize_entry)
    generate_part_key = staticmethod(part_key)

    def __init__(self, store: ExchangeBase, *, key: str | None = None, entries: Iterable[ManifestEntry] | None = None) -> None:
        if key is None and entries is None:
            raise ConfigError("either key or entries must be given", hint="pass the key of a manifest, or a list of entries")
        self._store = store
        self._key = key
        self._entries = None if entries is None else list(entries)

    @classmethod
    def from_key(cls, store: ExchangeBase, key: str) -> Manifest:
        """The manifest under `key`."""
        return cls(store, key=key)

    @classmethod
    def from_entries(cls, store: ExchangeBase, entries: Iterable[ManifestEntry]) -> Manifest:
        """A manifest that is not stored (yet)."""
        return cls(store, entries=entries)

    @classmethod
    def from_ref(cls, store: ExchangeBase, ref: ManifestRefEntry) -> Manifest:
        """The manifest an entry references."""
        return cls(store, key=ref["key"])

    @staticmethod
    def iter_lines(stream: Any, limit: int | None = None) -> Iterator[ManifestEntry]:
        """The entries of a binary stream, as they stand; references are not followed."""
        return iter_entries(iter(lambda: stream.read(1 << 20), b""), limit=limit)

    @staticmethod
    def write_to_s3(client: Any, bucket: str, key: str, entries: Iterable[ManifestEntry]) -> None:
        """Write a manifest with a boto3 client."""
        body = encode_manifest(entries)
        client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=CONTENT_TYPE, Metadata=seal(crc32c(body)))

    @staticmethod
    def read_from_s3(client: Any, bucket: str, key: str) -> Iterator[ManifestEntry]:
        """Read one manifest object with a boto3 client; references are not followed."""
        return iter_manifest(open_store(f"s3://{bucket}", s3_client=client), key, resolve_refs=False)

    @property
    def key(self) -> str | None:
        """Its key, if it has one."""
        return self._key

    @property
    def store(self) -> Any:
        """The `S3ExchangeStore` its keys are in."""
        return self._store

    def __iter__(self) -> Iterator[ManifestEntry]:
        return self.iter_entries()

    def __repr__(self) -> str:
        if self._key is not None:
            return f"Manifest(key={self._key!r})"
        return f"Manifest(entries=[{len(self._entries or [])} entries])"

    # reading

    def iter_entries(self, *, resolve_refs: bool = True, limit: int | None = None) -> Iterator[ManifestEntry]:
        """Its entries, references followed depth first (each manifest once); a shard is one entry.

        Args:
            resolve_refs: Follow references; otherwise they are given as they are.
            limit: Most entries; None: all.

        Raises:
            ManifestNotFoundError: it, or a referenced one, does not exist.
            InvalidManifestError: a line is not understood.
        """
        if self._entries is not None:
            yield from islice(iter_given(self._store.objects, self._entries, resolve_refs=resolve_refs), limit)
        elif self._key is not None:
            yield from iter_manifest(self._store.objects, self._key, resolve_refs=resolve_refs, limit=limit)

    def iter_objects(
        self, *, expand_shards: bool = True, limit: int | None = None
    ) -> Iterator[tuple[ObjectBody, ManifestEntry]]:
        """``(stream, entry)`` for every object and member, in order, fetched ahead within 64 MiB.

        Args:
            expand_shards: Give the members of shards; otherwise the archives themselves.
            limit: Most entries; None: all.

        Raises:
            ExchangeObjectNotFoundError: an object is gone.
            IntegrityError: it has not as many bytes as its entry says, or a member's checksum is wrong.
        """
        if limit is not None and limit <= 0:
            return iter(())
        return islice(iter_contents(self._store.access, self.iter_entries(limit=limit), expand_shards=expand_shards), limit)

    def get_keys(self, *, expand_shards: bool = True, resolve_refs: bool = True, limit: int | None = None) -> Iterator[str]:
        """Keys of all entries; of members, virtual keys (``archive#member``). No contents are read."""
        entries = self.iter_entries(resolve_refs=resolve_refs)
        return islice(iter_keys(self._store.access, entries, expand_shards=expand_shards), limit)

    def list_files(self, *, include_shards: bool = True) -> Iterator[ManifestEntry]:
        """File entries; with `include_shards` members in place of their shards, else the shards' own entries."""
        return iter_files(self._store.access, self.iter_entries(), expand_shards=include_shards)

    def filter_by_prefix(self, prefix: str) -> Iterator[ManifestEntry]:
        """File entries whose key (of members, virtual key) starts with `prefix`."""
        return filter_by_prefix(self._store.access, self.iter_entries(), prefix)

    # writing

    def save(self, entries: Iterable[ManifestEntry] | None = None, *, mode: WriteMode = "overwrite") -> None:
        """Write `entries` (default: its own) under its key.

        Raises:
            ConfigError: it has no key, or an unknown mode.
        """
        if self._key is None:
            raise ConfigError("a manifest without a key cannot be saved", hint="store.write_manifest(key, entries)")
        if entries is None:
            own = self._entries is None
            entries = iter_manifest(self._store.objects, self._key, strict=True) if own else self.iter_entries()
        write_manifest(self._store.objects, self._key, map(entry_of, entries), mode)

    def delete(
        self,
        *,
        delete_manifests: bool = True,
        dedupe: bool = True,
        dry_run: bool = False,
        planned: Callable[[str, str], None] | None = None,
    ) -> DeleteReport:
        """Delete what it lists: objects, archives with their indexes, then its parts and itself.

        Manifests go last, and only if everything they list is gone, so that a deletion that was cut short, or failed for
        some keys, can be run again.

        Args:
            delete_manifests: Also delete the manifest and all it references.
            dedupe: Delete a key that is listed twice once (keeps all keys in memory).
            dry_run: Only count.
            planned: Called with ``("object", "archive" or "manifest", key)`` of all that will be deleted, before anything is;
                the index of an archive goes with it. What it raises ends it.

        Raises:
            ManifestNotFoundError: there is no such manifest.
            InvalidManifestError: it cannot be parsed; nothing was deleted.
            IntegrityError: its bytes are not what was written; nothing was deleted.
        """
        return delete_manifest(
            self._store.objects,
            self._key if self._key is not None else self._entries or [],
            delete_manifests=delete_manifests,
            dedupe=dedupe,
            dry_run=dry_run,
            planned=planned,
        )

    def compact(self, dst_key: str, **options: Unpack[CompactOptions]) -> CompactReport:
        """Write its entries as one manifest under `dst_key`, which appears at once or not at all.

        Compacting onto its own key fails with `ObjectChangedError` if somebody appended meanwhile.

        Args:
            dst_key: Where to.
            options: `resolve_refs` (default: True) puts the entries of references in their place, `apply_deletes` (True) drops
                entries whose object is gone, `expand_shards` (False) puts members in place of their shard, `delete_parts`
                (False) deletes the parts of a manifest that is compacted onto itself.

        Raises:
            ConfigError: `delete_parts` where the parts are still needed.
            ManifestNotFoundError, InvalidManifestError, IntegrityError: it cannot be read; nothing was written.
        """
        return compact(self._store.access, self._entries, self._key, dst_key, **options)


@checked
class Shard(Mapping[str, Any]):
    """One shard; also a read-only mapping: its manifest entry.

    Args:
        store: The `S3ExchangeStore` it is in.
        entry: Its entry. How it is compressed is found from the archive itself.
    """

    infer_archive_format = staticmethod(infer_archive_format)
    create_archive = staticmethod(create_archive)
    split_items = staticmethod(create_shards)

    def __init__(self, store: ExchangeBase, entry: ShardEntry) -> None:
        self._store = store
        self._entry = entry

    @classmethod
    def from_key(cls, store: ExchangeBase, key: str) -> Shard:
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
    def from_entry(cls, store: ExchangeBase, entry: ShardEntry) -> Shard:
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
    def store(self) -> Any:
        """The `S3ExchangeStore` it is in."""
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
        """What reads the archive's index and members by position.

        Raises:
            InvalidManifestError: the entry says what no archive can be.
        """
        return self._members.reader

    @property
    def _members(self) -> ShardMembers:
        return ShardMembers(self._store.access, self._entry)

    # reading

    def get_manifest(self) -> Manifest:
        """The internal manifest, with `archive_key` in each entry."""
        return Manifest(self._store, entries=[*self.iter_entries()])

    def iter_entries(self, limit: int | None = None) -> Iterator[FileEntry]:
        """The entries of its members, in archive order, with `archive_key`; contents are not read.

        Raises:
            ExchangeObjectNotFoundError: there is no such archive.
            ShardReadError: it is damaged, or its internal manifest lists members it does not have.
        """
        return islice(self._members.entries(), limit)

    def iter_objects(self, limit: int | None = None) -> Iterator[tuple[ArchiveMemberBody, FileEntry]]:
        """Members with their entries, in archive order; neighbours are read in one request.

        The internal manifest is not among them (`get_member` gives it by name).

        Raises:
            ExchangeObjectNotFoundError: there is no such archive.
            ShardReadError: it is damaged, or its internal manifest lists members it does not have.
            IntegrityError: a member's checksum is wrong.
        """
        return self._members.contents(limit)

    def get_member(self, path: str) -> ArchiveMemberBody:
        """The member `path`; the last one of that name, as extracting the archive would leave it.

        Raises:
            ExchangeObjectNotFoundError: there is no such member or archive.
            ShardReadError: the archive is damaged.
        """
        return self._members.open(path)

    def delete(self) -> None:
        """Delete the archive and its index."""
        delete_archive(self._store.objects, self.archive_key)
        self._store.access.forget(self.archive_key)


def entry_of(entry: ManifestEntry | Shard) -> ManifestEntry:
    """The manifest entry of a shard; an entry is its own."""
    return entry.entry if isinstance(entry, Shard) else entry


@checked
class ScopedStore:
    """Key templates with some variables filled in; made by `S3ExchangeStore.scope`. It reads and writes nothing itself.

    Args:
        store: The `S3ExchangeStore` whose `base_prefix` and `default_vars` apply.
        vars: Variables of this scope.
    """

    def __init__(self, store: ExchangeBase, vars: Mapping[str, Any]) -> None:
        self.store = store
        self.vars = dict(vars)

    def key(self, template: str, **vars: Any) -> str:
        """`template` resolved; `vars` beat the scope's, which beat the store's defaults.

        Raises:
            MissingPlaceholderError: a placeholder has no value.
        """
        return self.store.resolve_key(template, {**self.vars, **vars})

    def manifest_key(self, name: str) -> str:
        """``{prefix}/<name>/manifest.jsonl``; the scope needs a `prefix`."""
        return self.key("{prefix}/{__name}/manifest.jsonl", __name=name)

    def shard_prefix(self, name: str) -> str:
        """``{prefix}/<name>/shards``; the scope needs a `prefix`."""
        return self.key("{prefix}/{__name}/shards", __name=name)
