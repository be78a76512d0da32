"""Deleting exactly what was asked for: by key, by prefix, by manifest; with a report, and dry runs."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias

from s3loader.errors import ConfigError, ObjectNotFoundError
from s3loader.exchange.commit import describe, new_spool
from s3loader.exchange.keys import is_shard_key, is_sidecar_key, split_virtual_key
from s3loader.exchange.reading import read_manifest_object
from s3loader.exchange.types import DeleteReport, ManifestEntry
from s3loader.shard.index import index_key, second_index_key
from s3loader.store.arguments import checked_key
from s3loader.store.objectstore import ObjectStore

__all__ = [
    "DeletedKeys",
    "UploadedKeys",
    "Written",
    "delete_archive",
    "delete_key",
    "delete_manifest",
    "delete_prefix",
    "empty_report",
    "remove_written",
]


class DeletedKeys(int):
    """How many keys `delete_prefix` deleted; an int with the details.

    Index side-cars go with their archives and are not counted, as `list_keys` does not list them.
    """

    keys: list[str]
    """The keys, side-cars included; only of a dry run (a real one may be too large to keep)."""
    sidecars: int
    """Index side-cars deleted."""
    errors: dict[str, str]
    """Key to message, for what could not be deleted."""


def empty_report() -> DeleteReport:
    """A report of nothing."""
    return {"deleted_object_count": 0, "deleted_archive_count": 0, "deleted_manifest_count": 0, "errors": {}}


def delete_archive(store: ObjectStore, key: str) -> None:
    """Delete an archive and its index."""
    for failure in store.delete_many(with_indexes(key)):
        raise failure.error


def with_indexes(archive_key: str) -> list[str]:
    """What goes with an archive: its index, whoever wrote it. Keys that do not exist are no error to delete."""
    return [index_key(archive_key), second_index_key(archive_key), archive_key]


def delete_key(store: ObjectStore, key: str, *, dry_run: bool = False) -> DeleteReport:
    """Delete one object; with an archive goes its index. A key that does not exist is no error.

    Raises:
        ConfigError: a member of an archive, which cannot be deleted by itself.
        S3LoaderError: the store refused.
    """
    virtual = split_virtual_key(checked_key(key))
    if virtual is not None and is_shard_key(virtual[0]) and not store.exists(key):
        raise ConfigError(
            f"{key!r} is a member of an archive and cannot be deleted by itself", hint="rewrite the shard without it"
        )
    report = empty_report()
    shard = is_shard_key(key)
    keys = with_indexes(key) if shard else [key]
    for failure in [] if dry_run else store.delete_many(keys):
        raise failure.error
    report["deleted_archive_count" if shard else "deleted_object_count"] = 1
    return report


def delete_prefix(
    store: ObjectStore, prefix: str, *, regex: str | None = None, allow_all: bool = False, dry_run: bool = False
) -> DeletedKeys:
    """Delete every key that starts with `prefix`, literally.

    Args:
        store: The store.
        prefix: A string prefix: ``"a/b"`` also matches ``"a/bc"``.
        regex: Only keys in which this is found somewhere (`re.search`; anchor it yourself).
        allow_all: Needed for an empty prefix.
        dry_run: Only say what would be deleted.

    Raises:
        ConfigError: an empty prefix without `allow_all`, or a bad regular expression.
    """
    if not prefix and not allow_all:
        raise ConfigError(
            "an empty prefix deletes everything in the store", hint="pass allow_all=True if that is what you want"
        )
    try:
        pattern = re.compile(regex) if regex is not None else None
    except (re.error, TypeError) as error:
        raise ConfigError(f"bad regular expression {regex!r}: {error}", hint="re.escape() takes a text literally") from error
    wanted = UploadedKeys()  # the whole listing first: nothing is deleted from under it
    try:
        for entry in store.list(prefix):
            if pattern is None or pattern.search(entry.key):
                wanted.note("index" if is_sidecar_key(entry.key) else "object", entry.key)
        failures = {} if dry_run else {f.key: describe(f.error) for f in store.delete_many(key for _, key in wanted)}
        done = [what for what, key in wanted if key not in failures]
        result = DeletedKeys(done.count("object"))
        result.sidecars = done.count("index")
        result.keys = [key for _, key in wanted] if dry_run else []
        result.errors = failures
        return result
    finally:
        wanted.close()


def delete_manifest(
    store: ObjectStore,
    manifest: str | Iterable[ManifestEntry],
    *,
    delete_manifests: bool = True,
    dedupe: bool = True,
    dry_run: bool = False,
    planned: Callable[[Written, str], None] | None = None,
) -> DeleteReport:
    """Delete what a manifest lists: objects, archives with their indexes, then its parts and itself.

    Manifests go last, and only if everything they list is gone, so that a deletion that was cut short
    or failed for some keys can be run again. Of the rest the first entry goes last: where it is, the others are found.

    Args:
        store: The store.
        manifest: Its key, or entries.
        delete_manifests: Also delete the manifest and all it references.
        dedupe: Delete a key that is listed twice once (keeps all keys in memory).
        dry_run: Only count.
        planned: Called with ``("object", "archive" or "manifest", key)`` of all that will be deleted, before anything is; the
            index of an archive goes with it. What it raises ends it.

    Raises:
        ManifestNotFoundError: there is no such manifest.
        InvalidManifestError: it cannot be parsed; nothing was deleted.
        IntegrityError: its bytes are not what was written; nothing was deleted.
    """
    report = empty_report()
    wanted, first = UploadedKeys(), UploadedKeys()
    try:
        manifests: list[str] = []
        _collect(store, manifest, wanted, first, manifests, report["errors"], dedupe)
        if planned is not None:
            for what, key in itertools.chain(wanted, first):
                planned(what, key)
            for key in reversed(manifests) if delete_manifests and not report["errors"] else ():
                planned("manifest", key)
        lost = len(report["errors"])
        _delete_written(store, wanted, report, dry_run=dry_run)
        if len(report["errors"]) == lost:
            _delete_written(store, first, report, dry_run=dry_run)
        if delete_manifests and not report["errors"]:
            parts = UploadedKeys()
            for key in reversed(manifests):
                parts.note("manifest", key)
            _delete_written(store, parts, report, dry_run=dry_run)
            parts.close()
        return report
    finally:
        wanted.close()
        first.close()


def _collect(
    store: ObjectStore,
    manifest: str | Iterable[ManifestEntry],
    wanted: UploadedKeys,
    first: UploadedKeys,
    manifests: list[str],
    errors: dict[str, str],
    dedupe: bool,
) -> None:
    seen: set[str] = set()
    visited: set[str] = set()
    pending: list[str] = []

    def take(entries: Iterable[ManifestEntry]) -> None:
        for entry in entries:
            if entry["kind"] == "manifest_ref":
                if entry["key"] not in visited:
                    visited.add(entry["key"])
                    pending.append(entry["key"])
                continue
            what, key = _target(entry)
            if dedupe:
                if key in seen:
                    continue
                seen.add(key)
            (wanted if len(first) else first).note(what, key)

    if isinstance(manifest, str):
        visited.add(manifest)
        manifests.append(manifest)
        take(read_manifest_object(store, manifest, strict=True))
    else:
        take(manifest)
    while pending:
        key = pending.pop()
        try:
            take(read_manifest_object(store, key, strict=True))
            manifests.append(key)
        except ObjectNotFoundError as error:
            errors[key] = describe(error)


def _target(entry: ManifestEntry) -> tuple[Written, str]:
    """What deleting an entry deletes: of a member of an archive, the archive."""
    if entry["kind"] == "shard":
        return "archive", entry["archive_key"]
    assert entry["kind"] == "file"
    if "archive_key" in entry:
        return "archive", entry["archive_key"]
    virtual = split_virtual_key(entry["key"]) if "member_path" in entry else None
    return ("archive", virtual[0]) if virtual is not None else ("object", entry["key"])


def _delete_written(store: ObjectStore, wanted: UploadedKeys, report: DeleteReport, *, dry_run: bool) -> None:
    """Delete what `wanted` lists, and count it in `report`."""

    def keys() -> Iterator[str]:
        for what, key in wanted:
            yield from with_indexes(key) if what == "archive" else [key]

    failed = {} if dry_run else {failure.key: describe(failure.error) for failure in store.delete_many(keys())}
    report["errors"].update(failed)
    for what, key in wanted:
        if key not in failed:
            if what == "object":
                report["deleted_object_count"] += 1
            elif what == "archive":
                report["deleted_archive_count"] += 1
            elif what == "manifest":
                report["deleted_manifest_count"] += 1


def remove_written(store: ObjectStore, uploaded: UploadedKeys) -> DeleteReport:
    """Delete everything a writer noted."""
    report = empty_report()
    _delete_written(store, uploaded, report, dry_run=False)
    return report


Written: TypeAlias = Literal["object", "archive", "index", "manifest"]


class UploadedKeys:
    """An append-only list of ``(what, key)``, on disk once it is long; safe to write from several threads."""

    def __init__(self) -> None:
        self._file = new_spool()
        self._lock = threading.Lock()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def note(self, what: Written, key: str) -> None:
        """`key` is about to be written."""
        line = json.dumps([what, key]).encode("ascii") + b"\n"
        with self._lock:
            self._file.seek(0, 2)
            self._file.write(line)
            self._count += 1

    def __iter__(self) -> Iterator[tuple[Written, str]]:
        with self._lock:
            self._file.seek(0)
            at = 0
        while True:
            with self._lock:
                self._file.seek(at)
                lines = self._file.readlines(1 << 16)
                at = self._file.tell()
            if not lines:
                return
            for line in lines:
                what, key = json.loads(line)
                yield what, key

    def summary(self, shown: int = 10) -> str:
        """The first keys, for a note on an exception."""
        keys = [key for _, (what, key) in zip(range(4 * shown), self, strict=False) if what != "index"][:shown]
        more = [f"... ({self._count} writes in all)"] if self._count > len(keys) else []
        return ", ".join(keys + more)

    def forget(self, what: Written) -> None:
        """Take out the keys of one kind: they were removed."""
        kept = UploadedKeys()
        for kind, key in self:
            if kind != what:
                kept.note(kind, key)
        with self._lock:
            self._file.close()
            self._file, self._count = kept._file, kept._count

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._file.seek(0)
            self._file.truncate()
            self._count = 0

    def close(self) -> None:
        """Drop the file; nothing is listed any more."""
        self._file.close()
        self._count = 0
