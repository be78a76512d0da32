"""Which engine `open_store` picks, and what it says about it."""

from __future__ import annotations

from typing import Any

import pytest

from s3loader.config import S3Settings
from s3loader.errors import ConfigError
from s3loader.store import open_store
from s3loader.store.s3 import explain_engine, open_backend
from s3loader.types import ObjectURL

SETTINGS = S3Settings(endpoint_url="http://127.0.0.1:9", aws_access_key_id="K", aws_secret_access_key="S")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def picked(url: str, **options: Any) -> tuple[str, str]:
    backend = open_backend(ObjectURL.parse(url), SETTINGS, **options)
    try:
        return backend.engine, explain_engine(backend)
    finally:
        backend.close()


def test_auto() -> None:
    engine, why = picked("s3://bucket/prefix")
    assert engine == "direct"
    assert why.splitlines() == [
        "engine direct: it is the fastest for GET, PUT and UploadPart over HTTP(S)",
        "what it does not do, and whatever fails, goes to obstore",
        "listings, copies, multipart control, versions and odd keys go to boto3",
    ]


@pytest.mark.parametrize("engine", ["direct", "obstore", "boto3"])
def test_forced(engine: str) -> None:
    found, why = picked("s3://bucket", engine=engine)
    assert found == engine
    assert "it was asked for" in why


def test_a_client_of_ones_own_and_other_clouds() -> None:
    assert picked("s3://bucket", s3_client=SETTINGS.create_client())[0] == "boto3"
    for url in ("gs://bucket", "az://container"):
        engine, why = picked(url)
        assert engine == "obstore"
        assert "the one engine" in why


def test_a_proxy_is_for_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:8")
    engine, why = picked("s3://bucket")
    assert engine == "obstore"
    assert "a proxy is set" in why
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert picked("s3://bucket")[0] == "direct"
    monkeypatch.setenv("no_proxy", "")
    assert picked("s3://bucket", engine="direct")[0] == "direct"


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "goes to boto3" in picked("s3://bucket")[1]


def test_buckets_only_boto3_can_sign_for() -> None:
    engine, why = picked("s3://express--use1-az4--x-s3")
    assert engine == "boto3"
    assert "directory buckets" in why
    with pytest.raises(ConfigError, match="cannot serve the bucket"):
        picked("s3://express--use1-az4--x-s3", engine="direct")


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("s3://b", {"endpoint_url": "127.0.0.1"}, "endpoint_url"),
        ("s3://b", {"ca_bundle": "/nowhere.pem"}, "CA bundle"),
        ("s3://b", {"engine": "fastest"}, "unknown engine"),
        ("s3:///k", {}, "no bucket"),
    ],
)
def test_what_cannot_be_opened_is_said_at_once(url: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        open_store(url, **settings)
    assert caught.value.hint


def test_opening_asks_nothing_and_imports_neither_boto3_nor_obstore() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom s3loader.store import open_store\n"
        "open_store('s3://b/p', endpoint_url='http://127.0.0.1:9', access_key_id='K', secret_access_key='S')\n"
        "assert not {'boto3', 'botocore', 'obstore'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
