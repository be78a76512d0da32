"""Requests with a small response as jobs: HEAD and DELETE on the fast path, the rest on the careful one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from xml.etree import ElementTree

from s3loader.errors import UnavailableError
from s3loader.store.s3.careful import Response
from s3loader.store.s3.http import Head, UnexpectedResponse, query_of
from s3loader.store.s3.jobs import SMALL, EndpointContext, EndpointHealth, Job, Wire
from s3loader.store.s3errors import Where, from_response
from s3loader.types import Buffer, ObjectMeta
from s3loader.units import MIB

__all__ = [
    "SmallJob",
    "document",
    "head_job",
]

_MOST: Final = 64 * MIB
"""Bytes of a document: a listing's page of 1000 keys of 1024 bytes, quoted, has less than 5 MiB."""


class SmallJob(Job):
    """A request whose response is metadata or a document.

    Args:
        context: Of the bucket.
        op: As events name it.
        where: What errors say was asked.
        method: HTTP method.
        path: Quoted path.
        query: Quoted query, sorted.
        headers: More headers, signed; names in lower case.
        data: Body.
        health: Of this kind of request on the fast path; None: it goes the careful way.
        resendable: Whether sending it twice does the same as sending it once.
        success: The statuses that mean success.
        read: Makes the result of head and body.
        objects: How many objects the result concerns, for the event.
    """

    __slots__ = (
        "_data", "_headers", "_method", "_objects", "_op", "_path", "_query", "_read", "_resendable", "_success", "_where",
    )  # fmt: skip

    def __init__(
        self,
        context: EndpointContext,
        op: str,
        where: Where,
        method: str,
        path: Callable[[], str],
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        data: Buffer = b"",
        health: EndpointHealth | None = None,
        resendable: bool = True,
        success: tuple[int, ...] = (200,),
        read: Callable[[Head, bytes], Any],
        objects: Callable[[Any], int] | None = None,
    ) -> None:
        super().__init__(context, health or EndpointHealth(), len(data), health is not None)
        self._op = op
        self._where = where
        self._method = method
        self._path = path
        self._query = query
        self._headers = dict(headers or {})
        self._data = data
        self._resendable = resendable
        self._success = success
        self._read = read
        self._objects = objects

    @property
    def op(self) -> str:  # type: ignore[override]  # of other jobs it is the class's
        """As events name it."""
        return self._op

    @property
    def bodiless(self) -> bool:  # type: ignore[override]  # as `op`
        """The response has no body, whatever its head says."""
        return self._method == "HEAD"

    @property
    def resendable(self) -> bool:
        """Whether sending it twice does the same as sending it once."""
        return self._resendable

    def wire(self) -> Wire:
        """The request, signed now."""
        text = self._context.signer().head(self._method, self._path(), self._query, self._headers)
        if self._method in ("GET", "HEAD", "DELETE"):
            return ((text + "\r\n").encode("ascii"),)
        return ((f"{text}Content-Length: {len(self._data)}\r\n\r\n").encode("ascii"), self._data)

    def where(self) -> Where:
        """What errors say was asked."""
        return self._where

    def _check(self, head: Head) -> None:
        if head.status not in self._success:
            raise UnexpectedResponse("not a success", head.status)
        if not self.bodiless and head.length > SMALL and self.fast:
            raise UnexpectedResponse("a long body", head.status)

    def _place(self, head: Head, stop: int, have: int) -> None:
        body = memoryview(bytearray(0 if self.bodiless else head.length))
        body[:have] = self._view[stop : stop + have]
        self._view = body

    def _finish(self) -> bool:
        assert self.head is not None
        self._health.refusals = 0
        self._done(self.head, b"" if self.bodiless else bytes(self._view))
        return True

    def _take(self, response: Response) -> None:
        self._check(response.head)
        self._done(response.head, b"" if self.bodiless else bytes(response.read_all(_MOST)))

    def _done(self, head: Head, body: bytes) -> None:
        self.result = self._read(head, body)
        self.done = True
        if self._started:
            self._emit(len(body), head.status, objects=1 if self._objects is None else self._objects(self.result))


def head_job(context: EndpointContext, key: str, version_id: str | None = None) -> SmallJob:
    """HEAD of one object; its result is an `ObjectMeta`."""

    def read(head: Head, _: bytes) -> ObjectMeta:
        if head.length < 0:
            raise UnexpectedResponse("no Content-Length", head.status)
        head.size = head.length
        return head.meta(key)

    return SmallJob(
        context,
        "HEAD",
        Where("head", f"{context.url}/{key}"),
        "HEAD",
        lambda: context.object_path(key),
        query=query_of(versionId=version_id) if version_id is not None else "",
        health=context.heads,
        read=read,
    )


def document(roots: Sequence[str], where: Where) -> Callable[[Head, bytes], tuple[Head, ElementTree.Element]]:
    """Reads a body that must be an XML document whose root has one of these names: nothing else is a success.

    An error may come with status 200, after blanks that kept the connection alive.
    """

    def read(head: Head, body: bytes) -> tuple[Head, ElementTree.Element]:
        try:
            found = ElementTree.fromstring(body.strip())  # noqa: S314 - expat bounds entities itself; the body is bounded
        except ElementTree.ParseError:
            found = None
        name = "" if found is None else found.tag.rpartition("}")[2]
        if name == "Error":
            raise from_response(head.status, body.strip(), where, headers=head.headers())
        if found is None or name not in roots:
            what = "is empty" if not body.strip() else f"is a {name}" if name else "is no XML document"
            raise UnavailableError(
                f"the store answered {head.status}, but the response {what}, not {roots[0]}",
                op=where.op,
                url=where.url,
                status=head.status,
                hint="does the endpoint speak S3, and is it whole behind every proxy?",
            )
        return head, found

    return read
