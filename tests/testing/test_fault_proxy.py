"""The fault proxy does what each rule says, and nothing else."""

from __future__ import annotations

import http.client
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme

from s3loader.errors import ConfigError
from s3loader.testing import FaultProxy, Rule

BODY = bytes(range(256)) * 4


class Upstream(http.server.ThreadingHTTPServer):
    """Remembers what it got; answers BODY, chunked where the path says so."""

    daemon_threads = True
    block_on_close = True

    def __init__(self) -> None:
        self.got: list[tuple[str, str, str, bytes]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.got.append((self.command, self.path, self.headers["Host"], body))  # type: ignore[attr-defined]
        self.send_response(200)
        if "chunked" in self.path:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
            return
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("ETag", '"one"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(BODY)

    do_GET = do_PUT = do_HEAD = do_POST = answer  # noqa: N815  (http.server names them)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def target(upstream: Upstream) -> str:
    return f"http://127.0.0.1:{upstream.server_address[1]}"


def connect(proxy: FaultProxy, **options: Any) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(proxy.endpoint_url).netloc, timeout=600, **options)


def ask(connection: http.client.HTTPConnection, method: str = "GET", path: str = "/b/k", **kwargs: Any) -> tuple[int, bytes]:
    connection.request(method, path, **kwargs)
    with connection.getresponse() as response:
        return response.status, response.read()


def lost(connection: http.client.HTTPConnection, method: str = "GET", path: str = "/b/k", **kwargs: Any) -> None:
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(connection, method, path, **kwargs)
    connection.close()


def test_passes_everything_through_on_one_connection(upstream: Upstream) -> None:
    with FaultProxy(target(upstream)) as proxy:
        connection = connect(proxy)
        assert ask(connection) == (200, BODY)
        assert ask(connection, "PUT", "/b/a%20b?x=1", body=b"data") == (200, BODY)
        assert ask(connection, "HEAD") == (200, b"")
        assert ask(connection, path="/chunked") == (200, BODY)
        assert (
            ask(connection, "PUT", body=iter([b"ab", b"cd"]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})[0]
            == 200
        )
        assert ask(connection, headers={"Range": "bytes=4-7", "Authorization": "secret"})[0] == 200
        connection.close()
        host = urlsplit(proxy.endpoint_url).netloc
        assert {h for _, _, h, _ in upstream.got} == {host}, "the Host header must be the one that was signed"
        assert [body for *_, body in upstream.got if body] == [b"data", b"abcd"]
        seen = proxy.requests
        assert proxy.connections == 1
        assert [(r.method, r.path, r.query) for r in seen[:2]] == [("GET", "/b/k", ""), ("PUT", "/b/a b", "x=1")]
        assert seen[1].sent == 4
        assert seen[0].received == len(BODY)
        assert seen[2].received == 0
        assert seen[5].range == (4, 8)
        assert seen[0].range is None
        assert "secret" not in repr(seen)
        assert proxy.count() == 6
        assert proxy.count("PUT", "a b") == 1
        proxy.clear()
        assert proxy.requests == []


def test_expect_100_continue(upstream: Upstream) -> None:
    with FaultProxy(target(upstream)) as proxy, socket.create_connection(("127.0.0.1", urlsplit(proxy.endpoint_url).port)) as s:
        s.sendall(b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n")
        assert s.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(b"hi")
        answer = b""
        while piece := s.recv(65536):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 200")
        assert upstream.got == [("PUT", "/x", "h", b"hi")]


def test_lost_acknowledgement_and_refusal(upstream: Upstream) -> None:
    rules = [Rule("drop_reply", method="PUT", path="/b/k$", nth=2), Rule("refuse", path="/no")]
    with FaultProxy(target(upstream), rules) as proxy:
        connection = connect(proxy)
        assert ask(connection, "PUT", body=b"1")[0] == 200
        lost(connection, "PUT", body=b"2")
        assert ask(connection, "PUT", body=b"3")[0] == 200
        lost(connection, path="/no")
        connection.close()
        assert [body for *_, body in upstream.got] == [b"1", b"2", b"3"], "a dropped reply was forwarded, a refusal was not"
        assert [rule.fired for rule in rules] == [1, 1]
        assert proxy.requests[1].status is None
        assert proxy.requests[1].fault == "drop_reply"


def test_duplicate(upstream: Upstream) -> None:
    with FaultProxy(target(upstream), [Rule("duplicate")]) as proxy:
        connection = connect(proxy)
        assert ask(connection, "PUT", body=b"x") == (200, BODY)
        connection.close()
    assert len(upstream.got) == 2


@pytest.mark.parametrize("forward", [False, True])
def test_error(upstream: Upstream, forward: bool) -> None:
    rules = [
        Rule("error", status=503, code="SlowDown", forward=forward, times=1),
        Rule("error", status=200, headers={"x-a": "b"}),
    ]
    with FaultProxy(target(upstream), rules) as proxy:
        connection = connect(proxy)
        status, body = ask(connection, path="/b/%26")
        assert status == 503
        assert b"<Code>SlowDown</Code>" in body
        assert b"/b/&amp;<" in body
        status, body = ask(connection)
        assert status == 200
        assert b"<Error><Code>InternalError</Code>" in body
        connection.close()
    assert len(upstream.got) == forward


@pytest.mark.parametrize(("action", "expected"), [("truncate", http.client.IncompleteRead), ("reset", ConnectionResetError)])
def test_cut_in_the_body(upstream: Upstream, action: Any, expected: type[Exception]) -> None:
    with FaultProxy(target(upstream), [Rule(action, at=10)]) as proxy:
        connection = connect(proxy)
        with pytest.raises(expected):
            ask(connection)
        connection.close()
        assert proxy.requests[0].received == 10


def test_stall_and_hold_wait_for_their_event(upstream: Upstream) -> None:
    stall, hold, hold_reply = Rule("stall", at=3, times=1), Rule("hold", times=1), Rule("hold_reply", times=1)
    with FaultProxy(target(upstream), [stall, hold, hold_reply]) as proxy:
        for rule, arrived in ((stall, 1), (hold, 1), (hold_reply, 3)):
            connection = connect(proxy)
            answers: list[tuple[int, bytes]] = []
            thread = threading.Thread(target=lambda c=connection, a=answers: a.append(ask(c)))
            thread.start()
            assert rule.reached.wait(600)
            assert not answers
            assert len(upstream.got) == arrived
            rule.release.set()
            thread.join(600)
            assert answers == [(200, BODY)]
            connection.close()


def test_closing_cuts_what_is_held(upstream: Upstream) -> None:
    rule = Rule("hold")
    proxy = FaultProxy(target(upstream), [rule])
    connection = connect(proxy)
    thread = threading.Thread(target=lost, args=(connection,))
    thread.start()
    assert rule.reached.wait(600)
    proxy.close()
    proxy.close()
    thread.join(600)
    assert not thread.is_alive()
    assert upstream.got == []
    assert not [t for t in threading.enumerate() if "fault-proxy" in t.name]


def test_flips_exactly_one_bit(upstream: Upstream) -> None:
    def bodies(seed: int) -> list[bytes]:
        with FaultProxy(target(upstream), [Rule("flip")], seed=seed) as proxy:
            connection = connect(proxy)
            found = [ask(connection)[1] for _ in range(3)]
            connection.close()
            return found

    first = bodies(1)
    for body in first:
        assert sum((a ^ b).bit_count() for a, b in zip(body, BODY, strict=True)) == 1
    assert bodies(1) == first, "the seed decides"
    assert bodies(2) != first
    upstream.got.clear()
    with FaultProxy(target(upstream), [Rule("flip_request", bit=9)]) as proxy:
        connection = connect(proxy)
        ask(connection, "PUT", body=b"abc")
        connection.close()
    assert upstream.got[0][3] == bytes([ord("a"), ord("b") ^ 2, ord("c")])


def test_rewrite_chunked_and_rate(upstream: Upstream) -> None:
    rules = [
        Rule("rewrite", nth=1, status=206, headers={"ETag": '"two"', "Server": None, "Content-Range": "bytes 0-3/9"}),
        Rule("chunked", path="/c"),
        Rule("rate", path="/slow", bytes_per_second=100_000),
    ]
    with FaultProxy(target(upstream), rules) as proxy:
        connection = connect(proxy)
        connection.request("GET", "/b/k")
        with connection.getresponse() as response:
            assert (response.status, response.read()) == (206, BODY)
            assert response.getheader("ETag") == '"two"'
            assert response.getheader("Server") is None
        connection.request("GET", "/c")
        with connection.getresponse() as response:
            assert response.getheader("Transfer-Encoding") == "chunked"
            assert response.getheader("Content-Length") is None
            assert response.read() == BODY
        assert ask(connection, path="/slow") == (200, BODY)
        connection.close()


def test_probability_is_seeded(upstream: Upstream) -> None:
    def struck(seed: int) -> list[bool]:
        with FaultProxy(target(upstream), [Rule("error", probability=0.5)], seed=seed) as proxy:
            connection = connect(proxy)
            found = [ask(connection)[0] == 500 for _ in range(20)]
            connection.close()
            return found

    assert struck(3) == struck(3)
    assert 0 < sum(struck(3)) < 20
    assert struck(3) != struck(4)


def test_tls_to_the_client(upstream: Upstream) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with FaultProxy(target(upstream), ssl_context=context) as proxy:
        assert proxy.endpoint_url.startswith("https://")
        connection = http.client.HTTPSConnection(urlsplit(proxy.endpoint_url).netloc, timeout=600, context=trust)
        assert ask(connection) == (200, BODY)
        connection.close()
        untrusting = http.client.HTTPSConnection(urlsplit(proxy.endpoint_url).netloc, timeout=600)
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(untrusting)
        untrusting.close()


def test_a_server_that_is_down_shows_as_a_cut(upstream: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with FaultProxy(f"http://127.0.0.1:{port}") as proxy:
        lost(connect(proxy))


@pytest.mark.parametrize("target", ["https://127.0.0.1:1", "127.0.0.1", ""])
def test_refuses_other_targets(target: str) -> None:
    with pytest.raises(ConfigError):
        FaultProxy(target)


def test_refuses_unknown_rules() -> None:
    with pytest.raises(ConfigError, match="unknown fault"):
        Rule("explode")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="probability"):
        Rule("error", probability=2)
