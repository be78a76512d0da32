"""Reading manifests from a store: streamed, references followed, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from s3loader.errors import InvalidManifestError, ObjectNotFoundError
from s3loader.exchange.errors import ManifestNotFoundError
from s3loader.exchange.lines import iter_entries
from s3loader.exchange.types import ManifestEntry
from s3loader.shard.source import read_chunks
from s3loader.store.objectstore import ObjectStore

__all__ = ["MAX_DEPTH", "iter_manifest", "read_manifest_object"]

MAX_DEPTH: Final = 100
"""Deepest chain of references followed: deeper is a mistake, and each level holds an open stream."""


def read_manifest_object(store: ObjectStore, key: str, *, limit: int | None = None) -> Iterator[ManifestEntry]:
    """The entries of one manifest object as they stand in it, references included.

    Raises:
        ManifestNotFoundError: there is no such object.
        InvalidManifestError: a line is none of ours; `.line_number` and the message say which.
    """
    try:
        _, chunks = read_chunks(store, key)
    except ObjectNotFoundError as error:
        raise ManifestNotFoundError(key, op="read", url=error.url, status=error.status) from error
    try:
        yield from iter_entries(chunks, limit=limit)
    except InvalidManifestError as error:
        url = f"{store.url.rstrip('/')}/{key}"
        raise InvalidManifestError(error.message, error.line_number, op="read", url=url, key=key) from error


def iter_manifest(
    store: ObjectStore,
    key: str,
    *,
    resolve_refs: bool = True,
    limit: int | None = None,
    visited: set[str] | None = None,
) -> Iterator[ManifestEntry]:
    """All entries of a manifest, depth first; shards are one entry each.

    A manifest that is referenced twice (or by itself) is read once, as s3exchange does.

    Args:
        store: Where the manifest and all it references are.
        key: The manifest.
        resolve_refs: Follow `manifest_ref` entries; otherwise they are given as they are.
        limit: At most so many entries.
        visited: Keys not to read; the keys of all manifests read are added to it.

    Raises:
        ManifestNotFoundError: the manifest, or one that is referenced, does not exist.
        InvalidManifestError: a line is not understood, or references are nested deeper than `MAX_DEPTH`.
    """
    seen = set() if visited is None else visited
    if key in seen or (limit is not None and limit <= 0):
        return
    seen.add(key)
    stack = [(key, read_manifest_object(store, key))]
    given = 0
    while stack:
        entry = next(stack[-1][1], None)
        if entry is None:
            stack.pop()
            continue
        if resolve_refs and entry["kind"] == "manifest_ref":
            target = entry["key"]
            if target in seen:
                continue
            if len(stack) >= MAX_DEPTH:
                raise InvalidManifestError(f"references are nested deeper than {MAX_DEPTH}: {stack[-1][0]} -> {target}")
            seen.add(target)
            stack.append((target, read_manifest_object(store, target)))
            continue
        yield entry
        given += 1
        if given == limit:
            return
