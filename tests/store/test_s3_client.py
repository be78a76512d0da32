"""Our S3 client against a server that misbehaves: the right bytes, or a typed error."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import random
import select
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from rogue_server import BAD, BAD_READS, BUSY, DATA, GOOD, SLOW, Request, RogueServer, once, s3_backend

from s3loader import events
from s3loader.errors import (
    ConfigError,
    ObjectChangedError,
    ObjectNotFoundError,
    RangeError,
    S3LoaderError,
    StoreConnectionError,
    StoreTimeoutError,
    ThrottledError,
    UnavailableError,
)
from s3loader.store.s3 import S3Backend
from s3loader.types import ByteRange, PutRequest, ReadRequest, Update

SMALL, LARGE = ByteRange(100, 300), ByteRange(1000, 200_001)


MIB = 1 << 20


class Reader:
    """Reads in place of obstore, and keeps count."""

    def __init__(self, backend: S3Backend) -> None:
        self.backend = backend
        self.asked: list[str] = []

    def usable(self) -> bool:
        return True

    def get(self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None) -> Any:
        self.asked.append(key)
        return self.backend.get(key, start, end, if_match=if_match)


def read(backend: S3Backend, how: str, span: ByteRange) -> bytes:
    """`span` of ``k`` by one of the ways there are, after an ordinary read on the same connection."""
    request = ReadRequest("k", span.start, span.end, "etag-300000")
    if how == "get":
        return bytes(backend.get("k", span.start, span.end, if_match="etag-300000")[1])
    if how == "into":
        buffer = bytearray(len(span))
        assert backend.read_into("k", span.start, memoryview(buffer), if_match="etag-300000").size == len(DATA)
        return bytes(buffer)
    results = list(backend.read_many([request] * 3, max_bytes=MIB, concurrency=2, driver=how))  # type: ignore[arg-type]
    assert [result.request for result in results] == [request] * 3
    assert {(bytes(result.data), result.etag, result.size) for result in results[1:]} == {
        (DATA[span.start : span.end], "etag-300000", len(DATA))
    }
    return bytes(results[0].data)


@pytest.mark.parametrize("span", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("how", ["get", "into", "pump", "threads"])
def test_right_answers_are_taken(server: RogueServer, how: str, span: ByteRange) -> None:
    backend = s3_backend(server)
    for name, fault in GOOD.items():
        server.fault = once(fault)
        assert read(backend, how, span) == DATA[span.start : span.end], name
    backend.close()


FINAL = {"another ETag", "no ETag", "range ignored"}
"""What the client is sure of at once: another object, a server without ranges."""


@pytest.mark.parametrize("span", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("how", ["get", "into", "pump", "threads"])
def test_a_wrong_answer_never_gives_wrong_bytes(server: RogueServer, how: str, span: ByteRange) -> None:
    """Another request, by the careful path, brings the right ones, or a typed error says whether to ask again."""
    for name, fault in {**BAD, **BAD_READS}.items():
        backend = s3_backend(server)
        server.fault = once(fault)
        before = len(server.requests)
        try:
            assert read(backend, how, span) == DATA[span.start : span.end], name
        except S3LoaderError as error:
            assert error.retryable or error.status in (301, 307, 403, 501) or name in FINAL, name  # noqa: PT017
        most = 4 if how in ("pump", "threads") else 2
        assert len(server.requests) - before <= most, name
        server.fault = lambda request: None
        assert read(backend, how, span) == DATA[span.start : span.end], name
        backend.close()


@pytest.mark.parametrize("how", ["get", "into", "pump", "threads", "put", "part", "put pump", "put threads"])
@pytest.mark.parametrize("name", BUSY)
def test_who_asks_for_patience_is_not_asked_again_at_once(server: RogueServer, how: str, name: str) -> None:
    """The error is there at once, by whatever framing it came, and the next request is not harmed."""
    fault, code = BUSY[name]
    backend = s3_backend(server, read_timeout=0.5)
    one = [ReadRequest("k", 100, 300)]  # what is under way beside a failure goes elsewhere
    reads = {
        "pump": lambda: list(backend.read_many(one, max_bytes=MIB, concurrency=2, driver="pump")),
        "threads": lambda: list(backend.read_many(one, max_bytes=MIB, concurrency=2, driver="threads")),
    }
    calls = {
        "put": lambda: backend.put("p", DATA),
        "part": lambda: backend.upload_part("p", "id", 1, DATA),
        "put pump": lambda: list(backend.put_many([PutRequest("p", DATA)], max_bytes=MIB, concurrency=2, driver="pump")),
        "put threads": lambda: list(backend.put_many([PutRequest("p", DATA)], max_bytes=MIB, concurrency=2, driver="threads")),
    }
    call: Callable[[], object] = {**reads, **calls}.get(how, lambda: read(backend, how, SMALL))
    server.fault = once(fault)  # type: ignore[assignment]
    with pytest.raises((ThrottledError, UnavailableError)) as caught:
        call()
    error: S3LoaderError = caught.value
    assert (error.code, error.retryable) == (code, True)
    assert error.status in (429, 500, 503)
    assert error.details.get("retry_after") == (1.0 if name == "with its reason" else None)
    assert error.url == ("s3://bucket/p" if how in calls else "s3://bucket/k")
    backend.get("k", 0, 10)
    backend.close()


def in_the_end(call: Callable[[], bytes]) -> bytes:
    """What `call` returns, though a busy machine may take longer than its short timeout, again and again."""
    for _ in range(1000):
        with contextlib.suppress(StoreTimeoutError):
            return call()
    raise AssertionError("it always times out")


@pytest.mark.parametrize("how", ["get", "into", "pump", "threads"])
@pytest.mark.parametrize("name", SLOW)
def test_a_server_that_says_nothing_more_times_out(server: RogueServer, how: str, name: str) -> None:
    backend = s3_backend(server, read_timeout=0.2)
    server.fault = once(SLOW[name])
    with pytest.raises(StoreTimeoutError) as caught:
        read(backend, how, SMALL)
    assert caught.value.retryable
    assert in_the_end(lambda: read(backend, how, SMALL)) == DATA[100:300]
    backend.close()


@pytest.mark.parametrize("how", ["get", "into", "pump", "threads"])
@pytest.mark.parametrize("name", SLOW)
def test_silence_ends_at_the_limit_of_the_whole_request_too(server: RogueServer, how: str, name: str) -> None:
    backend = s3_backend(server, read_timeout=600, request_timeout=0.3)
    server.fault = once(SLOW[name])
    with pytest.raises(StoreTimeoutError):
        read(backend, how, SMALL)
    backend.close()


@pytest.mark.parametrize("how", ["get", "into", "pump", "threads"])
@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_what_drips_in_for_ever_ends(server: RogueServer, how: str, chunked: bool) -> None:
    """Each byte comes in time, but the whole never: there is a limit for all of a request, too."""
    backend = s3_backend(server, request_timeout=0.6)

    def drip(request: Request, reply: Any, sock: Any) -> bool:
        if chunked:
            reply.set("Content-Length", None).set("Transfer-Encoding", "chunked")
        raw = reply.raw()
        head = raw.index(b"\r\n\r\n") + 4
        sock.sendall(raw[:head])
        for i in range(head, len(raw)):
            if select.select([sock], [], [], 0.05)[0]:  # the client has gone
                break
            sock.sendall(b"1\r\nx\r\n" if chunked else raw[i : i + 1])
        return False

    server.fault = lambda request: drip
    with pytest.raises(StoreTimeoutError):
        read(backend, how, SMALL)
    server.fault = lambda request: None
    assert in_the_end(lambda: read(backend, how, SMALL)) == DATA[100:300]
    backend.close()


@pytest.mark.parametrize("how", ["get", "into", "pump", "threads"])
def test_a_stale_connection_is_replaced_unnoticed(server: RogueServer, how: str) -> None:
    backend = s3_backend(server)
    for round_ in range(3):
        assert read(backend, how, LARGE) == DATA[LARGE.start : LARGE.end]
        if round_ == 1:  # it is closed only when the next request has gone out
            server.fault = once(lambda request, reply, sock: False)
        else:
            server.cut_connections()
    backend.close()


def test_a_fresh_connection_that_is_closed_at_once_is_no_stale_one(server: RogueServer) -> None:
    backend = s3_backend(server)
    server.fault = lambda request: lambda request, reply, sock: False
    with pytest.raises(StoreConnectionError):
        backend.get("k")
    assert len(server.requests) == 1


@pytest.mark.parametrize("how", ["get", "put", "part", "pump", "threads", "head", "list", "delete"])
def test_unreachable_endpoint(how: str) -> None:
    with RogueServer() as server:
        server.objects["k"] = DATA
        backend = s3_backend(server)
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: backend.put("k", b"1"),
        "part": lambda: backend.upload_part("k", "id", 1, b"1"),
        "head": lambda: backend.head("k"),
        "list": lambda: list(backend.list()),
        "delete": lambda: backend.delete("k"),
    }
    with pytest.raises(StoreConnectionError, match="cannot be reached") as caught:
        calls.get(how, lambda: read(backend, how, SMALL))()
    assert caught.value.details["sent"] is False
    assert caught.value.hint


def test_whole_objects_of_every_size(server: RogueServer) -> None:
    backend = s3_backend(server)
    sizes = [0, 1, 4096, 32 * 1024 - 1, 32 * 1024, 32 * 1024 + 1, 65536, 100_000, MIB, 5 * MIB, 3, 0, 70_000, 70_000, 500_000]
    for i, size in enumerate(sizes):
        server.objects[f"o{i}"] = random.Random(i).randbytes(size)
    for driver in ("pump", "threads"):
        for _ in range(2):
            results = list(
                backend.read_many(
                    (ReadRequest(f"o{i}", tag=i) for i in range(len(sizes))), max_bytes=3 * MIB, concurrency=3, driver=driver
                )
            )
            assert [r.request.tag for r in results] == list(range(len(sizes)))
            assert all(r.data == server.objects[r.request.key] for r in results)
            assert [r.size for r in results] == sizes
    for i in range(len(sizes)):
        meta, data = backend.get(f"o{i}")
        assert (meta.size, bytes(data)) == (sizes[i], server.objects[f"o{i}"])
    backend.close()


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_a_result_holds_little_more_memory_than_it_shows(server: RogueServer, driver: str) -> None:
    backend = s3_backend(server)
    sizes = [500_000, 500_000, 40_000, 100, 200_000, 3 * MIB, 50_000, 5000]
    for i, size in enumerate(sizes):
        server.objects[f"o{i}"] = bytes(size)
    requests = [ReadRequest(f"o{i}") for i in range(len(sizes))]
    requests += [ReadRequest(f"o{i}", 0, end) for i in range(len(sizes)) for end in (1 << 40, 500_000)]
    for result in backend.read_many(requests, max_bytes=8 * MIB, concurrency=2, driver=driver):  # type: ignore[arg-type]
        assert len(result.data) == min(result.size, result.request.end or result.size)
        assert len(result.data.obj) <= max(4096, 2 * len(result.data))
    assert len(backend.get("o2", 0, 1 << 40)[1]) == 40_000
    backend.close()


def test_bodies_are_aligned_once_the_length_of_heads_is_known(server: RogueServer) -> None:
    backend = s3_backend(server)
    results = list(backend.read_many([ReadRequest("k", 0, 100_000)] * 5, max_bytes=MIB, concurrency=1))
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(result.data)) for result in results]
    bases = [ctypes.addressof(ctypes.c_char.from_buffer(result.data.obj)) for result in results]
    assert {(address - base) % 64 for address, base in zip(addresses[1:], bases[1:], strict=True)} == {0}
    backend.close()


def test_meta_of_a_read(server: RogueServer) -> None:
    backend = s3_backend(server)
    extra = {
        "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
        "Content-Type": "image/png",
        "x-amz-version-id": "v1",
        "X-Amz-Meta-Owner": "me",
    }

    def fault(request: Request, reply: object, sock: object) -> bool:
        reply.headers.extend(extra.items())  # type: ignore[attr-defined]
        sock.sendall(reply.raw())  # type: ignore[attr-defined]
        return True

    server.fault = lambda request: fault
    meta, _ = backend.get("k", 0, 10)
    assert (meta.key, meta.size, meta.etag) == ("k", len(DATA), "etag-300000")
    assert (meta.last_modified, meta.content_type, meta.version_id) == (1445412480.0, "image/png", "v1")
    assert dict(meta.metadata) == {"owner": "me"}
    backend.close()


@pytest.mark.parametrize("how", ["get", "into", "pump", "threads"])
def test_past_the_end(server: RogueServer, how: str) -> None:
    backend = s3_backend(server)
    if how == "get":
        assert backend.get("k", 299_990, 400_000)[1] == DATA[-10:]
    elif how == "into":
        with pytest.raises(RangeError, match="300000 bytes"):
            backend.read_into("k", 299_990, memoryview(bytearray(20)))
        assert len(server.requests) == 1
    else:
        [result] = backend.read_many([ReadRequest("k", 299_990, 400_000)], max_bytes=MIB, concurrency=1, driver=how)  # type: ignore[arg-type]
        assert result.data == DATA[-10:]
    backend.close()


def test_what_is_never_sent(server: RogueServer) -> None:
    """Values that would end a header line and begin another."""
    backend = s3_backend(server)
    evil = 'x"\r\nX-Evil: 1'
    calls: list[Callable[[], object]] = [
        lambda: backend.get("k", 0, 5, if_match=evil),
        lambda: list(backend.read_many([ReadRequest("k", 0, 5, evil)], max_bytes=MIB, concurrency=1)),
        lambda: backend.put("p", b"1", content_type=evil),
        lambda: backend.put("p", b"1", metadata={"a": evil}),
        lambda: backend.put("p", b"1", mode=Update(evil)),
        lambda: backend.create_multipart("p", content_type=evil),
        lambda: backend.get(""),
        lambda: backend.put("", b"1"),
        lambda: backend.delete(""),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
    assert server.requests == []


def test_an_empty_range_is_looked_at_by_head(server: RogueServer) -> None:
    backend = s3_backend(server)
    assert backend.get("k", 5, 5)[1] == b""
    assert backend.get("k", len(DATA))[1] == b""
    with pytest.raises(RangeError):
        backend.get("k", len(DATA) + 1, len(DATA) + 1)
    with pytest.raises(ObjectChangedError):
        backend.get("k", 5, 5, if_match="another")
    backend.close()


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_errors_come_at_their_place(server: RogueServer, driver: str) -> None:
    backend = s3_backend(server)
    keys = ["k", "k", "missing", "k"]
    results = backend.read_many([ReadRequest(key) for key in keys], max_bytes=MIB, concurrency=2, driver=driver)  # type: ignore[arg-type]
    assert next(results).data == DATA
    assert next(results).data == DATA
    with pytest.raises(ObjectNotFoundError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)

    def broken() -> Iterator[ReadRequest]:
        yield ReadRequest("k")
        raise ZeroDivisionError

    results = backend.read_many(broken(), max_bytes=MIB, concurrency=1, driver=driver)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        list(results)
    with pytest.raises(ConfigError):
        list(backend.read_many([ReadRequest("\ud800")], max_bytes=MIB, concurrency=1, driver=driver))  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        backend.get("\ud800")
    assert list(backend.read_many([], max_bytes=MIB, concurrency=1, driver=driver)) == []  # type: ignore[arg-type]
    backend.close()


@pytest.mark.parametrize("tls", [False, True])
def test_large_reads_into_memory_go_through_threads_but_not_over_tls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tls: bool
) -> None:
    context = None
    if tls:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
    chosen: list[str] = []
    run = S3Backend._run

    def watched(self: S3Backend, jobs: Iterator[Any], max_bytes: int, concurrency: int, driver: Any) -> Iterator[Any]:
        chosen.append(driver)
        return run(self, jobs, max_bytes, concurrency, driver)

    monkeypatch.setattr(S3Backend, "_run", watched)
    with RogueServer(context) as server:
        server.objects["k"] = data = random.Random(3).randbytes(9 * MIB)
        backend = s3_backend(server, ca_bundle=str(tmp_path / "ca.pem") if tls else None)
        memory = bytearray(len(data))
        for cuts in [(0, 4 * MIB, 5 * MIB, 9 * MIB), (0, 4 * MIB - 1, 9 * MIB)]:
            memory[:] = bytes(len(data))
            spans = list(itertools.pairwise(cuts))
            into = [ReadRequest("k", a, None, None, memoryview(memory)[a:b]) for a, b in spans]
            results = list(backend.read_many(into, max_bytes=64 * MIB, concurrency=3))
            assert [result.request for result in results] == into
            assert memory == data
        [result] = backend.read_many([ReadRequest("k")], max_bytes=64 * MIB, concurrency=3)
        assert result.data == data
        assert chosen == (["auto"] * 3 if tls else ["threads", "auto", "auto"])
        backend.close()


def test_after_many_responses_that_only_the_careful_path_reads_it_is_asked_at_once(server: RogueServer) -> None:
    backend = s3_backend(server)

    def chunked(request: Request, reply: Any, sock: Any) -> bool:
        body, reply.body = reply.body, b""
        head = reply.set("Content-Length", None).set("Transfer-Encoding", "chunked").raw()
        sock.sendall(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        return True

    server.fault = lambda request: chunked
    for _ in range(50):
        assert backend.get("k", 0, 5)[1] == DATA[:5]
    first = len(server.requests)
    assert first < 50 + 12
    server.fault = lambda request: None
    for _ in range(130):  # now and then the fast path is tried again, and stays once it works
        backend.get("k", 0, 5)
    connections = server.connections
    for _ in range(20):
        assert backend.get("k", 0, 5)[1] == DATA[:5]
    assert server.connections == connections
    assert len(server.requests) == first + 150
    backend.close()


def test_tls_is_verified_against_the_bundle(tmp_path: object) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    bundles = {}
    for name, ca in (("right", authority), ("wrong", stranger)):
        bundles[name] = f"{tmp_path}/{name}.pem"
        ca.cert_pem.write_to_path(bundles[name])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with RogueServer(context) as server:
        server.objects["k"] = DATA
        backend = s3_backend(server, ca_bundle=bundles["right"])
        for how in ("get", "into", "pump", "threads"):
            for span in (SMALL, LARGE):
                assert read(backend, how, span) == DATA[span.start : span.end]
        for driver in ("pump", "threads"):
            list(backend.put_many([PutRequest("p", DATA * 9)], max_bytes=MIB, concurrency=1, driver=driver))  # type: ignore[arg-type]
            assert server.objects.pop("p") == DATA * 9
        server.cut_connections()
        assert read(backend, "pump", LARGE) == DATA[LARGE.start : LARGE.end]
        for i in range(8):
            server.objects[f"o{i}"] = DATA * 20
        for bound in (64 * MIB, 7 * MIB):  # sizes unknown: some have to wait
            for size in (1 << 16, None):
                requests = [ReadRequest(f"o{i}", 0, size) for i in range(8)]
                for result in backend.read_many(requests, max_bytes=bound, concurrency=4):
                    assert result.data == (DATA * 20)[:size]
                backend._context.size_hint = 0
        server.fault = once(GOOD["head drips"])
        assert read(backend, "pump", LARGE) == DATA[LARGE.start : LARGE.end]
        reader = Reader(backend)  # it stands beside a busy main thread, then
        threaded = s3_backend(server, ca_bundle=bundles["right"], tls_reader=reader)
        assert read(threaded, "threads", LARGE) == DATA[LARGE.start : LARGE.end]
        assert reader.asked == ["k"] * 3
        assert read(threaded, "pump", LARGE) == DATA[LARGE.start : LARGE.end]
        assert reader.asked == ["k"] * 3
        threaded.close()
        backend.close()
        seen = len(server.requests)
        for bundle in (bundles["wrong"], None):
            backend = s3_backend(server, ca_bundle=bundle)
            for how in ("get", "pump", "threads", "list"):
                with pytest.raises(StoreConnectionError, match="not trusted") as caught:
                    list(backend.list()) if how == "list" else read(backend, how, SMALL)
                assert "ca_bundle" in str(caught.value.hint)
                assert not caught.value.retryable
        assert len(server.requests) == seen


def test_events(server: RogueServer) -> None:
    backend = s3_backend(server)
    seen: list[events.OpEvent] = []
    unsubscribe = events.subscribe(seen.append)
    try:
        backend.get("k", 0, 10)
        list(backend.read_many([ReadRequest("k", 0, 5)], max_bytes=MIB, concurrency=1))
        backend.put("p", b"abc")
        server.fault = once(BUSY["with its reason"][0])
        with pytest.raises(ThrottledError):
            backend.get("k", 0, 10)
    finally:
        unsubscribe()
    backend.get("k")
    facts = [(e.op, e.bytes, e.status, e.engine, e.url) for e in seen]
    assert facts == [
        ("GET", 10, 206, "direct", "s3://bucket/k"),
        ("GET", 5, 206, "direct", "s3://bucket/k"),
        ("PUT", 3, 200, "direct", "s3://bucket/p"),
        ("GET", 0, 503, "direct", "s3://bucket/k"),
    ]
    assert [e.error for e in seen[:3]] == [None] * 3
    assert seen[3].error == "ThrottledError: Less"
    assert all(e.start <= (e.first_byte or e.end) <= e.end for e in seen)
    backend.close()


def test_unsigned_requests_bear_no_signature(server: RogueServer) -> None:
    backend = s3_backend(server, unsigned=True)
    assert backend.get("k", 0, 5)[1] == DATA[:5]
    assert set(server.requests[0].headers) == {"host", "user-agent", "range"}
    backend.close()


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_an_abandoned_iterator_leaves_nothing(server: RogueServer, driver: str) -> None:
    backend = s3_backend(server)
    before, files = set(threading.enumerate()), len(os.listdir("/dev/fd"))

    def some() -> None:
        for i, result in enumerate(
            backend.read_many([ReadRequest("k")] * 50, max_bytes=2 * MIB, concurrency=4, driver=driver)  # type: ignore[arg-type]
        ):
            assert result.data == DATA
            if i == 2:
                break

    some()
    backend.close()
    gc.collect()
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("s3loader-") and thread not in before]
    for thread in mine:
        thread.join(600)
    assert not [thread for thread in mine if thread.is_alive()]
    assert len(os.listdir("/dev/fd")) <= files + server.connections * 2 + 2  # the server's own ends
    assert threading.active_count() <= len(before) + server.connections
    assert read(backend, driver, SMALL) == DATA[100:300]
    backend.close()


def test_shape(server: RogueServer) -> None:
    backend = s3_backend(server)
    assert backend.bulk is backend
    assert (backend.engine, backend.url) == ("direct", "s3://bucket")
    assert "EXAMPLE" not in repr(vars(backend))
