"""A name that resolves to several addresses: all are used, and dead ones cost a moment, not a timeout."""

from __future__ import annotations

import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import trustme

from s3loader.endpoint import Endpoint
from s3loader.store.s3.connection import Addresses, Connections


def listening(address: str, port: int = 0, backlog: int = 16) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.listen(backlog)
    return sock


@pytest.fixture(name="sockets")
def _sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_connections_spread_over_all_addresses(sockets: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sockets.enter_context(closing(listening("127.0.0.1")))
    port = first.getsockname()[1]
    for address in ("127.0.0.2", "127.0.0.3"):
        sockets.enter_context(closing(listening(address, port)))
    resolves_to(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.3")
    addresses = Addresses("store", port)
    made = [sockets.enter_context(closing(addresses.connect(5))) for _ in range(9)]
    assert Counter(sock.getpeername()[0] for sock in made) == {"127.0.0.1": 3, "127.0.0.2": 3, "127.0.0.3": 3}
    assert all(sock.getblocking() for sock in made)


def test_an_address_that_swallows_everything_is_left_out(sockets: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    good = sockets.enter_context(closing(listening("127.0.0.1")))
    port = good.getsockname()[1]
    dead = sockets.enter_context(closing(listening("127.0.0.2", port, backlog=0)))
    fillers = [sockets.enter_context(closing(socket.socket())) for _ in range(4)]  # its queue is full: further ones hang
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(dead.getsockname())
    resolves_to(monkeypatch, "127.0.0.2", "127.0.0.1")
    addresses = Addresses("store", port)
    for _ in range(6):
        sock = sockets.enter_context(closing(addresses.connect(60)))
        assert sock.getpeername()[0] == "127.0.0.1"
    assert addresses._shunned  # so all but one of them did not even try it


def test_what_was_idle_for_too_long_is_opened_anew_ahead(sockets: ExitStack) -> None:
    listener = sockets.enter_context(closing(listening("127.0.0.1")))
    endpoint = Endpoint("http", "127.0.0.1", listener.getsockname()[1], "", "path", "us-east-1", "bucket")
    connections = Connections(endpoint, 30, 30)
    old, young = connections.open(), connections.open()
    connections.give(old)
    connections.give(young)
    old.idle_since -= 60
    connections.open_ahead(2)
    for _ in range(3):  # two that were opened here, and the one that takes the old one's place
        listener.accept()[0].close()
    assert old.sock.fileno() == -1
    assert young.sock.fileno() != -1
    connections.close()


def test_refused_everywhere_is_the_error_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(listening("127.0.0.1")) as sock:
        port = sock.getsockname()[1]
    resolves_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    with pytest.raises(ConnectionRefusedError):
        Addresses("store", port).connect(60)
    resolves_to(monkeypatch, "127.0.0.1")
    with pytest.raises(ConnectionRefusedError):
        Addresses("store", port).connect(60)


def test_tls_sessions_are_resumed(sockets: ExitStack, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(bundle)
    listener = sockets.enter_context(closing(listening("127.0.0.1")))
    resumed: list[bool | None] = []

    def serve() -> None:
        for _ in range(3):
            with context.wrap_socket(listener.accept()[0], server_side=True) as sock:
                resumed.append(sock.session_reused)
                sock.sendall(b"x")
                sock.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    port = listener.getsockname()[1]
    endpoint = Endpoint("https", "127.0.0.1", port, "", "path", "us-east-1", "bucket", ca_bundle=bundle)
    connections = Connections(endpoint, 30, 30)
    for _ in range(3):
        connection = connections.open()
        connection.sock.recv(1)
        connections.learn(connection)
        connection.close()
    thread.join()
    assert resumed == [False, True, True]
