"""What a store really does, found by trying it on throw-away keys.

Many servers accept a condition and ignore it, so neither names nor answers of success are
believed: each condition is tried where it must hold and where it must not.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

from s3loader.checksum import crc32c_base64
from s3loader.errors import (
    ConflictError,
    IntegrityError,
    ObjectChangedError,
    PreconditionFailedError,
    S3LoaderError,
    StoreError,
    UnsupportedOperationError,
)
from s3loader.store.base import Backend
from s3loader.store.wrappers.prefix import prefix_of
from s3loader.store.wrappers.wrapper import Delegate, innermost
from s3loader.types import Buffer, Capabilities, PutMode, PutResult, Update

__all__ = ["ChecksummedPut", "capabilities", "conditional_writes", "probe"]

_log = logging.getLogger("s3loader.store")
_OWN: Final = ("file", "memory")

_probed: dict[tuple[str, ...], Capabilities] = {}
_conditional: dict[tuple[str, ...], bool] = {}
_REFUSED: Final = (PreconditionFailedError, ConflictError, UnsupportedOperationError)


@runtime_checkable
class ChecksummedPut(Protocol):
    """An engine that lets a caller choose the checksum it sends."""

    def put_with_checksum(self, key: str, data: Buffer, checksum: str) -> PutResult:
        """Put, telling the server that the CRC32C of `data` is `checksum` (base64 of 4 bytes), right or wrong."""
        ...


def capabilities(backend: Backend, identity: tuple[str, ...] | None) -> Capabilities:
    """What `probe` finds, or has found in this process.

    Args:
        backend: Of the store.
        identity: Of `ObjectStore`: engine, server and bucket; None: always probed.
    """
    known = _probed.get(identity) if identity else None
    if known is None:
        known = probe(backend)
        if identity:
            _probed[identity] = known
    return known


def conditional_writes(backend: Backend, identity: tuple[str, ...] | None) -> bool:
    """Whether create-only puts and puts with If-Match are honoured; remembered as well.

    Args:
        backend: Of the store.
        identity: As for `capabilities`.
    """
    if identity is None:
        return _conditions(backend)
    if identity in _probed:
        return _probed[identity].conditional_writes
    known = _conditional.get(identity)
    if known is None:
        known = _conditional[identity] = _conditions(backend)
    return known


def _conditions(backend: Backend) -> bool:
    """Both conditions by one object: six requests where they are honoured."""
    key = f"s3loader-probe-{os.urandom(16).hex()}"
    puts = _Plain(backend)
    try:
        try:
            first = puts.put(key, b"first", mode="create").etag or backend.head(key).etag
        except _REFUSED:
            return False
        if _holds(lambda: puts.put(key, b"created twice", mode="create")):
            return False
        if not _holds(lambda: puts.put(key, b"second", mode=Update(first))):
            return False
        return not _holds(lambda: puts.put(key, b"stale", mode=Update(first))) and puts.get(key) == b"second"
    finally:
        try:
            backend.delete(key)
        except S3LoaderError as error:
            _log.warning("the probe's object %s/%s may be left behind: %s", backend.url, key, error)


def probe(backend: Backend) -> Capabilities:
    """Try what `backend` can do, with a handful of small objects, which are deleted again.

    Raises:
        AccessDeniedError: the credentials may not write and delete there.
        StoreError: the store fails otherwise.
    """
    folder = f"s3loader-probe-{os.urandom(16).hex()}/"
    try:
        return Capabilities(
            create=_create(_Plain(backend), folder + "create"),
            update=_update(_Plain(backend), folder + "update"),
            multipart_create=_create(_ByParts(backend), folder + "multipart-create"),
            multipart_update=_update(_ByParts(backend), folder + "multipart-update"),
            get_if_match=_get_if_match(backend, folder + "get"),
            upload_checksum=_checksum(backend, folder + "checksum"),
            metadata=_metadata(backend, folder + "metadata"),
        )
    finally:
        _clean(backend, folder)


class _Plain:
    """Puts of whole objects."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def put(self, key: str, data: bytes, *, mode: PutMode = "overwrite") -> PutResult:
        return self.backend.put(key, data, mode=mode)

    def get(self, key: str) -> bytes:
        return bytes(self.backend.get(key)[1])


class _ByParts(_Plain):
    """The same by multipart uploads of one part."""

    def put(self, key: str, data: bytes, *, mode: PutMode = "overwrite") -> PutResult:
        upload_id = self.backend.create_multipart(key)
        try:
            part = self.backend.upload_part(key, upload_id, 1, data)
            return self.backend.complete_multipart(key, upload_id, [part], mode=mode)
        except BaseException:
            with contextlib.suppress(StoreError):
                self.backend.abort_multipart(key, upload_id)
            raise


def _holds(write: Callable[[], PutResult]) -> bool:
    """Whether the conditional write is done; a store that knows no conditions refuses or fails."""
    try:
        write()
    except _REFUSED:
        return False
    return True


def _create(puts: _Plain, key: str) -> bool:
    if not _holds(lambda: puts.put(key, b"first", mode="create")):
        return False
    return not _holds(lambda: puts.put(key, b"second", mode="create")) and puts.get(key) == b"first"


def _update(puts: _Plain, key: str) -> bool:
    stale = puts.put(key, b"first").etag or puts.backend.head(key).etag
    puts.put(key, b"second")
    current = puts.backend.head(key).etag
    if _holds(lambda: puts.put(key, b"wrong", mode=Update(stale))) or puts.get(key) != b"second":
        return False
    return _holds(lambda: puts.put(key, b"third", mode=Update(current))) and puts.get(key) == b"third"


def _get_if_match(backend: Backend, key: str) -> bool:
    stale = backend.put(key, b"first").etag
    backend.put(key, b"second")
    try:
        backend.get(key, if_match=stale)
    except ObjectChangedError as error:
        # Engines compare the answer's ETag themselves; only a server says 412.
        return error.status == 412 or backend.engine in _OWN
    return False


def _checksum(backend: Backend, key: str) -> bool:
    engine = innermost(backend)
    if isinstance(engine, Delegate):  # an engine that leaves part of the verbs to another
        engine = innermost(engine.inner)
    if not isinstance(engine, ChecksummedPut):
        return False
    try:
        engine.put_with_checksum(prefix_of(backend) + key, b"some bytes", crc32c_base64(b"other bytes"))
    except (IntegrityError, StoreError):
        return True
    return False


def _metadata(backend: Backend, key: str) -> bool:
    try:
        backend.put(key, b"x", metadata={"s3loader-probe": "yes"})
    except UnsupportedOperationError:
        return False
    return backend.head(key).metadata.get("s3loader-probe") == "yes"


def _clean(backend: Backend, folder: str) -> None:
    try:
        failures = backend.delete_many([entry.key for entry in backend.list(folder)])
    except S3LoaderError as error:
        _log.warning("the probe's objects under %s/%s may be left behind: %s", backend.url, folder, error)
        return
    for failure in failures:
        _log.warning("the probe's object %s/%s is left behind: %s", backend.url, failure.key, failure.error)
