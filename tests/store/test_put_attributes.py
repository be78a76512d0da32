"""What a write says of its object beside type and metadata: kept, given back, copied, or refused; never dropped silently."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from s3loader import ConfigError, ObjectStore, PutRequest, UnsupportedOperationError, Update, open_store
from s3loader.testing import FaultProxy, Server, ServerKind

DESCRIBING = {
    "cache_control": "max-age=60",
    "content_disposition": 'attachment; filename="a b.gz"',
    "content_encoding": "gzip",
    "content_language": "de, en",
    "expires": "Thu, 01 Dec 2044 16:00:00 GMT",
}
KMS_KEY = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"
CLOUDY: list[dict[str, str]] = [
    {"storage_class": "STANDARD_IA"},
    {"server_side_encryption": "AES256"},
    {"server_side_encryption": "aws:kms", "ssekms_key_id": KMS_KEY},
]
TAGS = {"run": "7", "a b/c": "x+y =z", "empty": ""}
PART = 5 << 20


@pytest.fixture(params=["direct", "boto3"])
def s3(request: pytest.FixtureRequest, servers: Callable[[ServerKind], Server]) -> Iterator[ObjectStore]:
    running = servers("moto")
    with running.open_store(f"{running.bucket()}/folder", engine=request.param) as store:
        yield store


@pytest.fixture(params=["direct", "boto3", "file", "memory"])
def anywhere(request: pytest.FixtureRequest, servers: Callable[[ServerKind], Server], tmp_path: Path) -> Iterator[ObjectStore]:
    kind = request.param
    if kind in ("file", "memory"):
        with open_store(tmp_path if kind == "file" else f"memory://{uuid.uuid4().hex}") as store:
            if not store.capabilities().metadata:
                pytest.skip("the file system keeps no metadata")
            yield store
        return
    running = servers("moto")
    with running.open_store(f"{running.bucket()}/folder", engine=kind) as store:
        yield store


def writes(store: ObjectStore, **about: Any) -> Iterator[str]:
    """The key of an object written in every way there is."""
    store.put("put", b"x", **about)
    yield "put"
    store.put("created", b"x", mode="create", **about)
    yield "created"
    etag = store.put("updated", b"old").etag
    store.put("updated", b"x", mode=Update(etag), **about)
    yield "updated"
    with store.multipart("small", **about) as writer:
        writer.write(b"x")
    yield "small"
    with store.multipart("parts", part_size=PART, **about) as writer:
        writer.write(bytes(PART + 1))
    yield "parts"
    attributes = {**about.get("attributes", {})}
    for driver in ("pump", "threads"):
        request = PutRequest(f"many-{driver}", b"x", attributes=attributes or None, metadata={"m": "1"})
        created = PutRequest(f"created-{driver}", b"x", "create", attributes=attributes or None, metadata={"m": "1"})
        [*store.put_many([request, created], driver=driver)]  # type: ignore[arg-type]
        assert store.head(request.key).metadata["m"] == store.head(created.key).metadata["m"] == "1"
        yield request.key
        yield created.key


def test_what_describes_an_object_is_kept_by_every_write_and_copy(anywhere: ObjectStore) -> None:
    for key in writes(anywhere, attributes=DESCRIBING):
        assert DESCRIBING.items() <= dict(anywhere.head(key).attributes).items(), key
        anywhere.copy(key, f"copy of {key}")
        anywhere.copy(key, f"{key}, created", mode="create")
        for copied in (f"copy of {key}", f"{key}, created"):
            assert DESCRIBING.items() <= dict(anywhere.head(copied).attributes).items(), copied
        assert anywhere.get(key) == anywhere.get(f"copy of {key}"), "bytes come as they are stored, whatever the encoding"


def test_tags_are_kept_by_every_write_and_copy(anywhere: ObjectStore) -> None:
    for key in writes(anywhere, tags=TAGS):
        if key.startswith(("many", "created-")):
            continue
        assert anywhere.tags(key) == TAGS, key
        anywhere.copy(key, f"copy of {key}")
        anywhere.copy(key, f"{key}, created", mode="create")
        assert anywhere.tags(f"copy of {key}") == anywhere.tags(f"{key}, created") == TAGS
    anywhere.put("none", b"")
    assert anywhere.tags("none") == {}


@pytest.mark.parametrize("wanted", CLOUDY, ids=lambda wanted: next(iter(wanted.values())))
def test_storage_class_and_encryption_are_said_and_told(s3: ObjectStore, wanted: dict[str, str]) -> None:
    for key in writes(s3, attributes=wanted):
        assert wanted.items() <= dict(s3.head(key).attributes).items(), key
        s3.copy(key, f"copy of {key}")
        s3.copy(key, f"{key}, created", mode="create")
        if wanted.get("server_side_encryption") != "AES256":  # that is the bucket's own affair
            for copied in (f"copy of {key}", f"{key}, created"):
                assert wanted.items() <= dict(s3.head(copied).attributes).items(), copied


@pytest.mark.parametrize("url", ["file", "memory"])
@pytest.mark.parametrize("wanted", CLOUDY, ids=lambda wanted: next(iter(wanted.values())))
def test_what_a_store_cannot_do_is_refused(url: str, wanted: dict[str, str], tmp_path: Path) -> None:
    with open_store(tmp_path if url == "file" else f"memory://{uuid.uuid4().hex}") as store:
        for write in (
            lambda: store.put("k", b"x", attributes=wanted),
            lambda: [*store.put_many([PutRequest("k", b"x", attributes=wanted)])],
            lambda: store.multipart("k", attributes=wanted).close(),
        ):
            with pytest.raises(UnsupportedOperationError, match="this store has no"):
                write()
        with pytest.raises(UnsupportedOperationError), store.multipart("k", part_size=PART, attributes=wanted) as writer:
            writer.write(bytes(2 * PART))
        assert not store.exists("k")


@pytest.mark.parametrize(
    ("about", "error", "says"),
    [
        ({"attributes": {"sse_customer_algorithm": "AES256"}}, UnsupportedOperationError, "SSE-C"),
        ({"attributes": {"sse_customer_key": "x"}}, UnsupportedOperationError, "SSE-C"),
        ({"attributes": {"replication_status": "COMPLETED"}}, ConfigError, "unknown option"),
        ({"attributes": {"cache-control": "x"}}, ConfigError, "unknown option"),
        ({"attributes": {"cache_control": ""}}, ConfigError, "non-empty"),
        ({"attributes": {"cache_control": "a\r\nx-amz-acl: public-read"}}, ConfigError, "control character"),
        ({"attributes": {"cache_control": "é"}}, ConfigError, "ASCII"),
        ({"attributes": {"server_side_encryption": "AES512"}}, ConfigError, "cannot be"),
        ({"attributes": {"ssekms_key_id": KMS_KEY}}, ConfigError, "needs SSE-KMS"),
        ({"tags": {str(n): "x" for n in range(11)}}, ConfigError, "11 tags"),
        ({"tags": {"": "x"}}, ConfigError, "too long"),
        ({"tags": {"a": "x" * 257}}, ConfigError, "too long"),
        ({"tags": {"a": "1"}, "attributes": {"tagging": "a=1"}}, ConfigError, "twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named_before_a_request(about: dict[str, Any], error: type[Exception], says: str) -> None:
    with open_store(f"memory://{uuid.uuid4().hex}") as store:
        for write in (lambda: store.put("k", b"x", **about), lambda: store.multipart("k", **about)):
            with pytest.raises(error, match=says):
                write()
        if "tags" not in about:
            with pytest.raises(error, match=says):
                [*store.put_many([PutRequest("k", b"x", **about)])]
        assert not store.exists("k")


def test_the_careful_path_says_the_same(servers: Callable[[ServerKind], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a proxy every request goes the careful path, signed the same."""
    running = servers("moto")
    root = running.bucket()
    with FaultProxy(running.endpoint_url) as proxy:
        monkeypatch.setenv("http_proxy", proxy.endpoint_url)
        with running.open_store(root, endpoint_url=running.endpoint_url) as store:
            store.put("k", b"x", attributes={**DESCRIBING, "storage_class": "STANDARD_IA"}, tags=TAGS)
            assert DESCRIBING.items() <= dict(store.head("k").attributes).items()
            assert store.tags("k") == TAGS
