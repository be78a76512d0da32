"""Datasets from folders that MosaicML Streaming wrote: ``index.json`` and raw MDS shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Unpack

from s3loader.errors import AccessDeniedError, IntegrityError, ObjectNotFoundError, ShardReadError
from s3loader.loader.dataset import Dataset
from s3loader.loader.mds_format import Columns, MdsShard, check_size
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords, open_store
from s3loader.types import ObjectMeta

__all__ = ["from_mds", "holds_mds"]

_INDEX: Final = "index.json"
_VERSION: Final = 2


def from_mds(url: str, *, store: ObjectStore | None = None, **store_options: Unpack[StoreKeywords]) -> Dataset:
    """The dataset in a folder of raw MDS shards; a sample is a dict of its columns, and ``__key__``, its number as text.

    Integers, floats, texts, JSON and arrays come decoded (numpy scalars and arrays; ``int`` as a Python int); ``bytes``,
    ``jpeg``, ``png`` and encodings that are not known come as memoryviews, for `decode` by column name. The format has no
    checksums of samples, so only sizes, offsets and ETags are verified.

    Args:
        url: The folder with ``index.json``; with `store`, its prefix there.
        store: An open store. The folder is listed once, to pin sizes and ETags.
        store_options: For `open_store`.

    Raises:
        ObjectNotFoundError: ``index.json`` or a shard does not exist.
        ShardReadError: the index is not understood, shards are compressed, or a column is pickled.
        IntegrityError: a shard has another size than the index says.
    """
    store, prefix = _folder(url, store, store_options)
    where = f"{store.url}/{prefix}"
    described = _described(store.get(prefix + _INDEX), where + _INDEX)
    found = {meta.key: meta for meta in store.list(prefix) if isinstance(meta, ObjectMeta)} if described else {}
    shards: list[MdsShard] = []
    first = 0
    made: dict[str, Columns] = {}
    for number, entry in enumerate(described):
        try:
            shard = _shard(entry, prefix, first, found, made)
        except (ShardReadError, IntegrityError, ObjectNotFoundError) as error:
            error.op, error.url = "read", f"{where}{_basename(entry) or _INDEX}"
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"shard {number} is not described as an MDS shard: {type(error).__name__}: {error}"
            raise ShardReadError(text, op="read", url=where + _INDEX) from error
        shards.append(shard)
        first += shard.samples
    return Dataset(store, shards, name=url)


def holds_mds(url: str, *, store: ObjectStore | None = None, **store_options: Unpack[StoreKeywords]) -> bool:
    """Whether an ``index.json`` that describes MDS shards is, or stands in, the folder `url`. One GET."""
    given = store
    store, prefix = _folder(url, store, store_options)
    try:
        _, shards = _index(store.get(prefix + _INDEX))
    except (ObjectNotFoundError, AccessDeniedError, ValueError, KeyError, TypeError):
        return False  # where it may not be read, the samples will say so themselves
    finally:
        if given is None:
            store.close()
    return all(isinstance(entry, Mapping) and entry.get("format") == "mds" for entry in shards)


def _folder(url: str, store: ObjectStore | None, options: StoreKeywords) -> tuple[ObjectStore, str]:
    """(the store, the prefix in it) of the folder, or of its ``index.json``."""
    folder = (url[: -len(_INDEX)] if url.rsplit("/", 1)[-1] == _INDEX else url).rstrip("/")
    if store is None:
        return open_store(folder or ".", **options), ""
    return store, f"{folder}/" if folder else ""


def _index(data: bytes) -> tuple[Any, list[Mapping[str, Any]]]:
    index = json.loads(data)
    version, shards = index["version"], index["shards"]
    if not isinstance(shards, list):
        raise TypeError("shards is no list")
    return version, shards


def _described(data: bytes, url: str) -> list[Mapping[str, Any]]:
    try:
        version, shards = _index(data)
    except (ValueError, KeyError, TypeError) as error:
        raise ShardReadError(f"not the index of MDS shards: {type(error).__name__}: {error}", op="read", url=url) from error
    if version != _VERSION:
        raise ShardReadError(f"version {version!r} of the index is not known, only {_VERSION}", op="read", url=url)
    return shards


def _basename(entry: Any) -> str | None:
    raw = entry.get("raw_data") if isinstance(entry, Mapping) else None
    name = raw.get("basename") if isinstance(raw, Mapping) else None
    return name if isinstance(name, str) else None


def _shard(
    entry: Mapping[str, Any], prefix: str, first: int, found: Mapping[str, ObjectMeta], made: dict[str, Columns]
) -> MdsShard:
    if entry["format"] != "mds":
        raise ShardReadError(f"format {entry['format']!r} cannot be read, only 'mds'")
    if entry.get("compression") is not None or entry.get("zip_data") is not None:
        raise ShardReadError(
            f"the shard is compressed ({entry.get('compression')}), so no sample of it can be read alone",
            hint="write the dataset with MDSWriter(compression=None)",
        )
    described = (entry["column_names"], entry["column_encodings"], entry["column_sizes"])
    columns = made.setdefault(repr(described), Columns(*described))
    samples, size, key = entry["samples"], entry["raw_data"]["bytes"], prefix + entry["raw_data"]["basename"]
    if type(samples) is not int or type(size) is not int or samples < 0:
        raise ShardReadError("the index gives no number of samples or bytes")
    if key not in found:
        raise ObjectNotFoundError("the index names a shard that is not there")
    meta = found[key]
    shard = MdsShard(key, samples, meta.etag, size, None, first, columns)
    check_size(shard, meta.size)
    if size < shard.head_size:
        raise ShardReadError(f"{size} bytes cannot hold the offsets of {samples} samples")
    return shard
