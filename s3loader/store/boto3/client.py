"""A boto3 client that lives per process, and raises our errors; its parameters and answers in our terms.

Listings go without botocore's model of them: one pass over the page's XML. botocore's parser, and dateutil below it, cost some
70 us per key. Its client has an event before it parses an answer: there we take the entries out, and leave it an empty body.
All else (signing, regions, errors, errors with status 200) stays botocore's. Where the event or the XML is not as expected,
botocore parses the page as ever.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar
from xml.etree import ElementTree

from s3loader import events
from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.errors import S3LoaderError, StoreError, TruncatedError, UnsupportedOperationError
from s3loader.ranges import first_byte
from s3loader.store.arguments import bare_etag
from s3loader.store.backend import Op, key_bytes
from s3loader.store.boto3.watch import Watch
from s3loader.store.client_errors import from_botocore
from s3loader.store.options import MOST_THREADS, StoreOptions
from s3loader.store.s3.xml import read_page
from s3loader.store.s3errors import STALE_KEYS, Condition, Where
from s3loader.store.told import NAMES
from s3loader.types import ATTRIBUTES, Buffer, CommonPrefix, ObjectMeta, PutMode, Update

__all__ = [
    "BotoClient",
    "body",
    "body_range",
    "conditions",
    "described",
    "entries_of",
    "listed",
    "meta_of",
    "read_body",
    "read_pages_ourselves",
    "version",
]

T = TypeVar("T")


class BotoClient:
    """Calls boto3 for one bucket, with every error mapped.

    Our own client is made on first use in each process, without retries of its own (ours are
    around it). A client given by the user is used as it is, with its endpoint, credentials,
    retries and stubs; a forked child only gives it fresh connections, for those it inherits are
    the parent's.
    """

    def __init__(
        self, bucket: str, settings: S3Settings, credentials: CredentialsSource, options: StoreOptions, given: Any = None
    ) -> None:
        self.bucket = bucket
        self.root = f"s3://{bucket}"
        self.given = given
        self._settings = settings
        self._credentials = credentials
        self._options = options
        self._own: Any = None
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def get(self) -> Any:
        """This process's boto3 client."""
        if self._pid != os.getpid():
            # a new lock: the old one may have been held by a thread that does not exist here
            self._own, self._lock, self._pid = None, threading.Lock(), os.getpid()
            if self.given is not None:
                _drop_connections(self.given)
        if self.given is not None:
            return self.given
        if self._own is None:
            with self._lock:
                if self._own is None:
                    self._own = self._make()
        return self._own

    def _make(self) -> Any:
        from botocore.config import Config

        options = self._options
        client = self._settings.create_client(
            session=self._credentials.session(),
            anonymous=self._credentials.unsigned,
            config=Config(
                connect_timeout=options.connect_timeout,
                read_timeout=options.read_timeout,
                retries={"total_max_attempts": 1, "mode": "standard"},
                max_pool_connections=2 * (options.concurrency or MOST_THREADS),
                tcp_keepalive=True,
            ),
        )
        read_pages_ourselves(client)
        if options.requester_pays:
            client.meta.events.register("before-call.s3", _say_who_pays)
        return client

    def call(
        self,
        verb: Op,
        operation: str,
        key: str,
        parameters: Mapping[str, Any],
        condition: Condition = None,
        *,
        about: str | None = None,
        objects: Callable[[dict[str, Any]], int] | None = None,
    ) -> dict[str, Any]:
        """One boto3 operation on the bucket.

        Args:
            verb: What we call it, for errors and events.
            operation: Method of the client.
            key: For errors and events; give it to boto3 as a parameter too.
            parameters: Of the operation, all but the bucket.
            condition: What the request is conditional on, for errors.
            about: The key that its event names; default: `key`.
            objects: How many its answer concerns, for the event; default: one.
        """
        size = len(parameters.get("Body", b""))
        where = Where(verb, self.at(key), condition)
        told = NAMES[verb], self.at(key if about is None else about), None
        return self._ask(operation, parameters, where, told, lambda answer: (answer, size), objects)

    def read(self, verb: Op, key: str, parameters: Mapping[str, Any], offset: int, take: Callable[[dict[str, Any]], T]) -> T:
        """What `take` makes of an answer with a body, which it reads; it returns the bytes last, or that which holds them.

        Args:
            verb, key, parameters: As of `call`.
            offset: The first byte asked for; negative: from the end.
            take: Where it raises, the body is closed.
        """

        def taken(answer: dict[str, Any]) -> tuple[T, int]:
            try:
                result = take(answer)
            except BaseException:
                answer["Body"].close()  # half read: the connection is of no use any more
                raise
            return result, int(answer["ContentLength"])

        where = Where(verb, self.at(key), "read")
        return self._ask("get_object", parameters, where, (NAMES[verb], where.url, offset if offset >= 0 else None), taken)

    def _ask(
        self,
        operation: str,
        parameters: Mapping[str, Any],
        where: Where,
        told: tuple[str, str, int | None],
        take: Callable[[dict[str, Any]], tuple[T, int]],
        objects: Callable[[dict[str, Any]], int] | None = None,
    ) -> T:
        """What `take` makes of the answer; it says how many bytes were moved, too. `told`: name, URL, offset for the event."""
        watch: Watch | None = None
        try:
            client = self.get()
            if events.active():
                watch = Watch(client, where, *told)
            with watch or contextlib.nullcontext():
                answer = getattr(client, operation)(Bucket=self.bucket, **parameters)
            result, size = take(answer)
        except Exception as error:  # noqa: BLE001 - boto3's errors share no base; every one of them is mapped
            mapped = self._mapped(error, where)
            if watch is not None:
                watch.end(error=mapped)
            # a server's answer is told in full by ours; what broke below it is worth its traceback
            raise mapped from (None if mapped.status is not None or mapped is error else error)
        if watch is not None:
            watch.end(size, None, 1 if objects is None else objects(answer), answer)
        return result

    def _mapped(self, error: Exception, where: Where) -> S3LoaderError:
        """The error of ours that `error` is."""
        mapped = from_botocore(error, where)
        if mapped.code in STALE_KEYS:
            mapped.retryable = not self._credentials.static and self.given is None
            if mapped.retryable:
                self._own = None
                self._credentials.refresh()
        return mapped

    def at(self, key: str) -> str:
        """Full URL of `key`, for errors."""
        return f"{self.root}/{key}" if key else self.root

    def close(self) -> None:
        """Close our own client's connections."""
        own, self._own = self._own, None
        if own is not None and self._pid == os.getpid():
            own.close()


def _say_who_pays(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"


def _drop_connections(client: Any) -> None:
    """Give a user's client, in a forked child, a connection pool of its own.

    The pool's locks may be held for ever by threads of the parent, so it is replaced by one made
    of the same values; botocore has no public way to do this.
    """
    from botocore.httpsession import URLLib3Session

    endpoint: Any = getattr(client, "_endpoint", None)
    old: Any = getattr(endpoint, "http_session", None)
    if type(old) is not URLLib3Session:  # a stub's own
        return
    proxies, timeout = old._proxy_config, old._timeout
    endpoint.http_session = URLLib3Session(
        verify=old._verify,
        proxies=proxies._proxies,
        timeout=timeout if isinstance(timeout, (int, float)) else (timeout.connect_timeout, timeout.read_timeout),
        max_pool_connections=old._max_pool_connections,
        socket_options=old._socket_options,
        client_cert=(old._cert_file, old._key_file) if old._key_file else old._cert_file,
        proxies_config=proxies._proxies_settings,
    )


# -- boto3's answers and parameters in our terms ---------------------------------------------------

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def meta_of(key: str, answer: Mapping[str, Any], size: int | None = None) -> ObjectMeta:
    """The metadata in boto3's answer to GET or HEAD."""
    modified = answer.get("LastModified")
    version = answer.get("VersionId")
    return ObjectMeta(
        key=key,
        size=int(answer.get("ContentLength", 0)) if size is None else size,
        etag=bare_etag(answer.get("ETag")),
        last_modified=modified.timestamp() if modified is not None else None,
        content_type=answer.get("ContentType"),
        version_id=None if version == "null" else version,
        metadata={name.lower(): value for name, value in (answer.get("Metadata") or {}).items()},
        attributes=_attributes(answer),
    )


def _attributes(answer: Mapping[str, Any]) -> dict[str, str]:
    headers = (answer.get("ResponseMetadata") or {}).get("HTTPHeaders") or {}  # as sent: boto3 makes dates of some
    return {name: headers[header] for name, header in ATTRIBUTES.items() if header in headers}


def body_range(answer: Mapping[str, Any], start: int, end: int | None, where: Where) -> tuple[int, int]:
    """Length of the body and size of the object, from an answer to a read of ``[start, end)``.

    The answer is believed by what it says of itself: rclone sends ranges with status 200.

    Raises:
        UnsupportedOperationError: it is not a range though one was asked for.
        StoreError: it is another range.
    """
    length = int(answer["ContentLength"])
    ranged = answer.get("ContentRange")
    if not ranged:
        if first_byte(start, length) == 0 and (end is None or length <= end):
            return length, length
        raise UnsupportedOperationError(
            "the server ignores ranges", op=where.op, url=where.url, hint='use engine="direct", which reads around it'
        )
    if start < 0 and not length and ranged.strip() == "bytes 0--1/0":  # from the end of an empty object
        return 0, 0
    match = _CONTENT_RANGE.fullmatch(ranged.strip())
    if match is None or match[3] == "*":
        raise StoreError(f"the answer has no usable Content-Range: {ranged!r}", op=where.op, url=where.url)
    first, last, size = int(match[1]), int(match[2]), int(match[3])
    start = first_byte(start, size)
    stop = size if end is None else min(end, size)
    if (first, last + 1) != (start, stop) or length != stop - start:
        text = f"asked for bytes [{start}, {stop}), the answer has [{first}, {last + 1}) in {length} bytes"
        raise StoreError(text, op=where.op, url=where.url, retryable=True)
    return length, size


def read_body(body: Any, into: memoryview, where: Where) -> None:
    """Fill `into` from boto3's streaming body, straight from the socket where it has one."""
    raw: Any = getattr(body, "_raw_stream", None)
    response: Any = getattr(raw, "_fp", None)
    # urllib3's own readinto reads a bytes object and copies it
    direct = isinstance(response, http.client.HTTPResponse)
    source = response if direct else body
    filled, size = 0, len(into)
    while filled < size:
        got = source.readinto(into[filled:])
        if not got:
            raise TruncatedError(f"the body ended after {filled} of {size} bytes", op=where.op, url=where.url, retryable=True)
        filled += got
    if direct:
        response.close()  # all of it is read: the connection itself stays open
        raw.release_conn()


def body(data: Buffer) -> bytes | bytearray:
    """What boto3 takes for `data`: it knows no memoryview."""
    return data if isinstance(data, (bytes, bytearray)) else bytes(data)


_PARAMETERS: Final = {
    "cache_control": "CacheControl",
    "content_disposition": "ContentDisposition",
    "content_encoding": "ContentEncoding",
    "content_language": "ContentLanguage",
    "expires": "Expires",
    "storage_class": "StorageClass",
    "server_side_encryption": "ServerSideEncryption",
    "ssekms_key_id": "SSEKMSKeyId",
    "tagging": "Tagging",
}
"""Names of `s3loader.types.SETTABLE` as boto3 says them."""


def described(
    content_type: str | None, metadata: Mapping[str, str] | None, attributes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Parameters of a write that describe the object."""
    found: dict[str, Any] = {"ContentType": content_type} if content_type else {}
    found |= {_PARAMETERS[name]: value for name, value in (attributes or {}).items()}
    return {**found, "Metadata": dict(metadata)} if metadata else found


def conditions(mode: PutMode) -> dict[str, str]:
    """Parameters that make a write conditional."""
    if isinstance(mode, Update):
        return {"IfMatch": f'"{bare_etag(mode.etag)}"'}
    return {"IfNoneMatch": "*"} if mode == "create" else {}


def version(answer: Mapping[str, Any]) -> str | None:
    """The version id in an answer; None where versions are off."""
    found = answer.get("VersionId")
    return None if found == "null" else found


def listed(entry: Mapping[str, Any]) -> ObjectMeta:
    """One object of a listing."""
    modified = entry.get("LastModified")
    return ObjectMeta(
        entry["Key"], int(entry["Size"]), bare_etag(entry.get("ETag")), modified.timestamp() if modified is not None else None
    )


# -- listings --------------------------------------------------------------------------------------

_ENTRIES: Final = "S3LoaderEntries"


def read_pages_ourselves(client: Any) -> None:
    """Have `client`, a boto3 client of our own, hand its listings to `s3.xml.read_page`."""
    # The wildcard puts it in front of botocore's own handlers, of which one would parse the page once more
    # to look for an error with status 200.
    client.meta.events.register_first("before-parse.*.ListObjectsV2", _take)


def entries_of(page: Mapping[str, Any]) -> list[ObjectMeta | CommonPrefix]:
    """The entries of a page of any client, in order of the UTF-8 bytes of their keys."""
    entries: list[ObjectMeta | CommonPrefix] | None = page.get(_ENTRIES)
    if entries is not None:
        return entries
    entries = [listed(entry) for entry in page.get("Contents") or ()]
    entries += [CommonPrefix(entry["Prefix"]) for entry in page.get("CommonPrefixes") or ()]
    entries.sort(key=lambda entry: key_bytes(entry.key))
    return entries


def _take(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    if response_dict["status_code"] != 200:
        return
    try:
        parser = ElementTree.XMLParser(encoding="utf-8")  # noqa: S314 - expat bounds entities itself; botocore parses with it too
        root = ElementTree.XML(response_dict["body"], parser)
        if root.tag.rpartition("}")[2] != "ListBucketResult":
            return
        page = read_page(root)
    except (ElementTree.ParseError, ValueError):
        return  # botocore says what is wrong with it
    customized_response_dict.update({_ENTRIES: page.entries, "IsTruncated": page.truncated})
    if page.after:
        customized_response_dict["NextContinuationToken"] = page.after["continuation-token"]
    response_dict["body"] = b""
