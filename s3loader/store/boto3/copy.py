"""Copies of large objects, part by part, on the server's side."""

from __future__ import annotations

from typing import Final

from s3loader.ranges import split
from s3loader.store.boto3.client import BotoClient
from s3loader.store.options import MAX_PARTS
from s3loader.store.ordered import map_ordered
from s3loader.store.s3reads import bare_etag
from s3loader.types import ObjectMeta, PartResult
from s3loader.units import MIB

__all__ = ["copy_parts"]

_PART: Final = 256 * MIB
_THREADS: Final = 8


def copy_parts(
    client: BotoClient, source: ObjectMeta, target: str, upload_id: str, *, part_size: int = _PART
) -> list[PartResult]:
    """Fill the multipart upload `upload_id` of `target` from `source`, which must stay what it is.

    The first error ends it; the upload is the caller's to abort.
    """
    size = max(part_size, -(-source.size // MAX_PARTS))
    ranges = split(0, source.size, size)

    def one(part: tuple[int, tuple[int, int]]) -> PartResult:
        number, (start, end) = part
        parameters = {
            "Key": target,
            "UploadId": upload_id,
            "PartNumber": number,
            "CopySource": {"Bucket": client.bucket, "Key": source.key},
            "CopySourceRange": f"bytes={start}-{end - 1}",
            "CopySourceIfMatch": f'"{source.etag}"',
        }
        answer = client.call("copy", "upload_part_copy", source.key, parameters, "read")
        made = answer["CopyPartResult"]
        return PartResult(number, bare_etag(made.get("ETag")), end - start, made.get("ChecksumCRC32C"))

    return [*map_ordered(one, enumerate(ranges, 1), concurrency=_THREADS, name="s3loader-copy")]
