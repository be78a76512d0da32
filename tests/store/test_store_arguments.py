"""Arguments that would harm what is stored are refused before anything is sent."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest

from s3loader.errors import ClosedError, ConfigError, SourceNotFoundError
from s3loader.store import ObjectStore, open_store


@pytest.fixture(name="store")
def _store(tmp_path: Any) -> ObjectStore:
    return open_store(f"memory://{tmp_path.name}-{id(tmp_path)}")


def test_half_a_surrogate_pair_is_no_key(store: ObjectStore) -> None:
    """One such key made every later listing of a memory store fail."""
    for call in (lambda: store.put("a\ud800", b"1"), lambda: store.get("a\ud800"), lambda: store.copy("k", "a\ud800")):
        with pytest.raises(ConfigError):
            call()
    store.put("a\udc80", b"1")  # a file name that is not UTF-8, as os.fsdecode gives it
    assert [entry.key for entry in store.list()] == ["a\udc80"]


def test_no_more_is_committed_than_was_reserved(store: ObjectStore) -> None:
    """The rest of the buffer holds what was in it before, perhaps of another object."""
    writer = store.multipart("k")
    writer.reserve(10)[:3] = b"abc"
    with pytest.raises(ConfigError):
        writer.commit(11)
    writer.commit(3)
    with pytest.raises(ConfigError):
        writer.commit(1)
    writer.close()
    assert store.get("k") == b"abc"


@pytest.mark.parametrize("bad", [{"n": 1}, {1: "n"}, {"n": "a\r\nx-evil: 1"}, {"n\n": "a"}])
def test_metadata_that_is_no_header(store: ObjectStore, bad: Any) -> None:
    with pytest.raises(ConfigError):
        store.put("k", b"1", metadata=bad)
    with pytest.raises(ConfigError):
        store.multipart("k", metadata=bad)
    assert not store.exists("k")


def test_content_type_that_is_no_header(store: ObjectStore) -> None:
    with pytest.raises(ConfigError):
        store.put("k", b"1", content_type="text/plain\r\nx: y")


def test_metadata_beyond_ascii_only_where_it_is_no_header(store: ObjectStore) -> None:
    """obstore writes it as raw UTF-8 and then cannot HEAD the object any more."""
    store.put("k", b"1", metadata={"label": "\u00fc"})
    assert store.head("k").metadata["label"] == "\u00fc"
    keys = {"endpoint_url": "http://127.0.0.1:9", "access_key_id": "K", "secret_access_key": "S", "region": "r"}
    with open_store("s3://bucket", **keys) as s3, pytest.raises(ConfigError, match="ASCII"):
        s3.put("k", b"1", metadata={"label": "\u00fc"})


def test_a_key_that_is_none_does_not_stop_the_other_deletes(store: ObjectStore) -> None:
    store.put("k", b"1")
    (failure,) = store.delete_many(["a\ud800", "k"])
    assert failure.key == "a\ud800"
    assert isinstance(failure.error, ConfigError)
    assert not store.exists("k")


def test_a_local_file_that_is_missing_or_none(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="missing") as caught:
        store.put("k", tmp_path / "missing")
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.hint
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (SourceNotFoundError, str(caught.value))
    with pytest.raises(ConfigError, match="directory"):
        store.put("k", tmp_path)
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(ConfigError):
        store.put("k", tmp_path / "file" / "below")
    assert not store.exists("k")


def test_what_is_no_list(store: ObjectStore) -> None:
    store.put("k", b"123")
    verbs: Any = (store.get_many, store.read_many, store.put_many, store.delete_many)
    for call in verbs:
        for bad in (None, 5, "k"):
            with pytest.raises(ConfigError, match=r"takes a list|several"):
                call(bad)
    not_ranges: Any = (None, 5, "ab", [1, 2], [(0,)], [("a", "b")], [None], [(0, None)], [{}], [(2, 1)], [(-1, 1)])
    for ranges in not_ranges:
        with pytest.raises(ConfigError):
            store.get_ranges("k", ranges)
    assert [bytes(piece) for piece in store.get_ranges("k", [(0, 1), (2, 3)])] == [b"1", b"3"]


def test_nothing_works_after_close(store: ObjectStore) -> None:
    store.capabilities()
    twin = store.aio
    store.close()
    store.close()
    calls: Any = (store.capabilities, lambda: store.aio, lambda: store.delete_many([]), lambda: store.get("k"))
    for call in (*calls, lambda: asyncio.run(twin.get("k"))):
        with pytest.raises(ClosedError) as caught:
            call()
        assert caught.value.hint


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_a_pickle_holds_the_keys_as_documented(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"access_key_id": "AKIDEXAMPLE", "secret_access_key": "sesame-open"}
    if where == "environment":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["access_key_id"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["secret_access_key"])
        keys = {}
    with open_store("s3://bucket", endpoint_url="http://127.0.0.1:9", **keys) as s3:  # type: ignore[arg-type]
        assert b"sesame-open" in pickle.dumps(s3)
