"""Writes by our S3 client: bulk, parts, checksums that come back, refusals."""

from __future__ import annotations

import random

import pytest
from rogue_server import BAD, DATA, Request, RogueServer, once, s3_backend

from s3loader.checksum import crc32c_base64
from s3loader.errors import S3LoaderError
from s3loader.types import PutRequest

MIB = 1 << 20


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_put_many(server: RogueServer, driver: str) -> None:
    backend = s3_backend(server)
    sizes = [0, 1, 4096, 100_000, 6 * MIB, 3 * MIB, 10]
    requests = [PutRequest(f"p{i} +ü", random.Random(i).randbytes(size), tag=i) for i, size in enumerate(sizes)]
    results = list(backend.put_many(iter(requests), max_bytes=2 * MIB, concurrency=3, driver=driver))  # type: ignore[arg-type]
    assert [(r.key, r.size, r.etag) for r in results] == [(q.key, len(q.data), f"etag-{len(q.data)}") for q in requests]
    assert all(server.objects[q.key] == q.data for q in requests)
    sent = {request.key: request.headers for request in server.requests}
    for request in requests:
        assert sent[request.key]["x-amz-checksum-crc32c"] == crc32c_base64(request.data)
        assert "x-amz-checksum-crc32c" in sent[request.key]["authorization"]
    backend.close()


@pytest.mark.parametrize("how", ["put", "part", "pump", "threads"])
def test_a_success_that_is_none_is_sent_again_or_said(server: RogueServer, how: str) -> None:
    for name, fault in BAD.items():
        backend = s3_backend(server)
        server.fault = once(fault)
        before = len(server.requests)
        try:
            if how == "put":
                assert backend.put("p", memoryview(DATA)).size == len(DATA), name
            elif how == "part":
                assert backend.upload_part("p", "id", 3, DATA).etag, name
            else:
                [result] = backend.put_many([PutRequest("p", DATA)], max_bytes=MIB, concurrency=2, driver=how)  # type: ignore[arg-type]
                assert result.etag, name
        except S3LoaderError as error:
            assert error.retryable or error.status in (301, 307, 403, 501), name  # noqa: PT017
        assert len(server.requests) - before <= 2, name
        backend.close()


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_conditional_put_is_never_sent_twice_by_itself(server: RogueServer, name: str) -> None:
    """Its second copy would be refused because of the first: that is for `lost_reply` to settle."""
    backend = s3_backend(server)
    server.fault = once(BAD[name])
    try:
        backend.put("p", b"1", mode="create")
    except S3LoaderError:
        assert len(server.requests) == 1
    else:
        assert name in ("501", "extra bytes")  # a checksum refused is not stored; what comes after an answer is not of it
    backend.close()


def test_put_checks_the_checksum_that_comes_back(server: RogueServer) -> None:
    backend = s3_backend(server)

    def wrong(request: Request, reply: object, sock: object) -> bool:
        sock.sendall(reply.set("x-amz-checksum-crc32c", "AAAAAA==").raw())  # type: ignore[attr-defined]
        return True

    server.fault = lambda request: wrong
    with pytest.raises(S3LoaderError, match="checksum"):
        backend.put("p", b"abc")
    backend.close()


def test_upload_part_names_its_part(server: RogueServer) -> None:
    backend = s3_backend(server)
    part = backend.upload_part("a b", "id+/=~", 7, b"part")
    assert (part.number, part.size, part.checksum) == (7, 4, crc32c_base64(b"part"))
    assert server.requests[0].path == "/bucket/a%20b?partNumber=7&uploadId=id%2B%2F%3D~"
    backend.close()


def test_content_type_is_sent_and_signed(server: RogueServer) -> None:
    backend = s3_backend(server)
    backend.put("p", b"{}", content_type="application/json")
    headers = server.requests[0].headers
    assert headers["content-type"] == "application/json"
    assert "SignedHeaders=content-type;host;" in headers["authorization"]
    backend.close()
