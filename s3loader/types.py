"""The nouns of an object store, as small frozen values."""

from __future__ import annotations

import numbers
import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol, TypeAlias
from urllib.parse import unquote

from s3loader.arguments import checked, local_path
from s3loader.errors import ConfigError

__all__ = [
    "ATTRIBUTES",
    "SETTABLE",
    "Buffer",
    "ByteRange",
    "Capabilities",
    "CommonPrefix",
    "DeleteFailure",
    "Location",
    "NetworkState",
    "ObjectMeta",
    "ObjectURL",
    "PartResult",
    "PutMode",
    "PutRequest",
    "PutResult",
    "ReadGate",
    "ReadRequest",
    "Update",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes, as every verb that takes data takes them."""

SCHEMES: Final = ("s3", "file", "memory", "gs", "az")
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

ATTRIBUTES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "content_language": "content-language",
        "content_encoding": "content-encoding",
        "cache_control": "cache-control",
        "content_disposition": "content-disposition",
        "expires": "expires",
        "storage_class": "x-amz-storage-class",
        "server_side_encryption": "x-amz-server-side-encryption",
        "ssekms_key_id": "x-amz-server-side-encryption-aws-kms-key-id",
        "sse_customer_algorithm": "x-amz-server-side-encryption-customer-algorithm",
        "replication_status": "x-amz-replication-status",
        "tag_count": "x-amz-tagging-count",
    }
)
"""Names of `ObjectMeta.attributes`, with the HTTP header of each."""
SETTABLE: Final = frozenset(
    (
        *("cache_control", "content_disposition", "content_encoding", "content_language", "expires"),
        *("storage_class", "server_side_encryption", "ssekms_key_id", "tagging"),
    )
)
"""Those that a write may give, and ``tagging``: tags as a query, ``a=1&b=2``."""


@checked
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
    def parse(cls, url: str | os.PathLike[str] | ObjectURL) -> ObjectURL:
        """Split `url`: a URL, a path (``~`` is expanded), or an `ObjectURL`.

        Keys of ``s3://`` and its like are taken as they stand. In ``file://`` percent-encodings are decoded; a path without
        a scheme is taken as it stands. ``.`` and ``..`` of paths are resolved.

        Raises:
            ConfigError: the scheme is unknown, a bucket is missing, or it is no URL: a ``Path`` of one, one with a password,
                an encoded ``..``.
        """
        if isinstance(url, ObjectURL):
            return url
        if not isinstance(url, (str, os.PathLike)):
            raise ConfigError(
                f"{type(url).__name__} is no URL: {url!r:.100}", hint="give s3://bucket/prefix or a path, as str or Path"
            )
        text = url if isinstance(url, str) else str(url) if "://" in str(url) else os.fsdecode(url)
        if "://" not in text or text.startswith(("/", "~", "./", "../")):
            if not text:
                raise ConfigError("the URL is empty", hint="give s3://bucket/prefix or a path")
            return cls("file", "", _one_slash(posixpath.abspath(local_path(text))))
        scheme, rest = text.split("://", 1)
        scheme = scheme.lower()
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise ConfigError(f"unknown scheme {scheme}:// in {text!r}", hint=f"use one of {known}; {_of_scheme(scheme)}")
        bucket, _, key = rest.partition("/")
        if "@" in bucket or (":" in bucket and "@" in rest and not bucket.startswith("arn:")):
            raise ConfigError(
                f"{scheme}://***@{rest.rpartition('@')[2]} holds a name or password, which URLs must not",
                hint="give access_key_id= and secret_access_key=, or set the environment",
            )
        if scheme == "file":
            return cls("file", "", _file_path(text, bucket, key))
        if not bucket and scheme != "memory":
            raise ConfigError(f"no bucket in {text!r}", hint=f"write {scheme}://BUCKET/PREFIX")
        return cls(scheme, bucket, key)

    def __str__(self) -> str:
        """The inverse of `parse`: percent-encodes what a ``file://`` URL must not hold."""
        if self.scheme == "file":
            return f"file://{_FILE_QUOTED.sub(_quoted, self.key)}"
        return f"{self.scheme}://{self.bucket}/{self.key}" if self.key else f"{self.scheme}://{self.bucket}"

    @property
    def base(self) -> str:
        """It without the slash at its end, for ``f"{base}/{key}"``; of the root folder ``file://``."""
        return str(self).removesuffix("/") if self.key else f"{self.scheme}://{self.bucket}"

    def split(self) -> tuple[ObjectURL, str]:
        """(the folder it lies in, its name there); the name is empty where it ends with a slash or is a bucket."""
        folder, slash, name = self.key.rpartition("/")
        return ObjectURL(self.scheme, self.bucket, (folder or "/") if self.scheme == "file" else folder + slash), name

    def joined(self, key: str) -> ObjectURL:
        """What stands under `key` below this folder."""
        return ObjectURL(self.scheme, self.bucket, f"{self.key.removesuffix('/')}/{key}" if self.key else key)


Location: TypeAlias = str | os.PathLike[str] | ObjectURL
"""A URL or a local path, as everything that opens something takes them."""

_FILE_QUOTED: Final = re.compile("[%?#\x00-\x20\x7f\ud800-\udfff]")


def _quoted(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(match[0]))


def _one_slash(path: str) -> str:
    return path[1:] if path.startswith("//") else path


def _file_path(text: str, host: str, path: str) -> str:
    """The path of a ``file://`` URL, normalised before it is decoded: an encoded ``..`` is a name, and no file can have it."""
    if host not in ("", "localhost"):
        raise ConfigError(f"{text!r} names a host, {host!r}", hint="write file:///absolute/path, or a path without file://")
    found = unquote(_one_slash(posixpath.normpath(f"/{path}")), errors="surrogateescape")
    if "\0" in found or not {".", ".."}.isdisjoint(found.split("/")):
        raise ConfigError(
            f"{text!r} hides a step upwards or a zero byte in percent-encodings", hint="write the path as it is meant, plainly"
        )
    return found


def _of_scheme(scheme: str) -> str:
    if scheme in ("http", "https"):
        return "an S3 server's address goes into endpoint_url=, the bucket into s3://BUCKET"
    return {"gcs": "Google's is gs://", "s3a": "say s3://", "s3n": "say s3://", "azure": "say az://", "abfs": "say az://"}.get(
        scheme, "or a path without a scheme"
    )


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
    attributes: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """What else `ObjectStore.head` was told, by the names in `ATTRIBUTES`; what the store does not tell is absent."""

    def renamed(self, key: str) -> ObjectMeta:
        """The same under another key."""
        about = self.content_type, self.version_id, self.metadata, self.attributes
        return ObjectMeta(key, self.size, self.etag, self.last_modified, *about)

    def __reduce__(self) -> tuple[Any, ...]:  # a MappingProxyType does not pickle
        about = self.content_type, self.version_id, dict(self.metadata), dict(self.attributes)
        return ObjectMeta, (self.key, self.size, self.etag, self.last_modified, *about)


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
class NetworkState:
    """What was measured of one endpoint in this process, and what follows from it now."""

    connections: int
    """Requests that may be under way at a time."""
    why: str
    """What the number of connections goes back to."""
    throttled: int
    """Answers that said "slow down"."""
    first_byte: float
    """Seconds to the first byte where nothing is in the way (the first quartile); 0: unknown."""
    hedged: int
    """Ranges asked for a second time because their answer took long."""
    hedges_won: int
    """Those of which the second answer came first."""


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


class ReadGate(Protocol):
    """Of a `ReadRequest` that need not be made where another process makes it.

    Both methods are called by the thread that reads, one after the other, where a bulk call reads by threads or one range after
    the other; the pump, which reads only while it is waited for, passes gates over. They raise nothing.
    """

    def begin(self) -> bool:
        """Whether to make the request now; if not, a failure takes the place of its result."""
        ...

    def end(self, data: memoryview | None) -> None:
        """These bytes have come; None: none, and the request may be made again, past the gate."""
        ...


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
    gate: ReadGate | None = field(default=None, compare=False)
    """Is asked before the request is made, and told when it is over."""


@dataclass(frozen=True, slots=True)
class PutRequest:
    """One write of a bulk call."""

    key: str
    data: Buffer
    mode: PutMode = "overwrite"
    content_type: str | None = None
    tag: Any = None
    """Comes back untouched in a `PutFailure`."""
    metadata: Mapping[str, str] | None = None
    """User metadata."""
    attributes: Mapping[str, str] | None = None
    """What else describes the object, as in `ObjectStore.put`."""


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
