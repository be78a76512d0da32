"""Parts of multipart uploads on disk, for stores whose client has no upload ids."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from s3loader.checksum import file_crc32c_base64
from s3loader.errors import NoSpaceError, ObjectNotFoundError, StoreError
from s3loader.types import Buffer, PartResult

__all__ = ["Spool", "SpooledUpload"]

_CHUNK = 8 << 20


@dataclass(slots=True)
class SpooledUpload:
    """One upload that is not completed yet."""

    key: str
    content_type: str | None
    metadata: Mapping[str, str]
    attributes: Mapping[str, str]
    folder: str
    begun: float = field(default_factory=time.time)
    sizes: dict[int, int] = field(default_factory=dict)

    @property
    def about(self) -> tuple[str | None, Mapping[str, str], Mapping[str, str]]:
        """What describes the object."""
        return self.content_type, self.metadata, self.attributes


class Spool:
    """The open uploads of one store in this process. Safe for several threads."""

    def __init__(self) -> None:
        self._uploads: dict[str, SpooledUpload] = {}
        self._lock = threading.Lock()

    def create(
        self,
        key: str,
        content_type: str | None,
        metadata: Mapping[str, str] | None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin an upload; returns its id."""
        upload_id = uuid.uuid4().hex
        folder = tempfile.mkdtemp(prefix="s3loader-upload-")
        with self._lock:
            self._uploads[upload_id] = SpooledUpload(key, content_type, dict(metadata or {}), dict(attributes or {}), folder)
        return upload_id

    def _find(self, url: str, key: str, upload_id: str, op: str) -> SpooledUpload:
        upload = self._uploads.get(upload_id)
        if upload is None or upload.key != key:
            raise ObjectNotFoundError("no such multipart upload in this process", op=op, url=url, code="NoSuchUpload")
        return upload

    def add(self, url: str, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Keep part `number`, replacing an earlier one."""
        upload = self._find(url, key, upload_id, "upload part")
        path = os.path.join(upload.folder, str(number))
        try:
            with open(path + ".new", "wb") as file:
                file.write(data)
            os.replace(path + ".new", path)
        except OSError as error:
            text = f"the part cannot be kept in {upload.folder}: {error.strerror}"
            raise NoSpaceError(text, op="upload part", url=url, hint="set TMPDIR to a folder with room") from error
        size = len(memoryview(data).cast("B")) if len(data) else 0
        with self._lock:
            upload.sizes[number] = size
        return PartResult(number, f"{number}-{size}", size)

    def check(self, url: str, key: str, upload_id: str, parts: Sequence[PartResult]) -> tuple[SpooledUpload, int]:
        """The upload and the bytes its `parts` have together.

        Raises:
            StoreError: a part is missing, is not the one named, or out of order.
        """
        upload = self._find(url, key, upload_id, "complete upload")
        previous = 0
        for part in parts:
            if upload.sizes.get(part.number) != part.size or part.number <= previous:
                raise StoreError(f"part {part.number} is missing or out of order", op="complete upload", url=url)
            previous = part.number
        return upload, sum(part.size for part in parts)

    def read(self, upload_id: str, parts: Sequence[PartResult]) -> Iterator[bytes]:
        """The bytes of `parts`, in pieces."""
        folder = self._uploads[upload_id].folder
        for part in parts:
            with open(os.path.join(folder, str(part.number)), "rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk

    def drop(self, upload_id: str) -> None:
        """Forget an upload and its parts; one that is gone is no error."""
        with self._lock:
            upload = self._uploads.pop(upload_id, None)
        if upload is not None:
            shutil.rmtree(upload.folder, ignore_errors=True)

    def uploads(self, prefix: str) -> Iterator[tuple[str, str, float | None]]:
        """Open uploads as `Backend.list_multipart` gives them."""
        with self._lock:
            found = [(upload.key, upload_id, upload.begun) for upload_id, upload in self._uploads.items()]
        yield from sorted(entry for entry in found if entry[0].startswith(prefix))

    def parts(self, url: str, key: str, upload_id: str) -> list[PartResult]:
        """What an upload has, with the checksum of what is on disk."""
        upload = self._find(url, key, upload_id, "list parts")
        found = []
        for number, size in sorted(upload.sizes.items()):
            with open(os.path.join(upload.folder, str(number)), "rb") as file:
                found.append(PartResult(number, f"{number}-{size}", size, file_crc32c_base64(file)))
        return found

    def close(self) -> None:
        """Drop all."""
        for upload_id in list(self._uploads):
            self.drop(upload_id)
