"""`S3ExchangeStore`: objects, manifests and shards under one roof (the s3exchange interface)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, Unpack

from s3loader.arguments import checked
from s3loader.errors import ConfigError
from s3loader.exchange import delete
from s3loader.exchange.append import write_manifest
from s3loader.exchange.delete import DeletedKeys
from s3loader.exchange.iterate import KeyedObjects
from s3loader.exchange.keys import (
    infer_id_from_key,
    is_manifest_key,
    is_shard_key,
    is_sidecar_key,
    normalize_key,
    resolve_template,
)
from s3loader.exchange.lines import check_entries, file_entry
from s3loader.exchange.objects import ExchangeBase, ObjectAccess, download, download_all, object_metadata
from s3loader.exchange.pack import Source, pack_shard
from s3loader.exchange.types import (
    CompactOptions,
    CompactReport,
    DeleteReport,
    FileEntry,
    ManifestEntry,
    ShardEntry,
    ShardItem,
    WriteMode,
    WriterKeywords,
)
from s3loader.exchange.views import Manifest, ScopedStore, Shard, entry_of
from s3loader.exchange.writer import ManifestWriter
from s3loader.shard.body import ObjectBody
from s3loader.shard.index import INTERNAL_MANIFEST
from s3loader.store.arguments import checked_key
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import open_store
from s3loader.types import ObjectURL

__all__ = ["S3ExchangeStore", "open_root"]

ManifestLike: TypeAlias = str | Manifest | Iterable[ManifestEntry]


@checked
class S3ExchangeStore(ExchangeBase):
    """Objects, manifests and shards of one bucket or folder.

    Args:
        store: A boto3 S3 client (then give `bucket`), an `S3Settings`, an `ObjectStore`, or a URL
            (``s3://bucket/prefix``, ``file:///folder``, ``memory://name``).
        bucket: The bucket; default: of the settings.
        s3_client: A boto3 S3 client, by name.
        base_prefix: Put in front of keys made from templates (`scope`). Keys given to data calls are literal ...
        prefix_all: ... unless this is set: then every data call works below `base_prefix`, keys in entries and listings
            are relative to it, and templates do not add it again.
        default_vars: Variables for key templates.
        infer_id: Makes an entry's id from its key; default: base name without the last extension.
        verify: Check ETags that manifests record, and CRC32C of members. Turn off to read a manifest whose objects
            were copied by something that changes ETags.

    Raises:
        ConfigError: nothing usable was given.
    """

    def __init__(
        self,
        store: Any = None,
        bucket: str | None = None,
        *,
        s3_client: Any = None,
        base_prefix: str = "",
        prefix_all: bool = False,
        default_vars: Mapping[str, Any] | None = None,
        infer_id: Callable[[str], str] | None = None,
        verify: bool = True,
    ) -> None:
        if (store is None) == (s3_client is None):
            raise ConfigError(
                "give one of: a boto3 S3 client, S3Settings, an ObjectStore, or a URL",
                hint='S3ExchangeStore(s3_client=client, bucket="b") or S3ExchangeStore("s3://b")',
            )
        prefix = normalize_key(base_prefix) if prefix_all else ""
        root, self.bucket, self.s3_client = open_root(store if s3_client is None else s3_client, bucket, prefix)
        self.base_prefix = base_prefix
        self.prefix_all = prefix_all
        self.default_vars = dict(default_vars or {})
        self.infer_id = infer_id or infer_id_from_key
        self.objects = root
        self.access = ObjectAccess(root, verify=verify)

    def __repr__(self) -> str:
        return f"S3ExchangeStore({self.objects.url!r})"

    # keys

    def resolve_key(self, template: str, vars: Mapping[str, Any] | None = None) -> str:
        """The key of a template: variables filled in, normalised, below `base_prefix`.

        Raises:
            MissingPlaceholderError: a placeholder has no value; `.placeholder` says which.
        """
        key = resolve_template(template, vars or {}, self.default_vars)
        return key if self.prefix_all else normalize_key(f"{self.base_prefix}/{key}")

    _resolve_key = resolve_key

    def scope(self, **vars: Any) -> ScopedStore:
        """Key templates with these variables filled in."""
        return ScopedStore(self, vars)

    def is_manifest(self, key: str) -> bool:
        """Whether the suffix says manifest (``.jsonl``)."""
        return is_manifest_key(key)

    def is_shard(self, key: str) -> bool:
        """Whether the suffix says tar archive."""
        return is_shard_key(key)

    def get_manifest(self, key: str) -> Manifest:
        """The manifest under `key`; of a shard's key, its internal manifest."""
        return self.get_shard(key).get_manifest() if is_shard_key(checked_key(key)) else Manifest(self, key=key)

    def get_shard(self, key: str) -> Shard:
        """The shard under `key`."""
        return Shard.from_key(self, key)

    def list_keys(self, prefix: str = "", *, sidecars: bool = False) -> Iterator[str]:
        """Keys that start with `prefix`, in order; the index side-cars of archives only with `sidecars`."""
        return (e.key for e in self.objects.list(prefix) if sidecars or not is_sidecar_key(e.key))

    # objects

    def put_object(
        self,
        key: str,
        data: Source,
        *,
        id: str | None = None,
        meta: dict[str, Any] | None = None,
        content_type: str | None = None,
    ) -> FileEntry:
        """Store an object; its manifest entry.

        Args:
            key: Literal key.
            data: Bytes, the path of a local file (`str` too), or a binary file.
            id: Default: `infer_id` of the key.
            meta: Goes into the entry only.
            content_type: Stored with the object, too.
        """
        body = Path(data) if isinstance(data, str) else data
        result = self.objects.put(key, body, content_type=content_type)
        self.access.forget(key)
        return file_entry(key, self.infer_id(key) if id is None else id, meta, content_type, result.size, result.etag)

    def get_object(self, key: str, *, version_id: str | None = None, resolve_virtual_keys: bool = True) -> ObjectBody:
        """A stream over an object, or over a member (``archive#member``): one ranged GET.

        Raises:
            ExchangeObjectNotFoundError: there is none; `.key`.
            IntegrityError: the member's checksum is wrong.
        """
        return self.access.open(key, version_id=version_id, resolve_virtual_keys=resolve_virtual_keys)

    def get_object_metadata(self, key: str) -> dict[str, Any]:
        """What ``head_object`` of boto3 gives: raw with a boto3 client, the same shape elsewhere.

        Of a virtual key: its archive's, with the member's length as ``ContentLength``.
        """
        return object_metadata(self, key)

    head_object = get_object_metadata

    def exists(self, key: str) -> bool:
        """Whether there is such an object or member. A store that can't be asked is an error, not a no."""
        return self.access.exists(key)

    def download_object(self, key: str, local_path: str | os.PathLike[str]) -> Path:
        """Write an object or member to a local file (whole or not at all); parents are created."""
        return download(self.access, key, local_path)

    def download_objects(self, keys: Iterable[str], local_dir: str | os.PathLike[str]) -> dict[str, Path]:
        """Write objects or members to a folder, each under its base name.

        Raises:
            ConfigError: two keys have the same base name; nothing was downloaded.
        """
        return download_all(self.access, keys, local_dir)

    # iterating

    def iter_manifest_entries(
        self, manifest: ManifestLike, *, resolve_refs: bool = True, limit: int | None = None
    ) -> Iterator[ManifestEntry]:
        """The entries of a manifest, references followed depth first (each manifest once); a shard is one entry.

        Raises:
            ManifestNotFoundError: it, or a referenced one, does not exist.
            InvalidManifestError: a line is not understood.
        """
        return self.as_manifest(manifest).iter_entries(resolve_refs=resolve_refs, limit=limit)

    def iter_objects(
        self, manifest: ManifestLike, *, expand_shards: bool = True, limit: int | None = None
    ) -> Iterator[tuple[ObjectBody, ManifestEntry]]:
        """``(stream, entry)`` for every object and member of a manifest, in order, fetched ahead within 64 MiB.

        Raises:
            ExchangeObjectNotFoundError: an object is gone.
            IntegrityError: it has not as many bytes as its entry says, or a member's checksum is wrong.
        """
        return self.as_manifest(manifest).iter_objects(expand_shards=expand_shards, limit=limit)

    def get_objects(self, manifest: ManifestLike) -> Iterator[tuple[ObjectBody, ManifestEntry]]:
        """As `iter_objects`."""
        return self.iter_objects(manifest)

    def iter_objects_from_keys(
        self,
        keys: Iterable[str],
        *,
        limit: int | None = None,
        on_missing: Literal["raise", "report"] = "raise",
        details: bool = True,
    ) -> KeyedObjects:
        """``(stream, entry)`` for keys, in the order of the keys.

        Args:
            keys: Plain and virtual keys, mixed as you like.
            limit: Most streams; None: all.
            on_missing: ``"raise"`` at the key that is missing, or ``"report"`` it in the iterator's `missing` and go on.
            details: Give the members' full entries (id, meta), which costs one read of each archive's internal
                manifest; without, `id` is made from the key and `meta` is None.
        """
        return KeyedObjects(self.access, keys, infer_id=self.infer_id, limit=limit, on_missing=on_missing, details=details)

    def list_manifest_files(self, manifest: ManifestLike, *, include_shards: bool = True) -> Iterator[ManifestEntry]:
        """File entries; with `include_shards` members in place of their shards, else the shards' own entries."""
        return self.as_manifest(manifest).list_files(include_shards=include_shards)

    def list_by_manifest_prefix(self, manifest: ManifestLike, prefix_filter: str) -> Iterator[ManifestEntry]:
        """Entries whose key or virtual key starts with a prefix."""
        return self.as_manifest(manifest).filter_by_prefix(prefix_filter)

    def as_manifest(self, manifest: ManifestLike) -> Manifest:
        """A manifest of what any method takes as one: a key, entries, or a `Manifest`."""
        if isinstance(manifest, Manifest):
            return manifest
        if isinstance(manifest, str):
            return self.get_manifest(manifest)
        check_entries(manifest)
        return Manifest(self, entries=manifest)

    # manifests and shards

    def write_manifest(self, key: str, entries: Iterable[ManifestEntry | Shard], *, mode: WriteMode = "overwrite") -> None:
        """Write entries as a manifest, or append them to one as a new part (safe beside other appenders).

        Args:
            key: Of the manifest.
            entries: Written verbatim, in this order.
            mode: ``"overwrite"`` replaces what is there, ``"append_parts"`` adds a part, ``"create"`` writes the manifest
                exactly once: the same entries may be written again, as after a lost answer.

        Raises:
            ConfigError: an unknown mode, or what is no entries.
            ObjectExistsError: mode ``"create"``, and another manifest is there.
            InvalidManifestError: an entry no reader would accept, or (append) the manifest there cannot be parsed.
        """
        check_entries(entries)
        write_manifest(self.objects, key, map(entry_of, entries), mode)

    def put_shard_archive(
        self,
        archive_key: str,
        shard_items: Iterable[ShardItem],
        *,
        format: str = "tar",
        compression: str | None = "gzip",
        internal_manifest_path: str = INTERNAL_MANIFEST,
    ) -> Shard:
        """Pack items into an archive with an index; replaces what is under that key.

        Returns:
            The shard: `.entry` for a manifest, and readable as a mapping (``shard["count"]``).
        """
        entry = pack_shard(self.objects, archive_key, shard_items, format, compression, internal_manifest_path)
        self.access.forget(archive_key)
        return Shard(self, entry)

    def put_sharded(
        self, manifest_key: str, shard_entries: Iterable[ShardEntry | Shard], *, update_mode: WriteMode = "append_parts"
    ) -> None:
        """Write shards (entries, or what `put_shard_archive` gave) into a manifest."""
        self.write_manifest(manifest_key, shard_entries, mode=update_mode)

    def open_manifest_writer(self, manifest_key: str, **options: Unpack[WriterKeywords]) -> ManifestWriter:
        """A writer for a manifest, its shards and its objects; the options are those of `ManifestWriter`."""
        return ManifestWriter(self, manifest_key, **options)

    def compact_manifest(
        self, src_manifest_key: str, dst_manifest_key: str, **options: Unpack[CompactOptions]
    ) -> CompactReport:
        """Write a manifest with its parts as one manifest, which appears at once or not at all.

        Args:
            src_manifest_key: What to compact.
            dst_manifest_key: Where to; onto its own key fails with `ObjectChangedError` if somebody appended meanwhile.
            options: Those of `CompactOptions`.

        Raises:
            ConfigError: `delete_parts` where the parts are still needed.
            ManifestNotFoundError, InvalidManifestError, IntegrityError: it cannot be read; nothing was written.
        """
        return Manifest(self, key=src_manifest_key).compact(dst_manifest_key, **options)

    # deleting

    def delete_key(self, key: str, *, dry_run: bool = False) -> DeleteReport:
        """Delete one object; with an archive goes its index. A key that does not exist is no error."""
        return delete.delete_key(self.objects, key, dry_run=dry_run)

    def delete_prefix(
        self,
        prefix: str,
        *,
        regex: str | None = None,
        batch_size: int = 1000,
        allow_all: bool = False,
        dry_run: bool = False,
    ) -> DeletedKeys:
        """Delete every key that starts with `prefix` (and in which `regex` is found); the empty prefix only with `allow_all`.

        `batch_size` is accepted for code written for s3exchange; batches are always of 1,000.
        """
        return delete.delete_prefix(self.objects, prefix, regex=regex, allow_all=allow_all, dry_run=dry_run)

    def delete_manifest(
        self,
        manifest: ManifestLike,
        *,
        delete_manifests: bool = True,
        dedupe: bool = True,
        dry_run: bool = False,
        planned: Callable[[str, str], None] | None = None,
    ) -> DeleteReport:
        """Delete all a manifest lists, its parts and itself; a shard goes with its index. The data goes first, so a call that
        was cut off can be made again. `planned` is called with ``("object", "archive" or "manifest", key)`` of each before."""
        if isinstance(manifest, str):
            manifest = Manifest(self, key=manifest)
        elif not isinstance(manifest, Manifest):
            check_entries(manifest)
            manifest = Manifest(self, entries=manifest)
        return manifest.delete(delete_manifests=delete_manifests, dedupe=dedupe, dry_run=dry_run, planned=planned)


DEFAULT_BUCKET = "default-bucket"
"""The bucket s3exchange falls back to where a client comes without one."""


def open_root(target: Any, bucket: str | None, prefix: str = "") -> tuple[ObjectStore, str, Any]:
    """The store (below `prefix`, where one is given), the bucket's name, and the boto3 client if one was given.

    Raises:
        ConfigError: `target` is none of the four.
    """
    if isinstance(target, ObjectStore):
        name = bucket or ObjectURL.parse(target.url).bucket
        if not prefix:
            return target, name, None
        return target.below(prefix), name, None
    if isinstance(target, (str, os.PathLike, ObjectURL)):
        url = ObjectURL.parse(target)
        return open_store(url.joined(prefix) if prefix else url), bucket or url.bucket, None
    if hasattr(target, "get_object") and hasattr(target, "head_object") and hasattr(target, "meta"):
        name = bucket or DEFAULT_BUCKET
        return open_store(ObjectURL("s3", name, prefix), s3_client=target), name, target
    if hasattr(target, "endpoint_url") and hasattr(target, "aws_access_key_id"):
        name = bucket or target.bucket
        if not name:
            raise ConfigError("no bucket", hint="pass bucket=, or set S3_BUCKET")
        return open_store(ObjectURL("s3", name, prefix), settings=target), name, None
    raise ConfigError(
        f"cannot make a store of {type(target).__name__}",
        hint="give a boto3 S3 client, S3Settings, an ObjectStore, or a URL",
    )
