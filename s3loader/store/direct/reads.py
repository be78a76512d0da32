"""GET as a job: ranges, where the body goes, and the general engine's way to the same result."""

from __future__ import annotations

from typing import Final

from s3loader.store.base import Backend, ReadResult
from s3loader.store.direct.head import Head, OddAnswer, check_read
from s3loader.store.direct.jobs import SMALL, Job, Scratch, Setting, Wire, harmless
from s3loader.store.s3errors import Where
from s3loader.types import ObjectMeta, ReadRequest
from s3loader.units import KIB, MIB

__all__ = ["ReadJob"]

_MEDIUM: Final = 512 * KIB
"""Bodies above `SMALL` and up to this many bytes are received, head and all, where they stay. Larger
ones get memory of their own when their size is known: what came with the head is copied, and that is
little against the rest."""
_FIRST: Final = 16 * KIB
"""Bytes of a large answer, head included, received before its memory is chosen."""
_HEAD_ROOM: Final = KIB
_ALIGNMENT: Final = 64
_LEAST_HEAD: Final = len(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
_UNKNOWN: Final = MIB
"""What an object of unknown size is first taken to cost of a byte bound."""


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
        direct = cost > 0 and start >= 0 and request.key != "" and harmless(request.if_match)
        super().__init__(setting, setting.reads, cost, direct)
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

    def wire(self) -> Wire:
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
        if size > _MEDIUM or self._into is not None:
            self._view = scratch.view[:_FIRST]
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
            if have == length <= SMALL:
                self._view = memoryview(self._block[stop : self.at])
                return
            if self._block is not self._scratch.block and stop + length <= len(view) <= 2 * length:
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
        self._trust.refusals = 0
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

    def _asked(self) -> Where:
        verb = "get" if self._into is None else "read"
        return Where(verb, f"{self._setting.general.url}/{self.request.key}", "read")


def _quoted(etag: str) -> str:
    return etag if etag.startswith('"') else f'"{etag}"'
