"""`MultipartUploadWriter`: what it publishes, what it never publishes, and from which memory the bytes are sent."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from typing import Any

import numpy as np
import pytest
from toolbox_places import every_place

import s3loader
from s3loader import events, s3
from s3loader.errors import ClosedError, ConfigError, ObjectExistsError, ObjectNotFoundError
from s3loader.s3 import MultipartUploadWriter
from s3loader.testing import FaultProxy, Rule

MIB = 1 << 20


@every_place
def test_reserve_and_commit(place: str) -> None:
    url = f"{place}/big"
    size = 65 * MIB + 7
    data = random.Random(1).randbytes(size)
    with MultipartUploadWriter.from_uri(url, part_size=32 * MIB, max_in_flight=2, content_type="text/x") as writer:
        view = writer.reserve(size)
        assert (len(view), view.readonly, view.ndim, view.format) == (size, False, 1, "B")
        view[:] = data
        writer.commit(size)
    found = writer.close()
    assert list(found) == ["etag", "total_bytes", "parts", "started_at", "completed_at"]
    assert (found["total_bytes"], found["parts"]) == (size, 2)
    assert s3.get(url) == data
    assert s3.stat(url)["etag"] == found["etag"]
    if not place.startswith("file"):
        assert s3.stat(url)["content_type"] == "text/x"


@every_place
def test_any_mixture_of_calls_gives_the_same_bytes(place: str) -> None:
    draw = random.Random(7)
    digest, total = hashlib.sha256(), 0
    bucket = place.removeprefix("s3://")
    with MultipartUploadWriter(bucket, "mixed", part_size=5 * MIB, max_in_flight=3) as writer:
        for _ in range(25):
            size = draw.choice([1, 7, 1000, MIB, 3 * MIB, 5 * MIB, 6 * MIB, 11 * MIB])
            data = draw.randbytes(size)
            kind = draw.randrange(4)
            if kind == 0:
                view = writer.reserve(size + draw.choice([0, 3, 2 * MIB]))
                view[:size] = data
                writer.commit(size)
            elif kind == 1:
                assert writer.write(data) == size
            elif kind == 2:
                changing = bytearray(data)
                writer.write(np.frombuffer(changing, np.uint8))
                changing[:] = bytes(size)  # may be used again at once
            else:
                writer.write(bytearray(data), copy=False)
            digest.update(data)
            total += size
            assert writer.tell() == total
    assert hashlib.sha256(s3.get(f"{place}/mixed")).digest() == digest.digest()


@every_place
def test_no_bytes_and_few_bytes(place: str) -> None:
    with MultipartUploadWriter.from_uri(f"{place}/none"):
        pass
    assert s3.get(f"{place}/none") == b""
    writer = MultipartUploadWriter.from_uri(f"{place}/few")
    writer.write(b"abc")
    assert writer.close()["parts"] == 1
    assert writer.close() == writer.close()
    assert s3.get(f"{place}/few") == b"abc"
    with pytest.raises(ClosedError):
        writer.write(b"more")


@every_place
def test_an_exception_in_the_body_publishes_nothing(place: str) -> None:
    for size in (10, 12 * MIB):
        writer = MultipartUploadWriter.from_uri(f"{place}/k", part_size=5 * MIB)
        with pytest.raises(ZeroDivisionError), writer:  # noqa: PT012
            writer.write(bytes(size))
            _ = 1 // (writer.tell() - size)
        assert not s3.exists(f"{place}/k")
        writer.abort()
        with pytest.raises(ClosedError):
            writer.close()
    with s3loader.open_store(place) as store:
        assert [*store.backend.list_multipart()] == []


def test_reservations_come_one_at_a_time() -> None:
    writer = MultipartUploadWriter.from_uri("memory://writer/one")
    with pytest.raises(RuntimeError):
        writer.commit(1)
    view = writer.reserve(10)
    for call in (lambda: writer.reserve(1), lambda: writer.write(b"1")):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(ValueError, match="11 bytes of 10"):
        writer.commit(11)
    view[:2] = b"ab"
    writer.commit(2)
    with pytest.raises(ValueError):
        view[0] = 1  # what was committed is the writer's
    writer.reserve(5)
    writer.commit(0)
    writer.close()
    assert s3.get("memory://writer/one") == b"ab"
    for wrong in (0, -1):
        with pytest.raises(ConfigError):
            MultipartUploadWriter.from_uri("memory://writer/two").reserve(wrong)
    for options in ({"part_size": 5 * MIB - 1}, {"max_in_flight": 0}, {"part_size": "x"}):
        with pytest.raises(ConfigError):
            MultipartUploadWriter.from_uri("memory://writer/two", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        MultipartUploadWriter.from_uri("memory://writer/")


def test_a_condition_is_kept_in_parts() -> None:
    s3.put("memory://writer/taken", b"1")
    for size in (1, 11 * MIB):
        writer = MultipartUploadWriter.from_uri("memory://writer/taken", part_size=5 * MIB, mode="create")
        writer.write(bytes(size))
        with pytest.raises(ObjectExistsError):
            writer.close()
    assert s3.get("memory://writer/taken") == b"1"


def test_committed_bytes_are_sent_from_where_they_are() -> None:
    """Whatever part size and reservation: the addresses that reach the backend are those that were lent."""
    for part, size in ((5, 5), (5, 1), (8, 3), (16, 10), (5, 23), (16, 16), (7, 6)):
        lent: list[tuple[int, int]] = []
        sent: list[tuple[int, int]] = []
        writer = MultipartUploadWriter.from_uri("memory://writer/addresses", part_size=part * MIB, max_in_flight=1)
        backend: Any = writer._backend
        backend.upload_part = _noting(backend.upload_part, sent)
        try:
            for i in range(12):
                view = writer.reserve(size * MIB)
                lent.append((_address(view), len(view)))
                view[:4] = i.to_bytes(4, "little")
                writer.commit(len(view))
                writer.flush()
            writer.close()
        finally:
            del backend.upload_part
        assert _merged(sent) == _merged(lent), (part, size)
        data = s3.get("memory://writer/addresses")
        assert [int.from_bytes(data[i * size * MIB :][:4], "little") for i in range(12)] == [*range(12)]


def _noting(upload_part: Any, sent: list[tuple[int, int]]) -> Any:
    def call(key: str, upload_id: str, number: int, data: Any) -> Any:
        sent.append((_address(data), len(data)))
        return upload_part(key, upload_id, number, data)

    return call


def _address(data: Any) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same, neighbours in memory as one."""
    found: list[tuple[int, int]] = []
    for start, size in spans:
        if found and sum(found[-1]) == start:
            found[-1] = found[-1][0], found[-1][1] + size
        else:
            found.append((start, size))
    return found


def test_more_parts_than_a_store_takes() -> None:
    """Parts grow, so that 10,000 of them suffice."""
    numbers: list[int] = []
    writer = MultipartUploadWriter.from_uri("memory://writer/many", part_size=5 * MIB, max_in_flight=1)
    writer._upload.store = lambda number, body: numbers.append(len(body)) or len(numbers)  # type: ignore[method-assign,func-returns-value]
    block = bytes(5 * MIB)
    for _ in range(2000):
        writer.write(block)
    writer.flush()
    writer.abort()
    assert len(numbers) < 1500
    assert max(numbers) > 5 * MIB


def test_an_error_of_a_part_is_raised_by_the_next_call(place: str) -> None:

    rule = Rule("error", method="PUT", path="partNumber=2", status=403, code="AccessDenied")
    with FaultProxy(os.environ["S3_ENDPOINT_URL"], [rule]) as proxy:
        writer = MultipartUploadWriter.from_uri(f"{place}/k", part_size=5 * MIB, endpoint_url=proxy.endpoint_url)
        with pytest.raises(s3loader.AccessDeniedError), writer:  # noqa: PT012
            for _ in range(10):
                writer.write(bytes(5 * MIB))
        assert rule.fired
    with pytest.raises(ObjectNotFoundError):
        s3.get(f"{place}/k")
    with s3loader.open_store(place) as store:
        assert [*store.backend.list_multipart()] == []


def test_parts_carry_checksums_and_the_size_is_looked_at(place: str) -> None:
    seen: list[str] = []
    stop = events.subscribe(lambda event: seen.append(event.op))
    try:
        with MultipartUploadWriter.from_uri(f"{place}/k", part_size=5 * MIB) as writer:
            writer.write(bytes(11 * MIB))
    finally:
        stop()
    assert seen[-1] == "HEAD"
    assert seen.count("PUTPART") == 3


def test_a_lost_writer_drops_its_parts(place: str, caplog: pytest.LogCaptureFixture) -> None:
    writer = MultipartUploadWriter.from_uri(f"{place}/k", part_size=5 * MIB)
    writer.write(bytes(6 * MIB))
    writer.flush()
    del writer
    assert "lost before close" in caplog.text
    with s3loader.open_store(place) as store:
        assert [*store.backend.list_multipart()] == []


def test_the_async_twin() -> None:
    async def run() -> None:
        async with s3.AsyncMultipartUploadWriter.from_uri("memory://writer/async", part_size=5 * MIB) as writer:
            await writer.write(b"a" * (6 * MIB))
            view = writer.reserve(3)
            view[:] = b"xyz"
            await writer.commit(3)
            await writer.flush()
        assert (await writer.close())["total_bytes"] == 6 * MIB + 3
        with pytest.raises(ZeroDivisionError):
            async with s3.AsyncMultipartUploadWriter.from_uri("memory://writer/async2") as writer:
                raise ZeroDivisionError

    asyncio.run(run())
    assert s3.get("memory://writer/async")[-4:] == b"axyz"
    assert not s3.exists("memory://writer/async2")
