"""A name that resolves to several addresses: all are used, and dead ones cost a moment, not a timeout."""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import trustme
from rogue_server import DATA, RogueServer, s3_backend

from s3loader.endpoint import Endpoint
from s3loader.store.s3.connection import Addresses, Connections
from s3loader.types import ReadRequest


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


def silent_address(sockets: ExitStack, address: str, port: int) -> None:
    """Have connections to `address` hang: the queue of who listens there is full."""
    dead = sockets.enter_context(closing(listening(address, port, backlog=0)))
    for filler in [sockets.enter_context(closing(socket.socket())) for _ in range(4)]:
        filler.setblocking(False)
        filler.connect_ex(dead.getsockname())


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
    silent_address(sockets, "127.0.0.2", port)
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


def test_a_store_of_several_addresses_over_tls_one_of_them_dead(
    sockets: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a distant store is at once: one name, addresses that share the work, TLS that is resumed between them, and one
    address that swallows every connection."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("store.test").configure_cert(context)
    bundle = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(bundle)
    first = sockets.enter_context(RogueServer(context))
    others = [RogueServer(context, address=address, port=first.port) for address in ("127.0.0.2", "127.0.0.3")]
    servers = [first, *map(sockets.enter_context, others)]
    silent_address(sockets, "127.0.0.4", first.port)
    for server in servers:
        server.objects["k"] = DATA
    resolves_to(monkeypatch, "127.0.0.4", "127.0.0.1", "127.0.0.2", "127.0.0.3")
    first.host = "store.test"
    backend = s3_backend(first, ca_bundle=bundle, connect_timeout=300, read_timeout=300)
    try:
        assert backend.get("k")[1] == DATA  # its session is the one that the others go on from
        backend.open_ahead(12)
        requests = [ReadRequest("k", at, at + 1000) for at in range(0, 200_000, 1000)]
        results = backend.read_many(requests, max_bytes=1 << 24, concurrency=12)
        assert b"".join(bytes(result.data) for result in results) == DATA[:200_000]
        assert all(server.connections for server in servers), "every address that lives is used"
        resumed = [each for server in servers for each in server.resumed]
        assert resumed.count(False) == 1, "only the first handshake was a whole one"
        assert resumed.count(True) >= 11
    finally:
        backend.close()


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


def test_threads_that_open_the_first_connections_share_one_context(
    sockets: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of another context cannot be resumed: reads failed with a bare ValueError where two threads had made one."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(bundle)
    server = sockets.enter_context(RogueServer(context))
    server.objects["k"] = DATA
    together, calls, make = threading.Barrier(4), itertools.count(), ssl.create_default_context

    def made_together(**options: str) -> ssl.SSLContext:
        if next(calls) < 4:
            together.wait(300)
        return make(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(ssl, "create_default_context", made_together)
    backend = s3_backend(server, ca_bundle=bundle, connect_timeout=300, read_timeout=300)
    try:
        backend.open_ahead(4)
        for _ in range(3):
            requests = [ReadRequest("k", at, at + 1000) for at in range(0, 40_000, 1000)]
            results = backend.read_many(requests, max_bytes=1 << 24, concurrency=8, driver="threads")
            assert b"".join(bytes(result.data) for result in results) == DATA[:40_000]
    finally:
        backend.close()
