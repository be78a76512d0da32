"""`Manifest`: a manifest under a key, or a list of entries, as the exchange API shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Unpack

from s3loader.errors import ConfigError
from s3loader.exchange.commit import append_entries, part_key, publish_manifest
from s3loader.exchange.iteration import iter_contents, iter_files
from s3loader.exchange.lines import CONTENT_TYPE, encode_manifest, iter_entries, parse_line, serialize_entry
from s3loader.exchange.reading import iter_manifest, read_manifest_lines
from s3loader.exchange.removal import delete_manifest
from s3loader.exchange.shard import Shard
from s3loader.exchange.types import CompactOptions, CompactReport, DeleteReport, ManifestEntry, ManifestRefEntry, WriteMode
from s3loader.shard.body import ObjectBody

if TYPE_CHECKING:
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["Manifest"]


class Manifest:
    """Entries under a key, or given.

    Args:
        store: The store its keys are in.
        key: Key of the manifest.
        entries: Entries, instead of a key.

    Raises:
        ConfigError: neither key nor entries.
    """

    parse_line = staticmethod(parse_line)
    serialize_entry = staticmethod(serialize_entry)
    generate_part_key = staticmethod(part_key)

    def __init__(
        self, store: S3ExchangeStore, *, key: str | None = None, entries: Iterable[ManifestEntry] | None = None
    ) -> None:
        if key is None and entries is None:
            raise ConfigError("either key or entries must be given", hint="pass the key of a manifest, or a list of entries")
        self._store = store
        self._key = key
        self._entries = None if entries is None else list(entries)

    @classmethod
    def from_key(cls, store: S3ExchangeStore, key: str) -> Manifest:
        """The manifest under `key`."""
        return cls(store, key=key)

    @classmethod
    def from_entries(cls, store: S3ExchangeStore, entries: Iterable[ManifestEntry]) -> Manifest:
        """A manifest that is not stored (yet)."""
        return cls(store, entries=entries)

    @classmethod
    def from_ref(cls, store: S3ExchangeStore, ref: ManifestRefEntry) -> Manifest:
        """The manifest an entry references."""
        return cls(store, key=ref["key"])

    @staticmethod
    def iter_lines(stream: Any, limit: int | None = None) -> Iterator[ManifestEntry]:
        """The entries of a binary stream, as they stand; references are not followed."""
        return iter_entries(iter(lambda: stream.read(1 << 20), b""), limit=limit)

    @staticmethod
    def write_to_s3(client: Any, bucket: str, key: str, entries: Iterable[ManifestEntry]) -> None:
        """Write a manifest with a boto3 client."""
        client.put_object(Bucket=bucket, Key=key, Body=encode_manifest(entries), ContentType=CONTENT_TYPE)

    @staticmethod
    def read_from_s3(client: Any, bucket: str, key: str) -> Iterator[ManifestEntry]:
        """Read one manifest object with a boto3 client; references are not followed."""
        from s3loader.store.open import open_store

        return iter_manifest(open_store(f"s3://{bucket}", s3_client=client), key, resolve_refs=False)

    @property
    def key(self) -> str | None:
        """Its key, if it has one."""
        return self._key

    @property
    def store(self) -> S3ExchangeStore:
        """The store its keys are in."""
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

        Raises:
            ManifestNotFoundError: it, or a referenced one, does not exist.
            InvalidManifestError: a line is not understood.
        """
        if self._entries is None:
            assert self._key is not None
            yield from iter_manifest(self._store.objects, self._key, resolve_refs=resolve_refs, limit=limit)
            return
        yield from islice(self._given(resolve_refs), limit)

    def iter_own_lines(self) -> Iterator[tuple[ManifestEntry, bytes | None]]:
        """Its entries, references not followed, each with its line where it stands in a store.

        Raises: as `iter_entries`.
        """
        if self._entries is None:
            assert self._key is not None
            return read_manifest_lines(self._store.objects, self._key)
        return ((entry, None) for entry in self._entries)

    def _given(self, resolve_refs: bool) -> Iterator[ManifestEntry]:
        visited: set[str] = set()
        for entry in self._entries or []:
            if resolve_refs and entry["kind"] == "manifest_ref":
                yield from iter_manifest(self._store.objects, entry["key"], visited=visited)
            else:
                yield entry

    def iter_objects(
        self, *, expand_shards: bool = True, limit: int | None = None
    ) -> Iterator[tuple[ObjectBody, ManifestEntry]]:
        """``(stream, entry)`` for every object and member, in order, fetched ahead within bounds.

        Raises:
            ExchangeObjectNotFoundError: an object is gone.
            ObjectChangedError: it is not the one the manifest recorded.
            IntegrityError: a member's checksum is wrong.
        """
        if limit is not None and limit <= 0:
            return iter(())
        return islice(iter_contents(self._store, self.iter_entries(limit=limit), expand_shards=expand_shards), limit)

    def get_keys(self, *, expand_shards: bool = True, resolve_refs: bool = True, limit: int | None = None) -> Iterator[str]:
        """Keys of all entries; of members, virtual keys (``archive#member``). No contents are read."""
        entries = iter_files(self._store, self.iter_entries(resolve_refs=resolve_refs), expand_shards=expand_shards)
        return islice((_key_of(entry) for entry in entries), limit)

    def list_files(self, *, include_shards: bool = True) -> Iterator[ManifestEntry]:
        """File entries; with `include_shards` members in place of their shards, else the shards' own entries."""
        return iter_files(self._store, self.iter_entries(), expand_shards=include_shards)

    def filter_by_prefix(self, prefix: str) -> Iterator[ManifestEntry]:
        """File entries whose key (of members, virtual key) starts with `prefix`."""
        for entry in self.iter_entries():
            if entry["kind"] != "shard":
                if entry["key"].startswith(prefix):
                    yield entry
                continue
            archive = entry["archive_key"] + "#"
            if archive.startswith(prefix) or prefix.startswith(archive):
                for member in Shard.from_entry(self._store, entry).iter_entries():
                    if member["key"].startswith(prefix):
                        yield member

    # writing

    def save(self, entries: Iterable[ManifestEntry] | None = None, *, mode: WriteMode = "overwrite") -> None:
        """Write `entries` (default: its own) under its key.

        Raises:
            ConfigError: it has no key, or an unknown mode.
        """
        if self._key is None:
            raise ConfigError("a manifest without a key cannot be saved", hint="store.write_manifest(key, entries)")
        self._store.write_manifest(self._key, self.iter_entries() if entries is None else entries, mode=mode)

    def delete(self, *, delete_manifests: bool = True, dedupe: bool = True, dry_run: bool = False) -> DeleteReport:
        """Delete all it lists, and itself: see `S3ExchangeStore.delete_manifest`."""
        return delete_manifest(
            self._store.objects,
            self._key if self._key is not None else self._entries or [],
            delete_manifests=delete_manifests,
            dedupe=dedupe,
            dry_run=dry_run,
        )

    def compact(self, dst_key: str, **options: Unpack[CompactOptions]) -> CompactReport:
        """Write it as one manifest: see `S3ExchangeStore.compact_manifest`."""
        from s3loader.exchange.compaction import compact

        return compact(self._store, self, dst_key, **options)


def write_manifest(store: S3ExchangeStore, key: str, entries: Iterable[ManifestEntry], mode: str) -> None:
    """See `S3ExchangeStore.write_manifest`."""
    if mode == "overwrite":
        publish_manifest(store.objects, key, entries)
    elif mode == "append_parts":
        append_entries(store.objects, key, entries)
    else:
        raise ConfigError(f"Invalid mode: {mode}", hint='"overwrite" or "append_parts"')


def _key_of(entry: ManifestEntry) -> str:
    return entry["archive_key"] if entry["kind"] == "shard" else entry["key"]
