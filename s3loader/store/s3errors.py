"""What a store answers, as the tree of `s3loader.errors`: the one place that does it. Beside it what all engines of S3 check of
an answer to a read.

(`client_errors` adds what happens before and beside an answer.)

Everything ends in `from_status`: an HTTP status, the provider's code and message. What decides is
the status and the code the server sent as such, never a text that may quote a key: an object
named ``img_404.jpg`` that cannot be reached is not a missing one.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from s3loader.credentials import mask
from s3loader.errors import (
    AccessDeniedError,
    AuthenticationError,
    BucketNotFoundError,
    ConfigError,
    ConflictError,
    IntegrityError,
    NoSpaceError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    PreconditionFailedError,
    RangeError,
    S3LoaderError,
    StoreConnectionError,
    StoreError,
    StoreTimeoutError,
    ThrottledError,
    UnavailableError,
    UnsupportedOperationError,
)
from s3loader.store.arguments import bare_etag
from s3loader.types import ObjectMeta, PutMode, Update

if TYPE_CHECKING:
    from s3loader.store.backend import Backend

__all__ = [
    "STALE_KEYS",
    "Condition",
    "Where",
    "check_etag",
    "clean",
    "condition_of",
    "from_response",
    "from_status",
    "parse_error",
    "read_nothing",
    "refuse_suffix",
    "refuses_checksums",
]

Condition: TypeAlias = Literal["read", "create", "update"] | None
"""What a request was conditional on: a read's If-Match, a create-only put, an update put."""

_CODES: Final[dict[type[S3LoaderError], str]] = {
    ObjectNotFoundError: "NoSuchKey NoSuchVersion NoSuchUpload BlobNotFound",
    BucketNotFoundError: "NoSuchBucket ContainerNotFound",
    AuthenticationError: """
        InvalidAccessKeyId SignatureDoesNotMatch InvalidToken ExpiredToken ExpiredTokenException TokenRefreshRequired
        InvalidClientTokenId UnrecognizedClientException RequestTimeTooSkewed RequestExpired AuthorizationHeaderMalformed
        AuthFailure AuthenticationFailed InvalidSecurity MissingSecurityHeader NotSignedUp XMinioInvalidAccessKeyId""",
    AccessDeniedError: "AccessDenied AllAccessDisabled AccountProblem Forbidden AuthorizationFailure",
    ConflictError: "ConditionalRequestConflict OperationAborted",
    PreconditionFailedError: "PreconditionFailed ConditionNotMet BlobAlreadyExists",
    RangeError: "InvalidRange",
    ThrottledError: """
        SlowDown SlowDownRead SlowDownWrite Throttling ThrottlingException RequestThrottled RequestLimitExceeded
        TooManyRequests BandwidthLimitExceeded ServerBusy""",
    UnavailableError: "InternalError ServiceUnavailable TemporaryRedirect XMinioServerNotInitialized",
    StoreTimeoutError: "RequestTimeout RequestTimeoutException OperationTimedOut",
    IntegrityError: "BadDigest XAmzContentChecksumMismatch XAmzContentSHA256Mismatch Md5Mismatch",
    StoreConnectionError: "IncompleteBody",
    NoSpaceError: "QuotaExceeded ServiceQuotaExceeded InsufficientStorage XMinioStorageFull",
    UnsupportedOperationError: "NotImplemented MethodNotAllowed UnsupportedOperation",
}
STALE_KEYS: Final = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
"""Codes of an answer to keys that have expired: others may be had."""
_BY_CODE: Final = {code: kind for kind, codes in _CODES.items() for code in codes.split()}
_BY_STATUS: Final[dict[int, type[S3LoaderError]]] = {
    401: AuthenticationError,
    403: AccessDeniedError,
    404: ObjectNotFoundError,
    405: UnsupportedOperationError,
    408: StoreTimeoutError,
    409: ConflictError,
    410: ObjectNotFoundError,
    412: PreconditionFailedError,
    416: RangeError,
    429: ThrottledError,
    501: UnsupportedOperationError,
    504: StoreTimeoutError,
    507: NoSpaceError,
}
_HINTS: Final[dict[str, str]] = {
    "InvalidAccessKeyId": "the store does not know this key id: check the credentials, and that they belong to this endpoint",
    "SignatureDoesNotMatch": "the secret access key is wrong, or a proxy changes the request",
    "ExpiredToken": "the session token has expired: renew the login",
    "InvalidToken": "the session token is not valid here: renew the login",
    "NoSuchBucket": "check the bucket's name, the endpoint and the region",
    "NoSuchUpload": "the multipart upload was completed or aborted meanwhile",
    "EntityTooSmall": "every part but the last needs at least 5 MiB",
    "EntityTooLarge": "one put takes at most 5 GiB: use multipart",
    "KeyTooLongError": "a key has at most 1024 bytes of UTF-8",
    "InvalidObjectState": "the object is archived: restore it first",
    "SlowDown": "lower StoreOptions.max_requests_per_second or concurrency",
    "InvalidBucketName": "check the bucket's name",
}
_SECRETS: Final = re.compile(
    r"\bA[KS]IA[A-Z0-9]{12,}\b|(?<=X-Amz-Signature=)[^&\s]+|(?<=X-Amz-Credential=)[^&\s]+|(?<=Signature=)\w+"
)


class Where:
    """What was asked of whom, for the error: cheap to make, one per request."""

    __slots__ = ("condition", "op", "url")

    def __init__(self, op: str, url: str, condition: Condition = None) -> None:
        self.op = op
        self.url = url
        self.condition: Condition = condition


def condition_of(mode: PutMode) -> Condition:
    """The condition of a put in `mode`.

    Raises:
        ConfigError: it is no mode.
    """
    if isinstance(mode, Update):
        return "update"
    if mode == "create":
        return "create"
    if mode != "overwrite":
        raise ConfigError(f"unknown put mode {mode!r}", hint='use "overwrite", "create" or Update(etag)')
    return None


def from_status(
    status: int | None,
    code: str | None,
    message: str,
    where: Where,
    *,
    request_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    region: str | None = None,
) -> S3LoaderError:
    """The error for one answer of a server.

    Args:
        status: HTTP status; 200 where the error came inside a 200 answer.
        code: The provider's code; None or digits where it sent none (as for HEAD).
        message: The provider's sentence.
        where: What was asked.
        request_id: The provider's id of the request.
        headers: Of the answer, names in lower case.
        region: The region the answer says the bucket is in.
    """
    headers = headers or {}
    code = code if code and not code.isdigit() else None
    kind = _kind(status, code, where, headers)
    region = clean(region or headers.get("x-amz-bucket-region") or "")
    hint = _HINTS.get("NoSuchBucket" if kind is BucketNotFoundError else code or "")
    retryable: bool | None = None
    if kind is StoreError and (
        status in (301, 302, 307, 308) or code in ("PermanentRedirect", "IllegalLocationConstraintException")
    ):
        message = message or "the store redirects to another endpoint"
        hint = "set the bucket's own region, or the endpoint_url of its region"
        if region:
            hint = f"set region={region!r}"
        elif headers.get("location"):
            hint += "; if you trust where it sends you, StoreOptions(follow_redirects=True)"
    elif code == "AuthorizationHeaderMalformed":
        hint = f"set region={region!r}" if region else "the region is wrong: set the bucket's own"
    elif code in ("RequestTimeTooSkewed", "RequestExpired"):
        hint = f"this machine's clock is {_skew(headers)}: set it by NTP"
    elif kind is AccessDeniedError and hint is None:
        hint = "the credentials may not do this: check the policy of the bucket and of the user"
        if where.op == "head" and code is None:
            hint = "check the credentials and the bucket's policy (an answer to HEAD has no reason in it)"
    elif status == 400 and code is None and where.op == "head":
        hint = f"set region={region!r}" if region else "check region and credentials (an answer to HEAD has no reason in it)"
    elif kind is IntegrityError:
        retryable = True  # the bytes were damaged on their way; nothing was stored
    elif kind is ConflictError and (where.op == "complete upload" or (code or "").startswith("Bucket")):
        retryable = False  # the upload has to be made again from its start
    if code in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"):
        retryable = True  # once fresh credentials are there
    if kind is ObjectChangedError and status == 404:
        hint = "the object that was to be replaced is gone"
    seconds = headers.get("retry-after", "")
    error = kind(
        clean(message) or _default_message(status, kind),
        op=where.op,
        url=where.url,
        status=status,
        code=clean(code) if code else None,
        request_id=clean(request_id or headers.get("x-amz-request-id") or "") or None,
        retryable=retryable,
        hint=hint,
    )
    if seconds.isdecimal():
        error.details["retry_after"] = float(seconds)
    return error


def _kind(status: int | None, code: str | None, where: Where, headers: Mapping[str, str]) -> type[S3LoaderError]:
    kind = _BY_CODE.get(code or "")
    if kind is None and status is not None:
        kind = _BY_STATUS.get(status) or (UnavailableError if status >= 500 else None)
    if kind is PreconditionFailedError or (status == 412 and kind is None):
        return {"read": ObjectChangedError, "create": ObjectExistsError, "update": ObjectChangedError}.get(
            where.condition or "", PreconditionFailedError
        )
    if kind is ObjectNotFoundError and where.condition == "update" and code != "NoSuchUpload":
        return ObjectChangedError
    if kind is UnsupportedOperationError and headers.get("x-amz-delete-marker") == "true":
        return ObjectNotFoundError
    return kind or StoreError


def _default_message(status: int | None, kind: type[S3LoaderError]) -> str:
    texts: dict[type[S3LoaderError], str] = {
        ObjectNotFoundError: "there is no such object",
        BucketNotFoundError: "there is no such bucket",
        AccessDeniedError: "access denied",
        ObjectExistsError: "the key is taken",
        ObjectChangedError: "the object is not the one it was",
        RangeError: "the range lies outside the object",
    }
    return texts.get(kind) or f"the store answered {status}"


def _skew(headers: Mapping[str, str]) -> str:
    try:
        seconds = parsedate_to_datetime(headers["date"]).timestamp() - time()
    except (KeyError, ValueError, TypeError):
        return "wrong"
    return f"{abs(seconds):.0f} s {'slow' if seconds > 0 else 'fast'}"


def clean(message: str) -> str:
    """One line of at most 300 characters without credentials and signatures."""
    line = mask(" ".join(message.split()).rstrip("."))
    line = line if len(line) <= 300 else line[:297] + "..."
    return _SECRETS.sub("***", line)


def parse_error(body: bytes | str) -> tuple[str | None, str, str | None, str | None]:
    """Code, message, request id and region of an S3 (or Azure, GCS) error document; what is not one gives
    None and its first words."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    text = text.strip()
    if text.startswith("<"):
        try:
            root = ET.fromstring(text)  # noqa: S314 - expat expands no external entity; the body is bounded by the caller
        except ET.ParseError:
            return None, "", None, None
        found = {element.tag.rpartition("}")[2]: (element.text or "").strip() for element in root}
        if "Code" in found:
            message, _, azure = found.get("Message", "").partition("\nRequestId:")
            request_id = found.get("RequestId") or azure.partition("\n")[0]
            return found["Code"] or None, message, request_id or None, found.get("Region") or None
        return None, "", None, None
    return None, text[:200] if text.isprintable() else "", None, None


def from_response(status: int, body: bytes | str, where: Where, *, headers: Mapping[str, str] | None = None) -> S3LoaderError:
    """The error for a raw answer; header names in lower case."""
    code, message, request_id, region = parse_error(body)
    return from_status(status, code, message, where, request_id=request_id, headers=headers, region=region)


def refuses_checksums(error: S3LoaderError) -> bool:
    """Whether an upload may have failed because of its checksum header: its kind is not known there."""
    return error.status == 501 or (error.status == 400 and error.code in ("InvalidRequest", "InvalidArgument", None))


# -- answers to reads ------------------------------------------------------------------------------


def check_etag(told: str | None, if_match: str | None, where: Where) -> None:
    """Raise `ObjectChangedError` unless the ETag of an answer is `if_match`.

    Where a server ignores If-Match (rclone does), its answer still tells. The error has no status,
    so that probing can tell such a server from one that refuses.
    """
    if if_match is not None and bare_etag(told) != bare_etag(if_match):
        raise ObjectChangedError("its ETag is not the one asked for", op=where.op, url=where.url)


def read_nothing(
    backend: Backend, key: str, start: int, if_match: str | None, version_id: str | None, where: Where
) -> ObjectMeta:
    """An empty range at `start`: HTTP has no way to ask for one, so the object is only looked at. So it is where a server has
    nothing for a range from the end (`start` is negative), which is right of an empty object only.

    Raises:
        RangeError: `start` is beyond the object's end.
        ObjectChangedError: its ETag is not `if_match`.
    """
    meta = backend.head(key, version_id=version_id)
    check_etag(meta.etag, if_match, where)
    refuse_suffix(start, meta, where)
    if start > meta.size:
        raise RangeError(f"it has {meta.size} bytes, asked for them from {start} on", op=where.op, url=where.url)
    return meta


def refuse_suffix(start: int, meta: ObjectMeta, where: Where) -> None:
    """Raise where bytes from the end of an object that has some were refused: rclone does so, if it has too few."""
    if start < 0 and meta.size:
        text = "the server gives no bytes from the end of this object"
        raise UnsupportedOperationError(text, op=where.op, url=where.url, hint="ask for them by their offset")
