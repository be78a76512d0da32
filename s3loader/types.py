"""The nouns of an object store, as small frozen values."""

from __future__ import annotations

import numbers
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import unquote, urlsplit

from s3loader.errors import ConfigError

__all__ = [
    "Buffer",
    "ByteRange",
    "Capabilities",
    "CommonPrefix",
    "DeleteFailure",
    "ObjectMeta",
    "ObjectURL",
    "PartResult",
    "PutMode",
    "PutRequest",
    "PutResult",
    "ReadRequest",
    "Update",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes, as every verb that takes data takes them."""

SCHEMES: Final = ("s3", "file", "memory", "gs", "az")
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ObjectURL:
    """``scheme://bucket/key``: a store, a prefix in it, or one object.

    ``file://`` has an empty bucket and an absolute path as its key's root; a plain path is
    taken as ``file://``. ``memory://name`` names a store that lives as long as the process.
    """

    scheme: str
    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str) -> ObjectURL:
        """Split `url`.

        Raises:
            ConfigError: the scheme is unknown, or a bucket is missing.
        """
        if not isinstance(url, (str, os.PathLike, ObjectURL)):
            raise ConfigError(
                f"{type(url).__name__} is no URL: {url!r}", hint="give s3://bucket/prefix or a path, as str or Path"
            )
        text = str(url)
        if "://" not in text:
            if not text:
                raise ConfigError("the URL is empty", hint="give s3://bucket/prefix or a path")
            return cls("file", "", posixpath.abspath(text))
        scheme, rest = text.split("://", 1)
        scheme = scheme.lower()
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise ConfigError(f"unknown scheme {scheme}:// in {text!r}", hint=f"use one of {known}")
        if scheme == "file":
            parts = urlsplit(text.replace("#", "%23").replace("?", "%3F"))
            if parts.netloc not in ("", "localhost"):
                raise ConfigError(
                    f"{text!r} names a host, {parts.netloc!r}", hint="write file:///absolute/path, or a path without file://"
                )
            path = unquote(parts.path)
            return cls("file", "", posixpath.normpath(path) if path else "/")
        bucket, _, key = rest.partition("/")
        if not bucket and scheme != "memory":
            raise ConfigError(f"no bucket in {text!r}", hint=f"write {scheme}://BUCKET/PREFIX")
        return cls(scheme, bucket, key)

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{self.key}"
        return f"{self.scheme}://{self.bucket}/{self.key}" if self.key else f"{self.scheme}://{self.bucket}"

    @property
    def base(self) -> str:
        """It without a slash at its end, for ``f"{base}/{key}"``; of the root folder ``file://``."""
        return f"{self.scheme}://{str(self).partition('://')[2].rstrip('/')}"


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """Bytes ``[start, end)`` of an object."""

    start: int
    end: int

    def __post_init__(self) -> None:
        whole = isinstance(self.start, numbers.Integral) and isinstance(self.end, numbers.Integral)
        if not whole or self.start < 0 or self.end < self.start:
            raise ConfigError(
                f"bad byte range [{self.start}, {self.end})", hint="0 <= start <= end, in bytes from the object's beginning"
            )

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ObjectMeta:
    """What a store says of one object."""

    key: str
    size: int
    """Bytes."""
    etag: str = ""
    """Without the surrounding quotes; empty where the store gives none."""
    last_modified: float | None = None
    """Seconds since the epoch, UTC."""
    content_type: str | None = None
    version_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """User metadata; keys in lower case."""

    def __reduce__(self) -> tuple[Any, ...]:  # a MappingProxyType does not pickle
        return (
            ObjectMeta,
            (self.key, self.size, self.etag, self.last_modified, self.content_type, self.version_id, dict(self.metadata)),
        )


@dataclass(frozen=True, slots=True)
class CommonPrefix:
    """A "folder" in a listing with a delimiter; `key` ends with the delimiter."""

    key: str


@dataclass(frozen=True, slots=True)
class Update:
    """Put mode: replace the object only while its ETag is still `etag`."""

    etag: str


PutMode: TypeAlias = Literal["overwrite", "create"] | Update
"""``"overwrite"``: always. ``"create"``: only if the key is free, else `ObjectExistsError`.
``Update(etag)``: only over that very object, else `ObjectChangedError`."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """What a successful write made."""

    key: str
    etag: str
    size: int
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class PartResult:
    """One uploaded part of a multipart upload."""

    number: int
    """1-based."""
    etag: str
    size: int
    checksum: str | None = None
    """CRC32C as S3 writes it (base64 of 4 big-endian bytes), where one was sent."""


@dataclass(frozen=True, slots=True)
class DeleteFailure:
    """One key that `delete_many` could not delete."""

    key: str
    error: Exception


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """One read of a bulk call: bytes ``[start, end)`` of `key`; ``end=None`` reads to its end.

    Where `into` is given it is filled in place (``len(into)`` bytes from `start`), nothing is
    allocated, and `end` is ignored.
    """

    key: str
    start: int = 0
    end: int | None = None
    if_match: str | None = None
    into: memoryview | None = None
    tag: Any = None
    """Comes back untouched in the result."""


@dataclass(frozen=True, slots=True)
class PutRequest:
    """One write of a bulk call."""

    key: str
    data: Buffer
    mode: PutMode = "overwrite"
    content_type: str | None = None
    tag: Any = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store really does, found by probing it (`ObjectStore.capabilities`)."""

    create: bool
    """A create-only put fails on a taken key."""
    update: bool
    """A put with If-Match succeeds on the right ETag and fails on a wrong one."""
    multipart_create: bool
    """Completing a multipart upload honours If-None-Match."""
    multipart_update: bool
    """Completing a multipart upload honours If-Match."""
    get_if_match: bool
    """The server itself refuses a read whose ETag differs (we check the answer in any case)."""
    upload_checksum: bool
    """A wrong CRC32C on an upload is refused."""
    metadata: bool = True
    """User metadata is stored and returned."""

    @property
    def conditional_writes(self) -> bool:
        """Whether several writers can share one key safely (`create` and `update`)."""
        return self.create and self.update
