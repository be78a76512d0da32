"""Streams over objects and members: files to Python, `StreamingBody` to code written for boto3."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from s3loader.errors import ClosedError
from s3loader.types import Buffer

__all__ = ["ArchiveMemberBody", "ObjectBody"]


class ObjectBody(io.RawIOBase):
    """A readable, forward-only binary stream over chunks of bytes.

    Has what botocore's ``StreamingBody`` has: `read`, `readinto`, `iter_chunks`, `iter_lines`, iteration
    over chunks of 1,024 bytes, context manager.

    Args:
        chunks: The bytes; an error they raise is raised by the read that needs them.
        size: Length in bytes, where known.
    """

    def __init__(self, chunks: Iterator[Buffer], *, size: int | None = None) -> None:
        super().__init__()
        self.size = size
        self._chunks = chunks
        self._rest = memoryview(b"")
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at

    def _next(self) -> bool:
        """Make `_rest` non-empty; False at the end."""
        self._check_open()
        while not len(self._rest):
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._rest = memoryview(chunk)
        return True

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("I/O operation on closed stream", op="read", hint="open the object again")

    def _take(self, size: int) -> memoryview:
        piece, self._rest = self._rest[:size], self._rest[size:]
        self._at += len(piece)
        return piece

    def read(self, amt: int | None = -1, /) -> bytes:
        """Exactly `amt` bytes, fewer only at the end; all that are left for None or -1."""
        self._check_open()
        if amt is not None and amt >= 0 and amt <= len(self._rest):
            return bytes(self._take(amt))
        pieces = []
        left = -1 if amt is None else amt
        while left and self._next():
            piece = self._take(left) if left > 0 else self._take(len(self._rest))
            left -= len(piece) if left > 0 else 0
            pieces.append(piece)
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def readall(self) -> bytes:
        """All that is left."""
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` with what is at hand, at least one byte; 0 at the end."""
        view = memoryview(buffer).cast("B")
        if not len(view) or not self._next():
            self._check_open()
            return 0
        piece = self._take(len(view))
        view[: len(piece)] = piece
        return len(piece)

    def iter_chunks(self, chunk_size: int = 1024) -> Iterator[bytes]:
        """The rest in pieces of `chunk_size` bytes."""
        while piece := self.read(chunk_size):
            yield piece

    def iter_lines(self, chunk_size: int = 8192, limit: int | None = None, keepends: bool = False) -> Iterator[bytes]:
        """The rest as lines, without their ends unless `keepends`; at most `limit` of them."""
        pending = b""
        given = 0
        for chunk in self.iter_chunks(chunk_size):
            lines = (pending + chunk).splitlines(True)
            pending = lines.pop() if lines else b""
            for line in lines:
                if given == limit:
                    return
                given += 1
                yield line if keepends else line.splitlines()[0]
        if pending and given != limit:
            yield pending if keepends else pending.splitlines()[0]

    def __iter__(self) -> Iterator[bytes]:  # botocore's contract, not io's lines
        return self.iter_chunks()

    def __next__(self) -> bytes:
        piece = self.read(1024)
        if not piece:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Drop what was not read; closing twice is fine."""
        if not self.closed:
            close = getattr(self._chunks, "close", None)
            if close is not None:
                close()
            self._rest = memoryview(b"")
        super().close()


class ArchiveMemberBody(ObjectBody):
    """The content of one member of an archive.

    Small members are verified against their CRC32C before the first byte is given; of large ones that are
    streamed the last read raises `IntegrityError` if it does not match.
    """
