"""Objects and members by key: opening them, asking about them, writing them to local files.

One place for virtual keys (``archive#member``), and for which error means what.
"""

from __future__ import annotations

import datetime
import os
import posixpath
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from s3loader.checksum import SEAL
from s3loader.errors import (
    ConfigError,
    ExchangeObjectNotFoundError,
    IntegrityError,
    ObjectNotFoundError,
    RangeError,
    TruncatedError,
)
from s3loader.exchange.keys import is_shard_key, normalize_key, split_virtual_key
from s3loader.exchange.types import ManifestEntry
from s3loader.shard.body import ArchiveMemberBody, ObjectBody
from s3loader.shard.index import INTERNAL_MANIFEST
from s3loader.shard.reader import ShardReader
from s3loader.shard.source import CHUNK, read_chunks, rest_of
from s3loader.store.arguments import check_several, checked_key
from s3loader.store.backend import Backend, ForwardingBackend, ReadResult
from s3loader.store.lost_reply import WRITE_ID
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ObjectMeta, ReadRequest

__all__ = ["ExchangeBase", "ObjectAccess", "download", "download_all", "object_metadata"]

_KEPT: Final = 256
"""Archives whose index is kept in memory; an index takes about 50 bytes a member."""


class ObjectAccess:
    """Reads objects and members of `store`; keeps the indexes of the last archives used. Safe for several threads."""

    def __init__(self, store: ObjectStore, *, verify: bool = True) -> None:
        self.store = store
        self.verify = verify
        self._start()

    def _start(self) -> None:
        """Nothing kept yet; also in a forked child, whose copy of the lock another thread may hold for ever."""
        self._readers: OrderedDict[tuple[str, int | None, str], ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.store, self.verify)

    def reader(self, key: str, *, size: int | None = None, internal: str = INTERNAL_MANIFEST) -> ShardReader:
        """The reader of an archive, with its index where it was used before; `size` is what a manifest says it has."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            reader = self._readers.pop((key, size, internal), None)
            if reader is None:
                reader = ShardReader(self.store, key, size=size, internal_manifest_path=internal, verify=self.verify)
            self._readers[key, size, internal] = reader
            if len(self._readers) > _KEPT:
                self._readers.popitem(last=False)
            return reader

    def forget(self, key: str) -> None:
        """Drop what is kept of an archive that was replaced or deleted."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            for known in [k for k in self._readers if k[0] == key]:
                del self._readers[known]

    def open(self, key: str, *, version_id: str | None = None, resolve_virtual_keys: bool = True) -> ObjectBody:
        """A stream over an object or a member (``archive#member``).

        A key with ``#`` is a virtual one if its archive exists, else it is taken as it is.

        Raises:
            ExchangeObjectNotFoundError: there is no such object, archive or member.
        """
        checked_key(key)
        virtual = split_virtual_key(key) if resolve_virtual_keys else None
        if virtual is None:
            return self._open_plain(key, version_id)
        if is_shard_key(virtual[0]):
            try:
                return self._open_member(key, *virtual, version_id)
            except _NoArchiveError:
                return self._open_plain(key, version_id)
        try:
            return self._open_plain(key, version_id)
        except ExchangeObjectNotFoundError as error:
            try:
                return self._open_member(key, *virtual, version_id)
            except _NoArchiveError:
                raise error from None

    def _open_plain(self, key: str, version_id: str | None) -> ObjectBody:
        try:
            meta, chunks = read_chunks(self.store, key, version_id=version_id)
        except ObjectNotFoundError as error:
            raise not_found(key, error) from error
        return ObjectBody(chunks, size=meta.size)

    def _open_member(self, key: str, archive: str, member: str, version_id: str | None) -> ArchiveMemberBody:
        if version_id is None:
            reader = self.reader(archive)
        else:
            reader = ShardReader(at_version(self.store, archive, version_id), archive, verify=self.verify)
        try:
            return reader.open(member)
        except KeyError:
            raise ExchangeObjectNotFoundError(key, op="get", url=reader.url, hint="the archive has no such member") from None
        except ObjectNotFoundError as error:
            self.forget(archive)
            raise _NoArchiveError(key) from error

    def exists(self, key: str) -> bool:
        """Whether there is such an object, or such a member."""
        if self.store.exists(key):
            return True
        virtual = split_virtual_key(key)
        if virtual is None or not self.store.exists(virtual[0]):
            return False
        return virtual[1] in self.reader(virtual[0]).index

    def member_size(self, archive: str, member: str) -> int | None:
        """Length of a member in bytes, None where there is no such member."""
        index = self.reader(archive).index
        return index.member(index.find(member)).size if member in index else None

    def first_request(self, key: str) -> ReadRequest:
        """What to fetch first of an object whose size is not known."""
        return ReadRequest(key, 0, CHUNK)

    def checked(self, body: ObjectBody, entry: ManifestEntry) -> ObjectBody:
        """`body`, if it has as many bytes as its manifest entry says. ETags are not compared: a copy has others.

        Raises:
            IntegrityError: it has more, or fewer.
        """
        said: Any = entry.get("size_bytes")
        if said is None or body.size is None or body.size == said:
            return body
        kind = TruncatedError if body.size < said else IntegrityError
        key = str(entry.get("key") or entry.get("archive_key"))
        raise kind(
            f"it has {body.size} bytes, its manifest entry says {said}",
            op="read",
            url=f"{self.store.url}/{key}",
            key=key,
            hint="it was replaced, or its copy is not complete: restore it, or write the manifest anew",
        )

    def body_of(self, result: ReadResult) -> ObjectBody:
        """A stream over an object of which `first_request` was answered."""
        return ObjectBody(rest_of(self.store, result), size=result.size)

    def retry_alone(self, key: str, error: Exception) -> ObjectBody:
        """What to do with a failed `first_request`: an empty object has no range, all else is an error.

        Raises:
            ExchangeObjectNotFoundError, or `error` itself.
        """
        if isinstance(error, RangeError):
            return self._open_plain(key, None)
        if isinstance(error, ObjectNotFoundError):
            raise not_found(key, error) from error
        raise error


class ExchangeBase:
    """What manifests and shards need of the `S3ExchangeStore` they belong to."""

    _s3loader_by_name = "S3ExchangeStore"

    objects: ObjectStore
    """The object store all data calls go to."""
    access: ObjectAccess
    """What opens objects and members by key, and keeps indexes."""
    infer_id: Callable[[str], str]
    """Makes an entry's id from its key."""
    bucket: str
    s3_client: Any
    """The boto3 client, if one was given."""
    base_prefix: str
    prefix_all: bool

    def resolve_key(self, template: str, vars: Mapping[str, Any] | None = None) -> str:
        """The key of a template: variables filled in, normalised, below `base_prefix`.

        Raises:
            MissingPlaceholderError: a placeholder has no value; `.placeholder` says which.
        """
        raise NotImplementedError


def _rebuild(store: ObjectStore, verify: bool) -> ObjectAccess:
    return ObjectAccess(store, verify=verify)


class _NoArchiveError(Exception):
    """The archive of a virtual key does not exist."""


def not_found(key: str, error: ObjectNotFoundError) -> ExchangeObjectNotFoundError:
    """`error` as the exchange API says it, with `.key`."""
    return ExchangeObjectNotFoundError(key, op="get", url=error.url, status=error.status, code=error.code)


class _VersionBackend(ForwardingBackend):
    """Reads one key at one version, all others as they are."""

    def __init__(self, inner: Backend, key: str, version_id: str) -> None:
        super().__init__(inner)
        self._key = key
        self._version_id = version_id

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        version = self._version_id if key == self._key else version_id
        return self.inner.get(key, start, end, if_match=if_match, version_id=version)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        return self.inner.head(key, version_id=self._version_id if key == self._key else version_id)


def at_version(store: ObjectStore, key: str, version_id: str) -> ObjectStore:
    """`store`, in which `key` is an older version."""
    return ObjectStore(store.url, _VersionBackend(store.backend, key, version_id), options=store.options)


def object_metadata(store: ExchangeBase, key: str) -> dict[str, Any]:
    """What ``head_object`` of boto3 gives; of a virtual key its archive's, with the member's length as ``ContentLength``.

    Raises:
        ExchangeObjectNotFoundError: there is no such object, archive or member.
    """
    virtual = split_virtual_key(key)
    try:
        return _of_object(store, key)
    except ObjectNotFoundError as error:
        if virtual is None:
            raise not_found(key, error) from error
    try:
        archive = _of_object(store, virtual[0])
        size = store.access.member_size(*virtual)
    except ObjectNotFoundError as error:
        raise not_found(key, error) from error
    if size is None:
        raise ExchangeObjectNotFoundError(key, op="head", hint="the archive has no such member")
    return archive | {"ContentLength": size}


def _of_object(store: ExchangeBase, key: str) -> dict[str, Any]:
    if store.s3_client is None:
        return _as_boto3(store.objects.head(key))
    prefix = normalize_key(store.base_prefix) if store.prefix_all else ""
    try:
        answer = dict(store.s3_client.head_object(Bucket=store.bucket, Key=f"{prefix}/{key}" if prefix else key))
        return answer | {"Metadata": _of_users(answer.get("Metadata") or {})}
    except Exception:
        store.objects.head(key)  # says the same as one of our errors
        raise


def _as_boto3(meta: ObjectMeta) -> dict[str, Any]:
    modified = None if meta.last_modified is None else datetime.datetime.fromtimestamp(meta.last_modified, datetime.UTC)
    return {
        "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {}, "RetryAttempts": 0},
        "AcceptRanges": "bytes",
        "LastModified": modified,
        "ContentLength": meta.size,
        "ETag": f'"{meta.etag}"',
        "ContentType": meta.content_type or "binary/octet-stream",
        "Metadata": _of_users(meta.metadata),
    }


def _of_users(metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` without what we keep there for ourselves."""
    return {name: value for name, value in metadata.items() if name not in (SEAL, WRITE_ID)}


def download(access: ObjectAccess, key: str, local_path: str | os.PathLike[str]) -> Path:
    """Write an object or member to a local file, whole or not at all; parents are created.

    Raises:
        ExchangeObjectNotFoundError: there is no such object, archive or member.
    """
    target = Path(local_path)
    with access.open(key) as body:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".s3loader-", dir=target.parent)
        try:
            with open(handle, "wb") as file:
                while chunk := body.read(1 << 20):
                    file.write(chunk)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return target


def download_all(access: ObjectAccess, keys: Iterable[str], local_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Write objects or members to a folder, each under its base name; the file of each key.

    Raises:
        ConfigError: two keys have the same base name; nothing was downloaded.
        ExchangeObjectNotFoundError: there is no such object, archive or member.
    """
    targets: dict[str, Path] = {}
    owners: dict[str, str] = {}
    check_several(keys, "key")
    if not isinstance(local_dir, (str, os.PathLike)):
        raise ConfigError(f"a folder cannot be {type(local_dir).__name__}", hint="pass the path of a folder, as str or Path")
    for key in map(checked_key, keys):
        name = posixpath.basename((split_virtual_key(key) or ("", key))[1])
        if name in ("", ".", ".."):
            raise ConfigError(
                f"{key!r} has no base name to be a file", hint="download it with download_object, which takes the path to write"
            )
        if owners.setdefault(name, key) != key:
            raise ConfigError(
                f"{owners[name]!r} and {key!r} would both be the file {name!r}", hint="download them to different folders"
            )
        targets[key] = Path(local_dir) / name
    return {key: download(access, key, target) for key, target in targets.items()}
