"""Tar headers, written and read: pure, no I/O.

Written: POSIX ustar headers with the values s3exchange and `tarfile.TarInfo` use (mode 0644, owner
and time 0), a PAX header before a name that is not ASCII or longer than 100 bytes, and before a member
of 8 GiB or more. Read: those, GNU long names, base-256 numbers, old V7 headers, global PAX headers,
several archives one after another. Sparse and multi-volume members are refused.

Sources: POSIX.1-2001 pax interchange format; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from s3loader.errors import ConfigError, ShardReadError
from s3loader.types import Buffer

__all__ = [
    "BLOCK",
    "RECORD",
    "TarMember",
    "check_member_path",
    "end_of_archive",
    "is_header",
    "member_header",
    "padding",
    "unsafe_reason",
    "walk",
]

BLOCK: Final = 512
RECORD: Final = 10240
"""Archives are padded to a multiple of this many bytes, as GNU tar does."""

MAX_EXTENSION: Final = 1 << 20
"""Longest PAX or long-name record read into memory: a longer one is an attack or corruption."""
MAX_SIZE: Final = 1 << 62
_OCTAL_LIMIT: Final = 8**11
_ZERO_BLOCK: Final = bytes(BLOCK)


def padding(size: int) -> int:
    """Zero bytes that follow `size` bytes of content."""
    return -size % BLOCK


def end_of_archive(position: int) -> bytes:
    """What ends an archive whose last member ends at `position`: two zero blocks, then zeros to a whole record."""
    return bytes(2 * BLOCK + (-(position + 2 * BLOCK)) % RECORD)


_ORDINARY: Final = re.compile(r"\w(?:[\w+=@~. ()/-]*[\w+=@~. ()-])?", re.ASCII)


def check_member_path(path: str) -> None:
    """Refuse a member path that could not be extracted as what it is.

    Raises:
        ConfigError: empty, absolute, with ``..``, NUL, a trailing slash, or not Unicode.
    """
    if not isinstance(path, str):
        raise ConfigError(f"a member path is a str, not {type(path).__name__}", hint="write it as text: images/0001.jpg")
    if _ORDINARY.fullmatch(path) and ".." not in path:
        return
    reason = unsafe_reason(path)
    if reason is None and (not path or path.endswith("/") or "\0" in path):
        reason = "is empty, ends with / or holds a NUL"
    if reason is None and not path.isascii():
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            reason = "is not valid Unicode"
    if reason is not None:
        raise ConfigError(f"member path {path!r} {reason}", hint="use a relative path with / between folders: images/0001.jpg")


def _template() -> tuple[bytes, bytes, bytes, int]:
    """The constant pieces of a header: before the size, between it and the checksum, after that; and their sum."""
    block = bytearray(tarfile.TarInfo("").tobuf(tarfile.PAX_FORMAT))
    block[124:136] = bytes(12)
    block[148:156] = b" " * 8
    return bytes(block[100:124]), bytes(block[136:148]), bytes(block[156:]), sum(block)


_BEFORE_SIZE, _MTIME, _AFTER_CHECKSUM, _BASE_SUM = _template()


def member_header(path: str, size: int) -> bytes:
    """Header block(s) of a regular file: 512 bytes, or 1536 and more with a PAX record."""
    if size < _OCTAL_LIMIT and len(path) <= 100 and path.isascii():
        name = path.encode("ascii")
        length = b"%011o\0" % size
        checksum = b"%06o\0 " % (_BASE_SUM + sum(name) + sum(length))
        return b"".join((name, bytes(100 - len(name)), _BEFORE_SIZE, length, _MTIME, checksum, _AFTER_CHECKSUM))
    info = tarfile.TarInfo(path)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


class TarMember(NamedTuple):
    """One member as an archive's headers describe it."""

    name: str
    """Bytes that are not UTF-8 come as surrogates, as `os.fsdecode` does."""
    header_offset: int
    """First byte of its headers, PAX and long-name records included."""
    offset: int
    """First byte of its content."""
    size: int
    """Bytes of content; 0 for what has none."""
    kind: str
    """``file``, ``dir``, ``symlink``, ``hardlink``, ``character device``, ``block device``, ``fifo`` or ``volume label``."""
    link: str = ""
    """Target of a link."""


def unsafe_reason(path: str) -> str | None:
    """Why extracting a member under this name would leave the target folder; None if it would not."""
    if path.startswith(("/", "\\")) or path[1:3] in (":\\", ":/"):
        return "is absolute"
    if ".." in path.replace("\\", "/").split("/"):
        return "contains '..'"
    return None


Reader = Callable[[int, int], Buffer]
"""``read(offset, size)``: the bytes there, fewer only at the end of the stream."""

_EMPTY: Final = {
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "character device",
    b"4": "block device",
    b"5": "dir",
    b"6": "fifo",
}
_WITHOUT_CONTENT: Final = frozenset(_EMPTY.values()) - {"dir"}
_GNU: Final = {b"D": "dir", b"V": "volume label"}  # a folder with a list of its files as content
_REFUSED: Final = {b"S": "GNU sparse", b"M": "multi-volume"}
_NO_SPARSE: Final = "write the archive without --sparse, so that files stand in it as they are read"
_NO_VOLUMES: Final = "join the volumes: extract them all, and pack the files again"
_NO_END: Final = (
    "it may have been cut off: fetch or write it again; allow_missing_end=True takes an archive that ends behind a whole member"
)
_TRAILING: Final = "allow_trailing=True leaves out what follows the end of an archive"


@dataclass
class _Pending:
    """What extension records said about the next member."""

    name: str | None = None
    link: str | None = None
    size: int | None = None
    start: int | None = None


def walk(
    read: Reader,
    *,
    start: int = 0,
    end: int | None = None,
    allow_missing_end: bool = False,
    allow_trailing: bool = False,
) -> Iterator[TarMember]:
    """Every member of a tar stream, in order, in constant memory.

    Only headers are read, at rising offsets; the caller may read contents in between. Archives that
    follow one another are read as one.

    Args:
        read: Random or forward-only access to the tar stream.
        start: Offset of the first header.
        end: Stop before the header at this offset, without asking for an end of archive.
        allow_missing_end: Accept a stream that stops between two members without zero blocks.
        allow_trailing: Leave out what follows the zero blocks and is no archive; otherwise it is refused.

    Raises:
        ShardReadError: the archive is damaged, cut off, sparse or multi-volume; `.member` is the
            last good name and `.offset` where it happened.
    """
    at = start
    ended = False
    last = ""
    pending = _Pending()
    defaults = _Pending()
    while end is None or at < end:
        block = bytes(read(at, BLOCK))
        if ended and pending.start is None and _is_trailing(block):
            if allow_trailing:
                return
            raise _damaged("something that is no archive follows the end of the archive,", at, last, _TRAILING)
        if len(block) < BLOCK:
            if pending.start is None and (ended or (not block and allow_missing_end and at > start)):
                return
            raise _damaged("the archive is cut off", at, last, _NO_END)
        if block == _ZERO_BLOCK:
            if pending.start is not None:
                raise _damaged("an extension record has no member", at, last)
            ended = True
            at += BLOCK
            continue
        kind = block[156:157]
        size = _parse_header(block, at, last)
        if kind in _REFUSED:
            hint = _NO_SPARSE if kind == b"S" else _NO_VOLUMES
            raise _damaged(f"{_REFUSED[kind]} members are not supported", at, last, hint)
        if kind in (b"x", b"g", b"X", b"L", b"K"):
            if kind != b"g" and pending.start is None:
                pending.start = at
            _read_extension(kind, read, at + BLOCK, size, defaults if kind == b"g" else pending, last)
            at += BLOCK + size + padding(size)
            continue
        if kind == b"1" and size and not _has_content(read, at + BLOCK):
            size = 0
        member = _member(block, kind, at, size, pending, defaults)
        yield member
        if allow_missing_end and member.size and not len(read(member.offset + member.size - 1, 1)):
            raise _damaged(f"the archive is cut off in member {member.name!r},", member.offset, last)
        ended = False
        last = member.name
        at = member.offset + member.size + padding(member.size)
        pending = _Pending()


def _damaged(message: str, offset: int, last: str, hint: str = "") -> ShardReadError:
    where = f" after member {last!r}" if last else ""
    return ShardReadError(f"tar: {message} at byte {offset}{where}", hint=hint or None, offset=offset, member=last)


def _is_trailing(block: bytes) -> bool:
    """Whether a block behind the end of an archive is neither zero nor the header of another archive."""
    if len(block) < BLOCK:
        return bool(block.strip(b"\0"))
    return block != _ZERO_BLOCK and not is_header(block)


def is_header(block: bytes) -> bool:
    """Whether these 512 bytes are the header of a member, by its own checksum."""
    if len(block) < BLOCK:
        return False
    try:
        _parse_header(block, 0, "")
    except ShardReadError:
        return False
    return True


def _has_content(read: Reader, at: int) -> bool:
    """Whether the bytes of a hard link follow its header, as pax with linkdata writes them.

    Most writers note the size of the file and write no content, so what stands there decides: another header, or the end.
    """
    block = bytes(read(at, BLOCK))
    return len(block) == BLOCK and block != _ZERO_BLOCK and not is_header(block)


def _parse_header(block: bytes, at: int, last: str) -> int:
    """Check the header's own checksum and return the size it states."""
    stored = _number(block[148:156], at, last)
    rest = block[:148] + block[156:]
    total = sum(rest) + 8 * 32  # the checksum field counts as spaces
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in rest):  # some tars summed signed bytes
        raise _damaged("not a tar header (bad checksum)", at, last)
    size = _number(block[124:136], at, last)
    if not 0 <= size < MAX_SIZE:
        raise _damaged(f"impossible member size {size}", at, last)
    return size


def _number(field: bytes, at: int, last: str) -> int:
    if field[0] & 0x80:  # GNU base-256: two's complement, the top bit marks it
        value = int.from_bytes(field, "big") & ~(1 << (8 * len(field) - 1))
        return value - (1 << (8 * len(field))) if field[0] == 0xFF else value
    text = field.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise _damaged(f"bad number {field!r}", at, last) from None


def _text(field: Buffer) -> str:
    return bytes(field).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _member(block: bytes, kind: bytes, at: int, size: int, pending: _Pending, defaults: _Pending) -> TarMember:
    name = pending.name if pending.name is not None else defaults.name
    if name is None:
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{_text(block[345:500])}/{name}"
    link = pending.link if pending.link is not None else _text(block[157:257])
    what = _EMPTY.get(kind) or _GNU.get(kind) or "file"
    if kind == b"1" and size:
        what = "file"  # a hard link that brings its bytes along
    if kind == b"\0" and name.endswith("/"):
        what = "dir"  # how V7 archives mark folders
    empty = what in _WITHOUT_CONTENT or (what == "dir" and kind in (b"5", b"\0"))
    size = 0 if empty else size if pending.size is None else pending.size
    header = at if pending.start is None else pending.start
    return TarMember(name, header, at + BLOCK, size, what, link if what in ("symlink", "hardlink") else "")


def _read_extension(kind: bytes, read: Reader, at: int, size: int, target: _Pending, last: str) -> None:
    if size > MAX_EXTENSION:
        raise _damaged(f"an extension record of {size} bytes", at, last)
    data = bytes(read(at, size))
    if len(data) < size:
        raise _damaged("the archive is cut off in an extension record", at, last)
    if kind == b"L":
        target.name = _text(data)
    elif kind == b"K":
        target.link = _text(data)
    else:
        for keyword, value in _pax_records(data, at, last):
            if keyword.startswith(b"GNU.sparse."):
                raise _damaged("GNU sparse members are not supported", at, last, _NO_SPARSE)
            if keyword == b"path":
                target.name = value.decode("utf-8", "surrogateescape")
            elif keyword == b"linkpath":
                target.link = value.decode("utf-8", "surrogateescape")
            elif keyword == b"size":
                if not value.isdigit() or len(value) > 18:
                    raise _damaged(f"bad PAX size {value!r}", at, last)
                target.size = int(value)


def _pax_records(data: bytes, at: int, last: str) -> Iterator[tuple[bytes, bytes]]:
    """``length keyword=value\\n``, where the length counts the whole record."""
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        digits = data[position:space]
        length = int(digits) if space > 0 and digits.isdigit() else 0
        record = data[space + 1 : position + length]
        keyword, equals, value = record.partition(b"=")
        if length <= len(digits) + 2 or position + length > len(data) or not equals or value[-1:] != b"\n":
            raise _damaged("bad PAX record", at + position, last)
        yield keyword, value[:-1]
        position += length
