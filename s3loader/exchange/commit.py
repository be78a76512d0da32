"""Publishing manifests: whole ones, and appends that never lose anything.

An append writes a part of its own and then adds one reference to the root by compare-and-swap: the
root is read with its ETag, checked line by line, and replaced only while it is still that very object.
When an answer was lost the root is read again: our reference carries a part name that nobody else
has, so it is there or it is not.
"""

from __future__ import annotations

import datetime
import hashlib
import mmap
import random
import re
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Final, cast

from s3loader.errors import (
    ConflictError,
    InvalidManifestError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    S3LoaderError,
)
from s3loader.exchange.keys import beside
from s3loader.exchange.lines import CONTENT_TYPE, check_entries, encode_manifest, iter_entries, serialize_entry
from s3loader.exchange.types import ManifestEntry
from s3loader.shard.source import read_chunks
from s3loader.store.arguments import checked_key
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, PutMode, PutResult, Update

__all__ = [
    "append_entries",
    "append_lines",
    "can_compare_and_swap",
    "is_part_key",
    "part_key",
    "publish_file",
    "publish_manifest",
    "put_part",
]

IN_MEMORY: Final = 16 << 20
"""Roots and manifests up to this size are kept in memory while they are handled, larger ones in a temporary file."""
SINGLE_PUT: Final = 1 << 30
"""Manifests up to this size are written by one conditional put, which every store with conditions honours; larger
ones by multipart."""
APPEND_DEADLINE: Final = 600.0
_LONGEST_PAUSE: Final = 1.0

_warned: set[str] = set()
_checked: dict[tuple[str, str], tuple[int, bytes]] = {}
"""Per root: length and digest of what was last found valid, so that an append only parses what is new."""


def can_compare_and_swap(store: ObjectStore) -> bool:
    """Whether several writers can share a key of `store`; warns once per store where they cannot."""
    if store.conditional_writes():
        return True
    if store.url not in _warned:
        _warned.add(store.url)
        warnings.warn(
            f"{store.url} does not honour conditional writes: only one writer at a time may append to a manifest"
            " or name shards there; a conflict that is noticed raises ConflictError",
            RuntimeWarning,
            stacklevel=4,
        )
    return False


def part_key(manifest_key: str) -> str:
    """A fresh name for a part of `manifest_key`: ``manifests/part-<UTC>-<8 hex>.jsonl`` beside it."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return beside(manifest_key, f"manifests/part-{now}-{uuid.uuid4().hex[:8]}.jsonl")


def is_part_key(manifest_key: str, key: str) -> bool:
    """Whether `key` is one that `part_key` makes for `manifest_key` (and for others in its folder)."""
    return re.fullmatch(re.escape(beside(manifest_key, "manifests/part-")) + r"\d{8}-\d{6}-[0-9a-f]{8}\.jsonl", key) is not None


class _Spool(tempfile.SpooledTemporaryFile[bytes]):
    """Closed with its last reference: a writer left by an exception keeps some until it is forgotten."""

    def __del__(self) -> None:
        self.close()


def new_spool() -> IO[bytes]:
    """A temporary file that stays in memory while it is small."""
    return cast("IO[bytes]", _Spool(max_size=IN_MEMORY))


def put_part(store: ObjectStore, manifest_key: str, data: Buffer | IO[bytes]) -> str:
    """Write a part under a name of its own; returns its key."""
    mode: PutMode = "create" if can_compare_and_swap(store) else "overwrite"
    while True:
        key = part_key(manifest_key)
        try:
            if isinstance(data, (bytes, bytearray, memoryview)):
                _put(store, key, data, mode)
            else:
                publish_file(store, key, data, mode)
        except ObjectExistsError:  # 8 hex digits within one second: once in a very long time
            continue
        return key


def publish_manifest(
    store: ObjectStore, key: str, entries: Iterable[ManifestEntry], *, mode: PutMode = "overwrite"
) -> PutResult:
    """Encode `entries` and write them as one manifest, atomically. No entries make the one byte ``\\n``.

    Args:
        store: The store.
        key: Key of the manifest.
        entries: Written verbatim, in this order; all in memory at once, so for small manifests.
        mode: ``"create"`` and ``Update(etag)`` are honoured where the store honours them.

    Raises:
        InvalidManifestError: an entry no reader would accept.
        ObjectExistsError: mode ``"create"`` and the key is taken.
        ObjectChangedError: mode ``Update`` and the manifest is another one by now.
        OutcomeUnknownError: the answer was lost and reading back did not settle it.
    """
    checked_key(key)
    return _put(store, key, encode_manifest(entries), settled_mode(store, key, mode))


def settled_mode(store: ObjectStore, key: str, mode: PutMode) -> PutMode:
    """`mode`, or on a store without conditional writes ``"overwrite"`` after a look whether the condition holds now.

    Raises:
        ObjectExistsError, ObjectChangedError: it does not.
    """
    if mode == "overwrite" or can_compare_and_swap(store):
        return mode
    try:
        etag: str | None = store.head(key).etag
    except ObjectNotFoundError:
        etag = None
    if mode == "create" and etag is not None:
        raise ObjectExistsError("the key is taken", op="create", url=f"{store.url}/{key}")
    if isinstance(mode, Update) and mode.etag != etag:
        raise ObjectChangedError("its ETag is not the one given", op="replace", url=f"{store.url}/{key}")
    return "overwrite"


def publish_file(store: ObjectStore, key: str, file: IO[bytes], mode: PutMode) -> PutResult:
    """Write a manifest that stands in a temporary file (from its beginning)."""
    size = file.seek(0, 2)
    file.seek(0)
    if size <= IN_MEMORY:
        return _put(store, key, file.read(), mode)
    if size > SINGLE_PUT:
        return store.put(key, file, mode=mode, content_type=CONTENT_TYPE)
    file.flush()
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
        return _put(store, key, view, mode)


def _put(store: ObjectStore, key: str, data: Buffer, mode: PutMode) -> PutResult:
    return store.backend.put(key, data, mode=mode, content_type=CONTENT_TYPE)


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
    """Whether it begins with the root of the try before."""
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
        ConflictError: other writers won every race until the deadline, or, on a store without conditional
            writes, another writer replaced the root at the same time.
        OutcomeUnknownError: an answer was lost and the root's history was rewritten, or made unreadable, meanwhile.
    """
    new = "".join(f"{line}\n" for line in lines).encode("ascii")
    conditional = can_compare_and_swap(store)
    give_up = time.monotonic() + deadline
    before: tuple[int, bytes] | None = None
    doubtful = False
    pause = 0.0
    while True:
        started = time.monotonic()
        try:
            root = _read_root(store, key, new, before)
        except InvalidManifestError as error:
            if doubtful:
                raise _unknown(store, key) from error
            raise
        with root.file:
            if root.has_ours:
                return None
            if doubtful and not root.extends:
                raise _unknown(store, key)
            before = (root.size, root.digest)
            try:
                result = _write_root(store, key, root, new, conditional)
            except (ObjectExistsError, ObjectChangedError, ConflictError, OutcomeUnknownError) as error:
                if time.monotonic() > give_up and not isinstance(error, OutcomeUnknownError):
                    raise ConflictError(
                        f"other writers won for {deadline:.0f} s", op="append", url=f"{store.url}/{key}"
                    ) from error
                doubtful = doubtful or isinstance(error, OutcomeUnknownError) or error.attempts > 1
                took = time.monotonic() - started
                pause = min(_LONGEST_PAUSE, 10 * took, max(1.5 * pause, took))
                time.sleep(random.random() * pause)
                continue
        if not conditional:
            _read_back(store, key, new)
        return result


def _unknown(store: ObjectStore, key: str) -> OutcomeUnknownError:
    return OutcomeUnknownError(
        "an append's answer was lost, and the manifest was rewritten before it could be read back",
        op="append",
        url=f"{store.url}/{key}",
        hint="look whether the entries are there, then append again if they are not",
    )


def _write_root(store: ObjectStore, key: str, root: _Root, new: bytes, conditional: bool) -> PutResult:
    mode: PutMode = "overwrite"
    if conditional:
        mode = "create" if root.etag is None else Update(root.etag)
    if not root.ends_line:
        new = b"\n" + new
    root.file.seek(0, 2)
    root.file.write(new)
    return publish_file(store, key, root.file, mode)


def _read_back(store: ObjectStore, key: str, new: bytes) -> None:
    """Single-writer mode: whoever replaced the root between our read and now is noticed here."""
    try:
        root = _read_root(store, key, new, None)
        root.file.close()
        ours = root.has_ours
    except InvalidManifestError:  # ours was valid
        ours = False
    if not ours:
        raise ConflictError(
            "another writer replaced the manifest at the same time, and the store has no conditional writes",
            op="append",
            url=f"{store.url}/{key}",
            retryable=False,
            hint="append from one process only on this store, or give each writer a manifest of its own",
        )


def _read_root(store: ObjectStore, key: str, ours: bytes, before: tuple[int, bytes] | None) -> _Root:
    """Read and check the root; lines already found valid by this process are not parsed again.

    Raises:
        InvalidManifestError: it is no manifest.
    """
    spool = new_spool()
    try:
        try:
            meta, chunks = read_chunks(store, key)
        except ObjectNotFoundError:
            return _Root(spool, 0, None, b"", True, before in (None, (0, b"")), False)
        for chunk in chunks:
            spool.write(chunk)
        return _inspect(store, key, spool, meta.etag, ours, before)
    except BaseException:
        spool.close()
        raise


def _inspect(store: ObjectStore, key: str, spool: IO[bytes], etag: str, ours: bytes, before: tuple[int, bytes] | None) -> _Root:
    known = _checked.get((store.url, key))
    size = spool.tell()
    digests = _digests(spool, sorted({mark[0] for mark in (known, before) if mark is not None and mark[0] <= size} | {size}))
    valid = known[0] if known is not None and digests.get(known[0]) == known[1] else 0
    spool.seek(valid)
    try:
        for _ in iter_entries(_chunks(spool)):
            pass
    except InvalidManifestError as error:
        if valid:  # say the line's number in the whole file
            _checked.pop((store.url, key), None)
            return _inspect(store, key, spool, etag, ours, before)
        raise InvalidManifestError(
            f"{error.message}; nothing was appended", error.line_number, op="append to", url=f"{store.url}/{key}", key=key
        ) from error
    spool.seek(max(0, size - 1))
    ends_line = size == 0 or spool.read(1) == b"\n"
    if ends_line:
        _checked[store.url, key] = (size, digests[size])
    extends = before is None or before[0] == 0 or digests.get(before[0]) == before[1]
    return _Root(spool, size, etag, digests[size], ends_line, extends, _holds(spool, ours))


def _chunks(file: IO[bytes]) -> Iterable[bytes]:
    return iter(lambda: file.read(1 << 20), b"")


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
    for piece in _chunks(file):
        window = rest + piece
        if b"\n" + lines in window:
            return True
        rest = window[-len(lines) :]
    return False


def describe(error: Exception) -> str:
    """An error as one line for a report."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
