"""Signatures: botocore's own signer is the oracle."""

from __future__ import annotations

import calendar
from urllib.parse import quote

import botocore.auth
import botocore.credentials
from botocore.awsrequest import AWSRequest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s3loader.config import S3Settings
from s3loader.credentials import Credentials
from s3loader.endpoint import Endpoint
from s3loader.store.s3.http import Signer

KEYS = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
TOKEN = Credentials(KEYS.access_key_id, KEYS.secret_access_key, "token/+==")
T0 = float(calendar.timegm((2026, 11, 25, 23, 59, 58)))

keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
odd_keys = st.text(st.sampled_from("aZ0-_.~/ +%&=?#ü€😀'()*!:@,;\"\\\n\t"), min_size=1, max_size=30)


def endpoint(url: str = "http://127.0.0.1:9000", style: str = "path") -> Endpoint:
    settings = S3Settings(endpoint_url=url, region="eu-west-3", addressing_style=style)
    return Endpoint.from_settings(settings, "some-bucket")


def oracle(credentials: Credentials, where: Endpoint, method: str, target: str, sent: dict[str, str], now: float) -> str:
    """The Authorization header botocore would send with just these headers."""
    signer = botocore.auth.S3SigV4Auth(
        botocore.credentials.Credentials(credentials.access_key_id, credentials.secret_access_key, credentials.session_token),
        "s3",
        where.region,
    )
    request = AWSRequest(method, f"{where.scheme}://{where.host_header}{target}", headers={})
    for name, value in sent.items():
        if name not in ("authorization", "host", "user-agent"):
            request.headers[name] = value
    request.context["timestamp"] = sent["x-amz-date"]
    canonical = signer.canonical_request(request)
    signature = signer.signature(signer.string_to_sign(request, canonical), request)
    names = signer.signed_headers(signer.headers_to_sign(request))
    return f"AWS4-HMAC-SHA256 Credential={signer.scope(request)}, SignedHeaders={names}, Signature={signature}"


def parse(head: str) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.removesuffix("\r\n").split("\r\n")
    method, target, version = first.split(" ")
    assert version == "HTTP/1.1"
    headers = dict(line.split(": ", 1) for line in lines)
    return method, target, {name.lower(): value for name, value in headers.items()}


@settings(max_examples=100, deadline=None)
@given(
    key=keys | odd_keys,
    credentials=st.sampled_from([KEYS, TOKEN]),
    place=st.sampled_from(
        [
            endpoint(),
            endpoint("https://s3.example.com/gate%20way"),
            endpoint("https://s3.example.com", "virtual"),
            endpoint("http://[::1]:80"),
        ]
    ),
    later=st.integers(0, 5),
)
@example("a b+c//d~e%25%f/../ü/.", TOKEN, endpoint(), 3)
def test_get_is_signed_as_botocore_signs_it(key: str, credentials: Credentials, place: Endpoint, later: int) -> None:
    now = T0
    signer = Signer(credentials, place.region, place.host_header, clock=lambda: now)
    signer.get(place.path("another"))
    now += later  # may be another second, or another day
    head = signer.get(place.path(key))
    assert head == signer.get(place.path(key))
    method, target, sent = parse(head)
    assert (method, target) == ("GET", place.path(key))
    assert head.isascii()
    assert sent["host"] == place.host_header
    assert sent["x-amz-date"] == (f"20261125T23595{8 + later}Z" if later < 2 else f"20261126T00000{later - 2}Z")
    assert sent["authorization"] == oracle(credentials, place, method, target, sent, now)


@settings(max_examples=50, deadline=None)
@given(
    key=odd_keys,
    credentials=st.sampled_from([KEYS, TOKEN]),
    checksum=st.sampled_from(["AAAAAA==", "x1y2+/=="]),
    content_type=st.sampled_from([None, "text/plain", "multipart/form-data; boundary=a  b"]),
    upload=st.none() | st.text(st.sampled_from("aZ0-_.~/+= "), min_size=1, max_size=12),
)
def test_put_is_signed_as_botocore_signs_it(
    key: str, credentials: Credentials, checksum: str, content_type: str | None, upload: str | None
) -> None:
    place = endpoint()
    signer = Signer(credentials, place.region, place.host_header, clock=lambda: T0)
    headers = {"x-amz-checksum-crc32c": checksum}
    if content_type is not None:
        headers["content-type"] = content_type
    query = f"partNumber=3&uploadId={quote(upload, safe='-_.~')}" if upload else ""
    method, target, sent = parse(signer.head("PUT", place.path(key), query, headers))
    assert method == "PUT"
    assert headers.items() <= sent.items()
    assert sent["authorization"] == oracle(credentials, place, method, target, sent, T0)


def test_one_signature_per_second_and_path() -> None:
    now = T0
    signer = Signer(KEYS, "us-east-1", "h", clock=lambda: now)
    first = signer.get("/a")
    now += 0.9
    assert signer.get("/a") is first
    assert signer.get("/b") != first
    now += 0.2
    assert signer.get("/a") != first
    now = T0  # the clock was set back
    assert signer.get("/a") == first


def test_without_credentials_nothing_is_signed() -> None:
    signer = Signer(None, "us-east-1", "h")
    assert signer.get("/a") == "GET /a HTTP/1.1\r\nHost: h\r\nUser-Agent: s3loader\r\n"
    assert (
        signer.head("PUT", "/a", "q=1", {"x-amz-a": "b"})
        == "PUT /a?q=1 HTTP/1.1\r\nHost: h\r\nUser-Agent: s3loader\r\nx-amz-a: b\r\n"
    )
