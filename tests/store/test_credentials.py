"""One source of credentials for all engines: static keys, the AWS chain, refresh, fork."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forking import in_child

from s3loader.config import S3Settings
from s3loader.credentials import Credentials, CredentialsSource
from s3loader.errors import CredentialsError

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def vending(monkeypatch: pytest.MonkeyPatch, lifetime: float) -> Path:
    """A profile ``vend`` whose keys come from a program: a new serial number each time it runs."""
    log = Path("serials").absolute()
    program = Path("vend.py").absolute()
    program.write_text(
        "import json, os, time\n"
        f"fd = os.open({str(log)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
        "os.write(fd, b'x')\n"
        f"n = os.path.getsize({str(log)!r})\n"
        f"end = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() + {lifetime}))\n"
        "print(json.dumps(dict(Version=1, AccessKeyId=f'KEY{n}', SecretAccessKey='s', SessionToken='t', Expiration=end)))\n"
    )
    config = Path("config").absolute()
    config.write_text(f"[profile vend]\nregion = r\ncredential_process = {sys.executable} {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    return log


def test_static_keys_need_no_botocore() -> None:
    code = (
        "import sys\nfrom s3loader.config import S3Settings\nfrom s3loader.credentials import CredentialsSource\n"
        "c = CredentialsSource(S3Settings(aws_access_key_id='K', aws_secret_access_key='S'))()\n"
        "assert (c.access_key_id, c.secret_access_key, c.session_token, c.expiry) == ('K', 'S', None, None)\n"
        "assert type(c.secret_access_key) is str\n"
        "assert not {'botocore', 'boto3', 'obstore', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_environment_keys_of_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "K")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T")
    assert CredentialsSource(S3Settings())() == Credentials("K", SECRET, "T")


def test_none_anywhere() -> None:
    with pytest.raises(CredentialsError, match="no credentials were found") as caught:
        CredentialsSource(S3Settings())()
    assert "S3_AWS_ACCESS_KEY_ID" in str(caught.value.hint)
    assert "unsigned" in str(caught.value.hint)


def test_unsigned() -> None:
    source = CredentialsSource(S3Settings(aws_access_key_id="K", aws_secret_access_key="S"), unsigned=True)
    assert source() is None
    assert source.refresh() is None


def test_chain_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path("config").absolute()
    config.write_text("[profile broken]\nregion = r\ncredential_process = false\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    with pytest.raises(CredentialsError, match="the AWS chain gave no credentials"):
        CredentialsSource(S3Settings(profile="broken"))()


def test_long_lived_keys_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log = vending(monkeypatch, 3600)
    source = CredentialsSource(S3Settings(profile="vend"))
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: source(), range(64)))
    (keys,) = found
    assert keys is not None
    assert keys.access_key_id == "KEY1"
    assert keys.session_token == "t"
    assert keys.expiry == pytest.approx(time.time() + 3600, abs=120)
    assert log.stat().st_size == 1
    again = source.refresh()
    assert again is not None
    assert again.access_key_id == "KEY2"


def test_keys_about_to_expire_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    vending(monkeypatch, 30)
    source = CredentialsSource(S3Settings(profile="vend"))
    first, second = source(), source()
    assert first is not None
    assert second is not None
    assert first.access_key_id != second.access_key_id


def test_all_of_boto3_shares_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    log = vending(monkeypatch, 3600)
    settings = S3Settings(profile="vend")
    source = CredentialsSource(settings)
    source()
    url = settings.create_client(session=source.session()).generate_presigned_url(
        "get_object", Params={"Bucket": "b", "Key": "k"}
    )
    assert "KEY1" in url
    assert log.stat().st_size == 1


def test_fork_while_a_thread_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is held at the moment of the fork by a thread that the child does not have."""
    vending(monkeypatch, 3600)
    source = CredentialsSource(S3Settings(profile="vend"))
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with source._process.lock:
            held.set()
            release.wait(600)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(600)

    def work() -> None:
        keys = source()
        assert keys is not None
        assert keys.access_key_id.startswith("KEY")
        source.session()

    try:
        in_child(work)
    finally:
        release.set()
        thread.join()


def test_a_forked_child_goes_on_with_keys_that_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    log = vending(monkeypatch, 7200)
    source = CredentialsSource(S3Settings(profile="vend"))
    mine = source()

    def work() -> None:
        source._ask_at = 0.0  # long after
        source._own_process()
        assert source() == mine

    in_child(work)
    assert log.stat().st_size == 1


def test_pickle_goes_by_the_settings() -> None:
    source = CredentialsSource(S3Settings(aws_access_key_id="K", aws_secret_access_key=SECRET))
    again = pickle.loads(pickle.dumps(source))
    assert again() == source()
    assert SECRET not in repr(source) + repr(source()) + str(source())
    assert json.dumps(repr(source())) == '"Credentials(expiry=None)"'
