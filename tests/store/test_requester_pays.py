"""``requester_pays``: the header goes with every request, is signed, and is refused where it means nothing."""

import pytest

from s3loader.errors import ConfigError
from s3loader.store import StoreOptions, open_store
from s3loader.store.s3.http import Signer
from s3loader.testing import FaultProxy, server
from s3loader.types import ReadRequest

PAYS = StoreOptions(requester_pays=True, max_attempts=1)


@pytest.fixture(scope="module")
def s3():
    with server("rclone") as s3:  # it checks signatures
        s3.bucket("pays")
        yield s3


@pytest.mark.parametrize("engine", ["direct", "boto3"])
def test_every_request_says_it_and_is_signed_for_it(s3, engine):
    with (
        FaultProxy(s3.endpoint_url) as proxy,
        s3.open_store("pays", endpoint_url=proxy.endpoint_url, engine=engine, options=PAYS) as store,
    ):
        store.put("a", b"content")
        assert bytes(store.get("a")) == b"content"
        assert [bytes(r.data) for r in store.read_many([ReadRequest("a", 1, 3)])] == [b"on"]
        assert store.head("a").size == 7
        assert [meta.key for meta in store.list("")] == ["a"]
        store.delete("a")
        sent = [(seen.method, seen.headers.get("x-amz-request-payer")) for seen in proxy.requests]
    assert len(sent) >= 6
    assert {payer for _, payer in sent} == {"requester"}


def test_without_it_nothing_is_said(s3):
    with FaultProxy(s3.endpoint_url) as proxy, s3.open_store("pays", endpoint_url=proxy.endpoint_url) as store:
        store.put("b", b"x")
        assert all("x-amz-request-payer" not in seen.headers for seen in proxy.requests)


def test_it_goes_with_unsigned_requests_too():
    signer = Signer(None, "us-east-1", "host", always={"x-amz-request-payer": "requester"})
    assert "x-amz-request-payer: requester\r\n" in signer.get("/k")


def test_it_is_refused_where_it_means_nothing():
    with pytest.raises(ConfigError, match="requester_pays means nothing to GCS"):
        open_store("gs://bucket", options=PAYS)
    with pytest.raises(ConfigError, match="client of your own"):
        open_store("s3://bucket", s3_client=object(), options=PAYS)
