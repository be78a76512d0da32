"""Arguments that would harm what is stored are refused before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest

from s3loader.errors import ConfigError
from s3loader.store import ObjectStore, open_store
from s3loader.store.arguments import check_attributes


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
    with pytest.raises(ConfigError, match="ASCII"):
        check_attributes(None, {"label": "\u00fc"}, headers=True)


def test_a_key_that_is_none_does_not_stop_the_other_deletes(store: ObjectStore) -> None:
    store.put("k", b"1")
    (failure,) = store.delete_many(["a\ud800", "k"])
    assert failure.key == "a\ud800"
    assert isinstance(failure.error, ConfigError)
    assert not store.exists("k")
