"""The embedded servers start, serve, and leave nothing behind, however their starter ends."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import pytest

import s3loader.testing.servers as module
from s3loader.errors import ConfigError, StoreTimeoutError, UnavailableError
from s3loader.testing import Server, ServerKind, server

KINDS = get_args(ServerKind)


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the servers put their files, to see that they go."""
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def listens(running: Server) -> bool:
    with socket.socket() as probe:
        parts = urlsplit(running.endpoint_url)
        return probe.connect_ex((parts.hostname, parts.port)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_serves_and_stops(kind: ServerKind, tmp: Path) -> None:
    with server(kind) as running:
        assert listens(running)
        assert [p.name.startswith(f"s3loader-{kind}-") for p in tmp.iterdir()] == [True]
        bucket = running.bucket()
        assert running.bucket() != bucket
        assert running.bucket("named") == "named"
        client = running.client()
        client.put_object(Bucket=bucket, Key="a/b", Body=b"data")
        assert client.get_object(Bucket=bucket, Key="a/b")["Body"].read() == b"data"
        client.close()
        assert running.environment["S3_ENDPOINT_URL"] == running.endpoint_url
    assert not listens(running)
    assert list(tmp.iterdir()) == []


def test_two_at_once_share_nothing(tmp: Path) -> None:
    with server("rclone") as one, server("rclone") as two:
        assert one.endpoint_url != two.endpoint_url
        one.bucket("here")
        client = two.client()
        assert client.list_buckets()["Buckets"] == []
        client.close()


def test_ends_with_the_block_that_raises(tmp: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), server("rclone") as running:
        raise RuntimeError("mine")
    assert not listens(running)
    assert list(tmp.iterdir()) == []


def _await_end(running: Server, tmp: Path, deadline: float = 600) -> None:
    end = time.monotonic() + deadline
    while (listens(running) or list(tmp.iterdir())) and time.monotonic() < end:
        time.sleep(0.02)
    assert not listens(running)
    assert list(tmp.iterdir()) == []


CHILD = """
import os, sys, threading, tempfile
tempfile.tempdir = sys.argv[1]
from s3loader.testing import server
if sys.argv[2] == "forked":
    r, w = os.pipe()
with server("rclone") as s:
    if sys.argv[2] == "forked" and os.fork() == 0:  # a child holds every pipe and outlives us
        os.close(w)
        os.read(r, 1)
        os._exit(0)
    print(s.endpoint_url, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["kill", "forked"])
def test_does_not_outlive_a_killed_starter(how: str, tmp: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    running = Server("rclone", starter.stdout.readline().strip())
    assert listens(running)
    starter.kill()
    starter.communicate()
    _await_end(running, tmp)


def test_does_not_outlive_a_killed_launcher(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[subprocess.Popen[bytes]] = []
    real = module._launch
    monkeypatch.setattr(module, "_launch", lambda *a: launched.append(real(*a)) or launched[-1])
    with server("rclone") as running:
        launched[0].kill()
        launched[0].wait()
    _await_end(running, tmp)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_the_terminal_leaves_it_to_the_starter(tmp: Path) -> None:
    """The signal goes to the whole foreground group; the server must live until the block ends."""
    code = CHILD.replace("    sys.stdin.read()", "    sys.stdin.readline(); s.bucket(); print('ok', flush=True)")
    starter = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, lambda *_: None)\n" + code, str(tmp), "kill"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert starter.stdout is not None
    running = Server("rclone", starter.stdout.readline().strip())
    os.killpg(starter.pid, signal.SIGINT)
    out, _ = starter.communicate("go\n", timeout=600)
    assert out == "ok\n"
    _await_end(running, tmp)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    for kind in KINDS:
        with pytest.raises(ConfigError, match="is not installed") as caught, server(kind):
            pass
        assert caught.value.hint == "pip install 's3loader[testing]'"


def test_finds_rclone_beside_this_python_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert Path(module.find_rclone()).is_file()


def test_refuses_unknown_kinds() -> None:
    with pytest.raises(ConfigError, match="unknown server kind 'minio'"), server("minio"):  # type: ignore[arg-type]
        pass


def test_a_server_that_dies_or_hangs_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp: Path) -> None:
    def command(code: str) -> Any:
        return lambda kind: lambda port, folder: ([sys.executable, "-c", code], {})

    monkeypatch.setattr(module, "_command_of", command("raise SystemExit('no such option')"))
    with pytest.raises(UnavailableError, match="no such option"), server("moto"):
        pass
    monkeypatch.setattr(module, "_command_of", command("import time; time.sleep(600)"))
    with pytest.raises(StoreTimeoutError, match="did not answer in time"), server("moto", timeout=0.3):
        pass
    assert list(tmp.iterdir()) == []


def test_the_users_own_settings_do_not_steer_it(monkeypatch: pytest.MonkeyPatch, tmp: Path) -> None:
    monkeypatch.setenv("RCLONE_AUTH_KEY", '"other,key"')
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with server("rclone") as running:
        assert running.bucket()
