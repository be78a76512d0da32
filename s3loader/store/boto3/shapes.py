"""boto3's answers and parameters in our terms. Pure, but for reading a body."""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from typing import Any, Final

from s3loader.errors import StoreError, TruncatedError, UnsupportedOperationError
from s3loader.ranges import first_byte
from s3loader.store.s3errors import Where
from s3loader.store.s3reads import bare_etag
from s3loader.types import ATTRIBUTES, Buffer, ObjectMeta, PutMode, Update

__all__ = [
    "body",
    "body_range",
    "conditions",
    "described",
    "listed",
    "meta_of",
    "read_body",
    "version",
]

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def meta_of(key: str, answer: Mapping[str, Any], size: int | None = None) -> ObjectMeta:
    """The metadata in boto3's answer to GET or HEAD."""
    modified = answer.get("LastModified")
    version = answer.get("VersionId")
    return ObjectMeta(
        key=key,
        size=int(answer.get("ContentLength", 0)) if size is None else size,
        etag=bare_etag(answer.get("ETag")),
        last_modified=modified.timestamp() if modified is not None else None,
        content_type=answer.get("ContentType"),
        version_id=None if version == "null" else version,
        metadata={name.lower(): value for name, value in (answer.get("Metadata") or {}).items()},
        attributes=_attributes(answer),
    )


def _attributes(answer: Mapping[str, Any]) -> dict[str, str]:
    headers = (answer.get("ResponseMetadata") or {}).get("HTTPHeaders") or {}  # as sent: boto3 makes dates of some
    return {name: headers[header] for name, header in ATTRIBUTES.items() if header in headers}


def body_range(answer: Mapping[str, Any], start: int, end: int | None, where: Where) -> tuple[int, int]:
    """Length of the body and size of the object, from an answer to a read of ``[start, end)``.

    The answer is believed by what it says of itself: rclone sends ranges with status 200.

    Raises:
        UnsupportedOperationError: it is not a range though one was asked for.
        StoreError: it is another range.
    """
    length = int(answer["ContentLength"])
    ranged = answer.get("ContentRange")
    if not ranged:
        if first_byte(start, length) == 0 and (end is None or length <= end):
            return length, length
        raise UnsupportedOperationError(
            "the server ignores ranges", op=where.op, url=where.url, hint='use engine="direct", which reads around it'
        )
    if start < 0 and not length and ranged.strip() == "bytes 0--1/0":  # from the end of an empty object
        return 0, 0
    match = _CONTENT_RANGE.fullmatch(ranged.strip())
    if match is None or match[3] == "*":
        raise StoreError(f"the answer has no usable Content-Range: {ranged!r}", op=where.op, url=where.url)
    first, last, size = int(match[1]), int(match[2]), int(match[3])
    start = first_byte(start, size)
    stop = size if end is None else min(end, size)
    if (first, last + 1) != (start, stop) or length != stop - start:
        text = f"asked for bytes [{start}, {stop}), the answer has [{first}, {last + 1}) in {length} bytes"
        raise StoreError(text, op=where.op, url=where.url, retryable=True)
    return length, size


def read_body(body: Any, into: memoryview, where: Where) -> None:
    """Fill `into` from boto3's streaming body, straight from the socket where it has one."""
    raw: Any = getattr(body, "_raw_stream", None)
    response: Any = getattr(raw, "_fp", None)
    # urllib3's own readinto reads a bytes object and copies it
    direct = isinstance(response, http.client.HTTPResponse)
    source = response if direct else body
    filled, size = 0, len(into)
    while filled < size:
        got = source.readinto(into[filled:])
        if not got:
            raise TruncatedError(f"the body ended after {filled} of {size} bytes", op=where.op, url=where.url, retryable=True)
        filled += got
    if direct:
        response.close()  # all of it is read: the connection itself stays open
        raw.release_conn()


def body(data: Buffer) -> bytes | bytearray:
    """What boto3 takes for `data`: it knows no memoryview."""
    return data if isinstance(data, (bytes, bytearray)) else bytes(data)


_PARAMETERS: Final = {
    "cache_control": "CacheControl",
    "content_disposition": "ContentDisposition",
    "content_encoding": "ContentEncoding",
    "content_language": "ContentLanguage",
    "expires": "Expires",
    "storage_class": "StorageClass",
    "server_side_encryption": "ServerSideEncryption",
    "ssekms_key_id": "SSEKMSKeyId",
    "tagging": "Tagging",
}
"""Names of `s3loader.types.SETTABLE` as boto3 says them."""


def described(
    content_type: str | None, metadata: Mapping[str, str] | None, attributes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Parameters of a write that describe the object."""
    found: dict[str, Any] = {"ContentType": content_type} if content_type else {}
    found |= {_PARAMETERS[name]: value for name, value in (attributes or {}).items()}
    return {**found, "Metadata": dict(metadata)} if metadata else found


def conditions(mode: PutMode) -> dict[str, str]:
    """Parameters that make a write conditional."""
    if isinstance(mode, Update):
        return {"IfMatch": f'"{bare_etag(mode.etag)}"'}
    return {"IfNoneMatch": "*"} if mode == "create" else {}


def version(answer: Mapping[str, Any]) -> str | None:
    """The version id in an answer; None where versions are off."""
    found = answer.get("VersionId")
    return None if found == "null" else found


def listed(entry: Mapping[str, Any]) -> ObjectMeta:
    """One object of a listing."""
    modified = entry.get("LastModified")
    return ObjectMeta(
        entry["Key"], int(entry["Size"]), bare_etag(entry.get("ETag")), modified.timestamp() if modified is not None else None
    )
