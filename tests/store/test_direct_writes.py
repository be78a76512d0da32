"""Writes by the direct engine: bulk, parts, checksums that come back, refusals."""

from __future__ import annotations

import random

import pytest
from rogue_server import BAD, DATA, Request, RogueServer, direct, once

from s3loader.checksum import crc32c_base64
from s3loader.types import PutRequest

MIB = 1 << 20


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_put_many(server: RogueServer, driver: str) -> None:
    backend, general = direct(server)
    sizes = [0, 1, 4096, 100_000, 6 * MIB, 3 * MIB, 10]
    requests = [PutRequest(f"p{i} +ü", random.Random(i).randbytes(size), tag=i) for i, size in enumerate(sizes)]
    results = list(backend.put_many(iter(requests), max_bytes=2 * MIB, concurrency=3, driver=driver))  # type: ignore[arg-type]
    assert [(r.key, r.size, r.etag) for r in results] == [(q.key, len(q.data), f"etag-{len(q.data)}") for q in requests]
    assert all(server.objects[q.key] == q.data for q in requests)
    sent = {request.key: request.headers for request in server.requests}
    for request in requests:
        assert sent[request.key]["x-amz-checksum-crc32c"] == crc32c_base64(request.data)
        assert "x-amz-checksum-crc32c" in sent[request.key]["authorization"]
    assert not general.asked
    backend.close()


@pytest.mark.parametrize("how", ["put", "part", "pump", "threads"])
def test_refused_writes_go_to_the_general_engine(server: RogueServer, how: str) -> None:
    for name, fault in BAD.items():
        backend, general = direct(server)
        server.fault = once(fault)
        if how == "put":
            assert backend.put("p", memoryview(DATA)).etag == "general", name
        elif how == "part":
            assert backend.upload_part("p", "id", 3, DATA).etag == "general", name
        else:
            [result] = backend.put_many([PutRequest("p", DATA)], max_bytes=MIB, concurrency=2, driver=how)  # type: ignore[arg-type]
            assert result.etag == "general", name
        assert general.asked == ["p"], name
        backend.close()


def test_put_checks_the_checksum_that_comes_back(server: RogueServer) -> None:
    backend, _ = direct(server)

    def wrong(request: Request, reply: object, sock: object) -> bool:
        sock.sendall(reply.set("x-amz-checksum-crc32c", "AAAAAA==").raw())  # type: ignore[attr-defined]
        return True

    server.fault = once(wrong)
    assert backend.put("p", b"abc").etag == "general"
    backend.close()


def test_upload_part_names_its_part(server: RogueServer) -> None:
    backend, _ = direct(server)
    part = backend.upload_part("a b", "id+/=~", 7, b"part")
    assert (part.number, part.size, part.checksum) == (7, 4, crc32c_base64(b"part"))
    assert server.requests[0].path == "/bucket/a%20b?partNumber=7&uploadId=id%2B%2F%3D~"
    backend.close()


def test_content_type_is_sent_and_signed(server: RogueServer) -> None:
    backend, _ = direct(server)
    backend.put("p", b"{}", content_type="application/json")
    headers = server.requests[0].headers
    assert headers["content-type"] == "application/json"
    assert "SignedHeaders=content-type;host;" in headers["authorization"]
    backend.close()
