"""Multipart uploads of the local store: parts are files of a hidden folder, joined at completion."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from s3loader.checksum import file_crc32c_base64
from s3loader.errors import ConfigError, ObjectNotFoundError, StoreError
from s3loader.store.local import files as _files
from s3loader.store.local.files import RESERVED, TempFile
from s3loader.types import Buffer, PartResult

__all__ = ["Uploads"]

_ABOUT: Final = b"upload.json"


class Uploads:
    """The open uploads of one root, known to all processes that use it.

    Args:
        inside: Path of the root with a slash at its end.
    """

    def __init__(self, inside: bytes) -> None:
        self._all = inside + RESERVED + b"uploads"

    def create(self, key: str, attributes: Mapping[str, object]) -> str:
        """A new upload; returns its id."""
        upload_id = os.urandom(16).hex()
        folder = self._folder(upload_id)
        _files.make_parents(folder)
        about = {"key": key, "initiated": time.time(), "attributes": attributes}
        with open(os.path.join(folder, _ABOUT), "w") as file:
            json.dump(about, file)
        return upload_id

    def _folder(self, upload_id: str) -> bytes:
        if len(upload_id) != 32 or not set(upload_id) <= set("0123456789abcdef"):
            raise _no_upload()
        return os.path.join(self._all, upload_id.encode())

    def attributes(self, key: str, upload_id: str) -> dict[str, object]:
        """What the upload was created with.

        Raises:
            ObjectNotFoundError: there is no such upload of `key`.
        """
        try:
            about = _read_about(self._folder(upload_id))
        except FileNotFoundError:
            raise _no_upload() from None
        if about["key"] != key:
            raise _no_upload()
        attributes: dict[str, object] = about["attributes"]
        return attributes

    def add_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Store one part, in place of one that has its number."""
        if number < 1:
            raise ConfigError(f"parts are numbered from 1 up, not {number}", hint="number parts 1, 2, 3, ...")
        self.attributes(key, upload_id)
        folder = self._folder(upload_id)
        temp = TempFile(folder)
        try:
            temp.write(data)
            temp.stamp()
            temp.replace(_part_path(folder, number))
            status = os.fstat(temp.fd)
        finally:
            temp.close()
        return PartResult(number, _files.etag_of(status), status.st_size)

    def parts(self, key: str, upload_id: str) -> list[PartResult]:
        """What an upload has.

        Raises:
            ObjectNotFoundError: there is no such upload of `key`.
        """
        self.attributes(key, upload_id)
        folder = self._folder(upload_id)
        try:
            names = sorted(name for name in os.listdir(folder) if name.isdigit())
            found = []
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    status = os.fstat(file.fileno())
                    found.append(PartResult(int(name), _files.etag_of(status), status.st_size, file_crc32c_base64(file)))
        except FileNotFoundError:
            raise _no_upload() from None
        return found

    def join(self, target: TempFile, upload_id: str, parts: Sequence[PartResult]) -> None:
        """Append the parts to `target`; they stay until `drop`, so that it may be tried again.

        Raises:
            StoreError: a part is missing, not the one that was uploaded, or out of order.
        """
        last = 0
        for part in parts:
            try:
                fd = os.open(_part_path(self._folder(upload_id), part.number), os.O_RDONLY)
            except FileNotFoundError:
                raise StoreError(f"part {part.number} was not uploaded", code="InvalidPart") from None
            try:
                if part.number <= last or _files.etag_of(os.fstat(fd)) != part.etag:
                    raise StoreError(f"part {part.number} is another one, or out of order", code="InvalidPart")
                _files.copy_bytes(fd, target.fd)
            finally:
                os.close(fd)
            last = part.number

    def drop(self, key: str, upload_id: str) -> None:
        """Forget the upload and its parts; one that is gone is no error."""
        with contextlib.suppress(ObjectNotFoundError):
            self.attributes(key, upload_id)
            shutil.rmtree(self._folder(upload_id), ignore_errors=True)
            with contextlib.suppress(OSError):  # others are open
                os.rmdir(self._all)

    def open_ones(self, prefix: str) -> list[tuple[str, str, float | None]]:
        """Key, id and time of creation of each upload of a key that starts with `prefix`."""
        found: list[tuple[str, str, float | None]] = []
        try:
            names = os.listdir(self._all)
        except FileNotFoundError:
            return found
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it ended just now
                about = _read_about(os.path.join(self._all, name))
                if about["key"].startswith(prefix):
                    found.append((about["key"], name.decode(), about["initiated"]))
        return sorted(found)


def _part_path(folder: bytes, number: int) -> bytes:
    return os.path.join(folder, b"%05d" % number)


def _read_about(folder: bytes) -> dict[str, Any]:
    with open(os.path.join(folder, _ABOUT)) as file:
        try:
            about: dict[str, Any] = json.load(file)
        except ValueError:  # its creator died at it
            return {"key": "", "initiated": None, "attributes": {}}
    return about


def _no_upload() -> ObjectNotFoundError:
    hint = "it was completed or aborted meanwhile"
    return ObjectNotFoundError("there is no such multipart upload", code="NoSuchUpload", hint=hint)
