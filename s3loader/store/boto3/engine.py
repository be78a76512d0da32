"""The boto3 engine: every verb of S3, on any server, after fork, and over a user's own client.

It is the slow one (0.5-2 CPU-s per GB) and the one that can do everything: what the direct and
obstore engines lack (versions, multipart control, reports of deletes, odd keys) ends here.
Uploads carry their CRC32C as a signed header (a Content-MD5 where the server refuses that), so that
damaged bytes are not stored and the ETag of a single put stays the MD5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlencode

from s3loader.checksum import crc32c_base64, md5_base64
from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    RangeError,
    StoreError,
)
from s3loader.ranges import split
from s3loader.store.arguments import bare_etag
from s3loader.store.backend import BulkBackend, Op
from s3loader.store.boto3.client import (
    BotoClient,
    body,
    body_range,
    conditions,
    described,
    entries_of,
    meta_of,
    read_body,
    version,
)
from s3loader.store.options import MAX_PARTS, StoreOptions
from s3loader.store.ordered import map_ordered
from s3loader.store.s3.xml import is_xml_text
from s3loader.store.s3errors import Condition, Where, check_etag, condition_of, from_status, read_nothing, refuses_checksums
from s3loader.types import (
    SETTABLE,
    Buffer,
    CommonPrefix,
    DeleteFailure,
    ObjectMeta,
    PartResult,
    PutMode,
    PutResult,
)
from s3loader.units import MIB

__all__ = ["Boto3Backend", "copy_parts", "delete_many"]

_ONE_COPY: Final = 5 << 30
"""The most bytes of one CopyObject."""
_THROUGH: Final = 64 * MIB
"""A conditional copy up to this size goes through this process."""


class Boto3Backend:
    """One bucket over boto3.

    Args:
        bucket: Its name.
        settings: Endpoint, region, CA bundle, addressing.
        credentials: Shared with the other engines.
        options: Timeouts.
        s3_client: A boto3 client to use in place of our own.
    """

    PUT_LIMIT: Final = 5 << 30
    """Most bytes of one put."""
    bulk: BulkBackend | None = None
    """Threads run its single verbs."""
    emits_events = True
    """It emits the events of its own requests."""

    def __init__(
        self,
        bucket: str,
        settings: S3Settings,
        *,
        credentials: CredentialsSource | None = None,
        options: StoreOptions | None = None,
        s3_client: Any = None,
    ) -> None:
        self.bucket = bucket
        self.url = f"s3://{bucket}"
        self._options = options or StoreOptions()
        self._settings = settings
        self._credentials = credentials or CredentialsSource(settings, unsigned=self._options.unsigned)
        self._client = BotoClient(bucket, settings, self._credentials, self._options, s3_client)
        self._bucket_seen = False
        self._etag_told = False
        # False once the server refused one; a user's client that asks for none knows its server
        config = getattr(getattr(s3_client, "meta", None), "config", None)
        self.checksums: bool = s3_client is None or getattr(config, "request_checksum_calculation", None) != "when_required"

    @property
    def engine(self) -> str:
        """``direct``, ``obstore``, ``boto3``, ``file``, ``memory``; for events and `explain`."""
        return "boto3"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.bucket, self._settings, self._credentials, self._options, self._client.given)

    # reading

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` (to the end of the object where `end` is None or beyond it)."""
        where = Where("get", self._client.at(key), "read")
        if end is not None and end <= start:
            return read_nothing(self, key, start, if_match, version_id, where), b""

        def take(answer: dict[str, Any]) -> tuple[ObjectMeta, Buffer]:
            length, size = body_range(answer, start, end, where)
            check_etag(answer.get("ETag"), if_match, where)
            data = bytearray(length)
            read_body(answer["Body"], memoryview(data), where)
            return meta_of(key, answer, size), data

        try:
            return self._client.read("get", key, _range(key, start, end, if_match, version_id), start, take)
        except RangeError:
            if end is not None:
                raise
            return read_nothing(self, key, start, if_match, version_id, where), b""  # from the very end on there is nothing

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` (1-D, format ``B``, writable) with ``len(buffer)`` bytes from `start`."""
        where = Where("read", self._client.at(key), "read")
        if not len(buffer):
            return read_nothing(self, key, start, if_match, None, where)
        end = start + len(buffer)

        def take(answer: dict[str, Any]) -> ObjectMeta:
            length, size = body_range(answer, start, end, where)
            check_etag(answer.get("ETag"), if_match, where)
            if length < len(buffer):
                raise RangeError(f"it has {size} bytes, asked for [{start}, {end})", op="read", url=where.url)
            read_body(answer["Body"], buffer, where)
            return meta_of(key, answer, size)

        return self._client.read("read", key, _range(key, start, end, if_match, None), start, take)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object, without its bytes."""
        parameters = {"VersionId": version_id} if version_id is not None else {}
        try:
            answer = self._client.call("head", "head_object", key, {"Key": key, **parameters})
        except ObjectNotFoundError:
            self.check_bucket(key)
            raise
        return meta_of(key, answer)

    def check_bucket(self, key: str) -> None:
        """Raise `BucketNotFoundError` where, after a 404 to HEAD, it is the bucket that is missing: the
        answer has no body that would tell. Asks until it was seen once."""
        if self._bucket_seen:
            return
        try:
            self._client.call("head", "head_bucket", "", {})
        except ObjectNotFoundError:
            raise from_status(404, "NoSuchBucket", "there is no such bucket", Where("head", self._client.at(key))) from None
        except StoreError:
            return  # not allowed to ask, or not answered: then the object's error stands
        self._bucket_seen = True

    # writing

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> PutResult:
        """Write one object atomically: readers see the old one or the new one, whole."""
        parameters: dict[str, Any] = {
            "Key": key,
            "Body": body(data),
            **described(content_type, metadata, attributes),
            **conditions(mode),
        }
        answer = self._upload("put", "put_object", key, data, condition_of(mode), parameters)
        size = len(parameters["Body"])
        return PutResult(key, bare_etag(answer.get("ETag")), size, version(answer))

    def _upload(
        self, verb: Op, operation: str, key: str, data: Buffer, condition: Condition, parameters: dict[str, Any]
    ) -> dict[str, Any]:
        if self.checksums:
            checked = {**parameters, "ChecksumCRC32C": crc32c_base64(data)}
            try:
                return self._client.call(verb, operation, key, checked, condition)
            except StoreError as error:
                if not refuses_checksums(error):
                    raise
        if self._client.given is None:  # a user's client adds the checksum of its own choice
            parameters = {**parameters, "ContentMD5": md5_base64(data)}
        answer = self._client.call(verb, operation, key, parameters, condition)
        self.checksums = False  # it was the checksum, then
        return answer

    def put_with_checksum(self, key: str, data: Buffer, checksum: str) -> PutResult:
        """Put, telling the server that the CRC32C of `data` is `checksum` (base64), right or wrong.

        Where it refuses CRC32C, a Content-MD5 that is right or wrong takes its place, as in `put`.
        """
        Boto3Backend.put(self, key, data)  # finds out which
        wrong = checksum != crc32c_base64(data)
        parameters: dict[str, Any] = {"Key": key, "Body": body(data)}
        if self.checksums:
            parameters["ChecksumCRC32C"] = checksum
        else:
            parameters["ContentMD5"] = md5_base64(checksum.encode() if wrong else data)
        answer = self._client.call("put", "put_object", key, parameters)
        return PutResult(key, bare_etag(answer.get("ETag")), len(parameters["Body"]), version(answer))

    def delete(self, key: str) -> None:
        """Delete; a key that does not exist is no error."""
        try:
            self._client.call("delete", "delete_object", key, {"Key": key})
        except BucketNotFoundError:
            raise
        except ObjectNotFoundError:
            return

    def delete_many(self, keys: Sequence[str]) -> list[DeleteFailure]:
        """Delete all; never raises for a single key, returns what failed. 1000 keys a request; one by one where the server has
        no DeleteObjects."""
        return delete_many(self._client, keys, self.delete)

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside this root, on the server's side where it can. Over 5 GiB it goes part by part.

        Few servers know conditions on a copy and those that do not ignore them silently. So a
        conditional copy ends in the write that most of them honour: a put, through this process,
        up to 64 MiB; the completion of a multipart upload above.
        """
        meta = self.head(source)
        if condition_of(mode) is None and meta.size <= _ONE_COPY:
            return self._copy_whole(meta, target)
        kept = _kept(meta)
        if meta.attributes.get("tag_count", "0") != "0":
            kept["tagging"] = urlencode(self.tags(source))
        if meta.size <= _THROUGH:
            meta, data = self.get(source, if_match=meta.etag)
            about = {"content_type": meta.content_type, "metadata": meta.metadata, "attributes": kept}
            return self.put(target, data, mode=mode, **about)  # type: ignore[arg-type]
        return self._copy_parts(meta, target, mode, kept)

    def tags(self, key: str, *, version_id: str | None = None) -> Mapping[str, str]:
        """Tags of an object."""
        parameters = {"Key": key} if version_id is None else {"Key": key, "VersionId": version_id}
        answer = self._client.call("tags", "get_object_tagging", key, parameters)
        return {tag["Key"]: tag["Value"] for tag in answer.get("TagSet") or ()}

    def _copy_whole(self, source: ObjectMeta, target: str) -> PutResult:
        parameters = {
            "Key": target,
            "CopySource": {"Bucket": self.bucket, "Key": source.key},
            "CopySourceIfMatch": f'"{source.etag}"',
            **described(None, None, {name: value for name, value in _kept(source).items() if name in _NOT_COPIED}),
        }
        answer = self._client.call("copy", "copy_object", source.key, parameters, "read")
        etag = bare_etag((answer.get("CopyObjectResult") or {}).get("ETag"))
        return PutResult(target, etag or self.head(target).etag, source.size, version(answer))

    def _copy_parts(self, source: ObjectMeta, target: str, mode: PutMode, kept: Mapping[str, str]) -> PutResult:
        upload_id = self.create_multipart(target, content_type=source.content_type, metadata=source.metadata, attributes=kept)
        try:
            parts = copy_parts(self._client, source, target, upload_id)
            return self.complete_multipart(target, upload_id, parts, mode=mode)
        except BaseException:
            with contextlib.suppress(StoreError):
                self.abort_multipart(target, upload_id)
            raise

    # listing

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries whose key starts with `prefix`, in order of the UTF-8 bytes of their keys. One page of 1000 at a time."""
        parameters: dict[str, Any] = {"Prefix": prefix}
        if delimiter:
            parameters["Delimiter"] = delimiter
        if start_after:
            parameters["StartAfter"] = start_after
        while True:
            page = self._client.call("list", "list_objects_v2", prefix, parameters, objects=lambda page: len(entries_of(page)))
            self._bucket_seen = True
            yield from entries_of(page)
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated"):
                return
            if not token or token == parameters.get("ContinuationToken"):
                raise StoreError("the server's listing does not go on", op="list", url=self._client.at(prefix))
            parameters["ContinuationToken"] = token

    # multipart

    def create_multipart(
        self,
        key: str,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin a multipart upload; returns its upload id. The upload is declared to carry CRC32C part by part."""
        parameters: dict[str, Any] = {"Key": key, **described(content_type, metadata, attributes)}
        declared = {**parameters, "ChecksumAlgorithm": "CRC32C"} if self.checksums else parameters
        try:
            answer = self._client.call("create upload", "create_multipart_upload", key, declared)
        except StoreError as error:
            if not self.checksums or not refuses_checksums(error):
                raise
            answer = self._client.call("create upload", "create_multipart_upload", key, parameters)
            self.checksums = False
        return str(answer["UploadId"])

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload part `number` (1-based; all parts but the last at least 5 MiB on S3)."""
        parameters: dict[str, Any] = {"Key": key, "UploadId": upload_id, "PartNumber": number, "Body": body(data)}
        answer = self._upload("upload part", "upload_part", key, data, None, parameters)
        checksum = crc32c_base64(data) if self.checksums else None
        return PartResult(number, bare_etag(answer.get("ETag")), len(parameters["Body"]), checksum)

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """Make the object from its parts. An upload without parts becomes an empty object."""
        uploaded = [*parts] or [self.upload_part(key, upload_id, 1, b"")]
        wanted = [
            {
                "PartNumber": part.number,
                "ETag": f'"{part.etag}"',
                **({"ChecksumCRC32C": part.checksum} if part.checksum else {}),
            }
            for part in uploaded
        ]
        parameters = {"Key": key, "UploadId": upload_id, "MultipartUpload": {"Parts": wanted}, **conditions(mode)}
        answer = self._client.call("complete upload", "complete_multipart_upload", key, parameters, condition_of(mode))
        size = sum(part.size for part in uploaded)
        return PutResult(key, self._etag_made(key, bare_etag(answer.get("ETag")), size), size, version(answer))

    def _etag_made(self, key: str, told: str, size: int) -> str:
        """The ETag that reads will show: Ceph tells none here and rclone another one, so the first
        completion is compared with the object, and where they differ every one is."""
        if self._etag_told and told:
            return told
        try:
            meta = self.head(key)
        except StoreError:
            return told  # the upload is complete; not being able to look at it is no failure of it
        self._etag_told = meta.etag == told
        return meta.etag if meta.size == size else told

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the parts; an upload that is gone is no error."""
        try:
            self._client.call("abort upload", "abort_multipart_upload", key, {"Key": key, "UploadId": upload_id})
        except BucketNotFoundError:
            raise
        except ObjectNotFoundError:
            return

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """Open multipart uploads: ``(key, upload_id, initiated seconds since the epoch)``."""
        markers: dict[str, Any] = {}
        while True:
            page = self._client.call("list uploads", "list_multipart_uploads", prefix, {"Prefix": prefix, **markers})
            for upload in page.get("Uploads") or ():
                begun = upload.get("Initiated")
                yield upload["Key"], upload["UploadId"], begun.timestamp() if begun is not None else None
            after = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
            after = {name: value for name, value in after.items() if value}
            if not page.get("IsTruncated"):
                return
            if not after or after == markers:
                raise StoreError("the server's listing does not go on", op="list uploads", url=self._client.at(prefix))
            markers = after

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """Parts that an open upload has, by number, as `complete_multipart` takes them. One page of 1000 at a time."""
        marker: dict[str, Any] = {}
        while True:
            page = self._client.call("list parts", "list_parts", key, {"Key": key, "UploadId": upload_id, **marker})
            for part in page.get("Parts") or ():
                yield PartResult(part["PartNumber"], bare_etag(part.get("ETag")), part["Size"], part.get("ChecksumCRC32C"))
            if not page.get("IsTruncated"):
                return
            after = {"PartNumberMarker": page.get("NextPartNumberMarker")}
            if not after["PartNumberMarker"] or after == marker:
                raise StoreError("the server's listing does not go on", op="list parts", url=self._client.at(key))
            marker = after

    def close(self) -> None:
        """Let go of connections and threads; closing twice is fine. A client given by the user stays open."""
        self._client.close()


def _rebuild(
    bucket: str, settings: S3Settings, credentials: CredentialsSource, options: StoreOptions, client: Any
) -> Boto3Backend:
    return Boto3Backend(bucket, settings, credentials=credentials, options=options, s3_client=client)


def _range(key: str, start: int, end: int | None, if_match: str | None, version_id: str | None) -> dict[str, Any]:
    """Parameters of a read."""
    parameters: dict[str, Any] = {"Key": key}
    if start or end is not None:
        last = "-" if start >= 0 else ""  # "bytes=-5": the last five
        parameters["Range"] = f"bytes={start}{last}" if end is None else f"bytes={start}-{end - 1}"
    if if_match is not None:
        parameters["IfMatch"] = f'"{bare_etag(if_match)}"'
    if version_id is not None:
        parameters["VersionId"] = version_id
    return parameters


_NOT_COPIED: Final = ("storage_class", "server_side_encryption", "ssekms_key_id")
"""What CopyObject takes from the bucket, not from the source, unless it is said."""


def _kept(source: ObjectMeta) -> dict[str, str]:
    """What a copy keeps of its source's attributes; plain encryption is the bucket's own affair."""
    kept = {name: value for name, value in source.attributes.items() if name in SETTABLE}
    if not kept.get("server_side_encryption", "").startswith("aws:kms"):
        kept.pop("server_side_encryption", None)
        kept.pop("ssekms_key_id", None)
    return kept


# -- copies of large objects -----------------------------------------------------------------------

_COPY_PART: Final = 256 * MIB
_COPY_THREADS: Final = 8


def copy_parts(
    client: BotoClient, source: ObjectMeta, target: str, upload_id: str, *, part_size: int = _COPY_PART
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

    return [*map_ordered(one, enumerate(ranges, 1), concurrency=_COPY_THREADS, name="s3loader-copy")]


# -- many deletes ----------------------------------------------------------------------------------

_BATCH: Final = 1000
"""The most keys of one DeleteObjects."""


def delete_many(client: BotoClient, keys: Sequence[str], delete: Callable[[str], None]) -> list[DeleteFailure]:
    """Delete `keys` by DeleteObjects, or one by one with `delete` where that cannot be."""
    failures: list[DeleteFailure] = []
    unique = list(dict.fromkeys(keys))
    plain = [key for key in unique if is_xml_text(key)]
    single = [key for key in unique if not is_xml_text(key)]
    for at in range(0, len(plain), _BATCH):
        batch = plain[at : at + _BATCH]
        try:
            failures += _delete_batch(client, batch)
        except StoreError as error:
            if error.status not in (400, 405, 501):
                raise
            single += batch  # a server without it, or one that wants another checksum with it
    for key in single:
        try:
            delete(key)
        except BucketNotFoundError:
            raise
        except StoreError as error:
            failures.append(DeleteFailure(key, error))
    return failures


def _delete_batch(client: BotoClient, keys: Sequence[str]) -> list[DeleteFailure]:
    wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    parameters = {"Delete": wanted}
    answer = client.call("delete", "delete_objects", "", parameters, about=keys[0], objects=lambda _: len(keys))
    failures = []
    for entry in answer.get("Errors") or ():
        key = entry.get("Key", "")
        error = from_status(None, entry.get("Code"), entry.get("Message") or "", Where("delete", client.at(key)))
        if not isinstance(error, ObjectNotFoundError):
            failures.append(DeleteFailure(key, error))
    return failures
