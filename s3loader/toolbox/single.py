"""One object or bucket at a time."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from s3loader.arguments import checked
from s3loader.errors import ConfigError, FormatError
from s3loader.store import buckets
from s3loader.store.arguments import readable, writable
from s3loader.store.open import StoreKeywords
from s3loader.toolbox.stores import configured, object_at
from s3loader.types import Location, ObjectMeta, PutMode, PutResult

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "create_bucket",
    "delete_bucket",
    "described",
    "exists",
    "get",
    "get_into",
    "get_range",
    "list_buckets",
    "put",
    "put_bytes",
    "read_npz",
    "stat",
]


@checked
def get(url: Location, *, version_id: str | None = None, **place: Unpack[StoreKeywords]) -> bytes:
    """The whole object.

    Args:
        url: ``s3://bucket/key``, ``gs://``, ``az://``, ``memory://``, ``file://`` or a path.
        version_id: A version other than the newest.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        ObjectNotFoundError: there is no such object.
    """
    store, key = object_at(url, place)
    return store.get(key, version_id=version_id)


@checked
def get_range(url: Location, offset: int, length: int | None = None, **place: Unpack[StoreKeywords]) -> bytes:
    """Some bytes of an object.

    Args:
        url: As in `get`.
        offset: First byte; where negative, that many bytes before the end (all of the object, if it has fewer).
        length: How many; fewer come where the object ends before. None: up to its end.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        RangeError: `offset` lies beyond the object.
        ConfigError: a negative length.
    """
    if length is not None and length < 0:
        raise ConfigError(f"a length cannot be negative: {length}", hint="leave it out to read to the end")
    store, key = object_at(url, place)
    if offset >= 0:
        return store.get_range(key, offset, None if length is None else offset + length)
    data = store.get_range(key, offset)
    return data if length is None else data[: max(0, length)]


@checked
def get_into(url: Location, buffer: Any, offset: int = 0, **place: Unpack[StoreKeywords]) -> ObjectMeta:
    """Fill `buffer` with the object's bytes from `offset` on; nothing is allocated. Returns what the store says of the object.

    Args:
        url: As in `get`.
        buffer: Anything writable and contiguous with the buffer protocol; all of it is filled.
        offset: In bytes, from the object's beginning.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        RangeError: the object has fewer bytes there.
    """
    store, key = object_at(url, place)
    return store.read_into(key, offset, writable(buffer))


@checked
def put(
    url: Location,
    data: Any,
    *,
    mode: PutMode = "overwrite",
    content_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
    attributes: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    **place: Unpack[StoreKeywords],
) -> PutResult:
    """Write one object, atomically; large ones go in parts.

    Args:
        url: As in `get`.
        data: Bytes, anything with the buffer protocol, a `pathlib.Path`, or a binary file.
        mode: ``"overwrite"``, ``"create"`` (only if the key is free) or ``Update(etag)``.
        content_type: Of the object.
        metadata: Of the object.
        attributes: What else describes it: ``cache_control``, ``content_encoding``, ``storage_class``,
            ``server_side_encryption`` ..., as `ObjectStore.put` lists them.
        tags: Up to 10 tags of the object.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        ObjectExistsError, ObjectChangedError: the mode's condition did not hold.
        UnsupportedOperationError: the store cannot keep one of `attributes` or `tags`.
    """
    store, key = object_at(url, place)
    return store.put(key, data, mode=mode, content_type=content_type, metadata=metadata, attributes=attributes, tags=tags)


@checked
def put_bytes(
    url: Location,
    data: Any,
    *,
    mode: PutMode = "overwrite",
    content_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
    attributes: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    **place: Unpack[StoreKeywords],
) -> PutResult:
    """As `put`, of data in memory only: paths and files are refused."""
    described: dict[str, Any] = {"metadata": metadata, "attributes": attributes, "tags": tags}
    return put(url, readable(data), mode=mode, content_type=content_type, **described, **place)


@checked
def exists(url: Location, **place: Unpack[StoreKeywords]) -> bool:
    """Whether there is such an object (not: a folder of that name).

    Raises:
        BucketNotFoundError: there is no such bucket, where the store tells.
    """
    store, key = object_at(url, place)
    return store.exists(key)


@checked
def stat(url: Location, *, version_id: str | None = None, **place: Unpack[StoreKeywords]) -> dict[str, Any]:
    """What the store says of one object.

    Returns:
        In this order ``size`` (bytes), ``last_modified`` (``2025-07-16T22:53:33Z``), ``etag`` (without quotes),
        ``content_type``, ``content_language``, ``content_encoding``, ``cache_control``, ``content_disposition``, ``expires``,
        ``storage_class``, ``server_side_encryption``, ``ssekms_key_id``, ``sse_customer_algorithm``, ``version_id``,
        ``replication_status``, ``metadata`` (a dict); None where the store does not say.
    """
    store, key = object_at(url, place)
    return described(store.head(key, version_id=version_id))


def described(meta: ObjectMeta) -> dict[str, Any]:
    """What `stat` gives, of an object that was looked at."""
    told = meta.attributes.get
    when = None
    if meta.last_modified is not None:
        when = datetime.datetime.fromtimestamp(int(meta.last_modified), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "size": meta.size,
        "last_modified": when,
        "etag": meta.etag or None,
        "content_type": meta.content_type,
        "content_language": told("content_language"),
        "content_encoding": told("content_encoding"),
        "cache_control": told("cache_control"),
        "content_disposition": told("content_disposition"),
        "expires": told("expires"),
        "storage_class": told("storage_class"),
        "server_side_encryption": told("server_side_encryption"),
        "ssekms_key_id": told("ssekms_key_id"),
        "sse_customer_algorithm": told("sse_customer_algorithm"),
        "version_id": meta.version_id,
        "replication_status": told("replication_status"),
        "metadata": dict(meta.metadata),
    }


@checked
def read_npz(
    url: Location, name: str | None = None, **place: Unpack[StoreKeywords]
) -> np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]]:
    """The arrays of an ``.npz`` object (by name), or one of them; of an ``.npy`` object its one array. Never unpickles.

    Raises:
        FormatError: it is neither, has no array of that name, or one that only pickle could read.
    """
    import io
    import zipfile

    import numpy as np

    data = io.BytesIO(get(url, **place))
    try:
        found = np.load(data, allow_pickle=False)
        if isinstance(found, np.ndarray):
            if name is not None:
                raise FormatError(f"it is one array without names, not {name!r}", url=os.fspath(str(url)))
            return found
        with found:
            if name is None:
                return {each: found[each] for each in found.files}
            if name not in found.files:
                known = ", ".join(found.files) or "none"
                raise FormatError(f"there is no array {name!r} in it", url=str(url), hint=f"there are: {known}")
            array: np.ndarray[Any, Any] = found[name]
            return array
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"not an npz file of plain arrays: {error}", url=str(url), hint="write it with numpy.savez"
        ) from error


@checked
def create_bucket(url: Location, *, exist_ok: bool = True, **place: Unpack[StoreKeywords]) -> bool:
    """Make a bucket (a bare name is one of S3), or a local folder; whether it is new.

    Raises:
        ObjectExistsError: it is there and not `exist_ok`, or belongs to somebody else.
        UnsupportedOperationError: ``gs://`` and ``az://``.
    """
    return buckets.create_bucket(url, exist_ok=exist_ok, **configured(place))


@checked
def delete_bucket(url: Location, **place: Unpack[StoreKeywords]) -> None:
    """Delete an empty bucket or local folder.

    Raises:
        BucketNotFoundError: there is none.
        ConflictError: it is not empty; nothing was deleted.
        UnsupportedOperationError: ``gs://`` and ``az://``.
    """
    buckets.delete_bucket(url, **configured(place))


@checked
def list_buckets(url: Location = "s3://", **place: Unpack[StoreKeywords]) -> list[str]:
    """URLs of the buckets that the credentials own, sorted; of a local folder, the folders in it.

    Raises:
        UnsupportedOperationError: ``gs://`` and ``az://``.
    """
    return buckets.list_buckets(url, **configured(place))
