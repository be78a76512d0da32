"""A folder that keeps ranges of objects, shared by all processes of a node, safe under SIGKILL.

An entry is named by what it is: store, key, ETag and range. It is written to a temporary file and
renamed, and holds its own length and CRC32C, so a torn or rotten one is never served. Entries are
evicted by their time of last use; whoever has written a sixteenth of the limit looks whether that is due.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import uuid
import warnings
from typing import Final, Literal, TypeAlias

from s3loader.checksum import crc32c
from s3loader.errors import CacheFullError, ConfigError
from s3loader.types import Buffer

__all__ = ["DiskCache", "OnFull"]

OnFull: TypeAlias = Literal["warn", "raise"]

_HEAD: Final = struct.Struct("<8sIQ")
_MAGIC: Final = b"s3lcach1"
_SUFFIX: Final = ".range"
_KEEP: Final = 0.9
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STALE: Final = 3600.0
"""Seconds after which a temporary file was left by a process that is gone."""


class DiskCache:
    """See the module.

    Args:
        folder: Made if it does not exist.
        max_bytes: Most bytes kept, within a sixteenth.
        on_full: What a disk that is full or failing does. ``"warn"``: one warning, then reading goes on without the cache.
            ``"raise"``: `put` raises.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str, max_bytes: int, *, on_full: OnFull = "warn") -> None:
        self.folder = os.path.abspath(folder)
        self.max_bytes = max_bytes
        self.on_full: OnFull = on_full
        self.hits = 0
        self.misses = 0
        self._off = False
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._lock_path = os.path.join(self.folder, ".lock")
            os.close(os.open(self._lock_path, os.O_CREAT | os.O_RDWR, 0o666))
        except OSError as error:
            raise ConfigError(
                f"the cache folder {folder!r} cannot be used: {error}", hint="give a folder that may be written to"
            ) from error
        self._unseen = max_bytes  # look at what others left before the first write

    def path(self, url: str, key: str, etag: str, start: int, end: int) -> str:
        """Where the entry for bytes ``[start, end)`` of this version of an object is kept."""
        text = "\0".join((url, key, etag, str(start), str(end)))
        name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        return os.path.join(self.folder, name[:2], name[2:] + _SUFFIX)

    def has(self, path: str) -> bool:
        """Whether there is an entry at `path`; unchecked, and it may be gone when it is read."""
        return os.path.exists(path)

    def takes(self, size: int) -> bool:
        """Whether `size` bytes would be kept at all."""
        return not self._off and _HEAD.size + size <= self.max_bytes

    def get(self, path: str) -> memoryview | None:
        """The bytes kept at `path`, checked, or None."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            self.misses += 1
            return None
        except OSError:
            # Unreadable is as good as absent: the store has it.
            self.misses += 1
            return None
        body = memoryview(data)[_HEAD.size :]
        if len(data) < _HEAD.size or _HEAD.unpack_from(data) != (_MAGIC, crc32c(body), len(body)):
            self.discard(path)
            self.misses += 1
            return None
        self.hits += 1
        with contextlib.suppress(OSError):
            os.utime(path)
        return body

    def put(self, path: str, data: Buffer) -> None:
        """Keep `data` at `path`.

        Raises:
            CacheFullError: the disk is full or fails, and that shall be an error.
        """
        if not self.takes(len(data)):
            return
        size = _HEAD.size + len(data)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self._make_room(size)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(_HEAD.pack(_MAGIC, crc32c(data), len(data)))
                file.write(data)
            os.replace(temporary, path)
        except OSError as error:
            self.discard(temporary)
            self._cannot_write(error, path, size)

    def _cannot_write(self, error: OSError, path: str, size: int) -> None:
        what = f"the disk of the cache {self.folder} {'is full' if error.errno in _FULL else 'fails'} ({error})"
        if self.on_full == "raise":
            raise CacheFullError(f"{what}: {size} bytes for {path} cannot be kept", path=path, bytes=size) from error
        self._off = True
        warnings.warn(f"{what}: reading goes on without it", RuntimeWarning, stacklevel=3)

    def discard(self, path: str) -> None:
        """Forget the entry."""
        with contextlib.suppress(OSError):
            os.remove(path)

    # -- eviction ----------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        self._unseen += size
        if self._unseen * 16 < self.max_bytes:
            return
        self._unseen = 0
        with open(self._lock_path, "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return  # another process is at it
            self._evict(size)

    def _evict(self, coming: int) -> None:
        entries, total = self._entries()
        if total + coming <= self.max_bytes:
            return
        for _, size, path in sorted(entries):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            total -= size
            if total + coming <= self.max_bytes * _KEEP:
                return

    def _entries(self) -> tuple[list[tuple[float, int, str]], int]:
        """((last use, bytes, path) of each entry, their bytes); temporary files left behind are removed."""
        entries, total, newest = [], 0, 0.0
        leftovers = []
        for folder in os.scandir(self.folder):
            if not folder.is_dir():  # locks and claims
                continue
            for item in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):
                    stat = item.stat()
                    newest = max(newest, stat.st_mtime)
                    if item.name.endswith(_SUFFIX):
                        entries.append((stat.st_mtime, stat.st_size, item.path))
                        total += stat.st_size
                    else:
                        leftovers.append((stat.st_mtime, item.path))
        for modified, path in leftovers:
            if modified < newest - _STALE:
                self.discard(path)
        return entries, total
