"""From what a user has (a boto3 client, settings, a URL, a store) to an object store."""

from __future__ import annotations

import os
from typing import Any

from s3loader.errors import ConfigError
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import open_store
from s3loader.store.wrappers.prefix import PrefixBackend
from s3loader.types import ObjectURL

__all__ = ["open_root"]

DEFAULT_BUCKET = "default-bucket"
"""The bucket s3exchange falls back to where a client comes without one."""


def open_root(target: Any, bucket: str | None, prefix: str = "") -> tuple[ObjectStore, str, Any]:
    """The store (below `prefix`, where one is given), the bucket's name, and the boto3 client if one was given.

    Raises:
        ConfigError: `target` is none of the four.
    """
    below = f"/{prefix}" if prefix else ""
    if isinstance(target, ObjectStore):
        name = bucket or ObjectURL.parse(target.url).bucket
        if not prefix:
            return target, name, None
        root = PrefixBackend(target.backend, f"{prefix}/")
        return ObjectStore(f"{target.url}{below}", root, options=target.options), name, None
    if isinstance(target, (str, os.PathLike)):
        url = ObjectURL.parse(os.fspath(target))
        return open_store(f"{url.base}{below}" if prefix else url), bucket or url.bucket, None
    if hasattr(target, "get_object") and hasattr(target, "head_object") and hasattr(target, "meta"):
        name = bucket or DEFAULT_BUCKET
        return open_store(f"s3://{name}{below}", s3_client=target), name, target
    if hasattr(target, "endpoint_url") and hasattr(target, "aws_access_key_id"):
        name = bucket or target.bucket
        if not name:
            raise ConfigError("no bucket", hint="pass bucket=, or set S3_BUCKET")
        return open_store(f"s3://{name}{below}", settings=target), name, None
    raise ConfigError(
        f"cannot make a store of {type(target).__name__}",
        hint="give a boto3 S3 client, S3Settings, an ObjectStore, or a URL",
    )
