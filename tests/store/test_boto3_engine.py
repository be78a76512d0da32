"""The boto3 engine beyond the conformance suite: the user's own client, checksums, large copies, what came back."""

from __future__ import annotations

import io
import pickle
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber
from moto import mock_aws

from s3loader.checksum import crc32c_base64
from s3loader.config import S3Settings
from s3loader.errors import (
    ConfigError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    TruncatedError,
    UnsupportedOperationError,
)
from s3loader.store import open_store
from s3loader.store.boto3.engine import Boto3Backend, copy_parts
from s3loader.testing import FaultProxy, Rule, Server, ServerKind
from s3loader.types import CommonPrefix, ObjectMeta

MIB = 1 << 20
LOCAL = S3Settings(endpoint_url="http://127.0.0.1:9", aws_access_key_id="K", aws_secret_access_key="S")


@pytest.fixture
def behind_proxy(
    servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str]
) -> Iterator[tuple[Boto3Backend, FaultProxy]]:
    running = servers("moto")
    with FaultProxy(running.endpoint_url, []) as proxy:
        settings = running.settings.replace(endpoint_url=proxy.endpoint_url)
        backend = Boto3Backend(shared_bucket("moto"), settings)
        yield backend, proxy
        backend.close()


@pytest.fixture
def key() -> str:
    return f"boto3/{uuid.uuid4().hex}"


# -- the user's own client -----------------------------------------------------------------------


def test_mock_aws_and_a_client_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="mocked")
        with open_store("s3://mocked/run", s3_client=client) as store:
            assert store.engine == "boto3"
            store.put("a", b"hello", content_type="text/plain", metadata={"x": "1"})
            assert store.get("a") == b"hello"
            assert store.head("a").metadata == {"x": "1"}
            buffer = bytearray(3)
            store.read_into("a", 1, buffer)
            assert buffer == b"ell"
            with pytest.raises(ObjectExistsError):
                store.put("a", b"", mode="create")
            with pytest.raises(ObjectNotFoundError):
                store.get("b")
            with store.multipart("m") as writer:
                writer.write(b"x" * (6 * MIB))
            assert store.head("m").size == 6 * MIB
            assert [entry.key for entry in store.list()] == ["a", "m"]
            assert [bytes(result.data) for result in store.get_many(["a", "a"])] == [b"hello"] * 2
            assert store.delete_many(["a", "m", "gone"]) == []
        assert client.list_objects_v2(Bucket="mocked")["KeyCount"] == 0


def test_another_engine_cannot_use_it() -> None:
    client = LOCAL.create_client()
    with pytest.raises(ConfigError, match="s3_client"):
        open_store("s3://b", s3_client=client, engine="obstore")
    with pytest.raises(ConfigError, match="s3_client"):
        open_store("gs://b", s3_client=client)


def stubbed(settings: S3Settings = LOCAL) -> tuple[Boto3Backend, Stubber]:
    client = settings.create_client()
    return Boto3Backend("b", settings, s3_client=client), Stubber(client)


def body(data: bytes) -> StreamingBody:
    return StreamingBody(io.BytesIO(data), len(data))


def test_its_stubs_its_endpoint_and_its_life_are_honoured() -> None:
    backend, stub = stubbed()
    with stub:
        stub.add_response("get_object", {"Body": body(b"abc"), "ContentLength": 3, "ETag": '"e"'}, {"Bucket": "b", "Key": "k"})
        stub.add_response("put_object", {"ETag": '"f"', "VersionId": "v"}, {"Bucket": "b", "Key": "k", "Body": b"abc"})
        meta, data = backend.get("k")
        assert (bytes(data), meta.etag) == (b"abc", "e")
        assert backend.put("k", memoryview(b"abc")).version_id == "v"  # no checksum of ours: the client asks for none
        backend.close()
        stub.assert_no_pending_responses()
        stub.add_response("head_object", {"ContentLength": 1}, {"Bucket": "b", "Key": "k"})
        assert backend.head("k").size == 1  # closing ours leaves the user's open


def test_its_own_checksum_setting_decides() -> None:
    client = boto3.client(
        "s3",
        endpoint_url="http://127.0.0.1:9",
        region_name="r",
        aws_access_key_id="K",
        aws_secret_access_key="S",
        config=Config(request_checksum_calculation="when_supported"),
    )
    backend = Boto3Backend("b", LOCAL, s3_client=client)
    with Stubber(client) as stub:
        wanted = {"Bucket": "b", "Key": "k", "Body": b"abc", "ChecksumCRC32C": crc32c_base64(b"abc")}
        stub.add_response("put_object", {"ETag": '"f"'}, wanted)
        backend.put("k", b"abc")


# -- what comes is checked -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"ContentRange": "bytes 3-5/9", "ContentLength": 3}, StoreError),
        ({"ContentRange": "bytes 2-4/*", "ContentLength": 3}, StoreError),
        ({"ContentRange": "items 2-4/9", "ContentLength": 3}, StoreError),
        ({"ContentRange": "bytes 2-4/9", "ContentLength": 2}, StoreError),
        ({"ContentLength": 9}, UnsupportedOperationError),
        ({"ContentRange": "bytes 2-4/9", "ContentLength": 3, "ETag": '"other"'}, ObjectChangedError),
    ],
)
def test_an_answer_to_another_question(answer: dict[str, Any], error: type[StoreError]) -> None:
    backend, stub = stubbed()
    with stub:
        for _ in range(2):
            stub.add_response("get_object", {"Body": body(b"xyz"), "ETag": '"e"', **answer}, None)
        with pytest.raises(error):
            backend.get("k", 2, 5, if_match="e")
        with pytest.raises(error):
            backend.read_into("k", 2, memoryview(bytearray(3)), if_match="e")


def test_a_short_body() -> None:
    backend, stub = stubbed()
    with stub:
        stub.add_response("get_object", {"Body": body(b"xy"), "ContentLength": 3, "ContentRange": "bytes 2-4/9"}, None)
        with pytest.raises(TruncatedError, match="2 of 3") as caught:
            backend.get("k", 2, 5)
        assert caught.value.retryable


def test_200_with_a_content_range_is_a_range_and_weak_etags_match() -> None:
    backend, stub = stubbed()
    with stub:
        answer = {"Body": body(b"xyz"), "ContentLength": 3, "ContentRange": "bytes 2-4/9", "ETag": 'W/"e"'}
        stub.add_response("get_object", answer, {"Bucket": "b", "Key": "k", "Range": "bytes=2-4", "IfMatch": '"e"'})
        meta, data = backend.get("k", 2, 5, if_match='"e"')
        assert (bytes(data), meta.size, meta.etag) == (b"xyz", 9, "e")


def test_a_listing_that_goes_nowhere_ends() -> None:
    backend, stub = stubbed()
    page = {"IsTruncated": True, "NextContinuationToken": "t", "Contents": [{"Key": "a", "Size": 1}]}
    with stub:
        for _ in range(2):
            stub.add_response("list_objects_v2", page, None)
        with pytest.raises(StoreError, match="does not go on"):
            list(backend.list())


def test_prefixes_and_keys_come_in_one_order() -> None:
    backend, stub = stubbed()
    page = {
        "IsTruncated": False,
        "Contents": [{"Key": "é", "Size": 1}, {"Key": "a", "Size": 2}],
        "CommonPrefixes": [{"Prefix": "b/"}, {"Prefix": "\U0001f600/"}],
    }
    with stub:
        stub.add_response("list_objects_v2", page, {"Bucket": "b", "Prefix": "", "Delimiter": "/"})
        found = list(backend.list(delimiter="/"))
    assert [entry.key for entry in found] == ["a", "b/", "é", "\U0001f600/"]
    assert [type(entry) for entry in found] == [ObjectMeta, CommonPrefix, ObjectMeta, CommonPrefix]


def test_deletes_are_reported_key_by_key() -> None:
    backend, stub = stubbed()
    with stub:
        errors = [{"Key": "b", "Code": "AccessDenied", "Message": "no"}, {"Key": "c", "Code": "NoSuchKey", "Message": "gone"}]
        stub.add_response("delete_objects", {"Errors": errors}, {"Bucket": "b", "Delete": ANY})
        stub.add_response("delete_object", {}, {"Bucket": "b", "Key": "ctrl\x01"})  # not to be said in XML
        failures = backend.delete_many(["a", "b", "c", "a", "ctrl\x01"])
        stub.assert_no_pending_responses()
    assert [(failure.key, type(failure.error).__name__) for failure in failures] == [("b", "AccessDeniedError")]
    assert failures[0].error.url == "s3://b/b"  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [400, 405, 501])
def test_a_server_without_bulk_delete(behind_proxy: tuple[Boto3Backend, FaultProxy], key: str, status: int) -> None:
    backend, proxy = behind_proxy
    proxy.plan.rules.append(Rule("error", method="POST", path="delete", status=status, code="NotImplemented"))
    keys = [f"{key}/{n}" for n in range(3)]
    for each in keys:
        backend.put(each, b"x")
    assert backend.delete_many(keys) == []
    assert list(backend.list(key)) == []
    assert proxy.count("DELETE") == 3


# -- checksums -----------------------------------------------------------------------------------


def test_uploads_carry_crc32c_and_the_etag_stays_the_md5(behind_proxy: tuple[Boto3Backend, FaultProxy], key: str) -> None:
    backend, proxy = behind_proxy
    made = backend.put(key, b"fake audio data...")
    assert made.etag == "548baa8d1efffaaae5d59f4bedcf09b3"
    headers = proxy.requests[-1].headers
    assert headers["x-amz-checksum-crc32c"] == crc32c_base64(b"fake audio data...")
    assert "x-amz-trailer" not in headers
    upload_id = backend.create_multipart(key)
    assert proxy.requests[-1].headers["x-amz-checksum-algorithm"] == "CRC32C"
    part = backend.upload_part(key, upload_id, 1, bytearray(b"part"))
    assert part.checksum == proxy.requests[-1].headers["x-amz-checksum-crc32c"] == crc32c_base64(b"part")
    assert backend.complete_multipart(key, upload_id, [part]).etag == backend.head(key).etag


@pytest.mark.parametrize(("status", "code"), [(400, "InvalidRequest"), (501, "NotImplemented")])
def test_a_server_that_refuses_crc32c_gets_an_md5(
    behind_proxy: tuple[Boto3Backend, FaultProxy], key: str, status: int, code: str
) -> None:
    backend, proxy = behind_proxy
    proxy.plan.rules.append(Rule("error", method="PUT", path=key, status=status, code=code, times=1))
    backend.put(key, b"abc")
    assert proxy.requests[-1].headers["content-md5"] == "kAFQmDzST7DWlj99KOF/cg=="
    backend.put(key, b"abc")
    assert proxy.count("PUT") == 3  # it is remembered


def test_a_request_that_is_bad_otherwise_is_no_reason_to_drop_checksums(
    behind_proxy: tuple[Boto3Backend, FaultProxy], key: str
) -> None:
    backend, proxy = behind_proxy
    proxy.plan.rules.append(Rule("error", method="PUT", path=key, status=400, code="InvalidRequest", times=2))
    with pytest.raises(StoreError):
        backend.put(key, b"abc")
    backend.put(key, b"abc")
    assert "x-amz-checksum-crc32c" in proxy.requests[-1].headers


# -- copies, versions, the rest ------------------------------------------------------------------


def test_a_copy_part_by_part(behind_proxy: tuple[Boto3Backend, FaultProxy], key: str) -> None:
    backend, proxy = behind_proxy
    data = bytes(range(256)) * (44 * MIB // 1024)
    backend.put(key, data)
    meta = backend.head(key)
    upload_id = backend.create_multipart(key + "-copy")
    parts = copy_parts(backend._client, meta, key + "-copy", upload_id, part_size=5 * MIB)
    assert [part.size for part in parts] == [5 * MIB, 5 * MIB, MIB]
    backend.complete_multipart(key + "-copy", upload_id, parts)
    assert backend.get(key + "-copy")[1] == data
    asked = [request.headers.get("x-amz-copy-source-if-match") for request in proxy.requests if "copy" in request.path]
    assert f'"{meta.etag}"' in asked


def test_a_large_copy_that_fails_leaves_no_upload(
    behind_proxy: tuple[Boto3Backend, FaultProxy], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, proxy = behind_proxy
    monkeypatch.setattr("s3loader.store.boto3.engine._ONE_COPY", 0)
    monkeypatch.setattr("s3loader.store.boto3.engine._THROUGH", 0)
    backend.put(key, b"x" * 100, content_type="a/b", metadata={"m": "1"})
    proxy.plan.rules.append(Rule("error", method="PUT", path="partNumber", status=403, code="AccessDenied", times=1))
    with pytest.raises(StoreError):
        backend.copy(key, key + "-copy")
    assert list(backend.list_multipart(key)) == []
    backend.copy(key, key + "-copy", mode="create")
    meta, data = backend.get(key + "-copy")
    assert (bytes(data), meta.content_type, meta.metadata) == (b"x" * 100, "a/b", {"m": "1"})
    with pytest.raises(ObjectExistsError):
        backend.copy(key, key + "-copy", mode="create")


def test_versions(servers: Callable[[ServerKind], Server]) -> None:
    running = servers("moto")
    bucket = running.bucket()
    backend = Boto3Backend(bucket, running.settings)
    backend._client.get().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first = backend.put("k", b"one")
    second = backend.put("k", b"second")
    assert first.version_id
    assert first.version_id != second.version_id
    assert backend.get("k", version_id=first.version_id)[1] == b"one"
    assert backend.head("k", version_id=first.version_id).size == 3
    assert backend.head("k").version_id == second.version_id
    backend.delete("k")
    with pytest.raises(ObjectNotFoundError):
        backend.get("k")
    assert backend.get("k", version_id=second.version_id)[1] == b"second"
    backend.close()


def test_read_into_fills_the_buffer_from_the_socket(
    behind_proxy: tuple[Boto3Backend, FaultProxy], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not through bytes objects of urllib3, and the connection is used again."""
    import urllib3

    backend, _ = behind_proxy
    data = bytes(range(256)) * 4096
    backend.put(key, data)
    monkeypatch.setattr(urllib3.HTTPResponse, "readinto", None)
    monkeypatch.setattr(urllib3.HTTPResponse, "read", None)
    buffer = memoryview(bytearray(len(data) + 2))
    for _ in range(3):
        backend.read_into(key, 0, buffer[1:-1])
    assert buffer[1:-1] == data
    assert (buffer[0], buffer[-1]) == (0, 0)
    pools = backend._client.get()._endpoint.http_session._manager.pools
    (pool,) = [pools[name] for name in pools.keys()]  # noqa: SIM118  urllib3's container has no iterator
    assert pool.num_connections == 1


def test_pickle(servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str], key: str) -> None:
    backend = Boto3Backend(shared_bucket("moto"), servers("moto").settings)
    backend.put(key, b"x")
    again = pickle.loads(pickle.dumps(backend))
    assert again.get(key)[1] == b"x"
    for each in (backend, again):
        each.close()
        each.close()
    assert backend.get(key)[1] == b"x"  # closed is let go, not forbidden
    backend.close()
