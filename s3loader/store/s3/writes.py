"""PUT and UploadPart as jobs: the payload is not signed, its checksum is."""

from __future__ import annotations

from collections.abc import Mapping

from s3loader.checksum import crc32c_base64, md5_base64
from s3loader.errors import S3LoaderError
from s3loader.store.s3.careful import Response
from s3loader.store.s3.http import Head, UnexpectedResponse, checked_header, condition_headers, query_of
from s3loader.store.s3.jobs import SMALL, EndpointContext, Job, Wire
from s3loader.store.s3errors import Where, condition_of, refuses_checksums
from s3loader.types import Buffer, PartResult, PutRequest, PutResult

__all__ = ["PartJob", "PutJob"]


class PutJob(Job):
    """A PUT of a whole object.

    The CRC32C of the bytes goes with it as a signed header; where the server refuses that, a Content-MD5. A conditional put is
    never sent twice by itself: its second copy would be refused because of the first.

    Args:
        context: Of the bucket.
        request: What to write, and on what condition.
        headers: More headers, signed; names in lower case.
        checksum: Base64 of the CRC32C to claim; default that of the data.
    """

    __slots__ = ("_checksum", "_claimed", "_data", "_headers", "_md5", "request")

    op = "PUT"
    verb = "put"

    def __init__(
        self,
        context: EndpointContext,
        request: PutRequest,
        headers: Mapping[str, str] | None = None,
        *,
        checksum: str | None = None,
    ) -> None:
        self._data = memoryview(request.data).cast("B")
        super().__init__(context, context.writes, len(self._data), True)
        self.request = request
        self._headers = headers
        self._claimed = checksum
        self._checksum = checksum or ""
        self._md5 = not context.checksums

    @property
    def resendable(self) -> bool:
        """Whether sending it twice does the same as sending it once."""
        return self.request.mode == "overwrite"

    def wire(self) -> Wire:
        """The request, signed now."""
        request = self.request
        headers = dict(self._headers) if self._headers else {}
        if request.content_type is not None:
            headers["content-type"] = checked_header("content_type", request.content_type)
        return self._written({**headers, **condition_headers(request.mode)})

    def _written(self, headers: dict[str, str], query: str = "") -> Wire:
        data, context = self._data, self._context
        if self._md5:
            claims_other_bytes = self._claimed is not None and self._claimed != crc32c_base64(data)
            headers["content-md5"] = md5_base64(self._claimed.encode() if claims_other_bytes and self._claimed else data)
        else:
            self._checksum = headers["x-amz-checksum-crc32c"] = self._checksum or crc32c_base64(data)
        text = context.signer().head("PUT", context.object_path(self.request.key), query, headers)
        return ((f"{text}Content-Length: {len(data)}\r\n\r\n").encode("ascii"), data)

    def where(self) -> Where:
        """What errors say was asked."""
        return Where(self.verb, f"{self._context.url}/{self.request.key}", condition_of(self.request.mode))

    def _check(self, head: Head) -> None:
        if head.status != 200:
            raise UnexpectedResponse("not a success", head.status)
        if head.length > SMALL:
            raise UnexpectedResponse("a long body", head.status)
        if head.first >= 0:
            raise UnexpectedResponse("a range", head.status)
        if head.checksum and not self._md5 and head.checksum != self._checksum:
            raise UnexpectedResponse("the server says another checksum", head.status)

    def _mend(self, error: S3LoaderError) -> bool:
        """A server that does not know the checksum's kind gets a Content-MD5 instead."""
        if self._md5 or not refuses_checksums(error):
            return False
        self._md5 = True
        return True

    def _place(self, head: Head, stop: int, have: int) -> None:
        self._view = memoryview(bytearray(head.length))

    def _take(self, response: Response) -> None:
        self._check(response.head)
        response.read_all(SMALL)
        self._complete(response.head)

    def _finish(self) -> bool:
        assert self.head is not None
        self._health.refusals = 0
        self._complete(self.head)
        return True

    def _complete(self, head: Head) -> None:
        if self._md5:
            self._context.checksums = False  # it was the checksum, then
        self.result = self._result(head)
        self.done = True
        if self._started:
            self._emit(len(self._data), head.status)

    def _result(self, head: Head) -> PutResult | PartResult:
        return PutResult(self.request.key, head.etag, len(self._data), head.version_id)


class PartJob(PutJob):
    """One part of a multipart upload."""

    __slots__ = ("_number", "_upload_id")

    op = "PUTPART"
    verb = "upload part"

    def __init__(self, context: EndpointContext, key: str, upload_id: str, number: int, data: Buffer) -> None:
        super().__init__(context, PutRequest(key, data))
        self._number = number
        self._upload_id = upload_id

    def wire(self) -> Wire:
        """The request, signed now."""
        return self._written({}, query_of(partNumber=self._number, uploadId=self._upload_id))

    def _check(self, head: Head) -> None:
        super()._check(head)
        if not head.etag:
            raise UnexpectedResponse("no ETag", head.status)

    def _result(self, head: Head) -> PartResult:
        return PartResult(self._number, head.etag, len(self._data), None if self._md5 else self._checksum)
