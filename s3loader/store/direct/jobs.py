"""One request and its answer, without I/O: bytes to send, where the answer's bytes go, the outcome.

A driver (the pump, a background thread, a single blocking call) sends `wire()`, receives into
`target()` and tells `feed()` how much came, until that says that the answer is complete.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from s3loader import events
from s3loader.checksum import crc32c_base64
from s3loader.endpoint import Endpoint
from s3loader.store.base import Backend, ReadResult
from s3loader.store.buffers import BufferPool
from s3loader.store.direct.head import MAX_HEAD, Head, OddAnswer, check_read, parse_head
from s3loader.store.direct.signer import Signer
from s3loader.types import Buffer, ObjectMeta, PartResult, PutRequest, PutResult, ReadRequest
from s3loader.units import KIB, MIB

_log = logging.getLogger("s3loader.direct")

__all__ = ["Job", "PartJob", "PutJob", "ReadJob", "Scratch", "Setting"]

SMALL: Final = 32 * KIB
"""Bodies up to this many bytes are received into the driver's scratch memory and copied out: a copy
costs less than a lease, and scratch memory is always in the cache."""
_HEAD_ROOM: Final = KIB
"""Bytes left for the head in front of a body; a longer head only costs a copy."""
_ALIGNMENT: Final = 64
_PATIENCE: Final = 8
_DOUBT: Final = 256
_LEAST_HEAD: Final = len(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
_RETRY_EVERY: Final = 64
_UNKNOWN: Final = MIB
"""What an object of unknown size is first taken to cost of a byte bound."""


class Scratch:
    """Memory that one driver receives heads and small bodies into."""

    __slots__ = ("block", "view")

    def __init__(self) -> None:
        self.block = bytearray(2 * SMALL)
        self.view = memoryview(self.block)


@dataclass(slots=True)
class Setting:
    """What all jobs of one backend share."""

    endpoint: Endpoint
    signer: Callable[[], Signer]
    buffers: BufferPool
    general: Backend
    size_hint: int = 0
    """Bytes that an object of unknown size is expected to have: about what the last ones had."""
    head_length: int = 0
    """Bytes that heads have here. Foreseen, it lets bodies begin at an aligned address."""
    doubt: int = 0
    """How many jobs shall not rely on `Job.least`, for it was wrong of late."""
    refusals: int = 0
    """Direct attempts that failed since the last one that did not."""

    def worth_trying(self) -> bool:
        """False where this engine fails again and again, be it at the server's dialect or at missing
        keys: then the general engine is asked at once, and this one only now and then."""
        if self.refusals < _PATIENCE:
            return True
        self.refusals += 1
        return self.refusals % _RETRY_EVERY == 0


class Job(ABC):
    """One request on its way. A job belongs to one driver and is used once."""

    __slots__ = (
        "_block", "_first_byte", "_origin", "_pieces", "_scratch", "_setting", "_started", "_view", "at",
        "cost", "direct", "done", "error", "head", "result",
    )  # fmt: skip

    op = ""
    """As events name it."""
    _block: bytearray
    _view: memoryview

    def __init__(self, setting: Setting, cost: int, direct: bool) -> None:
        self._setting = setting
        self.cost = cost
        """Bytes it takes of the driver's bound; corrected when the answer's head has come."""
        self.direct = direct and (not setting.refusals or setting.worth_trying())
        """Whether this engine is to send it."""
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.head: Head | None = None
        self.at = 0
        self._started = 0.0

    # -- what a driver calls ---------------------------------------------------------------------

    @abstractmethod
    def wire(self) -> tuple[Buffer, ...]:
        """The request as pieces to send, one after the other."""

    def begin(self, scratch: Scratch) -> None:
        """Prepare to receive the answer from its first byte."""
        self._block, self._view = scratch.block, scratch.view
        self._origin = self.at = 0
        self._scratch = scratch
        self.head = None
        self._started = events.now() if events.active() else 0.0

    def target(self) -> memoryview:
        """Where the next bytes go."""
        return self._view[self.at :]

    def feed(self, count: int) -> bool:
        """`count` bytes came into `target()`. True: the job is done.

        Raises:
            OddAnswer: this is no answer to take; the connection is spoilt.
        """
        self.at += count
        if self.head is not None:
            if self.at < len(self._view):
                return False
            return self._finish()
        if self._started:
            self._first_byte = events.now()
        stop = self._block.find(b"\r\n\r\n", self._origin, self.at)
        if stop < 0:
            self._keep_partial_head()
            return False
        stop += 4
        head = parse_head(bytes(self._view[self._origin : stop]))
        self._check(head)
        have = self.at - stop
        if have > head.length:
            raise OddAnswer("more bytes than Content-Length says", head.status)
        self.head = head
        self._place(head, stop, have)
        self.at = have
        return have == head.length and self._finish()

    def least(self) -> int:
        """Bytes that the answer will have at least, if all goes well; 0: nobody knows."""
        return 0

    def was_short(self) -> None:
        """The answer had fewer bytes than `least`."""
        self._setting.doubt = _DOUBT

    @property
    def untouched(self) -> bool:
        """Whether nothing of an answer has come yet."""
        return self.head is None and self.at == self._origin

    def refuse(self, reason: BaseException) -> None:
        """The direct attempt failed; `ask_general` comes next."""
        self._setting.refusals += 1
        status = reason.status if isinstance(reason, OddAnswer) else None
        _log.debug("%s %s goes to the general engine: %s (%s)", self.op, self._where(), reason, status)
        if self._started:
            self._emit(0, status, f"{type(reason).__name__}: {reason}")

    def fail(self, error: BaseException) -> None:
        """No engine can do this."""
        self.error = error
        self.done = True

    def ask_general(self) -> None:
        """Let the general engine do it, in this thread; never raises."""
        try:
            self.result = self._ask(self._setting.general)
        except BaseException as error:  # noqa: BLE001 - it is the caller's, and is raised at this job's place
            self.error = error
        self.done = True

    # -- what kinds of job differ in -------------------------------------------------------------

    @abstractmethod
    def _check(self, head: Head) -> None:
        """Raise `OddAnswer` unless this is the answer to take."""

    @abstractmethod
    def _place(self, head: Head, stop: int, have: int) -> None:
        """Set `_view` to where the body goes; `have` bytes of it lie in `_view` from `stop`."""

    @abstractmethod
    def _finish(self) -> bool:
        """The body is complete: set `result`. Returns True."""

    @abstractmethod
    def _ask(self, general: Backend) -> Any: ...

    @abstractmethod
    def _where(self) -> str: ...

    # -- shared ----------------------------------------------------------------------------------

    def _keep_partial_head(self) -> None:
        got = self.at - self._origin
        if got >= MAX_HEAD:
            raise OddAnswer("the head is too long")
        if self._block is self._scratch.block:  # others use it meanwhile
            own = bytearray(MAX_HEAD)
            own[:got] = self._view[self._origin : self.at]
            self._block, self._view, self._origin, self.at = own, memoryview(own), 0, got

    def _emit(self, size: int, status: int | None, error: str | None = None) -> None:
        now = events.now()
        first = self._first_byte if self.head is not None else None
        events.emit(
            events.OpEvent(self.op, self._where(), size, self._started, now, first, engine="direct", status=status, error=error)
        )


class ReadJob(Job):
    """A GET."""

    __slots__ = ("_end", "_into", "_meta", "request")

    op = "GET"

    def __init__(self, setting: Setting, request: ReadRequest) -> None:
        into, end, start = request.into, request.end, request.start
        if into is not None:
            if into.itemsize != 1 or into.ndim != 1:
                into = into.cast("B")
            cost = len(into)
            end = start + cost
        elif end is not None:
            cost = end - start
        else:
            cost = setting.size_hint or _UNKNOWN
        direct = cost > 0 and start >= 0 and request.key != "" and _harmless(request.if_match)
        super().__init__(setting, cost, direct)
        self.request = request
        self._end = end
        self._into = into
        self._meta: ObjectMeta | None = None

    def meta(self) -> ObjectMeta:
        """What the answer said of the object."""
        if self._meta is not None:
            return self._meta
        assert self.head is not None
        return self.head.meta(self.request.key)

    def wire(self) -> tuple[Buffer, ...]:
        """See `Job.wire`."""
        request, end = self.request, self._end
        text = self._setting.signer().get(self._setting.endpoint.path(request.key))
        if end is not None:
            text += f"Range: bytes={request.start}-{end - 1}\r\n"
        elif request.start:
            text += f"Range: bytes={request.start}-\r\n"
        if request.if_match is not None:
            text += f"If-Match: {_quoted(request.if_match)}\r\n"
        return ((text + "\r\n").encode("ascii"),)

    def begin(self, scratch: Scratch) -> None:
        """See `Job.begin`."""
        super().begin(scratch)
        setting, size = self._setting, self.cost
        if self._end is None:
            size = setting.size_hint
        if size <= SMALL:
            return
        if self._into is not None:
            self._view = scratch.view[:_HEAD_ROOM]  # little of the body is to take the way through here
            return
        self._view = setting.buffers.lease(size + _HEAD_ROOM + _ALIGNMENT)
        block = self._view.obj
        assert isinstance(block, bytearray)
        self._block = block
        self._origin = self.at = -setting.head_length % _ALIGNMENT

    def least(self) -> int:
        """See `Job.least`."""
        setting = self._setting
        if self._end is None:
            return 0
        if setting.doubt:
            setting.doubt -= 1
            return 0
        return self.cost + _LEAST_HEAD

    def _check(self, head: Head) -> None:
        request = self.request
        check_read(head, request.start, self._end, request.if_match)
        if self._into is not None and head.length != len(self._into):
            raise OddAnswer("the object is shorter than that", head.status)

    def _place(self, head: Head, stop: int, have: int) -> None:
        view, length = self._view, head.length
        into = self._into
        if into is None:
            self.cost = length
            if self._block is self._scratch.block:
                if have == length:
                    self._view = memoryview(self._block[stop : self.at])
                    return
            elif stop + length <= len(view):
                self._setting.head_length = stop - self._origin
                self._view = view[stop : stop + length]
                return
            into = self._setting.buffers.lease(length)[:length]
        into[:have] = view[stop : self.at]
        self._view = into

    def _finish(self) -> bool:
        head, setting, request = self.head, self._setting, self.request
        assert head is not None
        if self._end is None:
            setting.size_hint = max(head.length, setting.size_hint - (setting.size_hint >> 4))
        setting.refusals = 0
        data = self._view if request.into is None else request.into
        self.result = tuple.__new__(ReadResult, (request, data, head.etag, head.size))  # half the time of ReadResult(...)
        self.done = True
        if self._started:
            self._emit(head.length, head.status)
        return True

    def _ask(self, general: Backend) -> ReadResult:
        request, into = self.request, self._into
        if into is not None:
            meta = general.read_into(request.key, request.start, into, if_match=request.if_match)
            data = into
        else:
            meta, found = general.get(request.key, request.start, request.end, if_match=request.if_match)
            data = memoryview(found)
        self._meta = meta
        return ReadResult(request, data if request.into is None else request.into, meta.etag, meta.size)

    def _where(self) -> str:
        return f"{self._setting.general.url}/{self.request.key}"


class PutJob(Job):
    """A PUT of a whole object."""

    __slots__ = ("_checksum", "_data", "request")

    op = "PUT"

    def __init__(self, setting: Setting, request: PutRequest) -> None:
        self._data = memoryview(request.data).cast("B")
        direct = request.mode == "overwrite" and request.key != "" and _harmless(request.content_type)
        super().__init__(setting, len(self._data), direct)
        self.request = request
        self._checksum = ""

    def wire(self) -> tuple[Buffer, ...]:
        """See `Job.wire`."""
        headers = {}
        if self.request.content_type is not None:
            headers["content-type"] = self.request.content_type
        return self._written(headers)

    def _written(self, headers: dict[str, str], query: str = "") -> tuple[Buffer, ...]:
        data, setting = self._data, self._setting
        self._checksum = headers["x-amz-checksum-crc32c"] = self._checksum or crc32c_base64(data)
        text = setting.signer().head("PUT", setting.endpoint.path(self.request.key), query, headers)
        return ((f"{text}Content-Length: {len(data)}\r\n\r\n").encode("ascii"), data)

    def _check(self, head: Head) -> None:
        if head.status != 200:
            raise OddAnswer("not a success", head.status)
        if head.length > SMALL:
            raise OddAnswer("a long body", head.status)
        if head.checksum and head.checksum != self._checksum:
            raise OddAnswer("the server says another checksum", head.status)
        if not head.etag and isinstance(self, PartJob):
            raise OddAnswer("no ETag", head.status)

    def _place(self, head: Head, stop: int, have: int) -> None:
        self._view = memoryview(bytearray(head.length))

    def _finish(self) -> bool:
        head = self.head
        assert head is not None
        self._setting.refusals = 0
        self.result = self._result(head)
        self.done = True
        if self._started:
            self._emit(len(self._data), head.status)
        return True

    def _result(self, head: Head) -> PutResult | PartResult:
        return PutResult(self.request.key, head.etag, len(self._data), head.version_id)

    def _ask(self, general: Backend) -> PutResult | PartResult:
        request = self.request
        return general.put(request.key, request.data, mode=request.mode, content_type=request.content_type)

    def _where(self) -> str:
        return f"{self._setting.general.url}/{self.request.key}"


class PartJob(PutJob):
    """One part of a multipart upload."""

    __slots__ = ("_number", "_upload_id")

    op = "PUTPART"

    def __init__(self, setting: Setting, key: str, upload_id: str, number: int, data: Buffer) -> None:
        super().__init__(setting, PutRequest(key, data))
        self._number = number
        self._upload_id = upload_id

    def wire(self) -> tuple[Buffer, ...]:
        """See `Job.wire`."""
        return self._written({}, f"partNumber={self._number}&uploadId={quote(self._upload_id, safe='-_.~')}")

    def _result(self, head: Head) -> PartResult:
        return PartResult(self._number, head.etag, len(self._data), self._checksum)

    def _ask(self, general: Backend) -> PartResult:
        return general.upload_part(self.request.key, self._upload_id, self._number, self.request.data)


def _harmless(value: str | None) -> bool:
    """Whether `value` can stand in a header."""
    return value is None or (value.isascii() and value.isprintable() and value == value.strip())


def _quoted(etag: str) -> str:
    return etag if etag.startswith('"') else f'"{etag}"'
