"""From a URL to an open store and a key: stores of S3, GCS and Azure are opened once per process and kept."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Hashable, Mapping
from typing import Any, Final, Unpack, cast

from s3loader.arguments import checked
from s3loader.errors import ConfigError
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords, open_store
from s3loader.types import Location, ObjectURL

__all__ = ["close", "configure", "configured", "names_folder", "object_at", "root_of", "split_object", "url_in"]

_SEEN: Final = ("AWS_", "S3_", "GOOGLE_", "AZURE_", "HTTP", "ALL_PROXY", "NO_PROXY", "http", "all_proxy", "no_proxy")
"""Beginnings of the environment variables that decide where a store is and who asks."""

_MOST: Final = 64
"""Stores that are kept open; what was not used for longest is closed for another one, unless it is in use."""


class _Kept:
    """An open store, and how many references to it and its backend there are while nobody uses it."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._alone = 0, 0

    def begin(self) -> None:
        """Note the references that are there when nobody uses it yet."""
        self._alone = self._references()

    def in_use(self) -> bool:
        """Whether a call, a writer or an iterator holds it: they end, and what holds none can be closed."""
        now = self._references()
        return now[0] > self._alone[0] or now[1] > self._alone[1]

    def _references(self) -> tuple[int, int]:
        return sys.getrefcount(self.store), sys.getrefcount(self.store._backend)


_stores: dict[Hashable, _Kept] = {}
"""In the order of their last use."""
_defaults: StoreKeywords = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


@checked
def configure(**place: Unpack[StoreKeywords]) -> None:
    """Set keywords of `open_store` for all functions of this process that are not given them; None takes one back."""
    global _defaults
    with _lock:
        changed: dict[str, Any] = {**_defaults, **place}
        _defaults = cast("StoreKeywords", {name: value for name, value in changed.items() if value is not None})


def configured(place: Mapping[str, Any]) -> StoreKeywords:
    """`place` over what `configure` was told."""
    return cast("StoreKeywords", {**_defaults, **{name: value for name, value in place.items() if value is not None}})


def close() -> None:
    """Let go of all connections that the functions have kept; the next call opens them anew."""
    with _lock:
        kept = [*_stores.values()]
        _stores.clear()
    for each in kept:
        each.store.close()


def root_of(url: ObjectURL, place: Mapping[str, Any]) -> ObjectStore:
    """The store of the bucket (or folder) that `url` names.

    The last 64 are kept open, each for its keywords and what the ``.env`` file and the environment say of stores.
    """
    given = configured(place)
    if url.scheme in ("file", "memory"):
        return open_store(url if url.scheme == "file" else ObjectURL("memory", url.bucket, ""), **given)
    bucket = ObjectURL(url.scheme, url.bucket, "")
    known = (bucket, _fingerprint(), tuple(sorted((name, _identity(name, value)) for name, value in given.items())))
    with _lock:
        kept = _stores.pop(known, None)
        if kept is None:
            kept = _Kept(open_store(bucket, **given))
            kept.begin()
        _stores[known] = kept
        store = kept.store
        left = _fallen_out() if len(_stores) > _MOST else []
    for each in left:
        each.store.close()
    return store


def _fallen_out() -> list[_Kept]:
    """Those that were not used for longest and are not in use, as many as are too many."""
    idle = [known for known, kept in _stores.items() if not kept.in_use()]
    return [_stores.pop(known) for known in idle[: len(_stores) - _MOST]]


def _fingerprint() -> Hashable:
    """What `open_store` would look at: read each time, which costs little beside a request."""
    seen = tuple(item for item in os.environ.items() if item[0].startswith(_SEEN))
    try:
        status = os.stat(".env")
    except OSError:
        return seen
    return seen, status.st_ino, status.st_mtime_ns, status.st_size


def _identity(name: str, value: Any) -> int:
    return id(value) if name == "s3_client" else hash(value)  # the store keeps the client, so its id stays its own


def object_at(url: Location, place: Mapping[str, Any]) -> tuple[ObjectStore, str]:
    """The store and key of one object. Raises as `split_object`."""
    root, key = split_object(url)
    return root_of(root, place), key


def split_object(url: Location) -> tuple[ObjectURL, str]:
    """The bucket, or local folder, of one object, and its key there.

    Raises:
        ConfigError: the URL names a bucket or folder.
    """
    where = ObjectURL.parse(url)
    if where.scheme == "file":
        folder, name = where.split()
        if name and not names_folder(url, look=False):
            return folder, name
    elif where.key and (where.bucket or where.scheme == "memory"):
        return ObjectURL(where.scheme, where.bucket, ""), where.key
    raise ConfigError(f"{where} names no object", hint="write the object's key behind the bucket or folder")


def names_folder(url: Location, *, look: bool = True) -> bool:
    """Whether `url` is a bucket, ends with a slash, or (if we may look) is a local folder."""
    where = ObjectURL.parse(url)
    text = where.key if isinstance(url, ObjectURL) else os.fspath(url)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if where.scheme != "file":
        return not where.key or where.key.endswith("/")
    return text.endswith("/") or (look and os.path.isdir(where.key))


def url_in(folder: ObjectURL, key: str) -> str:
    """URL of what has `key` in the store that `folder` was opened with: a bucket, or a local folder."""
    if folder.scheme == "file":
        return str(folder.joined(key))
    return f"{folder.scheme}://{folder.bucket}/{key}"
