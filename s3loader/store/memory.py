"""``memory://name``: objects in this process, for tests, examples and small scratch data.

All stores of one name share their objects. A forked child goes on with its own copy; a process
started by spawn begins empty.
"""

from __future__ import annotations

import builtins
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl

from s3loader import events
from s3loader.checksum import crc32c_base64
from s3loader.errors import (
    BucketNotFoundError,
    ConflictError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    RangeError,
    StoreError,
    UnsupportedOperationError,
)
from s3loader.ranges import first_byte
from s3loader.store.arguments import check_crc32c, kept_here
from s3loader.store.backend import BulkBackend, key_bytes, roll_up
from s3loader.store.told import first_byte_came
from s3loader.types import (
    Buffer,
    CommonPrefix,
    DeleteFailure,
    ObjectMeta,
    PartResult,
    PutMode,
    PutResult,
    Update,
)

__all__ = ["MemoryBackend", "create_bucket", "delete_bucket", "list_buckets", "not_empty"]


@dataclass(slots=True)
class _Object:
    data: bytes
    meta: ObjectMeta
    tagging: str = ""


@dataclass(slots=True)
class _Upload:
    key: str
    content_type: str | None
    metadata: dict[str, str]
    attributes: dict[str, str]
    initiated: float
    parts: dict[int, tuple[str, bytes]] = field(default_factory=dict)

    @property
    def about(self) -> tuple[str | None, dict[str, str], dict[str, str]]:
        """What describes the object."""
        return self.content_type, self.metadata, self.attributes


class _Bucket:
    """The objects of one name. Every access holds `_lock` for a few dictionary operations."""

    def __init__(self) -> None:
        self.objects: dict[str, _Object] = {}
        self.uploads: dict[str, _Upload] = {}
        self.order: list[str] | None = []
        """Keys by their UTF-8 bytes; None while it has to be sorted again."""


_buckets: dict[str, _Bucket] = {}
_lock = threading.Lock()
_serial = itertools.count(1)


def _before_fork() -> None:
    _lock.acquire()  # a child must not start from half a change


def _after_fork_in_parent() -> None:
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def not_empty(url: str) -> ConflictError:
    """The error for deleting a bucket with objects in it."""
    return ConflictError(
        "the bucket is not empty",
        op="delete bucket",
        url=url,
        code="BucketNotEmpty",
        retryable=False,
        hint="delete its objects first, versions and unfinished uploads too",
    )


def create_bucket(name: str) -> bool:
    """Make the store of this name; whether it is new."""
    with _lock:
        new = name not in _buckets
        _buckets.setdefault(name, _Bucket())
    return new


def delete_bucket(name: str) -> None:
    """Forget the store of this name.

    Raises:
        BucketNotFoundError: there is none.
        ConflictError: there are objects in it.
    """
    with _lock:
        found = _buckets.get(name)
        if found is None:
            raise BucketNotFoundError("no such bucket", op="delete bucket", url=f"memory://{name}")
        if found.objects:
            raise not_empty(f"memory://{name}")
        del _buckets[name]


def list_buckets() -> list[str]:
    """Names of the stores of this process, sorted."""
    with _lock:
        return sorted(_buckets)


class MemoryBackend:
    """The backend of ``memory://name``. ETags are unique for each write."""

    PUT_LIMIT: Final = sys.maxsize
    """Bytes up to which one put is the best way to write a buffer."""
    bulk: BulkBackend | None = None
    """Threads run its single verbs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = f"memory://{name}"
        create_bucket(name)

    def __reduce__(self) -> tuple[type[MemoryBackend], tuple[str]]:
        return MemoryBackend, (self.name,)

    @property
    def engine(self) -> str:
        """``direct``, ``obstore``, ``boto3``, ``file``, ``memory``; for events and `explain`."""
        return "memory"

    @property
    def _bucket(self) -> _Bucket:
        """Made anew where it was deleted."""
        return _buckets.get(self.name) or _buckets.setdefault(self.name, _Bucket())

    def _find(self, op: str, key: str, if_match: str | None = None, version_id: str | None = None) -> _Object:
        if version_id is not None:
            raise UnsupportedOperationError(
                "a store in memory keeps no versions", op=op, url=f"{self.url}/{key}", hint="leave version_id out"
            )
        found = self._bucket.objects.get(key)
        if found is None:
            hint = None if self._bucket.objects else "a store in memory lives in one process, and here it is empty"
            raise ObjectNotFoundError("no such object", op=op, url=f"{self.url}/{key}", hint=hint)
        if if_match is not None and found.meta.etag != if_match:
            raise ObjectChangedError("its ETag is not the one asked for", op=op, url=f"{self.url}/{key}")
        return found

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` (to the end of the object where `end` is None or beyond it). The bytes are not copied."""
        found = self._find("get", key, if_match, version_id)
        size = len(found.data)
        start = first_byte(start, size)
        stop = size if end is None else min(end, size)
        if start > size or (start == size and end is not None and end > start):
            raise RangeError(f"it has {size} bytes, asked for [{start}, {end})", op="get", url=f"{self.url}/{key}")
        if events.active():
            first_byte_came()
        if start == 0 and stop == size:
            return found.meta, found.data
        return found.meta, memoryview(found.data)[start : max(start, stop)]

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` (1-D, format ``B``, writable) with ``len(buffer)`` bytes from `start`."""
        found = self._find("read", key, if_match)
        stop = start + len(buffer)
        if stop > len(found.data):
            size = len(found.data)
            raise RangeError(f"it has {size} bytes, asked for [{start}, {stop})", op="read", url=f"{self.url}/{key}")
        if events.active():
            first_byte_came()
        buffer[:] = memoryview(found.data)[start:stop]
        return found.meta

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object, without its bytes."""
        return self._find("head", key, version_id=version_id).meta

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> PutResult:
        """Write one object atomically: readers see the old one or the new one, whole."""
        kept = kept_here(attributes, f"{self.url}/{key}") if attributes else {}
        lowered = {name.lower(): value for name, value in (metadata or {}).items()}
        return self._store("put", key, bytes(data), mode, content_type, lowered, kept)

    def put_with_checksum(self, key: str, data: Buffer, checksum: str) -> PutResult:
        """Put with a CRC32C (base64) that the store holds against the bytes; a wrong one is refused."""
        check_crc32c(data, checksum, f"{self.url}/{key}")
        return self.put(key, data)

    def _store(
        self,
        op: str,
        key: str,
        data: bytes,
        mode: PutMode,
        content_type: str | None,
        metadata: Mapping[str, str],
        attributes: Mapping[str, str],
    ) -> PutResult:
        etag = f"{next(_serial):08x}-{len(data):x}"
        about = content_type, None, dict(metadata), {k: v for k, v in attributes.items() if k != "tagging"}
        made = _Object(data, ObjectMeta(key, len(data), etag, time.time(), *about), attributes.get("tagging", ""))
        with _lock:
            bucket = self._bucket
            old = bucket.objects.get(key)
            if mode == "create" and old is not None:
                raise ObjectExistsError("the key is taken", op=op, url=f"{self.url}/{key}")
            if isinstance(mode, Update) and (old is None or old.meta.etag != mode.etag):
                why = "its ETag is not the one asked for" if old else "there is no object to replace"
                raise ObjectChangedError(why, op=op, url=f"{self.url}/{key}")
            bucket.objects[key] = made
            if old is None:
                bucket.order = None
        return PutResult(key, etag, len(data))

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries whose key starts with `prefix`, in order of the UTF-8 bytes of their keys. Objects that come or go meanwhile
        may be missing or seen."""
        with _lock:
            bucket = self._bucket
            if bucket.order is None:
                bucket.order = sorted(bucket.objects, key=key_bytes)
            keys = bucket.order
        metas = (found.meta for key in keys if key.startswith(prefix) and (found := bucket.objects.get(key)) is not None)
        return roll_up(metas, prefix, delimiter, start_after)

    def delete(self, key: str) -> None:
        """Delete; a key that does not exist is no error."""
        with _lock:
            if self._bucket.objects.pop(key, None) is not None:
                self._bucket.order = None

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """Delete all; never raises for a single key, returns what failed."""
        for key in keys:
            self.delete(key)
        return []

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside this root, on the server's side where it can."""
        found = self._find("copy", source)
        kept = {**found.meta.attributes, **({"tagging": found.tagging} if found.tagging else {})}
        return self._store("copy", target, found.data, mode, found.meta.content_type, found.meta.metadata, kept)

    def tags(self, key: str, *, version_id: str | None = None) -> Mapping[str, str]:
        """Tags of the object."""
        return dict(parse_qsl(self._find("tags", key, version_id=version_id).tagging, keep_blank_values=True))

    def create_multipart(
        self,
        key: str,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin a multipart upload; returns its upload id."""
        upload_id = f"{os.getpid():x}-{next(_serial):08x}"
        lowered = {name.lower(): value for name, value in (metadata or {}).items()}
        with _lock:
            kept = kept_here(attributes, f"{self.url}/{key}")
            self._bucket.uploads[upload_id] = _Upload(key, content_type, lowered, kept, time.time())
        return upload_id

    def _upload(self, op: str, key: str, upload_id: str) -> _Upload:
        upload = self._bucket.uploads.get(upload_id)
        if upload is None or upload.key != key:
            raise ObjectNotFoundError("no such multipart upload", op=op, url=f"{self.url}/{key}", code="NoSuchUpload")
        return upload

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload part `number` (1-based; all parts but the last at least 5 MiB on S3)."""
        body = bytes(data)
        etag = f"{next(_serial):08x}-{len(body):x}"
        with _lock:
            self._upload("upload part", key, upload_id).parts[number] = (etag, body)
        return PartResult(number, etag, len(body))

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """Make the object from its parts."""
        op = "complete upload"
        with _lock:
            upload = self._upload(op, key, upload_id)
            held = [upload.parts.get(part.number, ("", b"")) for part in parts]
        for part, (etag, _), previous in zip(parts, held, [0, *(p.number for p in parts)], strict=False):
            if etag != part.etag or part.number <= previous:
                raise StoreError(f"part {part.number} is missing or out of order", op=op, url=f"{self.url}/{key}")
        result = self._store(op, key, b"".join(body for _, body in held), mode, *upload.about)
        with _lock:
            self._bucket.uploads.pop(upload_id, None)
        return result

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the parts; an upload that is gone is no error."""
        with _lock:
            self._bucket.uploads.pop(upload_id, None)

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """Open multipart uploads: ``(key, upload_id, initiated seconds since the epoch)``."""
        with _lock:
            found = [(u.key, upload_id, u.initiated) for upload_id, u in self._bucket.uploads.items()]
        return iter(sorted(entry for entry in found if entry[0].startswith(prefix)))

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """Parts that an open upload has, by number, as `complete_multipart` takes them; the checksums are of what is held."""
        with _lock:
            held = sorted(self._upload("list parts", key, upload_id).parts.items())
        return iter([PartResult(number, etag, len(body), crc32c_base64(body)) for number, (etag, body) in held])

    def close(self) -> None:
        """Let go of it; the objects stay."""
