"""What a store really does, found by trying it on throw-away keys.

Many servers accept a condition and ignore it, so neither names nor answers of success are
believed: each condition is tried where it must hold and where it must not, and what became of it is read back.

A network that fails decides nothing: a verdict comes from answers of the store alone, and without them there is an error. A
store that was wrongly held to know no conditions would be written to without them, over what others have written.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

from s3loader.checksum import crc32c_base64
from s3loader.errors import (
    ConflictError,
    IntegrityError,
    ObjectChangedError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    PreconditionFailedError,
    S3LoaderError,
    StoreError,
    UnsupportedOperationError,
)
from s3loader.store.backend import Backend
from s3loader.types import Capabilities, PutMode, PutResult, Update

__all__ = ["capabilities", "conditional_writes", "probe"]

_log = logging.getLogger("s3loader.store")
_OWN: Final = ("file", "memory")

_probed: dict[tuple[str, ...], Capabilities] = {}
_conditional: dict[tuple[str, ...], bool] = {}
_REFUSED: Final = (PreconditionFailedError, ConflictError, UnsupportedOperationError)
_WRITTEN: Final = (b"first", b"second", b"third", b"created twice", b"stale")
"""What the probe's objects may hold."""
_READS: Final = 5
"""Reads of an object whose bytes are not among those that were ever written."""


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
        first = puts.attempt(key, b"first", "create")
        if first is None or puts.holds(key, b"created twice", "create"):
            return False
        first = first or backend.head(key).etag
        if not puts.holds(key, b"second", Update(first)) or puts.holds(key, b"stale", Update(first)):
            return False
        return puts.get(key) == b"second"
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

    def attempt(self, key: str, data: bytes, mode: PutMode) -> str | None:
        """The ETag that a conditional write has made; None where it is refused, as by a store that knows no conditions.

        Raises:
            StoreError: the store did not say, as the network failed.
        """
        try:
            return self.put(key, data, mode=mode).etag
        except _REFUSED as error:
            if error.attempts <= 1:
                return None
        except OutcomeUnknownError as error:
            if not isinstance(error.__cause__, _REFUSED):
                raise
        # refused, perhaps by its own earlier attempt
        return self.backend.head(key).etag if self.get(key) == data else None

    def holds(self, key: str, data: bytes, mode: PutMode) -> bool:
        """Whether a conditional write is done.

        Raises:
            StoreError: the store did not say.
        """
        return self.attempt(key, data, mode) is not None

    def get(self, key: str) -> bytes | None:
        """What is there; None: nothing.

        Raises:
            IntegrityError: something that was never written, read after read.
        """
        for _ in range(_READS):
            try:
                found = bytes(self.backend.get(key)[1])
            except ObjectNotFoundError:
                return None
            if found in _WRITTEN:
                return found
        url = f"{self.backend.url}/{key}"
        raise IntegrityError(f"{_READS} reads of what was just written gave other bytes", op="probe", url=url)


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


def _create(puts: _Plain, key: str) -> bool:
    if not puts.holds(key, b"first", "create"):
        return False
    return not puts.holds(key, b"second", "create") and puts.get(key) == b"first"


def _update(puts: _Plain, key: str) -> bool:
    stale = puts.put(key, b"first").etag or puts.backend.head(key).etag
    puts.put(key, b"second")
    current = puts.backend.head(key).etag
    if puts.holds(key, b"stale", Update(stale)) or puts.get(key) != b"second":
        return False
    return puts.holds(key, b"third", Update(current)) and puts.get(key) == b"third"


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
    put = getattr(backend, "put_with_checksum", None)
    if put is None:
        return False
    for last in (False, False, True):  # not by the policy of retries, which tries a wrong checksum again, too
        try:
            put(key, b"some bytes", crc32c_base64(b"other bytes"))
            return False
        except UnsupportedOperationError:
            return False
        except IntegrityError:
            return True
        except StoreError as error:
            if error.status is not None and 400 <= error.status < 500 and not error.retryable:
                return True
            if last or not error.retryable:
                raise
    raise AssertionError("unreachable")


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
