"""Settings: where each value is found, and that secrets stay out of sight."""

from __future__ import annotations

import os
import pickle
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3loader.config import S3Settings, Secret, read_dotenv
from s3loader.endpoint import Endpoint
from s3loader.errors import ConfigError

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def aws_config(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    Path("aws-config").write_text(text)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(Path("aws-config").absolute()))


def test_nothing_set() -> None:
    found = S3Settings()
    assert (found.endpoint_url, found.bucket, found.aws_access_key_id, found.profile) == (None, None, None, None)
    assert found.region == "us-east-1"
    assert found.origins == {"region": "default", "addressing_style": "default"}


def test_each_layer_beats_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def region() -> tuple[str | None, str]:
        found = S3Settings()
        return found.region, found.origins["region"]

    aws_config(monkeypatch, "[default]\nregion = from-config\n")
    assert region() == ("from-config", "AWS config")
    Path(".env").write_text("AWS_REGION=from-dotenv-aws\n")
    assert region() == ("from-dotenv-aws", ".env AWS_REGION")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "from-aws-default")
    assert region() == ("from-aws-default", "env AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", "from-aws")
    assert region() == ("from-aws", "env AWS_REGION")
    Path(".env").write_text("S3_REGION=from-dotenv\n")
    assert region() == ("from-dotenv", ".env S3_REGION")
    monkeypatch.setenv("S3_REGION", "from-env")
    assert region() == ("from-env", "env S3_REGION")
    found = S3Settings(region="from-argument")
    assert (found.region, found.origins["region"]) == ("from-argument", "argument")
    assert "S3_REGION" not in read_dotenv("nothing.env")


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_REGION", "")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert S3Settings().origins["region"] == "env AWS_REGION"


def test_dotenv_leaves_the_environment_alone() -> None:
    Path(".env").write_text("S3_BUCKET=b\nS3_AWS_ACCESS_KEY_ID=k\nS3_AWS_SECRET_ACCESS_KEY=s\n")
    before = dict(os.environ)
    found = S3Settings()
    assert found.bucket == "b"
    assert dict(os.environ) == before


def test_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "S3_ENDPOINT_URL": "http://127.0.0.1:3900/",
        "S3_REGION": "garage",
        "S3_BUCKET": "default",
        "S3_AWS_ACCESS_KEY_ID": "GK123",
        "S3_AWS_SECRET_ACCESS_KEY": SECRET,
        "S3_AWS_SESSION_TOKEN": "token/+=",
        "AWS_CA_BUNDLE_PATH": "/ca.pem",
        "AWS_PROFILE": "someone",
    }
    aws_config(monkeypatch, "[profile someone]\n")
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    found = S3Settings()
    assert found.endpoint_url == "http://127.0.0.1:3900"
    assert (found.region, found.bucket, found.aws_access_key_id) == ("garage", "default", "GK123")
    assert found.aws_secret_access_key == SECRET
    assert found.aws_session_token == "token/+="
    assert (found.ca_bundle, found.profile) == ("/ca.pem", "someone")
    assert found.origins["aws_secret_access_key"] == "env S3_AWS_SECRET_ACCESS_KEY"
    assert found.origins["ca_bundle"] == "env AWS_CA_BUNDLE_PATH"


def test_aws_endpoint_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    assert S3Settings().endpoint_url == "http://all"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3")
    assert S3Settings().endpoint_url == "http://s3"
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert S3Settings().endpoint_url is None


def test_services_section_of_the_aws_config(monkeypatch: pytest.MonkeyPatch) -> None:
    aws_config(
        monkeypatch,
        "[profile lab]\nregion = eu-north-1\nservices = lab\nca_bundle = /lab.pem\ns3 =\n    addressing_style = virtual\n"
        "[services lab]\ns3 =\n    endpoint_url = https://s3.lab\n",
    )
    found = S3Settings(profile="lab")
    assert (found.endpoint_url, found.region, found.ca_bundle) == ("https://s3.lab", "eu-north-1", "/lab.pem")
    assert found.addressing_style == "virtual"
    assert found.origins["endpoint_url"] == "AWS config"


def test_unknown_profile() -> None:
    with pytest.raises(ConfigError, match="no AWS profile 'nobody'") as caught:
        S3Settings(profile="nobody")
    assert caught.value.hint


def test_keys_come_from_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("S3_AWS_SECRET_ACCESS_KEY", "envsecret")
    monkeypatch.setenv("S3_AWS_SESSION_TOKEN", "envtoken")
    given = S3Settings(aws_access_key_id="ARGKEY", aws_secret_access_key="argsecret")
    assert (given.aws_access_key_id, given.aws_secret_access_key, given.aws_session_token) == ("ARGKEY", "argsecret", None)
    monkeypatch.delenv("S3_AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="aws_secret_access_key is missing"):
        S3Settings()
    with pytest.raises(ConfigError, match="aws_access_key_id is missing"):
        S3Settings(aws_secret_access_key=SECRET)


def test_a_profile_asked_for_beats_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    aws_config(monkeypatch, "[profile lab]\naws_access_key_id = PROFILEKEY\naws_secret_access_key = profilesecret\n")
    for name in ("S3_AWS_ACCESS_KEY_ID", "S3_AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "environment")
    assert S3Settings(profile="lab").aws_access_key_id is None
    assert S3Settings(profile="lab").create_session().get_credentials().access_key == "PROFILEKEY"
    assert S3Settings().aws_access_key_id == "environment"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"region": ""}, "region is empty"),
        ({"bucket": 5}, "bucket is not a string"),
        ({"addressing_style": "host"}, "addressing_style is 'host'"),
        ({"aws_access_key_id": "K", "aws_secret_access_key": SECRET + "\n"}, "white space"),
        ({"regoin": "x"}, "regoin"),
    ],
)
def test_bad_values(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        S3Settings.load(**values)
    assert SECRET not in str(caught.value)


def test_secrets_do_not_show() -> None:
    found = S3Settings(aws_access_key_id="AKIAIOSFODNN7EXAMPLE", aws_secret_access_key=SECRET, aws_session_token="tok/en")
    for text in (repr(found), str(found), found.describe(), f"{found}", "%s %r" % ((found.aws_secret_access_key,) * 2)):
        assert SECRET not in text
        assert "tok/en" not in text
        assert "IOSFODNN7EXAMPLE" not in text
    assert "region" in found.describe()
    secret = found.aws_secret_access_key
    assert isinstance(secret, Secret)
    assert secret == SECRET
    assert secret.reveal() == SECRET
    assert secret.encode() == SECRET.encode()
    assert f"AWS4{secret}" == f"AWS4{SECRET}"  # as botocore's signer writes it


def test_the_settings_sign_like_botocore_with_plain_keys() -> None:
    found = S3Settings(endpoint_url="http://127.0.0.1:9", aws_access_key_id="K", aws_secret_access_key=SECRET)
    url = found.create_client().generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "k"})
    assert "X-Amz-Credential=K%2F" in url
    assert "127.0.0.1:9/b/k?" in url


def test_pickle_equality_and_replace() -> None:
    found = S3Settings(region="r", aws_access_key_id="K", aws_secret_access_key=SECRET)
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert again.origins == found.origins
    assert hash(again) == hash(found)
    changed = found.replace(region="other", bucket="b")
    assert (changed.region, changed.bucket, changed.aws_secret_access_key) == ("other", "b", SECRET)
    assert changed.origins["bucket"] == "argument"
    assert found.region == "r"
    with pytest.raises(ConfigError, match="nothing"):
        found.replace(nothing="x")
    assert found.replace(region=None).region is None


def test_replaced_keys_leave_nothing_of_the_old_ones() -> None:
    found = S3Settings(aws_access_key_id="OLD", aws_secret_access_key=SECRET, aws_session_token="token", region="r")
    new = found.replace(aws_access_key_id="NEW", aws_secret_access_key="secret")
    assert (new.aws_access_key_id, new.aws_session_token, new.region) == ("NEW", None, "r")
    assert "aws_session_token" not in new.origins
    with pytest.raises(ConfigError, match="aws_secret_access_key is missing"):
        found.replace(aws_access_key_id="NEW")
    by_profile = found.replace(profile="lab")
    assert (by_profile.profile, by_profile.aws_access_key_id) == ("lab", None)


# -- .env ----------------------------------------------------------------------------------------


def test_dotenv_syntax() -> None:
    Path(".env").write_bytes(
        b'\xef\xbb\xbf# comment\r\nexport A=1 # one\r\n B = two words \nC=\'raw $x \\n #\' # c\nD="a\\"b\\nc"\nE=\nF=x#y\n'
        b'not a line\nG="over\nlines"\n=broken\nH=$A\nA=2\n'
    )
    assert read_dotenv() == {
        "A": "2",
        "B": "two words",
        "C": "raw $x \\n #",
        "D": 'a"b\nc',
        "E": "",
        "F": "x#y",
        "G": "over\nlines",
        "H": "$A",
    }


def test_dotenv_that_cannot_be_read() -> None:
    Path(".env").write_bytes(b"S3_BUCKET=\xff\xfe")
    with pytest.raises(ConfigError, match="UnicodeDecodeError"):
        S3Settings()
    Path(".env").unlink()
    Path(".env").mkdir()
    assert read_dotenv() == {}


NAMES = st.text(string.ascii_uppercase + "_", min_size=1, max_size=8)
VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=30)


@given(st.dictionaries(NAMES, VALUES, max_size=5))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dotenv_gives_back_what_was_quoted(values: dict[str, str]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    Path(".env").write_text(
        "".join(f"{name}={quoted(value)}\n" for name, value in values.items()), encoding="utf-8", newline=""
    )
    assert read_dotenv() == values


# -- endpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "host_header", "path"),
    [
        ({}, "buck.s3.amazonaws.com", "/a%20b/%C3%BC"),
        ({"region": "cn-north-1"}, "buck.s3.cn-north-1.amazonaws.com.cn", "/a%20b/%C3%BC"),
        ({"addressing_style": "path"}, "s3.amazonaws.com", "/buck/a%20b/%C3%BC"),
        ({"endpoint_url": "http://127.0.0.1:9000"}, "127.0.0.1:9000", "/buck/a%20b/%C3%BC"),
        ({"endpoint_url": "http://h:80/"}, "h", "/buck/a%20b/%C3%BC"),
        ({"endpoint_url": "https://h:443"}, "h", "/buck/a%20b/%C3%BC"),
        ({"endpoint_url": "https://h:80/gate/way/"}, "h:80", "/gate/way/buck/a%20b/%C3%BC"),
        ({"endpoint_url": "http://[::1]:9"}, "[::1]:9", "/buck/a%20b/%C3%BC"),
        ({"endpoint_url": "https://s3.eu-west-1.amazonaws.com"}, "buck.s3.eu-west-1.amazonaws.com", "/a%20b/%C3%BC"),
        ({"endpoint_url": "https://oss.example", "addressing_style": "virtual"}, "buck.oss.example", "/a%20b/%C3%BC"),
    ],
)
def test_endpoint_of_a_key(given: dict[str, str], host_header: str, path: str) -> None:
    endpoint = Endpoint.from_settings(S3Settings(**given), "buck")
    assert endpoint.host_header == host_header
    assert endpoint.path("a b/ü") == path
    assert endpoint.url("a b/ü") == f"{endpoint.scheme}://{host_header}{path}"
    assert endpoint.tls == (endpoint.scheme == "https")


@pytest.mark.parametrize("bucket", ["with.dot", "Upper", "under_score", "ab"])
def test_buckets_that_cannot_be_hosts_go_into_the_path(bucket: str) -> None:
    assert Endpoint.from_settings(S3Settings(), bucket).addressing_style == "path"


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_paths_are_quoted_as_botocore_signs_them(key: str) -> None:
    from urllib.parse import unquote

    endpoint = Endpoint("http", "h", 80, "", "path", "r", "b")
    path = endpoint.path(key)
    assert unquote(path.removeprefix("/b/")) == key
    assert set(path) <= set(string.ascii_letters + string.digits + "-_.~/%")


def test_keys_that_are_no_unicode() -> None:
    with pytest.raises(ConfigError, match="not valid Unicode"):
        Endpoint("http", "h", 80, "", "path", "r", "b").path("a\ud800")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9000", "ftp://h", "http://", "http://h:99999", "http://h?x=1", "http://h/a b\tc", "//h"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="endpoint_url") as caught:
        Endpoint.from_settings(S3Settings(endpoint_url=url), "b")
    assert caught.value.hint


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="password") as caught:
        Endpoint.from_settings(S3Settings(endpoint_url=f"http://user:{SECRET.replace('/', '-')}@h"), "b")
    assert "wJalr" not in str(caught.value)


def test_no_bucket_and_no_ca_bundle() -> None:
    with pytest.raises(ConfigError, match="no bucket"):
        Endpoint.from_settings(S3Settings())
    with pytest.raises(ConfigError, match="is not a file"):
        Endpoint.from_settings(S3Settings(ca_bundle="/nothing.pem"), "b")
