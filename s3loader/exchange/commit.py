"""The one commit of manifests and checkpoints: a conditional put, and what became of it (`put_settled`).

Whole manifests are put as they are (`publish_manifest`), or exactly once (`publish_once`); what is added to one is put as a
part of its own (`put_part`) and then referenced (append.py). The roots of checkpoints are put by `put_settled`, too.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
import mmap
import random
import re
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable
from typing import IO, Final, NamedTuple, TypeVar, cast

from s3loader.checksum import crc32c, file_crc32c, seal
from s3loader.errors import (
    ConflictError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    PreconditionFailedError,
    S3LoaderError,
    StoreError,
)
from s3loader.exchange.keys import beside
from s3loader.exchange.lines import CONTENT_TYPE, encode_manifest
from s3loader.exchange.reading import sealed_chunks
from s3loader.exchange.types import ManifestEntry
from s3loader.store.arguments import checked_key
from s3loader.store.lost_reply import is_ambiguous
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, PutMode, PutResult, Update

__all__ = [
    "can_compare_and_swap",
    "describe",
    "file_chunks",
    "is_part_key",
    "new_spool",
    "part_key",
    "publish_file",
    "publish_manifest",
    "publish_once",
    "put_encoded",
    "put_part",
    "put_settled",
    "settled_mode",
]

IN_MEMORY: Final = 16 << 20
"""Roots and manifests up to this size are kept in memory while they are handled, larger ones in a temporary file."""
SINGLE_PUT: Final = 1 << 30
"""Manifests up to this size are written by one conditional put, which every store with conditions honours; larger
ones by multipart."""
TRIES: Final = 6
"""Puts in a row that may fail before it is said that their outcome is not known."""
_LONGEST_PAUSE: Final = 1.0
_LONGEST_RECOVERY: Final = 2.0
"""Seconds that are waited at most for other writers, and for a store that fails."""

Seen = TypeVar("Seen")

_MOST_NAMES: Final = 10_000

_warned: set[str] = set()
_names: set[tuple[str, str]] = set()
_names_lock = threading.Lock()


def put_settled(
    put: Callable[[Seen], PutResult],
    look: Callable[[], Seen],
    judge: Callable[[Seen, Seen, bool], bool],
    seen: Seen,
    *,
    url: str,
    op: str = "put",
    conditional: bool = True,
    settle: float = 0.0,
    deadline: float = 0.0,
) -> tuple[PutResult | None, Seen]:
    """Put one object under a condition, and find out what became of it.

    A put that is answered with success is done. One that was refused (412, 409; 404 where what it replaces is gone) may have
    been refused by its own earlier attempt, one that failed may have been carried out. So what lies there now is read back and
    judged: it is ours; or ours may be put upon it, and the put is sent again; or it is another's, which ends it.

    Args:
        put: Sends the put, on the condition that what was seen last is still there.
        look: Reads what is there now.
        judge: ``judge(now, before, doubtful)`` is True where what is there is ours, and False where ours may be put upon it.
            It raises where another's is there that must stay. `before` is what was seen last, `doubtful` whether an earlier
            put may have been carried out.
        seen: What was there before the first put.
        url: Of the object, for errors.
        op: For errors.
        conditional: Whether the store honours conditions; where it does not, each put is read back.
        settle: Seconds between a put and reading it back on such a store.
        deadline: Seconds for which to go on against other writers; without, a refused put counts as one that failed.

    Returns:
        The store's answer, None where reading back has shown that ours is there; and what was seen last.

    Raises:
        ConflictError: other writers won every race until the deadline.
        OutcomeUnknownError: `TRIES` puts in a row failed, or it cannot be read back; one may have been carried out.
        StoreError: the put cannot succeed, or `TRIES` in a row failed, and none was carried out.
    """
    give_up = time.monotonic() + deadline
    failed, doubtful, pause = 0, False, 0.0
    while True:
        started = time.monotonic()
        error: S3LoaderError | None = None
        racing = False
        try:
            answer = put(seen)
            if conditional:
                return answer, seen
            doubtful = True
            time.sleep(settle)
        except StoreError as failure:
            error = failure
            refused = isinstance(error, (PreconditionFailedError, ConflictError))
            if not (refused or error.retryable or isinstance(error, (ObjectNotFoundError, OutcomeUnknownError))):
                if doubtful:
                    raise _unknown(op, url, error) from error
                raise
            doubtful = doubtful or error.attempts > 1 or is_ambiguous(error)
            racing = refused and deadline > 0
        if racing:
            if time.monotonic() > give_up:
                raise ConflictError(f"other writers won for {deadline:.0f} s", op=op, url=url) from error
            took = time.monotonic() - started
            pause = min(_LONGEST_PAUSE, max(10 * took, 1.5 * pause))
            time.sleep(random.random() * pause)
        try:
            now = look()
        except StoreError as failure:
            if not failure.retryable:
                raise _unknown(op, url, failure) from failure
            error, racing = failure, False
        except S3LoaderError as failure:  # what is there cannot be understood
            if doubtful:
                raise _unknown(op, url, failure) from failure
            raise
        else:
            if judge(now, seen, doubtful):
                return None, now
            seen = now
        failed = 0 if racing else failed + 1
        hopeless = failed >= TRIES or (failed > 1 and isinstance(error, ObjectNotFoundError))  # there is no bucket
        if hopeless and error is not None and not doubtful:
            raise error
        if hopeless:
            raise _unknown(op, url, error) from error
        if failed:
            time.sleep(min(_LONGEST_RECOVERY, 0.05 * 2**failed) * random.uniform(0.5, 1.0))


def _unknown(op: str, url: str, error: S3LoaderError | None) -> OutcomeUnknownError:
    why = f" ({error.message})" if error is not None else ""
    return OutcomeUnknownError(f"whether it was written could not be found out{why}", op=op, url=url)


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


def part_key(manifest_key: str, crc: int | None = None, later: int = 0) -> str:
    """A name for a part of `manifest_key`: ``manifests/part-<UTC>-<8 hex>.jsonl`` beside it.

    Args:
        manifest_key: The root.
        crc: CRC32C of the part's bytes, which the 8 digits are then, so that readers can check them; else they are random.
        later: Seconds to add to the time.
    """
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=later)
    digits = uuid.uuid4().hex[:8] if crc is None else f"{crc:08x}"
    return beside(manifest_key, f"manifests/part-{now:%Y%m%d-%H%M%S}-{digits}.jsonl")


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
    """Write a part under a name of its own, which holds its checksum; returns its key."""
    crc = crc32c(data) if isinstance(data, (bytes, bytearray, memoryview)) else file_crc32c(data)
    for later in itertools.count():  # parts with the same bytes within one second
        key = part_key(manifest_key, crc, later)
        try:
            mode = settled_mode(store, key, "create")
            if mode == "overwrite" and not _is_first(store, key):
                continue
            if isinstance(data, (bytes, bytearray, memoryview)):
                put_encoded(store, key, data, mode)
            else:
                publish_file(store, key, data, mode)
        except ObjectExistsError:
            continue
        return key
    raise AssertionError("unreachable")


def _is_first(store: ObjectStore, key: str) -> bool:
    """Whether no other thread is about to write a part of that name where the store itself would not refuse."""
    with _names_lock:
        if len(_names) >= _MOST_NAMES:
            _names.clear()
        if (store.url, key) in _names:
            return False
        _names.add((store.url, key))
        return True


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
    return put_encoded(store, key, encode_manifest(entries), settled_mode(store, key, mode))


def publish_once(store: ObjectStore, key: str, data: Buffer | IO[bytes]) -> PutResult:
    """Publish exactly these bytes under a key that nobody has, exactly once.

    Whoever publishes the same bytes again, as an answer was lost or several race to publish them, succeeds too.

    Args:
        store: The store.
        key: Of the manifest.
        data: All its lines, or a temporary file of them.

    Returns:
        The manifest as it is there now, whoever wrote it.

    Raises:
        ObjectExistsError: another manifest is there.
        OutcomeUnknownError: whether it was written could not be found out.
    """
    checked_key(key)
    url = f"{store.url}/{key}"
    conditional = can_compare_and_swap(store)
    mode: PutMode = "create" if conditional else "overwrite"
    if isinstance(data, (bytes, bytearray, memoryview)):
        ours, send = _digest_of([data]), functools.partial(put_encoded, store, key, data, mode)
    else:
        ours, send = _digest_of(_from_start(data)), functools.partial(publish_file, store, key, data, mode)

    def look() -> _Published | None:
        try:
            meta, chunks = sealed_chunks(store, key, strict=True)
        except ObjectNotFoundError:
            return None
        return _Published(PutResult(key, meta.etag, meta.size, meta.version_id), _digest_of(chunks) == ours)

    def is_ours(now: _Published | None, before: _Published | None = None, doubtful: bool = False) -> bool:
        if now is not None and not now.is_ours:
            raise ObjectExistsError("another manifest is there already", op="create", url=url)
        return now is not None

    there = None if conditional else look()
    if there is not None and is_ours(there):
        return there.result
    answer, there = put_settled(lambda _: send(), look, is_ours, None, op="create", url=url, conditional=conditional)
    if answer is not None:
        return answer
    assert there is not None
    return there.result


class _Published(NamedTuple):
    """What is under the key of a manifest that is published once."""

    result: PutResult
    is_ours: bool


def _digest_of(chunks: Iterable[Buffer]) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.digest()


def _from_start(file: IO[bytes]) -> Iterable[bytes]:
    file.seek(0)
    return file_chunks(file)


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
        return put_encoded(store, key, file.read(), mode)
    if size > SINGLE_PUT:
        sealed = seal(file_crc32c(file))
        return store.put(key, file, mode=mode, content_type=CONTENT_TYPE, metadata=sealed)
    file.flush()
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
        return put_encoded(store, key, view, mode)


def put_encoded(store: ObjectStore, key: str, data: Buffer, mode: PutMode) -> PutResult:
    """Send one put of a manifest's bytes, with its media type and seal."""
    return store.backend.put(key, data, mode=mode, content_type=CONTENT_TYPE, metadata=seal(crc32c(data)))


def file_chunks(file: IO[bytes]) -> Iterable[bytes]:
    """What follows in a file, 1 MiB at a time."""
    return iter(lambda: file.read(1 << 20), b"")


def describe(error: Exception) -> str:
    """An error as one line for a report."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
