"""`S3Backend`: every verb of S3 over our own client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from threading import local
from typing import Any, Final
from urllib.parse import quote, urlencode
from xml.etree.ElementTree import Element

from s3loader.checksum import md5_base64
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    StoreError,
    UnavailableError,
    UnsupportedOperationError,
)
from s3loader.ranges import split
from s3loader.store.arguments import bare_etag, is_plain_key
from s3loader.store.backend import Driver, ReadResult
from s3loader.store.buffers import BufferPool, shared_pool
from s3loader.store.client_errors import no_descriptor
from s3loader.store.options import MAX_PARTS, StoreOptions
from s3loader.store.ordered import map_ordered
from s3loader.store.s3.blocking import Threads, perform
from s3loader.store.s3.careful import CarefulPath
from s3loader.store.s3.connection import Connections
from s3loader.store.s3.http import Head, checked_header, condition_headers, query_of, quoted_etag
from s3loader.store.s3.in_flight import Hedges
from s3loader.store.s3.jobs import EndpointContext, Job, Scratch, TlsReader
from s3loader.store.s3.pump import Pump
from s3loader.store.s3.reads import ReadJob
from s3loader.store.s3.small import SmallJob, document, head_job
from s3loader.store.s3.writes import PartJob, PutJob
from s3loader.store.s3.xml import (
    Page,
    complete_document,
    delete_document,
    is_xml_text,
    read_delete_failures,
    read_page,
    read_parts,
    read_tags,
    read_uploads,
    text_of,
)
from s3loader.store.s3errors import Condition, Where, condition_of, from_status, refuses_checksums
from s3loader.types import (
    ATTRIBUTES,
    Buffer,
    CommonPrefix,
    DeleteFailure,
    NetworkState,
    ObjectMeta,
    PartResult,
    PutMode,
    PutRequest,
    PutResult,
    ReadRequest,
)
from s3loader.units import MIB

__all__ = ["S3Backend"]

_LARGE_PUT: Final = 512 << 10
"""From this size on a thread that blocks in `sendmsg` costs half of what a socket costs that takes a little at a time
(1 MiB: 0.19 against 0.28 CPU-s/GB, 8 MiB: 0.12 against 0.24; `make bench-get`, write cases)."""
_LARGE_READ: Final = 4 << 20
"""From this size on, into the caller's memory, threads that receive 16 MiB in one call keep both cores busy, where the pump
comes back for every piece: 5.0 against 4.3 GB/s (`make bench-ckpt`). Not over TLS, where decrypting takes the time."""
_ONE_COPY: Final = 5 << 30
"""The most bytes of one CopyObject."""
_COPY_PART: Final = 256 * MIB
_COPY_THREADS: Final = 8
_THROUGH: Final = 64 * MIB
"""A conditional copy up to this size goes through this process."""
_DELETE_BATCH: Final = 1000
"""The most keys of one DeleteObjects."""
_ENCRYPTION: Final = ATTRIBUTES["server_side_encryption"]
_KMS_KEY: Final = ATTRIBUTES["ssekms_key_id"]
_ENTRIES: Final = ("Contents", "CommonPrefixes", "Upload", "Part")
_KEPT_BY_COPIES: Final = (
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "expires",
    "x-amz-storage-class",
    "x-amz-website-redirect-location",
)
"""What describes an object beside its type and metadata, and goes with it when it is copied through this process."""


class S3Backend:
    """One bucket of S3, or of what speaks its protocol, over our own HTTP/1.1 client.

    GET, PUT, UploadPart, HEAD and DELETE go the fast path: keep-alive sockets, one signature, one head read strictly. Listings,
    copies, multipart control, and what the fast path cannot read, go the careful one, with the same signer,
    checks and errors. Safe to use from several threads and after fork.

    Args:
        endpoint: The bucket.
        credentials: Where the keys come from.
        options: Timeouts, redirects, who pays.
        buffers: Where bodies are received; default the process's shared pool.
        proxy: URL of a proxy to go through.
        tls_reader: Reads over TLS beside a busy main thread; None: our own threads do it.
    """

    PUT_LIMIT: Final = 5 << 30
    """Most bytes of one put."""
    emits_events = True
    """It emits the events of its own requests."""

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: CredentialsSource,
        options: StoreOptions | None = None,
        *,
        buffers: BufferPool | None = None,
        proxy: str | None = None,
        tls_reader: TlsReader | None = None,
    ) -> None:
        self.url = f"s3://{endpoint.bucket}"
        self._options = options = options or StoreOptions()
        self.proxy = proxy
        self._connections = Connections(endpoint, options.connect_timeout, options.read_timeout, hedge=options.hedge_reads)
        self._context = EndpointContext(
            self._connections,
            credentials,
            buffers or shared_pool(),
            options,
            CarefulPath(self._connections, credentials, options, proxy),
            self.url,
            tls_reader,
            careful_only=proxy is not None,
        )
        self._scratches = local()
        self._etag_told = False

    @property
    def engine(self) -> str:
        """``direct``."""
        return "direct"

    @property
    def tls_reader(self) -> TlsReader | None:
        """What reads over TLS beside a busy main thread; None: our own threads."""
        return self._context.tls_reader

    @property
    def bulk(self) -> S3Backend:
        """It runs many requests itself: on the pump, or in threads."""
        return self

    # one at a time

    def _scratch(self) -> Scratch:
        """This thread's."""
        scratch: Scratch | None = getattr(self._scratches, "scratch", None)
        if scratch is None:
            scratch = self._scratches.scratch = Scratch()
        return scratch

    def _perform(self, job: Job) -> Any:
        perform(job, self._connections, self._scratch())
        if job.error is not None:
            raise job.error
        return job.result

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _small(
        self,
        op: str,
        verb: str,
        method: str,
        key: str | None,
        condition: Condition = None,
        about: str = "",
        **request: Any,
    ) -> Any:
        """A request to the object `key`; None: to the bucket, and `about` is the key or prefix that it concerns."""
        context = self._context
        where = Where(verb, self._at(about if key is None else key), condition)
        path = (lambda: context.endpoint.path("")) if key is None else (lambda: context.object_path(key))
        return self._perform(SmallJob(context, op, where, method, path, **request))

    def _document(self, op: str, verb: str, method: str, key: str | None, *roots: str, **request: Any) -> tuple[Head, Element]:
        """As `_small`; success is an XML document with one of these roots."""
        where = Where(verb, self._at(request.get("about", "") if key is None else key), request.get("condition"))
        found: tuple[Head, Element] = self._small(op, verb, method, key, read=document(roots, where), **request)
        return found

    # reading

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` of an object."""
        job = ReadJob(self._context, ReadRequest(key, start, end, if_match), version_id)
        result: ReadResult = self._perform(job)
        return job.meta(), result.data

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` with bytes of an object."""
        job = ReadJob(self._context, ReadRequest(key, start, None, if_match, buffer))
        self._perform(job)
        return job.meta()

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object. A 404 without a body does not tell whether it is the bucket that is missing."""
        meta: ObjectMeta = self._perform(head_job(self._context, key, version_id))
        return meta

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
        """Write one object atomically, its checksum signed."""
        condition_of(mode)
        headers = _described(None, metadata, attributes) if metadata or attributes else None
        job = PutJob(self._context, PutRequest(key, data, mode, content_type), headers)
        perform(job, self._connections, self._scratch())
        if job.error is not None:
            raise job.error
        result: PutResult = job.result
        return result

    def put_with_checksum(self, key: str, data: Buffer, checksum: str) -> PutResult:
        """Put, telling the server that the CRC32C of `data` is `checksum` (base64), right or wrong.

        Where it refuses CRC32C, a Content-MD5 that is right or wrong takes its place, as in `put`.
        """
        self.put(key, data)  # finds out which
        result: PutResult = self._perform(PutJob(self._context, PutRequest(key, data), checksum=checksum))
        return result

    def delete(self, key: str) -> None:
        """Delete; a key that does not exist is no error."""
        self._remove("DELETE", "delete", key, health=self._context.heads)

    def _remove(self, op: str, verb: str, key: str, **request: Any) -> None:
        """A DELETE; what is gone is no error, unless it is the bucket."""
        try:
            self._small(op, verb, "DELETE", key, success=(204, 200), read=lambda head, body: None, **request)
        except BucketNotFoundError:
            raise
        except ObjectNotFoundError:
            return

    def delete_many(self, keys: Sequence[str]) -> list[DeleteFailure]:
        """Delete all, 1000 keys a request; one by one where the server has no DeleteObjects, or XML cannot name the key."""
        failures: list[DeleteFailure] = []
        unique = list(dict.fromkeys(keys))
        plain = [key for key in unique if is_xml_text(key)]
        single = [key for key in unique if not is_xml_text(key)]
        for at in range(0, len(plain), _DELETE_BATCH):
            batch = plain[at : at + _DELETE_BATCH]
            try:
                failures += self._delete_batch(batch)
            except StoreError as error:
                if error.status not in (400, 405, 501):
                    raise
                single += batch  # a server without it, or one that wants another checksum with it
        for key in single:
            try:
                self.delete(key)
            except BucketNotFoundError:
                raise
            except StoreError as error:
                failures.append(DeleteFailure(key, error))
        return failures

    def _delete_batch(self, keys: Sequence[str]) -> list[DeleteFailure]:
        data = delete_document(keys)
        _, found = self._document(
            "DELETE",
            "delete",
            "POST",
            None,
            "DeleteResult",
            about=keys[0],
            query="delete=",
            headers={"content-md5": md5_base64(data), "content-type": "application/xml"},
            data=data,
            objects=lambda _: len(keys),
        )
        failures = []
        asked = set(keys)
        for key, code, message in read_delete_failures(found):
            error = from_status(None, code, message, Where("delete", f"{self.url}/{key}"))
            if key not in asked:
                raise StoreError(f"the store tells of a key that was not asked for: {key!r}", op="delete", url=self.url)
            if not isinstance(error, ObjectNotFoundError):
                failures.append(DeleteFailure(key, error))
        return failures

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside the bucket, with all that describes the object. Over 5 GiB it goes part by part.

        Few servers know conditions on a copy and those that do not ignore them silently. So a
        conditional copy ends in the write that most of them honour: a put, through this process,
        up to 64 MiB; the completion of a multipart upload above.
        """
        condition_of(mode)
        look = head_job(self._context, source)
        meta: ObjectMeta = self._perform(look)
        assert look.head is not None
        told = look.head.headers()
        kept: dict[str, str] = {name: told[name] for name in _KEPT_BY_COPIES if name in told}
        if told.get(_ENCRYPTION, "").startswith("aws:kms"):  # the plain kind is the bucket's own affair
            kept |= {name: told[name] for name in (_ENCRYPTION, _KMS_KEY) if name in told}
        if mode == "overwrite" and meta.size <= _ONE_COPY:
            said = {name: kept[name] for name in ("x-amz-storage-class", _ENCRYPTION, _KMS_KEY) if name in kept}
            return self._copy_whole(meta, target, said)
        if told.get("x-amz-tagging-count", "0") != "0":
            kept["x-amz-tagging"] = urlencode(self.tags(source))
        headers: dict[str, str] = {**kept, **_described(None, meta.metadata)}
        if meta.size <= _THROUGH:
            meta, data = self.get(source, if_match=meta.etag)
            result: PutResult = self._perform(PutJob(self._context, PutRequest(target, data, mode, meta.content_type), headers))
            return result
        return self._copy_parts(meta, target, mode, headers)

    def tags(self, key: str, *, version_id: str | None = None) -> Mapping[str, str]:
        """Tags of an object."""
        query = query_of(tagging="") if version_id is None else query_of(tagging="", versionId=version_id)
        _, found = self._document("HEAD", "tags", "GET", key, "Tagging", query=query)
        return read_tags(found)

    def _copy_whole(self, source: ObjectMeta, target: str, said: Mapping[str, str]) -> PutResult:
        headers = {**self._copy_source(source), **said}
        path = self._context.object_path(target)
        where = Where("copy", f"{self.url}/{source.key}", "read")
        read = document(("CopyObjectResult",), where)
        job = SmallJob(self._context, "COPY", where, "PUT", lambda: path, headers=headers, read=read)
        head, found = self._perform(job)
        etag = bare_etag(text_of(found, "ETag"))
        return PutResult(target, etag or self.head(target).etag, source.size, head.version_id)

    def _copy_source(self, source: ObjectMeta) -> dict[str, str]:
        named = quote(f"/{self._connections.endpoint.bucket}/{source.key}", safe="/-_.~")
        headers = {"x-amz-copy-source": named}
        return {**headers, "x-amz-copy-source-if-match": quoted_etag(source.etag)} if source.etag else headers

    def _copy_parts(self, source: ObjectMeta, target: str, mode: PutMode, headers: Mapping[str, str]) -> PutResult:
        upload_id = self._begin_upload(target, {**headers, **_described(source.content_type, None)})
        try:
            parts = self._copied_parts(source, target, upload_id, _COPY_PART)
            return self.complete_multipart(target, upload_id, parts, mode=mode)
        except BaseException:
            with contextlib.suppress(StoreError):
                self.abort_multipart(target, upload_id)
            raise

    def _copied_parts(self, source: ObjectMeta, target: str, upload_id: str, part_size: int) -> list[PartResult]:
        """Fill an upload of `target` from `source`, which must stay what it is; the first error ends it."""
        ranges = split(0, source.size, max(part_size, -(-source.size // MAX_PARTS)))

        def one(part: tuple[int, tuple[int, int]]) -> PartResult:
            number, (start, end) = part
            _, found = self._document(
                "COPY",
                "copy",
                "PUT",
                target,
                "CopyPartResult",
                condition="read",
                query=query_of(partNumber=number, uploadId=upload_id),
                headers={**self._copy_source(source), "x-amz-copy-source-range": f"bytes={start}-{end - 1}"},
            )
            etag = bare_etag(text_of(found, "ETag"))
            return PartResult(number, etag, end - start, text_of(found, "ChecksumCRC32C") or None)

        return [*map_ordered(one, enumerate(ranges, 1), concurrency=_COPY_THREADS, name="s3loader-copy")]

    # listing

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries in order of their keys' UTF-8 bytes, one page of 1000 at a time."""
        parameters: dict[str, str | int] = {"list-type": 2, "encoding-type": "url", "prefix": prefix}
        if delimiter:
            parameters["delimiter"] = delimiter
        if start_after:
            parameters["start-after"] = start_after
        return self._paged("list", None, prefix, ("ListBucketResult",), read_page, parameters)

    def _paged(
        self,
        verb: str,
        key: str | None,
        about: str,
        roots: Sequence[str],
        read: Callable[[Element], Page[Any]],
        parameters: Mapping[str, str | int],
    ) -> Iterator[Any]:
        """The entries of a listing, page after page.

        Args:
            verb: For errors.
            key: Of the object whose listing it is; None: the bucket's.
            about: The key or prefix that it concerns, for errors and events.
            roots: Of its document.
            read: Makes a page of the document.
            parameters: Of the query of the first page; later ones add where they begin.
        """
        after: Mapping[str, str | int] = {}
        while True:
            query = query_of(**{**parameters, **after})
            _, found = self._document("LIST", verb, "GET", key, *roots, about=about, query=query, objects=_listed)
            try:
                page = read(found)
            except (ValueError, OverflowError) as error:
                raise UnavailableError(f"the listing cannot be read: {error}", op=verb, url=self._at(about)) from error
            yield from page.entries
            if not page.truncated:
                return
            if not page.after or page.after == after:
                raise StoreError("the server's listing does not go on", op=verb, url=self._at(about))
            after = page.after

    # multipart

    def create_multipart(
        self,
        key: str,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Begin an upload, declared to carry CRC32C part by part."""
        return self._begin_upload(key, _described(content_type, metadata, attributes))

    def _begin_upload(self, key: str, headers: Mapping[str, str]) -> str:
        if not is_xml_text(key):
            raise UnsupportedOperationError(
                f"the documents of a multipart upload cannot name the key {key!r}",
                op="create upload",
                url=self.url,
                hint="leave out control characters, or write it in one put (up to 5 GiB)",
            )
        context = self._context
        request: dict[str, Any] = {"query": "uploads=", "resendable": False}
        names = "InitiateMultipartUploadResult", "InitiateMultipartUpload"  # rclone says the second
        if context.checksums:
            declared = {**headers, "x-amz-checksum-algorithm": "CRC32C"}
            try:
                _, found = self._document("MULTIPART", "create upload", "POST", key, *names, headers=declared, **request)
                return self._upload_id(found, key)
            except StoreError as error:
                if not refuses_checksums(error):
                    raise
        _, found = self._document("MULTIPART", "create upload", "POST", key, *names, headers=headers, **request)
        context.checksums = False  # it was the checksum, then
        return self._upload_id(found, key)

    def _upload_id(self, found: Element, key: str) -> str:
        upload_id = text_of(found, "UploadId")
        if not upload_id:
            raise UnavailableError("the store began an upload without an id", op="create upload", url=f"{self.url}/{key}")
        return upload_id

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload one part, its checksum signed."""
        result: PartResult = self._perform(PartJob(self._context, key, upload_id, number, data))
        return result

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        """Make the object from its parts. Success is the document that says so, not the status. An upload without parts becomes
        an empty object."""
        condition = condition_of(mode)
        uploaded = [*parts] or [self.upload_part(key, upload_id, 1, b"")]
        headers = {"content-type": "application/xml", **condition_headers(mode)}
        head, found = self._document(
            "MULTIPART",
            "complete upload",
            "POST",
            key,
            "CompleteMultipartUploadResult",
            condition=condition,
            query=query_of(uploadId=upload_id),
            headers=headers,
            data=complete_document(uploaded),
            resendable=False,
        )
        size = sum(part.size for part in uploaded)
        etag = self._etag_made(key, bare_etag(text_of(found, "ETag")), size)
        return PutResult(key, etag, size, head.version_id)

    def _etag_made(self, key: str, told: str, size: int) -> str:
        """The ETag that reads will show: Ceph tells none here and rclone another one, so the first
        completion is compared with the object, and where they differ every one is."""
        if self._etag_told and told:
            return told
        try:
            meta = self.head(key)
        except StoreError:
            return told  # the upload is complete; not being able to look at it is no failure of it
        self._etag_told = meta.etag == told
        return meta.etag if meta.size == size else told

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drop the parts; an upload that is gone is no error."""
        self._remove("MULTIPART", "abort upload", key, query=query_of(uploadId=upload_id))

    def list_multipart(self, prefix: str = "") -> Iterator[tuple[str, str, float | None]]:
        """Open uploads, one page of 1000 at a time."""
        asked: dict[str, str | int] = {"encoding-type": "url", "prefix": prefix, "uploads": ""}
        return self._paged("list uploads", None, prefix, ("ListMultipartUploadsResult",), read_uploads, asked)

    def list_parts(self, key: str, upload_id: str) -> Iterator[PartResult]:
        """Parts of an open upload, one page of 1000 at a time."""
        roots = "ListPartsResult", "ListPartsResponse"  # moto says the second
        return self._paged("list parts", key, key, roots, read_parts, {"uploadId": upload_id})

    # many at once

    def read_many(
        self, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver = "auto"
    ) -> Iterator[ReadResult]:
        """Reads in order. ``"auto"`` is the pump, but threads for large reads into the caller's memory."""
        return _raising(self.read_outcomes(requests, max_bytes=max_bytes, concurrency=concurrency, driver=driver))

    def read_outcomes(
        self, requests: Iterable[ReadRequest], *, max_bytes: int, concurrency: int, driver: Driver = "auto"
    ) -> Iterator[ReadResult | BaseException]:
        """As `read_many`, but an error takes the place of its result, and the rest follows.

        Over TLS, ``"threads"`` reads by obstore's sockets where there are any: `ssl` asks for the GIL every 16 KiB, Rust does
        not.
        """
        context = self._context
        waiting = iter(requests)
        first = next(waiting, None)
        if first is None:
            return
        tls = context.endpoint.tls
        if driver == "auto" and first.into is not None and first.into.nbytes >= _LARGE_READ and not tls:
            driver = "threads"
        reader = context.tls_reader
        aside = driver == "threads" and tls and reader is not None and reader.usable()
        jobs = (
            ReadJob(context, request, by_tls_reader=aside and is_plain_key(request.key)) for request in chain((first,), waiting)
        )
        yield from self._run(jobs, max_bytes, concurrency, driver)

    def put_many(
        self, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver = "auto"
    ) -> Iterator[PutResult]:
        """Writes in order."""
        return _raising(self.put_outcomes(requests, max_bytes=max_bytes, concurrency=concurrency, driver=driver))

    def put_outcomes(
        self, requests: Iterable[PutRequest], *, max_bytes: int, concurrency: int, driver: Driver = "auto"
    ) -> Iterator[PutResult | BaseException]:
        """As `put_many`, but an error takes the place of its result, and the rest follows."""
        waiting = iter(requests)
        first = next(waiting, None)
        if first is None:
            return
        if driver == "auto" and memoryview(first.data).nbytes >= _LARGE_PUT:
            driver = "threads"
        jobs = (
            PutJob(self._context, r, _described(None, r.metadata, r.attributes) if r.metadata or r.attributes else None)
            for r in chain((first,), waiting)
        )
        yield from self._run(jobs, max_bytes, concurrency, driver)

    def _run(self, jobs: Iterator[Job], max_bytes: int, concurrency: int, driver: Driver) -> Iterator[Any]:
        kind = Threads if driver == "threads" else Pump
        try:
            done = kind(jobs, self._connections, max_bytes=max_bytes, concurrency=concurrency).run()
        except OSError as error:
            raise no_descriptor("run many requests at", self.url) from error
        try:
            for job in done:
                yield job.result if job.error is None else job.error
        finally:
            done.close()  # now, not when it is collected

    def network(self) -> NetworkState:
        """What was measured of the endpoint."""
        in_flight, hedges = self._connections.in_flight, self._connections.hedges or Hedges()
        return NetworkState(in_flight.limit, in_flight.why, in_flight.throttled, hedges.usual, hedges.asked, hedges.won)

    def open_ahead(self, count: int, *, reads: bool = False) -> None:
        """Begin to open connections until `count` are idle or on their way, and one for listings. `reads`: so many reads may be
        under way at once from now on."""
        if reads:
            self._connections.in_flight.expect(count)
        self._connections.open_ahead(count)
        threading.Thread(target=self._context.careful.open_ahead, daemon=True, name="s3loader-connect").start()

    def close(self) -> None:
        """Let go of connections; closing twice is fine."""
        self._connections.close()
        self._context.careful.close()

    def __reduce__(self) -> tuple[Any, ...]:
        context = self._context
        arguments = (context.endpoint, context.credentials, self._options, self.proxy, context.tls_reader)
        return _rebuild, arguments


def _rebuild(
    endpoint: Endpoint,
    credentials: CredentialsSource,
    options: StoreOptions,
    proxy: str | None,
    tls_reader: TlsReader | None,
) -> S3Backend:
    return S3Backend(endpoint, credentials, options, proxy=proxy, tls_reader=tls_reader)


def _listed(found: tuple[Head, Element]) -> int:
    """Entries of a page of any listing."""
    return sum(child.tag.rpartition("}")[2] in _ENTRIES for child in found[1])


def _described(
    content_type: str | None, metadata: Mapping[str, str] | None, attributes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Headers of a write that describe the object."""
    headers = {f"x-amz-meta-{name.lower()}": checked_header(name, value) for name, value in (metadata or {}).items()}
    for name, value in (attributes or {}).items():
        headers["x-amz-tagging" if name == "tagging" else ATTRIBUTES[name]] = checked_header(name, value)
    return {**headers, "content-type": checked_header("content_type", content_type)} if content_type else headers


def _raising(outcomes: Iterator[Any]) -> Iterator[Any]:
    try:
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        outcomes.close()  # type: ignore[attr-defined]  # a generator: its connections are let go now
