"""What the local store needs of the file system: safe names, atomic placing, locks, attributes, error mapping, and a
folder as a flat, ordered stream of keys."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Final

from s3loader.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigError,
    NoSpaceError,
    ObjectNotFoundError,
    S3LoaderError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    UnsupportedOperationError,
)
from s3loader.types import CommonPrefix, ObjectMeta

__all__ = [
    "RESERVED",
    "Guard",
    "TempFile",
    "copy_bytes",
    "etag_of",
    "locked",
    "make_parents",
    "read_attributes",
    "relative_path",
    "walk",
]

RESERVED: Final = b".s3loader-"
"""Names that start so are ours: never listed, never a key."""
_ATTRIBUTE: Final = "user.s3loader"
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)
_TRANSIENT: Final = (errno.EIO, errno.ESTALE, errno.EBUSY, errno.EAGAIN, errno.EREMOTEIO)
_UNSUPPORTED: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EISDIR)


def relative_path(key: str) -> bytes:
    """The path of `key` below the root.

    Raises:
        ConfigError: the key is no plain relative path, or one of ours.
    """
    hint = "keys of a local store are relative paths without '.', '..' and empty names"
    try:
        path = os.fsencode(key)
    except UnicodeEncodeError as error:
        raise ConfigError(f"not a key: {key!r}", hint="it has characters that no file name can have") from error
    for name in path.split(b"/"):
        if name in (b"", b".", b"..") or b"\0" in name:
            raise ConfigError(f"not a key of a local store: {key!r}", hint=hint)
        if name.startswith(RESERVED):
            raise ConfigError(f"not a key: {key!r}", hint=f"names that start with {RESERVED.decode()} are kept for s3loader")
        if len(name) > 255:
            raise ConfigError(
                f"a name in the key is longer than 255 bytes: {key!r}",
                hint="a local file system has no longer names: shorten the parts of the key between slashes",
            )
    return path


def etag_of(status: os.stat_result) -> str:
    """Changes with each replacement: `TempFile` gives every file a time of its own."""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


class Guard:
    """``with Guard(op, url, root):`` turns an `OSError` inside into one of the tree."""

    __slots__ = ("op", "root", "url")

    def __init__(self, op: str, url: str, root: bytes) -> None:
        self.op = op
        self.url = url
        self.root = root

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, S3LoaderError):
            error.op, error.url = error.op or self.op, error.url or self.url
        elif isinstance(error, OSError):
            raise self.translate(error) from error

    def translate(self, error: OSError) -> StoreError:
        """The typed error for `error`."""
        why = error.strerror or str(error)
        code = errno.errorcode.get(error.errno or 0)
        kind: type[StoreError] = StoreError
        hint = None
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            kind, why = ObjectNotFoundError, "no such object"
            if not os.path.isdir(self.root):
                kind, why, hint = BucketNotFoundError, f"there is no folder {os.fsdecode(self.root)}", "check the path"
        elif error.errno in _NO_SPACE:
            kind, hint = NoSpaceError, "free some space; what was stored before is intact"
        elif error.errno in _DENIED:
            kind, hint = AccessDeniedError, "check owner and mode of the file and its folders"
        elif error.errno == errno.ETIMEDOUT:
            kind = StoreTimeoutError
        elif error.errno in _TRANSIENT:
            kind = UnavailableError
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "raise the limit of open files (ulimit -n)"
        elif error.errno == errno.ENAMETOOLONG:
            hint = "the path is too long for this file system"
        return kind(why, op=self.op, url=self.url, code=code, hint=hint)


def make_parents(folder: bytes) -> None:
    """Create `folder` and what is missing above it, each made durable in its parent."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise UnsupportedOperationError(
                f"{os.fsdecode(os.path.basename(folder))!r} is an object",
                hint="a file system cannot hold both the object 'a' and the object 'a/b'",
            ) from None
        return
    except NotADirectoryError:
        make_parents(os.path.dirname(folder))  # says which
        raise
    except FileNotFoundError:
        make_parents(os.path.dirname(folder))
        make_parents(folder)
        return
    sync_folder(os.path.dirname(folder))


def sync_folder(folder: bytes) -> None:
    """Make the entries of `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(folder: bytes, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock of `folder`: shared to place or remove a file, exclusive to look and then place.

    The lock is a `flock` on the folder itself, so stores opened at different depths share it;
    where that is refused (NFS wants a writable file) on a hidden file inside. A file system
    without locks is no obstacle to shared use.
    """
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, kind)
        except OSError:
            os.close(fd)
            fd = os.open(os.path.join(folder, RESERVED + b"lock"), os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(fd, kind)
            except OSError as error:
                if exclusive:
                    raise UnsupportedOperationError(
                        "this file system has no locks", hint="conditional updates need flock; use another folder"
                    ) from error
        try:
            if not os.path.samestat(os.stat(folder), os.fstat(fd)) and stat.S_ISDIR(os.fstat(fd).st_mode):
                raise FileNotFoundError(errno.ENOENT, "the folder was replaced", os.fsdecode(folder))
            yield
        finally:
            # Explicitly: a child forked meanwhile holds a copy of the descriptor, and with it the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


class TempFile:
    """A file being written beside its target. Nameless where the system can (a killed writer then
    leaves nothing behind), else under a hidden name."""

    def __init__(self, folder: bytes) -> None:
        self.folder = folder
        self.name: bytes | None = None
        self.fd = -1
        if hasattr(os, "O_TMPFILE") and os.path.isdir(b"/proc/self/fd"):
            try:
                self.fd = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        if self.fd < 0:
            self.name = self._new_name()
            self.fd = os.open(self.name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)

    def _new_name(self) -> bytes:
        return os.path.join(self.folder, RESERVED + b"tmp-" + os.urandom(8).hex().encode())

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def finish(self, attributes: Mapping[str, object], *, must_keep: bool) -> os.stat_result:
        """Attach `attributes`, make the content durable; returns its final status.

        Raises:
            UnsupportedOperationError: `must_keep`, and the file system keeps no attributes.
        """
        if attributes:
            try:
                write_attributes(self.fd, attributes)
            except UnsupportedOperationError:
                if must_keep:
                    raise
        self.stamp()
        os.fsync(self.fd)
        return os.fstat(self.fd)

    def stamp(self) -> None:
        """Give it a time of its own: the kernel's stamp is coarse, two replacements could share it."""
        now = time.time_ns()
        os.utime(self.fd, ns=(now, now))

    def link(self, target: bytes) -> None:
        """Give the file the name `target`.

        Raises:
            FileExistsError: the name is taken.
        """
        if self.name is not None:
            os.link(self.name, target)
            return
        # src_dir_fd makes CPython call linkat, which follows the link in /proc
        os.link(b"/proc/self/fd/%d" % self.fd, target, src_dir_fd=self.fd, follow_symlinks=True)

    def replace(self, target: bytes) -> None:
        """Give the file the name `target`, in place of what had it."""
        if self.name is None:
            name = self._new_name()
            self.link(name)
            self.name = name
        os.replace(self.name, target)
        self.name = None

    def close(self) -> None:
        """Let go; what was not placed is gone."""
        if self.name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.name)
            self.name = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def write_attributes(fd: int, attributes: Mapping[str, object]) -> None:
    """Keep `attributes` with the file.

    Raises:
        UnsupportedOperationError: the file system has no extended attributes, or too small ones.
    """
    try:
        os.setxattr(fd, _ATTRIBUTE, json.dumps(attributes, separators=(",", ":")).encode())
    except (OSError, AttributeError) as error:
        raise UnsupportedOperationError(
            "this file system cannot keep metadata with a file", hint="leave out metadata, or use another folder"
        ) from error


def read_attributes(fd: int) -> dict[str, object]:
    """What `write_attributes` kept; empty where there is nothing."""
    try:
        found = json.loads(os.getxattr(fd, _ATTRIBUTE))
    except (OSError, AttributeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def copy_bytes(source: int, target: int) -> int:
    """Append all of file `source` to `target`, in the kernel where it can; returns the count."""
    size = os.fstat(source).st_size
    done = 0
    try:
        while done < size and (moved := os.copy_file_range(source, target, size - done, offset_src=done)):
            done += moved
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise
    while chunk := os.pread(source, 1 << 20, done):
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
        done += len(chunk)
    return done


def is_regular(status: os.stat_result) -> bool:
    """Whether it is a plain file."""
    return stat.S_ISREG(status.st_mode)


# -- a folder as a flat, ordered stream of keys ----------------------------------------------------


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
