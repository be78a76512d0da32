"""``file://``: objects as files of one folder, with an object store's guarantees.

Writes go to a temporary file beside the target, are synced and then renamed or linked, so a
reader, a full disk or a kill never meets half an object. Conditional updates look and replace
under a lock. See docs/design/002-local-store.md.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import parse_qsl

from s3loader import events
from s3loader.checksum import SEAL
from s3loader.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    RangeError,
    S3LoaderError,
    StoreError,
    TruncatedError,
    UnsupportedOperationError,
)
from s3loader.ranges import first_byte
from s3loader.store.arguments import check_crc32c, kept_here
from s3loader.store.backend import BulkBackend, key_bytes, roll_up
from s3loader.store.buffers import shared_pool
from s3loader.store.local import files as _files
from s3loader.store.local.files import Guard, TempFile, walk
from s3loader.store.local.uploads import Uploads
from s3loader.store.lost_reply import WRITE_ID
from s3loader.store.told import first_byte_came
from s3loader.types import (
    Buffer,
    CommonPrefix,
    DeleteFailure,
    ObjectMeta,
    ObjectURL,
    PartResult,
    PutMode,
    PutResult,
    Update,
)
from s3loader.units import KIB

__all__ = ["LocalBackend"]

_PLACE_TRIES: Final = 16
_POOLED: Final = 64 * KIB
"""Bytes from which fresh memory would cost more than reading into some that was used before."""


class LocalBackend:
    """The backend of one folder.

    Args:
        path: The folder; made at the first write where it is missing.
    """

    PUT_LIMIT: Final = sys.maxsize
    """Bytes up to which one put is the best way to write a buffer."""
    bulk: BulkBackend | None = None
    """Threads run its single verbs."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.url = ObjectURL("file", "", self.path).base
        self._root = os.path.realpath(os.fsencode(self.path))
        self._inside = self._root.rstrip(b"/") + b"/"
        self._uploads = Uploads(self._inside)

    def __reduce__(self) -> tuple[type[LocalBackend], tuple[str]]:
        return LocalBackend, (self.path,)

    @property
    def engine(self) -> str:
        """``direct``, ``obstore``, ``boto3``, ``file``, ``memory``; for events and `explain`."""
        return "file"

    # reading

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` (to the end of the object where `end` is None or beyond it)."""
        with Guard("get", f"{self.url}/{key}", self._root), _Open(self._open(key, version_id)) as fd:
            status = self._checked(fd, if_match)
            size = status.st_size
            start = first_byte(start, size)
            if start > size or (start == size and end is not None and end > start):
                raise RangeError(f"it has {size} bytes, asked for [{start}, {end})")
            data = _read(fd, start, max(0, (size if end is None else min(end, size)) - start))
            self._unchanged(fd, status)
            return self._meta(key, fd, status), data

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` (1-D, format ``B``, writable) with ``len(buffer)`` bytes from `start`."""
        with Guard("read", f"{self.url}/{key}", self._root), _Open(self._open(key)) as fd:
            status = self._checked(fd, if_match)
            stop = start + len(buffer)
            if stop > status.st_size:
                raise RangeError(f"it has {status.st_size} bytes, asked for [{start}, {stop})")
            _fill(fd, start, buffer)
            self._unchanged(fd, status)
            return self._meta(key, fd, status)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object, without its bytes."""
        with Guard("head", f"{self.url}/{key}", self._root), _Open(self._open(key, version_id)) as fd:
            return self._meta(key, fd, self._checked(fd, None))

    def _open(self, key: str, version_id: str | None = None) -> int:
        if version_id is not None:
            raise UnsupportedOperationError("a local store keeps no versions", hint="leave version_id out")
        path = self._inside + _files.relative_path(key)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in the folder must not hang us
        try:
            self._confine(os.readlink(b"/proc/self/fd/%d" % fd) if _HAS_PROC else os.path.realpath(path))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _confine(self, real: bytes) -> None:
        if not real.startswith(self._inside) and real != self._root:
            raise AccessDeniedError(f"a link leads out of {self.path}", hint="open a store on the folder the link points to")

    def _checked(self, fd: int, if_match: str | None) -> os.stat_result:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ObjectNotFoundError("no such object")
        if if_match is not None and _files.etag_of(status) != if_match:
            raise ObjectChangedError("its ETag is not the one asked for")
        return status

    def _unchanged(self, fd: int, before: os.stat_result) -> None:
        """Our own writers replace files; somebody else may write into one while it is read."""
        if _files.etag_of(os.fstat(fd)) != _files.etag_of(before):
            raise ObjectChangedError("it was written to while it was read")

    def _meta(self, key: str, fd: int, status: os.stat_result) -> ObjectMeta:
        kept = _files.read_attributes(fd)
        content_type, metadata, attributes = kept.get("content_type"), kept.get("metadata"), kept.get("attributes")
        return ObjectMeta(
            key,
            status.st_size,
            _files.etag_of(status),
            status.st_mtime,
            content_type if isinstance(content_type, str) else None,
            None,
            metadata if isinstance(metadata, dict) else {},
            {k: v for k, v in attributes.items() if k != "tagging"} if isinstance(attributes, dict) else {},
        )

    def tags(self, key: str, *, version_id: str | None = None) -> Mapping[str, str]:
        """Tags of the object, kept where metadata is."""
        with Guard("tags", f"{self.url}/{key}", self._root), _Open(self._open(key)) as fd:
            self._checked(fd, None)
            attributes = _files.read_attributes(fd).get("attributes")
            tagging = attributes.get("tagging") if isinstance(attributes, dict) else None
            return dict(parse_qsl(tagging, keep_blank_values=True)) if isinstance(tagging, str) else {}

    # writing

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> PutResult:
        """Write one object atomically: readers see the old one or the new one, whole.

        Raises:
            NoSpaceError: the disk or quota is full; the old object is untouched.
            UnsupportedOperationError: the key is a folder of other keys (or below an object), or
                `metadata` was given and the file system keeps none.
        """
        kept = _attributes(content_type, metadata, kept_here(attributes, f"{self.url}/{key}") if attributes else {})
        with Guard("put", f"{self.url}/{key}", self._root):
            return self._publish(key, lambda temp: temp.write(data), mode, kept)

    def put_with_checksum(self, key: str, data: Buffer, checksum: str) -> PutResult:
        """Put with a CRC32C (base64) that the store holds against the bytes; a wrong one is refused."""
        check_crc32c(data, checksum, f"{self.url}/{key}")
        return self.put(key, data)

    def _publish(
        self, key: str, write: Callable[[TempFile], None], mode: PutMode, attributes: Mapping[str, object]
    ) -> PutResult:
        path = self._inside + _files.relative_path(key)
        folder = os.path.dirname(path)
        self._confine(os.path.realpath(folder))
        if mode == "create" and os.path.lexists(path) and not os.path.isdir(path):
            raise ObjectExistsError("the key is taken")
        temp = self._temporary(folder)
        try:
            write(temp)
            status = temp.finish(attributes, must_keep=_holds_data(attributes))
            self._place(temp, path, mode)
        finally:
            temp.close()
        with contextlib.suppress(FileNotFoundError):  # deleted by somebody by now, folder and all
            _files.sync_folder(folder)
        return PutResult(key, _files.etag_of(status), status.st_size)

    def _temporary(self, folder: bytes) -> TempFile:
        for _ in range(_PLACE_TRIES):
            _files.make_parents(folder)
            with contextlib.suppress(FileNotFoundError):  # a delete pruned the empty folder just now
                return TempFile(folder)
        return TempFile(folder)

    def _place(self, temp: TempFile, path: bytes, mode: PutMode) -> None:
        for attempt in range(_PLACE_TRIES):
            try:
                with _files.locked(os.path.dirname(path), exclusive=isinstance(mode, Update)):
                    if mode == "create":
                        temp.link(path)
                        return
                    if isinstance(mode, Update):
                        self._expect(path, mode.etag)
                    temp.replace(path)
                    return
            except FileExistsError:
                if not os.path.isdir(path) or os.path.islink(path):
                    raise ObjectExistsError("the key is taken") from None
                self._remove_empty(path)
            except IsADirectoryError:
                self._remove_empty(path)
            except FileNotFoundError:
                if attempt == _PLACE_TRIES - 1:
                    raise
                _files.make_parents(os.path.dirname(path))
        raise StoreError("folders keep appearing and vanishing at its place")

    def _expect(self, path: bytes, etag: str) -> None:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectChangedError("there is no object to replace") from None
        if not stat.S_ISREG(status.st_mode) or _files.etag_of(status) != etag:
            raise ObjectChangedError("its ETag is not the one asked for")

    def _remove_empty(self, path: bytes) -> None:
        """Remove folders without a file in them; they are not objects and hide none."""
        for folder, _, _ in os.walk(path, topdown=False):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UnsupportedOperationError(
                    "there are objects below this key",
                    hint="a file system cannot hold both the object 'a' and the object 'a/b'",
                ) from error

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside this root, on the server's side where it can."""
        with Guard("copy", f"{self.url}/{source}", self._root), _Open(self._open(source)) as fd:
            status = self._checked(fd, None)

            def write(temp: TempFile) -> None:
                _files.copy_bytes(fd, temp.fd)
                self._unchanged(fd, status)

            with Guard("copy", f"{self.url}/{target}", self._root):
                return self._publish(target, write, mode, _files.read_attributes(fd))

    def delete(self, key: str) -> None:
        """Delete; a key that does not exist is no error. Folders left empty go too."""
        with Guard("delete", f"{self.url}/{key}", self._root):
            path = self._inside + _files.relative_path(key)
            folder = os.path.dirname(path)
            self._confine(os.path.realpath(folder))
            try:
                with _files.locked(folder, exclusive=False):
                    os.unlink(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return
            except PermissionError:
                if os.path.isdir(path):  # what macOS answers for a folder
                    return
                raise
            with contextlib.suppress(OSError):
                while folder != self._root:
                    os.rmdir(folder)
                    folder = os.path.dirname(folder)
            with contextlib.suppress(FileNotFoundError):
                _files.sync_folder(folder)

    def delete_many(self, keys: Sequence[str]) -> builtins.list[DeleteFailure]:
        """Delete all; never raises for a single key, returns what failed."""
        failures = []
        for key in keys:
            try:
                self.delete(key)
            except S3LoaderError as error:
                failures.append(DeleteFailure(key, error))
        return failures

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries whose key starts with `prefix`, in order of the UTF-8 bytes of their keys. Links to files inside the folder
        are listed, other links are not."""
        with Guard("list", f"{self.url}/{prefix}", self._root):
            if delimiter == "/":
                yield from walk(self._root, key_bytes(prefix), key_bytes(start_after), shallow=True)
                return
            entries = walk(self._root, key_bytes(prefix), key_bytes(start_after))
            yield from roll_up((e for e in entries if isinstance(e, ObjectMeta)), prefix, delimiter, start_after)

    # multipart: see _uploads

    def create_multipart(
        self,
        key: str,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin a multipart upload; returns its upload id."""
        with Guard("create upload", f"{self.url}/{key}", self._root):
            _files.relative_path(key)
            said = kept_here(attributes, f"{self.url}/{key}")
            return self._uploads.create(key, _attributes(content_type, metadata, said))

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload part `number` (1-based; all parts but the last at least 5 MiB on S3)."""
        with Guard("upload part", f"{self.url}/{key}", self._root):
            return self._uploads.add_part(key, upload_id, number, data)

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """Make the object from its parts."""
        with Guard("complete upload", f"{self.url}/{key}", self._root):
            attributes = self._uploads.attributes(key, upload_id)
            result = self._publish(key, lambda temp: self._uploads.join(temp, upload_id, parts), mode, attributes)
            self._uploads.drop(key, upload_id)
            return result

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the parts; an upload that is gone is no error."""
        with Guard("abort upload", f"{self.url}/{key}", self._root):
            self._uploads.drop(key, upload_id)

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """Open multipart uploads: ``(key, upload_id, initiated seconds since the epoch)``."""
        with Guard("list uploads", f"{self.url}/{prefix}", self._root):
            return iter(self._uploads.open_ones(prefix))

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """Parts that an open upload has, by number, as `complete_multipart` takes them; the checksums are of what is on
        disk."""
        with Guard("list parts", f"{self.url}/{key}", self._root):
            return iter(self._uploads.parts(key, upload_id))

    def close(self) -> None:
        """Nothing is kept open."""


_HAS_PROC: Final = os.path.isdir("/proc/self/fd")


def _attributes(
    content_type: str | None, metadata: Mapping[str, str] | None, attributes: Mapping[str, str]
) -> dict[str, object]:
    kept: dict[str, object] = {"attributes": dict(attributes)} if attributes else {}
    if content_type is not None:
        kept["content_type"] = content_type
    if metadata:
        kept["metadata"] = {name.lower(): value for name, value in metadata.items()}
    return kept


def _holds_data(attributes: Mapping[str, object]) -> bool:
    """Whether losing them would lose something of the caller's (a write id and a seal are ours, and can be done without)."""
    metadata = attributes.get("metadata")
    return "attributes" in attributes or (isinstance(metadata, dict) and bool(metadata.keys() - {WRITE_ID, SEAL}))


class _Open:
    """Closes a descriptor at the end of a with block; cheaper than `contextlib` makes it."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *about: object) -> None:
        os.close(self.fd)


def _read(fd: int, start: int, length: int) -> Buffer:
    if length < _POOLED:
        data = os.pread(fd, length, start)
        if len(data) == length:
            if events.active() and length:
                first_byte_came()
            return data
    view = shared_pool().lease(length)[:length]
    _fill(fd, start, view)
    return view


def _fill(fd: int, start: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], start + done)
        if not got:
            raise TruncatedError(f"it ended at byte {start + done} while it was read")
        if not done and events.active():
            first_byte_came()
        done += got
