"""Op-log files: rows in whole zstd frames, appended under a lock; read again, merged and sorted.

Every append is one frame of its own, written in one call by whichever process has rows: what a killed process leaves is a file
that every zstd tool reads to its last append.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import itertools
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from heapq import heappop, heappush
from operator import attrgetter
from typing import IO, Final

import zstandard

from s3loader.errors import FormatError, NoSpaceError, S3LoaderError, SourceNotFoundError, StoreError
from s3loader.oplog.columns import COLUMNS, OpRecord, Slots, encode_rows, parse_rows

__all__ = ["OpLogFile", "in_order", "merge_op_logs", "read_op_log", "write_op_log"]

_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_HEADER: Final = ("\t".join(COLUMNS) + "\n").encode()
_ROWS: Final = 4096
"""Of one piece of a sorted file."""
_CHUNK: Final = 1 << 20
_RESYNC: Final = 4 << 20
"""Bytes looked through for the next frame behind one that was cut off."""
_CUT: Final = bytes(1)
"""Stands between the pieces of contents where something was cut off; known by its identity."""
_log = logging.getLogger("s3loader.oplog")


class OpLogFile:
    """The end of an op-log that several processes write to.

    Args:
        path: Of the file; made with its header where it is not there.
        level: Of zstd.
        fresh: Replace what is there.
    """

    def __init__(self, path: str, level: int = 1, *, fresh: bool = False) -> None:
        self.path = path
        self._level = level
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if fresh else 0)
        with self._locked(flags) as descriptor:
            if os.fstat(descriptor).st_size:
                head = os.pread(descriptor, 4, 0)
                if head != _MAGIC:
                    raise FormatError("it is no op-log, and is left alone", url=path, hint="give the path of a new file")
            else:
                _write(descriptor, self._frame(_HEADER))

    def append(self, rows: bytes) -> int:
        """Append whole rows as one frame; returns the bytes it takes.

        Raises:
            OSError: it cannot be written; then nothing of it is left in the file.
        """
        frame = self._frame(rows)
        with self._locked(os.O_RDWR | os.O_APPEND) as descriptor:
            _write(descriptor, frame)
        return len(frame)

    def sort(self, comments: Iterable[str] = ()) -> None:
        """Put all rows in the order of their starts and number them, with `comments` as lines at the end.

        Other processes may go on appending: they wait meanwhile, and then append to the sorted file.
        """
        with self._locked(os.O_RDWR | os.O_APPEND):
            write_op_log(self.path, in_order(partial(read_op_log, self.path)), level=self._level, comments=comments)

    def _frame(self, data: bytes) -> bytes:
        return zstandard.ZstdCompressor(level=self._level, write_checksum=True).compress(data)

    @contextlib.contextmanager
    def _locked(self, flags: int) -> Iterator[int]:
        """The file open, and nobody else writing to it, nor putting a sorted one in its place."""
        while True:
            descriptor = os.open(self.path, flags, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                        yield descriptor
                        return
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the descriptor open
                os.close(descriptor)
            flags &= ~os.O_TRUNC


def _write(descriptor: int, data: bytes) -> None:
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def read_op_log(path: str) -> Iterator[OpRecord]:
    """The rows of an op-log, in the order of the file. What a killed writer has cut off is left out, with a warning in the log.

    Args:
        path: Of a file of s3loader, s3dlio or warp (zstd, or plain TSV); ``-`` is standard input.

    Raises:
        SourceNotFoundError: there is no such file.
        FormatError: it is no op-log, or a row cannot be read.
    """
    with _opened(path) as file:
        first = file.read(len(_MAGIC))
        if first[:1] == b"{":
            raise FormatError("it holds warp's aggregated numbers, no requests", url=path, hint="run warp with --full")
        pieces = _pieces(file, first)
        yield from parse_rows(_lines(_unpacked(pieces, path) if first == _MAGIC else pieces, path), path)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except FileNotFoundError as error:
            raise SourceNotFoundError("there is no such file", op="read", url=path, hint="check the path") from error
        except OSError as error:
            raise StoreError(error.strerror or str(error), op="read", url=path) from error
        yield file


def _pieces(file: IO[bytes], first: bytes) -> Iterator[bytes]:
    while first:
        yield first
        first = file.read(_CHUNK)


def _unpacked(pieces: Iterator[bytes], path: str) -> Iterator[bytes]:
    """The contents of frames one behind the other. A frame that was cut off ends where the next one begins."""
    frame, seen, given = zstandard.ZstdDecompressor().decompressobj(), b"", 0
    for data in pieces:
        while data:
            seen = (seen + data)[-_RESYNC:]
            try:
                contents = frame.decompress(data)
                if not frame.eof:
                    given += len(contents)
                    yield contents
                    break
                data = frame.unused_data
            except zstandard.ZstdError as error:
                end = seen.find(_MAGIC, len(_MAGIC))
                if end < 0:
                    raise FormatError(f"a part of it cannot be read: {error}", url=path) from error
                _log.warning("%s: a part that was cut off is left out", path)
                contents, data = zstandard.ZstdDecompressor().decompressobj().decompress(seen[:end])[given:], seen[end:]
                yield contents
                contents = _CUT
            yield contents
            frame, seen, given = zstandard.ZstdDecompressor().decompressobj(), b"", 0
    if seen:
        yield _CUT


def _lines(pieces: Iterable[bytes], path: str) -> Iterator[str]:
    """Whole lines; one without its end was cut off."""
    rest = b""
    for piece in pieces:
        if piece is _CUT:
            rest = b""
            continue
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield line.decode("utf-8", "surrogateescape") + "\n"
    if rest:
        _log.warning("%s: its last row was cut off and is left out", path)


def in_order(read: Callable[[], Iterator[OpRecord]]) -> Iterator[OpRecord]:
    """Rows in the order of their starts; `read` is called twice. Holds no more of them than lie between two that are out of
    order."""
    newest = late = 0
    for record in read():
        newest = max(newest, record.start)
        late = max(late, newest - record.start)
    waiting: list[tuple[int, int, OpRecord]] = []
    newest = 0
    for number, record in enumerate(read()):
        newest = max(newest, record.start)
        heappush(waiting, (record.start, number, record))
        while waiting[0][0] < newest - late:
            yield heappop(waiting)[2]
    while waiting:
        yield heappop(waiting)[2]


def merge_op_logs(sources: Iterable[str], target: str, *, level: int = 3) -> int:
    """Write the requests of several op-logs into one, in the order of their starts; returns how many they are.

    Also makes a whole file of one that a killed process has left. Clocks of different machines are taken as they are.

    Args:
        sources: Paths of op-logs.
        target: Of the new file; may be one of them.
        level: Of zstd.

    Raises:
        SourceNotFoundError: a file is not there.
        FormatError: one is no op-log.
        NoSpaceError: the disk is full.
    """
    paths = list(sources)

    def read() -> Iterator[OpRecord]:
        return heapq.merge(*(in_order(partial(read_op_log, path)) for path in paths), key=attrgetter("start"))

    return write_op_log(target, read(), level=level)


def write_op_log(target: str, records: Iterable[OpRecord], *, level: int = 3, comments: Iterable[str] = ()) -> int:
    """Write requests, sorted by their starts, as an op-log; returns how many. The file appears when it is whole.

    Args:
        target: Path of the file.
        records: Their `thread` is given anew: the lowest slot that is free.
        level: Of zstd.
        comments: Lines at its end, after ``# ``.

    Raises:
        NoSpaceError: the disk is full.
        StoreError: the file cannot be written.
    """
    folder = os.path.dirname(target) or "."
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=os.path.basename(target) + ".", suffix=".tmp", dir=folder)
    except OSError as error:
        raise StoreError(error.strerror or str(error), op="write", url=target) from error
    slots, count = Slots(), 0
    rows = iter(records)
    try:
        with (
            open(descriptor, "wb") as file,
            zstandard.ZstdCompressor(level=level, write_checksum=True).stream_writer(file) as out,
        ):
            out.write(_HEADER)
            while some := list(itertools.islice(rows, _ROWS)):
                out.write(encode_rows(some, count, slots))
                count += len(some)
            for comment in comments:
                out.write(f"# {' '.join(comment.split())}\n".encode())
        os.chmod(temporary, _mode_of(target))
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, S3LoaderError):
            kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
            raise kind(error.strerror or str(error), op="write", url=target) from error
        raise
    return count


def _mode_of(path: str) -> int:
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        return 0o644
