"""Errors, types, units, ranges, checksums and events: the floor everything stands on."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import errors, events
from s3loader.checksum import crc32c, crc32c_base64
from s3loader.ranges import coalesce, split
from s3loader.types import ByteRange, ObjectMeta, ObjectURL
from s3loader.units import format_duration, format_size, parse_duration, parse_size


def tree(cls: type[Exception]) -> list[type[Exception]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in tree(sub))]


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_in_the_drawn_tree_and_pickles(name: str) -> None:
    assert errors.__doc__ is not None
    assert name in errors.__doc__
    error = getattr(errors, name)("it broke")
    error.url, error.hint = "s3://b/k", "mend it"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert str(error).endswith("it broke s3://b/k\nhint: mend it")


def test_an_error_says_what_where_why_and_how_to_fix_it() -> None:
    error = errors.ObjectNotFoundError(
        "no such key", op="get", url="s3://b/k", status=404, code="NoSuchKey", request_id="R1", attempts=3, hint="check it"
    )
    assert str(error) == "cannot get s3://b/k: no such key (404, NoSuchKey, request id R1, 3 attempts)\nhint: check it"
    assert isinstance(error, FileNotFoundError)
    assert not error.retryable
    assert errors.ThrottledError("slow down").retryable


def test_details_are_attributes() -> None:
    error = errors.InvalidManifestError("Line 7: Empty line", 7)
    assert error.line_number == 7
    with pytest.raises(AttributeError):
        _ = error.nothing


@pytest.mark.parametrize(
    ("text", "scheme", "bucket", "key"),
    [
        ("s3://b/a/b", "s3", "b", "a/b"),
        ("S3://b", "s3", "b", ""),
        ("file:///data/x", "file", "", "/data/x"),
        ("file:///data/a%20b", "file", "", "/data/a b"),
        ("memory://", "memory", "", ""),
        ("gs://b/k#x?y", "gs", "b", "k#x?y"),
    ],
)
def test_urls(text: str, scheme: str, bucket: str, key: str) -> None:
    assert ObjectURL.parse(text) == ObjectURL(scheme, bucket, key)


@pytest.mark.parametrize("text", ["ftp://host/x", "s3://", "s3:///key", "", "file://./relative", "file://host/x"])
def test_bad_urls(text: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        ObjectURL.parse(text)
    assert caught.value.hint


def test_object_meta_pickles() -> None:
    meta = ObjectMeta("k", 3, "e", 1.0, metadata={"a": "b"})
    assert pickle.loads(pickle.dumps(meta)) == meta


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2)])
def test_bad_byte_ranges(start: int, end: int) -> None:
    with pytest.raises(errors.ConfigError):
        ByteRange(start, end)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0), ("0", 0), (65536, 65536), (np.int64(1 << 20), 1 << 20), ("7B", 7), ("70000", 70_000), ("64MiB", 64 << 20),
        ("1.5 GB", 1_500_000_000), ("2k", 2000), ("1KiB", 1024), ("9007199254740993B", 9007199254740993),
    ],
)  # fmt: skip
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", -1, "1 apple", "1e3", 8, "8", 65535, np.int32(8), 8.0, True, None, b"8MiB", "9" * 400 + "MiB"]
)
def test_bad_sizes(text: int | str) -> None:
    with pytest.raises(errors.ConfigError, match="hint: "):
        parse_size(text)


def test_a_number_without_a_unit_is_bytes_where_the_name_says_so() -> None:
    assert parse_size(8, "max_bytes") == 8
    with pytest.raises(errors.ConfigError, match="prefetch=8 would be 8 bytes") as caught:
        parse_size(8, "prefetch")
    assert '"8MiB"' in str(caught.value.hint)


@pytest.mark.parametrize(("text", "seconds"), [(2, 2.0), ("90s", 90.0), ("1m30s", 90.0), ("250ms", 0.25), ("2h", 7200.0)])
def test_durations(text: float | str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "1x", "s", -1, float("nan")])
def test_bad_durations(text: float | str) -> None:
    with pytest.raises(errors.ConfigError):
        parse_duration(text)


def test_formats() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 64 << 20)] == ["0 B", "1023 B", "1.0 KiB", "64.0 MiB"]
    assert [format_duration(s) for s in (0.0042, 9.96, 90, 3700)] == ["4.2 ms", "10.0 s", "1m30s", "1h01m"]


RANGES = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 60)).map(lambda p: (p[0], p[0] + p[1])), max_size=30)


@settings(max_examples=200, deadline=None)
@given(ranges=RANGES, max_gap=st.integers(0, 40), max_size=st.integers(1, 200))
def test_coalesce_covers_exactly_what_is_wanted(ranges: list[tuple[int, int]], max_gap: int, max_size: int) -> None:
    spans = coalesce(ranges, max_gap=max_gap, max_size=max_size)
    members = [i for span in spans for i in span.members]
    assert sorted(members) == [i for i, (start, end) in enumerate(ranges) if end > start]
    for span in spans:
        covered = [ranges[i] for i in span.members]
        assert span.start == min(start for start, _ in covered)
        assert span.end == max(end for _, end in covered)
    for before, after in itertools.pairwise(spans):
        assert before.end <= after.start
    useful = {at for start, end in ranges for at in range(start, end)}
    assert sum(span.end - span.start for span in spans) <= len(useful) + max_gap * sum(len(span.members) - 1 for span in spans)


@given(start=st.integers(0, 1000), length=st.integers(0, 1000), size=st.integers(1, 300))
def test_split_tiles(start: int, length: int, size: int) -> None:
    pieces = split(start, start + length, size)
    assert [at for a, b in pieces for at in range(a, b)] == list(range(start, start + length))
    assert all(0 < b - a <= size for a, b in pieces)


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_crc32c_continues(data: bytes, cut: int) -> None:
    assert crc32c(data[cut:], crc32c(memoryview(data)[:cut])) == crc32c(data)


def test_crc32c_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720
    assert crc32c_base64(b"123456789") == "4waSgw=="


def test_a_failing_subscriber_is_removed_and_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def broken(event: events.OpEvent) -> None:
        raise RuntimeError("observer")

    stop_broken, stop = events.subscribe(broken), events.subscribe(lambda event: seen.append(event.op))
    for _ in range(2):
        events.emit(events.OpEvent("GET", "s3://b/k", 1, 0.0, 1.0))
    stop()
    stop_broken()
    assert seen == ["GET", "GET"]
    assert len(caplog.records) == 1
    assert not events.active()
