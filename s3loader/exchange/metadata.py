"""Metadata of objects and members in the shape of boto3's ``head_object``."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from s3loader.errors import ObjectNotFoundError
from s3loader.exchange.access import not_found
from s3loader.exchange.errors import ExchangeObjectNotFoundError
from s3loader.exchange.keys import normalize_key, split_virtual_key
from s3loader.types import ObjectMeta

if TYPE_CHECKING:
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["object_metadata"]


def object_metadata(store: S3ExchangeStore, key: str) -> dict[str, Any]:
    """See `S3ExchangeStore.get_object_metadata`."""
    virtual = split_virtual_key(key)
    try:
        return _of_object(store, key)
    except ObjectNotFoundError as error:
        if virtual is None:
            raise not_found(key, error) from error
    try:
        archive = _of_object(store, virtual[0])
        size = store.access.member_size(*virtual)
    except ObjectNotFoundError as error:
        raise not_found(key, error) from error
    if size is None:
        raise ExchangeObjectNotFoundError(key, op="head", hint="the archive has no such member")
    return archive | {"ContentLength": size}


def _of_object(store: S3ExchangeStore, key: str) -> dict[str, Any]:
    if store.s3_client is None:
        return _as_boto3(store.objects.head(key))
    prefix = normalize_key(store.base_prefix) if store.prefix_all else ""
    try:
        return dict(store.s3_client.head_object(Bucket=store.bucket, Key=f"{prefix}/{key}" if prefix else key))
    except Exception:
        store.objects.head(key)  # says the same as one of our errors
        raise


def _as_boto3(meta: ObjectMeta) -> dict[str, Any]:
    modified = None if meta.last_modified is None else datetime.datetime.fromtimestamp(meta.last_modified, datetime.UTC)
    return {
        "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {}, "RetryAttempts": 0},
        "AcceptRanges": "bytes",
        "LastModified": modified,
        "ContentLength": meta.size,
        "ETag": f'"{meta.etag}"',
        "ContentType": meta.content_type or "binary/octet-stream",
        "Metadata": dict(meta.metadata),
    }
