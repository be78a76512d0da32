"""Objects written in parts: bounded memory, several parts on their way, all of the object or nothing of it.

`PartUpload` is one object's parts in a store: numbered, stored by whatever thread has them, then made into the object.
`MultipartWriter` cuts a stream into parts and uploads them in the background; `put_file` feeds one from a file.
Requests are repeated by the backend they are given (a `Pipeline`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final

from s3loader.arguments import checked
from s3loader.errors import ClosedError, ConfigError, ObjectNotFoundError, S3LoaderError, StoreError
from s3loader.store.arguments import readable, said
from s3loader.store.backend import Backend
from s3loader.store.buffers import shared_pool
from s3loader.store.options import MAX_PARTS
from s3loader.store.ordered import BoundedPool
from s3loader.types import Buffer, PartResult, PutMode, PutResult
from s3loader.units import GIB, KIB, MIB

__all__ = [
    "LEAST_PART",
    "MultipartWriter",
    "OpenUpload",
    "PartUpload",
    "even_parts",
    "joined_etag",
    "open_uploads",
    "part_size_for",
    "part_size_of",
    "put_file",
]

_log = logging.getLogger("s3loader.store")
_GROWS_EVERY: Final = 900
_LARGEST_PART: Final = 5 * GIB
LEAST_PART: Final = 5 * MIB
"""S3 takes no smaller parts, but for the last."""
_ROUND: Final = 256 * KIB


def part_size_of(number: int, first: int) -> int:
    """Bytes of part `number` (1-based) of an object of unknown size: doubled every 900 parts.

    So `MAX_PARTS` parts suffice for 5 TiB from a first size of 5 MiB on, while 7 GiB still take parts
    of 8 MiB.
    """
    return max(first, min(first << (number - 1) // _GROWS_EVERY, _LARGEST_PART))


def part_size_for(size: int, least: int) -> int:
    """Bytes of each part of an object of `size` bytes: `least`, or more where that needs too many parts."""
    return max(least, -(-size // MAX_PARTS))


def even_parts(total: int, most: int, connections: int, least: int) -> int:
    """Bytes of each part where `total` bytes go over `connections` at a time, in parts of about `most` bytes.

    A connection moves only so much a second, so what counts is how many parts one of them moves after each other. With parts
    of `most` bytes the last round would leave most connections idle (65 parts over 64 take as long as 128), and less than a
    round would not even use all of them. So parts are as large as makes the rounds full: smaller, not below `least`, or up
    to a sixteenth larger than `most`.
    """
    if most <= least:
        return most
    largest = most + most // 16
    rounds = max(1, -(-total // (connections * largest)))
    part = -(-total // (connections * rounds))
    return min(largest, max(least, -(-part // _ROUND) * _ROUND))


def joined_etag(digests: Iterable[bytes]) -> str:
    """The ETag that S3 gives an object of several parts, from the MD5s of them."""
    parts = [*digests]
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


class PartUpload:
    """The parts of one object: each is stored under its number, by any thread and in any order; then they become the object.

    The upload begins with the first part. Nobody sees anything of it before `complete`.

    Args:
        backend: Where to.
        key: Of the object.
        count: How many parts it will have, where that is known: what a store cannot take is refused here.
        content_type: Of the object.
        metadata: Of the object.
        attributes: Of the object.
        upload_id: Of an open upload to go on with; empty: begin one.
        parts: What that upload has already, by number.

    Raises:
        ConfigError: more parts than a store takes.
    """

    def __init__(
        self,
        backend: Backend,
        key: str,
        *,
        count: int = 1,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
        upload_id: str = "",
        parts: Mapping[int, PartResult] | None = None,
    ) -> None:
        self.key = key
        self.upload_id = upload_id
        """Empty before the first part, and when it was completed or aborted."""
        self.parts: dict[int, PartResult] = dict(parts or {})
        """What is stored, by number."""
        self._backend = backend
        self._content_type = content_type
        self._metadata = metadata
        self._attributes = attributes
        self._lock = threading.Lock()
        self._ended = False
        self.check_number(count)

    @property
    def url(self) -> str:
        """Of the object."""
        return f"{self._backend.url}/{self.key}"

    @property
    def size(self) -> int:
        """Bytes of the parts that are stored."""
        return sum(part.size for part in self.parts.values())

    def begin(self) -> str:
        """The upload's id; the first caller begins it.

        Raises:
            ClosedError: it was completed or aborted.
        """
        if not self.upload_id:
            with self._lock:
                if self._ended:
                    raise ClosedError("the upload was completed or aborted", op="upload part", url=self.url)
                if not self.upload_id:
                    self.upload_id = self._backend.create_multipart(
                        self.key, content_type=self._content_type, metadata=self._metadata, **said(self._attributes)
                    )
        return self.upload_id

    def store(self, number: int, body: Buffer) -> int:
        """Store part `number` (1-based), sent from where it lies; returns how many parts are stored with it.

        A number is told once, so of several threads exactly one learns that its part was the last.
        """
        self.check_number(number)
        part = self._backend.upload_part(self.key, self.begin(), number, body)
        with self._lock:
            self.parts[number] = part
            return len(self.parts)

    def complete(self, size: int, mode: PutMode = "overwrite") -> PutResult:
        """Make the object of the parts; `parts` may be wrong for good where this raises.

        Args:
            size: Bytes that it must have.
            mode: The condition of it.

        Raises:
            StoreError: a part is missing, or they are not `size` bytes; nothing was sent then. Or the request failed, or
                made an object of another size.
            ObjectExistsError, ObjectChangedError: the mode's condition did not hold.
        """
        parts = [self.parts[number] for number in sorted(self.parts)]
        missing = next((i for i, part in enumerate(parts, 1) if part.number != i), None)
        if missing is not None or self.size != size:
            what = f"part {missing} is missing" if missing is not None else f"its parts are {self.size} bytes, not {size}"
            raise StoreError(what, op="complete upload", url=self.url, hint="write the object again; nothing was published")
        result = self._backend.complete_multipart(self.key, self.begin(), parts, mode=mode)
        self._ended, self.upload_id = True, ""
        if result.size not in (size, 0):  # 0: the store does not say
            raise StoreError(
                f"it has {result.size} bytes after its upload, not {size}",
                op="complete upload",
                url=self.url,
                hint="the store, a proxy or another writer changed it; write it again",
            )
        return replace(result, size=size)

    def abort(self) -> None:
        """Drop what was stored; again is fine. Raises what the request fails with."""
        self._ended = True
        if self.upload_id:
            self._backend.abort_multipart(self.key, self.upload_id)
            self.upload_id = ""

    def abort_quietly(self) -> None:
        """As `abort`, beside an error that is being raised: its own failure is logged."""
        try:
            self.abort()
        except S3LoaderError as error:
            _log.warning("the parts of %s may be left behind: %s", self.key, error)

    def check_number(self, number: int) -> None:
        """Raise `ConfigError` if a store takes no part of this number."""
        if number > MAX_PARTS:
            raise ConfigError(
                f"{number} parts: more than {MAX_PARTS} parts are too many for a store",
                op="upload part",
                url=self.url,
                hint=f"give a larger part_size: an object has at most {MAX_PARTS} parts",
            )


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An upload that somebody has begun, and neither completed nor aborted."""

    key: str
    upload_id: str
    initiated: float | None = None
    """Seconds since the epoch, where the store says."""
    parts: Mapping[int, PartResult] = field(default_factory=dict)
    """What it has, by number."""


def open_uploads(backend: Backend, prefix: str = "", wanted: Callable[[str], bool] = lambda key: True) -> Iterator[OpenUpload]:
    """Open uploads with what each has: one request for the list, and one for the parts of each.

    Args:
        wanted: Whether to ask for the uploads of a key.

    Raises:
        UnsupportedOperationError: the store does not tell.
    """
    for key, upload_id, initiated in backend.list_multipart(prefix):
        if wanted(key):
            with contextlib.suppress(ObjectNotFoundError):  # it was completed or aborted just now
                parts = {part.number: part for part in backend.list_parts(key, upload_id)}
                yield OpenUpload(key, upload_id, initiated, parts)


class PartsWriter:
    """What writers of one object have in common, whose parts are sent in order: how they end, and how a part gets on its way.

    Args:
        upload: Of the object.
        pool: Where parts are stored beside the caller.
        url: As errors name it.
    """

    def __init__(self, upload: PartUpload, pool: BoundedPool, url: str) -> None:
        self._upload = upload
        self._pool = pool
        self._url = url
        self._sent = 0
        self._size = 0
        self._pid = os.getpid()
        self._state = "open"

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def abort(self) -> None:
        """Drop what was uploaded; there will be no object. Never raises, and again is fine."""
        if self._state != "open":
            return
        self._state = "aborted"
        if self._pid == os.getpid():  # else it is the parent's upload, which goes on there
            self._let_go()
            self._upload.abort_quietly()

    def _let_go(self) -> None:
        """End the threads, and keep no memory."""
        self._pool.stop()

    def _check(self) -> None:
        if self._state != "open" or self._pid != os.getpid():
            state = self._state if self._state != "open" else "made in the parent process"
            raise ClosedError(f"the writer was {state}", op="write", url=self._url)
        if self._pool.error is not None:
            error = self._pool.error
            self.abort()
            raise error

    def _send(self, body: memoryview) -> None:
        """Hand a part to a thread; waits while as many are under way as may be."""
        number = self._sent + 1
        try:
            self._upload.check_number(number)
            self._upload.begin()
            self._pool.submit(lambda: self._store(number, body), len(body))
        except BaseException:
            self.abort()
            raise
        self._sent = number

    def _store(self, number: int, body: memoryview) -> None:
        try:
            self._upload.store(number, body)
        finally:
            body.release()  # its memory may be used again at once


@checked
class MultipartWriter(PartsWriter):
    """Writes one object; made by `ObjectStore.multipart`.

    Use as a context manager: leaving it publishes the object, an exception inside drops it.
    Memory is at most ``max_in_flight + 1`` parts, kept and used again; `write` waits while all
    are being uploaded. An error of a background part is raised by the next call, and the object
    never appears. Data that fits one part is written by a single put. For one thread at a time.

    Args:
        backend: Where to.
        key: Of the object.
        part_size: Bytes of a part; doubled every 900 parts where the size is not known.
        max_in_flight: Parts uploaded at a time.
        max_bytes: Bytes uploaded at a time, whatever their number; a single part may exceed it. None: no bound of its own.
        size: Bytes that will be written, where known: too many parts are refused at once, and `close` publishes nothing else.
        mode: The condition under which the object appears.
        content_type: Of the object.
        metadata: Of the object.
        attributes: Of the object.

    Raises:
        ConfigError: a value out of range, or `size` bytes would be more than 10,000 parts.
    """

    def __init__(
        self,
        backend: Backend,
        key: str,
        *,
        part_size: int,
        max_in_flight: int = 4,
        max_bytes: int | None = None,
        size: int | None = None,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        if part_size < 1 or max_in_flight < 1:
            raise ConfigError("part_size and max_in_flight must be at least 1", hint="leave them out for those of StoreOptions")
        self.key = key
        self.result: PutResult | None = None
        """What was made; None before `close`."""
        self._backend = backend
        self._mode: PutMode = mode
        self._about: dict[str, Any] = {"content_type": content_type, "metadata": metadata, **said(attributes)}
        self._first_size = part_size
        self._grows = size is None
        upload = PartUpload(backend, key, count=-(-(size or 0) // part_size), **self._about)
        pool = BoundedPool(max_in_flight, "s3loader-upload", max_jobs=max_in_flight, max_bytes=max_bytes)
        self._expected = size
        self._fill = 0
        self._reserved = 0
        self._buffer: memoryview | None = None
        super().__init__(upload, pool, upload.url)

    # data

    def write(self, data: Any, *, copy: bool = True) -> int:
        """Append `data`; returns its length in bytes.

        Whole parts of data that nobody can change (`bytes`, views of it) are uploaded from where they are;
        anything else is copied, so it may be changed when this returns.

        Args:
            copy: False: whole parts of `data` are uploaded from where they are; it must stay as it is until `flush` or `close`.
        """
        view = readable(data)
        fixed = not copy or type(view.obj) is bytes
        rest = view
        while rest:
            size = self._next_size()
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
            part_size = self._next_size()
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

    def flush(self) -> None:
        """Wait until all full parts are stored; what does not fill a part stays here. Raises what went wrong."""
        self._check()
        self._wait()

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
        if self._expected is not None and self._size != self._expected:
            raise ConfigError(
                f"{self._size} bytes were written, {self._expected} were announced",
                url=self._upload.url,
                hint="nothing was published; leave size out where it is not known",
            )
        if not self._sent:
            body = self._buffer[: self._fill] if self._buffer is not None else b""
            return self._backend.put(self.key, body, mode=self._mode, **self._about)
        if self._fill:
            self._send_buffer()
        self._wait()
        return self._upload.complete(self._size, self._mode)

    def _let_go(self) -> None:
        self._buffer = None
        super()._let_go()

    def __enter__(self) -> MultipartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._state != "aborted":
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        if getattr(self, "_state", "") == "open" and self._pid == os.getpid() and self._size:
            _log.warning("a writer of %s was lost before close(): there will be no object", self._upload.url)
            self._pool.stop(wait=0)

    # parts

    def _wait(self) -> None:
        """Return when no part is under way."""
        try:
            self._pool.wait()
        except BaseException:
            if self._pool.error is not None:
                self.abort()
            raise

    def _next_size(self) -> int:
        return part_size_of(self._sent + 1, self._first_size) if self._grows else self._first_size

    def _send_buffer(self) -> None:
        assert self._buffer is not None
        body = self._buffer[: self._fill]
        self._buffer, self._fill = None, 0
        self._send(body)


def put_file(
    backend: Backend,
    key: str,
    file: Any,
    *,
    part_size: int,
    mode: PutMode,
    content_type: str | None,
    metadata: Mapping[str, str] | None,
    attributes: Mapping[str, str] | None = None,
) -> PutResult:
    """Write what is left of the binary `file` as one object; memory stays within a few parts.

    Raises:
        ConfigError: the file gives text, or nothing yet (it is non-blocking).
    """
    size = _bytes_left(file)
    writer = MultipartWriter(
        backend,
        key,
        part_size=part_size_for(size, part_size) if size is not None else part_size,
        mode=mode,
        content_type=content_type,
        metadata=metadata,
        attributes=attributes,
    )
    with writer:
        read_into = getattr(file, "readinto", None)
        while True:
            if read_into is not None:
                room = writer.reserve(part_size)
                count = read_into(room)
                if count is None:
                    raise ConfigError("the file is non-blocking and has no data yet", hint="pass a blocking file")
                writer.commit(count)
            else:
                count = writer.write(readable(file.read(part_size)))
            if not count:
                break
        return writer.close()


def _bytes_left(file: Any) -> int | None:
    try:
        left: int = os.fstat(file.fileno()).st_size - file.tell()
        return max(0, left)
    except (AttributeError, OSError, ValueError):  # not a real file, or a pipe
        return None
