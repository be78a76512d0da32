"""`MultipartUploadWriter`: an object from memory that the writer lends, so that its bytes are written once, by the caller."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Unpack

from s3loader.arguments import checked
from s3loader.errors import ConfigError, IntegrityError
from s3loader.store.arguments import check_attributes, checked_attributes, readable, said
from s3loader.store.buffers import shared_pool
from s3loader.store.open import StoreKeywords
from s3loader.store.ordered import BoundedPool
from s3loader.store.parts import PartsWriter, PartUpload, part_size_of
from s3loader.toolbox.stores import object_at
from s3loader.toolbox.twins import in_thread
from s3loader.types import Location, ObjectURL, PutMode, PutResult
from s3loader.units import MIB, parse_size

__all__ = ["AsyncMultipartUploadWriter", "MultipartUploadWriter"]

_log = logging.getLogger("s3loader.s3")
_SMALLEST: Final = 5 * MIB
"""Bytes of a part, but the last, that S3 accepts."""
_DEFAULT_PART: Final = 16 * MIB
_DEFAULT_IN_FLIGHT: Final = 16


class _OrderError(ConfigError, RuntimeError):
    """Calls in an order that makes no sense."""


@checked
class MultipartUploadWriter(PartsWriter):
    """Writes one object in parts; nobody sees anything of it before `close`, and then all of it.

    Use as a context manager: leaving it publishes the object, an exception inside drops it. What `commit` was told of is
    sent from the memory that `reserve` lent, without a copy. At most ``max_in_flight + 1`` parts are in memory; `write`,
    `commit` and `reserve` wait while all are being uploaded. Each part carries a CRC32C; the size of the finished object is
    looked at. Parts grow where more than 10,000 would be needed. Data that fits one part is written by a single put.
    An error of a part in the background is raised by the next call. For one thread at a time; not across a fork.

    Args:
        bucket: Name of an S3 bucket, or URL of any bucket or folder.
        key: Of the object in it.
        part_size: Bytes of a part (``"16MiB"``), at least 5 MiB; default 16 MiB. A part is larger by up to what was reserved
            at once.
        max_in_flight: Parts uploaded at a time; default 16.
        content_type: Of the object.
        abort_on_drop: Whether a writer that is lost before `close` drops what it has uploaded.
        metadata: Of the object.
        attributes: What else describes it, as `ObjectStore.put` lists it.
        tags: Up to 10 tags of the object.
        mode: ``"overwrite"``, ``"create"`` or ``Update(etag)``; decided when the object is completed.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        part_size: int | str | None = None,
        max_in_flight: int | None = None,
        content_type: str | None = None,
        abort_on_drop: bool | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        mode: PutMode = "overwrite",
        **place: Unpack[StoreKeywords],
    ) -> None:
        root = ObjectURL.parse(bucket if "://" in bucket or bucket.startswith(("/", ".", "~")) else f"s3://{bucket}")
        store, self.key = object_at(root.joined(key), place)
        self.url = str(root.joined(key))
        self._first = _DEFAULT_PART if part_size is None else parse_size(part_size, "part_size")
        in_flight = _DEFAULT_IN_FLIGHT if max_in_flight is None else max_in_flight
        if self._first < _SMALLEST:
            raise ConfigError(f"a part of {self._first} bytes", hint="S3 wants at least 5 MiB for every part but the last")
        if in_flight < 1:
            raise ConfigError(f"max_in_flight cannot be {in_flight}", hint="give 1 or more")
        check_attributes(content_type, metadata, headers=store.engine not in ("file", "memory"))
        self._backend = store.backend
        self._mode: PutMode = mode
        self._described: dict[str, Any] = {"content_type": content_type, "metadata": metadata}
        self._described |= said(checked_attributes(attributes, tags))
        self._abort_on_drop = abort_on_drop is not False
        self._block: memoryview | None = None
        self._fill = 0
        self._lent: memoryview | None = None
        self._started = _now()
        self._result: dict[str, Any] | None = None
        upload = PartUpload(self._backend, self.key, **self._described)
        super().__init__(upload, BoundedPool(in_flight, "s3loader-upload", max_jobs=in_flight), self.url)

    @classmethod
    def from_uri(
        cls,
        uri: Location,
        part_size: int | str | None = None,
        max_in_flight: int | None = None,
        content_type: str | None = None,
        abort_on_drop: bool | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        mode: PutMode = "overwrite",
        **place: Unpack[StoreKeywords],
    ) -> MultipartUploadWriter:
        """A writer of the object at `uri`, of any scheme; the rest as for the class."""
        where = ObjectURL.parse(uri)
        if where.scheme == "file":
            folder, key = where.split()
            root = str(folder)
        else:
            root, key = f"{where.scheme}://{where.bucket}", where.key
        if not key:
            raise ConfigError(f"{where} names no object", hint="write the object's key behind the bucket or folder")
        described: dict[str, Any] = {"metadata": metadata, "attributes": attributes, "tags": tags}
        return cls(root, key, part_size, max_in_flight, content_type, abort_on_drop, mode=mode, **described, **place)

    # data

    def write(self, data: Any, *, copy: bool = True) -> int:
        """Append `data`; returns its length in bytes.

        Args:
            data: Anything contiguous with the buffer protocol. Whole parts of what nobody can change (`bytes`) are sent from
                where they are, the rest is copied.
            copy: False: whole parts of anything are sent from where they are; it must stay as it is until `flush` or `close`.
        """
        self._check()
        self._check_nothing_lent()
        view = readable(data)
        fixed = not copy or type(view.obj) is bytes
        rest = view
        while rest:
            part = self._part_size()
            if fixed and not self._fill and len(rest) >= part:
                taken = part
                self._send(rest[:part])
            else:
                if self._block is None:
                    self._block = shared_pool().lease(part)[:part]
                taken = min(len(rest), max(1, min(part, len(self._block)) - self._fill))
                self._block[self._fill : self._fill + taken] = rest[:taken]
                self._fill += taken
                if self._fill >= min(part, len(self._block)):
                    self._send_block()
            self._size += taken
            rest = rest[taken:]
        self._check()
        return len(view)

    def reserve(self, size: int) -> memoryview:
        """Writable memory of exactly `size` bytes, uninitialised; `commit` says how many of them are data.

        Raises:
            ConfigError: less than 1 byte; the last reservation was not committed yet (which is a RuntimeError, too).
        """
        self._check()
        self._check_nothing_lent()
        if size < 1:
            raise ConfigError(f"cannot reserve {size} bytes", hint="ask for as many bytes as you are going to write")
        part = self._part_size()
        room = size if size >= part else -(-part // size) * size  # whole reservations up to the end of a part
        if self._block is not None and len(self._block) - self._fill < size:
            if self._fill >= _SMALLEST:
                self._send_block()  # a smaller part costs nothing, moving its bytes would
            else:
                head, self._block = self._block[: self._fill], shared_pool().lease(self._fill + room)
                self._block[: self._fill] = head
                self._block = self._block[: self._fill + room]
        if self._block is None:
            self._block = shared_pool().lease(room)[:room]
        self._lent = self._block[self._fill : self._fill + size]
        return self._lent

    def commit(self, nbytes: int) -> None:
        """The first `nbytes` bytes of the reservation are data now, and must not be changed any more.

        Raises:
            ConfigError: more than was reserved; or nothing was (which is a RuntimeError, too).
        """
        self._check()
        if self._lent is None or self._block is None:
            raise _OrderError("nothing is reserved", hint="call reserve() first")
        if not 0 <= nbytes <= len(self._lent):
            raise ConfigError(
                f"{nbytes} bytes of {len(self._lent)} that were reserved", hint="commit at most what was reserved"
            )
        lent, self._lent = self._lent, None
        with contextlib.suppress(BufferError):  # an array over it keeps it
            lent.release()
        self._fill += nbytes
        self._size += nbytes
        if self._fill >= self._part_size():
            self._send_block()
        self._check()

    def flush(self) -> None:
        """Wait until all full parts are stored; what does not fill a part stays here. Raises what went wrong."""
        self._check()
        try:
            self._pool.wait()
        except BaseException:
            self.abort()
            raise

    # the end

    def close(self) -> dict[str, Any]:
        """Publish the object; again gives the same answer.

        Returns:
            ``etag``, ``total_bytes``, ``parts`` (1 for a single put), ``started_at`` and ``completed_at`` (ISO 8601, UTC).

        Raises:
            ObjectExistsError, ObjectChangedError: the mode's condition did not hold.
            IntegrityError: the store has an object of another size.
            S3LoaderError: a part or the completion failed; there is no new object.
            ClosedError: it was aborted before.
        """
        if self._result is not None:
            return dict(self._result)
        self._check()
        try:
            made = self._publish()
        except BaseException:
            self.abort()
            raise
        self._state = "closed"
        self._let_go()
        self._result = {
            "etag": made.etag,
            "total_bytes": self._size,
            "parts": max(1, self._sent),
            "started_at": self._started,
            "completed_at": _now(),
        }
        return dict(self._result)

    def _publish(self) -> PutResult:
        if not self._sent:
            body = self._block[: self._fill] if self._block is not None else b""
            return self._backend.put(self.key, body, mode=self._mode, **self._described)
        self._lent = None
        if self._fill:
            self._send_block()
        self._pool.wait()
        made = self._upload.complete(self._size, self._mode)
        found = self._backend.head(self.key, version_id=made.version_id)
        if found.size != self._size and found.etag in ("", made.etag):  # else somebody has replaced it since
            raise IntegrityError(
                f"it has {found.size} bytes, {self._size} were written",
                op="complete upload",
                url=self.url,
                hint="write it again",
            )
        return made

    def _let_go(self) -> None:
        self._block = self._lent = None
        super()._let_go()

    def __enter__(self) -> MultipartUploadWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.abort()
        elif self._state != "aborted":
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "") != "open" or self._pid != os.getpid() or sys.is_finalizing():
            return
        if self._size:
            _log.warning("a writer of %s was lost before close(): there will be no object", self.url)
        if self._abort_on_drop:
            self.abort()
        else:
            self._pool.stop(wait=0)

    # parts

    def _check_nothing_lent(self) -> None:
        if self._lent is not None:
            raise _OrderError("a reservation is open", hint="commit it first (commit(0) gives it back)")

    def _part_size(self) -> int:
        return part_size_of(self._sent + 1, self._first)

    def _send_block(self) -> None:
        """Send what the block holds: one part or, of a large reservation, several of about equal size."""
        assert self._block is not None
        body, self._block, self._fill = self._block[: self._fill], None, 0
        count = max(1, len(body) // self._part_size())
        at = 0
        for i in range(count):
            end = len(body) * (i + 1) // count
            self._send(body[at:end])
            at = end


class AsyncMultipartUploadWriter:
    """`MultipartUploadWriter` with coroutines; made with the same arguments.

    ``async with`` publishes on leaving, and drops the object on an exception.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sync = MultipartUploadWriter(*args, **kwargs)

    @classmethod
    def from_uri(cls, uri: Location, *args: Any, **kwargs: Any) -> AsyncMultipartUploadWriter:
        """A writer of the object at `uri`."""
        made = cls.__new__(cls)
        made._sync = MultipartUploadWriter.from_uri(uri, *args, **kwargs)
        return made

    async def write(self, data: Any, *, copy: bool = True) -> int:
        """Append `data`; it must not be changed before this returns."""
        return await in_thread(self._sync.write, data, copy=copy)

    def reserve(self, size: int) -> memoryview:
        """Writable memory of exactly `size` bytes; no coroutine, for nothing is waited for."""
        return self._sync.reserve(size)

    async def commit(self, nbytes: int) -> None:
        """The first `nbytes` bytes of the reservation are data now."""
        await in_thread(self._sync.commit, nbytes)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._sync.tell()

    async def flush(self) -> None:
        """Wait until all full parts are stored."""
        await in_thread(self._sync.flush)

    async def close(self) -> dict[str, Any]:
        """Publish the object."""
        return await in_thread(self._sync.close)

    async def abort(self) -> None:
        """Drop what was uploaded."""
        await in_thread(self._sync.abort)

    async def __aenter__(self) -> AsyncMultipartUploadWriter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await in_thread(self._sync.__exit__, kind, error, trace)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
