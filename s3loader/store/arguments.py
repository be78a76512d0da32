"""Checks on what callers pass in, so that a mistake is named before a request is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from s3loader.checksum import crc32c_base64
from s3loader.errors import ConfigError, IntegrityError
from s3loader.types import Buffer, PutMode, Update

__all__ = ["check_attributes", "check_crc32c", "checked_key", "checked_mode", "readable", "refuse_str", "writable"]


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


def checked_mode(mode: PutMode) -> PutMode:
    """`mode`, if it is one.

    Raises:
        ConfigError: it is not.
    """
    if mode in ("overwrite", "create") or (isinstance(mode, Update) and mode.etag and isinstance(mode.etag, str)):
        return mode
    raise ConfigError(f"unknown put mode {mode!r}", hint='use "overwrite", "create" or Update(etag)')


def refuse_str(keys: Iterable[str]) -> None:
    """A single str where several are meant would be taken letter by letter.

    Raises:
        ConfigError: it is one.
    """
    if isinstance(keys, (str, bytes)):
        raise ConfigError(f"one key where several are expected: {keys!r}", hint="pass a list of keys")


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
