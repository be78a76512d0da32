"""PUT and UploadPart as jobs: the payload is not signed, its CRC32C is."""

from __future__ import annotations

from urllib.parse import quote

from s3loader.checksum import crc32c_base64
from s3loader.store.base import Backend
from s3loader.store.direct.head import Head, OddAnswer
from s3loader.store.direct.jobs import SMALL, Job, Setting, Wire, harmless
from s3loader.store.s3errors import Where
from s3loader.types import Buffer, PartResult, PutRequest, PutResult

__all__ = ["PartJob", "PutJob"]


class PutJob(Job):
    """A PUT of a whole object."""

    __slots__ = ("_checksum", "_data", "request")

    op = "PUT"
    verb = "put"

    def __init__(self, setting: Setting, request: PutRequest) -> None:
        self._data = memoryview(request.data).cast("B")
        direct = request.mode == "overwrite" and request.key != "" and harmless(request.content_type)
        super().__init__(setting, setting.writes, len(self._data), direct)
        self.request = request
        self._checksum = ""

    def wire(self) -> Wire:
        """See `Job.wire`."""
        headers = {}
        if self.request.content_type is not None:
            headers["content-type"] = self.request.content_type
        return self._written(headers)

    def _written(self, headers: dict[str, str], query: str = "") -> Wire:
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

    def _place(self, head: Head, stop: int, have: int) -> None:
        self._view = memoryview(bytearray(head.length))

    def _finish(self) -> bool:
        head = self.head
        assert head is not None
        self._trust.refusals = 0
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

    def _asked(self) -> Where:
        return Where(self.verb, f"{self._setting.general.url}/{self.request.key}")


class PartJob(PutJob):
    """One part of a multipart upload."""

    __slots__ = ("_number", "_upload_id")

    op = "PUTPART"
    verb = "upload part"

    def __init__(self, setting: Setting, key: str, upload_id: str, number: int, data: Buffer) -> None:
        super().__init__(setting, PutRequest(key, data))
        self._number = number
        self._upload_id = upload_id

    def wire(self) -> Wire:
        """See `Job.wire`."""
        return self._written({}, f"partNumber={self._number}&uploadId={quote(self._upload_id, safe='-_.~')}")

    def _check(self, head: Head) -> None:
        super()._check(head)
        if not head.etag:
            raise OddAnswer("no ETag", head.status)

    def _result(self, head: Head) -> PartResult:
        return PartResult(self._number, head.etag, len(self._data), self._checksum)

    def _ask(self, general: Backend) -> PartResult:
        return general.upload_part(self.request.key, self._upload_id, self._number, self.request.data)
