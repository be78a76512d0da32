"""Writing: puts of every kind, conditions, races, deletes, copies."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from s3loader.errors import (
    ConflictError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    PreconditionFailedError,
    S3LoaderError,
    UnsupportedOperationError,
)
from s3loader.store import ObjectStore
from s3loader.testing.suite._base import Base, random_bytes, run_together
from s3loader.types import Update


class WriteTests(Base):
    """What is written is whole, once, and where it was meant to be."""

    def test_put_takes_every_kind_of_data(self, store: ObjectStore, tmp_path: Path) -> None:
        data = random_bytes(10_000)
        path = tmp_path / "file"
        path.write_bytes(data)
        kinds: dict[str, Any] = {
            "bytes": data,
            "bytearray": bytearray(data),
            "memoryview": memoryview(b"xx" + data + b"xx")[2:-2],
            "path": path,
            "bytesio": io.BytesIO(data),
        }
        for name, value in kinds.items():
            result = store.put(name, value)
            assert (result.key, result.size) == (name, len(data))
            assert result.etag == store.head(name).etag
            assert store.get(name) == data, name
        with path.open("rb") as file:
            store.put("file", file)
        assert store.get("file") == data

    def test_put_takes_words_as_bytes(self, store: ObjectStore) -> None:
        import array

        numbers = array.array("q", range(100))
        store.put("k", memoryview(numbers))
        assert store.get("k") == numbers.tobytes()

    def test_put_keeps_nothing_of_the_buffer(self, store: ObjectStore) -> None:
        data = bytearray(b"before")
        store.put("k", data)
        data[:] = b"after!"
        assert store.get("k") == b"before"

    def test_put_replaces(self, store: ObjectStore) -> None:
        first = store.put("k", b"a longer first value")
        second = store.put("k", b"short")
        assert store.get("k") == b"short"
        assert first.etag != second.etag
        assert [entry.key for entry in store.list()] == ["k"]

    def test_put_of_a_large_file(self, store: ObjectStore, tmp_path: Path) -> None:
        data = random_bytes(self.big)
        path = tmp_path / "file"
        path.write_bytes(data)
        assert store.put("k", path).size == len(data)
        with path.open("rb") as file:
            store.put("from an open file", file)
        assert store.get("k") == data
        assert store.get("from an open file") == data

    def test_a_source_that_fails_leaves_nothing(self, store: ObjectStore) -> None:
        class Broken(io.RawIOBase):
            left = 3

            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                self.left -= 1
                if not self.left:
                    raise RuntimeError("the disk fell off")
                return len(buffer)

        store.put("old", b"intact")
        for key in ("new", "old"):
            with pytest.raises(RuntimeError, match="fell off"):
                store.put(key, Broken())
        assert store.get("old") == b"intact"
        assert not store.exists("new")
        assert list(store.backend.list_multipart()) == []
        with pytest.raises(FileNotFoundError):
            store.put("new", Path("/no/such/file"))

    def test_metadata_and_content_type(self, store: ObjectStore) -> None:
        if not self.caps(store).metadata:
            pytest.skip("the store keeps no metadata")
        store.put("k", b"x", content_type="image/png", metadata={"Camera-Model": "a b+c", "n": "1"})
        meta = store.head("k")
        assert meta.content_type == "image/png"
        assert {k: v for k, v in meta.metadata.items() if k in ("camera-model", "n")} == {"camera-model": "a b+c", "n": "1"}
        store.put("k", b"y")
        assert "n" not in store.head("k").metadata, "a new object has none of the old one's metadata"

    def test_unknown_modes(self, store: ObjectStore) -> None:
        modes: list[Any] = ["append", "", None, 7]
        for mode in modes:
            with pytest.raises((S3LoaderError, TypeError)):
                store.put("k", b"x", mode=mode)
        assert not store.exists("k")

    # -- conditions ------------------------------------------------------------------------

    def test_create(self, store: ObjectStore) -> None:
        store.put("new", b"mine", mode="create")
        assert store.get("new") == b"mine"
        if not self.caps(store).create:
            pytest.skip("the store ignores the condition")
        with pytest.raises(ObjectExistsError) as caught:
            store.put("new", b"another's", mode="create")
        assert isinstance(caught.value, FileExistsError)
        assert store.get("new") == b"mine"
        store.delete("new")
        store.put("new", b"again", mode="create")

    def test_update(self, store: ObjectStore) -> None:
        if not self.caps(store).update:
            pytest.skip("the store does not do it")
        first = store.put("k", b"one")
        second = store.put("k", b"two", mode=Update(first.etag))
        assert second.etag == store.head("k").etag
        with pytest.raises(ObjectChangedError):
            store.put("k", b"three", mode=Update(first.etag))
        assert store.get("k") == b"two"
        with pytest.raises((ObjectChangedError, ObjectNotFoundError)):
            store.put("gone", b"x", mode=Update(first.etag))
        assert not store.exists("gone")

    def test_create_has_one_winner(self, store: ObjectStore) -> None:
        if not self.caps(store).create:
            pytest.skip("the store ignores the condition")
        for attempt in range(3):
            key = f"claim-{attempt}"
            results = run_together([partial(store.put, key, b"%d" % i, mode="create") for i in range(8)])
            winners = [i for i, result in enumerate(results) if not isinstance(result, BaseException)]
            assert len(winners) == 1, results
            losers = [result for result in results if isinstance(result, BaseException)]
            assert all(isinstance(error, ObjectExistsError | ConflictError) for error in losers), losers
            assert store.get(key) == b"%d" % winners[0]

    def test_updates_lose_nothing(self, store: ObjectStore) -> None:
        """Writers append to one object: each line is there once, whoever was told what.

        A writer that is told "changed" writes again, as its change was not applied; one that is told
        that nobody knows looks for it.
        """
        if not self.caps(store).update:
            pytest.skip("the store does not do it")
        store.put("lines", b"")

        def append(line: bytes) -> None:
            while True:
                etag = store.head("lines").etag
                try:
                    lines = store.get("lines", if_match=etag)
                    store.put("lines", lines + line, mode=Update(etag))
                    return
                except (PreconditionFailedError, ConflictError):
                    continue
                except OutcomeUnknownError:
                    if line in store.get("lines"):
                        return

        def work(me: int) -> None:
            for number in range(5):
                append(b"%d-%d\n" % (me, number))

        assert run_together([partial(work, me) for me in range(4)]) == [None] * 4
        found = store.get("lines").split()
        assert sorted(found) == [b"%d-%d" % (me, number) for me in range(4) for number in range(5)]

    def test_readers_see_whole_objects(self, store: ObjectStore) -> None:
        values = [bytes([i]) * 100_000 for i in range(2)]
        store.put("k", values[0])

        def write() -> None:
            for i in range(20):
                store.put("k", values[i % 2])

        def read() -> None:
            for _ in range(20):
                try:
                    assert store.get("k") in values
                except ObjectChangedError:
                    continue  # replaced between two ranges of one read, and noticed

        assert run_together([write, read, read]) == [None] * 3

    # -- delete and copy -------------------------------------------------------------------

    def test_delete(self, store: ObjectStore) -> None:
        store.put("k", b"x")
        store.put("k2", b"x")
        store.delete("k")
        assert not store.exists("k")
        assert store.exists("k2")
        store.delete("k")
        store.delete("never/was")

    def test_delete_many(self, store: ObjectStore) -> None:
        keys = [f"d/{i:02} +%" for i in range(25)]
        for key in keys:
            store.put(key, b"x")
        store.put("stays", b"x")
        assert store.delete_many([*keys[:20], "never/was", keys[3]]) == []
        assert [entry.key for entry in store.list()] == [*keys[20:], "stays"]
        assert store.delete_many([]) == []
        assert store.delete_many(iter(keys[20:])) == []
        assert [entry.key for entry in store.list()] == ["stays"]

    def test_copy(self, store: ObjectStore) -> None:
        data = random_bytes(5000)
        store.put("from/a b+c%20ü", data)
        store.put("taken", b"other")
        result = store.copy("from/a b+c%20ü", "to/x y+z%41é")
        assert result.key == "to/x y+z%41é"
        assert result.etag == store.head("to/x y+z%41é").etag
        assert store.get("to/x y+z%41é") == data
        assert store.get("from/a b+c%20ü") == data
        store.copy("from/a b+c%20ü", "taken")
        assert store.get("taken") == data

    def test_copy_over_nothing(self, store: ObjectStore) -> None:
        """A conditional copy holds its condition or is refused; it never overwrites."""
        if not self.caps(store).create:
            pytest.skip("the store ignores the condition")
        store.put("a", b"a")
        store.put("b", b"b")
        refusals = (ObjectExistsError, UnsupportedOperationError, *(() if self.steady else (OutcomeUnknownError,)))
        with pytest.raises(refusals):
            store.copy("a", "b", mode="create")
        assert store.get("b") == b"b"
