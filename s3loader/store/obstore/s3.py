"""The obstore engine on S3: reads, heads, puts and deletes by obstore, the rest by boto3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.errors import BucketNotFoundError, ObjectNotFoundError, StoreError, UnsupportedOperationError
from s3loader.store.boto3.engine import Boto3Backend
from s3loader.store.boto3.shapes import refuses_checksums
from s3loader.store.obstore import runtime as obstore_runtime
from s3loader.store.obstore.client import ObstoreClient, open_s3
from s3loader.store.obstore.engine import ObstoreBackend
from s3loader.store.options import StoreOptions
from s3loader.store.s3reads import is_plain_key
from s3loader.types import Buffer, ObjectMeta, PutMode, PutResult

__all__ = ["ObstoreS3Backend"]


class ObstoreS3Backend(Boto3Backend):
    """One S3 bucket over obstore, and over boto3 for what obstore cannot do.

    That is: keys that obstore would change, versions, copies, listings (obstore's are of folders,
    not of string prefixes), reports of deletes, multipart; ranges on a server that answers them
    with 200; and everything in a forked child of a process that used obstore. Puts carry CRC64NVME
    as a signed header; where a server refuses that, boto3 takes them too.
    """

    def __init__(
        self,
        bucket: str,
        settings: S3Settings,
        *,
        credentials: CredentialsSource | None = None,
        options: StoreOptions | None = None,
    ) -> None:
        super().__init__(bucket, settings, credentials=credentials, options=options)
        endpoint = Endpoint.from_settings(settings, bucket)
        source, chosen = self._credentials, self._options
        client = ObstoreClient(self.url, lambda: open_s3(endpoint, source, chosen), source)
        self._obstore = ObstoreBackend("s3", bucket, client)
        self._ranges = True
        self._crc64 = True

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.bucket, self._settings, self._credentials, self._options)

    @property
    def engine(self) -> str:
        """See `Backend.engine`."""
        return "obstore" if obstore_runtime.usable() else "boto3"

    def _takes(self, key: str) -> bool:
        return obstore_runtime.usable() and is_plain_key(key)

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """See `Backend.get`."""
        whole = start == 0 and end is None
        if version_id is None and (self._ranges or whole) and self._takes(key):
            try:
                return self._obstore.get(key, start, end, if_match=if_match)
            except UnsupportedOperationError:
                if whole:
                    raise
                self._ranges = False
        return super().get(key, start, end, if_match=if_match, version_id=version_id)

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """See `Backend.read_into`."""
        if self._ranges and self._takes(key):
            try:
                return self._obstore.read_into(key, start, buffer, if_match=if_match)
            except UnsupportedOperationError:
                self._ranges = False
        return super().read_into(key, start, buffer, if_match=if_match)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """See `Backend.head`."""
        if version_id is not None or not self._takes(key):
            return super().head(key, version_id=version_id)
        try:
            return self._obstore.head(key)
        except BucketNotFoundError:
            raise
        except ObjectNotFoundError:
            self.check_bucket(key)
            raise

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        """See `Backend.put`."""
        taken = self._crc64 and self._takes(key)
        if taken:
            try:
                return self._obstore.put(key, data, mode=mode, content_type=content_type, metadata=metadata)
            except StoreError as error:
                if not refuses_checksums(error):
                    raise
        result = super().put(key, data, mode=mode, content_type=content_type, metadata=metadata)
        if taken:
            self._crc64 = False  # it was the checksum, then
        return result

    def delete(self, key: str) -> None:
        """See `Backend.delete`."""
        if self._takes(key):
            self._obstore.delete(key)
        else:
            super().delete(key)

    def close(self) -> None:
        """See `Backend.close`."""
        self._obstore.close()
        super().close()


def _rebuild(bucket: str, settings: S3Settings, credentials: CredentialsSource, options: StoreOptions) -> ObstoreS3Backend:
    return ObstoreS3Backend(bucket, settings, credentials=credentials, options=options)
