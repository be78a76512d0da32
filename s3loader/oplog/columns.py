"""One row of an op-log: warp's columns, and how they are written and read.

Tab-separated values with a header; quoted as CSV is where a field holds a tab, a quote or a line break. The first fifteen
columns are those of MinIO's warp, in its order; it ignores the further ones.
"""

from __future__ import annotations

import calendar
import csv
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any, Final

from s3loader.errors import FormatError
from s3loader.events import OpEvent

__all__ = ["COLUMNS", "OpRecord", "Slots", "columns_of", "encode_rows", "is_request", "parse_rows", "parse_time", "record_of"]

COLUMNS: Final = (
    "idx", "thread", "op", "client_id", "n_objects", "bytes", "endpoint", "file", "error", "start", "first_byte",
    "last_byte", "end", "duration_ns", "cat", "status", "attempt", "offset", "process",
)  # fmt: skip
"""Of the files written here. `status`, `attempt`, `offset` (of a read) and `process` (OS process id) are ours."""
_NAMES: Final = {"HEAD": "STAT"}
"""warp's name of an operation, where it is another one."""
_NO_REQUESTS: Final = ("RETRY", "WAIT", "RESUME")
_SCHEMES: Final = ("file", "memory", "gs", "az")
_MOST_SLOTS: Final = 1 << 16
"""warp reads `thread` as 16 bits."""


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One request, as an op-log tells of it. Times are nanoseconds since 1970-01-01 UTC."""

    op: str
    """``GET PUT STAT LIST DELETE COPY PUTPART MULTIPART``, or what another writer calls it."""
    file: str
    """``bucket/key`` (or what another writer wrote: s3dlio 0.4 leaves out the bucket)."""
    start: int
    end: int
    first_byte: int | None = None
    bytes: int = 0
    """Body bytes moved."""
    objects: int = 1
    error: str = ""
    """Empty: it succeeded."""
    endpoint: str = ""
    client_id: str = ""
    thread: int = 0
    """A slot of concurrency: two requests of one slot never overlap."""
    status: int | None = None
    attempt: int = 1
    offset: int | None = None
    process: int | None = None
    last_byte: int | None = None
    category: int = 0

    @property
    def url(self) -> str:
        """URL of the object; ``s3://`` unless the endpoint names another scheme."""
        scheme, separator, rest = self.endpoint.partition("://")
        if not separator or scheme not in _SCHEMES:
            bucket = rest if scheme == "s3" else ""
            return f"s3://{self.file}" if not bucket or self.file.startswith(f"{bucket}/") else f"s3://{bucket}/{self.file}"
        return f"{scheme}://{'/' if scheme == 'file' else ''}{self.file}"


def is_request(event: OpEvent) -> bool:
    """Whether an event tells of a request; others tell of waits between them."""
    return event.op not in _NO_REQUESTS


def record_of(event: OpEvent, anchor: int, client_id: str, process: int) -> OpRecord:
    """The row of an event.

    Args:
        event: Of this machine since it started.
        anchor: Nanoseconds since 1970 at which `time.perf_counter` was zero.
        client_id: Who asked.
        process: OS process id.
    """
    scheme, _, file = event.url.partition("://")
    start = anchor + int(event.start * 1e9)
    return OpRecord(
        _NAMES.get(event.op, event.op),
        file.lstrip("/") if scheme == "file" else file,
        start,
        max(start, anchor + int(event.end * 1e9)),
        None if event.first_byte is None else anchor + int(event.first_byte * 1e9),
        event.bytes,
        event.objects,
        " ".join(event.error.split()) if event.error else "",
        event.endpoint or (f"{scheme}://" if scheme != "s3" else f"s3://{file.partition('/')[0]}"),
        client_id,
        0,
        event.status,
        event.attempt,
        event.offset,
        process,
    )


class Slots:
    """Numbers of concurrency: the lowest one that is free when a request starts."""

    def __init__(self) -> None:
        self._busy: list[tuple[int, int]] = []
        self._free: list[int] = []
        self._made = 0

    def take(self, start: int, end: int) -> int:
        """A slot from `start` to `end`; asked in order of `start`."""
        while self._busy and self._busy[0][0] <= start:
            heappush(self._free, heappop(self._busy)[1])
        if self._free:
            slot = heappop(self._free)
        else:
            slot, self._made = self._made, self._made + 1
        heappush(self._busy, (end, slot))
        return slot % _MOST_SLOTS


def encode_rows(records: Iterable[OpRecord], first_index: int, slots: Slots) -> bytes:
    """Rows in the order given, which is that of their starts."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    count = first_index
    for r in records:
        writer.writerow(
            (
                count,
                slots.take(r.start, r.end),
                r.op,
                r.client_id,
                r.objects,
                r.bytes,
                r.endpoint,
                r.file,
                r.error,
                _time(r.start),
                "" if r.first_byte is None else _time(r.first_byte),
                "" if r.last_byte is None else _time(r.last_byte),
                _time(r.end),
                r.end - r.start,
                r.category,
                "" if r.status is None else r.status,
                r.attempt,
                "" if r.offset is None else r.offset,
                "" if r.process is None else r.process,
            )
        )
        count += 1
    try:
        return text.getvalue().encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair: no bytes are meant by it
        return text.getvalue().encode("utf-8", "backslashreplace")


def columns_of(line: str) -> list[str] | None:
    """The names in a header line; None: this is no header of an op-log."""
    names = line.rstrip("\r\n").split("\t")
    return names if {"op", "start", "end", "file"} <= set(names) else None


def parse_rows(lines: Iterable[str], where: str) -> Iterator[OpRecord]:
    """Rows below a header, in their order; comment lines (``#``) and blank ones are passed over.

    Reads what warp (13 to 15 columns) and s3dlio (13 columns, unquoted) write too: columns are found by name.

    Raises:
        FormatError: there is no header, or a row cannot be read.
    """
    header: Sequence[str] | None = None
    number = 0
    for fields in csv.reader(lines, delimiter="\t"):
        number += 1
        if not fields or fields[0].startswith("#"):
            continue
        if header is None:
            header = columns_of("\t".join(fields))
            if header is None:
                raise _no_log(where)
            continue
        if fields == list(header):  # files joined one behind the other
            continue
        if len(fields) < len(header):
            raise FormatError(f"row {number} has {len(fields)} columns, not {len(header)}", url=where)
        try:
            yield _read_row(dict(zip(header, fields, strict=False)))
        except ValueError as error:
            raise FormatError(f"row {number}: {error}", url=where) from error
    if header is None:
        raise _no_log(where)


def _no_log(where: str) -> FormatError:
    return FormatError("it has no header of an op-log", url=where, hint="warp, s3dlio and s3loader write such files")


def _read_row(row: Mapping[str, str]) -> OpRecord:
    start, end = parse_time(row["start"]), parse_time(row["end"])
    return OpRecord(
        row["op"].upper(),
        row["file"],
        start,
        end,
        _optional(parse_time, row.get("first_byte")),
        int(row.get("bytes") or 0),
        int(row.get("n_objects") or 1),
        row.get("error", ""),
        row.get("endpoint", ""),
        row.get("client_id", ""),
        int(row.get("thread") or 0),
        _optional(int, row.get("status")),
        int(row.get("attempt") or 1),
        _optional(int, row.get("offset")),
        _optional(int, row.get("process")),
        _optional(parse_time, row.get("last_byte")),
        int(row.get("cat") or 0),
    )


def _optional(read: Callable[[str], Any], text: str | None) -> Any:
    return read(text) if text else None


def _time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{_second(seconds)}.{rest:09d}Z"


@lru_cache(64)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def parse_time(text: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time with up to nine digits of a second and a zone.

    Raises:
        ValueError: it is none.
    """
    if len(text) < 20 or text[10] not in "Tt ":
        raise ValueError(f"no time: {text!r}")
    seconds = _parse_second(text[:19])
    rest = text[19:]
    digits = ""
    if rest.startswith("."):
        digits = rest[1:].rstrip("Zz")
        for sign in "+-":
            digits = digits.partition(sign)[0]
        rest = rest[1 + len(digits) :]
        if not digits.isdecimal():
            raise ValueError(f"no time: {text!r}")
    if rest not in ("Z", "z"):
        if len(rest) != 6 or rest[0] not in "+-" or rest[3] != ":":
            raise ValueError(f"a time without its zone: {text!r}")
        ahead = int(rest[1:3]) * 3600 + int(rest[4:]) * 60
        seconds -= ahead if rest[0] == "+" else -ahead
    return seconds * 1_000_000_000 + int(digits[:9].ljust(9, "0"))


@lru_cache(256)
def _parse_second(text: str) -> int:
    return calendar.timegm(time.strptime(text.replace(" ", "T").upper(), "%Y-%m-%dT%H:%M:%S"))
