"""Our client against the benchmarks' own server as a large store is: https, and several addresses behind one name."""

from __future__ import annotations

import random
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bulk_helpers import wait_until
from rogue_server import KEY_ID, SECRET

from benchmarks import _servers
from s3loader import StoreOptions
from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.store.s3 import S3Backend
from s3loader.types import ReadRequest

NAME = "store.test"
ADDRESSES = [f"127.0.0.{i}" for i in (1, 2, 3, 4)]
DATA = random.Random(13).randbytes(3_000_000)
CONNECTIONS = 12


@pytest.fixture(scope="module", name="program")
def _program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s3server")
    try:
        (program,) = _servers.build(folder, "s3server", tls=True)
        _servers.certificate(folder / "tls", NAME)
    except _servers.Unavailable as error:
        pytest.skip(str(error))
    return program


@pytest.fixture(autouse=True)
def _name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`NAME` has all of `ADDRESSES`; other names, such as that at which the server is asked what it counted, their own."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != NAME:
            return resolve(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ADDRESSES]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(
        "s3loader.store.s3.connection._STAGGER", 300.0
    )  # on a slow machine, too, an address that lives is not shunned


@contextmanager
def store(program: Path, *, addresses: int = 4) -> Iterator[int]:
    with _servers.started(program, addresses=addresses, tls=program.parent / "tls") as port:
        yield port


@contextmanager
def client(program: Path, port: int) -> Iterator[S3Backend]:
    settings = S3Settings(
        endpoint_url=f"https://{NAME}:{port}",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        addressing_style="path",
        ca_bundle=str(program.parent / "tls" / "ca.pem"),
    )
    options = StoreOptions(connect_timeout=300, read_timeout=300)
    backend = S3Backend(Endpoint.from_settings(settings, "bucket"), CredentialsSource(settings), options)
    try:
        yield backend
    finally:
        backend.close()


class Counts:
    """What the server has counted since this was made, without those that ask for it."""

    def __init__(self, port: int) -> None:
        self.port, self.before = port, _servers.stats(port)

    def __call__(self) -> dict[str, int]:
        self.before["connections"] += 1
        self.before["connections_127.0.0.1"] += 1
        return {name: count - self.before[name] for name, count in _servers.stats(self.port).items()}

    def of_addresses(self) -> list[int]:
        now = self()
        return [now[f"connections_{address}"] for address in ADDRESSES if f"connections_{address}" in now]

    def handshakes(self) -> int:
        now = self()
        return now["tls_full"] + now["tls_resumed"]


def check_reads(backend: S3Backend, count: int, *, seed: int) -> None:
    """Ranges all over the object, from one byte to several TLS records long."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(DATA)) for _ in range(count)]
    requests = [ReadRequest("k", start, min(len(DATA), start + rng.choice((1, 100, 5000, 16_384, 70_000)))) for start in starts]
    results = list(backend.read_many(requests, max_bytes=1 << 26, concurrency=CONNECTIONS))
    assert [bytes(result.data) for result in results] == [DATA[request.start : request.end] for request in requests]


@pytest.mark.parametrize("living", [4, 3], ids=["all of them", "nothing listens at the last"])
def test_reads_over_four_addresses_on_sessions_that_are_resumed(program: Path, living: int) -> None:
    with store(program, addresses=living) as port, client(program, port) as backend:
        counts = Counts(port)
        backend.put("k", DATA)
        backend.open_ahead(CONNECTIONS)
        check_reads(backend, 300, seed=living)
        # Each connection begins with the next address, and with that after it where nothing listens.
        assert wait_until(lambda: min(counts.of_addresses()) >= CONNECTIONS // len(ADDRESSES)), counts.of_addresses()
        assert wait_until(lambda: counts.handshakes() >= CONNECTIONS + 1)  # some may have been on their way still
        found = counts()
        # The put had the only connection, and the answer came behind the tickets: when the connection was given back, its
        # session was one to go on from. All after it begin with that session or a later one, at whatever address, since the
        # addresses share the key of their tickets; so it does not matter how many begin at once. The other whole handshake is
        # that of the connection for listings, which is urllib3's and has a context of its own.
        assert found["tls_full"] <= 2
        assert found["tls_resumed"] >= CONNECTIONS - 1


def test_a_cold_start_of_many_connections(program: Path) -> None:
    with store(program) as port:
        with client(program, port) as writer:
            writer.put("k", DATA)
        with client(program, port) as backend:
            counts = Counts(port)
            check_reads(backend, 300, seed=5)
            backend._connections.close()
            check_reads(backend, 300, seed=6)
            found = counts()
            # Only a connection that begins before the first answer has come has a whole handshake: until then each has a
            # request of its own under way, and so many requests at a time were allowed.
            assert found["tls_full"] <= CONNECTIONS
            assert found["tls_resumed"] >= 1  # all were closed between the two


def test_a_connection_without_a_ticket_yet_does_not_replace_a_session(program: Path) -> None:
    """Of those that are opened at once, the first is used and its session kept; the others are given later, still unused."""
    with store(program) as port, client(program, port) as backend:
        counts = Counts(port)
        early = backend._connections.open()
        backend.put("k", DATA)
        backend._connections.give(early, new=True)
        backend._connections.open().close()
        assert wait_until(lambda: counts.handshakes() == 3)
        assert counts()["tls_resumed"] == 1


def test_one_port_takes_both_and_tls_is_as_far_away(program: Path) -> None:
    """The benchmarks tell the server over http how far away it is, and read over https. It is never nearer than that."""
    context = ssl.create_default_context(cafile=str(program.parent / "tls" / "ca.pem"))
    with store(program) as port:
        counts = Counts(port)
        far = "first_us=50000&connect_us=50000&rate=10000000"  # 300 ms for the object
        for url in (f"http://127.0.0.1:{port}/bucket/k", f"http://127.0.0.1:{port}/__far?{far}"):
            urllib.request.urlopen(urllib.request.Request(url, data=DATA, method="PUT"), timeout=300).close()
        began = time.monotonic()
        with urllib.request.urlopen(f"https://{NAME}:{port}/bucket/k", timeout=300, context=context) as answer:
            assert answer.read() == DATA
        assert time.monotonic() - began >= 0.4
        assert counts()["connections"] == 3
        assert counts()["tls_full"] == 1
