"""What the toolbox needs of the object layer: buckets, open-ended and suffix ranges, all that HEAD tells."""

from __future__ import annotations

import pickle
import uuid
from typing import Any

import boto3
import pytest
from toolbox_places import every_place

from s3loader import BucketNotFoundError, ConflictError, ObjectExistsError, RangeError, events, open_store, s3
from s3loader.errors import ObjectChangedError, ObjectNotFoundError, UnsupportedOperationError
from s3loader.s3 import create_bucket, delete_bucket, list_buckets


@every_place
def test_buckets_come_and_go(place: str) -> None:
    parent = place.rpartition("/")[0] if place.startswith("file:") else place.partition("://")[0] + "://"
    new = f"{place.rpartition('/')[0]}/made-{uuid.uuid4().hex[:10]}"
    assert create_bucket(new) is True
    assert create_bucket(new) is False
    with pytest.raises(ObjectExistsError):
        create_bucket(new, exist_ok=False)
    assert {place, new} <= set(list_buckets(parent))
    with open_store(new) as store:
        store.put("a/b", b"1")
        with pytest.raises(ConflictError, match="not empty") as caught:
            delete_bucket(new)
        assert not caught.value.retryable
        assert store.get("a/b") == b"1"
        store.delete("a/b")
    delete_bucket(new)
    assert new not in list_buckets(parent)
    with pytest.raises(BucketNotFoundError):
        delete_bucket(new)


@pytest.mark.parametrize("url", ["gs://bucket", "az://container"])
def test_buckets_elsewhere_are_refused_with_the_tool_that_can(url: str) -> None:
    for call in (create_bucket, delete_bucket, list_buckets):
        with pytest.raises(UnsupportedOperationError) as caught:
            call(url)
        assert "`" in str(caught.value.hint)


@every_place
def test_ranges_without_an_end_and_from_the_end(place: str) -> None:
    data = bytes(range(100))
    with open_store(place) as store:
        store.put("k", data)
        store.put("empty", b"")
        for start in (0, 1, 99, 100, -1, -100, -1000):
            for end in (None, 0, 1, 50, 100, 1000, -1, -40, -1000):
                low = max(0, start + 100) if start < 0 else start
                high = 100 if end is None else max(0, end + 100) if end < 0 else end
                if high < low and start >= 0 and end is not None and end >= 0:
                    continue  # a bad range, refused elsewhere
                if low == 100 and end not in (None, 100) and high > low:
                    continue  # beyond the end
                assert store.get_range("k", start, end) == data[low : max(low, high)], (start, end)
        assert store.get_range("empty", -5) == b""
        assert store.get_range("empty", 0) == b""
        with pytest.raises(RangeError):
            store.get_range("k", 101)


@pytest.mark.parametrize("place", ["moto", "rclone"], indirect=True)
@pytest.mark.parametrize("engine", ["direct", "boto3"])
def test_bytes_from_the_end_are_one_request(place: str, engine: Any, request: pytest.FixtureRequest) -> None:
    data = bytes(range(100))
    with open_store(place, engine=engine) as store:
        meta = store.put("k", data)
        for count in (1, 99, 100, 1000):
            seen: list[tuple[str, int]] = []
            unsubscribe = events.subscribe(lambda event, seen=seen: seen.append((event.op, event.bytes)))
            try:
                assert store.get_range("k", -count) == data[-count:]
                assert s3.get_range(f"{place}/k", -count, 5) == data[-count:][:5]
            finally:
                unsubscribe()
            if "rclone" not in request.node.name or count < 100:  # it refuses what is longer than the object
                assert seen == 2 * [("GET", min(count, 100))]
        assert store.get_range("k", -5, if_match=meta.etag) == data[-5:]
        with pytest.raises(ObjectChangedError):
            store.get_range("k", -5, if_match="0" * 32)
        with pytest.raises(ObjectNotFoundError):
            store.get_range("none", -5)


@pytest.mark.parametrize("engine", ["direct", "boto3"])
def test_head_tells_all_that_describes_an_object(place: str, engine: str) -> None:
    told = {
        "ContentLanguage": "de",
        "ContentEncoding": "gzip",
        "CacheControl": "max-age=5",
        "ContentDisposition": "inline",
        "StorageClass": "STANDARD_IA",
        "ServerSideEncryption": "AES256",
    }
    boto3.client("s3").put_object(Bucket=place.removeprefix("s3://"), Key="k", Body=b"x", Metadata={"A": "b"}, **told)
    with open_store(place, engine=engine) as store:  # type: ignore[arg-type]
        found = store.head("k")
        assert dict(found.attributes) == {
            "content_language": "de",
            "content_encoding": "gzip",
            "cache_control": "max-age=5",
            "content_disposition": "inline",
            "storage_class": "STANDARD_IA",
            "server_side_encryption": "AES256",
        }
        assert found.metadata["a"] == "b"
        assert pickle.loads(pickle.dumps(found)) == found
    with open_store(f"{place}/", engine=engine) as store:  # type: ignore[arg-type]
        assert store.head("k").attributes == found.attributes
