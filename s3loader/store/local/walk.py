"""A folder as a flat, ordered stream of keys."""

from __future__ import annotations

import os
from collections.abc import Iterator

from s3loader.store.local.files import RESERVED, etag_of, is_regular
from s3loader.types import CommonPrefix, ObjectMeta

__all__ = ["walk"]


def walk(root: bytes, prefix: bytes, start_after: bytes, *, shallow: bool = False) -> Iterator[ObjectMeta | CommonPrefix]:
    """Files below `root` whose key starts with `prefix` and lies after `start_after`, by the bytes of the key.

    One folder's names are held at a time for each level; files are looked at as they are yielded.
    Folders without a file are as if they were not there.

    Args:
        shallow: Give the folders of the prefix's own level as `CommonPrefix` in place of what is in them.
    """
    base = prefix[: prefix.rfind(b"/") + 1]
    if any(name in (b"", b".", b"..") or name.startswith(RESERVED) for name in base.split(b"/")[:-1]):
        return  # no key starts so
    folder = os.path.join(root, base[:-1]) if base else root
    if base and os.path.realpath(folder) != folder:
        return  # links to folders are not followed in listings
    yield from _walk(root, folder, base, prefix, start_after, shallow)


def _walk(
    root: bytes, folder: bytes, base: bytes, prefix: bytes, start_after: bytes, shallow: bool
) -> Iterator[ObjectMeta | CommonPrefix]:
    for sort_key, entry in _entries(folder):
        key = base + sort_key
        if not key.startswith(prefix):
            continue
        if not sort_key.endswith(b"/"):
            if key > start_after and (meta := _look(root, entry, key)) is not None:
                yield meta
            continue
        if key < start_after and not start_after.startswith(key):
            continue  # all of it lies before
        below = _walk(root, entry.path, key, prefix, start_after, False)
        if not shallow:
            yield from below
        elif next(below, None) is not None:
            yield CommonPrefix(os.fsdecode(key))


def _entries(folder: bytes) -> list[tuple[bytes, os.DirEntry[bytes]]]:
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(RESERVED):
                    continue
                is_folder = entry.is_dir(follow_symlinks=False)
                found.append((entry.name + b"/" if is_folder else entry.name, entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found.sort(key=lambda pair: pair[0])
    return found


def _look(root: bytes, entry: os.DirEntry[bytes], key: bytes) -> ObjectMeta | None:
    try:
        if entry.is_symlink() and not os.path.realpath(entry.path).startswith(root.rstrip(b"/") + b"/"):
            return None
        status = entry.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not is_regular(status):
        return None
    return ObjectMeta(os.fsdecode(key), status.st_size, etag_of(status), status.st_mtime)
