"""Our reading of a listing's XML against botocore's."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, quote_plus
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from botocore.awsrequest import AWSResponse
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.config import S3Settings
from s3loader.errors import AccessDeniedError, StoreError, UnavailableError
from s3loader.store.boto3.client import entries_of, read_pages_ourselves
from s3loader.store.boto3.engine import Boto3Backend
from s3loader.store.s3.xml import read_page
from s3loader.types import CommonPrefix, ObjectMeta

LOCAL = S3Settings(endpoint_url="http://127.0.0.1:9", aws_access_key_id="K", aws_secret_access_key="S")
TIMES = st.sampled_from(
    [
        "2024-02-29T23:59:59.123Z",
        "2009-10-12T17:50:30Z",
        "2024-01-01T00:00:00+02:00",
        "Wed, 12 Oct 2009 17:50:00 GMT",
        "20240101T000000Z",
    ]
)


class _Raw:
    def __init__(self, body: bytes) -> None:
        self.body = body

    def stream(self, **_: Any) -> Any:
        yield self.body


def _client(pages: list[tuple[int, bytes]], *, ours: bool) -> Any:
    """A client that is answered with `pages`, one after the other."""
    client = LOCAL.create_client()
    left = list(pages)

    def answer(request: Any, **_: Any) -> AWSResponse:
        status, body = left.pop(0)
        return AWSResponse(request.url, status, {"content-type": "application/xml"}, _Raw(body))

    client.meta.events.register("before-send.s3", answer)
    if ours:
        read_pages_ourselves(client)
    return client


def _page(entries: list[tuple[str, int, str, str]], prefixes: list[str], encoding: Any, space: str, token: str | None) -> bytes:
    code = encoding or (lambda text: text)
    rows = [
        f"<Contents><Key>{escape(code(key))}</Key><LastModified>{time}</LastModified><ETag>{escape(etag)}</ETag>"
        f"<Size>{size}</Size><Owner><ID>Key</ID></Owner><StorageClass>STANDARD</StorageClass></Contents>"
        for key, size, etag, time in entries
    ]
    rows += [f"<CommonPrefixes><Prefix>{escape(code(prefix))}</Prefix></CommonPrefixes>" for prefix in prefixes]
    rows += ["<EncodingType>url</EncodingType>"] if encoding else []
    rows += [f"<NextContinuationToken>{escape(token)}</NextContinuationToken>"] if token else []
    more = str(bool(token)).lower()
    text = (
        f"<ListBucketResult{space}><Name>b</Name><Prefix/><IsTruncated>{more}</IsTruncated>{''.join(rows)}</ListBucketResult>"
    )
    return ('<?xml version="1.0" encoding="UTF-8"?>\n' + text).encode()


KEYS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
SEEN_IN_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_page_means_what_botocore_makes_of_it(data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from([None, quote, quote_plus]))
    keys = KEYS if encoding else KEYS.map(lambda key: SEEN_IN_XML.sub("_", key))
    row = st.tuples(keys, st.integers(0, 1 << 45), st.sampled_from(['"e1"', 'W/"e2"', "e3", ""]), TIMES)
    space = data.draw(st.sampled_from(["", ' xmlns:a="urn:other"', ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"']))
    token = data.draw(st.none() | st.text("ab+/=%&<", min_size=1))
    body = _page(data.draw(st.lists(row, max_size=5)), data.draw(st.lists(keys, max_size=3)), encoding, space, token)

    theirs, ours = (_listed_by(_client([(200, body)], ours=which)) for which in (False, True))

    assert ours == theirs


def _listed_by(client: Any) -> tuple[list[ObjectMeta | CommonPrefix], bool, str | None]:
    page = client.list_objects_v2(Bucket="b")
    client.close()
    return entries_of(page), page["IsTruncated"], page.get("NextContinuationToken")


def test_our_client_reads_pages_so_and_follows_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    time = "2024-02-29T00:00:00Z"
    pages = [
        _page([("a%\n", 1, '"x"', time)], [], quote_plus, "", "next"),
        _page([("b c+d", 2, '"y"', time)], ["c/"], quote_plus, "", None),
    ]
    backend = Boto3Backend("b", LOCAL)
    client = _client([(200, page) for page in pages], ours=False)
    monkeypatch.setattr(S3Settings, "create_client", lambda self, **_: client)

    assert list(backend.list()) == [
        ObjectMeta("a%\n", 1, "x", 1709164800.0),
        ObjectMeta("b c+d", 2, "y", 1709164800.0),
        CommonPrefix("c/"),
    ]


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>", AccessDeniedError),
        (200, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>", StoreError),
        (200, b"<ListBucketResult><Contents><Key>a", UnavailableError),
        (200, b"<!DOCTYPE html><html><br></html>", UnavailableError),
    ],
)
def test_what_is_no_page_is_an_error(status: int, body: bytes, kind: type[StoreError], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Boto3Backend("b", LOCAL)
    client = _client([(status, body)] * 9, ours=False)
    monkeypatch.setattr(S3Settings, "create_client", lambda self, **_: client)

    with pytest.raises(kind):
        list(backend.list())


def test_a_page_without_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="without"):
        read_page(ElementTree.fromstring("<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>"))
