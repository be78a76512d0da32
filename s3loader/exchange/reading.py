"""Reading manifests from a store: streamed, references followed, in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from s3loader.errors import InvalidManifestError, ObjectNotFoundError, RangeError
from s3loader.exchange.errors import ManifestNotFoundError
from s3loader.exchange.lines import iter_entries, iter_entry_lines
from s3loader.exchange.types import ManifestEntry, ManifestRefEntry
from s3loader.shard.source import CHUNK, read_chunks, rest_of
from s3loader.store.base import ReadResult
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ReadRequest

__all__ = ["MAX_DEPTH", "iter_manifest", "read_manifest_lines", "read_manifest_object"]

T = TypeVar("T")

MAX_DEPTH: Final = 100
"""Deepest chain of references followed: deeper is a mistake, and each level holds an open stream."""
MOST_AHEAD: Final = 32
"""Parts asked for together."""


def read_manifest_object(store: ObjectStore, key: str, *, limit: int | None = None) -> Iterator[ManifestEntry]:
    """The entries of one manifest object as they stand in it, references included.

    Raises:
        ManifestNotFoundError: there is no such object.
        InvalidManifestError: a line is none of ours; `.line_number` and the message say which.
    """
    return _located(store, key, iter_entries(_chunks(store, key), limit=limit))


def read_manifest_lines(store: ObjectStore, key: str) -> Iterator[tuple[ManifestEntry, bytes]]:
    """As `read_manifest_object`, each entry with its line as it stands there.

    Raises: as `read_manifest_object`.
    """
    return _located(store, key, iter_entry_lines(_chunks(store, key)))


def _chunks(store: ObjectStore, key: str) -> Iterable[Buffer]:
    try:
        return read_chunks(store, key)[1]
    except ObjectNotFoundError as error:
        raise _not_found(key, error) from error


def _located(store: ObjectStore, key: str, items: Iterator[T]) -> Iterator[T]:
    """`items`, with the manifest named in their errors."""
    try:
        yield from items
    except InvalidManifestError as error:
        url = f"{store.url}/{key}"
        raise InvalidManifestError(error.message, error.line_number, op="read", url=url, key=key) from error


def _not_found(key: str, error: ObjectNotFoundError) -> ManifestNotFoundError:
    return ManifestNotFoundError(key, op="read", url=error.url, status=error.status)


class _Level:
    """One manifest being read, and the references in it that come next."""

    def __init__(self, store: ObjectStore, key: str, entries: Iterator[ManifestEntry]) -> None:
        self.key = key
        self._store = store
        self._entries = entries
        self._held: deque[ManifestEntry] = deque()
        self._error: Exception | None = None
        self._answers: Iterator[ReadResult | ReadFailure] = iter(())
        self._asked: deque[str] = deque()
        self._ahead = 1

    def next(self) -> ManifestEntry | None:
        """The next entry; None at the end."""
        if self._held:
            return self._held.popleft()
        if self._error is not None:
            raise self._error
        return next(self._entries, None)

    def open(self, key: str, seen: set[str]) -> _Level:
        """The manifest that the entry just given references. Those that follow it are fetched along, more each time."""
        while self._asked and self._asked[0] != key:
            self._asked.popleft()
            next(self._answers)  # it was met on another way meanwhile
        if not self._asked:
            self._ask(key, seen)
        self._asked.popleft()
        answer = next(self._answers)
        if isinstance(answer, ReadResult):
            chunks = rest_of(self._store, answer)
            return _Level(self._store, key, _located(self._store, key, iter_entries(chunks)))
        if isinstance(answer.error, RangeError):  # an empty object has no range
            return _Level(self._store, key, read_manifest_object(self._store, key))
        if isinstance(answer.error, ObjectNotFoundError):
            raise _not_found(key, answer.error) from answer.error
        raise answer.error

    def _ask(self, key: str, seen: set[str]) -> None:
        self._asked = deque([key])
        for entry in self._peek(self._ahead - 1):
            if entry["key"] not in seen and entry["key"] not in self._asked:
                self._asked.append(entry["key"])
        self._ahead = min(2 * self._ahead, MOST_AHEAD)
        requests = [ReadRequest(each, 0, CHUNK) for each in self._asked]
        self._answers = self._store.read_many(requests, errors="return")

    def _peek(self, count: int) -> Iterator[ManifestRefEntry]:
        """The references that follow directly, at most `count`; an error met on the way keeps its turn."""
        for _ in range(count):
            try:
                entry = next(self._entries, None)
            except InvalidManifestError as error:
                self._error = error
                return
            if entry is None:
                return
            self._held.append(entry)
            if entry["kind"] != "manifest_ref":
                return
            yield entry


def iter_manifest(
    store: ObjectStore,
    key: str,
    *,
    resolve_refs: bool = True,
    limit: int | None = None,
    visited: set[str] | None = None,
) -> Iterator[ManifestEntry]:
    """All entries of a manifest, depth first; shards are one entry each.

    A manifest that is referenced twice (or by itself) is read once, as s3exchange does. Parts are fetched
    ahead, several at a time, within bounded memory.

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
    stack = [_Level(store, key, read_manifest_object(store, key))]
    given = 0
    while stack:
        entry = stack[-1].next()
        if entry is None:
            stack.pop()
            continue
        if resolve_refs and entry["kind"] == "manifest_ref":
            target = entry["key"]
            if target in seen:
                continue
            if len(stack) >= MAX_DEPTH:
                raise InvalidManifestError(f"references are nested deeper than {MAX_DEPTH}: {stack[-1].key} -> {target}")
            seen.add(target)
            stack.append(stack[-1].open(target, seen))
            continue
        yield entry
        given += 1
        if given == limit:
            return
