"""Heads of answers: strict, and never a wrong body taken for a right one."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import s3loader.store.s3.http as head_module
from s3loader.store.s3.http import MAX_HEAD, Head, UnexpectedResponse, check_read, parse_head

GOOD = (
    b'HTTP/1.1 206 Partial Content\r\nServer: s\r\nETag: "e-1"\r\nContent-Length: 10\r\n'
    b"Content-Range: bytes 5-14/100\r\nx-amz-meta-a: \xc3\xbc\r\nConnection: keep-alive\r\n\r\n"
)


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def test_fields() -> None:
    found = parse_head(GOOD)
    assert (found.status, found.length, found.first, found.last, found.size) == (206, 10, 5, 14, 100)
    assert (found.etag, found.keep_alive, found.version_id, found.checksum) == ("e-1", True, None, "")
    assert found.headers()["x-amz-meta-a"] == "ü"
    meta = found.meta("k")
    assert (meta.key, meta.size, meta.etag, meta.last_modified, meta.metadata) == ("k", 100, "e-1", None, {"a": "ü"})
    other = parse_head(
        head("content-LENGTH:  7 ", 'Etag: W/"x"', "connection: Keep-Alive, CLOSE", "x-amz-checksum-crc32c: AA==")
    )
    assert (other.length, other.etag, other.keep_alive, other.checksum, other.size) == (7, "x", False, "AA==", -1)


@pytest.mark.parametrize(
    "lines", [("close", "keep-alive"), ("keep-alive", "close"), ("close", "close"), ("keep-alive, close",)]
)
def test_close_is_heard_wherever_it_stands(lines: tuple[str, ...]) -> None:
    for _ in range(2):  # lines once met are remembered
        assert not parse_head(head("Content-Length: 1", *(f"Connection: {line}" for line in lines))).keep_alive
        assert parse_head(head("Content-Length: 1", "Connection: keep-alive")).keep_alive


def test_many_different_lines_are_forgotten_again() -> None:
    for i in range(2000):
        assert parse_head(head(f"x-amz-request-id: {i}", f"Content-Length: {i}", f"x-name-{i}: a")).length == i
    assert len(head_module._idle_lines) <= 256
    assert len(head_module._role_of) <= 256


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 20 OK\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1  200 OK\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200OK\r\nContent-Length: 1\r\n\r\n",
        b" HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n",
        b"\r\n\r\n",
        head(),
        head("Content-Length: "),
        head("Content-Length: +1"),
        head("Content-Length: 1, 1"),
        head("Content-Length: 0x1"),
        head("Content-Length: 1_0"),
        head("Content-Length: 99999999999999999999"),
        head("Content-Length: \xb2"),
        head("Content-Length: 1", "Content-Length: 1"),
        head("Content-Length : 1"),
        head(" Content-Length: 1"),
        head("Content-Length: 1", "X: a", " folded"),
        head("Content-Length: 1", "no colon"),
        head("Content-Length: 1", ": no name"),
        head("Content-Length: 1", "X: a\nY: b"),
        head("Content-Length: 1", "X: a\rY: b"),
        head("Content-Length: 1", "X: a\0"),
        head("Content-Length: 1", "Transfer-Encoding: chunked"),
        head("Content-Length: 1", "TRANSFER-ENCODING: identity"),
        head("Content-Length: 1", "Upgrade: h2c"),
        head("Content-Length: 1", "Connection: upgrade"),
        head("Content-Length: 1", 'ETag: "a"', 'ETag: "a"'),
        head("Content-Length: 1", "Content-Range: bytes 0-0"),
        head("Content-Length: 1", "Content-Range: bytes 0-0/*"),
        head("Content-Length: 1", "Content-Range: bytes */5"),
        head("Content-Length: 1", "Content-Range: items 0-0/5"),
        head("Content-Length: 1", "Content-Range: bytes 0-0/5", "Content-Range: bytes 0-0/5"),
        head("Content-Length: 1", "X: " + "x" * MAX_HEAD),
    ],
)
def test_odd_heads(raw: bytes) -> None:
    with pytest.raises(UnexpectedResponse):
        parse_head(raw)


sizes = st.integers(0, 12)


@settings(max_examples=400, deadline=None)
@given(
    status=st.sampled_from([200, 206, 204, 304, 404]),
    length=sizes,
    said=st.none() | st.tuples(sizes, sizes, sizes),
    start=sizes,
    end=st.none() | sizes,
    etag=st.sampled_from(["", '"a"', '"b"', 'W/"a"']),
    if_match=st.sampled_from([None, "a", '"a"']),
)
@example(200, 5, (2, 6, 9), 2, 7, '"a"', "a")
@example(206, 3, (6, 8, 9), 6, None, "", None)
@example(200, 0, None, 0, None, "", None)
def test_only_what_was_asked_for_is_taken(
    status: int,
    length: int,
    said: tuple[int, int, int] | None,
    start: int,
    end: int | None,
    etag: str,
    if_match: str | None,
) -> None:
    lines = [f"Content-Length: {length}"]
    if said is not None:
        lines.append("Content-Range: bytes {}-{}/{}".format(*said))
    if etag:
        lines.append(f"ETag: {etag}")
    found = parse_head(head(*lines, status=f"{status} X"))
    try:
        check_read(found, start, end, if_match)
    except UnexpectedResponse:
        return
    assert status in (200, 206)
    assert if_match is None or etag in ('"a"', 'W/"a"')  # a proxy marks an ETag weak; the bytes are the same
    if said is not None:
        first, last, size = said
        assert first == start
        assert last + 1 == (size if end is None else min(end, size))
        assert (length, found.size) == (last + 1 - first, size)
        assert length > 0
    else:
        assert (status, start, found.size) == (200, 0, length)
        assert end is None or 0 < length <= end


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_a_byte_is_refused_or_harmless(data: st.DataObject) -> None:
    """Never another kind of exception, and never other numbers than those that are written there."""
    raw = bytearray(GOOD[:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if how == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 10))]
        elif how == "insert":
            raw[at:at] = data.draw(st.sampled_from([b"\r\n", b"\n", b" ", b"0", b":", b"\r\nContent-Length: 3"]))
        else:
            raw[at:at] = raw[max(0, at - 25) : at]
        if not raw:
            return
    try:
        found: Head = parse_head(bytes(raw) + b"\r\n\r\n")
        check_read(found, 5, 15, "e-1")
    except UnexpectedResponse:
        return
    values = found.headers()
    assert (found.length, values["content-length"]) == (10, "10")
    assert (found.first, found.last) == (5, 14)
    assert values["content-range"] == f"bytes 5-14/{found.size}"
    assert "transfer-encoding" not in values
