"""An object written in parts while its data is made: parallel uploads, bounded memory, all or nothing."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Final

from s3loader.errors import ClosedError, ConfigError, S3LoaderError
from s3loader.store.arguments import readable
from s3loader.store.base import Backend
from s3loader.store.buffers import shared_pool
from s3loader.store.options import MAX_PARTS
from s3loader.store.threads import Crew
from s3loader.types import PartResult, PutMode, PutResult
from s3loader.units import GIB

__all__ = ["MultipartWriter", "part_size_for", "part_size_of"]

_log = logging.getLogger("s3loader.store")
_GROWS_EVERY: Final = 900
_LARGEST_PART: Final = 5 * GIB


def part_size_of(number: int, first: int) -> int:
    """Bytes of part `number` (1-based) of an object of unknown size: doubled every 900 parts.

    So `MAX_PARTS` parts suffice for 5 TiB from a first size of 5 MiB on, while 7 GiB still take parts
    of 8 MiB.
    """
    return max(first, min(first << (number - 1) // _GROWS_EVERY, _LARGEST_PART))


def part_size_for(size: int, least: int) -> int:
    """Bytes of each part of an object of `size` bytes: `least`, or more where that needs too many parts."""
    return max(least, -(-size // MAX_PARTS))


class MultipartWriter:
    """Writes one object; made by `ObjectStore.multipart`.

    Use as a context manager: leaving it publishes the object, an exception inside drops it.
    Memory is at most ``max_in_flight + 1`` parts, kept and used again; `write` waits while all
    are being uploaded. An error of a background part is raised by the next call, and the object
    never appears. Data that fits one part is written by a single put. For one thread at a time.
    """

    def __init__(
        self,
        backend: Backend,
        key: str,
        *,
        part_size: int,
        max_in_flight: int = 4,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if part_size < 1 or max_in_flight < 1:
            raise ConfigError("part_size and max_in_flight must be at least 1", hint="leave them out for those of StoreOptions")
        self.key = key
        self.result: PutResult | None = None
        """What was made; None before `close`."""
        self._backend = backend
        self._mode: PutMode = mode
        self._content_type = content_type
        self._metadata = metadata
        self._first_size = part_size
        self._in_flight = max_in_flight
        self._upload_id: str | None = None
        self._parts: list[PartResult] = []
        self._sent = 0
        self._size = 0
        self._fill = 0
        self._reserved = 0
        self._buffer: memoryview | None = None
        self._slots = threading.Semaphore(max_in_flight)
        self._crew: Crew | None = None
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._state = "open"
        self._pid = os.getpid()

    # data

    def write(self, data: Any) -> int:
        """Append `data`, which may be changed when this returns; returns its length in bytes.

        Whole parts of data that nobody can change (`bytes`, views of it) are uploaded from where they are;
        anything else is copied.
        """
        view = readable(data)
        fixed = type(view.obj) is bytes
        rest = view
        while rest:
            size = part_size_of(self._sent + 1, self._first_size)
            if fixed and self._buffer is None and len(rest) >= size:
                self._check()
                taken = size
                self._size += size
                self._send(rest[:size])
            else:
                room = self.reserve(len(rest))
                taken = len(room)
                room[:] = rest[:taken]
                self.commit(taken)
            rest = rest[taken:]
        self._check()
        return len(view)

    def reserve(self, size: int) -> memoryview:
        """Memory of the part being filled, to be written to directly: at least 1, at most `size` bytes.

        Follow with `commit`; a second `reserve` without it gives the same bytes again.
        """
        self._check()
        if size < 1:
            raise ConfigError(f"reserve at least 1 byte, not {size}", hint="ask for as many bytes as you are going to write")
        if self._buffer is None:
            part_size = part_size_of(self._sent + 1, self._first_size)
            self._buffer = shared_pool().lease(part_size)[:part_size]
        room = self._buffer[self._fill : self._fill + size]
        self._reserved = len(room)
        return room

    def commit(self, size: int) -> None:
        """The first `size` bytes of what `reserve` gave are data now."""
        if self._buffer is None or not 0 <= size <= self._reserved:
            raise ConfigError(
                f"cannot commit {size} bytes that were not reserved", hint="commit at most what the last reserve() gave"
            )
        self._reserved = 0
        self._fill += size
        self._size += size
        if self._fill == len(self._buffer):
            self._send_buffer()

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Wait until all full parts are stored; what does not fill a part stays here. Raises what went wrong."""
        self._check()
        self._settle()
        self._check()

    # the end

    def close(self) -> PutResult:
        """Publish the object; again gives the same result.

        Raises:
            ObjectExistsError, ObjectChangedError: the mode's condition did not hold.
            S3LoaderError: a part or the completion failed; there is no new object.
            ClosedError: it was aborted before.
        """
        if self.result is not None:
            return self.result
        self._check()
        try:
            self.result = self._publish()
        except BaseException:
            self.abort()
            raise
        self._state = "closed"
        self._let_go()
        return self.result

    def _publish(self) -> PutResult:
        if self._upload_id is None:
            body = self._buffer[: self._fill] if self._buffer is not None else b""
            return self._backend.put(self.key, body, mode=self._mode, content_type=self._content_type, metadata=self._metadata)
        if self._fill:
            self._send_buffer()
        self._settle()
        self._check()
        parts = sorted(self._parts, key=lambda part: part.number)
        result = self._backend.complete_multipart(self.key, self._upload_id, parts, mode=self._mode)
        return replace(result, size=self._size)

    def abort(self) -> None:
        """Drop what was uploaded; there will be no object. Never raises, and again is fine."""
        if self._state != "open":
            return
        self._state = "aborted"
        if self._pid != os.getpid():
            return  # the parent's upload, which goes on there
        self._let_go()
        if self._upload_id is not None:
            try:
                self._backend.abort_multipart(self.key, self._upload_id)
            except S3LoaderError as error:
                _log.warning("the parts of %s may be left behind: %s", self.key, error)

    def _let_go(self) -> None:
        self._buffer = None
        if self._crew is not None:
            self._crew.stop()
            self._crew = None

    def __enter__(self) -> MultipartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._state != "aborted":
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        if getattr(self, "_state", "") == "open" and self._pid == os.getpid() and self._size:
            _log.warning("a writer of %s was lost before close(): there will be no object", self._url())
            if self._crew is not None:
                self._crew.stop(wait=0)

    # parts

    def _check(self) -> None:
        if self._state != "open" or self._pid != os.getpid():
            state = self._state if self._state != "open" else "made in the parent process"
            raise ClosedError(f"the writer was {state}", op="write", url=self._url())
        if self._error is not None:
            error = self._error
            self.abort()
            raise error

    def _url(self) -> str:
        return f"{self._backend.url}/{self.key}"

    def _send_buffer(self) -> None:
        assert self._buffer is not None
        body = self._buffer[: self._fill]
        self._buffer, self._fill = None, 0
        self._send(body)

    def _send(self, body: memoryview) -> None:
        """Hand a part to a thread; waits while `max_in_flight` parts are under way."""
        if self._sent == MAX_PARTS:
            self.abort()
            raise ConfigError(f"more than {MAX_PARTS} parts", url=self._url(), hint="give a larger part_size")
        if self._upload_id is None:
            self._upload_id = self._backend.create_multipart(self.key, content_type=self._content_type, metadata=self._metadata)
        self._slots.acquire()
        if self._error is not None:
            self._slots.release()
            return  # the next call says so
        self._sent += 1
        if self._crew is None:
            self._crew = Crew(self._in_flight, "s3loader-upload")
        self._crew.submit(_Part(self, self._upload_id, self._sent, body))

    def _settle(self) -> None:
        """Wait until no part is under way."""
        for _ in range(self._in_flight):
            self._slots.acquire()
        self._slots.release(self._in_flight)

    def _run(self, part: _Part) -> None:
        try:
            if self._error is None:
                result = self._backend.upload_part(self.key, part.upload_id, part.number, part.body)
                with self._lock:
                    self._parts.append(result)
        except BaseException as error:  # noqa: BLE001  raised by the next call of the caller
            self._error = self._error or error
        finally:
            part.body.release()
            self._slots.release()


class _Part:
    """One job of the crew."""

    __slots__ = ("body", "number", "upload_id", "writer")

    def __init__(self, writer: MultipartWriter, upload_id: str, number: int, body: memoryview) -> None:
        self.writer = writer
        self.upload_id = upload_id
        self.number = number
        self.body = body

    def __call__(self) -> None:
        self.writer._run(self)
