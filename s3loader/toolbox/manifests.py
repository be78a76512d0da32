"""Manifests by their URLs: what they list, and making them of objects, folders and other manifests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Unpack, cast

from s3loader.arguments import checked
from s3loader.errors import (
    ConfigError,
    InvalidManifestError,
    ManifestNotFoundError,
    ObjectExistsError,
    ObjectNotFoundError,
    PartialFailureError,
    ShardReadError,
    StoreError,
)
from s3loader.exchange.append import append_entries, write_manifest
from s3loader.exchange.commit import is_part_key
from s3loader.exchange.keys import infer_id_from_key, is_shard_key, is_sidecar_key
from s3loader.exchange.lines import file_entry
from s3loader.exchange.reading import iter_manifest
from s3loader.exchange.store import S3ExchangeStore
from s3loader.exchange.types import CompactOptions, CompactReport, DeleteReport, ManifestEntry, ShardEntry
from s3loader.exchange.views import Manifest
from s3loader.loader.sources import rooted
from s3loader.loader.urls import is_pattern, one_store, split_url
from s3loader.shard.compression import infer_archive_format
from s3loader.shard.index import INTERNAL_MANIFEST, index_key, is_foreign, read_counts
from s3loader.store import ObjectStore, open_store
from s3loader.store.bulk import ReadFailure
from s3loader.store.open import StoreKeywords
from s3loader.types import Location, ObjectMeta, ObjectURL, ReadRequest
from s3loader.units import KIB

__all__ = [
    "Written",
    "append_to_manifest",
    "compact",
    "delete_manifest",
    "manifest_from_prefix",
    "merge_manifests",
    "open_manifest",
    "parts_of",
]

_HEAD: Final = 4 * KIB


class Written(NamedTuple):
    """What was written into a manifest."""

    url: str
    entries: int
    shards: int
    """Of them."""
    repeated: int
    """Entries left out because another one has the same key."""


@checked
def open_manifest(url: Location, **place: Unpack[StoreKeywords]) -> tuple[S3ExchangeStore, str]:
    """The store that a manifest's keys are in, and the manifest's key there.

    Raises:
        ManifestNotFoundError: there is none.
        InvalidManifestError: it cannot be read, or its first entry exists nowhere above it.
    """
    root, key = split_url(url)
    store, key, _ = rooted(open_store(root, **place), root, key, place)
    return S3ExchangeStore(store), key


@checked
def delete_manifest(
    url: Location,
    *,
    root: Location | None = None,
    dry_run: bool = False,
    planned: Callable[[str, str], None] | None = None,
    **place: Unpack[StoreKeywords],
) -> DeleteReport:
    """Delete what a manifest lists, with the indexes of its shards, then its parts and itself; nothing else.

    The manifests go last and only if all that they list is gone, so that a deletion that was cut short, or failed for some,
    can be made again.

    Args:
        url: Of the manifest.
        root: The folder that its keys are relative to; default: where its first entry is, if that is certain.
        dry_run: Only say what would be deleted.
        planned: Called with ``("object", "archive" or "manifest", URL)`` of all that will be deleted, before anything is.
        place: Keywords of `open_store`.

    Raises:
        ManifestNotFoundError: there is none.
        InvalidManifestError, IntegrityError: it cannot be read, or its first entry is gone; nothing was deleted.
        ConfigError: its keys may be relative to another folder; nothing was deleted.
        PartialFailureError: some could not be deleted, or a part is missing; the manifest is still there.
    """
    if root is not None:
        exchange = S3ExchangeStore(open_store(root, **place))
        key = _key_in(exchange.objects, url)
    else:
        try:
            exchange, key = open_manifest(url, **place)
        except InvalidManifestError as error:
            error.hint = _ROOT_HINT if "first entry" in error.message else error.hint
            raise
        _be_certain(exchange.objects, key)
    where = ObjectURL.parse(exchange.objects.url)

    def said(what: str, name: str) -> None:
        if planned is not None:
            planned(what, str(where.joined(name)))

    report = exchange.delete_manifest(key, dry_run=dry_run, planned=said)
    if report["errors"]:
        failures = tuple((str(where.joined(name)), StoreError(why)) for name, why in report["errors"].items())
        failed, why = failures[0]
        raise PartialFailureError(
            f"{len(failures)} could not be deleted, so the manifest is still there; first {failed}: {why.message}",
            failures=failures,
            report=report,
            hint="mend that and delete it again; what is gone already is no error then",
        )
    return report


_ROOT_HINT: Final = "say which folder its keys are relative to: --root URL (root=)"


def _be_certain(store: ObjectStore, key: str) -> None:
    """Refuse a folder above the manifest in which there is an object of the first entry's name that may be another one."""
    first = next(iter_manifest(store, key, resolve_refs=False), None)
    if first is None or "/" not in key or first["kind"] == "manifest_ref":  # the names of parts are random
        return
    recorded = (first.get("meta") or {}).get("etag")
    name = str(first.get("archive_key") or first.get("key"))
    if recorded is None or store.head(name).etag != recorded:
        raise ConfigError(
            f"its first entry {name!r} may be another object of this name: its ETag is not the one that is noted",
            url=f"{store.url}/{key}",
            hint=_ROOT_HINT,
        )


def parts_of(store: S3ExchangeStore, key: str) -> list[str]:
    """Keys of the manifest's own parts: what appends have written."""
    listed = iter_manifest(store.objects, key, resolve_refs=False)
    return [entry["key"] for entry in listed if entry["kind"] == "manifest_ref" and is_part_key(key, entry["key"])]


@checked
def compact(
    source: Location, target: Location | None = None, *, place: StoreKeywords | None = None, **options: Unpack[CompactOptions]
) -> CompactReport:
    """Write the manifest `source` with its parts as one manifest, onto itself or as `target` beside it.

    Args:
        source: URL of the manifest.
        target: Where to; None: onto itself.
        place: Keywords of `open_store`.
        options: Those of `S3ExchangeStore.compact_manifest`.

    Raises:
        ConfigError: `target` is not below the folder that the manifest's keys are relative to.
        ManifestNotFoundError, InvalidManifestError, IntegrityError: it cannot be read; nothing was written.
    """
    store, key = open_manifest(source, **(place or {}))
    return Manifest(store, key=key).compact(key if target is None else _key_in(store.objects, target), **options)


@checked
def append_to_manifest(manifest: Location, urls: Sequence[Location], **place: Unpack[StoreKeywords]) -> Written:
    """Add objects and shards to a manifest as one new part, safe beside other appenders; one that is missing is made.

    Args:
        manifest: URL of the manifest.
        urls: Of objects, shards, patterns of them, or folders of shards (ending in ``/``); below the manifest's folder, or the
            folder above it that its keys are relative to.
        place: Keywords of `open_store`.

    Raises:
        ObjectNotFoundError: one is not there; nothing was written.
        ConfigError: one lies elsewhere.
    """
    try:
        exchange, key = open_manifest(manifest, **place)
        store = exchange.objects
    except ManifestNotFoundError:
        folder, key = ObjectURL.parse(manifest).split()
        store = open_store(folder, **place)
    there = {_identity(entry) for entry in iter_manifest(store, key)} if store.exists(key) else set()
    metas: list[ObjectMeta] = []
    for url in urls:
        found, keys = one_store([os.fspath(url) if isinstance(url, os.PathLike) else str(url)], None, place, patterns=True)
        root = ObjectURL.parse(found.url)
        metas += [store.head(_key_in(store, root.joined(name))) for name in keys]
    entries = list(_described(store, metas))
    new = [entry for entry in entries if _identity(entry) not in there]
    append_entries(store, key, new)
    return _written(f"{store.url}/{key}", new, len(entries) - len(new))


@checked
def merge_manifests(
    sources: Sequence[Location], target: Location, *, overwrite: bool = False, **place: Unpack[StoreKeywords]
) -> Written:
    """Write one manifest with the entries of several, in their order; an entry whose key was there before is left out.

    Args:
        sources: URLs of manifests of one bucket, or of local folders.
        target: URL of the new one. Its keys are relative to the folder that all of them and itself lie in.
        overwrite: Replace a manifest at `target`.
        place: Keywords of `open_store`.

    Raises:
        ObjectExistsError: there is a manifest at `target`.
        ConfigError: they are of several buckets.
        ManifestNotFoundError, InvalidManifestError: one cannot be read; nothing was written.
    """
    opened = [open_manifest(source, **place) for source in sources]
    store, key = _common([exchange.objects.url for exchange, _ in opened], target, place)
    _refuse_existing(store, key, overwrite)
    seen: set[str] = set()
    entries: list[ManifestEntry] = []
    repeated = 0
    for exchange, name in opened:
        before = _below(store.url, exchange.objects.url)
        for entry in iter_manifest(exchange.objects, name):
            moved = _moved(entry, before)
            if (identity := _identity(moved)) in seen:
                repeated += 1
                continue
            seen.add(identity)
            entries.append(moved)
    if not entries:
        raise ConfigError("the manifests list nothing", hint="are these the right ones?")
    write_manifest(store, key, entries, "overwrite" if overwrite else "create")
    return _written(f"{store.url}/{key}", entries, repeated)


@checked
def manifest_from_prefix(
    url: Location, target: Location, *, overwrite: bool = False, **place: Unpack[StoreKeywords]
) -> Written:
    """Write a manifest of what lies in a folder: tar archives as shards, all else as objects; in order of keys.

    Indexes of shards, manifests with their parts, hidden objects and empty ones that stand for folders are left out. Of a shard
    with an index the number of members is noted, of another nobody knows it before the dataset is opened.

    Args:
        url: The folder, or a pattern of keys in it (``s3://bucket/train/*.tar``).
        target: URL of the manifest, in the same bucket. Its keys are relative to the folder that both lie in.
        overwrite: Replace a manifest at `target`.
        place: Keywords of `open_store`.

    Raises:
        ObjectNotFoundError: there is nothing.
        ObjectExistsError: there is a manifest at `target`.
    """
    text = os.fspath(url) if isinstance(url, os.PathLike) else str(url)
    if is_pattern(text):
        found, keys = one_store([text], None, place, patterns=True)
        root = ObjectURL.parse(found.url)
        urls = [root.joined(name) for name in keys]
        store, key = _common([url.split()[0] for url in urls], target, place)
        before = ""
        metas: Iterable[ObjectMeta] = (store.head(_key_in(store, url)) for url in urls)
    else:
        folder = ObjectURL.parse(text)
        store, key = _common([str(folder)], target, place)
        before = _below(store.url, str(folder).rstrip("/"))
        metas = (meta for meta in store.list(before) if isinstance(meta, ObjectMeta))
    _refuse_existing(store, key, overwrite)
    kept = [meta for meta in metas if _is_data(meta, before, key)]
    if not kept:
        raise ObjectNotFoundError("there is nothing to list", op="list", url=text, hint="check the URL")
    entries = list(_described(store, kept))
    write_manifest(store, key, entries, "overwrite" if overwrite else "create")
    return _written(f"{store.url}/{key}", entries, 0)


# -- entries ----------------------------------------------------------------------------------------


def _described(store: ObjectStore, metas: Sequence[ObjectMeta]) -> Iterator[ManifestEntry]:
    counts = _counts(store, [meta for meta in metas if is_shard_key(meta.key)])
    for meta in metas:
        if not is_shard_key(meta.key):
            yield file_entry(meta.key, infer_id_from_key(meta.key), None, meta.content_type, meta.size, meta.etag or None)
            continue
        form, compression = infer_archive_format(meta.key)
        entry: dict[str, Any] = {
            "kind": "shard",
            "archive_key": meta.key,
            "format": form,
            "compression": compression,
            "internal_manifest_path": INTERNAL_MANIFEST,
            "count": counts.get(meta.key),
            "size_bytes": meta.size,
            "meta": {"etag": meta.etag} if meta.etag else None,
        }
        yield cast("ShardEntry", {name: value for name, value in entry.items() if name != "count" or value is not None})


def _counts(store: ObjectStore, metas: Sequence[ObjectMeta]) -> dict[str, int]:
    """Members of the shards that have an index of this very version beside them."""
    versions = {meta.key: (meta.etag, meta.size) for meta in metas}
    found: dict[str, int] = {}
    requests = (ReadRequest(index_key(key), 0, _HEAD, tag=key) for key in versions)
    for answer in store.read_many(requests, errors="return"):
        key = answer.request.tag
        if isinstance(answer, ReadFailure):
            if not isinstance(answer.error, ObjectNotFoundError):
                raise answer.error
            continue
        try:
            counts = None if is_foreign(answer.data) else read_counts(bytes(answer.data), answer.size)
        except ShardReadError:
            continue  # a damaged one is found and made again when the dataset is opened
        if counts is not None and (counts.archive_etag, counts.archive_size) == versions[key]:
            found[key] = counts.members
    return found


def _is_data(meta: ObjectMeta, before: str, manifest: str) -> bool:
    name = meta.key[len(before) :]
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    folder = meta.size == 0 and meta.key.endswith("/")
    return not (hidden or folder or is_sidecar_key(meta.key) or meta.key == manifest or is_part_key(manifest, meta.key))


def _identity(entry: ManifestEntry) -> str:
    return f"{entry['kind']} {entry.get('archive_key') if entry['kind'] == 'shard' else entry.get('key')}"


def _moved(entry: ManifestEntry, before: str) -> ManifestEntry:
    """The entry with its keys below `before`."""
    moved: dict[str, Any] = dict(entry)
    for name in ("key", "archive_key"):
        if isinstance(moved.get(name), str):
            moved[name] = before + moved[name]
    return cast("ManifestEntry", moved)


def _written(url: str, entries: Sequence[ManifestEntry], repeated: int) -> Written:
    return Written(url, len(entries), sum(entry["kind"] == "shard" for entry in entries), repeated)


# -- places -----------------------------------------------------------------------------------------


def _common(folders: Iterable[Location], target: Location, place: StoreKeywords) -> tuple[ObjectStore, str]:
    """The store at the folder that all of `folders` and the manifest `target` lie in, and the manifest's key there."""
    where = ObjectURL.parse(target)
    if where.scheme != "file" and not where.key:
        raise ConfigError(f"{where} names no object", hint="end it with the manifest's name, such as /manifest.jsonl")
    urls = list(dict.fromkeys(ObjectURL.parse(folder) for folder in folders))
    roots = {(url.scheme, url.bucket) for url in (where, *urls)}
    if len(roots) != 1:
        raise ConfigError(
            "they lie in several stores: " + ", ".join(sorted(f"{scheme}://{bucket}" for scheme, bucket in roots)),
            hint="the keys of a manifest are of one bucket; copy the objects first (s3loader cp)",
        )
    paths = [url.key.strip("/").split("/") if url.key.strip("/") else [] for url in urls]
    paths.append(where.key.strip("/").split("/")[:-1])
    common = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    path = "/".join(common)
    root = ObjectURL(where.scheme, where.bucket, f"/{path}" if where.scheme == "file" else path)
    return open_store(root, **place), "/".join(where.key.strip("/").split("/")[len(common) :])


def _below(root: str, folder: str) -> str:
    """What the keys of the store at `folder` begin with in the store at `root`."""
    above, below = (ObjectURL.parse(url).key.strip("/") for url in (root, folder))
    rest = below[len(above) :].strip("/")
    return f"{rest}/" if rest else ""


def _key_in(store: ObjectStore, url: Location) -> str:
    root, where = ObjectURL.parse(store.url), ObjectURL.parse(url)
    above = root.key.strip("/")
    key = where.key.strip("/")
    inside = not above or key.startswith(f"{above}/")
    if (root.scheme, root.bucket) != (where.scheme, where.bucket) or not inside:
        raise ConfigError(
            f"{where} does not lie below {store.url}", hint="the keys of a manifest are relative to a folder it lies in"
        )
    return key[len(above) :].strip("/")


def _refuse_existing(store: ObjectStore, key: str, overwrite: bool) -> None:
    if not overwrite and store.exists(key):
        raise ObjectExistsError(
            "there is a manifest already",
            op="write",
            url=f"{store.url}/{key}",
            hint="another name, or --overwrite (overwrite=True)",
        )
