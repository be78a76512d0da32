"""What sockets, urllib3, boto3 and obstore raise, as the tree of `s3loader.errors`.

Errors that hold a server's answer go through `s3errors.from_status`; the rest are failures of the
way there: no credentials, no connection, no time, no trust. Where no connection came about, nothing was
sent, and ``sent=False`` in the error's details says so: `lost_reply` relies on it.
"""

from __future__ import annotations

import errno
import re
import ssl
from collections.abc import Callable, Mapping
from http.client import HTTPException, IncompleteRead
from typing import Any, Final

from s3loader.credentials import NO_CREDENTIALS_HINT
from s3loader.errors import (
    ClosedError,
    ConfigError,
    CredentialsError,
    S3LoaderError,
    StoreConnectionError,
    StoreError,
    StoreTimeoutError,
    TruncatedError,
    UnavailableError,
    UnsupportedOperationError,
)
from s3loader.store.s3errors import Where, clean, from_response, from_status

__all__ = ["from_botocore", "from_obstore", "from_socket", "from_transport", "no_descriptor", "passed_over"]


def passed_over(key: str) -> ClosedError:
    """In place of a read that its gate did not let pass."""
    return ClosedError("another process reads it", op="read", url=key, hint="read what it has kept, or without a gate")


def no_descriptor(op: str, url: str) -> StoreConnectionError:
    """The error for a process (EMFILE) or machine (ENFILE) that may open no further file or socket."""
    return StoreConnectionError(
        "no file descriptor is left for a connection",
        op=op,
        url=url,
        hint="raise the limit (`ulimit -n`), lower concurrency, or look for what keeps files open",
        sent=False,
    )


def from_botocore(error: Exception, where: Where) -> S3LoaderError:
    """The error for anything a boto3 client raises."""
    import botocore.exceptions as boto

    if isinstance(error, S3LoaderError):
        return error
    if isinstance(error, boto.ClientError):
        return _from_client_error(error.response, where)
    return from_transport(error, where)


def _from_client_error(response: Mapping[str, Any], where: Where) -> S3LoaderError:
    facts, about = response.get("Error") or {}, response.get("ResponseMetadata") or {}
    status = about.get("HTTPStatusCode")
    code = str(facts.get("Code") or "") or None
    if status is None and code and code.isdigit():
        status = int(code)
    return from_status(
        status,
        code,
        # for an answer without a body botocore invents this text from the status
        "" if code and code.isdigit() else str(facts.get("Message") or ""),
        where,
        request_id=about.get("RequestId") or None,
        headers=about.get("HTTPHeaders"),
        region=facts.get("Region") or facts.get("BucketRegion"),
    )


_UNREACHABLE: Final = "is the endpoint right, and is it running? check endpoint_url"
_SLOW: Final = "the store is slow or silent: StoreOptions.read_timeout says how long to wait for its next bytes"
_BROKE: Final = "is it http or https that the endpoint speaks, and does a proxy cut long connections?"
_NO_TLS: Final = "is it https that the endpoint speaks? if it is plain http, write http:// in endpoint_url"
_NO_FILES: Final = rf"\[Errno (?:{errno.EMFILE}|{errno.ENFILE})\]"
_CA_HINT: Final = "give ca_bundle= (or AWS_CA_BUNDLE) a PEM file with the authority that signed the store's certificate"


def from_socket(error: BaseException, where: Where, *, in_body: bool = False) -> S3LoaderError:
    """The error for what a socket of our own raised.

    Args:
        error: An `OSError`; the cause of one that says that no connection came about.
        where: What was asked.
        in_body: The head of the response had come.
    """
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else None
    reason, sent = cause or error, cause is None

    def made(kind: type[S3LoaderError], message: str, hint: str, retryable: bool | None = None) -> S3LoaderError:
        details: dict[str, Any] = {} if sent else {"sent": False}
        return kind(clean(message), op=where.op, url=where.url, hint=hint, retryable=retryable, **details)

    if isinstance(reason, ssl.SSLCertVerificationError):
        sent = False
        return made(StoreConnectionError, f"the store's certificate is not trusted: {_ssl_reason(reason)}", _CA_HINT, False)
    if isinstance(reason, TimeoutError):
        if not sent:
            return made(StoreTimeoutError, "no connection in time", _UNREACHABLE)
        return made(StoreTimeoutError, str(reason) or "no answer in time", _SLOW)
    if isinstance(reason, ssl.SSLError) and not isinstance(reason, ssl.SSLEOFError):
        return made(StoreConnectionError, f"TLS failed: {_ssl_reason(reason)}", _NO_TLS)
    if not sent:
        return made(StoreConnectionError, "the endpoint cannot be reached", _UNREACHABLE)
    if in_body:
        return made(TruncatedError, "the body ended early", _BROKE, True)
    return made(StoreConnectionError, f"the connection broke ({type(reason).__name__})", _BROKE)


def from_transport(error: Exception, where: Where, *, in_body: bool = False) -> S3LoaderError:
    """The error for what botocore, urllib3 or http.client raised on the way to a server or back.

    Args:
        error: What they raised.
        where: What was asked.
        in_body: The head of the response had come.
    """
    import botocore.exceptions as boto
    import urllib3.exceptions as http

    name = type(error).__name__

    def made(
        kind: type[S3LoaderError], message: str, hint: str | None = None, retryable: bool | None = None, **details: Any
    ) -> S3LoaderError:
        return kind(clean(message), op=where.op, url=where.url, hint=hint, retryable=retryable, **details)

    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return made(CredentialsError, "no credentials were found", NO_CREDENTIALS_HINT)
    if isinstance(error, (boto.CredentialRetrievalError, boto.UnauthorizedSSOTokenError, boto.TokenRetrievalError)):
        return made(CredentialsError, f"the AWS chain gave no credentials: {name}", "`aws sts get-caller-identity` tests it")
    if isinstance(
        error, (boto.ParamValidationError, boto.NoRegionError, boto.InvalidRegionError, boto.InvalidS3AddressingStyleError)
    ):
        return made(ConfigError, f"boto3 refuses the request: {error}")
    if isinstance(error, (http.NameResolutionError, http.NewConnectionError)) or (
        isinstance(error, http.ProxyError) and not in_body
    ):
        if re.search(_NO_FILES, str(error)):
            return no_descriptor(where.op, where.url)
        return made(StoreConnectionError, "the endpoint cannot be reached", _UNREACHABLE, sent=False)
    if isinstance(error, (boto.ConnectTimeoutError, boto.ReadTimeoutError, http.TimeoutError, TimeoutError)):
        if isinstance(error, (boto.ConnectTimeoutError, http.ConnectTimeoutError)):
            return made(StoreTimeoutError, "no connection in time", _UNREACHABLE, sent=False)
        return made(StoreTimeoutError, "no answer in time", _SLOW)
    if isinstance(error, (boto.SSLError, http.SSLError)) and "ertificate" in str(error):
        text = f"the store's certificate is not trusted: {_ssl_reason(error)}"
        return made(StoreConnectionError, text, _CA_HINT, retryable=False, sent=False)
    if isinstance(error, (boto.SSLError, http.SSLError)):
        return made(StoreConnectionError, f"TLS failed: {_ssl_reason(error)}", _NO_TLS)
    if isinstance(error, boto.EndpointConnectionError):  # nothing but connecting and the name's look-up raise it
        if re.search(_NO_FILES, str(error.kwargs.get("error"))):
            return no_descriptor(where.op, where.url)
        return made(StoreConnectionError, "the endpoint cannot be reached", _UNREACHABLE, sent=False)
    if isinstance(error, (boto.IncompleteReadError, http.IncompleteRead, IncompleteRead)) or (
        in_body and isinstance(error, (http.HTTPError, HTTPException, OSError))
    ):
        return made(TruncatedError, "the body ended early", retryable=True)
    if isinstance(error, (boto.HTTPClientError, http.HTTPError, HTTPException, OSError)):
        return made(StoreConnectionError, f"the connection broke ({name})", _BROKE)
    if isinstance(error, boto.BotoCoreError) and "ResponseParserError" in name:
        return made(UnavailableError, "the answer is not S3's", "does the endpoint speak S3?")
    return made(StoreError, f"{name}: {error}")


def _ssl_reason(error: Exception) -> str:
    match = re.search(r"\[SSL[^\]]*\] ([^(\n]{1,150})", str(error))
    return match[1].strip() if match else type(error).__name__


# The debug part of obstore's text quotes all that comes from outside as an escaped string, so that a line of
# its own can only be obstore's.
_OB_STATUS: Final = re.compile(r"^ +status: (\d{3}),$", re.MULTILINE)
_OB_BODY: Final = re.compile(r'^ +body: Some\(\n +"((?:[^"\\]|\\.)*)",$', re.MULTILINE)
_OB_KIND: Final = re.compile(r"^ +kind: (\w+),$", re.MULTILINE)
_OB_CONNECTING: Final = re.compile(r"hyper_util::client::legacy::Error\(\n +Connect,$", re.MULTILINE)
_OB_NO_FILES: Final = re.compile(rf"^ +code: (?:{errno.EMFILE}|{errno.ENFILE}),$", re.MULTILINE)
_KEY_HINTS: Final = {
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in with `gcloud auth application-default login`",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_RUST_ESCAPE: Final = re.compile(r"\\(?:u\{([0-9a-fA-F]+)\}|(.))")


def from_obstore(error: Exception, where: Where) -> S3LoaderError:
    """The error for anything obstore raises."""
    if isinstance(error, S3LoaderError):
        return error
    debug = str(error).rpartition("\n\nDebug source:\n")[2]
    if "\n    source: TokenRequest {" in debug or type(error).__name__ == "UnauthenticatedError":
        hint = _KEY_HINTS.get(where.url.partition(":")[0], NO_CREDENTIALS_HINT)
        return CredentialsError("no credentials could be had", op=where.op, url=where.url, hint=hint)
    status = _OB_STATUS.search(debug)
    if status is not None:
        body = _OB_BODY.search(debug)
        return from_response(int(status[1]), _unescape(body[1]) if body else "", where)
    return _from_obstore_text(error, debug, where)


def _unescape(text: str) -> str:
    plain: dict[str, str] = {"n": "\n", "r": "\r", "t": "\t", "0": "\0"}
    replace: Callable[[re.Match[str]], str] = lambda m: chr(int(m[1], 16)) if m[1] else plain.get(m[2], m[2])  # noqa: E731
    return _RUST_ESCAPE.sub(replace, text)


def _from_obstore_text(error: Exception, debug: str, where: Where) -> S3LoaderError:
    def made(
        kind: type[S3LoaderError], message: str, hint: str | None = None, retryable: bool | None = None, **details: Any
    ) -> S3LoaderError:
        return kind(message, op=where.op, url=where.url, hint=hint, retryable=retryable, **details)

    name = type(error).__name__
    kinds = set(_OB_KIND.findall(debug))
    if isinstance(error, FileNotFoundError):
        return from_status(404, None, "", where)
    if name in ("AlreadyExistsError", "PreconditionError"):
        return from_status(412, None, "", where)
    if "\n    source: MissingAccount," in debug:
        return made(ConfigError, "no Azure storage account", _KEY_HINTS["az"])
    if "\n        source: StartTooLarge {" in debug or '\n        value: "bytes 0--1/0",' in debug:  # Azure, of an empty object
        return from_status(416, None, "", where)
    if name == "NotSupportedError":
        return made(UnsupportedOperationError, "the store cannot do this")
    if "inner: BareRedirect" in debug:
        return from_status(301, "PermanentRedirect", "", where)
    if "error: InvalidCertificate(" in debug:
        return made(StoreConnectionError, "the store's certificate is not trusted", _CA_HINT, retryable=False, sent=False)
    connecting = "Connect" in kinds or _OB_CONNECTING.search(debug) is not None
    if "Timeout" in kinds and connecting:
        return made(StoreTimeoutError, "no connection in time", _UNREACHABLE, sent=False)
    if "Timeout" in kinds:
        return made(StoreTimeoutError, "no answer in time", _SLOW)
    if connecting and _OB_NO_FILES.search(debug):
        return no_descriptor(where.op, where.url)
    if connecting and "error: InvalidMessage(" in debug:
        return made(StoreConnectionError, "TLS failed: what came is no TLS record", _NO_TLS, sent=False)
    if connecting:
        return made(StoreConnectionError, "the endpoint cannot be reached", _UNREACHABLE, sent=False)
    if "IncompleteBody" in debug:
        return made(TruncatedError, "the body ended early", retryable=True)
    if "source: NotPartial" in debug:
        return made(UnsupportedOperationError, "the server ignores ranges")
    if "source: UnexpectedRange" in debug:
        return made(StoreError, "the answer holds another range than was asked for", retryable=True)
    if kinds:
        return made(StoreConnectionError, f"the connection broke ({', '.join(sorted(kinds))})", _BROKE)
    # the first line may quote whatever obstore was given: only its own sentence is kept
    return made(StoreError, clean(str(error).partition("\n")[0]))
