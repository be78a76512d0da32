"""Manifest lines: one JSON object each, byte for byte as s3exchange writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, cast

import msgspec

from s3loader.errors import ConfigError, InvalidManifestError, S3LoaderError
from s3loader.exchange.types import FileEntry, ManifestEntry
from s3loader.types import Buffer

__all__ = [
    "CONTENT_TYPE",
    "EMPTY_MANIFEST",
    "MAX_LINE",
    "check_entries",
    "encode_manifest",
    "iter_lines",
    "json_value",
    "parse_line",
    "serialize_entry",
]

CONTENT_TYPE: Final = "application/x-ndjson"
EMPTY_MANIFEST: Final = b"\n"
MAX_LINE: Final = 64 << 20
"""Longest line read, in bytes: a longer one is no manifest line, and would fill the memory."""


def _line_encoder() -> Callable[[Any], str]:
    """``json.dumps(entry, separators=(",", ":"))``, with the encoder made once and not for every call.

    NaN and infinities are refused: JSON has none, and other readers stop there.
    """
    encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # not CPython
        return encoder.encode
    chunks = make(None, encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, False)
    return lambda entry: "".join(chunks(entry, 0))


_encode = _line_encoder()
json_string: Final[Callable[[str], str]] = json.encoder.encode_basestring_ascii
"""A string, quoted, as a manifest line holds it."""
_decode: Callable[[Buffer], Any] = msgspec.json.Decoder().decode
_JSON_HINT: Final = "JSON holds str, int, finite float, bool, None, and lists and dicts of them; None may stand for NaN"
_REQUIRED: Final = {"file": ("key", "File"), "shard": ("archive_key", "Shard"), "manifest_ref": ("key", "Manifest ref")}


def serialize_entry(entry: ManifestEntry) -> str:
    """One line without its newline: compact separators, ASCII only, fields in the order given.

    Raises:
        InvalidManifestError: a field holds what JSON has not; names entry and field.
    """
    try:
        return _encode(entry)
    except S3LoaderError:  # of an upload this entry has waited for
        raise
    except (TypeError, ValueError, RecursionError):
        if not isinstance(entry, dict):
            raise _invalid(f"not an entry: {type(entry).__name__}", None) from None
        name = f"{entry.get('kind')} entry {entry.get('archive_key', entry.get('key'))!r}"
        for field, value in entry.items():
            json_value(value, f"{name}: its {field!r}")
        raise _invalid(f"{name} is not JSON: the names of its fields must be str", None) from None


def serialize_member(entry: FileEntry) -> str:
    """As `serialize_entry`, for the entry of a member that was read: NaN and infinities in it stay what they were there."""
    return json.dumps(entry, separators=(",", ":"))


def json_value(value: Any, what: str) -> str:
    """Any value, as a manifest line holds it.

    Args:
        value: What JSON can hold.
        what: What it is, for the error.

    Raises:
        InvalidManifestError: it holds something else.
    """
    try:
        return _encode(value)
    except S3LoaderError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidManifestError(f"{what} is not JSON: {error}", hint=_JSON_HINT) from error


def check_entries(entries: Any) -> None:
    """Whether `entries` can be gone through entry by entry.

    Raises:
        ConfigError: it is None, a single entry or a str.
    """
    if isinstance(entries, (str, bytes, Mapping)) or not hasattr(entries, "__iter__"):
        raise ConfigError(
            f"{type(entries).__name__} where entries are expected", hint="pass a list of entries; [] makes an empty manifest"
        )


def encode_manifest(entries: Iterable[ManifestEntry]) -> bytes:
    """A whole manifest; no entries make the one byte ``\\n``.

    Raises:
        InvalidManifestError: an entry no reader would accept.
        ConfigError: these are no entries.
    """
    check_entries(entries)
    return "".join([f"{serialize_entry(_checked(entry, None))}\n" for entry in entries]).encode("ascii") or EMPTY_MANIFEST


def check_entry(entry: ManifestEntry) -> None:
    """Refuse an entry that no reader would accept.

    Raises:
        InvalidManifestError: not a mapping, no or unknown `kind`, or its key is missing.
    """
    _checked(entry, None)


def file_entry(key: str, id: str | None, meta: Any, content_type: str | None, size: int | None, etag: str | None) -> FileEntry:
    """A file entry with all its fields in the order s3exchange writes them."""
    return {
        "kind": "file",
        "key": key,
        "id": id,
        "meta": meta,
        "content_type": content_type,
        "size_bytes": size,
        "etag": etag,
    }


def parse_line(line: str | Buffer, line_number: int | None = None) -> ManifestEntry:
    """The entry of one line.

    Raises:
        InvalidManifestError: with `.line_number`.
    """
    if isinstance(line, str):
        line = line.encode("utf-8", "surrogatepass")
    if not bytes(line).strip():
        raise _invalid("Empty line", line_number)
    return _parse(line, line_number)


def _invalid(message: str, line_number: int | None) -> InvalidManifestError:
    return InvalidManifestError(f"Line {line_number}: {message}" if line_number is not None else message, line_number)


def _parse(line: Buffer, line_number: int | None) -> ManifestEntry:
    try:
        entry = _decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        entry = _parse_slowly(line, line_number)
    return _checked(entry, line_number)


def _parse_slowly(line: Buffer, line_number: int | None) -> Any:
    """What Python's json reads and msgspec does not: NaN, Infinity, lone surrogates."""
    try:
        return json.loads(bytes(line).decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise _invalid(f"Invalid JSON: {error}", line_number) from error


def _checked(entry: Any, line_number: int | None) -> ManifestEntry:
    try:
        field, name = _REQUIRED[entry["kind"]]
        if type(entry[field]) is str:
            return cast("ManifestEntry", entry)
    except (KeyError, TypeError, IndexError):
        pass
    if not isinstance(entry, dict):
        raise _invalid(f"Invalid JSON: an object was expected, not {type(entry).__name__}", line_number)
    kind = entry.get("kind")
    if kind is None:
        raise _invalid("Missing 'kind' field", line_number)
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise _invalid(f"Unknown entry kind: {kind}", line_number)
    field, name = _REQUIRED[kind]
    if field not in entry:
        raise _invalid(f"{name} entry missing {field!r}", line_number)
    raise _invalid(f"{name} entry's {field!r} is not a string", line_number)


def iter_lines(chunks: Iterable[Buffer], *, limit: int | None = None) -> Iterator[tuple[int, bytes]]:
    """``(line number from 1, line)`` of every line that is not blank, in constant memory.

    Raises:
        InvalidManifestError: a line is longer than `MAX_LINE`.
    """
    number = given = 0
    rest = b""
    if limit is not None and limit <= 0:
        return
    for chunk in chunks:
        lines = (rest + bytes(chunk)).split(b"\n")
        rest = lines.pop()
        if len(rest) > MAX_LINE:
            raise _invalid(f"Line is longer than {MAX_LINE} bytes", number + len(lines) + 1)
        for line in lines:
            number += 1
            if line and not line.isspace():
                yield number, line
                given += 1
                if given == limit:
                    return
    if rest.strip():
        yield number + 1, rest


def iter_entries(chunks: Iterable[Buffer], *, limit: int | None = None) -> Iterator[ManifestEntry]:
    """The entries of one manifest's bytes, references not followed.

    Raises:
        InvalidManifestError: with `.line_number`.
    """
    for number, line in iter_lines(chunks, limit=limit):
        yield _parse(line, number)


def iter_entry_lines(chunks: Iterable[Buffer]) -> Iterator[tuple[ManifestEntry, bytes]]:
    """As `iter_entries`, each entry with its line, without the white space around that.

    Raises:
        InvalidManifestError: with `.line_number`.
    """
    for number, line in iter_lines(chunks):
        yield _parse(line, number), line.strip()


def iter_members(data: Buffer) -> Iterator[FileEntry]:
    """The entries of an internal manifest; the earliest writers left out `key`, `member_path` is always there.

    Raises:
        InvalidManifestError: with `.line_number`.
    """
    for number, line in iter_lines([data]):
        try:
            entry = _decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            entry = _parse_slowly(line, number)
        if not isinstance(entry, dict) or entry.get("kind") != "file":
            raise _invalid("not a file entry", number)
        if not isinstance(entry.get("member_path"), str) or not isinstance(entry.get("key", ""), str):
            raise _invalid("File entry without 'member_path'", number)
        yield cast("FileEntry", entry)
