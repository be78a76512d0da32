"""Objects of the store in files: ETags, metadata, parts."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s3loader.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    S3LoaderError,
    TruncatedError,
    UnsupportedOperationError,
)
from s3loader.store import LocalBackend, MemoryBackend, open_store


def test_each_replacement_has_its_own_etag(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    etags = [store.put("k", b"same").etag for _ in range(50)]
    assert len(set(etags)) == 50
    assert store.head("k").etag == etags[-1]
    assert next(store.list()).etag == etags[-1]  # type: ignore[union-attr]


def test_a_file_written_to_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by us, who replace; by somebody with an editor."""
    backend = LocalBackend(str(tmp_path))
    path = tmp_path / "k"
    path.write_bytes(bytes(200_000))
    pread, preadv = os.pread, os.preadv

    def meddle(change: Callable[[], Any]) -> None:
        def wrapped(fd: int, buffers: Any, offset: int) -> int:
            count = preadv(fd, buffers, offset)
            change()
            return count

        monkeypatch.setattr(os, "preadv", wrapped)
        monkeypatch.setattr(os, "pread", lambda fd, n, at: (pread(fd, n, at), change())[0])

    def append() -> None:
        with open(path, "ab") as file:
            file.write(b"more")

    meddle(append)
    with pytest.raises(ObjectChangedError):
        backend.get("k")
    with pytest.raises(ObjectChangedError):
        backend.get("k", 5, 10)
    with pytest.raises(ObjectChangedError):
        backend.read_into("k", 0, memoryview(bytearray(10)))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [b[:100] for b in buffers], at) if at == 0 else 0)
    with pytest.raises(TruncatedError):
        backend.get("k")


def test_metadata_in_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.put("k", b"x", content_type="image/png", metadata={"Label": "seven é"})
    meta = store.head("k")
    assert (meta.content_type, dict(meta.metadata)) == ("image/png", {"label": "seven é"})
    store.copy("k", "copy")
    assert store.head("copy").metadata == meta.metadata

    def no_attributes(*_: Any) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "setxattr", no_attributes)
    with pytest.raises(UnsupportedOperationError) as caught:
        store.put("k", b"y", metadata={"a": "b"})
    assert caught.value.hint
    assert store.get("k") == b"x", "nothing was half done"
    store.put("k", b"z", content_type="text/plain")  # a type is a comfort, not data
    store.put("new", b"z", mode="create")  # nor is our own write id
    with store.multipart("parts", part_size="10B") as writer:
        writer.write(bytes(25))
    assert not open_store(tmp_path / "sub").capabilities().metadata


def test_parts_must_be_the_ones_uploaded(tmp_path: Path) -> None:
    for backend in (LocalBackend(str(tmp_path)), MemoryBackend(uuid.uuid4().hex)):
        upload_id = backend.create_multipart("k")
        one, two = (backend.upload_part("k", upload_id, n, b"part %d" % n) for n in (1, 2))
        again = backend.upload_part("k", upload_id, 1, b"new 1")
        for parts in ([one, two], [two, again], [again, again]):
            with pytest.raises(S3LoaderError, match="part"):
                backend.complete_multipart("k", upload_id, parts)
        assert list(backend.list()) == []
        with pytest.raises(ObjectNotFoundError):
            backend.upload_part("other", upload_id, 1, b"")
        with pytest.raises(ObjectNotFoundError):
            backend.upload_part("k", "../../etc", 1, b"")
        assert [(key, id_) for key, id_, _ in backend.list_multipart()] == [("k", upload_id)]
        assert backend.complete_multipart("k", upload_id, [again, two]).size == 11
        assert bytes(backend.get("k")[1]) == b"new 1part 2"
        with pytest.raises(ObjectNotFoundError):
            backend.complete_multipart("k", upload_id, [again, two])
        backend.abort_multipart("k", upload_id)
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_versions_are_refused(tmp_path: Path) -> None:
    for store in (open_store(tmp_path), open_store(f"memory://{uuid.uuid4().hex}")):
        store.put("k", b"x")
        for call in (lambda s=store: s.get("k", version_id="1"), lambda s=store: s.head("k", version_id="1")):
            with pytest.raises(UnsupportedOperationError):
                call()
