"""Multipart uploads: all of it or nothing of it."""

from __future__ import annotations

import pytest

from s3loader.checksum import crc32c_base64
from s3loader.errors import ClosedError, ObjectChangedError, ObjectExistsError, ObjectNotFoundError, UnsupportedOperationError
from s3loader.store import ObjectStore
from s3loader.testing.suite._base import Base, random_bytes
from s3loader.types import Update

PART = 5 * 2**20  # what S3 asks of all parts but the last


class MultipartTests(Base):
    """The writer of large objects."""

    def _nothing_is_left(self, store: ObjectStore) -> None:
        assert list(store.backend.list_multipart()) == []

    def test_multipart_pieces_become_one_object(self, store: ObjectStore) -> None:
        data = random_bytes(self.big)
        writer = store.multipart("k", part_size=PART)
        view = memoryview(data)
        at = 0
        for size in (1, 0, 1000, PART - 7, 13):
            assert writer.write(view[at : at + size]) == size
            at += size
        assert list(store.list()) == [], "what is not closed is not there"
        writer.write(view[at:])
        result = writer.close()
        assert (result.key, result.size) == ("k", len(data))
        assert result.etag in ("", store.head("k").etag)
        assert store.get("k") == data
        self._nothing_is_left(store)

    def test_multipart_the_caller_may_reuse_its_buffer(self, store: ObjectStore) -> None:
        data = random_bytes(self.big)
        with store.multipart("k", part_size=PART) as writer:
            buffer = bytearray(1 << 20)
            for at in range(0, len(data), len(buffer)):
                piece = data[at : at + len(buffer)]
                buffer[: len(piece)] = piece
                writer.write(memoryview(buffer)[: len(piece)])
                buffer[:] = bytes(len(buffer))
        assert store.get("k") == data

    def test_multipart_reserve_and_commit(self, store: ObjectStore) -> None:
        data = random_bytes(self.big)
        with store.multipart("k", part_size=PART) as writer:
            at = 0
            while at < len(data):
                view = writer.reserve(min(700_000, len(data) - at))
                size = len(view)
                view[:] = data[at : at + size]
                writer.commit(size)
                at += size
            view = writer.reserve(100)
            writer.commit(0)
        assert store.get("k") == data

    def test_multipart_sizes(self, store: ObjectStore) -> None:
        for size in (0, 1, PART, 2 * PART):
            data = random_bytes(size)
            with store.multipart("k", part_size=PART) as writer:
                writer.write(data)
                writer.flush()
            assert store.head("k").size == size
            assert store.get("k") == data
        self._nothing_is_left(store)

    def test_multipart_abort(self, store: ObjectStore) -> None:
        store.put("k", b"old")
        writer = store.multipart("k", part_size=PART)
        writer.write(random_bytes(self.big))
        writer.flush()
        writer.abort()
        writer.abort()
        assert store.get("k") == b"old"
        self._nothing_is_left(store)
        with pytest.raises(ClosedError):
            writer.write(b"more")

    def test_multipart_an_exception_aborts(self, store: ObjectStore) -> None:
        def fail() -> None:
            with store.multipart("k", part_size=PART) as writer:
                writer.write(random_bytes(self.big))
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            fail()
        assert not store.exists("k")
        self._nothing_is_left(store)

    def test_multipart_close_twice_and_use_after(self, store: ObjectStore) -> None:
        writer = store.multipart("k", part_size=PART)
        writer.write(b"data")
        first = writer.close()
        assert writer.close() == first
        with pytest.raises(ClosedError):
            writer.write(b"more")
        assert store.get("k") == b"data"

    def test_multipart_metadata(self, store: ObjectStore) -> None:
        if not self.caps(store).metadata:
            pytest.skip("the store keeps no metadata")
        with store.multipart("k", part_size=PART, content_type="text/x-test", metadata={"n": "1"}) as writer:
            writer.write(random_bytes(self.big))
        meta = store.head("k")
        assert meta.content_type == "text/x-test"
        assert meta.metadata.get("n") == "1"

    @pytest.mark.parametrize("size", [10, PART + 1])  # a single put, and an upload
    def test_multipart_create(self, store: ObjectStore, size: int) -> None:
        caps = self.caps(store)
        if not (caps.create and caps.multipart_create):
            pytest.skip("the store ignores the condition")
        with store.multipart("k", part_size=PART, mode="create") as writer:
            writer.write(random_bytes(size))
        first = store.head("k")
        late = store.multipart("k", part_size=PART, mode="create")
        late.write(random_bytes(size, 1))
        with pytest.raises(ObjectExistsError):
            late.close()
        assert store.head("k").etag == first.etag
        self._nothing_is_left(store)

    @pytest.mark.parametrize("size", [10, PART + 1])
    def test_multipart_update(self, store: ObjectStore, size: int) -> None:
        caps = self.caps(store)
        if not (caps.update and caps.multipart_update):
            pytest.skip("the store does not do it")
        first = store.put("k", b"one")
        with store.multipart("k", part_size=PART, mode=Update(first.etag)) as writer:
            writer.write(random_bytes(size))
        second = store.head("k")
        assert second.size == size
        late = store.multipart("k", part_size=PART, mode=Update(first.etag))
        late.write(random_bytes(size, 1))
        with pytest.raises(ObjectChangedError):
            late.close()
        assert store.head("k").etag == second.etag
        self._nothing_is_left(store)

    def test_multipart_parts_of_an_open_upload(self, store: ObjectStore) -> None:
        backend = store.backend
        try:
            assert list(backend.list_parts("k", backend.create_multipart("k"))) == []
        except UnsupportedOperationError:
            pytest.skip("the store does not tell")
        for key, upload_id, _ in list(backend.list_multipart()):
            backend.abort_multipart(key, upload_id)
        first, last = random_bytes(PART, 1), random_bytes(100, 2)
        upload_id = backend.create_multipart("k")
        for number, body in ((1, first), (2, last)):
            backend.upload_part("k", upload_id, number, body)
        parts = list(backend.list_parts("k", upload_id))
        assert [(part.number, part.size) for part in parts] == [(1, PART), (2, 100)]
        for part, body in zip(parts, (first, last), strict=True):
            assert part.checksum in (None, crc32c_base64(body))
            assert part.etag
        with pytest.raises(ObjectNotFoundError):
            list(backend.list_parts("another", "0" * 32))
        backend.complete_multipart("k", upload_id, parts)
        assert store.get("k") == first + last
        with pytest.raises(ObjectNotFoundError):
            list(backend.list_parts("k", upload_id))
        self._nothing_is_left(store)

    def test_multipart_two_uploads_of_one_key_do_not_mix(self, store: ObjectStore) -> None:
        ours, theirs = random_bytes(self.big, 1), random_bytes(self.big, 2)
        one, two = (store.multipart("k", part_size=PART) for _ in range(2))
        one.write(ours[:PART])
        two.write(theirs)
        one.write(ours[PART:])
        two.close()
        assert store.get("k") == theirs
        one.close()
        assert store.get("k") == ours
