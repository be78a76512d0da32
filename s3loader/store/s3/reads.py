"""GET as a job: ranges, and where the body goes."""

from __future__ import annotations

from typing import Final

from s3loader import events
from s3loader.errors import RangeError, S3LoaderError
from s3loader.store.backend import ReadResult
from s3loader.store.s3.careful import Response
from s3loader.store.s3.http import Head, check_read, query_of, quoted_etag, short_read
from s3loader.store.s3.jobs import SMALL, EndpointContext, Job, Scratch, Wire
from s3loader.store.s3.small import head_job
from s3loader.store.s3errors import Where, check_etag, refuse_suffix
from s3loader.store.told import take_first_byte
from s3loader.types import ObjectMeta, ReadGate, ReadRequest
from s3loader.units import GIB, KIB, MIB

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
_DOUBT: Final = 256
_MOST_UNTOLD: Final = GIB
"""Bytes of a body of unknown length that are received before it is given up."""
_UNKNOWN: Final = MIB
"""What an object of unknown size is first taken to cost of a byte bound."""


class ReadJob(Job):
    """A GET of bytes of one object.

    Args:
        context: Of the bucket.
        request: What to read. An empty range only looks at the object, by HEAD: HTTP cannot ask for nothing.
        version_id: Of a version of the object.
        by_tls_reader: Leave it to `EndpointContext.tls_reader`, which needs the GIL once an object, not once a record.
    """

    __slots__ = ("_by_tls_reader", "_empty", "_end", "_into", "_meta", "_version_id", "request")

    op = "GET"

    def __init__(
        self,
        context: EndpointContext,
        request: ReadRequest,
        version_id: str | None = None,
        *,
        by_tls_reader: bool = False,
    ) -> None:
        into, end, start = request.into, request.end, request.start
        if into is not None:
            if into.itemsize != 1 or into.ndim != 1:
                into = into.cast("B")
            cost = len(into)
            end = start + cost
        elif end is not None:
            cost = end - start
        elif start < 0:
            cost = -start
        else:
            cost = context.size_hint or _UNKNOWN
        super().__init__(context, context.reads, cost, cost > 0 and not by_tls_reader)
        self.request = request
        self._empty = cost <= 0
        self._end = end
        self._into = into
        self.in_place = into is not None
        self._meta: ObjectMeta | None = None
        self._version_id = version_id
        self._by_tls_reader = by_tls_reader

    def meta(self) -> ObjectMeta:
        """What the response said of the object."""
        if self._meta is not None:
            return self._meta
        assert self.head is not None
        return self.head.meta(self.request.key)

    @property
    def gate(self) -> ReadGate | None:
        """Of the request."""
        return self.request.gate

    @property
    def _offset(self) -> int | None:
        start, head = self.request.start, self.head
        return start if start >= 0 else head.first if head is not None and head.first >= 0 else None

    def wire(self) -> Wire:
        """The request, signed now."""
        request, end, context = self.request, self._end, self._context
        path = context.object_path(request.key)
        if self._version_id is None:
            text = context.signer().get(path)
        else:
            text = context.signer().head("GET", path, query_of(versionId=self._version_id))
        if end is not None:
            text += f"Range: bytes={request.start}-{end - 1}\r\n"
        elif request.start < 0:
            text += f"Range: bytes={request.start}\r\n"
        elif request.start:
            text += f"Range: bytes={request.start}-\r\n"
        if request.if_match is not None:
            text += f"If-Match: {quoted_etag(request.if_match)}\r\n"
        return ((text + "\r\n").encode("ascii"),)

    def begin(self, scratch: Scratch) -> None:
        """Prepare to receive the response from its first byte."""
        super().begin(scratch)
        context, size = self._context, self.cost
        if self._end is None:
            size = context.size_hint
        if size <= SMALL:
            return
        if size > _MEDIUM or self._into is not None:
            self._view = scratch.view[:_FIRST]
            return
        self._view = context.buffers.lease(size + _HEAD_ROOM + _ALIGNMENT)
        block = self._view.obj
        assert isinstance(block, bytearray)
        self._block = block
        self._origin = self.at = -context.head_length % _ALIGNMENT

    def again(self) -> Job | None:
        """A second request for the same range, into memory of its own; None: of unknown size."""
        request = self.request
        if self._end is None or self.hedge_of is not None:
            return None
        if self._into is not None:  # the answer to the first request may be written there at any moment
            request = ReadRequest(request.key, request.start, self._end, request.if_match, None, request.tag)
        job = ReadJob(self._context, request, self._version_id)
        job.hedge_of = self
        return job

    def take_over(self, other: Job) -> None:
        """What `other` has brought is the result of this one; copied to where this one's bytes belong."""
        super().take_over(other)
        if self._into is not None:
            _, data, etag, size = other.result
            self._into[:] = data
            self.result = ReadResult(self.request, self._into if self.request.into is None else self.request.into, etag, size)

    def least(self) -> int:
        """Bytes that the response will have at least, if all goes well; 0: nobody knows."""
        context = self._context
        if self._end is None:
            return 0
        if context.doubt:
            context.doubt -= 1
            return 0
        return self.cost + _LEAST_HEAD

    def was_short(self) -> None:
        """The response had fewer bytes than `least`."""
        self._context.doubt = _DOUBT

    def where(self) -> Where:
        """What errors say was asked."""
        verb = "get" if self._into is None else "read"
        return Where(verb, f"{self._context.url}/{self.request.key}", "read")

    def _check(self, head: Head) -> None:
        request = self.request
        check_read(head, request.start, self._end, request.if_match)
        if self._into is not None and head.length != len(self._into):
            assert self._end is not None
            raise short_read(head, request.start, self._end)

    def _place(self, head: Head, stop: int, have: int) -> None:
        view, length = self._view, head.length
        into = self._into
        if into is None:
            self.cost = length
            if have == length <= SMALL:
                self._view = memoryview(self._block[stop : self.at])
                return
            if self._block is not self._scratch.block and stop + length <= len(view) <= 2 * length:
                self._context.head_length = stop - self._origin
                self._view = view[stop : stop + length]
                return
            into = self._context.buffers.lease(length)[:length]
        into[:have] = view[stop : self.at]
        self._view = into

    def _finish(self) -> bool:
        head, context, request = self.head, self._context, self.request
        assert head is not None
        if self._end is None:
            context.size_hint = max(head.length, context.size_hint - (context.size_hint >> 4))
        self._health.refusals = 0
        data = self._view if request.into is None else request.into
        self.result = tuple.__new__(ReadResult, (request, data, head.etag, head.size))  # half the time of ReadResult(...)
        self.done = True
        if self._started:
            self._emit(head.length, head.status)
        return True

    # -- the careful path, and what is no GET at all ------------------------------------------------

    def _ask_carefully(self) -> None:
        if self._empty:
            self._look()
        elif self._by_tls_reader:
            self._ask_tls_reader()
        else:
            super()._ask_carefully()

    def _mend(self, error: S3LoaderError) -> bool:
        """From the very end of an object on there is nothing to read, which is no error where all the rest was asked for."""
        self._empty = isinstance(error, RangeError) and self._end is None
        return self._empty

    def _look(self) -> None:
        """An empty range: HEAD tells whether the object is there, large enough, and the one that was meant."""
        request = self.request
        look = head_job(self._context, request.key, self._version_id)
        look.ask_carefully()
        if look.error is not None:
            raise look.error
        meta: ObjectMeta = look.result
        where = self.where()
        check_etag(meta.etag, request.if_match, where)
        refuse_suffix(request.start, meta, where)
        if request.start > meta.size:
            text = f"it has {meta.size} bytes, asked for them from {request.start} on"
            raise RangeError(text, op=where.op, url=where.url)
        self._meta = meta
        self.result = ReadResult(request, memoryview(b"") if request.into is None else request.into, meta.etag, meta.size)

    def _ask_tls_reader(self) -> None:
        request, reader = self.request, self._context.tls_reader
        assert reader is not None
        self._started = events.now() if events.active() else 0.0
        take_first_byte()  # of another read, which nobody told of
        try:
            meta, data = reader.get(request.key, request.start, self._end, if_match=request.if_match)
            if self._into is not None:
                if len(data) != len(self._into):
                    text = f"it has {meta.size} bytes, asked for [{request.start}, {self._end})"
                    raise RangeError(text, op="read", url=self.where().url)
                self._into[:] = data
        except S3LoaderError as error:
            self._fail(error, error.status)
            return
        self._meta = meta
        body = memoryview(data) if request.into is None else request.into
        self.result = ReadResult(request, body, meta.etag, meta.size)
        if self._started:
            first, status = take_first_byte()
            self._emit(len(data), status, first_byte=first)

    def _take(self, response: Response) -> None:
        head, into = response.head, self._into
        if head.length < 0:
            expected = _MOST_UNTOLD if self._end is None else self.cost
            data = memoryview(response.read_all(expected))
            head.length = len(data)
            self._check(head)
            if into is not None:
                into[:] = data
            self._view = data if into is None else into
        else:
            self._check(head)
            self._view = self._context.buffers.lease(head.length)[: head.length] if into is None else into
            response.read_into(self._view)
        refusals = self._health.refusals
        self._finish()
        self._health.refusals = refusals  # a success of the careful path says nothing for the fast one
