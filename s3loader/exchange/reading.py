"""Reading manifests from a store: streamed, references followed, in constant memory, and their bytes made certain.

They carry a seal (their CRC32C in the metadata), and the names of parts hold their checksum besides. Parts of s3exchange,
and of older releases, have 8 random digits in its place: a name that does not fit proves nothing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from s3loader.checksum import Seal, damaged, proven
from s3loader.errors import IntegrityError, InvalidManifestError, ManifestNotFoundError, ObjectNotFoundError, RangeError
from s3loader.exchange.lines import iter_entries, iter_entry_lines
from s3loader.exchange.types import ManifestEntry, ManifestRefEntry
from s3loader.shard.source import CHUNK, read_chunks, rest_of
from s3loader.store.backend import ReadResult
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ObjectMeta, ReadRequest

__all__ = [
    "MAX_DEPTH",
    "iter_manifest",
    "part_crc",
    "read_manifest_lines",
    "read_manifest_object",
    "sealed_chunks",
    "sealed_rest",
]

T = TypeVar("T")

MAX_DEPTH: Final = 100
"""Deepest chain of references followed: deeper is a mistake, and each level holds an open stream."""
MOST_AHEAD: Final = 32
"""Parts asked for together."""


def read_manifest_object(
    store: ObjectStore, key: str, *, limit: int | None = None, strict: bool = False
) -> Iterator[ManifestEntry]:
    """The entries of one manifest object as they stand in it, references included.

    Args:
        store: The store.
        key: The manifest.
        limit: Most entries; None: all.
        strict: Where no checksum tells, read it twice and compare: for what is written back, or decides what is deleted.

    Raises:
        ManifestNotFoundError: there is no such object.
        InvalidManifestError: a line is none of ours; `.line_number` and the message say which.
        IntegrityError: its bytes are not what was written.
    """
    return _located(store, key, iter_entries(_chunks(store, key, strict)[1], limit=limit))


def read_manifest_lines(store: ObjectStore, key: str) -> tuple[str, Iterator[tuple[ManifestEntry, bytes]]]:
    """As `read_manifest_object` with `strict`: the ETag of what is read, and each entry with its line as it stands there.

    Raises: as `read_manifest_object`.
    """
    meta, chunks = _chunks(store, key, True)
    return meta.etag, _located(store, key, iter_entry_lines(chunks))


def _chunks(store: ObjectStore, key: str, strict: bool) -> tuple[ObjectMeta, Iterable[Buffer]]:
    try:
        return sealed_chunks(store, key, strict=strict)
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

    def __init__(self, store: ObjectStore, key: str, entries: Iterator[ManifestEntry], *, strict: bool) -> None:
        self.key = key
        self._strict = strict
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
            chunks = sealed_rest(self._store, answer, strict=self._strict)
            return _Level(self._store, key, _located(self._store, key, iter_entries(chunks)), strict=self._strict)
        if isinstance(answer.error, RangeError):  # an empty object has no range
            return self._read(key)
        if isinstance(answer.error, ObjectNotFoundError):
            raise _not_found(key, answer.error) from answer.error
        raise answer.error

    def _read(self, key: str) -> _Level:
        return _Level(self._store, key, read_manifest_object(self._store, key, strict=self._strict), strict=self._strict)

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
    strict: bool = False,
    own: Iterator[ManifestEntry] | None = None,
) -> Iterator[ManifestEntry]:
    """All entries of a manifest, depth first; shards are one entry each.

    A manifest that is referenced twice (or by itself) is read once, as s3exchange does. Parts are fetched
    ahead, several at a time, within bounded memory.

    Args:
        store: Where the manifest and all it references are.
        key: The manifest.
        resolve_refs: Follow `manifest_ref` entries; otherwise they are given as they are.
        limit: Most entries; None: all.
        visited: Keys not to read; the keys of all manifests read are added to it.
        strict: Where no checksum tells, read twice and compare.
        own: Its own entries, where it is being read already.

    Raises:
        ManifestNotFoundError: the manifest, or one that is referenced, does not exist.
        IntegrityError: the bytes of one are not what was written.
        InvalidManifestError: a line is not understood, or references are nested deeper than `MAX_DEPTH`.
    """
    seen = set() if visited is None else visited
    if key in seen or (limit is not None and limit <= 0):
        return
    seen.add(key)
    stack = [_Level(store, key, own or read_manifest_object(store, key, strict=strict), strict=strict)]
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


def iter_given(store: ObjectStore, entries: Iterable[ManifestEntry], *, resolve_refs: bool = True) -> Iterator[ManifestEntry]:
    """`entries` that stand in no manifest, those of the manifests that they reference in their place (each once).

    Raises: as `iter_manifest`.
    """
    visited: set[str] = set()
    for entry in entries:
        if resolve_refs and entry["kind"] == "manifest_ref":
            yield from iter_manifest(store, entry["key"], visited=visited)
        else:
            yield entry


_PART: Final = re.compile(r"(?:^|/)manifests/part-\d{8}-\d{6}-([0-9a-f]{8})\.jsonl$")


def part_crc(key: str) -> int | None:
    """CRC32C of the part `key`, where its name holds that; None for any other key."""
    match = _PART.search(key)
    return int(match.group(1), 16) if match is not None else None


def sealed_chunks(store: ObjectStore, key: str, *, strict: bool = False) -> tuple[ObjectMeta, Iterator[Buffer]]:
    """A whole manifest as a stream. One that is small is certain before any of it is given, a large one at the end.

    Args:
        store: The store.
        key: The manifest.
        strict: Where no checksum tells, read twice and compare: for what is written back, or decides what is deleted.

    Raises:
        ObjectNotFoundError: there is none.
        IntegrityError: its bytes are not what was written.
    """
    meta, chunks = read_chunks(store, key)
    if meta.size > CHUNK:
        return meta, _checked(store, key, meta, chunks, strict=strict)
    first = [(meta, chunks)]

    def read() -> tuple[ObjectMeta, Buffer]:
        meta, chunks = first.pop() if first else read_chunks(store, key)
        return meta, b"".join(chunks)

    meta, data = proven(read, f"{store.url}/{key}", crc=part_crc(key), strict=strict)
    return meta, iter([data] if data else [])


def sealed_rest(store: ObjectStore, answer: ReadResult, *, strict: bool = False) -> Iterator[Buffer]:
    """All of a manifest of which the first bytes came in a bulk read.

    Raises: as `sealed_chunks`.
    """
    key = answer.request.key
    crc = part_crc(key)
    if crc is None and not strict:
        yield from rest_of(store, answer)
        return
    meta = ObjectMeta(key, answer.size, answer.etag)
    if len(answer.data) < answer.size:
        yield from sealed_chunks(store, key, strict=strict)[1]
        return
    check = Seal(meta, crc)  # a bulk read tells no metadata, but often the ETag is an MD5
    check.update(answer.data)
    if check.verdict() and not (strict and check.crc != crc):
        yield answer.data
    else:
        yield from sealed_chunks(store, key, strict=strict)[1]


def _checked(store: ObjectStore, key: str, meta: ObjectMeta, chunks: Iterator[Buffer], *, strict: bool) -> Iterator[Buffer]:
    check = Seal(meta, part_crc(key))
    for chunk in chunks:
        check.update(chunk)
        yield chunk
    verdict = check.verdict()
    if verdict is False:
        raise damaged(f"{store.url}/{key}", meta.etag)
    if verdict is None and (strict or check.suspicious):
        again = Seal(meta)
        for chunk in read_chunks(store, key, etag=meta.etag or None)[1]:
            again.update(chunk)
        if again.crc != check.crc:
            raise IntegrityError("two reads of it gave different bytes", op="read", url=f"{store.url}/{key}")
