"""Checks on what callers pass in, so that a mistake is named before a request is sent; and what every engine makes of an ETag,
a key, an attribute."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import urlencode

from s3loader.arguments import unknown_option
from s3loader.checksum import crc32c_base64
from s3loader.errors import ConfigError, IntegrityError, SourceNotFoundError, UnsupportedOperationError
from s3loader.types import SETTABLE, Buffer, ByteRange, PutMode, Update

__all__ = [
    "at_source",
    "bare_etag",
    "check_attributes",
    "check_crc32c",
    "check_several",
    "checked_attributes",
    "checked_key",
    "checked_mode",
    "checked_ranges",
    "is_plain_key",
    "kept_here",
    "open_source",
    "readable",
    "said",
    "writable",
]

T = TypeVar("T")


def checked_key(key: str) -> str:
    """`key`, if it can be one.

    Raises:
        ConfigError: it is not a non-empty str that has bytes (those of `os.fsdecode` are fine).
    """
    if not isinstance(key, str) or not key:
        raise ConfigError(f"not a key: {key!r}", hint="a key is a non-empty str, relative to the store's URL")
    if not key.isascii():
        try:
            key.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise ConfigError(f"not a key: {key!r}", hint="it holds half of a surrogate pair: decode it right first") from error
    return key


def check_attributes(content_type: str | None, metadata: Mapping[str, str] | None, *, headers: bool) -> None:
    """Whether a store can keep these and give them back.

    Args:
        headers: They travel as HTTP headers, so must be ASCII: some clients write others, then cannot read the object.

    Raises:
        ConfigError: one is no str, or has characters that it cannot have.
    """
    found: list[Any] = [] if content_type is None else [content_type]
    if metadata:
        found += [*metadata, *metadata.values()]
    for text in found:
        if not isinstance(text, str):
            raise ConfigError(f"metadata and content_type are str, not {text!r}", hint="write numbers as text")
        if any(c < " " or c == "\x7f" for c in text):
            raise ConfigError(f"metadata or content_type with a control character: {text!r}", hint="leave it out, or quote it")
        if headers and not text.isascii():
            raise ConfigError(f"metadata or content_type that is not ASCII: {text!r}", hint="quote it (urllib.parse.quote)")


def checked_attributes(attributes: Mapping[str, str] | None, tags: Mapping[str, str] | None) -> dict[str, str] | None:
    """What a write says of its object beside type and metadata, as backends take it: `tags` are its ``tagging``.

    Raises:
        ConfigError: a name is unknown or cannot be set, a value is none, or there are more tags than S3 takes.
        UnsupportedOperationError: keys of the caller's own (SSE-C) are not supported.
    """
    if not attributes and not tags:
        return None
    found = dict(attributes or {})
    for name, value in found.items():
        if isinstance(name, str) and name.startswith("sse_customer"):
            raise UnsupportedOperationError(
                "encryption with keys of your own (SSE-C) is not supported",
                op="put",
                hint='use server_side_encryption="aws:kms" with ssekms_key_id, or encrypt the data yourself',
            )
        if name not in SETTABLE:
            raise unknown_option([str(name)], sorted(SETTABLE), "attributes")
        if not isinstance(value, str) or not value:
            raise ConfigError(f"the attribute {name} is a non-empty str, not {value!r}", hint="leave it out for the default")
    check_attributes(None, found, headers=True)
    encryption = found.get("server_side_encryption")
    if encryption not in (None, "AES256", "aws:kms", "aws:kms:dsse", "aws:fsx"):
        raise ConfigError(
            f"server_side_encryption cannot be {encryption!r}", hint='"AES256" (SSE-S3), "aws:kms" (SSE-KMS) or "aws:kms:dsse"'
        )
    if "ssekms_key_id" in found and not (encryption or "").startswith("aws:kms"):
        raise ConfigError("ssekms_key_id needs SSE-KMS", hint='give server_side_encryption="aws:kms" with it')
    if tags:
        if "tagging" in found:
            raise ConfigError("tags are given twice", hint="give tags={...} alone; tagging is the same as one text")
        found["tagging"] = _tagging(tags)
    return found


def _tagging(tags: Mapping[str, str]) -> str:
    if not all(isinstance(text, str) for pair in tags.items() for text in pair):
        raise ConfigError(f"tags are str, by their names: {dict(tags)!r}", hint="write numbers as text")
    if len(tags) > 10 or any(not 1 <= len(name) <= 128 or len(value) > 256 for name, value in tags.items()):
        raise ConfigError(
            f"{len(tags)} tags, or one that is too long",
            hint="an object has at most 10 tags, with names up to 128 characters and values up to 256",
        )
    return urlencode(tags)


def said(attributes: Mapping[str, str] | None) -> dict[str, Any]:
    """The keyword of a write, where there is something to say: a backend of one's own may not know it."""
    return {"attributes": attributes} if attributes else {}


def kept_here(attributes: Mapping[str, str] | None, url: str) -> dict[str, str]:
    """Of what a write says, what a store of ours keeps as it is: what describes the object, not what a cloud does with it.

    Raises:
        UnsupportedOperationError: encryption or a storage class is asked for.
    """
    for name in ("server_side_encryption", "ssekms_key_id", "storage_class"):
        if attributes and name in attributes:
            raise UnsupportedOperationError(
                f"this store has no {name}", op="put", url=url, hint=f"leave {name} out for stores that are not S3"
            )
    return dict(attributes or {})


def checked_mode(mode: PutMode) -> PutMode:
    """`mode`, if it is one.

    Raises:
        ConfigError: it is not.
    """
    if mode in ("overwrite", "create") or (isinstance(mode, Update) and mode.etag and isinstance(mode.etag, str)):
        return mode
    raise ConfigError(f"unknown put mode {mode!r}", hint='use "overwrite", "create" or Update(etag)')


def check_several(items: Any, what: str) -> None:
    """Whether `items` can be gone through; a single str would be taken letter by letter.

    Args:
        what: What one of them is, in the singular.

    Raises:
        ConfigError: it is one str, or nothing that can be iterated over.
    """
    if isinstance(items, (str, bytes)):
        raise ConfigError(f"one {what} where several are expected: {items!r}", hint=f"pass a list of {what}s")
    if not hasattr(items, "__iter__") and not hasattr(items, "__getitem__"):
        raise ConfigError(f"{type(items).__name__} where several {what}s are expected", hint=f"pass a list of {what}s")


def checked_ranges(ranges: Any) -> list[tuple[int, int]]:
    """``(start, end)`` of each range.

    Raises:
        ConfigError: they are not pairs of numbers, or one is no range.
    """
    check_several(ranges, "range")
    wanted = []
    for pair in ranges:
        try:
            start, end = (pair.start, pair.end) if isinstance(pair, ByteRange) else (int(pair[0]), int(pair[1]))
        except (TypeError, ValueError, LookupError) as error:
            raise ConfigError(f"not a range: {pair!r}", hint="ranges are (start, end) pairs: [(0, 10), (20, 30)]") from error
        ByteRange(start, end)
        wanted.append((start, end))
    return wanted


def open_source(path: str | os.PathLike[str]) -> BinaryIO:
    """The local file `path`, opened for reading. Raises as `at_source`."""
    return at_source(path, lambda: open(path, "rb"))


def at_source(path: str | os.PathLike[str], look: Callable[[], T]) -> T:
    """What `look` returns, which looks at the local file `path`.

    Raises:
        SourceNotFoundError: there is no such file.
        ConfigError: it is a folder, may not be read, or the path is none.
    """
    try:
        return look()
    except FileNotFoundError as error:
        hint = "check the path" + ("; text that is itself the data must be encoded" if isinstance(path, str) else "")
        raise SourceNotFoundError(f"there is no local file {os.fspath(path)!r}", hint=hint) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        hint = "pass the path of one file that this process may read"
        raise ConfigError(f"cannot read the local file {os.fspath(path)!r}: {why}", hint=hint) from error


def readable(data: Any) -> memoryview:
    """The bytes of any contiguous buffer, without a copy.

    Raises:
        ConfigError: it is no buffer, or not contiguous.
    """
    try:
        view = memoryview(data)
        return view if view.format == "B" and view.ndim == 1 and view.contiguous else _flat(view)
    except (TypeError, ValueError, BufferError) as error:
        hint = "encode text first" if isinstance(data, str) else "pass bytes, or anything contiguous with the buffer protocol"
        raise ConfigError(f"data is {type(data).__name__}: {error}", hint=hint) from error


def _flat(view: memoryview) -> memoryview:
    if not view.contiguous:
        raise ValueError("it is not contiguous")
    if not view.nbytes:  # cast refuses it
        return memoryview(b"") if view.readonly else memoryview(bytearray())
    return view.cast("B")


def writable(buffer: Any) -> memoryview:
    """As `readable`, of memory that may be written to.

    Raises:
        ConfigError: it is read-only, too.
    """
    view = readable(buffer)
    if view.readonly:
        raise ConfigError(f"the buffer ({type(buffer).__name__}) is read-only", hint="pass a bytearray or a writable array")
    return view


def check_crc32c(data: Buffer, checksum: str, url: str) -> None:
    """Compare `data` with what its sender says of it.

    Raises:
        IntegrityError: they differ.
    """
    if crc32c_base64(data) != checksum:
        raise IntegrityError("the data does not have the checksum it came with", op="put", url=url, code="BadDigest")


# a segment that is empty, "." or "..", or a control character
_ODD: Final = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def bare_etag(value: str | None) -> str:
    """An ETag without quotes and without the mark of a weak one (a proxy adds it; the bytes are the same)."""
    return (value or "").removeprefix("W/").strip('"')


def is_plain_key(key: str) -> bool:
    """Whether path-minded clients (obstore) keep `key` as it is: no empty, ``.`` or ``..`` segment,
    no control character."""
    return _ODD.search(key) is None
