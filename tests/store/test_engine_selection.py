"""Which engine `open_store` picks, and what it says about it."""

from __future__ import annotations

from typing import Any

import pytest

from s3loader.config import S3Settings
from s3loader.errors import ConfigError
from s3loader.store import open_store
from s3loader.store.engine_choice import explain_engine, open_backend
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
    assert why == "engine direct: our own client does all of S3, and is the fastest"


@pytest.mark.parametrize("engine", ["direct", "boto3"])
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


def test_a_proxy_is_found_as_botocore_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:8")
    engine, why = picked("s3://bucket")
    assert engine == "direct"
    assert why.splitlines()[1] == "through the proxy 127.0.0.1"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "proxy" not in picked("s3://bucket")[1]


def test_obstore_serves_other_clouds_only() -> None:
    with pytest.raises(ConfigError, match="gs:// and az://"):
        picked("s3://bucket", engine="obstore")


@pytest.mark.parametrize("name", ["b#x", "b?x", "a..b", "bücket", "b x", "-b-", "x" * 256, "b%2Fx"])
def test_a_bucket_name_that_is_none(name: str) -> None:
    """It would end up in a path or a host, and name another thing there."""
    with pytest.raises(ConfigError, match="bucket"):
        open_store(f"s3://{name}/k", settings=SETTINGS)


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
        ("s3://b", {"engine": "fastest"}, "engine"),
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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
