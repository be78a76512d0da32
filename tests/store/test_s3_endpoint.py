"""Where requests go: what botocore decides, wrong regions, redirects, proxies."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from rogue_server import DATA, Reply, Request, RogueServer, s3_backend

from s3loader.config import S3Settings
from s3loader.endpoint import Endpoint
from s3loader.errors import ConfigError, S3LoaderError, StoreError
from s3loader.store import StoreOptions, open_store
from s3loader.testing import FaultProxy, Server, ServerKind
from s3loader.types import PutRequest, ReadRequest, Update

REGION = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>wrong region</Message><Region>eu-west-9</Region></Error>"


# -- botocore decides ----------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, str], str]] = {
    "plain": ({"AWS_REGION": "eu-west-1"}, ""),
    "fips": ({"AWS_REGION": "us-west-2", "AWS_USE_FIPS_ENDPOINT": "true"}, ""),
    "dual stack": ({"AWS_REGION": "eu-west-1", "AWS_USE_DUALSTACK_ENDPOINT": "true"}, ""),
    "both": ({"AWS_REGION": "us-gov-west-1", "AWS_USE_FIPS_ENDPOINT": "true", "AWS_USE_DUALSTACK_ENDPOINT": "true"}, ""),
    "china": ({"AWS_REGION": "cn-north-1"}, ""),
    "isolated": ({"AWS_REGION": "us-iso-east-1"}, ""),
    "accelerated": ({"AWS_PROFILE": "p"}, "[profile p]\nregion = eu-west-1\ns3 =\n  use_accelerate_endpoint = true\n"),
    "path": ({"AWS_PROFILE": "p"}, "[profile p]\nregion = eu-west-1\ns3 =\n  addressing_style = path\n"),
}


@pytest.mark.parametrize("bucket", ["some-bucket", "with.dot"])
@pytest.mark.parametrize("case", CASES)
def test_the_endpoint_is_the_one_that_boto3_asks(
    case: str, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if (case, bucket) == ("accelerated", "with.dot"):
        pytest.skip("there is no such thing")
    variables, config = CASES[case]
    (tmp_path / "config").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    loaded = S3Settings.load()
    ours = Endpoint.from_settings(loaded, bucket)

    client = loaded.create_client(anonymous=True)
    seen: list[Any] = []

    def stop(request: Any, **_: Any) -> Any:
        seen.append(request.url)
        raw = SimpleNamespace(stream=lambda **_: iter([b"x"]), read=lambda *_: b"x")
        return SimpleNamespace(status_code=200, headers={}, raw=raw, content=b"", text="")

    client.meta.events.register("before-send.s3", stop)
    client.get_object(Bucket=bucket, Key="a b")
    assert ours.url("a b") == seen[0]
    assert ours.region == client.meta.region_name
    client.close()


@pytest.mark.parametrize(
    ("host", "there"),
    [
        ("b.s3.us-east-1.amazonaws.com", "b.s3.eu-west-3.amazonaws.com"),
        ("b.s3.amazonaws.com", "b.s3.eu-west-3.amazonaws.com"),
        ("s3-fips.dualstack.us-east-1.amazonaws.com", "s3-fips.dualstack.eu-west-3.amazonaws.com"),
        ("b.s3-accelerate.amazonaws.com", "b.s3-accelerate.amazonaws.com"),
        ("minio.example", "minio.example"),
    ],
)
def test_another_region(host: str, there: str) -> None:
    endpoint = Endpoint("https", host, 443, "", "virtual", "us-east-1", "b")
    assert (endpoint.in_region("eu-west-3").host, endpoint.in_region("eu-west-3").region) == (there, "eu-west-3")
    assert endpoint.in_region("evil.example/") is endpoint


@pytest.mark.parametrize(
    ("location", "host"),
    [
        ("https://b.s3-us-west-2.amazonaws.com/k", "b.s3-us-west-2.amazonaws.com"),
        ("https://b.s3.us-west-2.amazonaws.com/k", "b.s3.us-west-2.amazonaws.com"),
        ("http://b.s3.us-west-2.amazonaws.com/k", None),
        ("https://b.s3.us-west-2.amazonaws.com.evil.example/k", None),
        ("https://evil.example/b.s3.us-west-2.amazonaws.com", None),
        ("https://ec2.us-west-2.amazonaws.com/k", None),
        ("https://b.s3.us-west-2.amazonaws.com:444/k", None),
    ],
)
def test_redirects_within_the_service(location: str, host: str | None) -> None:
    endpoint = Endpoint("https", "b.s3.amazonaws.com", 443, "", "virtual", "us-east-1", "b")
    found = endpoint.at(urlsplit(location))
    assert (found and (found.host, found.region)) == (host and (host, "us-west-2"))
    own = Endpoint("https", "minio.example", 443, "", "path", "us-east-1", "b")
    assert own.at(urlsplit(location)) is None


# -- a wrong region ------------------------------------------------------------------------------

VERBS = (
    "get",
    "pump",
    "threads",
    "head",
    "put",
    "create",
    "update",
    "delete",
    "delete_many",
    "list",
    "part",
    "upload",
    "complete",
)


def call(backend: Any, verb: str) -> Any:
    """One verb on ``k``."""
    request = ReadRequest("k", 0, 9)
    return {
        "get": lambda: bytes(backend.get("k", 0, 9)[1]),
        "pump": lambda: [bytes(r.data) for r in backend.read_many([request], max_bytes=99, concurrency=1, driver="pump")],
        "threads": lambda: [bytes(r.data) for r in backend.read_many([request], max_bytes=99, concurrency=1, driver="threads")],
        "head": lambda: backend.head("k").size,
        "put": lambda: backend.put("p", b"1").size,
        "create": lambda: backend.put("p", b"1", mode="create").size,
        "update": lambda: backend.put("p", b"1", mode=Update("e")).size,
        "delete": lambda: backend.delete("p"),
        "delete_many": lambda: backend.delete_many(["p"]),
        "list": lambda: [entry.key for entry in backend.list()],
        "part": lambda: backend.upload_part("p", "id", 1, b"1").size,
        "upload": lambda: backend.create_multipart("p"),
        "complete": lambda: backend.complete_multipart("p", "id", [backend.upload_part("p", "id", 1, b"1")]).size,
    }[verb]()


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_region_is_corrected_once_and_for_all(server: RogueServer, verb: str) -> None:
    """The request was refused, so that even a conditional one may be sent again."""
    backend = s3_backend(server)
    expected = call(backend, verb)
    server.objects = {"k": DATA}
    backend = s3_backend(server)
    server.requests.clear()

    def wrong(request: Request, reply: Reply, sock: socket.socket) -> bool:
        head = request.method == "HEAD"
        told = [("x-amz-bucket-region", "eu-west-9")] if head else []
        body = b"" if head else REGION
        sock.sendall(Reply("400 Bad Request", [*told, ("Content-Length", str(len(body)))], body).raw())
        return True

    server.fault = lambda request: None if "/eu-west-9/s3/" in request.headers["authorization"] else wrong
    assert call(backend, verb) == expected
    refused = [r for r in server.requests if "/eu-west-9/" not in r.headers["authorization"]]
    assert len(refused) == 1
    server.requests.clear()
    call(backend, verb)
    assert all("/eu-west-9/" in r.headers["authorization"] for r in server.requests)
    backend.close()


# -- redirects to other hosts --------------------------------------------------------------------


@pytest.fixture
def two() -> Iterator[tuple[RogueServer, RogueServer]]:
    with RogueServer() as first, RogueServer() as second:
        second.objects = {"k": DATA}
        yield first, second


def redirect(status: str, to: str) -> Any:
    def fault(request: Request, reply: Reply, sock: socket.socket) -> bool:
        sock.sendall(Reply(status, [("Location", to + request.path), ("Content-Length", "0")]).raw())
        return True

    return lambda request: fault


STATUSES = ("301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("status", STATUSES)
def test_no_redirect_to_another_host_is_followed(two: tuple[RogueServer, RogueServer], verb: str, status: str) -> None:
    first, second = two
    first.fault = redirect(status, second.endpoint_url)
    backend = s3_backend(first)
    with pytest.raises(StoreError) as caught:
        call(backend, verb)
    assert caught.value.status == int(status[:3])
    assert "follow_redirects" in str(caught.value.hint) or verb == "head"
    assert len(first.requests) == 1
    assert second.requests == []
    backend.close()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("listed", [False, True])
def test_redirects_are_followed_when_asked_and_the_token_only_to_listed_hosts(
    two: tuple[RogueServer, RogueServer], verb: str, listed: bool
) -> None:
    """As AIStore answers: a proxy that sends each request to the node that has the object."""
    first, second = two
    expected = call(s3_backend(second), verb)
    second.requests.clear()
    first.fault = redirect("307 Temporary Redirect", second.endpoint_url)
    backend = s3_backend(first, token="TOKEN", follow_redirects=["127.0.0.1"] if listed else True)
    assert call(backend, verb) == expected
    assert second.requests
    for request in second.requests:
        assert request.headers["host"] == second.endpoint_url.removeprefix("http://")
        assert "Signature=" in request.headers["authorization"]
        assert request.headers.get("x-amz-security-token") == ("TOKEN" if listed else None)
        assert ("x-amz-security-token" in request.headers["authorization"]) == listed
    backend.close()


def test_a_loop_of_redirects_ends(two: tuple[RogueServer, RogueServer]) -> None:
    first, second = two
    first.fault = redirect("307 Temporary Redirect", second.endpoint_url)
    second.fault = redirect("307 Temporary Redirect", first.endpoint_url)
    backend = s3_backend(first, follow_redirects=True)
    with pytest.raises(S3LoaderError):
        backend.get("k")
    assert len(first.requests) + len(second.requests) < 12
    backend.close()


@pytest.mark.parametrize("value", ["host", [1], 3])
def test_what_follow_redirects_cannot_be(value: Any) -> None:
    with pytest.raises((ConfigError, TypeError)):
        StoreOptions(follow_redirects=value)


# -- a proxy -------------------------------------------------------------------------------------


class Proxy:
    """Passes plain requests on to one server, and notes them."""

    def __init__(self, server: RogueServer) -> None:
        self.seen: list[bytes] = []
        self._to = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://me:pass%40word@127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, socket.create_connection(("127.0.0.1", int(self._to.endpoint_url.rpartition(":")[2]))) as there:
            threading.Thread(target=self._back, args=(there, sock), daemon=True).start()
            while data := sock.recv(1 << 16):
                self.seen.append(data)
                there.sendall(data.replace(self._to.endpoint_url.encode(), b"", 1))

    def _back(self, there: socket.socket, sock: socket.socket) -> None:
        try:
            while data := there.recv(1 << 16):
                sock.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_everything_goes_through_a_proxy(server: RogueServer, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(server)
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "")
    with open_store("s3://bucket", endpoint_url=server.endpoint_url, access_key_id="K", secret_access_key="S") as store:
        assert store.get("k") == DATA
        assert [bytes(r.data) for r in store.get_many(["k", "k"])] == [DATA] * 2
        store.put("p", b"1")
        assert [entry.key for entry in store.list()] == ["k", "p"]
    heads = [data.partition(b"\r\n\r\n")[0] for data in proxy.seen if b" HTTP/1.1\r\n" in data]
    assert len(heads) == len(server.requests) == 5
    words = base64.b64encode(b"me:pass@word")
    assert all(b"Basic " + words in head for head in heads)
    proxy.close()


@pytest.mark.parametrize("redirect", [False, True])
@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_requests_side_by_side_all_follow_to_the_region(
    servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str], driver: Any, redirect: bool
) -> None:
    """The first that is refused learns it; those that were under way then are sent again as well."""
    running = servers("moto")
    root = f"{shared_bucket('moto')}/regions-{driver}-{redirect}"
    keys = [f"k{number}" for number in range(40)]
    with (
        FaultProxy(running.endpoint_url, region="eu-west-9", redirect=redirect) as proxy,
        running.open_store(root, endpoint_url=proxy.endpoint_url) as store,
    ):
        assert len(list(store.put_many([PutRequest(key, DATA) for key in keys], driver=driver))) == 40
    with (
        FaultProxy(running.endpoint_url, region="eu-west-9", redirect=redirect) as proxy,
        running.open_store(root, endpoint_url=proxy.endpoint_url) as store,
    ):
        found = store.read_many([ReadRequest(key) for key in keys], driver=driver, concurrency=16)
        assert [bytes(each.data) for each in found] == [DATA] * 40
        refused = [request for request in proxy.requests if request.status in (301, 400)]
    assert len(proxy.requests) == 40 + len(refused)
