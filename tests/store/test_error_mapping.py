"""What stores answer and clients raise becomes one error of ours, with status, code, request id and hint."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import botocore.exceptions as boto
import pytest
import trustme
from botocore.stub import Stubber
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import StoreOptions
from s3loader import errors as e
from s3loader.config import S3Settings
from s3loader.store import Backend
from s3loader.store.boto3.engine import Boto3Backend
from s3loader.store.client_errors import from_botocore, from_obstore
from s3loader.store.engine_choice import open_backend
from s3loader.store.s3errors import Condition, Where, from_response, from_status, parse_error
from s3loader.testing import FaultProxy, Rule, Server, ServerKind
from s3loader.types import ObjectURL, PartResult, Update

WHERE = Where("get", "s3://b/img_404.jpg")


def our_client(bucket: str, settings: S3Settings, *, options: StoreOptions | None = None) -> Backend:
    return open_backend(ObjectURL.parse(f"s3://{bucket}"), settings, options=options)


Engine: TypeAlias = Callable[..., Backend]
ENGINES: dict[str, Engine] = {"boto3": Boto3Backend, "direct": our_client}


def document(code: str, message: str = "Why not", **more: str) -> bytes:
    extra = "".join(f"<{name}>{value}</{name}>" for name, value in more.items())
    return f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{extra}</Error>'.encode()


@pytest.mark.parametrize(
    ("status", "code", "condition", "kind", "retryable"),
    [
        (404, "NoSuchKey", None, e.ObjectNotFoundError, False),
        (404, None, None, e.ObjectNotFoundError, False),
        (404, "NoSuchBucket", None, e.BucketNotFoundError, False),
        (404, "NoSuchBucket", "update", e.BucketNotFoundError, False),
        (404, "NoSuchKey", "update", e.ObjectChangedError, False),
        (404, "ContainerNotFound", None, e.BucketNotFoundError, False),
        (409, "BlobAlreadyExists", "create", e.ObjectExistsError, False),
        (404, "NoSuchUpload", "update", e.ObjectNotFoundError, False),
        (403, "AccessDenied", None, e.AccessDeniedError, False),
        (403, None, None, e.AccessDeniedError, False),
        (403, "SignatureDoesNotMatch", None, e.AuthenticationError, False),
        (403, "InvalidAccessKeyId", None, e.AuthenticationError, False),
        (403, "RequestTimeTooSkewed", None, e.AuthenticationError, False),
        (400, "ExpiredToken", None, e.AuthenticationError, True),
        (400, "AuthorizationHeaderMalformed", None, e.AuthenticationError, False),
        (401, None, None, e.AuthenticationError, False),
        (412, "PreconditionFailed", "read", e.ObjectChangedError, False),
        (412, "PreconditionFailed", "create", e.ObjectExistsError, False),
        (412, "PreconditionFailed", "update", e.ObjectChangedError, False),
        (412, None, "create", e.ObjectExistsError, False),
        (412, "PreconditionFailed", None, e.PreconditionFailedError, False),
        (409, "ConditionalRequestConflict", "create", e.ConflictError, True),
        (409, "OperationAborted", None, e.ConflictError, True),
        (409, "BucketAlreadyExists", None, e.ConflictError, False),
        (416, "InvalidRange", "read", e.RangeError, False),
        (416, None, None, e.RangeError, False),
        (503, "SlowDown", None, e.ThrottledError, True),
        (429, None, None, e.ThrottledError, True),
        (503, None, None, e.UnavailableError, True),
        (500, "InternalError", None, e.UnavailableError, True),
        (200, "InternalError", None, e.UnavailableError, True),
        (200, "SlowDown", None, e.ThrottledError, True),
        (599, None, None, e.UnavailableError, True),
        (501, "NotImplemented", None, e.UnsupportedOperationError, False),
        (405, "MethodNotAllowed", None, e.UnsupportedOperationError, False),
        (400, "RequestTimeout", None, e.StoreTimeoutError, True),
        (504, None, None, e.StoreTimeoutError, True),
        (400, "BadDigest", None, e.IntegrityError, True),
        (400, "IncompleteBody", None, e.StoreConnectionError, True),
        (507, "XMinioStorageFull", None, e.NoSpaceError, False),
        (400, "InvalidArgument", None, e.StoreError, False),
        (301, "PermanentRedirect", None, e.StoreError, False),
        (307, "TemporaryRedirect", None, e.UnavailableError, True),
    ],
)
def test_status_and_code(
    status: int, code: str | None, condition: Condition, kind: type[e.S3LoaderError], retryable: bool
) -> None:
    where = Where("put", "s3://b/k", condition)
    error = from_response(status, document(code, RequestId="R1") if code else b"", where, headers={"x-amz-request-id": "R1"})
    assert type(error) is kind
    assert error.retryable is retryable
    assert (error.status, error.code, error.request_id) == (status, code, "R1")
    assert (error.op, error.url) == ("put", "s3://b/k")
    # the same through boto3's own exception
    answer = {
        "Error": {"Code": code or str(status), "Message": "Why not"},
        "ResponseMetadata": {"HTTPStatusCode": status, "RequestId": "R1"},
    }
    again = from_botocore(boto.ClientError(answer, "PutObject"), where)  # type: ignore[arg-type]
    assert (type(again), again.retryable, again.code, again.request_id) == (kind, retryable, code, "R1")


def test_hints() -> None:
    def hint(status: int, code: str | None, headers: dict[str, str] | None = None, **more: str) -> str:
        return from_response(status, document(code, **more) if code else b"", WHERE, headers=headers).hint or ""

    assert "region='eu-west-1'" in hint(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-1"})
    assert "region='eu-west-1'" in hint(400, "AuthorizationHeaderMalformed", Region="eu-west-1")
    assert "region" in hint(301, None)
    assert "secret access key is wrong" in hint(403, "SignatureDoesNotMatch")
    assert "expired" in hint(400, "ExpiredToken")
    assert "policy" in hint(403, "AccessDenied")
    assert "bucket's name" in hint(404, "NoSuchBucket")
    assert "max_requests_per_second" in hint(503, "SlowDown")
    assert "clock is wrong" in hint(403, "RequestTimeTooSkewed")
    assert "s slow" in hint(403, "RequestTimeTooSkewed", {"date": "Wed, 21 Oct 2065 07:28:00 GMT"})
    assert "s fast" in hint(403, "RequestTimeTooSkewed", {"date": "Wed, 21 Oct 2015 07:28:00 GMT"})


def test_azure_says_the_request_id_in_its_message() -> None:
    body = document("BlobNotFound", "The blob does not exist.\nRequestId:R5\nTime:2026-11-25T11:11:43.682Z")
    error = from_response(404, body, WHERE)
    assert (error.request_id, error.message) == ("R5", "The blob does not exist")


def test_a_completion_in_conflict_is_not_repeated() -> None:
    """S3 asks for the whole upload again then."""
    assert not from_status(409, "ConditionalRequestConflict", "", Where("complete upload", "u", "create")).retryable


def test_retry_after_and_delete_markers() -> None:
    assert from_status(503, "SlowDown", "", WHERE, headers={"retry-after": "7"}).details["retry_after"] == 7.0
    assert "retry_after" not in from_status(503, None, "", WHERE, headers={"retry-after": "Wed, 21 Oct 2015"}).details
    marker = from_status(405, "MethodNotAllowed", "", WHERE, headers={"x-amz-delete-marker": "true"})
    assert isinstance(marker, e.ObjectNotFoundError)


def test_messages_are_one_line_and_bounded() -> None:
    error = from_status(400, "InvalidArgument", "one\ntwo " + "x" * 1000, WHERE)
    assert "\n" not in str(error)
    assert len(str(error)) < 450


@given(st.binary(max_size=200) | st.text(max_size=200))
@settings(max_examples=50, deadline=None)
def test_any_body_is_survived(body: bytes | str) -> None:
    code, message, _, _ = parse_error(body)
    assert isinstance(from_response(500, body, WHERE), e.UnavailableError)
    assert code is None or code
    assert len(message) <= 200


def test_entity_bombs_are_no_error_documents() -> None:
    bomb = (
        '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "'
        + "a" * 1000
        + '">'
        + "".join(f'<!ENTITY {new} "{("&" + old + ";") * 10}">' for old, new in zip("abcdefgh", "bcdefghi", strict=True))
    )
    assert parse_error(bomb + "]><Error><Code>&i;</Code></Error>") == (None, "", None, None)


# -- what clients raise --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (boto.NoCredentialsError(), e.CredentialsError),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), e.CredentialsError),
        (boto.CredentialRetrievalError(provider="sso", error_msg="404"), e.CredentialsError),
        (boto.ParamValidationError(report="bad"), e.ConfigError),
        (boto.EndpointConnectionError(endpoint_url="http://h/img_404.jpg"), e.StoreConnectionError),
        (boto.ConnectTimeoutError(endpoint_url="http://h/404"), e.StoreTimeoutError),
        (boto.ReadTimeoutError(endpoint_url="http://h/404"), e.StoreTimeoutError),
        (boto.ConnectionClosedError(endpoint_url="http://h/404"), e.StoreConnectionError),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=404), e.TruncatedError),
        (boto.SSLError(endpoint_url="x", error="[SSL: WRONG_VERSION_NUMBER] wrong version (_ssl.c:1)"), e.StoreConnectionError),
        (ConnectionResetError("404"), e.StoreConnectionError),
        (TimeoutError("404"), e.StoreTimeoutError),
        (RuntimeError("404"), e.StoreError),
    ],
)  # fmt: skip
def test_client_failures(error: Exception, kind: type[e.S3LoaderError]) -> None:
    mapped = from_botocore(error, WHERE)
    assert type(mapped) is kind
    assert mapped.status is None
    assert mapped.url == WHERE.url


def obstore_text(status: int, body: str, path: str = "k") -> str:
    """As obstore 0.12 writes it."""

    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    lines = [
        f"Object at location {path} not found: Error performing GET http://h/b/{path} in 1ms - Server returned non-2xx status"
        f" code: {status} X: {body}",
        "",
        "Debug source:",
        "NotFound {",
        f'    path: "{quoted(path)}",',
        "    source: RetryError(",
        "            inner: Status {",
        f"                status: {status},",
        "                body: Some(",
        f'                    "{quoted(body)}",',
        "                ),",
        "    ),",
        "}",
    ]
    return "\n".join(lines)


def test_obstore_answers() -> None:
    body = document("SlowDown", 'Please "slow"', RequestId="R9").decode()
    error = from_obstore(Exception(obstore_text(503, body)), WHERE)
    assert type(error) is e.ThrottledError
    assert (error.status, error.code, error.request_id, error.message) == (503, "SlowDown", "R9", 'Please "slow"')


@given(st.text(max_size=60) | st.just("\n                status: 404,\n") | st.just('",\n status: 403,\n'))
@settings(max_examples=50, deadline=None)
def test_a_key_cannot_pass_for_an_answer(path: str) -> None:
    error = from_obstore(Exception(obstore_text(503, "<x>", path)), WHERE)
    assert error.status == 503


# -- through the engines -------------------------------------------------------------------------


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


def settings_for(url: str, **more: Any) -> S3Settings:
    return S3Settings(endpoint_url=url, aws_access_key_id="S3LOADERTESTING00001", aws_secret_access_key="x" * 40, **more)


def backend(engine: Engine, url: str, **more: Any) -> Backend:
    return engine("b-bucket", settings_for(url, **more), options=StoreOptions(connect_timeout=300, read_timeout=300))


def test_nothing_listens(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    store = backend(engine, url)
    for call in (store.get, store.head, store.delete):
        with pytest.raises(e.StoreConnectionError, match="cannot be reached") as caught:
            call("img_404.jpg")
        assert caught.value.status is None
        assert "endpoint_url" in str(caught.value.hint)
        assert caught.value.details["sent"] is False


def test_a_host_that_lets_nobody_in_was_sent_nothing(engine: Engine) -> None:
    """A full backlog drops what knocks: no connection in time."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            knock = stack.enter_context(socket.socket())
            knock.setblocking(False)
            knock.connect_ex(full.getsockname())
        options = StoreOptions(connect_timeout=0.3, read_timeout=300)
        store = engine("b-bucket", settings_for(f"http://127.0.0.1:{full.getsockname()[1]}"), options=options)
        with pytest.raises(e.StoreTimeoutError, match="no connection in time") as caught:
            store.put("k", b"x")
        assert caught.value.details["sent"] is False
        store.close()


def test_nobody_answers(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = engine(
            "b-bucket",
            settings_for(f"http://127.0.0.1:{silent.getsockname()[1]}"),
            options=StoreOptions(connect_timeout=300, read_timeout=0.3),
        )
        with pytest.raises(e.StoreTimeoutError) as caught:
            store.get("img_404.jpg")
        assert "sent" not in caught.value.details
        store.close()


def test_no_credentials(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = engine("b-bucket", S3Settings(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(e.CredentialsError) as caught:
        store.get("k")
    assert "S3_AWS_ACCESS_KEY_ID" in str(caught.value.hint)


@contextlib.contextmanager
def tls_server(context: ssl.SSLContext) -> Iterator[str]:
    """Answers each request over TLS with an empty object."""
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: "e"\r\n'
    answer += b"Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\nConnection: close\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as client:
                    client.settimeout(10)
                    client.recv(65536)
                    client.sendall(answer)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_certificate_nobody_vouches_for(engine: Engine, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(bundle)
    with tls_server(context) as url:
        with pytest.raises(e.StoreConnectionError, match="certificate") as caught:
            backend(engine, url).get("k")
        assert "ca_bundle" in str(caught.value.hint)
        assert not caught.value.retryable
        meta, data = backend(engine, url, ca_bundle=str(bundle)).get("k")
        assert (meta.etag, bytes(data)) == ("e", b"")


def test_https_where_http_is_spoken(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        url = f"https://127.0.0.1:{plain.getsockname()[1]}"

        def answer() -> None:
            with contextlib.suppress(OSError):
                client, _ = plain.accept()
                client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                client.recv(1000)
                client.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(e.StoreConnectionError):
            backend(engine, url).get("k")
        thread.join(10)


@pytest.fixture
def proxied(
    servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str], engine: Engine
) -> Iterator[Callable[[Rule], Boto3Backend]]:
    with contextlib.ExitStack() as stack:

        def start(rule: Rule) -> Boto3Backend:
            proxy = stack.enter_context(FaultProxy(servers("moto").endpoint_url, [rule]))
            made = engine(shared_bucket("moto"), settings_for(proxy.endpoint_url))
            stack.callback(made.close)
            return made

        yield start


def test_a_completion_that_says_200_and_fails(proxied: Callable[[Rule], Boto3Backend]) -> None:
    store = proxied(Rule("error", method="POST", path="uploadId", status=200, code="InternalError"))
    upload_id = store.create_multipart("late")
    part = store.upload_part("late", upload_id, 1, b"x")
    with pytest.raises(e.UnavailableError) as caught:
        store.complete_multipart("late", upload_id, [part])
    assert caught.value.code == "InternalError"
    assert caught.value.retryable


def test_a_copy_that_says_200_and_fails(proxied: Callable[[Rule], Boto3Backend]) -> None:
    store = proxied(Rule("error", method="PUT", path="/copied", status=200, code="SlowDown"))
    store.put("source", b"x")
    with pytest.raises(e.ThrottledError):
        store.copy("source", "copied")


def test_redirect_to_another_region(proxied: Callable[[Rule], Boto3Backend]) -> None:
    store = proxied(Rule("error", method="GET", path="/k$", status=301, code="PermanentRedirect"))
    with pytest.raises(e.StoreError, match="region") as caught:
        store.get("k")
    assert not caught.value.retryable
    assert caught.value.status == 301


def test_conflicts_name_what_was_asked(proxied: Callable[[Rule], Boto3Backend]) -> None:
    store = proxied(Rule("error", method="PUT", path="/c$", status=409, code="ConditionalRequestConflict"))
    with pytest.raises(e.ConflictError):
        store.put("c", b"x", mode="create")
    with pytest.raises(e.ObjectChangedError):
        store.put("nothing-there", b"x", mode=Update("00" * 16))
    with pytest.raises(e.ConfigError, match="put mode"):
        store.put("c", b"x", mode="append")  # type: ignore[arg-type]


def test_stubbed_answers_keep_their_request_id() -> None:
    client = settings_for("http://127.0.0.1:9").create_client()
    store = Boto3Backend("b", settings_for("http://127.0.0.1:9"), s3_client=client)
    with Stubber(client) as stub:
        stub.add_client_error("complete_multipart_upload", "NoSuchUpload", "gone", 404, response_meta={"RequestId": "R7"})
        with pytest.raises(e.ObjectNotFoundError) as caught:
            store.complete_multipart("k", "id", [PartResult(1, "e", 1)])
    assert (caught.value.request_id, caught.value.code) == ("R7", "NoSuchUpload")
