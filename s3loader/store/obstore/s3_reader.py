"""obstore's one duty on S3: reads over TLS beside a busy main thread."""

from __future__ import annotations

from typing import Any

from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.store.obstore import runtime as obstore_runtime
from s3loader.store.obstore.client import ObstoreClient, open_s3
from s3loader.store.obstore.engine import ObstoreBackend
from s3loader.store.options import StoreOptions
from s3loader.types import Buffer, ObjectMeta

__all__ = ["ObstoreS3Reader"]


class ObstoreS3Reader:
    """Reads from one bucket; a `TlsReader`. Nothing of obstore is loaded before the first read.

    Args:
        endpoint: The bucket.
        credentials: Where the keys come from.
        options: Timeouts.
    """

    def __init__(self, endpoint: Endpoint, credentials: CredentialsSource, options: StoreOptions) -> None:
        self._made_of = endpoint, credentials, options
        url = f"s3://{endpoint.bucket}"
        client = ObstoreClient(url, lambda: open_s3(endpoint, credentials, options), credentials, tells=False)
        self._backend = ObstoreBackend("s3", endpoint.bucket, client)

    def usable(self) -> bool:
        """Whether it works in this process: not in a forked child of one that had obstore loaded."""
        return obstore_runtime.usable()

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` of an object."""
        return self._backend.get(key, start, end, if_match=if_match)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObstoreS3Reader, self._made_of
