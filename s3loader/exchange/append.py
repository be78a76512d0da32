"""Appending to manifests, beside any number of other writers: nothing is lost, nothing is there twice.

An append writes a part of its own and then adds one reference to the root by compare-and-swap: the root is read with its ETag,
checked line by line, and replaced only while it is still that very object. When an answer was lost the root is read again: our
reference carries a part name that nobody else has, so it is there or it is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Final

from s3loader.errors import (
    ConfigError,
    ConflictError,
    IntegrityError,
    InvalidManifestError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    S3LoaderError,
)
from s3loader.exchange.commit import (
    can_compare_and_swap,
    file_chunks,
    new_spool,
    publish_file,
    publish_manifest,
    publish_once,
    put_part,
    put_settled,
)
from s3loader.exchange.lines import check_entries, encode_manifest, iter_entries, serialize_entry
from s3loader.exchange.reading import sealed_chunks
from s3loader.exchange.types import ManifestEntry
from s3loader.store.arguments import checked_key
from s3loader.store.objectstore import ObjectStore
from s3loader.types import ObjectMeta, PutMode, PutResult, Update

__all__ = ["append_entries", "append_lines", "write_manifest"]

APPEND_DEADLINE: Final = 600.0
"""Seconds for which an append goes on against other writers."""

_valid_before: dict[tuple[str, str], tuple[int, bytes]] = {}
"""Per root: length and digest of what was last found valid, so that an append only parses what is new."""


def write_manifest(store: ObjectStore, key: str, entries: Iterable[ManifestEntry], mode: str) -> None:
    """Write entries as a manifest: ``"overwrite"`` it, ``"create"`` it exactly once, or add a part to it (``"append_parts"``).

    Raises: as `publish_manifest`, `publish_once` and `append_entries`, and ConfigError for another mode.
    """
    if mode == "overwrite":
        publish_manifest(store, key, entries)
    elif mode == "append_parts":
        append_entries(store, key, entries)
    elif mode == "create":
        publish_once(store, key, encode_manifest(entries))
    else:
        raise ConfigError(f"Invalid mode: {mode}", hint='"append_parts", "overwrite" or "create"')


def append_entries(store: ObjectStore, key: str, entries: Iterable[ManifestEntry]) -> str | None:
    """Append `entries` to the manifest `key` as one new part; returns the part's key, None without entries.

    Where the manifest refuses the append the part is removed again; after any other failure the error's note names it.

    Raises: as `append_lines`, and InvalidManifestError for an entry no reader would accept.
    """
    checked_key(key)
    check_entries(entries)
    entries = list(entries)
    if not entries:
        return None
    part = put_part(store, key, encode_manifest(entries))
    try:
        append_lines(store, key, [serialize_entry({"kind": "manifest_ref", "key": part})])
    except BaseException as error:
        _drop_part(store, key, part, error)
        raise
    return part


def _drop_part(store: ObjectStore, key: str, part: str, error: BaseException) -> None:
    """Remove the part of an append that surely did not happen; let `error` name one that stays."""
    why = f"delete it unless {key} refers to it"
    if isinstance(error, InvalidManifestError):
        try:
            store.delete(part)
            return
        except S3LoaderError as second:
            why = f"it could not be removed: {second.message}"
    error.add_note(f"s3loader: the part {part} was written before the error and stays; {why}")


@dataclass
class _Root:
    """A root as it was read."""

    file: IO[bytes]
    size: int
    etag: str | None
    """None: there is no root yet."""
    digest: bytes
    ends_line: bool
    extends: bool
    """Whether it is the root of the try before, and nothing but references after it."""
    has_ours: bool


def append_lines(store: ObjectStore, key: str, lines: list[str], *, deadline: float = APPEND_DEADLINE) -> PutResult | None:
    """Add `lines` to the end of the root manifest `key`, whoever else does so at the same time.

    Args:
        store: The store.
        key: The root.
        lines: Serialised entries that nobody else writes (references to parts of our own).
        deadline: Seconds after which to give up against other writers.

    Returns:
        What the put made, or None where reading back showed that an earlier try had succeeded.

    Raises:
        InvalidManifestError: the root cannot be parsed; it is left as it is, and has none of `lines`.
        IntegrityError: the root's bytes are not what was written; it is left as it is.
        ConflictError: other writers won every race until the deadline, or, on a store without conditional
            writes, another writer replaced the root at the same time.
        OutcomeUnknownError: an answer was lost and the root's history was rewritten, or made unreadable, meanwhile.
    """
    new = "".join(f"{line}\n" for line in lines).encode("ascii")
    url = f"{store.url}/{key}"
    conditional = can_compare_and_swap(store)
    root = _read_root(store, key, new, None)

    def put(seen: _Root) -> PutResult:
        mode: PutMode = "overwrite"
        if conditional:
            mode = "create" if seen.etag is None else Update(seen.etag)
        seen.file.seek(seen.size)
        seen.file.truncate()
        seen.file.write(new if seen.ends_line else b"\n" + new)
        return publish_file(store, key, seen.file, mode)

    def look() -> _Root:
        nonlocal root
        now = _read_root(store, key, new, (root.size, root.digest))
        root.file.close()
        root = now
        return now

    def judge(now: _Root, before: _Root, doubtful: bool) -> bool:
        if now.has_ours:
            return True
        if not conditional and (now.etag, now.digest) != (before.etag, before.digest):
            raise ConflictError(
                "another writer replaced the manifest at the same time, and the store has no conditional writes",
                op="append",
                url=url,
                retryable=False,
                hint="append from one process only on this store, or give each writer a manifest of its own",
            )
        if doubtful and not now.extends:
            raise OutcomeUnknownError(
                "an append's answer was lost, and the manifest was rewritten before it could be read back",
                op="append",
                url=url,
                hint="look whether the entries are there, then append again if they are not",
            )
        return False

    try:
        if root.has_ours:
            return None
        return put_settled(put, look, judge, root, op="append", url=url, conditional=conditional, deadline=deadline)[0]
    finally:
        root.file.close()


def _read_root(store: ObjectStore, key: str, ours: bytes, before: tuple[int, bytes] | None) -> _Root:
    """Read and check the root; lines already found valid by this process are not parsed again.

    Raises:
        InvalidManifestError: it is no manifest.
    """
    spool = new_spool()
    try:
        try:
            meta = _fill(spool, store, key)
        except ObjectNotFoundError:
            return _Root(spool, 0, None, b"", True, before is None or before[0] == 0, False)
        return _inspect(store, key, spool, meta.etag, ours, before)
    except BaseException:
        spool.close()
        raise


def _fill(spool: IO[bytes], store: ObjectStore, key: str) -> ObjectMeta:
    """Read the root into `spool`. What is written back must be what was written before, so its bytes are made certain.

    Raises:
        IntegrityError: they are not, twice.
    """
    for last in (False, True):
        spool.seek(0)
        spool.truncate()
        meta, chunks = sealed_chunks(store, key, strict=True)
        try:
            for chunk in chunks:
                spool.write(chunk)
            return meta
        except IntegrityError:
            if last:
                raise
    raise AssertionError("unreachable")


def _inspect(store: ObjectStore, key: str, spool: IO[bytes], etag: str, ours: bytes, before: tuple[int, bytes] | None) -> _Root:
    known = _valid_before.get((store.url, key))
    size = spool.tell()
    digests = _digests(spool, sorted({mark[0] for mark in (known, before) if mark is not None and mark[0] <= size} | {size}))
    valid = known[0] if known is not None and digests.get(known[0]) == known[1] else 0
    spool.seek(valid)
    try:
        for _ in iter_entries(file_chunks(spool)):
            pass
    except InvalidManifestError as error:
        if valid:  # say the line's number in the whole file
            _valid_before.pop((store.url, key), None)
            return _inspect(store, key, spool, etag, ours, before)
        raise InvalidManifestError(
            f"{error.message}; nothing was appended", error.line_number, op="append to", url=f"{store.url}/{key}", key=key
        ) from error
    spool.seek(max(0, size - 1))
    ends_line = size == 0 or spool.read(1) == b"\n"
    if ends_line:
        _valid_before[store.url, key] = (size, digests[size])
    return _Root(spool, size, etag, digests[size], ends_line, _extends(spool, digests, before), _holds(spool, ours))


def _extends(file: IO[bytes], digests: dict[int, bytes], before: tuple[int, bytes] | None) -> bool:
    """Whether others have only appended since `before`. An entry that is no reference has come by a rewrite: a compaction
    puts the entries of a part, which may be ours, in the place of its reference."""
    if before is None:
        return True
    if before[0] and digests.get(before[0]) != before[1]:
        return False
    file.seek(before[0])
    return all(entry["kind"] == "manifest_ref" for entry in iter_entries(file_chunks(file)))


def _digests(file: IO[bytes], marks: list[int]) -> dict[int, bytes]:
    """Digest of the first `mark` bytes, for each of the rising `marks`."""
    hasher = hashlib.blake2b(digest_size=16)
    found = {}
    file.seek(0)
    at = 0
    for mark in marks:
        while at < mark:
            piece = file.read(min(1 << 20, mark - at))
            hasher.update(piece)
            at += len(piece)
        found[mark] = hasher.copy().digest()
    return found


def _holds(file: IO[bytes], lines: bytes) -> bool:
    """Whether the file holds `lines`, as whole lines."""
    file.seek(0)
    rest = b"\n"
    for piece in file_chunks(file):
        window = rest + piece
        if b"\n" + lines in window:
            return True
        rest = window[-len(lines) :]
    return False
