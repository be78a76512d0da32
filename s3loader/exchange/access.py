"""Opening objects and members by key: one place for virtual keys, pinning, and which error means what."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any, Final

from s3loader.errors import ObjectNotFoundError, RangeError
from s3loader.exchange.errors import ExchangeObjectNotFoundError
from s3loader.exchange.keys import is_shard_key, split_virtual_key
from s3loader.shard.body import ArchiveMemberBody, ObjectBody
from s3loader.shard.index import INTERNAL_MANIFEST
from s3loader.shard.reader import ShardReader
from s3loader.shard.source import CHUNK, read_chunks, rest_of
from s3loader.store.arguments import checked_key
from s3loader.store.base import Backend, ReadResult
from s3loader.store.objectstore import ObjectStore
from s3loader.store.wrappers.wrapper import Wrapper
from s3loader.types import Buffer, ObjectMeta, ReadRequest

__all__ = ["ObjectAccess"]

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
        self._readers: OrderedDict[tuple[str, str | None, str], ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.store, self.verify)

    def reader(self, key: str, *, etag: str | None = None, internal: str = INTERNAL_MANIFEST) -> ShardReader:
        """The reader of an archive, with its index where it was used before."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            pin = etag if self.verify else None
            reader = self._readers.pop((key, pin, internal), None)
            if reader is None:
                reader = ShardReader(self.store, key, etag=pin, internal_manifest_path=internal, verify=self.verify)
            self._readers[key, pin, internal] = reader
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

    def first_request(self, key: str, etag: str | None) -> ReadRequest:
        """What to fetch first of an object whose size is not known."""
        return ReadRequest(key, 0, CHUNK, if_match=etag or None if self.verify else None)

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


def _rebuild(store: ObjectStore, verify: bool) -> ObjectAccess:
    return ObjectAccess(store, verify=verify)


class _NoArchiveError(Exception):
    """The archive of a virtual key does not exist."""


def not_found(key: str, error: ObjectNotFoundError) -> ExchangeObjectNotFoundError:
    """`error` as the exchange API says it, with `.key`."""
    return ExchangeObjectNotFoundError(key, op="get", url=error.url, status=error.status, code=error.code)


class _VersionBackend(Wrapper):
    """Reads one key at one version, all others as they are."""

    def __init__(self, inner: Backend, key: str, version_id: str) -> None:
        super().__init__(inner)
        self._key = key
        self._version_id = version_id

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """See `Backend.get`."""
        version = self._version_id if key == self._key else version_id
        return self.inner.get(key, start, end, if_match=if_match, version_id=version)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """See `Backend.head`."""
        return self.inner.head(key, version_id=self._version_id if key == self._key else version_id)


def at_version(store: ObjectStore, key: str, version_id: str) -> ObjectStore:
    """`store`, in which `key` is an older version."""
    return ObjectStore(store.url, _VersionBackend(store.backend, key, version_id), options=store.options)
