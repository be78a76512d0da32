"""Every verb of our S3 client against a server that always answers wrongly: right or a typed error, in bounded time and memory.

What is a success is decided by the status *and* the document or header that means it.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
from collections.abc import Callable
from typing import Any

import pytest
from rogue_server import BAD, BAD_READS, DATA, Fault, Reply, Request, RogueServer, s3_backend

from s3loader.errors import S3LoaderError
from s3loader.types import ObjectMeta, PartResult, ReadRequest, Update

MIB = 1 << 20
READS: dict[str, Callable[[Any], Any]] = {
    "get": lambda b: bytes(b.get("k", 100, 300)[1]),
    "get whole": lambda b: bytes(b.get("k")[1]),
    "read_into": lambda b: _into(b),
    "pump": lambda b: _many(b, "pump"),
    "threads": lambda b: _many(b, "threads"),
    "version": lambda b: bytes(b.get("k", 100, 300, version_id="v")[1]),
}
RIGHT = {"get whole": DATA}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "head": lambda b: b.head("k"),
    "put": lambda b: b.put("p", b"1"),
    "create": lambda b: b.put("p", b"1", mode="create", metadata={"a": "b"}),
    "update": lambda b: b.put("p", b"1", mode=Update("e")),
    "part": lambda b: b.upload_part("p", "id", 1, b"1"),
    "delete": lambda b: b.delete("p"),
    "abort": lambda b: b.abort_multipart("p", "id"),
}
DOCUMENTS: dict[str, Callable[[Any], Any]] = {
    "delete_many": lambda b: b.delete_many(["p", "q"]),
    "list": lambda b: list(b.list()),
    "create upload": lambda b: b.create_multipart("p"),
    "complete": lambda b: b.complete_multipart("p", "id", [_PART]),
    "complete create": lambda b: b.complete_multipart("p", "id", [_PART], mode="create"),
    "list uploads": lambda b: list(b.list_multipart()),
    "list parts": lambda b: list(b.list_parts("p", "id")),
    "copy": lambda b: b._copy_whole(_META, "q", {}),
    "copy part": lambda b: b._copied_parts(_META, "q", "id", MIB),
}


def _into(backend: Any) -> bytes:
    buffer = bytearray(200)
    backend.read_into("k", 100, memoryview(buffer))
    return bytes(buffer)


def _many(backend: Any, driver: str) -> bytes:
    requests = [ReadRequest("k", 100, 300)] * 4
    found = {bytes(r.data) for r in backend.read_many(requests, max_bytes=MIB, concurrency=2, driver=driver)}
    assert len(found) == 1
    return found.pop()


_PART = PartResult(1, "e", 1)
_META = ObjectMeta("k", len(DATA), "etag-300000")


def _always(server: RogueServer, fault: Fault) -> None:
    server.fault = lambda request: fault


def _reply(status: str, body: bytes, **headers: str) -> Fault:
    listed = [(name.replace("_", "-"), value) for name, value in headers.items()]

    def fault(request: Request, reply: Reply, sock: socket.socket) -> bool:
        sock.sendall(Reply(status, [*listed, ("Content-Length", str(len(body)))], body).raw())
        return request.method != "HEAD" or not body

    return fault


@pytest.mark.parametrize("verb", READS)
def test_reads_never_give_wrong_bytes(server: RogueServer, verb: str) -> None:
    ways = BAD if verb == "get whole" else {**BAD, **BAD_READS}
    for name, fault in ways.items():
        if "ETag" in name:
            continue  # nothing was said of it
        backend = s3_backend(server, read_timeout=5)
        _always(server, fault)
        try:
            assert READS[verb](backend) == RIGHT.get(verb, DATA[100:300]), name
        except S3LoaderError as error:
            assert error.url.startswith("s3://bucket"), name  # noqa: PT017
        backend.close()


@pytest.mark.parametrize("verb", [*OTHERS, *DOCUMENTS])
def test_the_others_never_hang_nor_raise_anything_else(server: RogueServer, verb: str) -> None:
    for name, fault in BAD.items():
        backend = s3_backend(server, read_timeout=5)
        _always(server, fault)
        before = len(server.requests)
        try:
            {**OTHERS, **DOCUMENTS}[verb](backend)
        except S3LoaderError as error:
            assert error.url.startswith("s3://bucket"), name  # noqa: PT017
        except KeyError:
            assert name == "another range"
        assert len(server.requests) - before <= 6, name
        backend.close()


NO_DOCUMENTS: dict[str, Fault] = {
    "empty": _reply("200 OK", b""),
    "blanks": _reply("200 OK", b" \n" * 50),
    "html": _reply("200 OK", b"<html><body>It works</body></html>", Content_Type="text/html"),
    "another": _reply("200 OK", b"<Something/>"),
    "an error": _reply("200 OK", b"\n\n<Error><Code>InternalError</Code><Message>We</Message></Error>"),
    "half": _reply("200 OK", b"<CompleteMultipartUploadResult><ETag>"),
    "text": _reply("200 OK", b"OK"),
    "204": _reply("204 No Content", b""),
    "206": _reply("206 Partial Content", b"<ListBucketResult/>", Content_Range="bytes 0-18/19"),
}


@pytest.mark.parametrize("verb", DOCUMENTS)
@pytest.mark.parametrize("name", NO_DOCUMENTS)
def test_a_success_without_its_document_is_none(server: RogueServer, verb: str, name: str) -> None:
    """A completed upload answered 200 with an empty or HTML body was reported as done."""
    backend = s3_backend(server)
    _always(server, NO_DOCUMENTS[name])
    with pytest.raises(S3LoaderError):
        DOCUMENTS[verb](backend)
    backend.close()


NONSENSE = [
    "<Contents/>",
    "<Contents><Key>k</Key><Size>-1</Size></Contents>",
    "<Contents><Key>k</Key><Size>1e99</Size></Contents>",
    "<IsTruncated>true</IsTruncated>",
    "<x:y xmlns:x='other'/>",
    "&entity;",
]


@pytest.mark.parametrize("inside", NONSENSE)
def test_listings_that_make_no_sense(server: RogueServer, inside: str) -> None:
    body = f"<!DOCTYPE a [<!ENTITY entity 'xxxx'>]><ListBucketResult>{inside}</ListBucketResult>".encode()
    backend = s3_backend(server)
    _always(server, _reply("200 OK", body))
    with contextlib.suppress(S3LoaderError):
        assert list(backend.list()) == []
    backend.close()


def _endless(first: bytes) -> Fault:
    """Says and sends ever more, until the client goes."""

    def fault(request: Request, reply: Reply, sock: socket.socket) -> bool:
        sock.sendall(first)
        block = b"10000\r\n" + b"x" * 65536 + b"\r\n" if b"chunked" in first else b"x" * 65536
        for _ in range(100_000):
            if select.select([sock], [], [], 0)[0]:
                break
            sock.sendall(block)
        return False

    return fault


ENDLESS: dict[str, Fault] = {
    "chunks": _endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "a terabyte": _endless(b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n"),
    "no length": _endless(b"HTTP/1.1 200 OK\r\n\r\n"),
    "an error": _endless(b"HTTP/1.1 404 Not Found\r\nContent-Length: 1099511627776\r\n\r\n<Error>"),
    "an error in chunks": _endless(b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "a head": _endless(b"HTTP/1.1 200 OK\r\nX-Endless: "),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_bodies_end_and_take_no_memory(server: RogueServer, name: str) -> None:
    reads = {verb: READS[verb] for verb in ("get", "read_into", "pump", "threads")}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for verb, call in {**reads, **OTHERS, **DOCUMENTS}.items():
        backend = s3_backend(server, read_timeout=5)
        _always(server, ENDLESS[name])
        if (verb == "head" and name != "a head") or (verb in ("delete", "abort") and name == "an error"):
            continue  # what comes after its head is nobody's; what is missing is deleted
        with pytest.raises(S3LoaderError):
            call(backend)
        backend.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("how", ["get", "pump", "threads"])
def test_bytes_that_nobody_asked_for_are_no_other_objects(server: RogueServer, how: str) -> None:
    """Not pinned, so that only the connection can tell: what lies in it before a request is sent is no answer to it."""
    server.objects = {f"o{i}": bytes([i]) * 2000 for i in range(32)}

    def twice(request: Request, reply: Reply, sock: socket.socket) -> bool:
        sock.sendall(reply.raw() * 2)
        return True

    _always(server, twice)
    backend = s3_backend(server)
    for _ in range(2):
        if how == "get":
            for key, data in server.objects.items():
                assert backend.get(key)[1] == data
        else:
            requests = [ReadRequest(key) for key in server.objects]
            for result in backend.read_many(requests, max_bytes=MIB, concurrency=4, driver=how):
                assert result.data == server.objects[result.request.key]
    backend.close()


def test_a_404_costs_one_request(server: RogueServer) -> None:
    backend = s3_backend(server)
    for call in (
        lambda: backend.get("no"),
        lambda: backend.head("no"),
        lambda: backend.read_into("no", 0, memoryview(bytearray(9))),
    ):
        server.requests.clear()
        with pytest.raises(S3LoaderError) as caught:
            call()
        assert caught.value.status == 404
        assert len(server.requests) == 1
    backend.close()


def test_keys_that_no_document_can_name_are_refused_before_an_upload_begins(server: RogueServer) -> None:
    backend = s3_backend(server)
    for key in ("a\x00b", "a\x1fb", "a\rb", "a\ufffeb"):
        with pytest.raises(S3LoaderError, match="cannot name the key"):
            backend.create_multipart(key)
    assert server.requests == []
    assert backend.put("a\x01b", b"1").size == 1
    assert backend.delete_many(["a\x01b"]) == []
    assert [r.method for r in server.requests] == ["PUT", "DELETE"]
    backend.close()
