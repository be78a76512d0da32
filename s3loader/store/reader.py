"""One object as a read-only binary file."""

from __future__ import annotations

import io
import os
from typing import Any, Protocol

from s3loader.errors import ClosedError, ObjectChangedError, RangeError, UnsupportedOperationError
from s3loader.store.backend import Backend
from s3loader.types import ObjectMeta
from s3loader.units import MIB

__all__ = ["ObjectReader", "open_reader"]


class _Store(Protocol):
    """What a reader asks of an `ObjectStore`."""

    url: str

    @property
    def backend(self) -> Backend: ...

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta: ...


class ObjectReader(io.RawIOBase):
    """Unbuffered reads of one object, each a ranged request.

    The ETag seen first is asked for ever after, so all bytes are of one version: reading on after
    the object was replaced raises `ObjectChangedError`.
    """

    def __init__(self, store: _Store, key: str, *, version_id: str | None = None) -> None:
        super().__init__()
        self.key = key
        self._store = store
        self._version_id = version_id
        meta = store.head(key, version_id=version_id)
        self.size = meta.size
        """Bytes of the object."""
        self.etag = meta.etag
        """The version that is read."""
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` from the start, the position or the end; returns the new position."""
        self._checkClosed()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}.get(whence)
        if base is None:
            raise UnsupportedOperationError(f"cannot seek with whence {whence}", hint="use io.SEEK_SET, SEEK_CUR or SEEK_END")
        if base + offset < 0:
            raise RangeError(
                f"there is no position {base + offset}", op="seek", url=self._url(), hint="positions begin at 0, the first byte"
            )
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position on; returns the count, less than asked only at the end."""
        self._checkClosed()
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self.size - self._at))
        if count:
            self._fill(view[:count])
            self._at += count
        return count

    def _fill(self, view: memoryview) -> None:
        condition = self.etag or None
        if self._version_id is None:
            self._store.backend.read_into(self.key, self._at, view, if_match=condition)
            return
        end = self._at + len(view)
        meta, data = self._store.backend.get(self.key, self._at, end, version_id=self._version_id)
        if condition and meta.etag != condition:
            raise ObjectChangedError("its ETag is not the one first seen", op="read", url=self._store.url)
        view[:] = data

    def readall(self) -> bytes:
        """Everything from the position on, in one request."""
        rest = bytearray(max(0, self.size - self._at))
        self.readinto(rest)
        return bytes(rest)

    def _url(self) -> str:
        return f"{self._store.url}/{self.key}"

    def _checkClosed(self) -> None:  # noqa: N802  RawIOBase has one of this name, unknown to type checkers
        if self.closed:
            raise ClosedError("the file was closed", op="read", url=self._url(), hint="open it again")


def open_reader(store: _Store, key: str, version_id: str | None, buffer_size: int = MIB) -> io.BufferedReader:
    """A buffered `ObjectReader`; its `.raw` has `size` and `etag`."""
    return io.BufferedReader(ObjectReader(store, key, version_id=version_id), buffer_size)
