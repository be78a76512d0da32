"""Reading: whole objects, ranges, in place, pinned to an ETag, as a file."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import pytest

from s3loader.errors import ObjectChangedError, ObjectNotFoundError, RangeError, S3LoaderError
from s3loader.store import ObjectStore
from s3loader.testing.suite._base import Base, random_bytes

READS: dict[str, Callable[[ObjectStore, str, str | None], Any]] = {
    "get": lambda store, key, etag: store.get(key, if_match=etag),
    "get_range": lambda store, key, etag: store.get_range(key, 1, 5, if_match=etag),
    "get_ranges": lambda store, key, etag: store.get_ranges(key, [(1, 5), (7, 8)], if_match=etag),
    "read_into": lambda store, key, etag: store.read_into(key, 1, bytearray(4), if_match=etag).size,
}


class ReadTests(Base):
    """Every byte, and only those."""

    def test_get_returns_what_was_put(self, store: ObjectStore) -> None:
        for size in (0, 1, 4096, 100_003):
            data = random_bytes(size)
            store.put("some/key", data)
            assert store.get("some/key") == data

    def test_empty_object(self, store: ObjectStore) -> None:
        store.put("empty", b"")
        assert store.get("empty") == b""
        assert store.head("empty").size == 0
        assert store.get_range("empty", 0, 0) == b""
        assert store.get_range("empty", -7) == b""
        assert store.get_ranges("empty", [(0, 0)]) == [b""]
        assert store.read_into("empty", 0, bytearray()).size == 0
        with store.open("empty") as file:
            assert file.read() == b""
        with pytest.raises(RangeError):
            store.read_into("empty", 0, bytearray(1))

    def test_large_object(self, store: ObjectStore) -> None:
        data = random_bytes(self.big)
        store.put("large", data)
        assert store.head("large").size == len(data)
        assert store.get("large") == data
        assert store.get_range("large", len(data) - 3, len(data)) == data[-3:]
        into = bytearray(len(data) - 1)
        store.read_into("large", 1, into)
        assert into == data[1:]

    def test_range_edges(self, store: ObjectStore) -> None:
        data = random_bytes(1000)
        store.put("k", data)
        for start, end in [(0, 1), (0, 1000), (999, 1000), (3, 7), (5, 5), (0, 0), (500, 1000)]:
            assert store.get_range("k", start, end) == data[start:end], (start, end)
        assert store.get_range("k", 990, 5000) == data[990:], "a range is cut at the end of the object"
        for count in (1, 999, 1000, 5000):
            assert store.get_range("k", -count) == data[-count:], f"the last {count}"
        for start, end in [(1000, 1001), (1001, 1002), (10**9, 10**9 + 1)]:
            with pytest.raises(RangeError) as caught:
                store.get_range("k", start, end)
            assert "k" in str(caught.value)

    def test_nonsense_ranges(self, store: ObjectStore) -> None:
        store.put("k", b"0123456789")
        with pytest.raises(ValueError) as caught:
            store.get_range("k", 5, 3)
        assert isinstance(caught.value, S3LoaderError)
        for start, end in ((5, 3), (-1, 3), (-5, -1)):  # where ranges are joined, none counts from the end
            with pytest.raises(ValueError):
                store.get_ranges("k", [(0, 1), (start, end)])

    def test_read_into_fills_exactly(self, store: ObjectStore) -> None:
        data = random_bytes(1000)
        written = store.put("k", data)
        buffer = bytearray(b"\xaa" * 300)
        meta = store.read_into("k", 200, memoryview(buffer)[100:200])
        assert buffer == b"\xaa" * 100 + data[200:300] + b"\xaa" * 100
        assert (meta.key, meta.size, meta.etag) == ("k", 1000, written.etag)
        for start, size in [(950, 51), (1000, 1), (2000, 1)]:
            with pytest.raises(RangeError):
                store.read_into("k", start, bytearray(size))

    def test_read_into_refuses_what_it_cannot_fill(self, store: ObjectStore) -> None:
        store.put("k", b"0123456789")
        with pytest.raises((S3LoaderError, TypeError, BufferError)):
            store.read_into("k", 0, memoryview(b"readonly"))
        with pytest.raises((S3LoaderError, TypeError, BufferError, ValueError)):
            store.read_into("k", 0, memoryview(bytearray(8))[::2])

    def test_get_ranges(self, store: ObjectStore) -> None:
        data = random_bytes(50_000)
        store.put("k", data)
        rng = random.Random(7)
        ranges = []
        for _ in range(60):
            start = rng.randrange(len(data))
            ranges.append((start, min(len(data), start + rng.choice([0, 1, 10, 3000]))))
        ranges += [ranges[3], (0, len(data)), (len(data) - 1, len(data)), (0, 1)]
        for gap in (0, "100B", "256KiB"):
            views = store.get_ranges("k", ranges, max_gap=gap)
            assert [bytes(view) for view in views] == [data[start:end] for start, end in ranges]
        views = store.get_ranges("k", ranges, max_gap="1000B", max_size="4096B")
        assert [bytes(view) for view in views] == [data[start:end] for start, end in ranges]
        assert store.get_ranges("k", []) == []
        with pytest.raises(RangeError):
            store.get_ranges("k", [(0, 10), (50_000, 50_001)])

    def test_reads_are_pinned_to_an_etag(self, store: ObjectStore) -> None:
        first = store.put("k", b"first version")
        assert store.head("k").etag == first.etag
        expected = {verb: read(store, "k", None) for verb, read in READS.items()}
        assert {verb: read(store, "k", first.etag) for verb, read in READS.items()} == expected
        second = store.put("k", b"other version")
        assert second.etag != first.etag
        for verb, read in READS.items():
            with pytest.raises(ObjectChangedError) as caught:
                read(store, "k", first.etag)
            assert caught.value.url is not None, verb
            assert caught.value.url.endswith("/k")
            assert caught.value.hint
            read(store, "k", second.etag)

    def test_missing_key(self, store: ObjectStore) -> None:
        for read in READS.values():
            with pytest.raises(ObjectNotFoundError) as caught:
                read(store, "no/such key", None)
            self._check_missing(caught.value)

    def test_missing_key_elsewhere(self, store: ObjectStore) -> None:
        def read_file() -> None:
            with store.open("no/such key") as file:
                file.read()

        for call in (lambda: store.head("no/such key"), lambda: store.copy("no/such key", "x"), read_file):
            with pytest.raises(ObjectNotFoundError) as caught:
                call()
            self._check_missing(caught.value)
        assert not store.exists("no/such key")
        assert not store.exists("x")

    def _check_missing(self, error: ObjectNotFoundError) -> None:
        assert isinstance(error, FileNotFoundError)
        assert error.op
        assert error.url is not None
        assert "no/such key" in error.url
        assert not error.retryable
        assert error.hint
        assert error.attempts == 1 or not self.steady, "what is not there is not asked for twice"

    def test_head_and_exists(self, store: ObjectStore) -> None:
        written = store.put("a/b", b"data")
        meta = store.head("a/b")
        assert (meta.key, meta.size, meta.etag) == ("a/b", 4, written.etag)
        assert meta.etag
        assert '"' not in meta.etag
        assert meta.last_modified is None or meta.last_modified > 1e9
        assert store.exists("a/b")
        assert not store.exists("a"), "a folder is no object"
        assert not store.exists("a/bc")

    def test_open_reads_as_a_file(self, store: ObjectStore) -> None:
        data = random_bytes(300_000)
        store.put("f", data)
        with store.open("f") as file:
            assert file.readable()
            assert file.seekable()
            assert not file.writable()
            assert file.read(10) == data[:10]
            assert file.tell() == 10
            assert file.seek(-5, io.SEEK_END) == len(data) - 5
            assert file.read() == data[-5:]
            assert file.read() == b""
            assert file.read(1) == b""
            assert file.seek(100_000) == 100_000
            assert file.seek(7, io.SEEK_CUR) == 100_007
            buffer = bytearray(1000)
            assert file.readinto(buffer) == 1000
            assert buffer == data[100_007:101_007]
            file.seek(len(data) + 10)
            assert file.read(3) == b""
            with pytest.raises((ValueError, OSError)):  # Python's own files differ in this, too
                file.seek(-1)
            file.seek(0)
            assert file.read() == data
        with pytest.raises(ValueError):
            file.read(1)

    def test_open_is_what_readers_of_files_take(self, store: ObjectStore) -> None:
        import zipfile

        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("one", b"1" * 5000)
            archive.writestr("two", b"2" * 5000)
        store.put("z.zip", packed.getvalue())
        with store.open("z.zip") as file, zipfile.ZipFile(file) as archive:
            assert archive.read("two") == b"2" * 5000
            assert archive.testzip() is None

    def test_open_notices_that_the_object_changed(self, store: ObjectStore) -> None:
        data = random_bytes(self.big)
        store.put("f", data)
        with store.open("f") as file:
            assert file.read(10) == data[:10]
            store.put("f", data[::-1])
            file.seek(len(data) - 10)
            with pytest.raises(ObjectChangedError):
                file.read(10)
