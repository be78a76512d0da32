"""Keys of the store in files: which there are, where they may lead, how they are listed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigError,
    S3LoaderError,
    UnsupportedOperationError,
)
from s3loader.store import ObjectStore, open_store
from s3loader.store.local import files as _files
from s3loader.types import CommonPrefix, ObjectMeta

BAD_KEYS = (
    "/a", "a//b", "a/", ".", "..", "../a", "a/../b", "a/./b", "a\0b", "x" * 256, ".s3loader-x/y", "a/.s3loader-tmp", "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_stay_inside(tmp_path: Path, key: str) -> None:
    root = tmp_path / "root"
    store = open_store(root)
    store.put("a/b", b"x")
    calls: list[Callable[[], Any]] = [
        lambda: store.get(key),
        lambda: store.put(key, b"y"),
        lambda: store.head(key),
        lambda: store.delete(key),
        lambda: store.copy("a/b", key),
        lambda: store.copy(key, "c"),
        lambda: store.read_into(key, 0, bytearray(1)),
        lambda: store.backend.create_multipart(key),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
    assert len(store.delete_many([key, "nothing"])) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert [entry.key for entry in store.list()] == ["a/b"]


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "inside").write_bytes(b"inside")
    (root / "dir").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "good").symlink_to(root / "inside")
    (root / "gone").symlink_to(root / "nothing")
    store = open_store(root)
    for key in ("dir/secret", "file"):
        for call in (lambda key=key: store.get(key), lambda key=key: store.head(key)):
            with pytest.raises(AccessDeniedError, match="link") as caught:
                call()
            assert caught.value.hint
    for write in (
        lambda: store.put("dir/new", b"x"),
        lambda: store.put("dir/sub/new", b"x"),
        lambda: store.delete("dir/secret"),
        lambda: store.copy("inside", "dir/x"),
    ):
        with pytest.raises(AccessDeniedError):
            write()
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert store.get("good") == b"inside"
    assert not store.exists("gone")
    assert [entry.key for entry in store.list()] == ["good", "inside"]
    assert list(store.list("dir/")) == []
    store.put("file", b"mine")  # takes the link's place, leaves its target alone
    assert store.get("file") == b"mine"
    assert (outside / "secret").read_bytes() == b"secret"


def test_the_root_may_be_a_link_or_missing(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = open_store(tmp_path / "link")
    store.put("a/b", b"x")
    assert (tmp_path / "real/a/b").read_bytes() == b"x"
    assert [entry.key for entry in store.list("a/")] == ["a/b"]
    missing = open_store(tmp_path / "no/such/folder")
    with pytest.raises(BucketNotFoundError, match="no folder") as caught:
        missing.get("k")
    assert caught.value.hint
    assert not missing.exists("k")
    assert list(missing.list()) == []
    missing.delete("k")
    missing.put("k", b"now it is")
    assert missing.get("k") == b"now it is"


def test_only_plain_files_are_objects(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path has to be short
        listener.bind("socket")
        os.chdir(here)
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_bytes(b"x")
        store = open_store(tmp_path)
        assert [entry.key for entry in store.list()] == ["file"]
        assert list(store.list(delimiter="/")) == list(store.list())
        for key in ("pipe", "socket", "folder"):
            with pytest.raises(S3LoaderError):
                store.get(key)
        assert not store.exists("folder")


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a/b", "a/b/c/d")])
def test_a_key_below_a_key_is_refused(tmp_path: Path, first: str, second: str) -> None:
    store = open_store(tmp_path)
    store.put(first, b"first")
    for mode in ("overwrite", "create"):
        with pytest.raises(UnsupportedOperationError) as caught:
            store.put(second, b"second", mode=mode)  # type: ignore[arg-type]
        assert "'a/b'" in (caught.value.hint or "")
    assert store.get(first) == b"first"
    assert not store.exists(second)
    store.delete(second)
    assert [entry.key for entry in store.list()] == [first]


def test_empty_folders_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "e/f/g").mkdir(parents=True)
    store = open_store(tmp_path)
    assert list(store.list()) == list(store.list(delimiter="/")) == []
    store.put("e", b"a file where the folder was")
    (tmp_path / "c/d").mkdir(parents=True)
    store.put("c", b"x", mode="create")
    store.put("x/y/z", b"")
    store.put("x/w", b"")
    store.delete("x/y/z")
    assert not (tmp_path / "x/y").exists(), "a folder left empty goes"
    assert (tmp_path / "x").exists()
    store.delete("x/w")
    assert not (tmp_path / "x").exists()
    assert tmp_path.exists()


def test_foreign_names_are_keys(tmp_path: Path) -> None:
    """File names are bytes; those that are no UTF-8 go through as Python has them."""
    raw = os.fsencode(tmp_path) + b"/n\xff"
    try:
        with open(raw, "wb") as file:
            file.write(b"odd")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    store = open_store(tmp_path)
    [entry] = store.list()
    assert store.get(entry.key) == b"odd"


names = st.sampled_from(["a", "b", "a-", "a.", "a0", "é", "z\U0001f600", "～"])


@settings(max_examples=50, deadline=None)
@given(
    keys=st.sets(st.lists(names, min_size=1, max_size=3).map("/".join), max_size=12),
    prefix=st.sampled_from(["", "a", "a/", "a-", "b/a", "é", "../", "/", "a//", "x"]),
    delimiter=st.sampled_from(["", "/", "-", "a/"]),
    start_after=st.sampled_from(["", "a", "a/", "a/b", "a-", "b", "é/a", "￿"]),
)
def test_files_list_as_memory_does(
    tmp_path_factory: pytest.TempPathFactory, keys: set[str], prefix: str, delimiter: str, start_after: str
) -> None:
    root = tmp_path_factory.mktemp("list")
    files, memory = open_store(root), open_store(f"memory://{root.name}")
    for key in list(keys):
        if any(other.startswith(key + "/") for other in keys):
            keys.discard(key)  # files cannot hold both
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(key.encode())
        memory.put(key, key.encode())

    def shown(store: ObjectStore) -> list[tuple[str, int | None]]:
        entries = store.list(prefix, delimiter=delimiter, start_after=start_after)
        return [(entry.key, entry.size if isinstance(entry, ObjectMeta) else None) for entry in entries]

    expected = shown(memory)
    assert shown(files) == expected
    found = [key for key, size in expected if size is not None]
    assert found == sorted(found, key=lambda key: key.encode())
    for key in list(keys):
        memory.delete(key)


def test_listing_is_lazy(tmp_path: Path) -> None:
    """The first entries of a deep tree come before the rest of it is looked at."""
    store = open_store(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "k").write_bytes(b"")
    entries = store.list()
    assert next(entries).key == "a/k"
    (tmp_path / "b/k").unlink()
    (tmp_path / "b/l").write_bytes(b"")
    assert [entry.key for entry in entries] == ["b/l"]
    assert [entry for entry in store.list(delimiter="/") if isinstance(entry, CommonPrefix)] == [
        CommonPrefix("a/"),
        CommonPrefix("b/"),
    ]


def test_a_denied_folder_is_not_passed_over(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root is denied nothing")
    (tmp_path / "shut").mkdir(mode=0)
    try:
        with pytest.raises(AccessDeniedError):
            list(open_store(tmp_path).list())
    finally:
        (tmp_path / "shut").chmod(0o700)


def test_relative_path_is_a_law() -> None:
    assert _files.relative_path("a/ b/ç") == os.fsencode("a/ b/ç")
