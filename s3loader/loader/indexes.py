"""Indexes of shards that came without one: made on first use, kept beside the shard or, where that is not allowed, locally."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from s3loader.errors import AccessDeniedError, ObjectNotFoundError, S3LoaderError, ShardReadError, UnsupportedOperationError
from s3loader.shard.build import build_index, index_archive
from s3loader.shard.index import ShardIndex, load_index
from s3loader.store.objectstore import ObjectStore

__all__ = ["find_index", "make_indexes"]

_WORKERS: Final = 4


def _local_path(store: ObjectStore, key: str, index_dir: str | None) -> str:
    if index_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        index_dir = os.path.join(base, "s3loader", "indexes")
    name = hashlib.sha256(f"{store.url}/{key}".encode("utf-8", "surrogateescape")).hexdigest()
    return os.path.join(index_dir, f"{name}.idx")


def find_index(store: ObjectStore, key: str, index_dir: str | None) -> ShardIndex:
    """The index of the archive `key`, beside it or kept locally.

    Raises:
        ObjectNotFoundError: there is none.
        ShardReadError: it is corrupt.
    """
    try:
        return load_index(store, key)
    except (ObjectNotFoundError, ShardReadError):
        path = _local_path(store, key, index_dir)
        if not os.path.exists(path):
            raise
    with open(path, "rb") as file:
        return ShardIndex.from_bytes(file.read())


def make_indexes(store: ObjectStore, keys: Sequence[str], index_dir: str | None) -> None:
    """Read the archives once and keep their indexes; what is there already is left alone.

    Raises:
        ObjectNotFoundError: there is no such archive.
        ShardReadError: an archive is damaged.
    """
    keys = [key for key in dict.fromkeys(keys) if not os.path.exists(_local_path(store, key, index_dir))]
    if not keys:
        return
    results = build_index(keys, store=store, workers=_WORKERS, errors="return")
    denied = []
    for key, result in zip(keys, results, strict=True):
        if isinstance(result.error, (AccessDeniedError, UnsupportedOperationError)):
            denied.append(key)
        elif result.error is not None:
            raise result.error
    if denied:
        with ThreadPoolExecutor(_WORKERS, "s3loader-index") as pool:
            for _ in pool.map(lambda key: _keep_locally(store, key, index_dir), denied):
                pass


def _keep_locally(store: ObjectStore, key: str, index_dir: str | None) -> None:
    data = index_archive(store, key).to_bytes()
    path = _local_path(store, key, index_dir)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        raise S3LoaderError(
            f"the index of {key} can be kept neither beside it nor in {os.path.dirname(path)}: {error}",
            hint="give index_dir= a folder that may be written to",
        ) from error
