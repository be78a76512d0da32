"""The obstore engine: GCS and Azure. On S3 it has one duty: reads over TLS beside a busy main thread (`ObstoreS3Reader`).

Measured at 0.5-0.7 CPU-s per GB, it is the second fastest engine, and the fastest over TLS beside a busy
main thread, since Rust needs no GIL to decrypt. It is path-minded and has no part-wise multipart
interface, which sets the limits named at each class.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from s3loader.checksum import file_crc32c_base64
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.errors import (
    BucketNotFoundError,
    NoSpaceError,
    ObjectNotFoundError,
    RangeError,
    StoreError,
    TruncatedError,
    UnsupportedOperationError,
)
from s3loader.ranges import first_byte
from s3loader.store.arguments import bare_etag, is_plain_key
from s3loader.store.backend import BulkBackend, Op, roll_up
from s3loader.store.obstore import runtime as obstore_runtime
from s3loader.store.obstore.client import ObstoreClient, from_identifier, meta_of, open_s3, standard_of, to_identifier
from s3loader.store.options import StoreOptions
from s3loader.store.s3errors import Where, check_etag, condition_of, read_nothing
from s3loader.types import (
    Buffer,
    CommonPrefix,
    DeleteFailure,
    ObjectMeta,
    PartResult,
    PutMode,
    PutResult,
    Update,
)

__all__ = ["ObstoreBackend", "ObstoreS3Reader"]

_CHUNK: Final = 8 << 20


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


# -- the engine ------------------------------------------------------------------------------------

_PAGES: Final = {"gs": 1000, "az": 5000}
"""Most entries of an answer to a listing."""


class ObstoreBackend:
    """One bucket of GCS (``gs://``) or container of Azure (``az://``).

    Limits, most of obstore's interface: keys with an empty, ``.`` or ``..`` segment or a control
    character are refused, on Azure those with a backslash too (it becomes a slash there); Azure's
    metadata names are identifiers, so others are escaped there (``a-b`` as ``a_x2d_b``); the parts of
    a multipart upload are kept in a temporary folder until it is completed, so an upload id means
    something in its own process only, and only such uploads are listed; uploads carry no checksum; Azure
    lists keys beyond U+FFFF in an order of its own (UTF-16);
    a forked child of a process that had obstore loaded cannot use it.

    Args:
        scheme: ``gs`` or ``az``.
        bucket: Its name.
        client: Makes and calls the obstore store.
    """

    PUT_LIMIT: Final = 5 << 30
    """Most bytes of one put."""
    bulk: BulkBackend | None = None
    """Threads run its single verbs."""
    emits_events = True
    """It emits the events of its own requests; an upload of many parts is one, for obstore does not tell of them."""

    def __init__(self, scheme: str, bucket: str, client: ObstoreClient) -> None:
        self.scheme = scheme
        self.bucket = bucket
        self.url = f"{scheme}://{bucket}"
        self._client = client
        self._spool = Spool()

    @property
    def engine(self) -> str:
        """``direct``, ``obstore``, ``boto3``, ``file``, ``memory``; for events and `explain`."""
        return "obstore"

    def _check_key(self, key: str) -> None:
        if not is_plain_key(key) or (self.scheme == "az" and "\\" in key):
            raise UnsupportedOperationError(
                f"{self.scheme}:// by obstore cannot keep the key {key!r} as it is",
                url=self.url,
                hint='avoid "//", ".", "..", a "/" at either end, and on Azure "\\"',
            )

    def _meta(self, key: str, answer: Any) -> ObjectMeta:
        meta = meta_of(key, answer.meta, answer.attributes)
        if self.scheme == "az" and meta.metadata:
            return replace(meta, metadata={from_identifier(name): value for name, value in meta.metadata.items()})
        return meta

    # reading

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` (to the end of the object where `end` is None or beyond it)."""
        where = Where("get", self._client.at(key), "read")
        if end is not None and end <= start:
            return read_nothing(self, key, start, if_match, version_id, where), b""
        try:
            meta, data = self._fetch("get", key, start, end, if_match, version_id)
        except RangeError:
            if end is not None:
                raise
            return read_nothing(self, key, start, if_match, version_id, where), b""
        return meta, data

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` (1-D, format ``B``, writable) with ``len(buffer)`` bytes from `start`. obstore fills buffers of its
        own: this is one copy more."""
        where = Where("read", self._client.at(key), "read")
        if not len(buffer):
            return read_nothing(self, key, start, if_match, None, where)
        end = start + len(buffer)
        meta, data = self._fetch("read", key, start, end, if_match, None)
        if len(data) < len(buffer):
            raise RangeError(f"it has {meta.size} bytes, asked for [{start}, {end})", op="read", url=where.url)
        buffer[:] = data
        return meta

    def _fetch(
        self, verb: Op, key: str, start: int, end: int | None, if_match: str | None, version_id: str | None
    ) -> tuple[ObjectMeta, memoryview]:
        self._check_key(key)
        options: dict[str, Any] = {}
        if start or end is not None:
            options["range"] = (start, end) if end is not None else {"offset": start} if start >= 0 else {"suffix": -start}
        if if_match is not None:
            options["if_match"] = f'"{bare_etag(if_match)}"'
        if version_id is not None:
            options["version"] = version_id

        answer, body = self._client.read(
            verb,
            key,
            lambda obs, store: obs.get(store, key, options=options),
            lambda answer: memoryview(answer.bytes()),
            start if start >= 0 else None,
            part="range" in options,
        )
        meta = self._meta(key, answer)
        where = Where(verb, self._client.at(key), "read")
        check_etag(meta.etag, if_match, where)
        data = memoryview(body)
        start = first_byte(start, meta.size)
        stop = meta.size if end is None else min(end, meta.size)
        if tuple(answer.range) != (start, stop):
            raise StoreError(f"asked for bytes [{start}, {stop}), got {answer.range}", op=verb, url=where.url, retryable=True)
        if len(data) != stop - start:
            raise TruncatedError(f"{len(data)} bytes came of {stop - start}", op=verb, url=where.url, retryable=True)
        return meta, data

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object, without its bytes."""
        self._check_key(key)
        options: dict[str, Any] = {"head": True}
        if version_id is not None:
            options["version"] = version_id
        answer = self._client.call("head", key, lambda obs, store: obs.get(store, key, options=options))
        return self._meta(key, answer)

    # writing

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> PutResult:
        """Write one object atomically: readers see the old one or the new one, whole."""
        return self._put("put", key, (data,), len(data), mode, content_type, metadata, attributes)

    def _put(
        self,
        verb: Op,
        key: str,
        pieces: Iterable[Buffer],
        size: int,
        mode: PutMode,
        content_type: str | None,
        metadata: Mapping[str, str] | None,
        attributes: Mapping[str, str] | None,
        *,
        multipart: bool = False,
    ) -> PutResult:
        condition = condition_of(mode)
        self._check_key(key)
        if self.scheme == "az":
            metadata = {to_identifier(name): value for name, value in (metadata or {}).items()}
        about = {**(metadata or {}), **({"Content-Type": content_type} if content_type else {})}
        options: dict[str, Any] = {
            "attributes": {**about, **standard_of(attributes, self._client.at(key))} or None,
            "mode": self._mode(key, mode),
            "use_multipart": multipart,
            "chunk_size": max(_CHUNK, -(-size // 9_000)),
        }
        body = obstore_runtime.lend(pieces)
        made = self._client.call(verb, key, lambda obs, store: obs.put(store, key, body, **options), condition, size=size)
        version = made.get("version")
        return PutResult(key, bare_etag(made.get("e_tag")), size, None if version == "null" else version)

    def _mode(self, key: str, mode: PutMode) -> Any:
        if not isinstance(mode, Update):
            return mode
        wanted: dict[str, Any] = {"e_tag": f'"{bare_etag(mode.etag)}"'}
        if self.scheme == "gs":  # GCS compares generations, not ETags
            try:
                meta = self.head(key)
            except BucketNotFoundError:
                raise
            except ObjectNotFoundError:
                meta = ObjectMeta(key, 0)
            check_etag(meta.etag, mode.etag, Where("put", self._client.at(key), "update"))
            if meta.version_id is not None:
                wanted["version"] = meta.version_id
        return wanted

    def delete(self, key: str) -> None:
        """Delete; a key that does not exist is no error."""
        self._check_key(key)
        try:
            self._client.call("delete", key, lambda obs, store: obs.delete(store, key))
        except BucketNotFoundError:
            raise
        except ObjectNotFoundError:
            return

    def delete_many(self, keys: Sequence[str]) -> list[DeleteFailure]:
        """Delete all; never raises for a single key, returns what failed. One by one: obstore's own bulk delete does not say
        what failed."""
        failures = []
        for key in dict.fromkeys(keys):
            try:
                self.delete(key)
            except BucketNotFoundError:
                raise
            except StoreError as error:
                failures.append(DeleteFailure(key, error))
        return failures

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside this root, on the server's side where it can. An update goes through this process, since no store knows
        it as a copy."""
        condition_of(mode)
        self._check_key(source)
        self._check_key(target)
        if isinstance(mode, Update):
            meta, data = self.get(source)
            return self.put(
                target, data, mode=mode, content_type=meta.content_type, metadata=meta.metadata, attributes=meta.attributes
            )
        overwrite = mode == "overwrite"
        self._client.call(
            "copy",
            source,
            lambda obs, store: obs.copy(store, source, target, overwrite=overwrite),
            condition_of(mode),
        )
        meta = self.head(target)
        return PutResult(target, meta.etag, meta.size, meta.version_id)

    # listing

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries whose key starts with `prefix`, in order of the UTF-8 bytes of their keys. obstore lists whole folders: a
        prefix that ends inside a name costs the listing of its folder, a delimiter that of all below it."""
        folder = prefix.rpartition("/")[0]
        return roll_up(self._walk(folder, prefix, start_after), prefix, delimiter, start_after)

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectMeta]:
        page = _PAGES.get(self.scheme, 1000)  # a chunk is an answer then
        stream: Any = None
        begun = False

        def following(obs: Any, store: Any) -> Any:
            nonlocal stream
            if stream is None:
                stream = obs.list(store, folder or None, offset=start_after or None, chunk_size=page)
            return next(stream, None)

        def counted(chunk: Any) -> int | None:
            return len(chunk) if chunk is not None else None if begun else 0  # the end is no answer of its own

        while True:
            chunk = self._client.call("list", prefix, following, told=counted)
            begun = True
            if chunk is None:
                return
            for entry in chunk:
                if entry["path"].startswith(prefix):
                    yield meta_of(entry["path"], entry, {})

    # multipart

    def create_multipart(
        self,
        key: str,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin a multipart upload; returns its upload id. The class says what an upload is here."""
        self._check_key(key)
        standard_of(attributes, self._client.at(key))
        return self._spool.create(key, content_type, metadata, attributes)

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload part `number` (1-based; all parts but the last at least 5 MiB on S3)."""
        return self._spool.add(self._client.at(key), key, upload_id, number, data)

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """Make the object from its parts. A conditional one is a single put and is held in memory."""
        condition_of(mode)
        upload, size = self._spool.check(self._client.at(key), key, upload_id, parts)
        chunks = self._spool.read(upload_id, parts)
        multipart = mode == "overwrite" and size > _CHUNK
        result = self._put("complete upload", key, chunks, size, mode, *upload.about, multipart=multipart)
        self._spool.drop(upload_id)
        return result

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the parts; an upload that is gone is no error."""
        self._spool.drop(upload_id)

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """Open multipart uploads: ``(key, upload_id, initiated seconds since the epoch)``. Those of this process."""
        return self._spool.uploads(prefix)

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """Parts that an open upload has, by number, as `complete_multipart` takes them. Of uploads of this process, whose parts
        are on disk here."""
        return iter(self._spool.parts(self._client.at(key), key, upload_id))

    def tags(self, key: str, *, version_id: str | None = None) -> Mapping[str, str]:
        """Not told by obstore.

        Raises:
            UnsupportedOperationError: always.
        """
        raise UnsupportedOperationError(
            "obstore does not read tags", op="tags", url=self._client.at(key), hint="read them with the tools of the cloud"
        )

    def close(self) -> None:
        """Let go of connections and threads; closing twice is fine. Parts of uploads that were not completed go too."""
        self._client.close()
        with contextlib.suppress(OSError):
            self._spool.close()


class ObstoreS3Reader:
    """Reads from one bucket; a `TlsReader`. Nothing of obstore is loaded before the first read.

    Args:
        endpoint: The bucket.
        credentials: Where the keys come from.
        options: Timeouts.
    """

    def __init__(self, endpoint: Endpoint, credentials: CredentialsSource, options: StoreOptions) -> None:
        self._made_of = endpoint, credentials, options
        url = f"s3://{endpoint.bucket}"
        client = ObstoreClient(url, lambda: open_s3(endpoint, credentials, options), credentials, tells=False)
        self._backend = ObstoreBackend("s3", endpoint.bucket, client)

    def usable(self) -> bool:
        """Whether it works in this process: not in a forked child of one that had obstore loaded."""
        return obstore_runtime.usable()

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` of an object."""
        return self._backend.get(key, start, end, if_match=if_match)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObstoreS3Reader, self._made_of
